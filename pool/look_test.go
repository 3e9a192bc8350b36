package pool

import (
	"context"
	"errors"
	"fmt"
	"math"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"graindisk/backend"
	"graindisk/backend/backendtest"
	"graindisk/pool/root"
)

// stalling is a store of which the next few reads of the root never answer.
type stalling struct {
	backend.Store
	left atomic.Int64
}

func (s *stalling) Get(ctx context.Context, key string, max int64) ([]byte, string, error) {
	if key == root.Key && s.left.Add(-1) >= 0 {
		<-ctx.Done()
		return nil, "", ctx.Err()
	}
	return s.Store.Get(ctx, key, max)
}

// hangs is longer than any test may take: who waits for it fails.
const hangs = 24 * time.Hour

// stallingRig is a rig whose targets can stall; those that adjust changes are of the next open.
func stallingRig(t *testing.T, adjust func(o *Options)) (*rig, []*stalling) {
	stores := make([]*stalling, 3)
	r := newRig(t, func(o *Options) {
		for i := range o.Targets {
			if stores[i] == nil {
				stores[i] = &stalling{Store: o.Targets[i].Store}
			}
			o.Targets[i].Store = stores[i]
		}
		adjust(o)
	})
	return r, stores
}

// TestAShortLookAtTheRoot opens a log whose owner was alive a moment ago. Targets that hang hold it up for
// the short look only; a pool that was closed cleanly is waited for all the same.
func TestAShortLookAtTheRoot(t *testing.T) {
	r, stores := stallingRig(t, func(o *Options) { o.RootTimeout, o.RootLook = hangs, 50*time.Millisecond })
	model := make([]byte, testDisk)
	r.scribble(r.disk("d", testDisk), model, 10)
	r.abandon()
	for _, s := range stores {
		s.left.Store(math.MaxInt64)
	}
	r.open(false)
	r.expect(r.disk("d", testDisk), model)
	r.scribble(r.disk("d", testDisk), model, 10)
	if s := r.pool.Status(); s.State != "claiming" {
		t.Errorf("state %s before any target answered", s.State)
	}
	r.abandon()
	for _, s := range stores {
		s.left.Store(0)
	}
	r.open(false)
	r.publish()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if err := r.pool.Close(ctx); err != nil {
		t.Fatal(err)
	}
	for _, s := range stores {
		s.left.Store(1) // the look; then they answer
	}
	r.open(false)
	r.expect(r.disk("d", testDisk), model)
}

// TestAShortLookRefusesWhatALongOneDoes opens a log that was closed cleanly while no target answers.
func TestAShortLookRefusesWhatALongOneDoes(t *testing.T) {
	patience := 300 * time.Millisecond
	r, stores := stallingRig(t, func(o *Options) { o.RootTimeout, o.RootLook = patience, 20*time.Millisecond })
	r.disk("d", testDisk)
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if err := r.pool.Close(ctx); err != nil {
		t.Fatal(err)
	}
	for _, s := range stores {
		s.left.Store(math.MaxInt64)
	}
	began := time.Now()
	if err := r.tryOpen(false); !errors.Is(err, root.ErrNoQuorum) {
		t.Errorf("opened, or failed with %v", err)
	}
	if took := time.Since(began); took < patience {
		t.Errorf("gave up after %v", took)
	}
	r.pool, patience = nil, hangs
	for _, s := range stores {
		s.left.Store(0)
	}
	r.open(false)
}

// TestAShortLookSeesAnotherOwner opens a log whose pool went to another, with targets that answer.
func TestAShortLookSeesAnotherOwner(t *testing.T) {
	r := newRig(t, func(o *Options) { o.RootLook = time.Second })
	r.scribble(r.disk("d", testDisk), make([]byte, testDisk), 10)
	r.abandon()
	first := r.fs
	r.newHost()
	r.open(true)
	r.abandon()
	r.fs = first
	if err := r.tryOpen(false); !errors.Is(err, ErrForeignTier) {
		t.Errorf("opened, or failed with %v", err)
	}
	r.pool = nil
}

// TestOneTargetThatHangsHoldsNoOpenUp opens with two of three targets answering.
func TestOneTargetThatHangsHoldsNoOpenUp(t *testing.T) {
	r, stores := stallingRig(t, func(o *Options) { o.RootTimeout = hangs })
	model := make([]byte, testDisk)
	r.scribble(r.disk("d", testDisk), model, 10)
	r.abandon()
	stores[1].left.Store(math.MaxInt64)
	r.open(false)
	r.expect(r.disk("d", testDisk), model)
	if got := r.pool.Status().Targets[1].Root; got != string(root.Unreachable) {
		t.Errorf("the target that hangs: root %q", got)
	}
	stores[1].left.Store(0)
}

