package pool

import (
	"bytes"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"graindisk/grains/segment"
)

func segmentKeys(keys []string) []string {
	return slices.DeleteFunc(keys, func(k string) bool { return !strings.HasPrefix(k, "seg/") })
}

// TestAShardOfASegmentThatWentIsDeleted restores a shard for so long that its segment is deleted meanwhile.
func TestAShardOfASegmentThatWentIsDeleted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, _ := filled(t, func(o *Options) {
			o.CheckpointCuts = 1
			o.DeleteGrace, o.reclaimTick, o.reclaimRound = 5*time.Second, time.Second, 2*time.Second
		})
		all := r.sorted()
		old := all[slices.IndexFunc(all, func(i segment.Info) bool { return slices.Contains(i.Targets, 3) })]
		d := r.disk("d", testDisk)
		r.empty(2)
		r.replace(2)
		late := old.Key(slices.Index(old.Targets, 3))
		var isThere atomic.Bool
		stored := make(chan struct{})
		first := sync.OnceFunc(func() { close(stored); time.Sleep(putTimeout - 5*time.Second) })
		r.stores[2].Before = func(op, key string) error {
			switch {
			case key != late:
			case op == "put":
				first()
			case op == "get": // it is read back
				isThere.Store(true)
			}
			return nil
		}
		done := make(chan RepairReport)
		go func() {
			rep, err := r.pool.Repair(t.Context(), RepairOptions{})
			if err != nil {
				t.Error(err)
			}
			done <- rep
		}()
		select {
		case <-stored:
		case rep := <-done:
			t.Fatalf("segment %d is not repaired: %+v", old.ID, rep)
		}
		for i := range 3 {
			r.write(d, 0, bytes.Repeat([]byte{byte(i + 1)}, testDisk))
			r.publish()
		}
		time.Sleep(putTimeout - 10*time.Second)
		if _, ok := r.pool.segmentInfo(old.ID); ok || r.pool.known(old.ID, old.Epoch) {
			t.Fatal("the segment is there still; nothing is proved")
		}
		<-done
		if !isThere.Load() {
			t.Fatal("the shard was not stored")
		}
		later()
		if slices.Contains(r.memory[2].Keys(), late) {
			t.Error("the shard is left though its segment went")
		}
		r.expect(d, bytes.Repeat([]byte{3}, testDisk))
		r.repair()
		r.whole()
		r.checkAll()
	})
}

// TestStraysAreCountedAndGoWithTheirSegments loses the host that knew where repaired shards are, and then the data.
func TestStraysAreCountedAndGoWithTheirSegments(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, model := filled(t, quickReclaim)
		r.empty(2)
		r.replace(2)
		if rep, err := r.pool.restoreAll(t.Context(), RepairOptions{}); err != nil || rep.Restored == 0 {
			t.Fatalf("%+v, %v", rep, err)
		}
		n := len(segmentKeys(r.memory[2].Keys()))
		if rep, err := r.pool.Fsck(t.Context(), true, false); err != nil || rep.Strays != 0 || rep.Orphans != 0 {
			t.Errorf("%+v, %v", rep, err)
		}
		r.freshTakeover()
		if rep, err := r.pool.Fsck(t.Context(), true, true); err != nil || rep.Strays != n || n == 0 || rep.StrayBytes == 0 || rep.Orphans != 0 {
			t.Errorf("%d shards are where only the lost host knew: %+v, %v", n, rep, err)
		}
		d := r.disk("d", testDisk)
		later()
		r.expect(d, model)
		if now := len(segmentKeys(r.memory[2].Keys())); now < n {
			t.Errorf("%d of %d strays are there: the next repair may have taken them for its own", now, n)
		}
		strays := segmentKeys(r.memory[2].Keys())
		for i := range 3 {
			r.write(d, 0, bytes.Repeat([]byte{byte(i + 1)}, testDisk))
			r.publish()
		}
		later()
		later()
		left := 0
		for _, key := range r.memory[2].Keys() {
			if slices.Contains(strays, key) {
				left++
			}
		}
		if left > 3 { // a segment with a cut's record stays while its cut has a living one
			t.Errorf("%d of %d strays are left of segments that went", left, n)
		}
		r.repair()
		r.whole()
		if rep, err := r.pool.Fsck(t.Context(), true, false); err != nil || rep.Strays != 0 || rep.Orphans != 0 {
			t.Errorf("%+v, %v", rep, err)
		}
	})
}
