package adaptive

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"graindisk/backend"
)

// keyed is a store that refuses all calls but those made with the key of the moment.
type keyed struct {
	*plan
	valid, has atomic.Int64 // the key that the store takes, and that calls carry
	offered    atomic.Int64 // what a refresh gives
	refreshes  atomic.Int64
	broken     atomic.Bool // a refresh fails
}

func newKeyed() *keyed {
	k := &keyed{}
	k.plan = newPlan(func(context.Context, int64) error {
		with := k.has.Load()
		time.Sleep(10 * time.Millisecond)
		if with != k.valid.Load() {
			return fault(backend.Auth)
		}
		return nil
	})
	return k
}

// Refresh implements backend.Refresher.
func (k *keyed) Refresh(context.Context) (bool, error) {
	k.refreshes.Add(1)
	time.Sleep(100 * time.Millisecond)
	if k.broken.Load() {
		return false, errors.New("no such file")
	}
	return k.has.Swap(k.offered.Load()) != k.offered.Load(), nil
}

// TestCredentialsAreRenewedOnce rotates the key under 50 callers, who notice nothing and cause one refresh.
func TestCredentialsAreRenewedOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := newKeyed()
		s := New(k, Options{})
		for key := range int64(3) {
			k.valid.Store(key)
			k.offered.Store(key)
			k.refreshes.Store(0)
			var wg sync.WaitGroup
			for i := range 50 {
				wg.Go(func() {
					for range 20 {
						var err error
						if i%2 == 0 {
							err = read(t.Context(), s)
						} else {
							_, err = s.Put(t.Context(), "k", nil, backend.Cond{Absent: true})
						}
						if err != nil {
							t.Error(err)
						}
					}
				})
			}
			wg.Wait()
			if n := k.refreshes.Load(); n != min(key, 1) {
				t.Errorf("key %d: %d refreshes", key, n)
			}
			time.Sleep(renewGap)
		}
		if st := s.Health(); st.State != "ok" {
			t.Errorf("state %s: a store that refuses is not a sick one", st.State)
		}
	})
}

// TestRefusedForGood has credentials that are refused whatever is done: calls fail as Auth, each after one attempt,
// and the place where credentials come from is asked twice a minute.
func TestRefusedForGood(t *testing.T) {
	for name, prepare := range map[string]func(*keyed){
		"no others":       func(*keyed) {},
		"none to be had":  func(k *keyed) { k.broken.Store(true) },
		"others are, too": func(k *keyed) { k.offered.Store(2) },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				k := newKeyed()
				s := New(k, Options{})
				k.valid.Store(1)
				prepare(k)
				calls := int64(0)
				for start := time.Now(); time.Since(start) < 5*time.Minute; calls += 10 {
					var wg sync.WaitGroup
					for range 10 {
						wg.Go(func() {
							if err := read(t.Context(), s); !errors.Is(err, backend.ErrAuth) {
								t.Errorf("a refused call: %v", err)
							}
						})
					}
					wg.Wait()
					time.Sleep(time.Second)
				}
				if n := k.refreshes.Load(); n < 9 || n > 11 {
					t.Errorf("%d refreshes in five minutes", n)
				}
				if extra := k.calls.Load() - calls; extra > 10 { // those under way when the key changed
					t.Errorf("%d attempts for %d calls", k.calls.Load(), calls)
				}
				k.broken.Store(false)
				k.offered.Store(1)
				time.Sleep(renewGap)
				if err := read(t.Context(), s); err != nil {
					t.Errorf("with the right key: %v", err)
				}
			})
		})
	}
}

// TestARefreshGivenUpDoesNotCount cancels the call that asks for credentials: the next one asks again.
func TestARefreshGivenUpDoesNotCount(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := newKeyed()
		s := New(k, Options{})
		k.valid.Store(1)
		k.offered.Store(0)
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		defer cancel()
		if err := read(ctx, s); !errors.Is(err, backend.ErrAuth) {
			t.Errorf("the call that was given up: %v", err)
		}
		k.offered.Store(1)
		if err := read(t.Context(), s); err != nil {
			t.Errorf("the next call: %v", err)
		}
	})
}

// TestDownloadLimit counts the bytes that come in a minute, in the window of the day that has a limit and after.
func TestDownloadLimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPlan(func(context.Context, int64) error { return nil })
		h, m, sec := time.Now().Clock()
		at := time.Duration(h)*time.Hour + time.Duration(m)*time.Minute + time.Duration(sec)*time.Second
		const day = 24 * time.Hour
		s := New(p, Options{
			Limits:   Limits{DownloadPerSecond: 8 << 20},
			Schedule: []Window{{From: (at + day - time.Hour) % day, To: (at + time.Hour) % day, Limits: Limits{DownloadPerSecond: 1 << 20, UploadPerSecond: 1}}},
		})
		body := make([]byte, 256<<10)
		took := func(n int) time.Duration {
			start := time.Now()
			var wg sync.WaitGroup
			for range n {
				wg.Go(func() {
					if err := s.ReadAt(t.Context(), "k", body, 0); err != nil {
						t.Error(err)
					}
				})
			}
			wg.Wait()
			return time.Since(start)
		}
		if d := took(240); d < 55*time.Second || d > 65*time.Second { // 60 MiB
			t.Errorf("60 MiB in %v", d)
		}
		time.Sleep(2 * time.Hour)
		if d := took(240); d < 7*time.Second || d > 8*time.Second {
			t.Errorf("60 MiB in %v after the window", d)
		}
	})
}
