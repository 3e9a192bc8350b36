package adaptive

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"graindisk/backend"
	"graindisk/backend/backendtest"
)

func TestConforms(t *testing.T) {
	backendtest.Run(t, func(t *testing.T) backend.Store {
		return New(backendtest.NewMemory("m"), Options{})
	})
}

// plan is a store whose reads and puts do as told. All other methods are Memory's.
type plan struct {
	backend.Store
	calls  atomic.Int64
	inside atomic.Int64
	most   atomic.Int64
	do     func(ctx context.Context, n int64) error // n-th call, from 1
}

func newPlan(do func(ctx context.Context, n int64) error) *plan {
	return &plan{Store: backendtest.NewMemory("m"), do: do}
}

func (p *plan) call(ctx context.Context) error {
	in := p.inside.Add(1)
	defer p.inside.Add(-1)
	for m := p.most.Load(); in > m && !p.most.CompareAndSwap(m, in); m = p.most.Load() {
	}
	return p.do(ctx, p.calls.Add(1))
}

func (p *plan) ReadAt(ctx context.Context, _ string, _ []byte, _ int64) error { return p.call(ctx) }

func (p *plan) Put(ctx context.Context, _ string, _ []byte, _ backend.Cond) (string, error) {
	return "e", p.call(ctx)
}

func fault(c backend.Class) error { return &backend.Error{Op: "test", Store: "m", Key: "k", Class: c} }

func read(ctx context.Context, s *Store) error { return s.ReadAt(ctx, "k", make([]byte, 1), 0) }

// TestWhatIsTriedAgain counts the attempts of each kind of call for each class of error.
func TestWhatIsTriedAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for class := backend.Transient; class <= backend.Permanent; class++ {
			p := newPlan(func(context.Context, int64) error { return fault(class) })
			s := New(p, Options{Attempts: 4})
			want := int64(1)
			if class == backend.Transient || class == backend.Throttled {
				want = 4
			}
			if err := read(t.Context(), s); backend.ClassOf(err) != class || p.calls.Load() != want {
				t.Errorf("read: %v after %d attempts", err, p.calls.Load())
			}
			p.calls.Store(0)
			if _, err := s.Put(t.Context(), "k", nil, backend.Cond{}); backend.ClassOf(err) != class || p.calls.Load() != want {
				t.Errorf("put: %v after %d attempts", err, p.calls.Load())
			}
			for _, c := range []backend.Cond{{Absent: true}, {Match: "e"}} {
				p.calls.Store(0)
				if _, err := s.Put(t.Context(), "k", nil, c); backend.ClassOf(err) != class || p.calls.Load() != 1 {
					t.Errorf("put if %+v: %v after %d attempts", c, err, p.calls.Load())
				}
			}
		}
	})
}

func TestPassingFaultsAreMasked(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		rng := rand.New(rand.NewPCG(1, 2))
		var mu sync.Mutex
		p := newPlan(func(context.Context, int64) error {
			mu.Lock()
			defer mu.Unlock()
			if rng.IntN(20) == 0 {
				return fault(backend.Throttled)
			}
			return nil
		})
		s := New(p, Options{Attempts: 8})
		for range 2000 {
			if err := read(t.Context(), s); err != nil {
				t.Fatal(err)
			}
		}
		st := s.Health().Ops["read"]
		if st.Retries == 0 || st.Retries != st.Errors[backend.Throttled.String()] || st.Requests != 2000+st.Retries || st.Bytes != 2000 {
			t.Errorf("stats %+v", st)
		}
	})
}

// TestConcurrencyAdapts runs many callers against a store that throttles above 6 calls at a time.
func TestConcurrencyAdapts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const able = 6
		var p *plan
		var refused, served atomic.Int64
		p = newPlan(func(ctx context.Context, _ int64) error {
			over := p.inside.Load() > able
			time.Sleep(20 * time.Millisecond)
			if over {
				refused.Add(1)
				return fault(backend.Throttled)
			}
			served.Add(1)
			return nil
		})
		s := New(p, Options{Limits: Limits{Concurrency: 64}, Attempts: 1000})
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		for range 64 {
			wg.Go(func() {
				for ctx.Err() == nil {
					_ = read(ctx, s)
				}
			})
		}
		time.Sleep(20 * time.Second) // to settle
		refused.Store(0)
		served.Store(0)
		time.Sleep(time.Minute)
		cancel()
		wg.Wait()
		rate := float64(served.Load()) / 60
		if ideal := able / 0.02; rate < 0.5*ideal {
			t.Errorf("%.0f calls a second of %.0f possible", rate, ideal)
		}
		if share := float64(refused.Load()) / float64(served.Load()); share > 0.2 {
			t.Errorf("%.0f %% of the calls were throttled", 100*share)
		}
	})
}

