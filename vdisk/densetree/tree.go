// Package densetree is the logical map of one disk version: LBA range to stored extent, hole or
// base. Level 0 is a B-tree in memory; each level below is a row of immutable sorted runs and may
// hold 16 times as many entries as the one above. Where levels overlap, the upper one wins.
//
//	level 0   B-tree      ▪▪  ▪      ▪▪▪        ≤ Level0Max entries, newest
//	level 1   runs      ▬▬▬▬▬ ▬▬▬▬    ▬▬▬▬▬     ≤ Level0Max · 16
//	level 2   runs    ▬▬▬▬▬▬▬▬▬▬▬▬▬▬▬▬▬▬▬▬▬▬▬▬  ≤ Level0Max · 256
//
// When a level is too large, part of it (all of level 0, one run of another level, taken in turn)
// is merged into the next. A merge rewrites the runs that its input overlaps and any small run
// (below half of RunMax) beside them; all other runs keep their identity, so a checkpoint that
// stored them need not store them again. Holes stay in the lowest level too, since a tree may lie
// over another one.
//
// A run is encoded as below; integers are little-endian, varints are those of encoding/binary.
//
//	0       4         6       8          16   24      28      32      40     48     52
//	+-------+---------+-------+----------+----+-------+-------+-------+------+------+---------+-----+
//	| GDRN  | version | flags | incompat | id | level | count | first | last | body | entries | crc |
//	+-------+---------+-------+----------+----+-------+-------+-------+------+------+---------+-----+
//
// version is 1, flags are 0, first and last are the first and the last LBA covered, body is the
// length of the entries in bytes, crc is CRC32C over everything before it. An entry is a tag byte
// and the varints its bits announce, in this order:
//
//	bits 0-1  kind: 1 data, 2 hole, 3 base
//	bit  2    gap: blocks between the end of the previous entry and this one (else 0;
//	          the first entry starts at "first" and never has it)
//	bit  3    blocks (else as many as the previous data entry had; always set for hole and base)
//	bit  4    extent: zigzag of name minus (previous name + 1) (else the previous name + 1)
//	bit  5    part of an extent: off, orig (else off is 0 and orig is blocks)
//
// A map of whole 4 KiB extents written in order costs 1 byte per entry.
package densetree

import (
	"fmt"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/tidwall/btree"

	"graindisk/block"
)

// Options of a tree; a zero field means its default.
type Options struct {
	Level0Max int // entries of level 0 before it is merged down; default 64 Ki
	RunMax    int // entries of one run, in [2, 65536]; default 64 Ki

	// NextRunID names runs: unique within the tree for ever. Default: one above the highest so far.
	NextRunID func() uint64

	// Lost is told, once, of every block of an extent that leaves the tree because a newer entry
	// hides it: when level 0 is overwritten at once, else when the levels that hold the two are
	// merged. It is called by the goroutine of Put, Flush or Compact after the change is visible,
	// and may call Lookup, not the writing methods. The slice is its own to keep. Storing the very
	// same mapping again loses nothing.
	Lost func([]Loss)

	// Guard is held while the content is changed and Lost is told of it. Who holds the other side of
	// it (it may be the read side of a sync.RWMutex) sees both or neither. Default: none.
	Guard sync.Locker
}

const (
	level0Default = 64 << 10
	runMax        = 64 << 10
	levelsMax     = 8  // below level 0: 2^48 entries with the default Level0Max
	fanout        = 16 // size of a level in units of the one above
	putChunk      = 64 // entries stored per hold of the lock, some 100 µs
)

func (o Options) withDefaults() Options {
	if o.Level0Max == 0 {
		o.Level0Max = level0Default
	}
	if o.RunMax == 0 {
		o.RunMax = runMax
	}
	if o.Lost == nil {
		o.Lost = func([]Loss) {}
	}
	if o.Guard == nil {
		o.Guard = unguarded{}
	}
	return o
}

// unguarded is the lock of nothing.
type unguarded struct{}

func (unguarded) Lock()   {}
func (unguarded) Unlock() {}

func (o Options) validate() error {
	if o.Level0Max < 1 {
		return fmt.Errorf("level0Max %d is below 1", o.Level0Max)
	}
	if o.RunMax < 2 || o.RunMax > runMax {
		return fmt.Errorf("runMax %d is outside [2, %d]", o.RunMax, runMax)
	}
	return nil
}

// Tree is the map of one disk version. Lookup may be called by any number of goroutines, also
// while a Put merges; the writing methods and Snapshot take turns.
type Tree struct {
	o      Options
	writer sync.Mutex    // one Put, Flush, Compact or Snapshot at a time; taken before mu
	lastID uint64        // highest run ID so far; guarded by writer
	cursor []block.LBA   // per level, where the last merged run ended; guarded by writer
	merged atomic.Uint64 // entries written by merges

	mu sync.RWMutex // guards c; c changes only with writer held as well, so a writer reads it freely
	c  content
}

// content is what a lookup sees. levels and the runs are never changed, only replaced.
type content struct {
	level0 *btree.BTreeG[packed]
	levels [][]*Run // levels[i] is level i+1, its runs in LBA order
}

