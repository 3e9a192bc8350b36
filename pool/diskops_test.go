package pool

import (
	"bytes"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"graindisk/block"
	"graindisk/grains/segment"
	"graindisk/vdisk"
)

// everyWay calls check as it is, and after each way back: a crash, a clean close, another host.
func (r *rig) everyWay(check func(how string)) {
	r.t.Helper()
	check("as it is")
	r.abandon()
	r.open(false)
	check("after a crash")
	r.close()
	r.open(false)
	check("after a clean close")
	r.close()
	r.newHost()
	r.open(false)
	check("on another host")
	r.abandon()
	r.newHost()
	r.open(true)
	check("after the loss of the host")
}

func TestADeletedDiskCanBeHadBackUntilItIsDropped(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := reclaimRig(t)
		ctx := t.Context()
		d := r.disk("a", 4<<20)
		r.disk("b", 1<<20)
		model := bytes.Repeat([]byte{3}, 4<<20)
		r.write(d, 0, model)
		release, err := d.Use()
		if err != nil {
			t.Fatal(err)
		}
		if err := r.pool.DeleteDisk(ctx, "a", false, false); !errors.Is(err, ErrInUse) {
			t.Errorf("delete while it is in use: %v", err)
		}
		if err := r.pool.DeleteDisk(ctx, "a", true, false); err != nil {
			t.Fatal(err)
		}
		release()
		for what, err := range map[string]error{
			"read":  d.Read(ctx, make([]byte, 1), 0),
			"write": d.Write(ctx, []vdisk.Op{{Kind: vdisk.OpWrite, Len: 1, Data: []byte{1}}}, false),
			"flush": d.Flush(ctx),
			"use":   second(d.Use()),
		} {
			if !errors.Is(err, vdisk.ErrDeleted) {
				t.Errorf("%s of a deleted disk: %v", what, err)
			}
		}
		if err := r.pool.DeleteDisk(ctx, "a", true, false); !errors.Is(err, ErrNoDisk) {
			t.Errorf("deleted twice: %v", err)
		}
		r.publish()
		r.everyWay(func(how string) {
			ds := r.pool.DeletedDisks(false)
			if len(ds) != 1 || ds[0].Name != "a" || ds[0].Until != ds[0].DeletedAt.Add(2*time.Minute) || !r.pool.WasDeleted("a") || r.pool.WasDeleted("b") {
				t.Errorf("%s: deleted are %+v", how, ds)
			}
			if _, err := r.pool.Disk("a"); !errors.Is(err, ErrNoDisk) {
				t.Errorf("%s: the disk is there: %v", how, err)
			}
		})
		if _, err := r.pool.CreateDisk(ctx, "a", 1<<20); err != nil {
			t.Fatalf("the name is not free: %v", err)
		}
		if _, err := r.pool.UndeleteDisk(ctx, "a", 0, ""); !errors.Is(err, ErrExists) {
			t.Errorf("undelete over a disk: %v", err)
		}
		if _, err := r.pool.UndeleteDisk(ctx, "b", 0, "c"); !errors.Is(err, ErrNoDisk) {
			t.Errorf("undelete of what was not deleted: %v", err)
		}
		if d, err = r.pool.UndeleteDisk(ctx, "a", 0, "old"); err != nil {
			t.Fatal(err)
		}
		r.expect(d, model)
		r.write(d, 0, []byte{9})
		model[0] = 9
		r.publish()
		r.everyWay(func(string) {
			r.expect(r.disk("old", 0), model)
			if r.disk("a", 0).Size() != 1<<20 {
				t.Error("the new disk of that name has another size")
			}
		})
		r.closed()
	})
}

func second[T any](_ T, err error) error { return err }

// TestDeletedDisksFreeTheTargets deletes all disks and expects the buckets to be all but empty, and the names to be
// remembered.
func TestDeletedDisksFreeTheTargets(t *testing.T) {
	for _, purge := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			r := reclaimRig(t)
			for _, name := range []string{"a", "b", "c"} {
				d := r.disk(name, 16<<20)
				for i := range 4 {
					r.write(d, int64(i)*3<<20, bytes.Repeat([]byte(name), 3<<20))
					r.write(d, 13<<20+int64(i)*8192, []byte{1})
				}
				r.publish()
			}
			peak := r.stored("")
			for _, name := range []string{"a", "b", "c"} {
				if err := r.pool.DeleteDisk(t.Context(), name, false, purge); err != nil {
					t.Fatal(err)
				}
			}
			time.Sleep(100 * time.Second)
			if r.stored("") < peak {
				t.Error("something was deleted within the window and the grace")
			}
			later()
			later()
			r.checkAll()
			if left := r.stored(""); left > peak/100 {
				for i, m := range r.memory {
					for key, b := range m.Objects() {
						t.Logf("%d %s: %d", i, key, len(b))
					}
				}
				t.Errorf("%d of %d bytes are left: %+v", left, peak, r.pool.Status().Space)
			}
			r.everyWay(func(how string) {
				if ds := r.pool.DeletedDisks(true); len(ds) != 3 || !ds[0].Dropped || len(r.pool.DeletedDisks(false)) > 0 {
					t.Errorf("%s: %+v", how, ds)
				}
				r.checkAll()
			})
			if d := r.disk("d", 1<<20); d.ID() != 4 {
				t.Errorf("number %d is given again", d.ID())
			}
			r.closed()
		})
	}
}

