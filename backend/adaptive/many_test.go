package adaptive

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"graindisk/backend"
	"graindisk/backend/backendtest"
)

// batches is a store that ends each key of a batch as told, and keeps what it was asked.
type batches struct {
	backend.Store
	asked [][]string
	do    func(attempt int, key string) error
}

func (b *batches) DeleteBatch(_ context.Context, keys []string) (errs []error) {
	b.asked = append(b.asked, slices.Clone(keys))
	for i, key := range keys {
		errs = backend.SetError(errs, len(keys), i, b.do(len(b.asked), key))
	}
	return errs
}

// TestBatchTriesAgainWhatPasses lets some keys fail for good, some once, some always.
func TestBatchTriesAgainWhatPasses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := &batches{Store: backendtest.NewMemory("m")}
		b.do = func(attempt int, key string) error {
			switch {
			case key == "denied":
				return fault(backend.Auth)
			case key == "held" && attempt == 1:
				return fault(backend.Permanent)
			case key == "once" && attempt == 1, key == "always":
				return fault(backend.Throttled)
			}
			return nil
		}
		s := New(b, Options{Attempts: 3})
		errs := backend.DeleteMany(t.Context(), s, []string{"good", "denied", "once", "always"})
		var got []string
		for _, err := range errs {
			got = append(got, fmt.Sprint(backend.ClassOf(err)))
		}
		if want := []backend.Class{0, backend.Auth, 0, backend.Throttled}; fmt.Sprint(got) != fmt.Sprint(words(want)) {
			t.Errorf("got %v, want %v", got, words(want))
		}
		if want := "[[good denied once always] [denied once always] [denied always]]"; fmt.Sprint(b.asked) != want {
			t.Errorf("asked for %v, want %s", b.asked, want)
		}
		if st := s.Health().Ops["delete"]; st.Requests != 3 || st.Retries != 2 {
			t.Errorf("stats %+v", st)
		}
		b.asked = nil
		if errs := s.DeleteBatch(t.Context(), []string{"once", "good"}); errs != nil {
			t.Errorf("at last all are gone, and it says %v", errs)
		}
		b.asked = nil
		if errs := s.DeleteBatch(t.Context(), []string{"held", "once"}); len(errs) != 2 || backend.ClassOf(errs[0]) != backend.Permanent || errs[1] != nil {
			t.Errorf("one failed for good before the other succeeded, and it says %v", errs)
		}
	})
}

func words(cs []backend.Class) (w []string) {
	for _, c := range cs {
		w = append(w, fmt.Sprint(c))
	}
	return w
}

// refreshed is batches whose credentials can be had anew.
type refreshed struct {
	*batches
	fresh bool
}

// Refresh implements backend.Refresher.
func (r *refreshed) Refresh(context.Context) (bool, error) {
	r.fresh = true
	return true, nil
}

// TestBatchIsSentAgainWithNewCredentials refuses one key, or all, until the credentials are new.
func TestBatchIsSentAgainWithNewCredentials(t *testing.T) {
	for _, refuses := range []string{"b", "a b c"} {
		synctest.Test(t, func(t *testing.T) {
			gone := map[string]bool{}
			r := &refreshed{batches: &batches{Store: backendtest.NewMemory("m")}}
			r.do = func(_ int, key string) error {
				if !r.fresh && strings.Contains(refuses, key) {
					return fault(backend.Auth)
				}
				gone[key] = true
				return nil
			}
			if errs := New(r, Options{}).DeleteBatch(t.Context(), []string{"a", "b", "c"}); errs != nil || len(gone) != 3 {
				t.Errorf("%s refused at first: %v, and %v are gone", refuses, errs, gone)
			}
		})
	}
}

