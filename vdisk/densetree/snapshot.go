package densetree

import (
	"fmt"
	"sync"
	"sync/atomic"

	"graindisk/block"
)

// Snapshot is a view of a tree that never changes and outlives it. Safe for concurrent use, until it is
// released.
type Snapshot struct {
	level0   level0
	rows     *rows
	released atomic.Bool
	top      func() []*Run // level 0 as runs, built at the first call
}

// Snapshot is the tree of this moment; it costs the same however large the tree is, and waits for
// nothing. The caller must Release it. What the snapshot still maps may be reported lost by the tree
// meanwhile. It panics if the tree is closed: a checkpoint of nothing would be taken for the map.
func (t *Tree) Snapshot() *Snapshot {
	l0, w, err := t.content()
	if err != nil {
		panic(fmt.Errorf("densetree: snapshot: %w", err))
	}
	s := &Snapshot{level0: l0, rows: w}
	s.top = sync.OnceValue(func() []*Run { return t.memoryRuns(l0, false) })
	return s
}

// Release lets go of the runs; those that nothing else needs are then removed.
func (s *Snapshot) Release() {
	if !s.released.Swap(true) {
		s.rows.release()
	}
}

// Lookup is Tree.Lookup on the snapshot.
func (s *Snapshot) Lookup(lba block.LBA, blocks uint64, fn func(Entry) bool) error {
	end := rangeEnd(lba, blocks)
	var buf [32]packed
	return resolve(s.level0.overlapping(lba, end, buf[:0]), s.rows.all, lba, end, fn)
}

// Runs is everything the snapshot holds, newest first: level 0 as runs made for this snapshot, the
// frozen level 0, then the runs it shares with the tree. They are good until Release.
func (s *Snapshot) Runs() []*Run {
	runs := append([]*Run(nil), s.top()...)
	for _, row := range s.rows.all {
		runs = append(runs, row...)
	}
	return runs
}
