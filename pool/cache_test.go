package pool

import (
	"context"
	"errors"
	"io/fs"
	"math/rand/v2"
	"path"
	"strings"
	"syscall"
	"testing"
	"time"

	"graindisk/block"
	"graindisk/internal/crashtest"
	"graindisk/vdisk"
	"graindisk/vdisk/densetree"
)

// fill writes the whole of a disk in pieces of 64 KiB.
func (r *rig) fill(name string, size int) []byte {
	r.t.Helper()
	d := r.disk(name, int64(size))
	model := make([]byte, size)
	for off := 0; off < size; off += 64 << 10 {
		p := model[off:][:64<<10]
		for i := 0; i < len(p); i += block.Size {
			p[i], p[i+1] = byte(rand.Uint32()), byte(i>>12)
		}
		r.write(d, int64(off), p)
	}
	return model
}

// TestTheCacheIsWarmAfterARestart reads everything after a clean close, and after the death of the process:
// then only what lay in the slots that were not full yet is asked of the targets.
func TestTheCacheIsWarmAfterARestart(t *testing.T) {
	r := newRig(t, func(o *Options) { o.RAMBytes = 1 << 20 })
	model := r.fill("d", 6<<20)
	r.publish()
	if err := r.pool.Close(context.Background()); err != nil {
		t.Fatal(err)
	}
	restart := func() int {
		r.open(false)
		before := r.reads()
		r.pool.cache.WaitLoaded()
		r.expect(r.disk("d", int64(len(model))), model)
		return r.reads() - before
	}
	if n := restart(); n != 0 {
		t.Errorf("%d requests to the targets after a clean close, want none", n)
	}

	model = r.fill("d", 6<<20)
	r.publish()
	r.fs = r.fs.ProcessCrash()
	killed := restart()
	if s := r.pool.cache.Stats(); s.CRCFailures > 0 || killed >= 20 {
		t.Errorf("%d requests to the targets after a kill; %+v", killed, s)
	}
	t.Logf("%d requests to the targets after a kill", killed)
}

// TestTrimEmptiesTheCache trims three quarters of a disk that is on the tier and partly in RAM: what was only
// there leaves both at once, whole slots give their space back with the cut, and a restart brings nothing back.
func TestTrimEmptiesTheCache(t *testing.T) {
	r := newRig(t, func(o *Options) { o.RAMBytes = 1 << 20 })
	model := r.fill("d", 8<<20)
	r.publish()
	d := r.disk("d", int64(len(model)))
	for range 3 {
		r.expect(d, model) // some of it goes to RAM
	}
	before := r.pool.cache.Stats()
	_, _, cleanBefore := r.pool.space.Counts()
	if before.Bytes < 7<<20 || before.RAMUsedBytes == 0 {
		t.Fatalf("the cache holds %d bytes and %d in RAM of a disk of %d", before.Bytes, before.RAMUsedBytes, len(model))
	}
	trim := func(kind vdisk.OpKind, off, n int) {
		t.Helper()
		if err := d.Write(context.Background(), []vdisk.Op{{Kind: kind, Off: int64(off), Len: int64(n)}}, true); err != nil {
			t.Fatal(err)
		}
		clear(model[off:][:n])
	}
	trim(vdisk.OpTrim, 0, 4<<20)
	for off := 4 << 20; off < len(model); off += 2 * GrainBytes { // no slot becomes empty by these
		trim(vdisk.OpZero, off, GrainBytes)
	}
	trim(vdisk.OpTrim, 4<<20+GrainBytes, 32<<10) // half of an extent: all of it stays
	r.publish()
	check := func(when string) {
		t.Helper()
		s := r.pool.cache.Stats()
		if s.Bytes > 2<<20+GrainBytes { // beside what lives there is an index or two
			t.Errorf("%s: the cache holds %d bytes, 2 MiB live", when, s.Bytes)
		}
		r.expect(d, model)
	}
	if s := r.pool.cache.Stats(); s.RAMUsedBytes > before.RAMUsedBytes/2 {
		t.Errorf("%d bytes of blocks in RAM, there were %d before three quarters of them died", s.RAMUsedBytes, before.RAMUsedBytes)
	}
	check("after the cut")
	if _, _, clean := r.pool.space.Counts(); clean > cleanBefore-3 {
		t.Errorf("%d clean slots, there were %d before 6 MiB died", clean, cleanBefore)
	}
	if err := r.pool.checkpointHere(context.Background()); err != nil { // else replay tells what died
		t.Fatal(err)
	}
	r.fs = r.fs.ProcessCrash()
	r.open(false)
	r.pool.cache.WaitLoaded()
	d = r.disk("d", int64(len(model)))
	for range 1000 {
		if r.pool.cache.Stats().Bytes <= 2<<20+GrainBytes {
			break
		}
		time.Sleep(10 * time.Millisecond) // the sweep is on its way
	}
	check("after a restart")
}

// TestADeadExtentIsNotFilled has an extent die while it is on its way to the cache, before and after it got there.
func TestADeadExtentIsNotFilled(t *testing.T) {
	r := newRig(t, nil)
	model := r.fill("d", 64<<10)
	r.publish()
	id := block.ExtentID(0)
	d := r.disk("d", int64(len(model)))
	if err := d.Tree().Lookup(0, 1, func(e densetree.Entry) bool { id = e.Extent; return true }); err != nil {
		t.Fatal(err)
	}
	c := tierExtents{r.pool.cache, r.pool}
	c.Drop(id)
	if c.Fill(d.ID(), id, model); !c.Has(id, 16) {
		t.Fatal("a live extent was not filled")
	}
	if err := d.Write(context.Background(), []vdisk.Op{{Kind: vdisk.OpTrim, Len: 64 << 10}}, true); err != nil {
		t.Fatal(err)
	}
	r.publish()
	if c.Has(id, 16) {
		t.Error("the extent is dead and cached")
	}
	if c.Fill(d.ID(), id, model); c.Has(id, 16) {
		t.Error("a dead extent was filled")
	}
}

