package pool

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"maps"
	"math"
	"slices"

	"graindisk/block"
	"graindisk/grains/extent"
	"graindisk/grains/segment"
	"graindisk/vdisk"
	"graindisk/vdisk/densetree"
	"graindisk/writeback"
)

// The usage table follows the trees: a cut adds its segments, wholly alive, before its extents enter the
// trees, and from there on every loss a tree reports is counted out. Checkpoints hold table and trees as
// of one moment, and replaying the publications above one applies the same cuts to both; so the table
// always equals a recount of what the trees map, hidden entries included. One without a table (an older
// release wrote it) is recounted once, at open.

// usageBlobBytes is how much of the table makes one blob in a checkpoint.
const usageBlobBytes = 1 << 20

// lost counts out what a tree has lost, and has the cache forget the extents that died of it. It runs with
// p.maps held for reading and touches memory only.
func (p *Pool) lost(ls []densetree.Loss) {
	out := make([]extent.Loss, len(ls))
	for i, l := range ls {
		out[i] = extent.Loss(l)
	}
	dead, err := p.usage.Lose(out)
	p.usageFailed(err)
	p.uncache(dead)
}

// uncache drops what the tier and RAM hold of extents that nothing maps any more, and the indexes of
// segments of which nothing is left. Who looked one up in a map before it died may still read it, and would
// fill it in again: tierExtents sees to that.
func (p *Pool) uncache(dead []extent.Loss) {
	if p.cache == nil { // Rebuild has none
		return
	}
	var last block.SegmentID
	for _, l := range dead {
		p.cache.Forget(l.Extent, int(l.Orig))
	}
	for _, l := range dead {
		if seg := l.Extent.Segment(); seg != last && p.segmentDead(seg) {
			p.cache.Forget(block.NewExtentID(seg, indexSlot), 0)
			last = seg
		}
	}
}

// segmentDead tells whether no map has anything of a segment, which is for ever.
func (p *Pool) segmentDead(seg block.SegmentID) bool {
	s, ok := p.usage.Segment(seg)
	return ok && !s.Damaged && s.DeadExtents == s.Extents
}

// sweepCache has the cache forget, once its saved index is loaded, what died since that was written. The
// maps are as they were opened or newer. Segments newer than all of theirs are left alone: their extents are
// cached just before the maps learn of them.
func (p *Pool) sweepCache() {
	limit := block.SegmentID(0)
	for seg := range p.segments {
		limit = max(limit, seg+1)
	}
	p.cache.Sweep(func(id block.ExtentID) bool {
		switch seg := id.Segment(); {
		case seg >= limit:
			return false
		case id.Slot() == indexSlot:
			_, known := p.usage.Segment(seg)
			return !known || p.segmentDead(seg)
		}
		return !p.usage.Alive(id)
	})
}

// addUsage takes the segments of a cut into the table.
func (p *Pool) addUsage(infos []segment.Info, birth int64) {
	p.lookAfter(infos)
	for _, info := range infos {
		p.usageFailed(p.usage.Add(usageOf(info, birth)))
	}
}

// usageFailed notes that the table contradicts the maps. Serving goes on: the segments concerned are
// marked, and never deleted or cleaned until they are counted anew.
func (p *Pool) usageFailed(err error) {
	if err == nil {
		return
	}
	p.o.Log.Error("extent counts contradict the maps", "pool", p.o.Name, "err", err)
	p.usageErr.CompareAndSwap(nil, &gate{err})
}

func usageOf(info segment.Info, birth int64) extent.Segment {
	return extent.Segment{
		ID: info.ID, Epoch: info.Epoch, K: info.K, M: info.M, Targets: info.Targets, Birth: birth,
		Extents: info.Extents, Blocks: uint32(min(info.PayloadBytes/block.Size, math.MaxUint32)),
	}
}

// A mapsView is all published maps, segments and the usage table of one moment, between two cuts.
type mapsView struct {
	trees    map[block.DiskID]*densetree.Snapshot
	segments []segment.Info
	usage    extent.View
}

