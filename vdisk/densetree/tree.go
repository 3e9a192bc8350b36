package densetree

import (
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"

	"graindisk/block"
)

// ErrClosed means that the tree has been closed.
var ErrClosed = errors.New("map is closed")

// Options of a tree; a zero field means its default.
type Options struct {
	Level0Max int // entries of level 0 before it is frozen and merged down; default 128 Ki
	RunMax    int // entries of one run, in [2, 65536]; default 64 Ki

	// Store keeps the runs of the levels below; without one they stay in memory.
	Store *Store

	// NextRunID names runs: unique within the tree for ever, safe for concurrent use. Default: one above
	// the highest so far.
	NextRunID func() uint64

	// Lost is told, once, of every block of an extent that leaves the tree because a newer entry hides
	// it: when level 0 is overwritten at once, else when the levels that hold the two are merged. Storing
	// the very same mapping again loses nothing. It is called after the change is visible, by Put or by
	// the merging goroutine or by both at once, and may call Lookup and Snapshot, nothing else of the tree.
	Lost func([]Loss)

	// Guard is held while the content changes and Lost is told of it. Whoever excludes all holders sees
	// the trees and what Lost has been told at one moment: give the read side of a lock to every tree,
	// and take Snapshots under its write side. A tree loaded from such a snapshot, beside a copy of what
	// Lost had been told by then, tells the rest once. Default: none.
	Guard sync.Locker

	// Hold, while it is true, keeps Put from freezing level 0, which grows, and so from waiting: for the
	// replay of a log at start. Default: never.
	Hold *atomic.Bool

	// MergeFailed is told when a merge in the background has failed. The tree stays as it was and level
	// 0 grows; the merge is tried again as it does. Default: nobody is told.
	MergeFailed func(error)

	installRuns int // runs that a merge makes before it puts them in place; default 16, some 8 MB
}

const (
	level0Default = 128 << 10
	level0Min     = 8 << 10 // of a small tree; 220 KB
	runMax        = 64 << 10
	putMin        = 64 // entries that are put together, though level 0 should hold fewer
	levelsMax     = 8  // below level 0
	fanout        = 4  // size of a level in units of the one above
)

func (o Options) withDefaults() Options {
	if o.Level0Max == 0 {
		o.Level0Max = level0Default
	}
	if o.RunMax == 0 {
		o.RunMax = runMax
	}
	if o.installRuns == 0 {
		o.installRuns = 16
	}
	if o.Lost == nil {
		o.Lost = func([]Loss) {}
	}
	if o.Guard == nil {
		o.Guard = noLock{}
	}
	if o.Hold == nil {
		o.Hold = new(atomic.Bool)
	}
	if o.MergeFailed == nil {
		o.MergeFailed = func(error) {}
	}
	return o
}

type noLock struct{}

func (noLock) Lock()   {}
func (noLock) Unlock() {}

func (o Options) validate() error {
	if o.Level0Max < 1 {
		return fmt.Errorf("level0Max %d is below 1", o.Level0Max)
	}
	if o.RunMax < 2 || o.RunMax > runMax {
		return fmt.Errorf("runMax %d is outside [2, %d]", o.RunMax, runMax)
	}
	return nil
}

// Tree is the map of one disk version. All methods are safe for concurrent use; the writing ones take
// turns. Lookup and Snapshot never wait for longer than a pointer takes to change.
type Tree struct {
	o      Options
	writer sync.Mutex // one Put, Flush or Compact at a time; taken before all others
	lastID atomic.Uint64
	bg     background
	stats  counters
	below  atomic.Int64             // entries of all levels
	cursor [levelsMax + 1]block.LBA // per level, where the last merged run ended; the merge's
	begun  int                      // level of which a run is being merged, or was when that failed; 0 is none; the merge's

	mu     sync.RWMutex // guards the next two, which change only with o.Guard held as well
	level0 level0       // changed by the writer alone
	rows   *rows        // nil once closed
}

type counters struct{ put, merged, mergedBytes atomic.Uint64 }

// New makes an empty tree. It panics if the options are out of bounds.
func New(o Options) *Tree {
	t, err := Load(o, nil)
	if err != nil {
		panic(err)
	}
	return t
}