func TestARenamedDiskKeepsItsData(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := reclaimRig(t)
		ctx := t.Context()
		a, b := r.disk("a", 1<<20), r.disk("b", 1<<20)
		r.write(a, 0, bytes.Repeat([]byte{1}, 1<<20))
		r.write(b, 0, bytes.Repeat([]byte{2}, 1<<20))
		r.publish()
		if _, err := r.pool.RenameDisk(ctx, "a", "b", false); !errors.Is(err, ErrExists) {
			t.Errorf("onto another disk: %v", err)
		}
		if _, err := r.pool.RenameDisk(ctx, "x", "y", false); !errors.Is(err, ErrNoDisk) {
			t.Errorf("of no disk: %v", err)
		}
		for _, names := range [][2]string{{"a", "c"}, {"b", "a"}, {"c", "b"}} { // they change places
			if _, err := r.pool.RenameDisk(ctx, names[0], names[1], false); err != nil {
				t.Fatal(err)
			}
		}
		check := func(string) {
			r.expect(r.disk("a", 0), bytes.Repeat([]byte{2}, 1<<20))
			r.expect(r.disk("b", 0), bytes.Repeat([]byte{1}, 1<<20))
			if n := len(r.pool.Disks()); n != 2 {
				t.Errorf("there are %d disks", n)
			}
		}
		if a.Name() != "b" {
			t.Errorf("who has it open sees %s", a.Name())
		}
		check("")
		r.abandon()
		r.open(false)
		check("with the renames in the log alone")
		r.publish()
		r.everyWay(check)
		r.closed()
	})
}

func TestAResizedDiskShowsNothingOld(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := reclaimRig(t)
		ctx := t.Context()
		d := r.disk("a", 4<<20)
		model := bytes.Repeat([]byte{5}, 4<<20)
		r.write(d, 0, model)
		r.publish()
		resize := func(size int64, shrink bool) error {
			_, err := r.pool.ResizeDisk(ctx, "a", size, shrink)
			return err
		}
		if err := resize(1<<20, false); !errors.Is(err, ErrShrink) || d.Size() != 4<<20 {
			t.Errorf("without saying so: %v, %d bytes", err, d.Size())
		}
		if err := resize(1<<20, true); err != nil {
			t.Fatal(err)
		}
		if err := d.Read(ctx, make([]byte, block.Size), 1<<20); !errors.Is(err, vdisk.ErrRange) {
			t.Errorf("a read beyond the new end: %v", err)
		}
		if err := d.Write(ctx, []vdisk.Op{{Kind: vdisk.OpTrim, Off: 1 << 20, Len: block.Size}}, false); !errors.Is(err, vdisk.ErrRange) {
			t.Errorf("a trim beyond the new end: %v", err)
		}
		check := func(string) { r.expect(r.disk("a", 0), model) }
		model = model[:1<<20]
		check("")
		r.abandon()
		r.open(false)
		check("")
		if err := resize(8<<20, false); err != nil {
			t.Fatal(err)
		}
		model = append(model, make([]byte, 7<<20)...)
		check("")
		r.write(r.disk("a", 0), 8<<20-1, []byte{1})
		model[8<<20-1] = 1
		r.publish()
		r.everyWay(func(how string) {
			check(how)
			if s := r.disk("a", 0).Size(); s != 8<<20 {
				t.Errorf("%s: %d bytes", how, s)
			}
		})
		later()
		if live := r.pool.Status().Space.LiveBytes; live != 1<<20+block.Size {
			t.Errorf("%d bytes are live", live)
		}
		r.closed()
	})
}

// TestWhatATrimHidStaysHiddenInTheRecords applies what the targets hold, cut by cut as a rebuild would, after the
// segments went whose records said so.
func TestWhatATrimHidStaysHiddenInTheRecords(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := reclaimRig(t)
		d := r.disk("a", 4<<20)
		r.write(d, 0, bytes.Repeat([]byte{1}, 1<<20)) // its segments stay
		r.publish()
		if err := d.Write(t.Context(), []vdisk.Op{ // this cut's go
			{Kind: vdisk.OpTrim, Off: 64 << 10, Len: 128 << 10},
			{Kind: vdisk.OpTrim, Off: 512 << 10, Len: 64 << 10},
			{Kind: vdisk.OpWrite, Off: 3 << 20, Len: 64 << 10, Data: make([]byte, 64<<10)},
		}, true); err != nil {
			t.Fatal(err)
		}
		r.publish()
		r.write(d, 528<<10, bytes.Repeat([]byte{2}, 4<<10)) // one of its holes has data again
		r.write(d, 3<<20, bytes.Repeat([]byte{3}, 64<<10))
		r.publish()
		cuts := r.pool.pubCut()
		later()
		recs := r.records()
		if recs[2] != nil || recs[1] == nil {
			t.Fatalf("cut 2 is there: %v, cut 1: %v", recs[2], recs[1])
		}
		var again []segment.Run
		for cut, rec := range recs {
			if cut <= cuts || rec == nil {
				continue
			}
			if rec.Gone != nil && len(rec.Disks) > 0 {
				again = rec.Disks[0].Unmaps
			}
		}
		want := []segment.Run{{LBA: 16, Blocks: 32}, {LBA: 128, Blocks: 4}, {LBA: 133, Blocks: 11}}
		if len(again) != len(want) || again[0] != want[0] || again[1] != want[1] || again[2] != want[2] {
			t.Errorf("stated again: %v, want %v", again, want)
		}
		r.closed()
	})
}

// records reads the records of all cuts that are stored.
func (r *rig) records() map[uint64]*segment.CutRecord {
	r.t.Helper()
	recs := map[uint64]*segment.CutRecord{}
	for _, info := range r.infos() {
		if info.CutBytes == 0 {
			continue
		}
		rec, _, err := segment.ReadCut(r.t.Context(), r.pool.segmentStore, info)
		if err != nil {
			r.t.Fatal(err)
		}
		recs[rec.Cut] = rec
	}
	return recs
}
