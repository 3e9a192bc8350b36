package s3

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"graindisk/backend"
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
	return openAt(t, server.URL), requests
}

func openAt(t *testing.T, endpoint string) *Store {
	t.Helper()
	s, err := Open(t.Context(), Options{Bucket: "b", Endpoint: endpoint, PathStyle: true, AccessKey: "a", SecretKey: "s"})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func answer(status int, code string) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/xml")
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
		{404, "NoSuchKey", backend.NotFound},
		{404, "NoSuchBucket", backend.Permanent},
		{404, "", backend.NotFound},
		{412, "PreconditionFailed", backend.Precondition},
		{409, "ConditionalRequestConflict", backend.Transient},
		{409, "OperationAborted", backend.Transient},
		{403, "AccessDenied", backend.Auth},
		{403, "RequestTimeTooSkewed", backend.Auth},
		{401, "", backend.Auth},
		{400, "ExpiredToken", backend.Auth},
		{429, "", backend.Throttled},
		{503, "SlowDown", backend.Throttled},
		{503, "SlowDownWrite", backend.Throttled},
		{503, "", backend.Throttled},
		{503, "XMinioServerNotInitialized", backend.Transient},
		{500, "InternalError", backend.Transient},
		{502, "", backend.Transient},
		{400, "RequestTimeout", backend.Transient},
		{400, "BadDigest", backend.Transient},
		{507, "XMinioStorageFull", backend.Full},
		{507, "", backend.Full},
		{400, "XMinioAdminBucketQuotaExceeded", backend.Full},
		{403, "QuotaExceeded", backend.Full},
		{416, "InvalidRange", backend.Short},
		{400, "InvalidArgument", backend.Permanent},
		{501, "NotImplemented", backend.Permanent},
		{301, "PermanentRedirect", backend.Permanent},
		{307, "TemporaryRedirect", backend.Permanent},
	} {
		t.Run(fmt.Sprint(c.status, c.code), func(t *testing.T) {
			t.Parallel() // the retries wait
			s, requests := fakeStore(t, answer(c.status, c.code))
			_, err := s.Put(t.Context(), "k", []byte("x"), backend.Cond{Absent: true})
			if got := backend.ClassOf(err); got != c.want {
				t.Errorf("class %v, want %v: %v", got, c.want, err)
			}
			if n := requests.Load(); n != 1 {
				t.Errorf("a conditional put was sent %d times", n)
			}
			if got := backend.ClassOf(s.ReadAt(t.Context(), "k", make([]byte, 1), 0)); got != c.want {
				t.Errorf("read: class %v, want %v", got, c.want)
			}
			_, _, err = s.Get(t.Context(), "k", 10)
			if got := backend.ClassOf(err); got != c.want {
				t.Errorf("get: class %v, want %v: %v", got, c.want, err)
			}
			if strings.Contains(err.Error(), "operation error") || len(err.Error()) > 200 {
				t.Errorf("long-winded: %v", err)
			}
		})
	}
}

func TestOnlyUnconditionalRequestsAreSentAgain(t *testing.T) {
	for name, c := range map[string]struct {
		call func(ctx context.Context, s *Store) error
		want int64
	}{
		"put": {func(ctx context.Context, s *Store) error {
			_, err := s.Put(ctx, "k", []byte("x"), backend.Cond{})
			return err
		}, 3},
		"put if absent": {func(ctx context.Context, s *Store) error {
			_, err := s.Put(ctx, "k", []byte("x"), backend.Cond{Absent: true})
			return err
		}, 1},
		"put if match": {func(ctx context.Context, s *Store) error {
			_, err := s.Put(ctx, "k", []byte("x"), backend.Cond{Match: "e"})
			return err
		}, 1},
		"read":   {func(ctx context.Context, s *Store) error { return s.ReadAt(ctx, "k", make([]byte, 1), 0) }, 3},
		"delete": {func(ctx context.Context, s *Store) error { return s.Delete(ctx, "k") }, 3},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for what, reply := range map[string]http.HandlerFunc{
				"a 500":        answer(500, "InternalError"),
				"a lost reply": func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) },
			} {
				s, requests := fakeStore(t, reply)
				err := c.call(t.Context(), s)
				if backend.ClassOf(err) != backend.Transient || err == nil {
					t.Errorf("%s gives %v", what, err)
				}
				if n := requests.Load(); n != c.want {
					t.Errorf("after %s the request was sent %d times, want %d", what, n, c.want)
				}
			}
		})
	}
}

func TestUnreachableEndpointIsTransientAndQuick(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l.Close() // nobody answers there now
	s := openAt(t, "http://"+l.Addr().String())
	start := time.Now()
	_, err = s.Stat(t.Context(), "k")
	if backend.ClassOf(err) != backend.Transient || !strings.Contains(fmt.Sprint(err), "connection refused") {
		t.Errorf("stat gives %v", err)
	}
	if took := time.Since(start); took > 10*time.Second {
		t.Errorf("it took %v", took)
	}
}