// TestGateIsFair has writes and reads wait: reads go first, and writes are not starved.
func TestGateIsFair(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate(1)
		if err := g.enter(t.Context(), false); err != nil {
			t.Fatal(err)
		}
		var order []byte
		var mu sync.Mutex
		var wg sync.WaitGroup
		start := func(write bool, mark byte) {
			wg.Go(func() {
				if err := g.enter(t.Context(), write); err != nil {
					t.Error(err)
				}
				mu.Lock()
				order = append(order, mark)
				mu.Unlock()
				g.leave(time.Now(), good)
			})
			synctest.Wait()
		}
		for range 3 {
			start(true, 'w')
		}
		for range 20 {
			start(false, 'r')
		}
		g.leave(time.Now(), good)
		wg.Wait()
		if got, want := string(order), "rrrrrrrwrrrrrrrwrrrrrrw"; got != want {
			t.Errorf("order %s, want %s", got, want)
		}
	})
}

// TestGateGivesTurnsBack cancels waiters at random; the gate must neither lose nor invent turns.
func TestGateGivesTurnsBack(t *testing.T) {
	const max = 4
	g := newGate(max)
	var inside atomic.Int64
	var wg sync.WaitGroup
	for i := range 16 {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(i), 3))
			for range 500 {
				ctx, cancel := context.WithTimeout(context.Background(), time.Duration(rng.IntN(50))*time.Microsecond)
				if g.enter(ctx, rng.IntN(2) == 0) == nil {
					if n := inside.Add(1); n > max {
						t.Errorf("%d inside", n)
					}
					inside.Add(-1)
					g.leave(time.Now(), good)
				}
				cancel()
			}
		})
	}
	wg.Wait()
	if g.inside != 0 || len(g.waiting[0])+len(g.waiting[1]) != 0 {
		t.Errorf("%d inside, %d and %d waiting at the end", g.inside, len(g.waiting[0]), len(g.waiting[1]))
	}
}

// TestHealth follows a store that goes away and comes back.
func TestHealth(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var away atomic.Bool
		p := newPlan(func(context.Context, int64) error {
			if away.Load() {
				return fault(backend.Transient)
			}
			return nil
		})
		var seen []State
		s := New(p, Options{Attempts: 1, OnState: func(_, to State) { seen = append(seen, to) }})
		call := func(n int, gap time.Duration) (failed int) {
			for range n {
				if read(t.Context(), s) != nil {
					failed++
				}
				time.Sleep(gap)
			}
			return failed
		}
		call(100, 10*time.Millisecond)
		away.Store(true)
		call(50, 200*time.Millisecond)
		if s.State() != Offline {
			t.Fatalf("state %v after ten seconds away", s.State())
		}
		before := p.calls.Load()
		start := time.Now()
		if failed := call(6000, 10*time.Millisecond); failed != 6000 {
			t.Errorf("%d of 6000 calls failed", failed)
		}
		if probes := p.calls.Load() - before; probes < 4 || probes > 8 { // after 2, 4, 8, 15, 15, 15 s
			t.Errorf("%d probes in %v", probes, time.Since(start))
		}
		if err := read(t.Context(), s); !errors.Is(err, ErrOffline) || backend.ClassOf(err) != backend.Transient {
			t.Errorf("call while offline: %v", err)
		}
		away.Store(false)
		if failed := call(20, time.Second); failed > 15 {
			t.Errorf("%d of 20 calls failed after it came back", failed)
		}
		call(200, 10*time.Millisecond)
		if got, want := fmt.Sprint(seen), fmt.Sprint([]State{Degraded, Offline, Degraded, OK}); got != want {
			t.Errorf("states %v, want %v", got, want)
		}
	})
}

// TestHealthHasHysteresis gives a store that fails now and then: few changes of state.
func TestHealthHasHysteresis(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		rng := rand.New(rand.NewPCG(5, 6))
		p := newPlan(func(context.Context, int64) error {
			if rng.IntN(100) < 9 {
				return fault(backend.Transient)
			}
			return nil
		})
		var changes int
		s := New(p, Options{Attempts: 1, OnState: func(State, State) { changes++ }})
		for range 5000 {
			_ = read(t.Context(), s)
			time.Sleep(time.Millisecond)
		}
		if changes > 60 {
			t.Errorf("%d changes of state in 5000 calls", changes)
		}
		if s.State() == Offline {
			t.Error("offline though nine of ten calls succeed")
		}
	})
}

