package pool

import (
	"cmp"
	"fmt"
	"slices"

	"graindisk/block"
	"graindisk/grains/segment"
)

// link names a record by its cut and its checksum, as the next record does. A record that was packed again under
// another number is the same one.
type link struct {
	cut uint64
	crc uint32
}

// cutHistory is all cut records that were found.
type cutHistory struct {
	segs map[segKey]*foundSegment
	cuts []*rebuildCut // by cut, epoch, segment number
	by   map[link][]*rebuildCut
}

func newHistory(s *survey) *cutHistory {
	h := &cutHistory{segs: s.segs, by: map[link][]*rebuildCut{}}
	for _, f := range s.segs {
		if f.cut != nil {
			h.cuts = append(h.cuts, f.cut)
		}
	}
	slices.SortFunc(h.cuts, func(a, b *rebuildCut) int {
		return cmp.Or(cmp.Compare(a.cut, b.cut), cmp.Compare(a.epoch, b.epoch), cmp.Compare(a.holder.id, b.holder.id))
	})
	for _, c := range h.cuts {
		l := link{c.cut, c.crc}
		h.by[l] = append(h.by[l], c)
	}
	return h
}

// choose gives the chain of cuts to restore, oldest first, without those that are gone: up to the cut want, or up
// to the newest one that is complete.
func (h *cutHistory) choose(want uint64) (chain []*rebuildCut, notes []string, err error) {
	if len(h.cuts) == 0 {
		return nil, nil, fmt.Errorf("%w: %d segments, and no cut record: no cut was ever completed, or all records are lost", ErrNoPool, len(h.segs))
	}
	top := slices.MaxFunc(h.cuts, func(a, b *rebuildCut) int {
		return cmp.Or(cmp.Compare(a.epoch, b.epoch), cmp.Compare(a.cut, b.cut), cmp.Compare(a.holder.id, b.holder.id))
	})
	top = h.pick(link{top.cut, top.crc})
	tip, what := top, ""
	if want > 0 {
		if tip = h.upTo(want); tip == nil || tip.cut != want {
			return nil, nil, fmt.Errorf("cut %d has no record that can be read; the newest is %v", want, top)
		}
	} else if why, ok := h.whole(top, nil); !ok {
		notes = append(notes, fmt.Sprintf("%v is not taken, since it is incomplete: %s", top, why))
		if top.prev == 0 {
			return nil, nil, fmt.Errorf("%w: %s", ErrNoPool, notes[0])
		}
		if tip = h.pick(link{top.prev, top.prevCRC}); tip == nil {
			what = fmt.Sprintf("%s; and the record of cut %d, which was committed before it, is lost", notes[0], top.prev)
		}
	}
	lost := top.cut
	if tip != nil {
		chain, lost, what = h.walk(tip)
		if lost == 0 {
			slices.Reverse(chain)
			return chain, notes, nil
		}
	}
	err = fmt.Errorf("cut %d: %s: %w", lost, what, segment.ErrDamaged)
	if tip != nil {
		err = fmt.Errorf("%v needs what is lost: %w", tip, err)
	}
	if whole := h.newestWhole(lost); whole != nil {
		return nil, notes, fmt.Errorf("%w; the newest before that of which everything is there is %v: to restore that, and nothing that was written later, give --cut %d", err, whole, whole.cut)
	}
	return nil, notes, fmt.Errorf("%w; no older cut is whole either", err)
}

// pick is the record that a link names; of several copies one whose segment is complete, and the newest. It is nil
// if there is none.
func (h *cutHistory) pick(l link) *rebuildCut {
	var best *rebuildCut
	for _, c := range h.by[l] {
		_, complete := c.holder.complete()
		if best == nil || complete {
			best = c
		}
	}
	return best
}

// upTo is the newest record of the highest cut that is not above cut; nil if there is none.
func (h *cutHistory) upTo(cut uint64) *rebuildCut {
	i, _ := slices.BinarySearchFunc(h.cuts, cut, func(c *rebuildCut, cut uint64) int {
		if c.cut <= cut {
			return -1
		}
		return 1
	})
	if i == 0 {
		return nil
	}
	return h.pick(link{h.cuts[i-1].cut, h.cuts[i-1].crc})
}

// whole tells whether every segment of a cut that is not gone can be read; if not, why.
func (h *cutHistory) whole(c *rebuildCut, gone *segment.Gone) (why string, ok bool) {
	for _, k := range append(c.segs[:len(c.segs):len(c.segs)], c.holder.segKey) {
		if gone.Segment(k.id) {
			continue
		}
		if why, ok := h.segs[k].complete(); !ok {
			return fmt.Sprintf("segment %d %s", k.id, why), false
		}
	}
	return "", true
}

