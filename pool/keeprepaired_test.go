package pool

import (
	"context"
	"errors"
	"slices"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"graindisk/backend"
	"graindisk/backend/backendtest"
	"graindisk/block"
)

// TestTheBackgroundRefillsATargetThatIsBack leaves everything to the background: shards that a target did not take,
// then a target that is replaced.
func TestTheBackgroundRefillsATargetThatIsBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, model := withoutOne(t, func(o *Options) { o.RepairRate = 0 }) // the default
		if s := r.pool.Status().Strength; s.MissingShards == 0 || s.Below == 0 || s.Whole+s.Below != len(r.infos()) {
			t.Fatalf("before: %+v", s)
		}
		time.Sleep(10 * time.Minute)
		r.whole()
		cut := r.pool.value().Cut
		r.empty(2)
		r.replace(2)
		if s := r.pool.Status().Strength; s.LostShards == 0 {
			t.Errorf("replaced: %+v", s)
		}
		time.Sleep(10 * time.Minute)
		r.whole()
		if now := r.pool.value().Cut; now != cut {
			t.Errorf("%d cuts without anything to publish", now-cut)
		}
		r.stores[0].SetOffline(true)
		r.stores[1].SetOffline(true)
		r.freshTakeover()
		r.expect(r.disk("d", testDisk), model)
	})
}

// TestATargetThatStaysAwayIsAskedSeldom counts what the background asks of the others meanwhile.
func TestATargetThatStaysAwayIsAskedSeldom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, _ := withoutOne(t, func(o *Options) { o.RepairRate = 0 })
		r.stores[0].SetOffline(true)
		time.Sleep(time.Hour)
		before := r.pool.Status().Requests.Total()
		time.Sleep(10 * time.Hour)
		if n := r.pool.Status().Requests.Total() - before; n > 1200 { // 6 targets, every 320 s
			t.Errorf("%d requests in ten hours", n)
		}
		r.stores[0].SetOffline(false)
		time.Sleep(15 * time.Minute)
		r.whole()
	})
}

// TestARepairIsPacedAndCancelled repairs slowly, and ends that half-way.
func TestARepairIsPacedAndCancelled(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, model := filled(t, nil)
		r.empty(1)
		r.replace(1)
		const rate = 64 << 10
		ctx, cancel := context.WithCancel(t.Context())
		begin, last := time.Now(), RepairProgress{}
		rep, err := r.pool.Repair(ctx, RepairOptions{BytesPerSecond: rate, Progress: func(p RepairProgress) {
			if p.BytesDone < last.BytesDone || p.SegmentsDone < last.SegmentsDone || p.BytesTotal == 0 || p.BytesDone > p.BytesTotal {
				t.Errorf("progress from %+v to %+v", last, p)
			}
			if last = p; p.BytesDone > p.BytesTotal/2 {
				cancel()
			}
		}})
		if !errors.Is(err, context.Canceled) || rep.Restored == 0 {
			t.Fatalf("%+v, %v", rep, err)
		}
		most := rate*time.Since(begin).Seconds() + 2*float64(last.BytesTotal)/float64(last.SegmentsTotal) // two are under way at once
		if float64(rep.RestoredBytes) > most {
			t.Errorf("%d bytes in %v", rep.RestoredBytes, time.Since(begin))
		}
		if s := r.pool.Status(); s.SegmentsBelowStrength == 0 || s.Repair.Running || s.Repair.Error != "" || s.Repair.BytesDone != last.BytesDone {
			t.Errorf("the status says %+v, %+v", s.Strength, s.Repair)
		}
		if again := r.repair(); again.Restored == 0 || again.Failed+again.Waiting > 0 {
			t.Errorf("%+v", again)
		}
		r.whole()
		r.expect(r.disk("d", testDisk), model)
	})
}

// TestARepairPutsNothingOnAnEmptiedTarget leaves the shards of one target where they are not, as long as it has not
// been replaced.
func TestARepairPutsNothingOnAnEmptiedTarget(t *testing.T) {
	r, _ := withoutOne(t, nil)
	r.empty(0)
	rep := r.repair()
	if rep.Restored > 0 || rep.Waiting == 0 || r.pool.Status().SegmentsBelowStrength == 0 {
		t.Errorf("%+v", rep)
	}
	if keys := r.memory[0].Keys(); len(keys) > 0 {
		t.Errorf("stored %v", keys)
	}
	r.replace(0)
	if rep := r.repair(); rep.Restored == 0 || rep.Waiting > 0 {
		t.Errorf("%+v", rep)
	}
	r.whole()
}

// TestATargetIsAdded opens a pool with one target more in its configuration.
func TestATargetIsAdded(t *testing.T) {
	more := backendtest.NewFaulty(backendtest.NewMemory("more"), 9)
	var known atomic.Bool
	r, model := filled(t, func(o *Options) {
		if known.Load() {
			o.Targets = append(o.Targets, Target{Name: "t3", Store: more})
		}
	})
	r.abandon()
	r.fs = r.fs.ProcessCrash()
	known.Store(true)
	r.open(false)
	r.publish() // it is claimed then
	if _, err := r.pool.ReplaceTarget(t.Context(), "t3"); !errors.Is(err, ErrNoTarget) {
		t.Errorf("replaced what was not there: %v", err)
	}
	if c, err := r.pool.AddTarget(t.Context(), "t3"); err != nil || c.New != 4 || c.Old != 0 {
		t.Fatalf("%+v, %v", c, err)
	}
	if s := r.pool.Status(); len(s.Targets) != 4 || s.SegmentsBelowStrength > 0 {
		t.Errorf("%+v", s.Targets)
	}
	used := false
	for range 8 {
		r.scribble(r.disk("d", testDisk), model, 10)
		r.publish()
	}
	for _, i := range r.sorted() {
		used = used || slices.Contains(i.Targets, block.TargetID(4))
	}
	if !used {
		t.Error("no segment uses it")
	}
	r.stores[0].SetOffline(true)
	r.freshTakeover()
	r.expect(r.disk("d", testDisk), model)
}

// TestABankOfAFormerTargetIsPackedAgain replaces a target between the filling of a bank and its storing.
func TestABankOfAFormerTargetIsPackedAgain(t *testing.T) {
	r, model := filled(t, nil)
	r.empty(2)
	held, going := make(chan struct{}), make(chan struct{})
	var once atomic.Bool
	for _, s := range r.stores[:2] { // the first shard of the next cut waits
		s.Before = func(op, key string) error {
			if op == "put" && key[:3] == "seg" && once.CompareAndSwap(false, true) {
				close(held)
				<-going
				return &backend.Error{Op: op, Key: key, Class: backend.Permanent}
			}
			return nil
		}
	}
	d := r.disk("d", testDisk)
	r.scribble(d, model, 30)
	published := make(chan error, 1)
	go func() { published <- r.pool.Publish(context.Background()) }()
	<-held
	r.replace(2)
	close(going)
	if err := <-published; err != nil {
		t.Fatal(err)
	}
	r.publish()
	r.repair()
	r.whole()
	r.empty(0)
	r.freshTakeover()
	r.expect(r.disk("d", testDisk), model)
}