// TestBatchThatIsNotSent expects each key to fail with its own name.
func TestBatchThatIsNotSent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := &batches{Store: backendtest.NewMemory("m"), do: func(int, string) error { return fault(backend.Transient) }}
		s := New(b, Options{Attempts: 1})
		for s.State() != Offline {
			s.DeleteBatch(t.Context(), []string{"k"})
			time.Sleep(time.Second)
		}
		b.asked = nil
		s.DeleteBatch(t.Context(), []string{"k"}) // the probe
		if len(b.asked) > 1 {
			t.Fatalf("asked for %v", b.asked)
		}
		b.asked = nil
		errs := s.DeleteBatch(t.Context(), []string{"k1", "k2"})
		if len(errs) != 2 || b.asked != nil {
			t.Fatalf("errors %v, asked for %v", errs, b.asked)
		}
		for i, err := range errs {
			var e *backend.Error
			if !errors.Is(err, ErrOffline) || !errors.As(err, &e) || e.Key != fmt.Sprintf("k%d", i+1) || strings.Count(err.Error(), "delete") != 1 {
				t.Errorf("key %d: %v", i+1, err)
			}
		}
	})
}

// TestBatchesOfAllOutcomes gives each key of random batches a fate for each time that it is sent. What a key ended
// with is what was said of it last; it is sent again only after what may pass, and as long as that is worth trying.
func TestBatchesOfAllOutcomes(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 0))
	fates := []backend.Class{0, 0, 0, backend.Transient, backend.Throttled, backend.Auth, backend.Permanent, backend.Full}
	seen := map[string]int{}
	for range 3000 {
		synctest.Test(t, func(t *testing.T) {
			attempts, all := 1+rnd.IntN(4), []string{"a", "b", "c", "d", "e"}[:1+rnd.IntN(5)]
			last := map[string]backend.Class{} // of what was sent
			r := &refreshed{batches: &batches{Store: backendtest.NewMemory("m")}}
			r.do = func(_ int, key string) error {
				if c, sent := last[key]; sent && c != backend.Transient && c != backend.Throttled && c != backend.Auth {
					t.Errorf("%s was sent again after %v", key, c)
				}
				last[key] = fates[rnd.IntN(len(fates))]
				if last[key] == 0 {
					return nil
				}
				return &backend.Error{Op: "delete", Store: "m", Key: key, Class: last[key]}
			}
			var inner backend.Store = r
			if rnd.IntN(2) == 0 {
				inner = r.batches // cannot refresh
			}
			s := New(inner, Options{Attempts: attempts})
			errs := s.DeleteBatch(t.Context(), all)
			passing, failed := false, false
			for i, key := range all {
				var err error
				if errs != nil {
					err = errs[i]
				}
				var e *backend.Error
				if c := backend.ClassOf(err); c != last[key] || err != nil && (!errors.As(err, &e) || e.Key != key) {
					t.Errorf("seed %d: %s ended with %v, the store said %v", seed, key, err, last[key])
				}
				passing = passing || last[key] == backend.Transient || last[key] == backend.Throttled
				failed = failed || last[key] != 0
			}
			if !failed && errs != nil {
				t.Errorf("all are gone, and it says %v", errs)
			}
			renewed := 0
			if r.fresh {
				renewed = 1
			}
			switch n := len(r.asked); {
			case n > attempts+renewed:
				t.Errorf("%d attempts of %d", n, attempts)
			case passing && n < attempts:
				t.Errorf("gave up after %d attempts of %d: %v", n, attempts, errs)
			case passing:
				seen["passing"]++
			case failed:
				seen["failed"]++
			default:
				seen["gone"]++
			}
			if st := s.Health().Ops["delete"]; st.Requests != uint64(len(r.asked)) || st.Retries != st.Requests-1 {
				t.Errorf("%d attempts: %+v", len(r.asked), st)
			}
		})
	}
	for _, what := range []string{"passing", "failed", "gone"} {
		if seen[what] < 100 {
			t.Errorf("the fates are one-sided: %v", seen)
		}
	}
}