// Load makes a tree of runs that a Snapshot had, in any order: each from Store.Open of the tree's store,
// or in memory; of the latter those of lower levels are moved to the store.
func Load(o Options, runs []*Run) (*Tree, error) {
	o = o.withDefaults()
	if err := o.validate(); err != nil {
		return nil, fmt.Errorf("densetree: invalid options: %w", err)
	}
	t := &Tree{o: o}
	t.bg.init()
	seen := make(map[uint64]bool, len(runs))
	var top, frozen []*Run
	levels := [][]*Run{}
	for _, r := range runs {
		if seen[r.ID] {
			return nil, fmt.Errorf("densetree: load run %d: %w: twice", r.ID, ErrCorrupt)
		}
		seen[r.ID] = true
		t.lastID.Store(max(t.lastID.Load(), r.ID))
		switch {
		case r.Level < 0 || r.Level > levelsMax:
			return nil, fmt.Errorf("densetree: load run %d: %w: level %d", r.ID, ErrCorrupt, r.Level)
		case r.Frozen:
			frozen = append(frozen, r)
		case r.Level == 0:
			top = append(top, r)
		default:
			for len(levels) < r.Level {
				levels = append(levels, nil)
			}
			levels[r.Level-1] = append(levels[r.Level-1], r)
		}
	}
	for _, row := range append([][]*Run{top, frozen}, levels...) {
		if err := sortRow(row); err != nil {
			return nil, err
		}
	}
	if err := t.loadLevel0(top); err != nil {
		return nil, err
	}
	if o.Store != nil {
		if err := o.Store.adopt(levels); err != nil {
			return nil, err
		}
		o.Store.trees.Add(1)
		o.Store.level0.Add(int64(t.level0.n))
	}
	t.rows = newRows(frozen, levels)
	t.below.Store(int64(t.rows.len()))
	return t, nil
}

// adopt moves what is in memory to files.
func (s *Store) adopt(levels [][]*Run) error {
	moved := false
	for _, row := range levels {
		for i, r := range row {
			if r.store != nil {
				continue
			}
			stored, err := s.add(r)
			if err != nil {
				return err
			}
			row[i], moved = stored, true
		}
	}
	if moved {
		return s.syncNames()
	}
	return nil
}

func (t *Tree) loadLevel0(runs []*Run) error {
	in := newRowReader(runs)
	defer in.close()
	var es []packed
	for {
		p, ok, err := in.next()
		if err != nil {
			return err
		}
		if !ok {
			break
		}
		es = append(es, p)
	}
	t.level0.cut(es)
	return nil
}

// sortRow orders the runs of one level and checks that they do not overlap.
func sortRow(row []*Run) error {
	slices.SortFunc(row, func(a, b *Run) int {
		if a.First < b.First {
			return -1
		}
		return 1
	})
	for i := 1; i < len(row); i++ {
		if row[i].First <= row[i-1].Last {
			return fmt.Errorf("densetree: load runs %d and %d: %w: they overlap on level %d",
				row[i-1].ID, row[i].ID, ErrCorrupt, row[i].Level)
		}
	}
	return nil
}

// Put stores es as the newest content; they may be in any order but must not overlap each other. Many
// entries of one stretch of the disk, in order, cost least. When level 0 is full, Put freezes it and has
// it merged in the background; it waits only if that is still going on for the one before. It panics on
// an invalid entry.
func (t *Tree) Put(es []Entry) {
	ps := make([]packed, len(es))
	for i, e := range es {
		if err := e.validate(); err != nil {
			panic(fmt.Errorf("densetree: put: %w", err))
		}
		ps[i] = pack(e)
	}
	byLBA := func(a, b packed) int {
		if a.start() < b.start() {
			return -1
		}
		return 1
	}
	if !slices.IsSortedFunc(ps, byLBA) {
		slices.SortFunc(ps, byLBA)
	}
	t.writer.Lock()
	defer t.writer.Unlock()
	t.stats.put.Add(uint64(len(ps)))
	for len(ps) > 0 {
		n, hold := len(ps), t.o.Hold.Load()
		if !hold {
			n = min(n, max(putMin, t.level0Limit()-t.level0.n))
		}
		t.putSorted(ps[:n])
		ps = ps[n:]
		if !hold && t.level0Full() {
			t.freeze()
		}
	}
}

// putSorted stores ps in level 0, all of them at one moment.
func (t *Tree) putSorted(ps []packed) {
	next, lost := t.level0.put(ps, nil)
	t.setLevel0(next, nil, lost)
}