// TestReadingTheRootTakesAsLongAsItMust reads the root for a log on the tier, in fake time.
func TestReadingTheRootTakesAsLongAsItMust(t *testing.T) {
	const look = 500 * time.Millisecond
	for _, c := range []struct {
		name   string
		stall  [3]int64 // reads of each copy that never answer
		rename string   // of the second target
		took   time.Duration
		found  bool
	}{
		{"all answer", [3]int64{}, "", 0, true},
		{"one hangs: a majority is enough, after the linger", [3]int64{0, math.MaxInt64}, "", 250 * time.Millisecond, true},
		{"one with another name hangs at first: only its copy tells who it is", [3]int64{0, 1}, "other", 250 * time.Millisecond, true},
		{"a majority hangs: the log must do", [3]int64{0, math.MaxInt64, math.MaxInt64}, "", look, false},
		{"all hang", [3]int64{math.MaxInt64, math.MaxInt64, math.MaxInt64}, "", look, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				o := Options{Name: "p", RootTimeout: hangs, RootLook: look}
				var stores [3]stalling
				for i := range stores {
					stores[i].Store = backendtest.NewMemory(fmt.Sprint(i))
					o.Targets = append(o.Targets, Target{Name: fmt.Sprintf("t%d", i), Store: &stores[i]})
				}
				if err := Create(t.Context(), o); err != nil {
					t.Fatal(err)
				}
				for i, n := range c.stall {
					stores[i].left.Store(n)
				}
				if c.rename != "" {
					o.Targets[1].Name = c.rename
				}
				o = o.withDefaults()
				reg, err := root.Open(root.Options{Targets: rootTargets(o.Targets)})
				if err != nil {
					t.Fatal(err)
				}
				p := &Pool{o: o, reg: reg}
				began := time.Now() // the bubble's clock
				view, err := p.readRoot(t.Context(), true)
				if err != nil || (view != nil) != c.found {
					t.Fatalf("view %v, error %v", view, err)
				}
				if took := time.Since(began); took != c.took {
					t.Errorf("took %v, want %v", took, c.took)
				}
				if _, ok := p.store(2); c.found && (!ok || p.targetName(2) != o.Targets[1].Name) {
					t.Errorf("member 2 has a store: %v; its name is %q", ok, p.targetName(2))
				}
			})
		})
	}
}

// TestOneTargetThatHangsHoldsNoClaimUp publishes for the first time after an open, with two of three targets
// answering: each round of requests for the root waits for the third no longer than the linger.
func TestOneTargetThatHangsHoldsNoClaimUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, stores := stallingRig(t, func(o *Options) { o.RootTimeout = hangs })
		model := make([]byte, testDisk)
		r.scribble(r.disk("d", testDisk), model, 10)
		r.abandon()
		stores[1].left.Store(math.MaxInt64)
		r.open(false)
		began := time.Now() // the bubble's clock
		r.publish()
		const rounds = 6 // look, survey, promise, accept; and two commits
		if took := time.Since(began); took > rounds*250*time.Millisecond {
			t.Errorf("the first cut took %v", took)
		}
		if s := r.pool.Status(); s.State != "serving" || s.Epoch < 2 {
			t.Errorf("state %s, epoch %d", s.State, s.Epoch)
		}
		r.expect(r.disk("d", testDisk), model)
		r.abandon()
	})
}

// TestAClaimFindsATargetWithAnotherName serves from the log while no target answers, and claims the pool when all do,
// but for one that got another name and hangs once: only its copy tells which member it is.
func TestAClaimFindsATargetWithAnotherName(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		name := "t1"
		r, stores := stallingRig(t, func(o *Options) {
			o.RootTimeout, o.RootLook, o.Targets[1].Name = hangs, 500*time.Millisecond, name
		})
		r.scribble(r.disk("d", testDisk), make([]byte, testDisk), 10)
		r.abandon()
		for _, s := range stores {
			s.left.Store(math.MaxInt64)
		}
		name = "other"
		r.open(false)
		if s := r.pool.Status(); s.State != "claiming" {
			t.Fatalf("state %s before any target answered", s.State)
		}
		synctest.Wait()                      // all are asked, and hang
		for i, n := range []int64{0, 1, 0} { // of the next look
			stores[i].left.Store(n)
		}
		r.publish()
		if got := r.pool.Status().Targets[1]; got.Name != name || got.Root != string(root.OK) {
			t.Errorf("%+v", got)
		}
		r.abandon()
	})
}