func TestContextEndsAHangingRequest(t *testing.T) {
	hang := make(chan struct{})
	defer close(hang)
	s, _ := fakeStore(t, func(http.ResponseWriter, *http.Request) { <-hang })
	ctx, cancel := context.WithCancel(t.Context())
	time.AfterFunc(50*time.Millisecond, cancel)
	_, _, err := s.Get(ctx, "k", 10)
	if backend.ClassOf(err) != backend.Transient || !errors.Is(err, context.Canceled) {
		t.Errorf("get gives %v", err)
	}
}

func TestDamagedAnswersAreNotBelieved(t *testing.T) {
	for name, reply := range map[string]http.HandlerFunc{
		"a body cut short": func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Length", "10")
			w.Header().Set("Content-Range", "bytes 0-9/10")
			w.WriteHeader(http.StatusPartialContent)
			_, _ = w.Write([]byte("short"))
			panic(http.ErrAbortHandler)
		},
		"a body that is not its checksum's": func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("X-Amz-Checksum-Crc32c", "AAAAAA==")
			_, _ = w.Write([]byte("0123456789"))
		},
	} {
		s, _ := fakeStore(t, reply)
		if _, _, err := s.Get(t.Context(), "k", 10); err == nil || backend.ClassOf(err) != backend.Transient {
			t.Errorf("%s: get gives %v", name, err)
		}
	}
}

func TestRangesAreChecked(t *testing.T) {
	for name, c := range map[string]struct {
		contentRange string
		body         string
		want         backend.Class
	}{
		"right":              {"bytes 5-14/100", "0123456789", 0},
		"no range":           {"", "0123456789", backend.Permanent},
		"another range":      {"bytes 0-9/100", "0123456789", backend.Permanent},
		"the object is over": {"bytes 5-9/10", "01234", backend.Short},
		"fewer bytes":        {"bytes 5-14/100", "01234", backend.Transient},
	} {
		s, _ := fakeStore(t, func(w http.ResponseWriter, r *http.Request) {
			if got := r.Header.Get("Range"); got != "bytes=5-14" {
				t.Errorf("asked for %q", got)
			}
			if c.contentRange != "" {
				w.Header().Set("Content-Range", c.contentRange)
			}
			w.WriteHeader(http.StatusPartialContent)
			_, _ = w.Write([]byte(c.body))
		})
		err := s.ReadAt(t.Context(), "k", make([]byte, 10), 5)
		if got := backend.ClassOf(err); got != c.want {
			t.Errorf("%s: %v, want class %v", name, err, c.want)
		}
	}
}

func TestMissingCredentialsAreAuth(t *testing.T) {
	t.Setenv("HOME", t.TempDir())
	t.Setenv("AWS_EC2_METADATA_DISABLED", "true")
	for _, name := range []string{"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"} {
		t.Setenv(name, "")
	}
	s, err := Open(t.Context(), Options{Bucket: "b", Endpoint: "http://127.0.0.1:1", PathStyle: true})
	if err != nil {
		t.Fatal(err)
	}
	if _, err = s.Stat(t.Context(), "k"); backend.ClassOf(err) != backend.Auth {
		t.Errorf("stat gives %v", err)
	}
	if _, err := Open(t.Context(), Options{Bucket: "b", AccessKey: "a", SecretKey: "s"}); err == nil || !strings.Contains(err.Error(), "region") {
		t.Errorf("open without a region: %v", err)
	}
}

func TestInvalidOptionsAreNamed(t *testing.T) {
	_, err := Open(t.Context(), Options{Prefix: "/p", Endpoint: "ftp://user:hidden@host", AccessKey: "a"})
	for _, want := range []string{"no bucket", "prefix", "secret key", "endpoint"} {
		if !strings.Contains(fmt.Sprint(err), want) {
			t.Errorf("%v does not name the %s", err, want)
		}
	}
	if strings.Contains(fmt.Sprint(err), "hidden") {
		t.Errorf("%v tells a password", err)
	}
}

func TestName(t *testing.T) {
	for want, o := range map[string]Options{
		"s3://b":                             {Bucket: "b", Region: "eu-central-1"},
		"s3://b/p/q at http://127.0.0.1:900": {Bucket: "b", Prefix: "p/q", Endpoint: "http://127.0.0.1:900"},
	} {
		o.AccessKey, o.SecretKey = "a", "s"
		s, err := Open(t.Context(), o)
		if err != nil {
			t.Fatal(err)
		}
		if s.String() != want {
			t.Errorf("got %q, want %q", s, want)
		}
	}
}