// TestBatchThatIsThrottledInPart lowers the limit as one that is throttled, whatever else was said of other keys.
func TestBatchThatIsThrottledInPart(t *testing.T) {
	for _, keys := range [][]string{{"throttled", "transient", "auth", "permanent"}, {"permanent", "auth", "transient", "throttled"}} {
		b := &batches{Store: backendtest.NewMemory("m")}
		b.do = func(_ int, key string) error {
			return fault(map[string]backend.Class{"throttled": backend.Throttled, "transient": backend.Transient, "auth": backend.Auth, "permanent": backend.Permanent}[key])
		}
		s := New(b, Options{Attempts: 1})
		s.DeleteBatch(t.Context(), keys)
		if h := s.Health(); h.Concurrency != concurrencyDefault/2 || h.Ops["delete"].Errors[backend.Throttled.String()] != 1 {
			t.Errorf("%v: %d at a time, %+v", keys, h.Concurrency, h.Ops["delete"])
		}
	}
}

// TestStoreThatKnowsNoBatches finds that out once.
func TestStoreThatKnowsNoBatches(t *testing.T) {
	m := backendtest.NewMemory("m")
	b := &batches{Store: m, do: func(int, string) error {
		return &backend.Error{Class: backend.Permanent, Err: errors.ErrUnsupported}
	}}
	s := New(b, Options{})
	for range 2 {
		for _, key := range []string{"a", "b"} {
			if _, err := m.Put(t.Context(), key, nil, backend.Cond{}); err != nil {
				t.Fatal(err)
			}
		}
		if errs := s.DeleteBatch(t.Context(), []string{"a", "b"}); errs != nil || len(m.Keys()) != 0 {
			t.Errorf("%v, left %v", errs, m.Keys())
		}
	}
	if n := s.Health().Ops["delete"].Requests; n != 1+2+2 || len(b.asked) != 1 {
		t.Errorf("%d requests, %d batches", n, len(b.asked))
	}
}

// copies is a store whose copies end as told.
type copies struct {
	backend.Store
	calls int
	err   error
}

func (c *copies) CopyFrom(context.Context, string, backend.Store, string, backend.Cond) (string, error) {
	c.calls++
	return "", c.err
}

func TestCopyIsTriedAgainOnlyWithoutACondition(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := &copies{Store: backendtest.NewMemory("m"), err: fault(backend.Transient)}
		s := New(c, Options{Attempts: 3})
		for cond, want := range map[backend.Cond]int{{}: 3, {Absent: true}: 1, {Match: "e"}: 1} {
			c.calls = 0
			if _, err := s.CopyFrom(t.Context(), "k", s, "from", cond); backend.ClassOf(err) != backend.Transient || c.calls != want {
				t.Errorf("%+v: %v after %d attempts", cond, err, c.calls)
			}
		}
		if st := s.Health().Ops["copy"]; st.Requests != 5 || st.Retries != 2 {
			t.Errorf("stats %+v", st)
		}
	})
}

// TestStoreWithoutAbilities expects a wrapper of a store that has none of them to do without.
func TestStoreWithoutAbilities(t *testing.T) {
	m := backendtest.NewMemory("m")
	s := New(struct{ backend.Store }{m}, Options{})
	if _, err := s.CopyFrom(t.Context(), "k", s, "from", backend.Cond{}); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("copy: %v", err)
	}
	for _, key := range []string{"a", "b"} {
		if _, err := m.Put(t.Context(), key, nil, backend.Cond{}); err != nil {
			t.Fatal(err)
		}
	}
	if errs := backend.DeleteMany(t.Context(), s, []string{"a", "b", "c"}); errs != nil || len(m.Keys()) != 0 {
		t.Errorf("delete: %v, left %v", errs, m.Keys())
	}
	if got := s.Health().Ops["delete"].Requests; got != 3 {
		t.Errorf("%d requests", got)
	}
}