// New makes an empty tree. It panics if the options are out of bounds.
func New(o Options) *Tree {
	t, err := Load(o, nil)
	if err != nil {
		panic(err)
	}
	return t
}

// Load makes a tree of runs that Runs or Snapshot.Runs gave, in any order. Runs of level 0 become
// its level 0 again.
func Load(o Options, runs []*Run) (*Tree, error) {
	o = o.withDefaults()
	if err := o.validate(); err != nil {
		return nil, fmt.Errorf("densetree: invalid options: %w", err)
	}
	t := &Tree{o: o, c: content{level0: newLevel0()}}
	seen := make(map[uint64]bool, len(runs))
	var top []*Run
	for _, r := range runs {
		if seen[r.ID] {
			return nil, fmt.Errorf("densetree: load run %d: %w: twice", r.ID, ErrCorrupt)
		}
		seen[r.ID] = true
		t.lastID = max(t.lastID, r.ID)
		if r.Level == 0 {
			top = append(top, r)
			continue
		}
		if r.Level < 0 || r.Level > levelsMax {
			return nil, fmt.Errorf("densetree: load run %d: %w: level %d", r.ID, ErrCorrupt, r.Level)
		}
		for len(t.c.levels) < r.Level {
			t.c.levels = append(t.c.levels, nil)
		}
		t.c.levels[r.Level-1] = append(t.c.levels[r.Level-1], r)
	}
	for _, row := range append(t.c.levels, top) {
		if err := sortRow(row); err != nil {
			return nil, err
		}
	}
	for _, r := range top {
		for _, p := range r.es {
			t.c.level0.Load(p)
		}
	}
	return t, nil
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

// Put stores es as the newest content; they may be in any order but must not overlap each other.
// When level 0 is full, Put merges it down before it returns. It panics on an invalid entry.
func (t *Tree) Put(es []Entry) {
	t.writer.Lock()
	defer t.writer.Unlock()
	for chunk := range slices.Chunk(es, putChunk) {
		t.putChunk(chunk)
		if t.c.level0.Len() >= t.o.Level0Max {
			t.flush()
		}
	}
}

// putChunk stores es in level 0 under one hold of the lock.
func (t *Tree) putChunk(es []Entry) {
	for _, e := range es {
		if err := e.validate(); err != nil {
			panic(fmt.Errorf("densetree: put: %w", err))
		}
	}
	var lost []Loss
	t.o.Guard.Lock()
	defer t.o.Guard.Unlock()
	t.mu.Lock()
	for _, e := range es {
		lost = insert(t.c.level0, pack(e), lost)
	}
	t.mu.Unlock()
	t.report(lost)
}

func (t *Tree) report(lost []Loss) {
	if len(lost) > 0 {
		t.o.Lost(lost)
	}
}

// Flush merges level 0 down, so that Runs holds everything.
func (t *Tree) Flush() {
	t.writer.Lock()
	defer t.writer.Unlock()
	t.flush()
}

// Compact merges everything into the lowest level; every hidden block has then been reported.
func (t *Tree) Compact() {
	t.writer.Lock()
	defer t.writer.Unlock()
	t.flush()
	for i := 0; i < len(t.c.levels)-1; i++ {
		for len(t.c.levels[i]) > 0 {
			t.mergeRun(i)
		}
	}
}

// Runs is the content of the levels below level 0, upper levels first, each in LBA order. After
// Flush that is everything.
func (t *Tree) Runs() []*Run {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return slices.Concat(t.c.levels...)
}

// Lookup tells fn what [lba, lba+blocks) is made of: the pieces come in order, clipped, and cover
// the range completely; what was never written is None. It stops when fn returns false and then
// returns false. fn runs without any lock and may take its time; it sees the tree as it was when
// Lookup was called. It panics if the range ends beyond EndMax.
func (t *Tree) Lookup(lba block.LBA, blocks uint64, fn func(Entry) bool) bool {
	end := rangeEnd(lba, blocks)
	var buf [32]packed
	t.mu.RLock()
	hits := overlapping(t.c.level0, lba, end, buf[:0])
	levels := t.c.levels
	t.mu.RUnlock()
	return resolve(hits, levels, lba, end, fn)
}

func rangeEnd(lba block.LBA, blocks uint64) block.LBA {
	if lba > EndMax || blocks > uint64(EndMax-lba) {
		panic(fmt.Errorf("densetree: lookup of %d blocks at %d ends beyond %d", blocks, lba, EndMax))
	}
	return lba + block.LBA(blocks)
}

// Stats are counts of one moment.
type Stats struct {
	Entries int    // of all levels; hidden ones count until a merge finds them
	Level0  int    // entries of level 0
	Levels  int    // levels below level 0
	Runs    int    // runs of those
	Bytes   int64  // memory of the entries
	Merged  uint64 // entries that merges have written since the tree was made
}

// Stats counts the tree's content.
func (t *Tree) Stats() Stats {
	t.mu.RLock()
	defer t.mu.RUnlock()
	s := Stats{Level0: t.c.level0.Len(), Levels: len(t.c.levels), Merged: t.merged.Load()}
	s.Entries = s.Level0
	for _, row := range t.c.levels {
		s.Runs += len(row)
		s.Entries += rowLen(row)
	}
	s.Bytes = int64(s.Entries) * packedBytes
	return s
}
