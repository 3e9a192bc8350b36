package adaptive

import (
	"context"
	"errors"
	"fmt"
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
			if !errors.Is(err, ErrOffline) || !errors.As(err, &e) || e.Key != fmt.Sprintf("k%d", i+1) {
				t.Errorf("key %d: %v", i+1, err)
			}
		}
	})
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
