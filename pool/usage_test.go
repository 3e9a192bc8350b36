package pool

import (
	"fmt"
	"maps"

	"graindisk/block"
	"graindisk/vdisk/densetree"
)

// checkUsage holds the usage table against a recount of what the trees map. With compact it merges all
// trees first, after which the table must equal what a flat walk over every block of every disk finds.
func (w *world) checkUsage(compact bool) error {
	w.stats.recounts.Add(1)
	rep, err := w.p.CheckUsage()
	if err == nil && len(rep.Leaks)+len(rep.Low) > 0 {
		err = fmt.Errorf("the usage table differs from a recount: leaks %v, low %v", rep.Leaks, rep.Low)
	}
	if g := w.p.usageErr.Load(); err == nil && g != nil {
		err = g.err
	}
	if err != nil || !compact {
		return err
	}
	w.stats.compacted.Add(1)
	return w.checkFlat()
}

func (w *world) checkFlat() error {
	p := w.p
	p.applying.Lock()
	p.mu.Lock()
	trees := maps.Clone(p.trees)
	p.mu.Unlock()
	for _, t := range trees {
		t.Compact()
	}
	v := p.viewMapsLocked()
	p.applying.Unlock()
	live, orig := map[block.ExtentID]uint32{}, map[block.ExtentID]uint32{}
	for id, t := range v.trees {
		for lba := range block.LBA(w.disks[id-1].blocks) {
			t.Lookup(lba, 1, func(e densetree.Entry) bool {
				if e.Kind == densetree.Data {
					live[e.Extent]++
					orig[e.Extent] = uint32(e.Orig)
				}
				return true
			})
		}
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
