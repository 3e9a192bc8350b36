package writeback

import (
	"fmt"
	"iter"
	"slices"
	"time"

	"graindisk/block"
	"graindisk/tier"
)

// Frozen is the net effect of the records after the freeze before it, up to and including Seq. It
// does not change, and its slots stay, until it is published. Safe for concurrent use.
type Frozen struct {
	Seq  Seq // the horizon of a cut made from it
	gen  *generation
	crcs checksums
}

// Block is one data block of a Frozen.
type Block struct {
	LBA   block.LBA
	Place tier.Place
	CRC   uint32
}

// Range is an unmapped range of a Frozen; never empty.
type Range struct {
	LBA    block.LBA
	Blocks uint64
}

// Freeze ends the active generation at the end of a batch, over all disks, and starts a new one.
// It does not wait for stability: before a cut of it is committed, Sync must have succeeded. It waits
// while a checkpoint is being written.
func (l *Log) Freeze() *Frozen {
	l.ckpt.mu.Lock()
	defer l.ckpt.mu.Unlock()
	return l.freeze(false)
}

// freeze does it, for a cut or to split off what a checkpoint holds.
func (l *Log) freeze(split bool) *Frozen {
	l.ensureIndex()
	l.idx.Lock()
	defer l.idx.Unlock()
	g := l.gens[len(l.gens)-1]
	g.split = split
	l.gens = append(l.gens, newGeneration(g.last))
	return &Frozen{Seq: g.last, gen: g, crcs: l.crcs.snapshot()}
}

// Publish says that a committed root, and a stable record of it in the metadata log, hold all of f,
// which must be the oldest frozen generation. Its entries leave the index, and slots whose files are
// sealed and lie wholly at or below f.Seq become clean.
func (l *Log) Publish(f *Frozen) error {
	l.idx.Lock()
	if len(l.gens) < 2 || l.gens[0] != f.gen {
		l.idx.Unlock()
		return fmt.Errorf("publish cut at %d: not the oldest frozen generation", f.Seq)
	}
	l.gens = slices.Delete(l.gens, 0, 1)
	l.idx.Unlock()
	l.mu.Lock()
	l.horizon = max(l.horizon, f.Seq)
	l.cleanLocked()
	l.mu.Unlock()
	l.SpaceFreed()
	return nil
}

// Disks lists the disks with data or holes, ascending.
func (f *Frozen) Disks() []block.DiskID {
	ids := make([]block.DiskID, 0, len(f.gen.disks))
	for id, d := range f.gen.disks {
		if d.data.blocks > 0 || d.holes.Len() > 0 {
			ids = append(ids, id)
		}
	}
	slices.Sort(ids)
	return ids
}

// Run is consecutive data blocks of a Frozen that lie side by side on the tier.
type Run struct {
	LBA    block.LBA
	Blocks int
	Place  tier.Place
	CRCs   []uint32 // one per block; not to be changed
}

// Runs goes through a disk's data by ascending LBA. It allocates nothing. Two runs in a row may be
// neighbours; each is at most 4096 blocks long.
func (f *Frozen) Runs(disk block.DiskID) iter.Seq[Run] {
	return func(yield func(Run) bool) {
		if d := f.gen.disks[disk]; d != nil {
			d.data.visit(0, lbaMax, func(r run) bool {
				return yield(Run{r.lba(), r.blocks(), r.place, f.crcs.of(r.place, r.blocks())})
			})
		}
	}
}

// Blocks lists a disk's data blocks by ascending LBA, made anew at each call; Runs takes no memory.
func (f *Frozen) Blocks(disk block.DiskID) []Block {
	d := f.gen.disks[disk]
	if d == nil {
		return nil
	}
	list := make([]Block, 0, d.data.blocks)
	for r := range f.Runs(disk) {
		for i, c := range r.CRCs {
			list = append(list, Block{LBA: r.LBA + block.LBA(i), Place: r.Place + tier.Place(i), CRC: c})
		}
	}
	return list
}

// Holes lists a disk's unmapped ranges, ascending and disjoint. Apply them before Blocks, which win.
func (f *Frozen) Holes(disk block.DiskID) []Range {
	d := f.gen.disks[disk]
	if d == nil {
		return nil
	}
	list := make([]Range, 0, d.holes.Len())
	d.holes.Scan(func(s, e block.LBA) bool {
		list = append(list, Range{LBA: s, Blocks: uint64(e - s)})
		return true
	})
	return list
}

// Ops lists the OP records in order.
func (f *Frozen) Ops() []OpRecord { return f.gen.ops }

// Bytes is the net amount of data.
func (f *Frozen) Bytes() int64 { return f.gen.dirty().Bytes }

// Oldest is when the first record was written; zero if there is none.
func (f *Frozen) Oldest() time.Time { return f.gen.dirty().Oldest }