// setLevel0 makes next the level 0 and, if there are any, frozen the frozen one, which was none, and
// tells what was lost by that.
func (t *Tree) setLevel0(next level0, frozen []*Run, lost []Loss) {
	if s := t.o.Store; s != nil {
		s.level0.Add(int64(next.n - t.level0.n))
	}
	var old *rows
	t.o.Guard.Lock()
	t.mu.Lock()
	t.level0 = next
	if len(frozen) > 0 {
		old = t.rows
		t.rows = newRows(frozen, old.levels())
	}
	t.mu.Unlock()
	if len(lost) > 0 {
		t.o.Lost(lost)
	}
	t.o.Guard.Unlock()
	if old != nil {
		old.release()
	}
}

// level0Limit is how many entries level 0 may have: an eighth of what lies below, so that a small tree
// takes little memory.
func (t *Tree) level0Limit() int {
	return min(t.o.Level0Max, max(level0Min, int(t.below.Load()/8)))
}

func (t *Tree) level0Full() bool {
	if t.level0.n >= t.level0Limit() {
		return true
	}
	s := t.o.Store
	return s != nil && s.level0.Load() > int64(s.o.Level0Total) && int64(t.level0.n)*s.trees.Load() >= s.level0.Load()
}

// Lookup tells fn what [lba, lba+blocks) is made of: the pieces come in order, clipped, and cover
// the range completely; what was never written is None. It stops when fn returns false. fn runs without
// any lock and may take its time; it sees the tree as it was when Lookup was called. It panics if the
// range ends beyond EndMax. An error names a page that cannot be read; it matches ErrCorrupt if the page
// is damaged.
func (t *Tree) Lookup(lba block.LBA, blocks uint64, fn func(Entry) bool) error {
	end := rangeEnd(lba, blocks)
	l0, w, err := t.content()
	if err != nil {
		return err
	}
	defer w.release()
	var buf [32]packed
	return resolve(l0.overlapping(lba, end, buf[:0]), w.all, lba, end, fn)
}

// content is the tree of this moment; the caller releases the rows.
func (t *Tree) content() (level0, *rows, error) {
	t.mu.RLock()
	defer t.mu.RUnlock()
	if t.rows == nil {
		return level0{}, nil, ErrClosed
	}
	t.rows.refs.Add(1)
	return t.level0, t.rows, nil
}

func rangeEnd(lba block.LBA, blocks uint64) block.LBA {
	if lba > EndMax || blocks > uint64(EndMax-lba) {
		panic(fmt.Errorf("densetree: lookup of %d blocks at %d ends beyond %d", blocks, lba, EndMax))
	}
	return lba + block.LBA(blocks)
}

// Stats are counts of one moment, and sums since the tree was made.
type Stats struct {
	Entries     int    // of all levels; hidden ones count until a merge finds them
	Level0      int    // entries of level 0
	Levels      int    // levels below level 0
	Runs        int    // runs of those
	MemoryBytes int64  // of level 0, of what is frozen, and of the indexes
	Bytes       int64  // of the pages in files
	Put         uint64 // entries that were put
	Merged      uint64 // entries that merges have written
	MergedBytes uint64 // bytes that merges have written
	MergeErr    error  // why the last merge failed
}

// Stats counts the tree's content; a closed tree has none.
func (t *Tree) Stats() Stats {
	l0, w, err := t.content()
	if err != nil {
		return Stats{}
	}
	defer w.release()
	s := Stats{
		Level0: l0.n, Levels: len(w.levels()), Entries: l0.n, MemoryBytes: int64(l0.n*packedBytes + len(l0.chunks)*packedBytes),
		Put: t.stats.put.Load(), Merged: t.stats.merged.Load(), MergedBytes: t.stats.mergedBytes.Load(), MergeErr: t.bg.lastErr(),
	}
	for i, row := range w.all {
		s.Entries += rowLen(row)
		if i > 0 {
			s.Runs += len(row)
		}
		for _, r := range row {
			s.MemoryBytes += int64(len(r.mem) + 8*len(r.firsts))
			if r.mem == nil {
				s.Bytes += int64(headBytes(len(r.firsts)) + len(r.firsts)*pageBytes)
			}
		}
	}
	return s
}
