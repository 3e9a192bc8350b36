package pool

import (
	"context"
	"errors"
	"math"
	"sync/atomic"
	"testing"
	"time"

	"graindisk/backend"
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
	r, stores := stallingRig(t, func(o *Options) { o.RootTimeout, o.RootLook = 300*time.Millisecond, 20*time.Millisecond })
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
	if took := time.Since(began); took < 300*time.Millisecond {
		t.Errorf("gave up after %v", took)
	}
	r.pool = nil
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

// TestARenamedTargetIsWaitedFor gives a target another name: only its copy of the root says who it is.
func TestARenamedTargetIsWaitedFor(t *testing.T) {
	name := ""
	r, stores := stallingRig(t, func(o *Options) {
		o.RootTimeout = hangs
		if name != "" {
			o.Targets[1].Name = name
		}
	})
	model := make([]byte, testDisk)
	r.scribble(r.disk("d", testDisk), model, 10)
	r.abandon()
	name = "other"
	stores[1].left.Store(1)
	r.open(false)
	r.expect(r.disk("d", testDisk), model)
	if got := r.pool.Status().Targets[1]; got.Name != name || got.Root != string(root.OK) {
		t.Errorf("the target with another name is %q, its root %q", got.Name, got.Root)
	}
}
