package crashtest

import (
	"cmp"
	"fmt"
	"math"
	"slices"

	"graindisk/block"
)

// Read returns the stamp a recovered disk shows at a block.
type Read func(disk block.DiskID, lba block.LBA) (Stamp, error)

// seen is what one block shows.
type seen struct {
	disk block.DiskID
	lba  block.LBA
	op   *op   // nil: zeroes
	hist []*op // the operations that wrote the block
}

func (s *seen) String() string {
	if s.op == nil {
		return fmt.Sprintf("disk %d block %d shows zeroes", s.disk, s.lba)
	}
	return fmt.Sprintf("disk %d block %d shows op %d", s.disk, s.lba, s.op.id)
}

// span is a run of moments [from, to).
type span struct{ from, to uint64 }

const never = math.MaxUint64

// CheckProcessCrash expects every acknowledged operation: each block shows the last one acknowledged, or
// one that may have come after it. It is right for a pool that did not crash too.
func (m *Model) CheckProcessCrash(read Read) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.checkLocked(read, func(o *op) bool { return o.acked != 0 })
}

// CheckPrefix is for a power cut. It expects one prefix of the acknowledged order to explain all blocks
// of all disks at once, and everything stable to be in it. What was never acknowledged may be
// there or not, block by block.
func (m *Model) CheckPrefix(read Read) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.checkLocked(read, func(o *op) bool { return o.stable })
}

// CheckCut is for a lost host. It expects a prefix, as CheckPrefix does, that holds everything
// published up to the given cut, whatever was stable on the host.
func (m *Model) CheckCut(read Read, cut uint64) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.checkLocked(read, func(o *op) bool { return o.cut != 0 && o.cut <= cut })
}

// checkLocked looks for a moment T such that all that was acknowledged before T, all that must be there and
// all that is seen make up what the blocks show, and nothing issued after T is there. A block
// that shows operation s allows the moments from the issue of s to the acknowledgement of the first
// operation that certainly came after s; zeroes may be of any hole or of the beginning.
func (m *Model) checkLocked(read Read, must func(*op) bool) error {
	blocks, err := m.observeLocked(read)
	if err != nil {
		return err
	}
	in := map[*op]bool{} // certainly in the prefix
	var last *op         // the latest issued of what is there
	note := func(o *op) {
		if last == nil || o.issued > last.issued {
			last = o
		}
	}
	for _, o := range m.ops {
		if must(o) {
			in[o] = true
			note(o)
		}
	}
	for i := range blocks {
		if o := blocks[i].op; o != nil {
			in[o] = in[o] || o.acked != 0 // then it is atomic
			note(o)
		}
	}
	left := []span{{0, never}}
	if last != nil {
		left[0].from = last.issued
	}
	for i := range blocks {
		left = intersect(left, blocks[i].moments(in))
		if len(left) == 0 {
			return blocks[i].explain(in, last)
		}
	}
	return nil
}

// observeLocked reads all blocks of all disks, in order, and finds the operations they show.
func (m *Model) observeLocked(read Read) ([]seen, error) {
	var blocks []seen
	for id, d := range m.disks {
		for lba, hist := range d.blocks {
			blocks = append(blocks, seen{disk: id, lba: block.LBA(lba), hist: hist})
		}
	}
	slices.SortFunc(blocks, func(a, b seen) int {
		return cmp.Or(cmp.Compare(a.disk, b.disk), cmp.Compare(a.lba, b.lba))
	})
	for i := range blocks {
		b := &blocks[i]
		stamp, err := read(b.disk, b.lba)
		if err != nil {
			return nil, fmt.Errorf("disk %d block %d: %w", b.disk, b.lba, err)
		}
		if stamp == (Stamp{}) {
			continue
		}
		at := slices.IndexFunc(b.hist, func(o *op) bool { return o.id == stamp.Op && !o.hole })
		if at < 0 || stamp.Disk != b.disk || stamp.LBA != b.lba {
			return nil, fmt.Errorf("disk %d block %d: shows %v, which was not written there or was lost in an earlier crash",
				b.disk, b.lba, stamp)
		}
		b.op = b.hist[at]
	}
	return blocks, nil
}

