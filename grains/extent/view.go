package extent

import (
	"cmp"
	"iter"
	"slices"

	"graindisk/block"
)

func (v *View) usage(r *record) SegmentUsage {
	k := v.kinds[r.kind]
	return SegmentUsage{
		Segment: Segment{
			ID: r.id, Epoch: r.epoch, K: k.k, M: k.m, Targets: slices.Clone(k.targets), Birth: r.birth,
			Extents: uint32(r.extents), Blocks: r.blocks,
		},
		LiveBlocks: r.live, TrappedBlocks: r.trapped, DeadExtents: uint32(r.dead),
		Exceptions: r.state&stateExceptions != 0, Condemned: r.state&stateCondemned != 0, Damaged: r.state&stateDamaged != 0,
	}
}

// Segment is the row of one segment.
func (v View) Segment(id block.SegmentID) (SegmentUsage, bool) {
	r := v.find(id)
	if r == nil {
		return SegmentUsage{}, false
	}
	return v.usage(r), true
}

// Alive tells whether some block of the extent stored in a place is mapped.
func (v View) Alive(place block.ExtentID) bool {
	r := v.find(place.Segment())
	return r != nil && r.alive(place.Slot())
}

// All walks the rows, segments ascending.
func (v View) All() iter.Seq[SegmentUsage] {
	return func(yield func(SegmentUsage) bool) {
		v.each(func(r *record) bool { return yield(v.usage(r)) })
	}
}

// Totals sums up the table.
func (v View) Totals() Totals { return v.sum }

// Dead lists the segments with nothing alive in them, ascending. Damaged rows are not among them.
func (v View) Dead() []block.SegmentID {
	ids := make([]block.SegmentID, 0, v.sum.DeadSegments)
	v.each(func(r *record) bool {
		if r.isDead() {
			ids = append(ids, r.id)
		}
		return true
	})
	return ids
}

// Candidate is a segment that cleaning would gain space from.
type Candidate struct {
	Segment block.SegmentID
	Used    float64 // live share of its blocks, in (0, 1); trapped ones are not live
	Score   float64 // (1-Used) * age / (1+Used), age in seconds, at least 1
}

// Candidates lists up to n segments that are neither dead nor wholly alive, the best victim first; now
// is seconds since 1970. Condemned and damaged segments are not among them.
func (v View) Candidates(now int64, n int) []Candidate {
	var cs []Candidate
	better := func(a, b Candidate) int {
		return cmp.Or(cmp.Compare(b.Score, a.Score), cmp.Compare(a.Segment, b.Segment))
	}
	v.each(func(r *record) bool {
		if r.state&(stateCondemned|stateDamaged) != 0 || r.dead == r.extents || r.live == r.blocks {
			return true
		}
		u := float64(r.live) / float64(r.blocks)
		cs = append(cs, Candidate{r.id, u, (1 - u) * float64(max(now-r.birth, 1)) / (1 + u)})
		if len(cs) >= 2*n+chunkRows { // keeps the list short, at O(1) comparisons each
			slices.SortFunc(cs, better)
			cs = cs[:n]
		}
		return true
	})
	slices.SortFunc(cs, better)
	return cs[:min(n, len(cs))]
}
