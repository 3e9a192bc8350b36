package azure

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"graindisk/backend"
	"graindisk/backend/adaptive"
)

// everyCall makes each kind of call, all at once, and returns their errors.
func everyCall(ctx context.Context, s backend.Store) map[string]error {
	errs := map[string]error{}
	var mu sync.Mutex
	var wg sync.WaitGroup
	for op, call := range map[string]func() error{
		"put":           func() error { _, err := s.Put(ctx, "k", []byte("x"), backend.Cond{}); return err },
		"put if absent": func() error { _, err := s.Put(ctx, "k", []byte("x"), backend.Cond{Absent: true}); return err },
		"get":           func() error { _, _, err := s.Get(ctx, "k", 100); return err },
		"stat":          func() error { _, err := s.Stat(ctx, "k"); return err },
		"list":          func() error { _, _, err := s.List(ctx, "", "", 1); return err },
		"read":          func() error { return s.ReadAt(ctx, "k", make([]byte, 1), 0) },
		"delete":        func() error { return s.Delete(ctx, "k") },
	} {
		wg.Go(func() {
			err := call()
			mu.Lock()
			defer mu.Unlock()
			errs[op] = err
		})
	}
	wg.Wait()
	return errs
}

// TestErrorsKeepSecrets makes calls fail in many ways under a SAS, which is part of every URL, and which some of the
// answers repeat. No error in the chain may tell it, however it is printed.
func TestErrorsKeepSecrets(t *testing.T) {
	const signature = "verysecretsignature"
	faults := map[string]func(w http.ResponseWriter, r *http.Request){
		"refused": func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("x-ms-error-code", "AuthenticationFailed")
			w.WriteHeader(http.StatusForbidden)
			fmt.Fprintf(w, "<Error><Code>AuthenticationFailed</Code><Message>no</Message><AuthenticationErrorDetail>%s</AuthenticationErrorDetail></Error>", r.URL)
		},
		"broken": func(w http.ResponseWriter, r *http.Request) {
			http.Error(w, r.URL.String(), http.StatusInternalServerError)
		},
		"moved": func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, r.URL.String(), http.StatusTemporaryRedirect)
		},
		"nonsense": func(w http.ResponseWriter, r *http.Request) { fmt.Fprintf(w, "<a href=%q>", r.URL.String()) },
		"reset": func(w http.ResponseWriter, _ *http.Request) {
			if conn, _, err := http.NewResponseController(w).Hijack(); err == nil {
				_ = conn.(*net.TCPConn).SetLinger(0)
				_ = conn.Close()
			}
		},
		"cut short": func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Range", "bytes 0-0/1")
			w.Header().Set("Content-Length", "50")
			w.WriteHeader(http.StatusPartialContent)
			_, _ = io.WriteString(w, "x")
			panic(http.ErrAbortHandler)
		},
		"late": func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() },
	}
	for name, answer := range faults {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var asked atomic.Int64
			server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				asked.Add(1)
				if r.URL.Query().Get("sig") != signature {
					t.Errorf("a request without its signature: %s", r.URL)
				}
				_, _ = io.Copy(io.Discard, r.Body) // or the end of the connection is not noticed
				answer(w, r)
			}))
			t.Cleanup(server.Close)
			sas := Credentials{SAS: "?sv=2024&sp=rwdl&sig=" + signature}
			renew := func(context.Context) (Credentials, error) { return sas, nil }
			s, err := Open(Options{Account: "acct", Container: "c", Endpoint: server.URL + "/acct", Credentials: sas, Renew: renew})
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithCancel(t.Context())
			if name == "late" {
				ctx, cancel = context.WithTimeout(ctx, 100*time.Millisecond)
			}
			defer cancel()
			failed := 0
			for op, err := range everyCall(ctx, s) {
				if err != nil {
					failed++
				}
				checkSecret(t, op, err, signature)
			}
			found, err := s.Inspect(ctx)
			checkSecret(t, "inspect", err, signature)
			if text := fmt.Sprintf("%+v %v", found, s); strings.Contains(text, signature) {
				t.Errorf("tells the secret: %s", text)
			}
			if failed == 0 || asked.Load() == 0 {
				t.Errorf("%d calls failed of %d requests", failed, asked.Load())
			}
		})
	}
	t.Run("nobody there", func(t *testing.T) {
		s, err := Open(Options{Account: "acct", Container: "c", Endpoint: "http://127.0.0.1:1", Credentials: Credentials{SAS: "sig=" + signature}})
		if err != nil {
			t.Fatal(err)
		}
		for op, err := range everyCall(t.Context(), s) {
			if backend.ClassOf(err) != backend.Transient {
				t.Errorf("%s: %v", op, err)
			}
			checkSecret(t, op, err, signature)
		}
	})
}