// mapsNow takes the view, to be released. The caller is the one who applies cuts, or holds mapsMu.
func (p *Pool) mapsNow() mapsView {
	v := mapsView{trees: map[block.DiskID]*densetree.Snapshot{}}
	p.mu.Lock()
	for _, info := range p.segments {
		v.segments = append(v.segments, info)
	}
	p.mu.Unlock()
	p.maps.Lock()
	defer p.maps.Unlock()
	for _, id := range slices.Sorted(maps.Keys(p.pub.disks)) {
		v.trees[id] = p.tree(id).Snapshot()
	}
	v.usage = p.usage.Snapshot()
	return v
}

func (v mapsView) release() {
	for _, id := range v.disks() {
		v.trees[id].Release()
	}
}

// disks are those with a map, in order.
func (v mapsView) disks() []block.DiskID { return slices.Sorted(maps.Keys(v.trees)) }

// runs are those of all trees, in the order of disks.
func (v mapsView) runs() (list []*densetree.Run) {
	for _, id := range v.disks() {
		list = append(list, v.trees[id].Runs()...)
	}
	return list
}

// mapped walks all that the trees map; err tells afterwards whether all of it could be read.
func (v mapsView) mapped(err *error) iter.Seq[extent.Mapped] {
	return func(yield func(extent.Mapped) bool) {
		for _, r := range v.runs() {
			more := true
			*err = r.Each(func(e densetree.Entry) bool {
				if e.Kind == densetree.Data {
					more = yield(extent.Mapped{Extent: e.Extent, Off: e.Off, Blocks: uint16(e.Blocks), Orig: e.Orig})
				}
				return more
			})
			if *err != nil || !more {
				return
			}
		}
	}
}

// recount counts anew what the trees map.
func (v mapsView) recount(births extent.View) (*extent.Usage, error) {
	var unread error
	u, err := extent.Recount(v.stored(births), v.mapped(&unread))
	return u, errors.Join(unread, err)
}

// stored describes the segments to a recount; only a table knows their births.
func (v mapsView) stored(births extent.View) iter.Seq[extent.Segment] {
	return func(yield func(extent.Segment) bool) {
		for _, info := range v.segments {
			s, _ := births.Segment(info.ID)
			if !yield(usageOf(info, s.Birth)) {
				return
			}
		}
	}
}

// CheckUsage compares the usage table with a recount of what the trees map. It fails with
// extent.ErrDamaged if they map what is not stored, with vdisk.ErrClosed if the pool is closed. Maps that are not here are
// fetched first: until ctx ends, and for farRecount at most.
func (p *Pool) CheckUsage(ctx context.Context) (extent.Report, error) {
	p.mapsMu.Lock()
	if p.closed {
		p.mapsMu.Unlock()
		return extent.Report{}, fmt.Errorf("pool %s: %w", p.o.Name, vdisk.ErrClosed)
	}
	v := p.mapsNow()
	p.mapsMu.Unlock()
	defer v.release()
	ctx, cancel := context.WithTimeout(ctx, farRecount)
	defer cancel()
	if err := p.needRuns(ctx, v.runs()); err != nil {
		return extent.Report{}, err
	}
	var u *extent.Usage
	err := p.mending(ctx, func() (err error) {
		u, err = v.recount(v.usage)
		return err
	})
	if err != nil {
		return extent.Report{}, err
	}
	return extent.Compare(v.usage, u.Snapshot()), nil
}

// encodeUsage stores a table blob by blob and returns where they are.
func encodeUsage(v extent.View, put func([]byte) (runRef, error)) ([]runRef, error) {
	var refs []runRef
	for b := range v.Blobs(usageBlobBytes) {
		ref, err := put(b)
		if err != nil {
			return nil, err
		}
		refs = append(refs, ref)
	}
	return refs, nil
}

// decodeUsage loads the table of a snapshot whose trees and segments are loaded. A table that is not
// there, that is damaged, or in which a contradiction was found, is counted anew.
func (p *Pool) decodeUsage(refs []runRef, get func(runRef) ([]byte, error)) error {
	u := extent.NewUsage()
	for _, ref := range refs {
		b, err := get(ref)
		if err != nil {
			return err
		}
		err = u.Load(b)
		if errors.Is(err, extent.ErrNewer) {
			return fmt.Errorf("usage table: %w: %w", writeback.ErrNewer, err)
		}
		if err != nil {
			p.o.Log.Error("usage table cannot be read, counting anew", "pool", p.o.Name, "err", err)
			return p.recountUsage(u)
		}
	}
	if err := p.fitsUsage(u); err != nil {
		if len(refs) > 0 {
			p.o.Log.Error("usage table does not fit, counting anew", "pool", p.o.Name, "err", err)
		}
		return p.recountUsage(u)
	}
	p.usage = u
	return nil
}

