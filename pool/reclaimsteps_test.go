package pool

import (
	"bytes"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"graindisk/backend"
	"graindisk/block"
)

func quickReclaim(o *Options) {
	o.DeleteGrace, o.UndeleteWindow = 4*time.Minute, 2*time.Minute
	o.reclaimTick, o.reclaimRound = 10*time.Second, 30*time.Second
}

// TestReclaimGoesOnBesideAMapThatCannotBeEmptied drops a disk whose maps cannot be had, and overwrites another.
func TestReclaimGoesOnBesideAMapThatCannotBeEmptied(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, _, _ := absentRig(t, quickReclaim)
		if err := r.pool.DeleteDisk(t.Context(), "d", false, true); err != nil {
			t.Fatal(err)
		}
		other := r.disk("other", 4<<20)
		for i := range 6 {
			r.write(other, 0, bytes.Repeat([]byte{byte(1 + i)}, 4<<20))
			r.publish()
		}
		later()
		later()
		s := r.pool.Status()
		if r.partial() == 0 {
			t.Fatal("the maps of the dropped disk came; nothing is proved")
		}
		if s.Space.ReclaimedBytes < 16<<20 {
			t.Errorf("reclaimed %d bytes of the other disk: %+v", s.Space.ReclaimedBytes, s.Space)
		}
		r.expect(other, bytes.Repeat([]byte{6}, 4<<20))
		r.checkAll()
	})
}

// TestReclaimGoesOnBesideATargetThatCannotBeListed overwrites a disk while the parts of checkpoints cannot be listed.
func TestReclaimGoesOnBesideATargetThatCannotBeListed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := reclaimRig(t)
		var listed atomic.Bool
		r.stores[1].Before = func(op, key string) error {
			if op == "list" && !listed.Load() && strings.HasPrefix(key, "ckpt/") {
				return &backend.Error{Op: op, Key: key, Class: backend.Transient}
			}
			return nil
		}
		d := r.disk("d", 4<<20)
		for i := range 6 {
			r.write(d, 0, bytes.Repeat([]byte{byte(1 + i)}, 4<<20))
			r.publish()
		}
		later()
		if s := r.pool.Status().Space; s.ReclaimedBytes < 16<<20 {
			t.Errorf("reclaimed %d bytes: %+v", s.ReclaimedBytes, s)
		}
		listed.Store(true)
		later()
		r.checkAll()
	})
}

// TestADroppedDiskWithDamagedMapsFreesTheTargets damages the files of its maps before it is dropped: nobody looks
// anything up there any more.
func TestADroppedDiskWithDamagedMapsFreesTheTargets(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, func(o *Options) { smallMaps(o); quickReclaim(o) })
		model := make([]byte, testDisk)
		d := r.disk("d", testDisk)
		for range 8 {
			r.scribble(d, model, 12)
			r.publish()
		}
		if err := d.Tree().Compact(); err != nil {
			t.Fatal(err)
		}
		r.pool.repair.ask(wantCheckpoint)
		r.publish()
		peak := r.stored("seg/")
		for _, f := range r.runFiles() {
			r.corrupt(f, block.Size+30)
		}
		if err := r.pool.DeleteDisk(t.Context(), "d", false, true); err != nil {
			t.Fatal(err)
		}
		r.publish()
		later()
		later()
		if left := r.stored("seg/"); left > peak/20 {
			t.Errorf("%d of %d bytes are left: %+v", left, peak, r.pool.Status().Space)
		}
		r.checkAll()
	})
}
