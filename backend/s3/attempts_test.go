package s3

import (
	"context"
	"fmt"
	"net/http"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws/retry"

	"graindisk/backend"
	"graindisk/backend/adaptive"
)

// callsOf are all kinds of calls that a pool makes of a store.
var callsOf = map[string]func(ctx context.Context, s *adaptive.Store) error{
	"put": func(ctx context.Context, s *adaptive.Store) error {
		_, err := s.Put(ctx, "k", []byte("x"), backend.Cond{})
		return err
	},
	"put if absent": func(ctx context.Context, s *adaptive.Store) error {
		_, err := s.Put(ctx, "k", []byte("x"), backend.Cond{Absent: true})
		return err
	},
	"put in parts": func(ctx context.Context, s *adaptive.Store) error {
		_, err := s.Put(ctx, "k", make([]byte, multipartMin+1), backend.Cond{})
		return err
	},
	"get": func(ctx context.Context, s *adaptive.Store) error {
		_, _, err := s.Get(ctx, "k", 10)
		return err
	},
	"read": func(ctx context.Context, s *adaptive.Store) error { return s.ReadAt(ctx, "k", make([]byte, 1), 0) },
	"stat": func(ctx context.Context, s *adaptive.Store) error {
		_, err := s.Stat(ctx, "k")
		return err
	},
	"delete": func(ctx context.Context, s *adaptive.Store) error { return s.Delete(ctx, "k") },
	"delete two": func(ctx context.Context, s *adaptive.Store) error {
		for _, err := range s.DeleteBatch(ctx, []string{"k", "l"}) {
			return err
		}
		return nil
	},
	"list": func(ctx context.Context, s *adaptive.Store) error {
		_, _, err := s.List(ctx, "", "", 10)
		return err
	},
	"copy": func(ctx context.Context, s *adaptive.Store) error {
		_, err := s.CopyFrom(ctx, "k", s, "l", backend.Cond{})
		return err
	},
}

