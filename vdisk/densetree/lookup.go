package densetree

import (
	"sort"
	"sync"

	"graindisk/block"
)

// pieces hands what a lookup finds to fn, neighbours that continue each other in one piece.
type pieces struct {
	fn   func(Entry) bool
	last packed // not yet handed on, if some
	some bool
}

// add takes the next piece; false means that fn wants no more.
func (s *pieces) add(p packed) bool {
	if s.some && s.last.continues(p) {
		s.last = s.last.join(p)
		return true
	}
	ok := s.flush()
	s.last, s.some = p, true
	return ok
}

func (s *pieces) flush() bool {
	return !s.some || s.fn(s.last.entry())
}

// resolve tells fn what [lba, end) is made of, given the hits of level 0 in it and the levels below.
func resolve(hits []packed, levels [][]*Run, lba, end block.LBA, fn func(Entry) bool) bool {
	if lba == end {
		return true
	}
	s := pieces{fn: fn}
	for _, p := range hits {
		if p.start() > lba && !s.below(levels, lba, p.start()) {
			return false
		}
		p = p.clip(lba, end)
		if !s.add(p) {
			return false
		}
		lba = p.end()
	}
	return s.below(levels, lba, end) && s.flush()
}

// below adds what the levels say about [lba, end): the first of them, its gaps from the others.
func (s *pieces) below(levels [][]*Run, lba, end block.LBA) bool {
	if lba >= end {
		return true
	}
	if len(levels) == 0 {
		return s.add(pack(Entry{LBA: lba, Blocks: uint64(end - lba), Kind: None}))
	}
	row := levels[0]
	for i := firstRun(row, lba); i < len(row) && row[i].First < end; i++ {
		es := row[i].es
		for j := firstEntry(es, lba); j < len(es) && es[j].start() < end; j++ {
			if !s.below(levels[1:], lba, es[j].start()) {
				return false
			}
			p := es[j].clip(lba, end)
			if !s.add(p) {
				return false
			}
			lba = p.end()
		}
	}
	return s.below(levels[1:], lba, end)
}

// firstRun is the index of the first run that ends at or behind lba.
func firstRun(row []*Run, lba block.LBA) int {
	return sort.Search(len(row), func(i int) bool { return row[i].Last >= lba })
}

// firstEntry is the index of the first entry that ends behind lba.
func firstEntry(es []packed, lba block.LBA) int {
	return sort.Search(len(es), func(i int) bool { return es[i].end() > lba })
}

// Snapshot is a view of a tree that never changes. Safe for concurrent use.
type Snapshot struct {
	c   content
	top func() []*Run // level 0 as runs, built at the first call
}

// Snapshot is the tree of this moment, with all or nothing of each Put; it costs the same however
// large the tree is. It waits for a Put under way. What the snapshot still maps may be reported
// lost by the tree meanwhile.
func (t *Tree) Snapshot() *Snapshot {
	t.writer.Lock()
	defer t.writer.Unlock()
	t.mu.Lock() // Copy marks both trees as sharing their nodes
	s := &Snapshot{c: content{level0: t.c.level0.Copy(), levels: t.c.levels}}
	t.mu.Unlock()
	ids := make([]uint64, runsFor(s.c.level0.Len(), t.o.RunMax))
	for i := range ids {
		ids[i] = t.nextRunID()
	}
	s.top = sync.OnceValue(func() []*Run {
		next := 0
		id := func() uint64 { next++; return ids[next-1] }
		return cutRuns(level0Entries(s.c.level0), t.o.RunMax, 0, id)
	})
	return s
}

// Lookup is Tree.Lookup on the snapshot.
func (s *Snapshot) Lookup(lba block.LBA, blocks uint64, fn func(Entry) bool) bool {
	end := rangeEnd(lba, blocks)
	var buf [32]packed
	return resolve(overlapping(s.c.level0, lba, end, buf[:0]), s.c.levels, lba, end, fn)
}

// Runs is everything the snapshot holds, upper levels first: level 0 as runs of its own, made for
// this snapshot, then the runs it shares with the tree.
func (s *Snapshot) Runs() []*Run {
	runs := s.top()
	runs = runs[:len(runs):len(runs)]
	for _, row := range s.c.levels {
		runs = append(runs, row...)
	}
	return runs
}
