package extent

import (
	"cmp"
	"errors"
	"fmt"
	"iter"
	"slices"

	"graindisk/block"
)

// Mapped is blocks of an extent that a tree entry maps. Those of a moved extent name its place.
type Mapped struct {
	Extent block.ExtentID
	Off    uint16 // first block of the extent
	Blocks uint16 // at least 1
	Orig   uint16 // blocks of the whole extent; Off+Blocks at most
}

// Recount makes the table anew from the segments that are stored and from all that maps them: hidden
// entries of lower levels included, which is what the trees have not reported lost yet. Blocks that are
// mapped twice count once. It needs a bit per extent and 16 bytes per entry that maps part of one.
//
// It fails with ErrDamaged if something maps what is not stored.
func Recount(segments iter.Seq[Segment], mapped iter.Seq[Mapped]) (*Usage, error) {
	u := NewUsage()
	for s := range segments {
		r := record{dead: uint16(s.Extents)}
		if err := u.add(s, r); err != nil {
			return nil, err
		}
	}
	var parts []Mapped
	var errs []error
	for m := range mapped {
		err := u.stored(m)
		switch {
		case err != nil && len(errs) < damagesMax:
			errs = append(errs, err)
		case err == nil && m.Off == 0 && m.Blocks == m.Orig:
			errs = appendError(errs, u.revive(m.Extent, m.Orig, m.Orig))
		case err == nil:
			parts = append(parts, m)
		}
	}
	slices.SortFunc(parts, func(a, b Mapped) int {
		return cmp.Or(cmp.Compare(a.Extent, b.Extent), cmp.Compare(a.Off, b.Off))
	})
	for len(parts) > 0 {
		n := 1
		for n < len(parts) && parts[n].Extent == parts[0].Extent {
			n++
		}
		left, err := union(parts[:n])
		if err == nil {
			err = u.revive(parts[0].Extent, parts[0].Orig, left)
		}
		errs = appendError(errs, err)
		parts = parts[n:]
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	return u, nil
}

func appendError(errs []error, err error) []error {
	if err == nil || len(errs) == damagesMax {
		return errs
	}
	return append(errs, err)
}

// stored checks that an entry maps blocks that can exist.
func (u *Usage) stored(m Mapped) error {
	r := u.v.find(m.Extent.Segment())
	if r == nil || m.Extent.Slot() >= int(r.extents) {
		return fmt.Errorf("usage: extent %v is mapped and not stored: %w", m.Extent, ErrDamaged)
	}
	if m.Blocks == 0 || uint32(m.Off)+uint32(m.Blocks) > uint32(m.Orig) {
		return fmt.Errorf("usage: blocks [%d,+%d) of extent %v are mapped, it has %d: %w", m.Off, m.Blocks, m.Extent, m.Orig, ErrDamaged)
	}
	return nil
}

// union is how many blocks of one extent its entries map, which are sorted by offset.
func union(ms []Mapped) (uint16, error) {
	var n, end uint32
	for _, m := range ms {
		if m.Orig != ms[0].Orig {
			return 0, fmt.Errorf("usage: extent %v is mapped with %d and with %d blocks: %w", m.Extent, m.Orig, ms[0].Orig, ErrDamaged)
		}
		if to := uint32(m.Off) + uint32(m.Blocks); to > end {
			n += to - max(uint32(m.Off), end)
			end = to
		}
	}
	return uint16(n), nil
}

// revive counts in an extent with left of its blocks mapped, unless it was before.
func (u *Usage) revive(id block.ExtentID, orig, left uint16) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	r := u.rowLocked(id.Segment())
	slot := id.Slot()
	if r.alive(slot) {
		return nil // wholly mapped elsewhere
	}
	was := *r
	d := u.detailLocked(r)
	if d.bits == nil {
		d.bits = make([]uint64, (int(r.extents)+63)/64)
	}
	d.bits[slot/64] |= 1 << (slot % 64)
	r.dead--
	r.live += uint32(left)
	if left < orig {
		i, _ := r.partly(slot)
		d.part = slices.Insert(d.part, i, part{uint16(slot), left})
		r.trapped += uint32(orig - left)
	}
	if r.dead == 0 {
		if d.bits = nil; len(d.part) == 0 {
			r.detail = nil
		}
	}
	u.v.sum.add(&was, -1)
	u.v.sum.add(r, 1)
	if used := uint64(r.live) + uint64(r.trapped); used > uint64(r.blocks) || r.dead == 0 && used != uint64(r.blocks) {
		return fmt.Errorf("usage: segment %d has %d blocks, %d are mapped or trapped in %d extents: %w",
			r.id, r.blocks, used, r.extents-r.dead, ErrDamaged)
	}
	return nil
}

// Difference is a segment whose counts are not those of a recount.
type Difference struct {
	Segment         block.SegmentID
	Slots           []int // of the extents that differ
	Counted, Mapped SegmentUsage
}

// String says what a person needs to know.
func (d Difference) String() string {
	return fmt.Sprintf("segment %d: counted %d live and %d trapped blocks, %d dead extents; mapped are %d, %d, %d; slots %v",
		d.Segment, d.Counted.LiveBlocks, d.Counted.TrappedBlocks, d.Counted.DeadExtents,
		d.Mapped.LiveBlocks, d.Mapped.TrappedBlocks, d.Mapped.DeadExtents, d.Slots)
}

// Report is what a comparison found.
type Report struct {
	Leaks []Difference // counts too high: space that does not come back
	Low   []Difference // counts too low: data that could be deleted while it is mapped
}

// Compare holds a table against a Recount of the same moment. A segment that only one of them has is a
// leak if the table has it, and low otherwise; one that is low in one extent is low as a whole.
func Compare(table, recount View) Report {
	var rep Report
	table.each(func(a *record) bool {
		b := recount.find(a.id)
		if b == nil {
			rep.Leaks = append(rep.Leaks, Difference{Segment: a.id, Counted: table.usage(a)})
			return true
		}
		d := Difference{Segment: a.id, Counted: table.usage(a), Mapped: recount.usage(b)}
		low := a.live < b.live
		for slot := range max(int(a.extents), int(b.extents)) {
			if x, y := a.left(slot), b.left(slot); x != y {
				d.Slots = append(d.Slots, slot)
				low = low || x < y
			}
		}
		switch {
		case low:
			rep.Low = append(rep.Low, d)
		case len(d.Slots) > 0 || a.live != b.live || a.trapped != b.trapped || a.dead != b.dead:
			rep.Leaks = append(rep.Leaks, d)
		}
		return true
	})
	recount.each(func(b *record) bool {
		if table.find(b.id) == nil {
			rep.Low = append(rep.Low, Difference{Segment: b.id, Mapped: recount.usage(b)})
		}
		return true
	})
	return rep
}