// walk follows the chain from tip to the beginning and gives it, newest cut first. If anything on it is lost, lost
// is the newest cut of which something is, and what says what.
func (h *cutHistory) walk(tip *rebuildCut) (chain []*rebuildCut, lost uint64, what string) {
	var gone *segment.Gone // the newest: it rules
	for c := tip; ; {
		if why, ok := h.whole(c, gone); !ok {
			return nil, c.cut, why
		}
		chain = append(chain, c)
		if gone == nil {
			gone = c.gone
		}
		next := link{c.prev, c.prevCRC}
		if gap, ok := gone.Cut(next.cut); ok {
			next = link{gap.First - 1, gap.PrevCRC}
		}
		if next.cut == 0 {
			return chain, 0, ""
		}
		if c = h.pick(next); c == nil {
			return nil, next.cut, fmt.Sprintf("its record (checksum %08x) is lost", next.crc)
		}
	}
}

// newestWhole is the newest cut below lost whose whole chain is there; nil if there is none. What no Gone down from
// a cut excuses, no older one does: so whatever is found lost, only cuts below it are left to look at.
func (h *cutHistory) newestWhole(lost uint64) *rebuildCut {
	for lost > 1 {
		c := h.upTo(lost - 1)
		if c == nil {
			return nil
		}
		var ok uint64
		if _, ok, _ = h.walk(c); ok == 0 {
			return c
		}
		lost = min(ok, c.cut)
	}
	return nil
}

// needed gives the segments of a chain, oldest cut first and each cut's in order, the one with its record last.
func (h *cutHistory) needed(chain []*rebuildCut, each func(c *rebuildCut, segs []*foundSegment)) {
	gone := make([]*segment.Gone, len(chain)) // that rules below each cut
	var newest *segment.Gone
	for i := len(chain) - 1; i >= 0; i-- {
		gone[i] = newest
		if newest == nil {
			newest = chain[i].gone
		}
	}
	for i, c := range chain {
		var segs []*foundSegment
		for _, k := range append(c.segs[:len(c.segs):len(c.segs)], c.holder.segKey) {
			if !gone[i].Segment(k.id) {
				segs = append(segs, h.segs[k])
			}
		}
		each(c, segs)
	}
}

// place numbers the targets and gives all needed segments theirs: where their shards were found. A target
// keeps the number that most of its shards were planned for, if no other has more of that; the rest get new ones.
func (s *survey) place(segs []*foundSegment) []RebuiltTarget {
	type vote struct {
		target int
		id     block.TargetID
		n      int
	}
	count := map[vote]int{}
	next := block.TargetID(1)
	for _, f := range segs {
		for _, sh := range f.shards {
			if int(sh.shard) < len(f.trailer.Info.Targets) && f.trailer.Info.Targets[sh.shard] != 0 {
				count[vote{target: sh.target, id: f.trailer.Info.Targets[sh.shard]}]++
			}
		}
		for _, id := range f.trailer.Info.Targets {
			next = max(next, id+1)
		}
	}
	var votes []vote
	for v, n := range count {
		votes = append(votes, vote{v.target, v.id, n})
	}
	slices.SortFunc(votes, func(a, b vote) int {
		return cmp.Or(cmp.Compare(b.n, a.n), cmp.Compare(a.target, b.target), cmp.Compare(a.id, b.id))
	})
	ts := make([]RebuiltTarget, len(s.stores))
	taken := map[block.TargetID]bool{}
	for _, v := range votes {
		if ts[v.target].ID == 0 && !taken[v.id] {
			ts[v.target].ID, taken[v.id] = uint16(v.id), true
		}
	}
	for i := range ts {
		ts[i].Name = s.names[i]
		if ts[i].ID == 0 {
			ts[i].ID, ts[i].New = uint16(next), true
			next++
		}
	}
	for _, f := range segs {
		f.info = f.trailer.Info
		f.info.Targets = make([]block.TargetID, f.info.Shards())
		for _, sh := range f.shards {
			id := block.TargetID(ts[sh.target].ID)
			if int(sh.shard) >= len(f.info.Targets) || sh.size != f.info.ObjectBytes() {
				continue
			}
			if f.info.Targets[sh.shard] == 0 || id == f.trailer.Info.Targets[sh.shard] {
				f.info.Targets[sh.shard] = id
			}
		}
		for i := range ts {
			if slices.Contains(f.info.Targets, block.TargetID(ts[i].ID)) {
				ts[i].Shards++
			}
		}
	}
	for i := range ts {
		ts[i].Witness = s.witness[i] && ts[i].Shards == 0
	}
	return ts
}
