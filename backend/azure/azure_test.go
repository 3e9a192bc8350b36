package azure

import (
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"

	"graindisk/backend"
	"graindisk/backend/adaptive"
)

const (
	testKey    = "bm90IGEgc2VjcmV0" // "not a secret"
	testSecret = "sig=verysecretsignature"
)

// fakeStore answers every request in the same way, and counts them.
func fakeStore(t *testing.T, answer http.HandlerFunc) (*Store, *atomic.Int64) {
	t.Helper()
	requests := new(atomic.Int64)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		requests.Add(1)
		_, _ = io.Copy(io.Discard, r.Body)
		answer(w, r)
	}))
	t.Cleanup(server.Close)
	s, err := Open(Options{Account: "acct", Container: "c", Endpoint: server.URL + "/acct", Credentials: Credentials{AccountKey: testKey}})
	if err != nil {
		t.Fatal(err)
	}
	return s, requests
}

func answer(status int, code string) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/xml")
		if code != "" {
			w.Header().Set("x-ms-error-code", code)
		}
		w.WriteHeader(status)
		if code != "" && r.Method != http.MethodHead {
			fmt.Fprintf(w, `<?xml version="1.0"?><Error><Code>%s</Code><Message>words</Message></Error>`, code)
		}
	}
}

func TestAnswersAreClassified(t *testing.T) {
	for _, c := range []struct {
		status int
		code   string
		want   backend.Class
	}{
		{404, "BlobNotFound", backend.NotFound},
		{404, "ContainerNotFound", backend.Permanent},
		{404, "", backend.NotFound},
		{409, "BlobAlreadyExists", backend.Precondition},
		{412, "ConditionNotMet", backend.Precondition},
		{412, "", backend.Precondition},
		{412, "LeaseIdMissing", backend.Permanent},
		{409, "ContainerBeingDeleted", backend.Transient},
		{409, "BlobImmutableDueToPolicy", backend.Permanent},
		{409, "BlobArchived", backend.Permanent},
		{403, "AuthenticationFailed", backend.Auth},
		{403, "AuthorizationPermissionMismatch", backend.Auth},
		{401, "NoAuthenticationInformation", backend.Auth},
		{503, "ServerBusy", backend.Throttled},
		{429, "", backend.Throttled},
		{500, "OperationTimedOut", backend.Transient},
		{500, "InternalError", backend.Transient},
		{502, "", backend.Transient},
		{400, "Md5Mismatch", backend.Transient},
		{507, "", backend.Full},
		{416, "InvalidRange", backend.Short},
		{400, "InvalidHeaderValue", backend.Permanent},
		{307, "", backend.Permanent},
	} {
		t.Run(fmt.Sprint(c.status, c.code), func(t *testing.T) {
			t.Parallel()
			s, requests := fakeStore(t, answer(c.status, c.code))
			_, err := s.Put(t.Context(), "k", []byte("x"), backend.Cond{Absent: true})
			if got := backend.ClassOf(err); got != c.want {
				t.Errorf("class %v, want %v: %v", got, c.want, err)
			}
			if n := requests.Load(); n != 1 {
				t.Errorf("a conditional put was sent %d times", n)
			}
			if strings.Contains(err.Error(), "\n") || !strings.HasPrefix(err.Error(), "put k in azure://acct/c at http://127.0.0.1:") {
				t.Errorf("message %q", err)
			}
		})
	}
}

func TestUnconditionalIsRetried(t *testing.T) {
	var n atomic.Int64
	s, requests := fakeStore(t, func(w http.ResponseWriter, r *http.Request) {
		if n.Add(1) < 3 {
			answer(503, "ServerBusy")(w, r)
			return
		}
		w.Header().Set("ETag", `"1"`)
		w.WriteHeader(http.StatusCreated)
	})
	etag, err := s.Put(t.Context(), "k", []byte("x"), backend.Cond{})
	if err != nil || etag != `"1"` || requests.Load() != 3 {
		t.Errorf("etag %q, %v, %d requests", etag, err, requests.Load())
	}
}

// TestReadAtDistrusts gives ranges other than those asked for.
func TestReadAtDistrusts(t *testing.T) {
	for name, c := range map[string]struct {
		header, body string
		want         backend.Class
	}{
		"another range":  {"bytes 0-3/10", "abcd", backend.Permanent},
		"no range":       {"", "abcd", backend.Permanent},
		"shorter object": {"bytes 4-5/6", "ab", backend.Short},
		"cut short":      {"bytes 4-7/10", "ab", backend.Transient},
	} {
		t.Run(name, func(t *testing.T) {
			s, _ := fakeStore(t, func(w http.ResponseWriter, r *http.Request) {
				if got := r.Header.Get("x-ms-range"); got != "bytes=4-7" {
					t.Errorf("asked for %q", got)
				}
				w.Header().Set("Content-Range", c.header)
				w.Header().Set("Content-Length", fmt.Sprint(len(c.body)))
				w.WriteHeader(http.StatusPartialContent)
				_, _ = io.WriteString(w, c.body)
				if c.want == backend.Transient {
					panic(http.ErrAbortHandler)
				}
			})
			err := s.ReadAt(t.Context(), "k", make([]byte, 4), 4)
			if got := backend.ClassOf(err); got != c.want {
				t.Errorf("%v: %v, want %v", got, err, c.want)
			}
		})
	}
}

func TestOptionsAreChecked(t *testing.T) {
	good := Options{Account: "acct", Container: "c", Credentials: Credentials{AccountKey: testKey}}
	if s, err := Open(good); err != nil || s.String() != "azure://acct/c" {
		t.Errorf("%v, %v", s, err)
	}
	for name, change := range map[string]func(*Options){
		"no container":      func(o *Options) { o.Container = "" },
		"no account":        func(o *Options) { o.Account = "" },
		"bad prefix":        func(o *Options) { o.Prefix = "a//b" },
		"two credentials":   func(o *Options) { o.SAS = "sig=x" },
		"bad endpoint":      func(o *Options) { o.Endpoint = "ftp://x" },
		"secret endpoint":   func(o *Options) { o.Endpoint = "https://x/?" + testSecret },
		"bad key":           func(o *Options) { o.AccountKey = "###" },
		"bad string":        func(o *Options) { o.AccountKey, o.ConnectionString = "", testSecret },
		"missing CA file":   func(o *Options) { o.CAFile = "/nowhere.pem" },
		"CA file of no PEM": func(o *Options) { o.CAFile = "/dev/null" },
	} {
		o := good
		change(&o)
		if _, err := Open(o); err == nil || strings.Contains(err.Error(), testSecret) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestEveryRequestIsCounted has a busy service: with one attempt of the driver's, what adaptive counts is what
// reaches the service.
func TestEveryRequestIsCounted(t *testing.T) {
	for attempts, want := range map[int]int64{1: 3, 0: 9, 2: 6} {
		t.Run(fmt.Sprint(attempts), func(t *testing.T) {
			t.Parallel()
			s, requests := fakeStore(t, answer(503, "ServerBusy"))
			o := s.o
			o.Attempts = attempts
			inner, err := Open(o)
			if err != nil {
				t.Fatal(err)
			}
			store := adaptive.New(inner, adaptive.Options{Attempts: 3})
			if err := store.ReadAt(t.Context(), "k", make([]byte, 1), 0); backend.ClassOf(err) != backend.Throttled {
				t.Error(err)
			}
			if n := requests.Load(); n != want {
				t.Errorf("%d requests, want %d", n, want)
			}
			if n := store.Health().Ops["read"].Requests; n != 3 {
				t.Errorf("%d requests are counted", n)
			}
		})
	}
}
