package pool

import (
	"context"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"graindisk/backend"
)

// thinned is an absentRig whose newest checkpoint lacks a copy of its manifest, as after a target was replaced.
func thinned(t *testing.T) (*rig, []byte) {
	t.Helper()
	r, _, model := absentRig(t, nil)
	ref := r.pool.value().Checkpoints[0]
	for i, m := range r.memory {
		key := partKey(ref.Epoch, ref.N, 0, 0)
		if _, ok := m.Objects()[key]; ok {
			if err := r.stores[i].Delete(context.Background(), key); err != nil {
				t.Fatal(err)
			}
		}
	}
	if weak, err := r.pool.checkpointWeak(context.Background()); err != nil || !weak {
		t.Fatalf("the checkpoint does not lack a copy: %v", err)
	}
	r.pool.repair.weak.Store(true)
	return r, model
}

// TestCutsDoNotWaitForMapsThatARepairWants repairs a checkpoint while no target gives the maps that are far: cuts go on.
func TestCutsDoNotWaitForMapsThatARepairWants(t *testing.T) {
	r, model := thinned(t)
	asked, away := make(chan struct{}), new(atomic.Bool)
	once := sync.OnceFunc(func() { close(asked) })
	away.Store(true)
	for _, s := range r.stores {
		s.Before = func(op, key string) error {
			if op != "read" || !strings.HasPrefix(key, "ckpt/") || strings.Contains(key, "/0.") || !away.Load() { // manifests can be had
				return nil
			}
			once()
			return &backend.Error{Op: op, Key: key, Class: backend.Transient}
		}
	}
	repaired := make(chan error, 1)
	go func() {
		_, err := r.pool.Repair(context.Background(), RepairOptions{})
		repaired <- err
	}()
	<-asked
	d := r.disk("d", testDisk)
	for range 3 {
		r.write(d, 0, model[:1])
		ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
		err := r.pool.Publish(ctx)
		cancel()
		if err != nil {
			away.Store(false)
			t.Fatalf("a cut waited for maps: %v", err)
		}
	}
	away.Store(false)
	if err := <-repaired; err != nil || r.pool.repair.weak.Load() || r.partial() > 0 {
		t.Errorf("repaired: %v, %d runs are partial", err, r.partial())
	}
	r.whole()
	r.freshTakeover()
	r.expect(r.disk("d", testDisk), model)
}

// TestACheckpointThatLacksCopiesIsNotForgotten repairs one of whose maps no copy is intact.
func TestACheckpointThatLacksCopiesIsNotForgotten(t *testing.T) {
	r, _ := thinned(t)
	run := r.pool.runs.Partial()[0]
	ref, _ := r.pool.far.ref(run.ID)
	for _, m := range r.memory {
		for c := range r.memory {
			if key := partKey(ref.Epoch, ref.N, ref.Part, c); m.Objects()[key] != nil {
				m.Damage(key, func(b []byte) []byte { b[int64(len(b))-1-(int64(len(b))-partHeaderLen-ref.Off-ref.Len)] ^= 8; return b })
			}
		}
	}
	for range 2 {
		rep, err := r.pool.Repair(context.Background(), RepairOptions{})
		if !final(err) || rep.Checkpoint {
			t.Errorf("repaired %+v, %v", rep, err)
		}
		if !r.pool.repair.weak.Load() || !r.pool.repair.look.Load() {
			t.Error("the checkpoint counts as whole")
		}
	}
}

// TestALossDuringARepairIsSeenByTheNext replaces a target while a repair has its checkpoint stored.
func TestALossDuringARepairIsSeenByTheNext(t *testing.T) {
	r, _ := thinned(t)
	var over atomic.Bool
	for _, s := range r.stores {
		s.Before = func(op, key string) error {
			if op == "put" && !over.Load() && strings.HasPrefix(key, "ckpt/") {
				r.pool.repair.weak.Store(true)
			}
			return nil
		}
	}
	if rep := r.repair(); !rep.Checkpoint || !r.pool.repair.weak.Load() {
		t.Errorf("repaired %+v; what was lost meanwhile is forgotten", rep)
	}
	over.Store(true)
	if rep := r.repair(); rep.Checkpoint || r.pool.repair.weak.Load() {
		t.Errorf("repaired %+v though nothing was lost", rep)
	}
}

// TestTheLargerWishWins asks for a checkpoint twice.
func TestTheLargerWishWins(t *testing.T) {
	for _, c := range [][2]int32{{wantCheckpoint, wantWholeCheckpoint}, {wantWholeCheckpoint, wantCheckpoint}} {
		var r repairer
		r.ask(c[0])
		r.ask(c[1])
		if got := r.want.Load(); got != wantWholeCheckpoint {
			t.Errorf("asked for %v, made is %d", c, got)
		}
	}
}