// moments lists the spans of time the block is as it shows, given what is certainly there.
func (s *seen) moments(in map[*op]bool) []span {
	if s.op != nil {
		to, _ := s.until(s.op.acked, in)
		return []span{{s.op.issued, to}}
	}
	to, _ := s.until(1, in) // as before the first operation
	list := []span{{0, to}}
	for _, o := range s.hist {
		if o.hole {
			to, _ := s.until(o.acked, in)
			list = append(list, span{o.issued, to})
		}
	}
	return list
}

// until returns when the block stopped showing something acknowledged at the given time, and by
// which operation: the first that was issued later and must be there, from its issue if it certainly is,
// else from its acknowledgement on.
func (s *seen) until(acked uint64, in map[*op]bool) (to uint64, by *op) {
	to = never
	if acked == 0 {
		return to, nil // never acknowledged: it may come after anything
	}
	for _, o := range s.hist {
		end := uint64(never)
		switch {
		case o.issued < acked:
			continue
		case in[o]:
			end = o.issued
		case o.acked != 0:
			end = o.acked
		}
		if end < to {
			to, by = end, o
		}
	}
	return to, by
}

// explain says why the block does not fit.
func (s *seen) explain(in map[*op]bool, last *op) error {
	acked := uint64(1)
	if s.op != nil {
		acked = s.op.acked
	}
	to, by := s.until(acked, in)
	switch {
	case s.op == nil && slices.ContainsFunc(s.hist, func(o *op) bool { return o.hole }):
		return fmt.Errorf("%v, which no prefix explains together with the blocks before it", s)
	case by != nil && in[by]:
		return fmt.Errorf("%v, but op %d wrote it later and must be there", s, by.id)
	case by != nil && last != nil && to <= last.issued:
		return fmt.Errorf("%v, but op %d wrote it later and was acknowledged before op %d was issued, which is there",
			s, by.id, last.id)
	}
	return fmt.Errorf("%v, which does not fit the zeroes in blocks before it", s)
}

// intersect returns the moments in both lists; a is disjoint and sorted, and so is the result.
func intersect(a, b []span) []span {
	slices.SortFunc(b, func(x, y span) int { return cmp.Compare(x.from, y.from) })
	var both []span
	for _, x := range a {
		for _, y := range b {
			from, to := max(x.from, y.from), min(x.to, y.to)
			if from >= to {
				continue
			}
			if n := len(both); n > 0 && from <= both[n-1].to {
				both[n-1].to = max(both[n-1].to, to)
			} else {
				both = append(both, span{from, to})
			}
		}
	}
	return both
}

// Recover makes what a recovered pool shows the past of what follows. What shows is stable from now on,
// though no more published than it was; what was lost may never show again. Check first.
func (m *Model) Recover(read Read) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	blocks, err := m.observeLocked(read)
	if err != nil {
		return err
	}
	m.time++
	for i := range blocks {
		if o := blocks[i].op; o != nil {
			o.stable = true
			if o.acked == 0 {
				o.acked = m.time
			}
		}
	}
	kept := map[*op]bool{}
	for i := range blocks {
		b := &blocks[i]
		hist := m.survivorsLocked(b)
		m.disks[b.disk].blocks[b.lba] = hist
		for _, o := range hist {
			kept[o] = true
		}
	}
	for _, o := range m.ops {
		if !kept[o] {
			o.acked, o.stable, o.cut = 0, false, 0
		}
	}
	return nil
}

// survivorsLocked lists the operations the block may still hold below what it shows: all but those that
// certainly came after it. Zeroes do not say which hole they are, so they become a new, stable one.
func (m *Model) survivorsLocked(s *seen) []*op {
	if s.op != nil {
		return slices.DeleteFunc(slices.Clone(s.hist), func(o *op) bool { return o.issued >= s.op.acked })
	}
	if !slices.ContainsFunc(s.hist, func(o *op) bool { return o.hole }) {
		return nil
	}
	if last := s.hist[len(s.hist)-1]; last.hole && last.stable {
		return s.hist
	}
	m.time += 2
	o := &op{id: uint64(len(m.ops)) + 1, disk: s.disk, lba: s.lba, blocks: 1, hole: true,
		issued: m.time - 1, acked: m.time, stable: true}
	m.ops = append(m.ops, o)
	return append(slices.Clone(s.hist), o)
}
