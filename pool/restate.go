package pool

import (
	"cmp"
	"context"
	"errors"
	"maps"
	"slices"

	"graindisk/backend"
	"graindisk/block"
	"graindisk/grains/segment"
	"graindisk/vdisk/densetree"
)

// Shards alone must always give the maps. The data of a dead segment are hidden by newer data, which are stored,
// or by an unmap, which is in the record of a cut. So a segment without a record may go when it is dead; one with a
// record may go when all segments of its cut are dead, and then what its record says is said again, as far as it
// still holds, by the record whose Gone names the cut. What still holds is known exactly: while a cut is
// published the maps are those of the cut before, and in a record unmaps come before the extents of its cut.

// restatement is what the next record is to say beside its own cut.
type restatement struct {
	segments map[block.SegmentID]bool // that are gone
	cuts     []goneCut                // whose records are; ascending
	rows     map[block.DiskID]bool    // that those told of
	unmaps   map[block.DiskID][]segment.Run
}

type goneCut struct {
	cut     uint64
	prevCRC uint32
}

// dying are the segments that can go; nil if they are not worth a cut. The caller holds own.
func (p *Pool) dying(ctx context.Context) *restatement {
	w := &restatement{segments: map[block.SegmentID]bool{}, rows: map[block.DiskID]bool{}, unmaps: map[block.DiskID][]segment.Run{}}
	var last []segment.Info // with a record
	dead := map[block.SegmentID]bool{}
	worth := false
	p.mu.Lock()
	for _, id := range p.usage.Dead() {
		info := p.segments[id]
		dead[id] = true
		switch {
		case p.pub.gone.Segment(id):
		case info.CutBytes > 0:
			last = append(last, info)
		default:
			w.segments[id], worth = true, true
		}
	}
	p.mu.Unlock()
	runs, unread := 0, 0
	for _, info := range last {
		if unread == restateUnread || len(w.cuts) == restateCutsMax || runs > restateRunsMax || ctx.Err() != nil {
			break
		}
		rec, _, err := segment.ReadCut(ctx, p.segmentStore, info)
		if err != nil {
			p.o.Log.Warn("record of a dead segment not read, it stays", "pool", p.o.Name, "segment", uint64(info.ID), "err", err)
			if !final(err) && !errors.Is(err, backend.ErrNotFound) {
				unread++
			}
			continue
		}
		if rec.Cut == p.pub.goneCut || !p.allDead(rec, dead) {
			continue
		}
		w.add(rec, info)
		runs = w.runs()
		worth = worth || info.Extents > 0 || len(w.cuts) >= bookkeepingCuts
	}
	if !worth {
		return nil
	}
	slices.SortFunc(w.cuts, func(a, b goneCut) int { return cmp.Compare(a.cut, b.cut) })
	return w
}

// allDead tells whether nothing of a cut is in use any more.
func (p *Pool) allDead(rec *segment.CutRecord, dead map[block.SegmentID]bool) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return !slices.ContainsFunc(rec.Segments, func(i segment.Info) bool {
		_, known := p.segments[i.ID]
		return known && !dead[i.ID]
	})
}

func (w *restatement) add(rec *segment.CutRecord, last segment.Info) {
	w.segments[last.ID] = true
	w.cuts = append(w.cuts, goneCut{cut: rec.Cut, prevCRC: rec.PrevCRC})
	for _, ch := range rec.Disks {
		if ch.Meta != nil {
			w.rows[ch.Disk] = true
		}
		w.unmaps[ch.Disk] = append(w.unmaps[ch.Disk], ch.Unmaps...)
	}
}

func (w *restatement) runs() (n int) {
	for _, us := range w.unmaps {
		n += len(us)
	}
	return n
}