// fitsUsage checks that a table has the segments that the pool has, and can be trusted.
func (p *Pool) fitsUsage(u *extent.Usage) error {
	for _, info := range p.segments {
		s, ok := u.Segment(info.ID)
		if !ok || s.Epoch != info.Epoch || s.K != info.K || s.M != info.M || s.Extents != info.Extents {
			return fmt.Errorf("segment %d: %w", info.ID, extent.ErrDamaged)
		}
	}
	if t := u.Totals(); t.Segments != len(p.segments) || t.Damaged > 0 {
		return fmt.Errorf("%d segments, %d of them damaged, the pool has %d: %w", t.Segments, t.Damaged, len(p.segments), extent.ErrDamaged)
	}
	return nil
}

// recountUsage replaces the table by a recount that keeps the births of was. If the maps contradict the
// segments, all segments count as alive and as damaged, so that nothing is deleted.
func (p *Pool) recountUsage(was *extent.Usage) error {
	v, births := p.mapsNow(), was.Snapshot()
	defer v.release()
	ctx, cancel := context.WithTimeout(context.Background(), farRecount)
	defer cancel()
	var u *extent.Usage
	err := p.needRuns(ctx, v.runs())
	if err == nil {
		u, err = v.recount(births)
	}
	if err == nil {
		p.usage = u
		return nil
	}
	p.usageFailed(err)
	p.usage = extent.NewUsage()
	for s := range v.stored(births) {
		if err := p.usage.Add(s); err != nil {
			return fmt.Errorf("usage table: %w: %w", writeback.ErrDamaged, err)
		}
		p.usage.Distrust(s.ID)
	}
	return nil
}

// SpaceStatus is what the targets hold, by kind, parity and indexes aside: stored is live, trapped and
// dead together. Live bytes are mapped, trapped ones are not but share an extent with mapped ones, and
// the rest is dead: whole extents that cleaning gains back.
type SpaceStatus struct {
	StoredBytes     uint64 `json:"stored_bytes"`
	LiveBytes       uint64 `json:"live_bytes"`
	TrappedBytes    uint64 `json:"trapped_bytes"`
	DeadBytes       uint64 `json:"dead_bytes"`
	Segments        int    `json:"segments"`
	DeadSegments    int    `json:"dead_segments"`    // with nothing alive in them
	DamagedSegments int    `json:"damaged_segments"` // with counts that contradicted the maps
	// Doomed are dead segments that no map knows any more: they are deleted from the targets once no checkpoint
	// has named them for the grace period.
	DoomedSegments int    `json:"doomed_segments"`
	DoomedBytes    uint64 `json:"doomed_bytes"`
	// Reclaimed is what was deleted since the pool was opened.
	ReclaimedSegments int    `json:"reclaimed_segments"`
	ReclaimedBytes    uint64 `json:"reclaimed_bytes"`
	ReclaimedObjects  int    `json:"reclaimed_objects"` // of checkpoints
	Error             string `json:"error,omitempty"`   // the first contradiction found
}

func (p *Pool) spaceStatus() SpaceStatus {
	t := p.usage.Totals()
	s := SpaceStatus{
		StoredBytes: t.Blocks * block.Size, LiveBytes: t.LiveBlocks * block.Size, TrappedBytes: t.TrappedBlocks * block.Size,
		DeadBytes: (t.Blocks - t.LiveBlocks - t.TrappedBlocks) * block.Size,
		Segments:  t.Segments, DeadSegments: t.DeadSegments, DamagedSegments: t.Damaged,
	}
	p.mu.Lock()
	r := p.reclaimed
	p.mu.Unlock()
	s.DoomedSegments, s.DoomedBytes = r.doomedSegments, r.doomedBytes
	s.ReclaimedSegments, s.ReclaimedBytes, s.ReclaimedObjects = r.segments, r.bytes, r.objects
	if g := p.usageErr.Load(); g != nil {
		s.Error = g.err.Error()
	}
	return s
}
