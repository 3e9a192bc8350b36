package segment

import (
	"encoding/binary"
	"fmt"
	"sort"

	"graindisk/block"
)

// cutFlagGone says that a cut record ends with a Gone. Releases before it refuse such a record as newer.
const cutFlagGone = 1

// Gone is what the pool no longer needs of the cuts below the one whose record holds it: to rebuild the
// maps as of that cut or a later one, whoever reads the shards passes over all it names, whether it is
// still stored or not, and nothing else may be missing. Of the records along a chain the newest that has a Gone
// rules; it names all that those before it name.
//
// Cut numbers have no holes but these, so Cuts tells a record that was dropped from one that was lost, and
// keeps the chain of checksums whole across the hole. Segment numbers have holes anyway (orphans, numbers
// drawn in vain), so Segments may name those too: usually it is all numbers but those in use.
type Gone struct {
	Cuts     []CutGap     `json:"cuts,omitempty"`     // ascending, with at least one cut between two
	Segments []SegmentRun `json:"segments,omitempty"` // ascending, with at least one number between two
}

// CutGap is cuts in a row whose records are not needed, nor any segment that they name.
type CutGap struct {
	First   uint64 `json:"first"`    // from 1
	Last    uint64 `json:"last"`     // at least First
	PrevCRC uint32 `json:"prev_crc"` // that First's record has: CRC of the record of cut First-1
}

// SegmentRun is the segment numbers from First to Last. Those that belong to the cut of the record or to
// a newer one are not meant.
type SegmentRun struct {
	First block.SegmentID `json:"first"` // from 1
	Last  block.SegmentID `json:"last"`  // at least First
}

const (
	cutGapBytesMin     = 6 // left out, cuts, CRC
	segmentRunBytesMin = 2 // left out, numbers
)

// Cut finds the gap in which a cut's record is; ok is false if the record is still needed. A nil Gone has none.
func (g *Gone) Cut(cut uint64) (gap CutGap, ok bool) {
	if g == nil {
		return CutGap{}, false
	}
	i := sort.Search(len(g.Cuts), func(i int) bool { return g.Cuts[i].Last >= cut })
	if i == len(g.Cuts) || g.Cuts[i].First > cut {
		return CutGap{}, false
	}
	return g.Cuts[i], true
}

// Segment tells whether a segment of an older cut is not needed any more. A nil Gone names none.
func (g *Gone) Segment(id block.SegmentID) bool {
	if g == nil {
		return false
	}
	i := sort.Search(len(g.Segments), func(i int) bool { return g.Segments[i].Last >= id })
	return i < len(g.Segments) && g.Segments[i].First <= id
}

// AddCut takes in one more cut, whose record has prevCRC as the checksum of the one before, and joins the gaps
// that meet. It does nothing if the cut is in a gap already.
func (g *Gone) AddCut(cut uint64, prevCRC uint32) {
	i := sort.Search(len(g.Cuts), func(i int) bool { return g.Cuts[i].Last >= cut })
	if i < len(g.Cuts) && g.Cuts[i].First <= cut {
		return
	}
	gap := CutGap{First: cut, Last: cut, PrevCRC: prevCRC}
	from, to := i, i
	if i > 0 && g.Cuts[i-1].Last+1 == cut {
		from = i - 1
		gap.First, gap.PrevCRC = g.Cuts[from].First, g.Cuts[from].PrevCRC
	}
	if i < len(g.Cuts) && g.Cuts[i].First == cut+1 {
		to = i + 1
		gap.Last = g.Cuts[i].Last
	}
	g.Cuts = append(g.Cuts[:from:from], append([]CutGap{gap}, g.Cuts[to:]...)...)
}

// append adds the encoding to b: what lies between two gaps or runs, from 1 on, and how long each is.
func (g *Gone) append(b []byte) []byte {
	b = binary.AppendUvarint(b, uint64(len(g.Cuts)))
	next := uint64(1)
	for _, c := range g.Cuts {
		b = binary.AppendUvarint(b, c.First-next)
		b = binary.AppendUvarint(b, c.Last-c.First+1)
		b = le.AppendUint32(b, c.PrevCRC)
		next = c.Last + 1
	}
	b = binary.AppendUvarint(b, uint64(len(g.Segments)))
	next = 1
	for _, s := range g.Segments {
		b = binary.AppendUvarint(b, uint64(s.First)-next)
		b = binary.AppendUvarint(b, uint64(s.Last-s.First)+1)
		next = uint64(s.Last) + 1
	}
	return b
}

// gone reads the inverse of append.
func (c *cursor) gone() *Gone {
	g := &Gone{}
	next := uint64(1)
	for range c.count(1<<30, cutGapBytesMin) {
		gap := CutGap{First: next + c.uvarint(1<<63-next)}
		gap.Last = gap.First + c.positive(1<<63-gap.First) - 1
		gap.PrevCRC = c.u32()
		if c.err != nil {
			return nil
		}
		g.Cuts = append(g.Cuts, gap)
		next = gap.Last + 1
	}
	next = 1
	for range c.count(1<<30, segmentRunBytesMin) {
		first := next + c.uvarint(uint64(block.SegmentMax)-next)
		last := first + c.positive(uint64(block.SegmentMax)-first) - 1
		if c.err != nil {
			return nil
		}
		g.Segments = append(g.Segments, SegmentRun{block.SegmentID(first), block.SegmentID(last)})
		next = last + 1
	}
	return g
}

// validate checks what append relies on, for the record of a cut.
func (g *Gone) validate(cut uint64) error {
	if len(g.Cuts) == 0 && len(g.Segments) == 0 {
		return fmt.Errorf("cut record: what is gone is nothing")
	}
	var end uint64
	for i, c := range g.Cuts {
		if c.First == 0 || c.Last < c.First || c.Last >= cut || i > 0 && c.First <= end+1 || c.First == 1 && c.PrevCRC != 0 {
			return fmt.Errorf("cut record %d: cuts %d to %d gone, after %d", cut, c.First, c.Last, end)
		}
		end = c.Last
	}
	end = 0
	for i, s := range g.Segments {
		if s.First == 0 || s.Last < s.First || s.Last >= block.SegmentMax || i > 0 && uint64(s.First) <= end+1 {
			return fmt.Errorf("cut record %d: segments %d to %d gone, after %d", cut, s.First, s.Last, end)
		}
		end = uint64(s.Last)
	}
	return nil
}
