package writeback

import (
	"context"
	"errors"
	"math/rand/v2"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"graindisk/block"
)

// gateRig is a gate on a clock that only sleeping moves.
type gateRig struct {
	*gate
	clock  time.Time
	slept  time.Duration
	x      float64
	shut   bool
	failed error
}

func newGateRig() *gateRig {
	r := &gateRig{clock: time.Unix(1e9, 0)}
	r.gate = newGate(func() time.Time { return r.clock }, 1<<20, func() float64 { return r.x }, func() (bool, error) { return r.shut, r.failed })
	r.sleep = func(ctx context.Context, d time.Duration) error {
		if d <= 0 {
			panic("a sleep of nothing")
		}
		r.clock, r.slept = r.clock.Add(d), r.slept+d
		return ctx.Err()
	}
	return r
}

// TestAppendsAreDelayedMoreAndMore writes 16 MiB at every fill and expects no delay at the mark, then
// ever longer ones without a step, and nothing but the bound on one append at the end.
func TestAppendsAreDelayedMoreAndMore(t *testing.T) {
	const n, size = 256, 64 << 10
	took := func(x float64) (sum, longest time.Duration) {
		r := newGateRig()
		r.freed(64 << 20 * 60) // 64 MiB/s
		r.x = x
		for range n {
			before := r.slept
			if err := r.enter(bg, size); err != nil {
				t.Fatal(err)
			}
			longest = max(longest, r.slept-before)
		}
		return r.slept, longest
	}
	last := time.Duration(0)
	for i := -20; i < 100; i++ {
		x := float64(i) / 100
		sum, longest := took(x)
		switch {
		case x <= 0 && sum > 0:
			t.Errorf("at %v: %v of delay below the mark", x, sum)
		case sum < last-2*slotPoll:
			t.Errorf("at %v: %v, less than the %v before", x, sum, last)
		case sum > last*13/10+25*time.Millisecond && x < 0.9:
			t.Errorf("at %v: %v, a step from %v", x, sum, last)
		case longest > paceDelayMax+slotPoll:
			t.Errorf("at %v: one append waited %v", x, longest)
		}
		last = sum
	}
	if at, _ := took(1. / 3); at < 200*time.Millisecond || at > 300*time.Millisecond {
		t.Errorf("a third into the zone 16 MiB took %v, want 250 ms: the rate at which space comes free", at)
	}
}

func TestSpeedFallsFromAnyToNothing(t *testing.T) {
	for _, rate := range []float64{0, paceRateMin, 1e9} {
		last := paceSpeed(0, rate)
		for i := 1; i <= 1000; i++ {
			s := paceSpeed(float64(i)/1000, rate)
			if s >= last {
				t.Fatalf("rate %v: %v at %d, %v before", rate, s, i, last)
			}
			last = s
		}
		if last != 0 {
			t.Errorf("rate %v: %v when full", rate, last)
		}
	}
}

// TestAClosedGateOpensByItself holds back appends while the tier is full or the log says so, for longer
// than any pace, lets them go on when that ends, and minds ctx and the end of the log.
func TestAClosedGateOpensByItself(t *testing.T) {
	for name, set := range map[string]func(*gateRig, bool){
		"full":   func(r *gateRig, on bool) { r.x = map[bool]float64{true: 1.2, false: 0.1}[on] },
		"closed": func(r *gateRig, on bool) { r.shut = on },
	} {
		t.Run(name, func(t *testing.T) {
			r := newGateRig()
			set(r, true)
			sleep := r.sleep
			r.sleep = func(ctx context.Context, d time.Duration) error {
				if r.slept > 10*time.Minute {
					set(r, false)
				}
				return sleep(ctx, d)
			}
			if err := r.enter(bg, 4096); err != nil || r.slept < 10*time.Minute || r.slept > 10*time.Minute+time.Second {
				t.Errorf("went on after %v, %v", r.slept, err)
			}
			set(r, true)
			r.clock = r.clock.Add(paceSample)
			r.sleep = sleep
			ctx, cancel := context.WithCancelCause(bg)
			cancel(errors.New("enough"))
			if err := r.enter(ctx, 4096); err == nil {
				t.Error("entered though ctx had ended")
			}
			r.failed = ErrFailed
			if err := r.enter(bg, 4096); !errors.Is(err, ErrFailed) {
				t.Errorf("entered a failed log: %v", err)
			}
		})
	}
}

// TestNoAppendStarves has a small writer among large ones in a tier that is nearly full.
func TestNoAppendStarves(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate(time.Now, 1<<20, func() float64 { return 0.8 }, func() (bool, error) { return false, nil })
		ctx, cancel := context.WithCancel(bg)
		var wg sync.WaitGroup
		for range 16 {
			wg.Go(func() {
				for g.enter(ctx, 1<<20) == nil {
				}
			})
		}
		time.Sleep(10 * time.Second)
		for range 50 {
			before := time.Now()
			if err := g.enter(ctx, 4096); err != nil {
				t.Error(err)
			}
			if d := time.Since(before); d > paceDelayMax+time.Second {
				t.Errorf("a small append waited %v", d)
			}
		}
		cancel()
		wg.Wait()
	})
}