// reopen is s with so many attempts, and what adapts to it.
func reopen(t *testing.T, s *Store, attempts int) *adaptive.Store {
	t.Helper()
	o := s.o
	o.Attempts, o.MultipartAbove = attempts, multipartMin
	inner, err := Open(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	return adaptive.New(inner, adaptive.Options{Attempts: 3})
}

func counted(s *adaptive.Store) (n, retries uint64) {
	for _, op := range s.Health().Ops {
		n, retries = n+op.Requests, retries+op.Retries
	}
	return n, retries
}

// TestEveryRequestIsCounted has a busy store: with one attempt of the driver's, what adaptive counts is what reaches
// the store.
func TestEveryRequestIsCounted(t *testing.T) {
	for attempts, each := range map[int]int64{1: 1, 0: 3, 2: 2} {
		for name, call := range callsOf {
			if attempts != 1 && name != "put" && name != "read" && name != "put if absent" {
				continue // one of each way to the store, and the exception
			}
			t.Run(fmt.Sprint(attempts, " ", name), func(t *testing.T) {
				t.Parallel() // the retries wait
				first, requests := fakeStore(t, answer(503, "SlowDown"))
				store := reopen(t, first, attempts)
				if err := call(t.Context(), store); backend.ClassOf(err) != backend.Throttled {
					t.Error(err)
				}
				times, want := uint64(3), 3*each
				if name == "put if absent" {
					times, want = 1, 1
				}
				if n := requests.Load(); n != want {
					t.Errorf("%d requests, want %d", n, want)
				}
				if n, retries := counted(store); n != times || retries != times-1 {
					t.Errorf("%d requests and %d retries are counted, want %d", n, retries, times)
				}
			})
		}
	}
}

// TestStoreWithAnotherClock refuses what is dated more than 15 minutes from the store's time. A first refusal is
// answered by one more request, dated by the store's clock, and none is refused after that; a put with a condition is
// left to its caller.
func TestStoreWithAnotherClock(t *testing.T) {
	for _, ahead := range []time.Duration{time.Hour, -time.Hour} {
		for attempts, calls := range map[int][]string{
			1: {"put", "put if absent", "get", "read", "stat", "delete", "delete two", "list"},
			3: {"put", "read"},
		} {
			for _, name := range calls {
				call := callsOf[name]
				t.Run(fmt.Sprint(ahead, attempts, name), func(t *testing.T) {
					t.Parallel()
					refused := 0
					first, requests := fakeStore(t, func(w http.ResponseWriter, r *http.Request) {
						now := time.Now().Add(ahead)
						w.Header().Set("Date", now.UTC().Format(http.TimeFormat))
						dated, err := time.Parse("20060102T150405Z", r.Header.Get("X-Amz-Date"))
						if err != nil {
							t.Error(err)
						}
						if now.Sub(dated).Abs() > 15*time.Minute {
							refused++
							answer(403, "RequestTimeTooSkewed")(w, r)
							return
						}
						yes(w, r)
					})
					store := reopen(t, first, attempts)
					for i := range int64(3) {
						err := call(t.Context(), store)
						if i == 0 && name == "put if absent" && backend.ClassOf(err) == backend.Transient {
							requests.Add(-1) // as if there had been one more
							err = call(t.Context(), store)
							requests.Add(1)
						}
						if err != nil {
							t.Fatal(err)
						}
						if n := requests.Load(); n != i+2 {
							t.Errorf("%d requests for %d calls", n, i+1)
						}
					}
					if refused != 1 {
						t.Errorf("%d requests were refused", refused)
					}
				})
			}
		}
	}
}

// yes is the answer of a store that has what it is asked for, one byte.
func yes(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("ETag", `"e"`)
	switch {
	case r.Method == http.MethodPost:
		fmt.Fprint(w, `<DeleteResult><Deleted><Key>k</Key></Deleted><Deleted><Key>l</Key></Deleted></DeleteResult>`)
	case r.URL.Query().Has("list-type"):
		fmt.Fprint(w, `<ListBucketResult></ListBucketResult>`)
	case r.Header.Get("Range") != "":
		w.Header().Set("Content-Range", "bytes 0-0/1")
		w.WriteHeader(http.StatusPartialContent)
		fmt.Fprint(w, "x")
	case r.Method == http.MethodDelete:
		w.WriteHeader(http.StatusNoContent)
	case r.Method == http.MethodGet:
		fmt.Fprint(w, "x")
	}
}

// TestRefusalsThatAreNotOfTheClock stay refusals: the store's time is near, or not to be seen.
func TestRefusalsThatAreNotOfTheClock(t *testing.T) {
	for name, c := range map[string]struct {
		date, age string
		want      backend.Class
	}{
		"near":                {time.Now().Add(-3 * time.Minute).UTC().Format(http.TimeFormat), "", backend.Auth},
		"far":                 {time.Now().Add(-5 * time.Minute).UTC().Format(http.TimeFormat), "", backend.Transient},
		"not a date":          {"yesterday", "", backend.Auth},
		"kept by a cache":     {time.Now().Add(-time.Hour).UTC().Format(http.TimeFormat), "3600", backend.Auth},
		"an answer of no one": {"", "", backend.Auth},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			first, _ := fakeStore(t, func(w http.ResponseWriter, r *http.Request) {
				w.Header()["Date"] = nil
				if c.date != "" {
					w.Header().Set("Date", c.date)
				}
				if c.age != "" {
					w.Header().Set("Age", c.age)
				}
				answer(403, "RequestTimeTooSkewed")(w, r)
			})
			o := first.o
			o.Attempts = 1
			for op, call := range map[string]func(*Store) error{
				"read": func(s *Store) error { return s.ReadAt(t.Context(), "k", make([]byte, 1), 0) },
				"stat": func(s *Store) error { _, err := s.Stat(t.Context(), "k"); return err },
				"put":  func(s *Store) error { _, err := s.Put(t.Context(), "k", nil, backend.Cond{}); return err },
			} {
				s, err := Open(t.Context(), o)
				if err != nil {
					t.Fatal(err)
				}
				if err := call(s); backend.ClassOf(err) != c.want {
					t.Errorf("%s: %v, want %v", op, err, c.want)
				}
			}
		})
	}
}

// TestWhatTheSDKSendsAgainPasses holds the SDK's lists of what is worth another attempt against our classes, by which
// adaptive makes one.
func TestWhatTheSDKSendsAgainPasses(t *testing.T) {
	for status := range retry.DefaultRetryableHTTPStatusCodes {
		if c := classOf("", status); c != backend.Transient && c != backend.Throttled {
			t.Errorf("status %d is %v", status, c)
		}
	}
	for code := range retry.DefaultRetryableErrorCodes {
		if c := classOf(code, 400); c != backend.Transient {
			t.Errorf("%s is %v", code, c)
		}
	}
	for code := range retry.DefaultThrottleErrorCodes {
		if c := classOf(code, 400); c != backend.Throttled {
			t.Errorf("%s is %v", code, c)
		}
	}
}