// shrunkRig is a pool that is down, most of whose tier of *size holds what could not be published, and that is to go
// on with half of it.
func shrunkRig(t *testing.T, size *int64) (*rig, []byte) {
	t.Helper()
	r := newRig(t, func(o *Options) { o.TierBytes, o.RootTimeout = *size, 200*time.Millisecond })
	for _, s := range r.stores {
		s.SetOffline(true)
	}
	model := r.fill("d", 10<<20)
	r.abandon()
	for _, s := range r.stores {
		s.SetOffline(false)
	}
	*size /= 2
	return r, model
}

// TestTheTierChangesItsSize fills most of a tier with writes that cannot be published, and goes on with
// half of it, and then with twice.
func TestTheTierChangesItsSize(t *testing.T) {
	size := int64(16 << 20)
	r, model := shrunkRig(t, &size)
	r.open(false)
	d := r.disk("d", int64(len(model)))
	r.expect(d, model)
	r.publish()
	p := make([]byte, 1<<20)
	for i := range 24 {
		p[0] = byte(i)
		copy(model, p)
		r.write(d, 0, p)
		r.publish()
	}
	r.expect(d, model)
	if n, used := r.slotFiles(); n > 8 || used > 8 {
		t.Errorf("%d slot files, up to number %d, in a tier of 8", n, used-1)
	}
	r.abandon()
	size = 24 << 20
	r.open(false)
	d = r.disk("d", int64(len(model)))
	r.expect(d, model)
	if free, _, clean := r.pool.space.Counts(); free+clean < 16 {
		t.Errorf("%d free and %d clean slots in a tier grown to 24", free, clean)
	}
	model = r.fill("d", 10<<20)
	r.publish()
	r.expect(r.disk("d", int64(len(model))), model)
}

// TestAStartCutShortLeavesTheSlotsTheirSize finds one slot file alone, of which a first start has written a
// part.
func TestAStartCutShortLeavesTheSlotsTheirSize(t *testing.T) {
	r := newRig(t, func(o *Options) { o.TierBytes = 16 << 20 })
	want := r.pool.space.SlotBytes()
	r.abandon()
	entries, err := r.fs.ReadDir("/host/tier")
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), "slot-") {
			err = errors.Join(err, r.fs.Remove(path.Join("/host/tier", e.Name())))
		}
	}
	f, ferr := r.fs.Create("/host/tier/slot-000000")
	if err = errors.Join(err, ferr); err != nil {
		t.Fatal(err)
	}
	_, err = f.WriteAt(make([]byte, slotBytesMin+block.Size), 0)
	if err = errors.Join(err, f.Close()); err != nil {
		t.Fatal(err)
	}
	r.open(false)
	if got := r.pool.space.SlotBytes(); got != want || r.pool.Status().Tier.SlotBytes != want {
		t.Errorf("slots of %d bytes, %d before", got, want)
	}
	model := r.fill("d", 4<<20)
	r.abandon()
	r.open(false)
	r.expect(r.disk("d", int64(len(model))), model)
}

// TestAnOpenThatFailsLeavesASmallerTierAlone fails once to recover a tier that has been made smaller since,
// at each sync of the recovery in turn. What the log holds beyond the new size must be there when an open
// succeeds.
func TestAnOpenThatFailsLeavesASmallerTierAlone(t *testing.T) {
	size := int64(16 << 20)
	r, model := shrunkRig(t, &size)
	was, used := r.slotFiles()
	if used <= 8 {
		t.Fatalf("slots up to number %d are in use, none is beyond the smaller tier", used-1)
	}
	failed := 0
	for skip := 0; ; skip++ {
		r.fs.Inject(crashtest.Fault{Op: crashtest.OpSync, Path: "host/tier/*", Skip: skip, Count: 1, Err: syscall.EIO})
		p, err := Open(context.Background(), r.options(false))
		r.fs.ClearFaults()
		if err == nil {
			r.pool = p
			break
		}
		failed++
		if n, _ := r.slotFiles(); n != was {
			t.Fatalf("%d of %d slot files are left after an open that failed with: %v", n, was, err)
		}
	}
	if failed < 3 {
		t.Errorf("only %d opens failed", failed)
	}
	r.expect(r.disk("d", int64(len(model))), model)
}

// slotFiles counts the slot files on the tier, and tells how many slots it takes to have the last.
func (r *rig) slotFiles() (n, slots int) {
	r.t.Helper()
	names, err := r.fs.ReadDir("/host/tier")
	if err != nil {
		r.t.Fatal(err)
	}
	for _, e := range names {
		if strings.HasPrefix(e.Name(), "slot-") && !strings.HasSuffix(e.Name(), ".idx") {
			n++
			slots = max(slots, number(e)+1)
		}
	}
	return n, slots
}

func number(e fs.DirEntry) (n int) {
	for _, c := range strings.TrimPrefix(e.Name(), "slot-") {
		n = 10*n + int(c-'0')
	}
	return n
}