// TestAppendsGoInTheOrderTheyCome queues writers one after the other at a closed gate.
func TestAppendsGoInTheOrderTheyCome(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		shut := true
		var mu sync.Mutex
		g := newGate(time.Now, 1<<20, func() float64 { return 0.5 }, func() (bool, error) {
			mu.Lock()
			defer mu.Unlock()
			return shut, nil
		})
		var got []int
		var wg sync.WaitGroup
		start := func(i int) {
			wg.Go(func() {
				if err := g.enter(bg, 1<<20); err != nil {
					t.Error(err)
				}
				mu.Lock()
				got = append(got, i)
				mu.Unlock()
			})
			synctest.Wait()
		}
		for i := range 20 {
			start(i)
		}
		mu.Lock()
		shut = false
		mu.Unlock()
		start(20) // comes when the gate is open and those before have not noticed
		wg.Wait()
		for i, w := range got {
			if w != i {
				t.Fatalf("went in the order %v", got)
			}
		}
		if len(got) != 21 {
			t.Errorf("%d of 21 went", len(got))
		}
	})
}

// TestExposureIsBounded fills a log to its bound on exposure: writes wait, everything else passes, and a
// publication lets them go on.
func TestExposureIsBounded(t *testing.T) {
	for name, set := range map[string]func(*Options){
		"bytes": func(o *Options) { o.MaxExposure = 8 * block.Size },
		"age": func(o *Options) {
			o.MaxExposureAge = time.Minute
			at := time.Unix(1e9, 0)
			o.Now = func() time.Time { at = at.Add(time.Second); return at }
		},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, 64, 64)
			set(&r.log.opts)
			if name == "age" {
				r.log.opts.Now = lockedClock(r.log.opts.Now)
			}
			write := func(ctx context.Context) error {
				if err := r.log.Admit(ctx, block.Size); err != nil {
					return err
				}
				_, err := r.log.Append(ctx, []Record{data(block.LBA(rand.Uint64N(1<<30)), 1)})
				return err
			}
			done := false
			ctx, cancel := context.WithTimeout(bg, 50*time.Millisecond)
			defer cancel()
			for range 200 {
				if err := write(ctx); err != nil {
					done = true
					break
				}
			}
			if !done || !r.log.Pressure().Exposed {
				t.Fatalf("the bound did not hold: %+v", r.log.Pressure())
			}
			if name == "bytes" && r.log.Unpublished().Bytes != 8*block.Size {
				t.Errorf("%d bytes exposed, bound %d", r.log.Unpublished().Bytes, 8*block.Size)
			}
			if r.log.Roomy(1) {
				t.Error("roomy at the bound")
			}
			r.append(unmap(0, 5), Record{Kind: Op, Data: []byte("op")})
			r.sync()
			waits := make(chan error, 1)
			go func() { waits <- write(bg) }()
			for !r.log.Pressure().Waiting {
				time.Sleep(time.Millisecond) // until it is at the gate
			}
			if err := r.log.Publish(r.log.Freeze()); err != nil {
				t.Fatal(err)
			}
			if err := <-waits; err != nil {
				t.Error(err)
			}
		})
	}
}

func lockedClock(now func() time.Time) func() time.Time {
	var mu sync.Mutex
	return func() time.Time { mu.Lock(); defer mu.Unlock(); return now() }
}

// TestAFullTierDelaysBeforeItStops fills a tier of which nothing is published: the delay grows, and at the
// mark writes wait at Admit, not in Append.
func TestAFullTierDelaysBeforeItStops(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, 20, 256)
		ctx, cancel := context.WithTimeout(bg, time.Hour)
		defer cancel()
		var early, late time.Duration
		blocks := 0
		for lba := block.LBA(0); ; lba += 8 {
			before := time.Now()
			if err := r.log.Admit(ctx, 8*block.Size); err != nil {
				break
			}
			r.append(data(lba, 1, 2, 3, 4, 5, 6, 7, 8))
			if took := time.Since(before); blocks < 18*256*55/100 {
				early += took
			} else {
				late += took
			}
			blocks += 9
		}
		r.log.mu.Lock()
		starved := r.log.starved
		r.log.mu.Unlock()
		if early > 0 || late == 0 || starved || blocks < 17*256 {
			t.Errorf("delayed by %v, then %v, starved %v, %d blocks of %d", early, late, starved, blocks, 18*256)
		}
		p := r.log.Pressure()
		if p.Delay == 0 {
			t.Errorf("no delay is told: %+v", p)
		}
		r.append(unmap(0, 1<<20)) // needs no admission and has its reserve
		r.sync()
		if err := r.log.Publish(r.log.Freeze()); err != nil {
			t.Fatal(err)
		}
		if err := r.log.Admit(bg, block.Size); err != nil {
			t.Fatal(err)
		}
		r.append(data(0, 9))
		r.log.Close()
	})
}