// TestBlackhole has a store that swallows calls: attempts end by their own time-out, and it is found out.
func TestBlackhole(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPlan(func(ctx context.Context, _ int64) error {
			<-ctx.Done()
			return fmt.Errorf("swallowed: %w", context.Cause(ctx))
		})
		s := New(p, Options{Attempts: 2, Timeout: 3 * time.Second})
		start := time.Now()
		err := read(t.Context(), s)
		if took := time.Since(start); err == nil || took < 6*time.Second || took > 7*time.Second {
			t.Errorf("%v after %v", err, took)
		}
		for range 4 {
			_ = read(t.Context(), s)
		}
		if s.State() != Offline {
			t.Errorf("state %v", s.State())
		}
	})
}

// TestGivingUpIsNoVerdict cancels calls: that says nothing about the store.
func TestGivingUpIsNoVerdict(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPlan(func(ctx context.Context, _ int64) error {
			<-ctx.Done()
			return ctx.Err()
		})
		s := New(p, Options{})
		for range 100 {
			ctx, cancel := context.WithCancel(t.Context())
			go func() { time.Sleep(time.Second); cancel() }()
			if err := read(ctx, s); err == nil {
				t.Fatal("a cancelled call succeeded")
			}
		}
		if st := s.Health(); st.State != "ok" || st.Concurrency != concurrencyDefault {
			t.Errorf("state %v, concurrency %d", st.State, st.Concurrency)
		}
	})
}

// TestLimits counts what passes in a minute, by day and by night.
func TestLimits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPlan(func(context.Context, int64) error { return nil })
		now := time.Now()
		h, m, _ := now.Clock()
		at := time.Duration(h)*time.Hour + time.Duration(m)*time.Minute
		s := New(p, Options{
			Limits: Limits{RequestsPerSecond: 50, UploadPerSecond: 1 << 20},
			Schedule: []Window{
				{From: (at + time.Hour) % (24 * time.Hour), To: (at + 2*time.Hour) % (24 * time.Hour), Limits: Limits{UploadPerSecond: 4 << 20}},
			},
		})
		body := make([]byte, 256<<10)
		sent := func() float64 {
			before, start := s.Health().Ops["put"].Bytes, time.Now()
			for time.Since(start) < time.Minute {
				if _, err := s.Put(t.Context(), "k", body, backend.Cond{}); err != nil {
					t.Fatal(err)
				}
			}
			return float64(s.Health().Ops["put"].Bytes-before) / time.Since(start).Seconds()
		}
		if got := sent(); got < 0.9*(1<<20) || got > 1.1*(1<<20) {
			t.Errorf("%.0f bytes a second", got)
		}
		time.Sleep(time.Hour)
		if got := sent(); got < 0.9*(4<<20) || got > 1.1*(4<<20) {
			t.Errorf("%.0f bytes a second in the window", got)
		}
		time.Sleep(2 * time.Hour)
		start := time.Now()
		for range 1000 {
			if err := read(t.Context(), s); err != nil {
				t.Fatal(err)
			}
		}
		if took := time.Since(start); took < 19*time.Second || took > 21*time.Second {
			t.Errorf("1000 requests in %v", took)
		}
	})
}

func TestWindow(t *testing.T) {
	day := time.Date(2026, 1, 2, 0, 0, 0, 0, time.Local)
	const h = time.Hour
	for _, c := range []struct {
		from, to, at time.Duration
		want         bool
	}{
		{8 * h, 18 * h, 8 * h, true}, {8 * h, 18 * h, 18 * h, false}, {8 * h, 18 * h, 8*h - time.Second, false},
		{22 * h, 6 * h, 23 * h, true}, {22 * h, 6 * h, 6*h - time.Second, true}, {22 * h, 6 * h, 12 * h, false},
		{0, 24 * h, 0, true}, {0, 24 * h, 24*h - time.Second, true},
	} {
		if got := (Window{From: c.from, To: c.to}).holds(day.Add(c.at)); got != c.want {
			t.Errorf("%v to %v at %v: %v", c.from, c.to, c.at, got)
		}
	}
}

func TestCost(t *testing.T) {
	s := New(backendtest.NewMemory("m"), Options{Prices: Prices{Put1000: 5, Get1000: 0.4, OutGB: 90}})
	body := make([]byte, 1000)
	for i := range 1000 {
		if _, err := s.Put(t.Context(), fmt.Sprint(i), body, backend.Cond{}); err != nil {
			t.Fatal(err)
		}
		if err := s.ReadAt(t.Context(), fmt.Sprint(i), body, 0); err != nil {
			t.Fatal(err)
		}
	}
	if got, want := s.Health().Cost, 5+0.4+90*1e6/1e9; got < want-1e-6 || got > want+1e-6 {
		t.Errorf("cost %f, want %f", got, want)
	}
}