func checkSecret(t *testing.T, what string, err error, secret string) {
	t.Helper()
	for e := err; e != nil; e = errors.Unwrap(e) {
		for _, form := range []string{"%v", "%+v", "%s"} {
			if text := fmt.Sprintf(form, e); strings.Contains(text, secret) {
				t.Errorf("%s: tells the secret: %s", what, text)
			}
		}
	}
}

// TestKeysAreRotated has a service that takes one signature at a time, and a place where the newest is written.
func TestKeysAreRotated(t *testing.T) {
	var takes, written atomic.Value
	takes.Store("one")
	written.Store(Credentials{SAS: "sig=one"})
	var refused atomic.Int64
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		if r.URL.Query().Get("sig") != takes.Load() {
			refused.Add(1)
			answer(http.StatusForbidden, "AuthenticationFailed")(w, r)
			return
		}
		w.Header().Set("ETag", `"1"`)
		w.WriteHeader(http.StatusCreated)
	}))
	t.Cleanup(server.Close)
	o := Options{Account: "acct", Container: "c", Endpoint: server.URL + "/acct", Credentials: Credentials{SAS: "sig=one"}}
	o.Renew = func(context.Context) (Credentials, error) {
		if c, ok := written.Load().(Credentials); ok && c.SAS != "" {
			return c, nil
		}
		return Credentials{}, errors.New("no such file")
	}
	inner, err := Open(o)
	if err != nil {
		t.Fatal(err)
	}
	s := adaptive.New(inner, adaptive.Options{})
	puts := func() (failed int) {
		var wg sync.WaitGroup
		var mu sync.Mutex
		for i := range 20 {
			wg.Go(func() {
				if _, err := s.Put(t.Context(), fmt.Sprint(i), []byte("x"), backend.Cond{Absent: true}); err != nil {
					if !errors.Is(err, backend.ErrAuth) {
						t.Error(err)
					}
					mu.Lock()
					failed++
					mu.Unlock()
				}
			})
		}
		wg.Wait()
		return failed
	}
	if n := puts(); n != 0 || refused.Load() != 0 {
		t.Fatalf("%d puts failed with the first signature", n)
	}
	takes.Store("two")
	written.Store(Credentials{SAS: "sig=two"})
	if n := puts(); n != 0 || refused.Load() == 0 || refused.Load() > 20 {
		t.Errorf("%d puts failed though there is a new signature; %d requests were refused", n, refused.Load())
	}
	takes.Store("three")
	written.Store(Credentials{})
	if n := puts(); n != 20 {
		t.Errorf("%d of 20 puts failed without a signature", n)
	}
	if changed, err := inner.Refresh(t.Context()); changed || err == nil || !strings.Contains(err.Error(), "no such file") {
		t.Errorf("refresh without a file: %v, %v", changed, err)
	}
	for name, c := range map[string]Credentials{
		"two kinds at once":  {SAS: "sig=three", AccountKey: testKey},
		"an unreadable key":  {AccountKey: "###"},
		"another's account":  {ConnectionString: "DefaultEndpointsProtocol=https;AccountName=other;AccountKey=" + testKey + ";EndpointSuffix=core.windows.net"},
		"an unreadable text": {ConnectionString: testSecret},
	} {
		o.Renew = func(context.Context) (Credentials, error) { return c, nil }
		inner.o.Renew = o.Renew
		if changed, err := inner.Refresh(t.Context()); changed || err == nil || strings.Contains(err.Error(), testSecret) || strings.Contains(err.Error(), testKey) {
			t.Errorf("refresh by %s: %v, %v", name, changed, err)
		}
	}
	inner.o.Renew = func(context.Context) (Credentials, error) { return Credentials{SAS: "sig=three"}, nil }
	if changed, err := inner.Refresh(t.Context()); !changed || err != nil {
		t.Errorf("refresh: %v, %v", changed, err)
	}
	if changed, err := inner.Refresh(t.Context()); changed || err != nil {
		t.Errorf("refresh by the same: %v, %v", changed, err)
	}
	if n := puts(); n != 0 {
		t.Errorf("%d puts failed with the third signature", n)
	}
}
