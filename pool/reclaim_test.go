package pool

import (
	"bytes"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"graindisk/backend"
	"graindisk/block"
	"graindisk/vdisk"
)

// later has what waits for the grace and the window happen: time is a bubble's.
func later() {
	time.Sleep(12 * time.Minute)
	synctest.Wait()
}

func reclaimRig(t *testing.T) *rig {
	return newRig(t, func(o *Options) {
		o.MaxDirtyAge = 30 * time.Second
		o.CheckpointCuts = 4
		o.DeleteGrace, o.UndeleteWindow = 4*time.Minute, 2*time.Minute
		o.reclaimTick, o.reclaimRound = 10*time.Second, 30*time.Second
	})
}

// stored is how many bytes the targets hold below a prefix.
func (r *rig) stored(prefix string) (n int) {
	for _, m := range r.memory {
		for key, b := range m.Objects() {
			if strings.HasPrefix(key, prefix) {
				n += len(b)
			}
		}
	}
	return n
}

// checkAll expects counts that equal a recount.
func (r *rig) checkAll() {
	r.t.Helper()
	rep, err := r.pool.CheckUsage(r.t.Context())
	if err != nil || len(rep.Leaks)+len(rep.Low) > 0 || r.pool.usageErr.Load() != nil {
		r.t.Errorf("counts: %+v %v %v", rep, err, r.pool.usageErr.Load())
	}
}

// TestDeadSegmentsLeaveTheTargets overwrites and trims, and expects the buckets to follow, the disk to stay what it
// was on this host and on a fresh one, and the trims to be in the records that are left.
func TestDeadSegmentsLeaveTheTargets(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := reclaimRig(t)
		d := r.disk("a", 8<<20)
		model := make([]byte, 8<<20)
		write := func(off, n int, fill byte) {
			copy(model[off:], bytes.Repeat([]byte{fill}, n))
			r.write(d, int64(off), model[off:off+n])
			r.publish()
		}
		write(0, 4<<20, 1)
		if err := d.Write(t.Context(), []vdisk.Op{{Kind: vdisk.OpTrim, Len: 1 << 20}}, true); err != nil {
			t.Fatal(err)
		}
		clear(model[:1<<20])
		r.publish()
		for i := range 6 {
			write(1<<20, 3<<20, byte(2+i))
		}
		before := r.stored("seg/")
		later()
		after := r.stored("seg/")
		if live := 3 << 20 * 2; after > live*9/8 || before < 4*live { // small segments are stored twice
			t.Errorf("the targets hold %d bytes of segments, %d before; %d are live: %+v", after, before, live, r.pool.Status().Space)
		}
		s := r.pool.Status().Space
		if s.DeadSegments > 3 || s.ReclaimedSegments == 0 || s.ReclaimedBytes < 16<<20 {
			t.Errorf("status: %+v", s)
		}
		r.checkAll()
		r.expect(d, model)
		r.publish() // idle
		segs := r.pool.Status().Segments
		later()
		if n := r.pool.Status().Segments; n > segs {
			t.Errorf("an idle pool has grown from %d to %d segments: reclaim feeds itself", segs, n)
		}
		r.abandon()
		r.open(false)
		r.expect(r.disk("a", 0), model)
		r.abandon()
		r.newHost()
		r.open(true)
		r.expect(r.disk("a", 0), model)
		r.checkAll()
		r.closed()
	})
}

// TestNothingGoesBeforeTheGrace expects every object to stay for as long as a reader of an older root may want it.
func TestNothingGoesBeforeTheGrace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := reclaimRig(t)
		d := r.disk("a", 4<<20)
		for i := range 10 {
			r.write(d, 0, bytes.Repeat([]byte{byte(i)}, 2<<20))
			r.publish()
		}
		died := time.Now()
		objects := func() (n int) {
			for _, m := range r.memory {
				n += len(m.Keys())
			}
			return n
		}
		most := 0
		for now := objects(); now >= most; now = objects() {
			most = now
			if time.Since(died) > time.Hour {
				t.Fatal("nothing was ever deleted")
			}
			time.Sleep(10 * time.Second)
		}
		if took := time.Since(died); took < 4*time.Minute {
			t.Errorf("the first object went %v after it died", took)
		}
		r.closed()
	})
}

// TestTheGraceSurvivesRestarts restarts the gateway more often than the grace, and expects buckets to shrink all the same.
func TestTheGraceSurvivesRestarts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := reclaimRig(t)
		d := r.disk("a", 4<<20)
		for i := range 10 {
			r.write(d, 0, bytes.Repeat([]byte{byte(i)}, 2<<20))
			r.publish()
		}
		before := r.stored("seg/")
		for range 6 {
			time.Sleep(3 * time.Minute)
			synctest.Wait()
			r.abandon() // as kill -9
			r.open(false)
		}
		synctest.Wait()
		if after := r.stored("seg/"); after > before/2 {
			t.Errorf("%d bytes of %d are left after a while", after, before)
		}
		r.checkAll()
		r.closed()
	})
}

// TestATargetThatIsAwayIsWaitedFor expects what is on it to be deleted once it is back.
func TestATargetThatIsAwayIsWaitedFor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := reclaimRig(t)
		d := r.disk("a", 4<<20)
		for i := range 10 {
			r.write(d, 0, bytes.Repeat([]byte{byte(i)}, 2<<20))
			r.publish()
		}
		r.stores[1].SetOffline(true)
		later()
		had := len(r.memory[1].Keys())
		r.stores[1].SetOffline(false)
		later()
		if now := len(r.memory[1].Keys()); now > had/2 {
			t.Errorf("target 1 holds %d objects, %d while it was away", now, had)
		}
		r.checkAll()
		r.closed()
	})
}

// TestOldCheckpointsLeaveTheTargets expects two checkpoints at most, also of those that crashes cut short.
func TestOldCheckpointsLeaveTheTargets(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := reclaimRig(t)
		d := r.disk("a", 4<<20)
		if _, err := r.memory[0].Put(t.Context(), partKey(1, 77, 3, 0), []byte("of a checkpoint that was never named"), backend.Cond{Absent: true}); err != nil {
			t.Fatal(err)
		}
		for i := range 60 {
			r.write(d, int64(i%7)*block.Size, bytes.Repeat([]byte{byte(i)}, block.Size))
			r.publish()
			if i == 30 {
				r.abandon()
				r.open(false)
				d = r.disk("a", 0)
			}
		}
		later()
		needed := map[partID]bool{}
		for _, ref := range r.pool.value().Checkpoints {
			s, err := r.pool.readManifest(t.Context(), ref)
			if err != nil {
				t.Fatal(err)
			}
			s.parts(idOf(ref), needed)
		}
		for i, m := range r.memory {
			for _, key := range m.Keys() {
				if id, ok := parsePartKey(key); ok && !needed[id] {
					t.Errorf("target %d still holds %s", i, key)
				}
			}
		}
		r.closed()
	})
}
