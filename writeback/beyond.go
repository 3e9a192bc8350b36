package writeback

import (
	"maps"
	"slices"

	"graindisk/block"
)

// DiskRecords is the net effect of records on one disk. Written and Unmapped are ascending and disjoint each, and
// nothing in one touches its neighbour; a block that was unmapped and then written may be in both.
type DiskRecords struct {
	Disk       block.DiskID
	Written    []Range
	Unmapped   []Range
	Operations int
}

// Beyond tells, disk by disk in ascending order, what the log holds of records after horizon. It is for lists of what a
// takeover cost: appends wait while it is made. A generation that has records on both sides of the horizon is
// told in whole; there is none if the horizon is that of a cut.
func (l *Log) Beyond(horizon Seq) []DiskRecords {
	l.ensureIndex()
	l.idx.RLock()
	defer l.idx.RUnlock()
	type sum struct {
		written, unmapped []Range
		ops               int
	}
	sums := map[block.DiskID]*sum{}
	for i, g := range l.gens {
		if active := i == len(l.gens)-1; !active && g.last <= horizon {
			continue
		}
		for id, d := range g.disks {
			s := sums[id]
			if s == nil {
				s = new(sum)
				sums[id] = s
			}
			d.data.visit(0, lbaMax, func(r run) bool {
				s.written = append(s.written, Range{r.lba(), uint64(r.blocks())})
				return true
			})
			d.holes.Scan(func(from, to block.LBA) bool {
				s.unmapped = append(s.unmapped, Range{from, uint64(to - from)})
				return true
			})
			s.ops += d.ops
		}
	}
	var all []DiskRecords
	for _, id := range slices.Sorted(maps.Keys(sums)) {
		s := sums[id]
		if d := (DiskRecords{id, union(s.written), union(s.unmapped), s.ops}); len(d.Written)+len(d.Unmapped)+d.Operations > 0 {
			all = append(all, d)
		}
	}
	return all
}

// union sorts ranges and joins those that overlap or touch, in place.
func union(rs []Range) []Range {
	slices.SortFunc(rs, func(a, b Range) int {
		switch {
		case a.LBA < b.LBA:
			return -1
		case a.LBA > b.LBA:
			return 1
		}
		return 0
	})
	n := 0
	for _, r := range rs {
		if n > 0 {
			last := &rs[n-1]
			if end := last.LBA + block.LBA(last.Blocks); r.LBA <= end {
				last.Blocks = max(last.Blocks, uint64(r.LBA-last.LBA)+r.Blocks)
				continue
			}
		}
		rs[n] = r
		n++
	}
	return rs[:n]
}
