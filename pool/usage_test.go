package pool

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"testing"

	"graindisk/block"
	"graindisk/grains/extent"
	"graindisk/vdisk"
	"graindisk/vdisk/densetree"
	"graindisk/writeback"
)

// checkUsage holds the usage table against a recount of what the trees map. With compact it merges all
// trees first, after which the table must equal what a flat walk over every block of every disk finds.
func (w *world) checkUsage(compact bool) error {
	if len(w.p.runs.Partial()) > 0 && w.rng.IntN(4) > 0 { // it would bring them all
		return nil
	}
	w.stats.recounts.Add(1)
	rep, err := w.p.CheckUsage(w.life.ctx)
	if err == nil && len(rep.Leaks)+len(rep.Low) > 0 {
		err = fmt.Errorf("the usage table differs from a recount: leaks %v, low %v", rep.Leaks, rep.Low)
	}
	if g := w.p.usageErr.Load(); err == nil && g != nil {
		err = g.err
	}
	if err == nil && compact && !w.life.hurt.Load() { // with a fault armed, a merge may fail
		w.stats.compacted.Add(1)
		err = w.checkFlat()
	}
	if w.fs.WasCut() {
		return nil // maps are read from the tier
	}
	return err
}

func (w *world) checkFlat() error {
	p := w.p
	p.mapsMu.Lock()
	p.mu.Lock()
	trees := maps.Clone(p.trees)
	p.mu.Unlock()
	var errs []error
	for _, id := range slices.Sorted(maps.Keys(trees)) {
		errs = append(errs, trees[id].Compact())
	}
	v := p.mapsNow()
	defer v.release()
	p.mapsMu.Unlock()
	live, orig := map[block.ExtentID]uint32{}, map[block.ExtentID]uint32{}
	for _, id := range v.disks() {
		t := v.trees[id]
		for lba := range block.LBA(w.disks[id-1].blocks) {
			err := t.Lookup(lba, 1, func(e densetree.Entry) bool {
				if e.Kind == densetree.Data {
					live[e.Extent]++
					orig[e.Extent] = uint32(e.Orig)
				}
				return true
			})
			errs = append(errs, err)
		}
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	type sums struct{ live, trapped, alive uint32 }
	want := map[block.SegmentID]sums{}
	for e, n := range live {
		s := want[e.Segment()]
		want[e.Segment()] = sums{s.live + n, s.trapped + orig[e] - n, s.alive + 1}
		if !v.usage.Alive(e) {
			return fmt.Errorf("extent %v is mapped, and dead in the table", e)
		}
	}
	for s := range v.usage.All() {
		got := sums{s.LiveBlocks, s.TrappedBlocks, s.Extents - s.DeadExtents}
		if got != want[s.ID] {
			return fmt.Errorf("segment %d: the table has %+v, the disks map %+v", s.ID, got, want[s.ID])
		}
		w.stats.trapped.Add(int64(got.trapped))
	}
	return nil
}

// fillBlocks writes blocks [lba, lba+n) of a disk.
func (r *rig) fillBlocks(d *vdisk.Disk, lba, n int) {
	r.t.Helper()
	r.write(d, int64(lba)*block.Size, bytes.Repeat([]byte{byte(lba + 1)}, n*block.Size))
}

// TestSpaceByKind follows one segment from all alive over trapped to dead, and finds the same after a
// crash, a checkpoint and the loss of the host.
func TestSpaceByKind(t *testing.T) {
	r := newRig(t, func(o *Options) { o.CheckpointCuts = 2 })
	d := r.disk("d", 1<<20)
	expect := func(when string, stored, live, trapped, segments, dead int) {
		t.Helper()
		want := SpaceStatus{
			StoredBytes: uint64(stored) * block.Size, LiveBytes: uint64(live) * block.Size, TrappedBytes: uint64(trapped) * block.Size,
			DeadBytes: uint64(stored-live-trapped) * block.Size, Segments: segments, DeadSegments: dead,
		}
		if got := r.pool.Status().Space; got != want {
			t.Errorf("%s:\ngot  %+v\nwant %+v", when, got, want)
		}
		if got := r.pool.usage.Dead(); len(got) != dead {
			t.Errorf("%s: dead are %v, want %d", when, got, dead)
		}
	}
	everywhere := func(when string, stored, live, trapped, segments, dead int) {
		t.Helper()
		expect(when, stored, live, trapped, segments, dead)
		r.abandon()
		r.open(false)
		expect(when+", after a crash", stored, live, trapped, segments, dead)
		r.abandon()
		r.newHost()
		r.open(true)
		expect(when+", on another host", stored, live, trapped, segments, dead)
		d = r.disk("d", 0)
	}
	expect("empty", 0, 0, 0, 0, 0)
	r.fillBlocks(d, 0, 32) // two extents of 16 blocks
	r.publish()
	everywhere("written", 32, 32, 0, 1, 0)
	r.fillBlocks(d, 4, 8)
	r.publish()
	everywhere("overwritten in part", 40, 32, 8, 2, 0)
	r.fillBlocks(d, 0, 16)
	r.publish()
	everywhere("one extent and all of the second segment overwritten", 56, 32, 0, 3, 1)
	if err := d.Write(context.Background(), []vdisk.Op{{Kind: vdisk.OpTrim, Off: 16 * block.Size, Len: 16 * block.Size}}, true); err != nil {
		t.Fatal(err)
	}
	r.publish()
	everywhere("the rest of the first trimmed, by a cut without data", 56, 16, 0, 4, 3)
}

// TestTableThatIsMissingOrDamagedIsCountedAnew takes the table away from a checkpoint in every way.
func TestTableThatIsMissingOrDamagedIsCountedAnew(t *testing.T) {
	r := newRig(t, nil)
	d := r.disk("d", 1<<20)
	for i := range 20 {
		r.fillBlocks(d, i*5, 12)
		if i%3 == 0 {
			r.publish()
		}
	}
	for range 3 {
		r.fillBlocks(d, 200, 16)
		r.publish()
	}
	p := r.pool
	want := p.usage.Snapshot()
	var blobs [][]byte
	refs := func(v extent.View) []runRef {
		blobs = slices.Collect(v.Blobs(50))
		out := make([]runRef, len(blobs))
		for i := range out {
			out[i].Off = int64(i)
		}
		return out
	}
	get := func(ref runRef) ([]byte, error) { return blobs[ref.Off], nil }
	distrusted := func() extent.View {
		u := extent.NewUsage()
		for b := range want.Blobs(usageBlobBytes) {
			if err := u.Load(b); err != nil {
				t.Fatal(err)
			}
		}
		for s := range want.All() {
			u.Distrust(s.ID)
		}
		return u.Snapshot()
	}
	other := extent.NewUsage()
	if err := other.Add(usageOf(sampleInfo(999), 0)); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name   string
		v      extent.View
		damage func()
		births bool // of all segments come through
	}{
		{"whole", want, func() {}, true},
		{"missing", extent.NewUsage().Snapshot(), func() {}, false},
		{"damaged", want, func() { blobs[1][40] ^= 1 }, false},
		{"of other segments", other.Snapshot(), func() {}, false},
		{"cut short", want, func() { blobs[len(blobs)-1] = blobs[0] }, false},
		{"contradicted", distrusted(), func() {}, true},
	} {
		rs := refs(tt.v)
		tt.damage()
		if err := p.decodeUsage(rs, get); err != nil {
			t.Errorf("%s: %v", tt.name, err)
		}
		got := p.usage.Snapshot()
		if rep := extent.Compare(got, want); len(rep.Leaks)+len(rep.Low) > 0 || got.Totals() != want.Totals() {
			t.Errorf("%s: %+v, %+v, want %+v", tt.name, rep, got.Totals(), want.Totals())
		}
		births := true
		for s := range got.All() {
			births = births && s.Birth != 0
		}
		if births != tt.births {
			t.Errorf("%s: all births are known: %v", tt.name, births)
		}
	}
	rs := refs(want)
	blobs[0][4]++
	if err := p.decodeUsage(rs, get); !errors.Is(err, writeback.ErrNewer) {
		t.Errorf("newer: %v", err)
	}

	// A map that names what is not stored: nothing may be deleted any more.
	for id := range p.segments {
		if u, _ := want.Segment(id); u.LiveBlocks > 0 {
			delete(p.segments, id)
			break
		}
	}
	if err := p.recountUsage(p.usage); err != nil {
		t.Fatal(err)
	}
	if len(want.Dead()) == 0 {
		t.Error("no segment was dead")
	}
	s := p.Status().Space
	if s.Error == "" || s.DeadSegments != 0 || s.DamagedSegments != len(p.segments) || len(p.usage.Dead()) > 0 {
		t.Errorf("space is %+v", s)
	}
	if _, err := p.CheckUsage(t.Context()); !errors.Is(err, extent.ErrDamaged) {
		t.Errorf("check: %v", err)
	}
}

// TestContradictionIsReported loses a block twice.
func TestContradictionIsReported(t *testing.T) {
	r := newRig(t, nil)
	r.fillBlocks(r.disk("d", 1<<20), 0, 16)
	r.publish()
	var id block.SegmentID
	for id = range r.pool.segments {
	}
	ls := []densetree.Loss{{Extent: block.NewExtentID(id, 0), Orig: 16, Blocks: 12}}
	r.pool.lost(ls)
	if s := r.pool.Status().Space; s.Error != "" || s.TrappedBytes != 12*block.Size {
		t.Fatalf("space is %+v", s)
	}
	r.pool.lost(ls)
	if s := r.pool.Status().Space; s.Error == "" || s.DamagedSegments != 1 || s.TrappedBytes != 12*block.Size {
		t.Errorf("space is %+v", s)
	}
	if rep, err := r.pool.CheckUsage(t.Context()); err != nil || len(rep.Low) != 1 {
		t.Errorf("%+v, %v", rep, err)
	}
}