// restate has a record say what is pending, of segments below limit: the lowest number of its own cut. Numbers from
// there on may belong to cuts that are on their way. The caller holds own, and the maps are those of the cut before.
func (p *Pool) restate(rec *segment.CutRecord, limit block.SegmentID) {
	w := p.pub.pending
	p.pub.pending = nil
	if w == nil {
		return
	}
	for id := range w.segments { // of a cut all must be named, or none
		if id >= limit {
			return
		}
	}
	changes := map[block.DiskID]segment.DiskChange{}
	for _, ch := range rec.Disks {
		changes[ch.Disk] = ch
	}
	for id := range w.rows {
		ch := changes[id]
		if row, ok := p.pub.disks[id]; ok && ch.Meta == nil {
			ch.Disk, ch.Meta = id, &row
			changes[id] = ch
		}
	}
	for _, id := range slices.Sorted(maps.Keys(w.unmaps)) { // each reads its map
		us := w.unmaps[id]
		holes, err := p.stillHoles(id, us)
		if err != nil {
			p.o.Log.Warn("map not read, what is dead stays", "pool", p.o.Name, "err", err)
			return
		}
		if len(holes) > 0 {
			ch := changes[id]
			ch.Disk, ch.Unmaps = id, union(append(holes, ch.Unmaps...))
			changes[id] = ch
		}
	}
	gone := &segment.Gone{Segments: p.goneSegments(w.segments, limit)}
	if p.pub.gone != nil {
		gone.Cuts = slices.Clone(p.pub.gone.Cuts)
	}
	for _, c := range w.cuts {
		gone.AddCut(c.cut, c.prevCRC)
	}
	if len(gone.Cuts)+len(gone.Segments) == 0 {
		return
	}
	rec.Gone, rec.Disks = gone, nil
	for _, id := range slices.Sorted(maps.Keys(changes)) {
		rec.Disks = append(rec.Disks, changes[id])
	}
}

// stillHoles is what of us the map has nothing for.
func (p *Pool) stillHoles(id block.DiskID, us []segment.Run) (holes []segment.Run, err error) {
	row, t := p.pub.disks[id], p.tree(id)
	if row.Flags&segment.DiskDropped != 0 || t == nil {
		return nil, nil // its row says it
	}
	for _, u := range union(us) {
		err := t.Lookup(u.LBA, u.Blocks, func(e densetree.Entry) bool {
			if e.Kind == densetree.Hole || e.Kind == densetree.None {
				holes = append(holes, segment.Run{LBA: e.LBA, Blocks: e.Blocks})
			}
			return true
		})
		if err != nil {
			return nil, err
		}
	}
	return holes, nil
}

// union sorts runs and joins those that meet.
func union(runs []segment.Run) []segment.Run {
	runs = slices.Clone(runs)
	slices.SortFunc(runs, func(a, b segment.Run) int { return cmp.Compare(a.LBA, b.LBA) })
	out := runs[:0]
	for _, r := range runs {
		if n := len(out); n > 0 && r.LBA <= out[n-1].LBA+block.LBA(out[n-1].Blocks) {
			end := max(out[n-1].LBA+block.LBA(out[n-1].Blocks), r.LBA+block.LBA(r.Blocks))
			out[n-1].Blocks = uint64(end - out[n-1].LBA)
			continue
		}
		out = append(out, r)
	}
	return out
}

// goneSegments are all numbers below limit but those in use.
func (p *Pool) goneSegments(dying map[block.SegmentID]bool, limit block.SegmentID) (runs []segment.SegmentRun) {
	p.mu.Lock()
	used := make([]block.SegmentID, 0, len(p.segments))
	for id := range p.segments {
		if id < limit && !dying[id] && !p.pub.gone.Segment(id) {
			used = append(used, id)
		}
	}
	p.mu.Unlock()
	slices.Sort(used)
	next := block.SegmentID(1)
	for _, id := range append(used, limit) {
		if id > next {
			runs = append(runs, segment.SegmentRun{First: next, Last: id - 1})
		}
		next = id + 1
	}
	return runs
}
