package pool

import (
	"bytes"
	"slices"
	"testing"
	"testing/synctest"

	"graindisk/backend"
	"graindisk/block"
	"graindisk/grains/extent"
	"graindisk/grains/segment"
)

func TestFsckFindsOrphansOfEarlierEpochs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := reclaimRig(t)
		d := r.disk("a", 4<<20)
		for i := range 5 {
			r.write(d, 0, bytes.Repeat([]byte{byte(i)}, 2<<20))
			r.publish()
		}
		old := segment.Info{ID: 77, Epoch: r.pool.epoch.Load()}.Key(1)
		put := func(key string) {
			if _, err := r.memory[2].Put(t.Context(), key, make([]byte, 100), backend.Cond{Absent: true}); err != nil {
				t.Fatal(err)
			}
		}
		put(old)
		if rep, err := r.pool.Fsck(t.Context(), true, true); err != nil || rep.Orphans != 0 {
			t.Errorf("what may be on its way is an orphan: %+v %v", rep, err)
		}
		r.abandon()
		r.open(false)
		r.publish()
		synctest.Wait()
		young := segment.Info{ID: 1 << 30, Epoch: r.pool.epoch.Load()}.Key(1)
		put(young)
		r.pool.raiseEpoch(r.pool.epoch.Load() + 1) // as by a claim in the middle of a commit
		if rep, err := r.pool.Fsck(t.Context(), false, false); err != nil || rep.Orphans != -1 || rep.Bad() || rep.Segments == 0 {
			t.Errorf("without looking for orphans: %+v %v", rep, err)
		}
		rep, err := r.pool.Fsck(t.Context(), true, false)
		if err != nil || rep.Orphans != 1 || rep.OrphanBytes != 100 || rep.Reclaimed || len(rep.Leaks) > 0 {
			t.Errorf("with one orphan: %+v %v", rep, err)
		}
		later()
		if !slices.Contains(r.memory[2].Keys(), old) {
			t.Error("looking has deleted it")
		}
		for range 2 {
			if rep, err = r.pool.Fsck(t.Context(), true, true); err != nil || rep.Orphans != 1 || !rep.Reclaimed {
				t.Errorf("reclaiming one: %+v %v", rep, err)
			}
		}
		later()
		if keys := r.memory[2].Keys(); slices.Contains(keys, old) || !slices.Contains(keys, young) {
			t.Error("the orphan is there, or what may be on its way is not")
		}
		r.expect(r.disk("a", 0), append(bytes.Repeat([]byte{4}, 2<<20), make([]byte, 2<<20)...))
		r.closed()
	})
}

func TestFsckTellsWhichCountsAreWrong(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := reclaimRig(t)
		d := r.disk("a", 4<<20)
		r.write(d, 0, bytes.Repeat([]byte{1}, GrainBytes))
		r.publish()
		var seg block.SegmentID
		for id, info := range r.infos() {
			if info.Extents > 0 {
				seg = id
			}
		}
		if err := r.pool.usage.Lost([]extent.Loss{{Extent: block.NewExtentID(seg, 0), Orig: grainBlocks, Blocks: 2}}); err != nil {
			t.Fatal(err)
		}
		rep, err := r.pool.Fsck(t.Context(), false, false)
		if err != nil || len(rep.Low) != 1 || len(rep.Leaks) > 0 || !rep.Bad() {
			t.Errorf("a count that is too low: %+v %v", rep, err)
		}
		r.closed()
	})
}
