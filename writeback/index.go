package writeback

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/tidwall/btree"

	"graindisk/block"
	"graindisk/tier"
)

// State says what the log knows of a block.
type State uint8

// What Lookup may find.
const (
	None    State = iota // not in the log: look below
	Present              // data, at Place
	Hole                 // unmapped: reads as zeroes
)

// Found is what the log knows of one block.
type Found struct {
	State State
	CRC   uint32 // of the block's 4 KiB, if Present
	Place tier.Place
}

// loc is the index's value for a block; it holds no pointer, so the collector skips the maps.
type loc struct {
	place tier.Place
	crc   uint32
}

// diskIndex is the net effect of a generation's records on one disk. A block in blocks is data even
// where holes covers it: an unmap deletes the blocks it hits, a later write puts them back.
type diskIndex struct {
	blocks map[block.LBA]loc
	holes  btree.Map[block.LBA, block.LBA] // start → end; disjoint, not touching
	oldest int64                           // time of the first record, ns since 1970
}

// generation is the net effect of the records after the freeze before it, up to last.
type generation struct {
	last   Seq
	oldest int64 // time of the first record, 0 while there is none
	disks  map[block.DiskID]*diskIndex
	ops    []OpRecord
}

// OpRecord is one OP record.
type OpRecord struct {
	Seq     Seq
	Disk    block.DiskID
	Payload []byte
}

func newGeneration(last Seq) *generation {
	return &generation{last: last, disks: map[block.DiskID]*diskIndex{}}
}

// disk returns the index of a disk, made if need be; now is the time of the record it is for.
func (g *generation) disk(id block.DiskID, now int64) *diskIndex {
	if g.oldest == 0 {
		g.oldest = now
	}
	d := g.disks[id]
	if d == nil {
		d = &diskIndex{blocks: map[block.LBA]loc{}, oldest: now}
		g.disks[id] = d
	}
	return d
}

// apply adds one record. For Data, place is that of the first block and crcs has one per block.
// For Op, payload is kept.
func (g *generation) apply(seq Seq, now int64, e entry, place tier.Place, crcs []uint32, payload []byte) {
	g.last = seq
	switch e.kind {
	case Data:
		d := g.disk(e.disk, now)
		for i, c := range crcs {
			d.blocks[block.LBA(e.lba)+block.LBA(i)] = loc{place + tier.Place(i), c}
		}
	case Unmap:
		g.disk(e.disk, now).unmap(block.LBA(e.lba), block.LBA(e.lba+e.blocks))
	case Op:
		if g.oldest == 0 {
			g.oldest = now
		}
		g.ops = append(g.ops, OpRecord{Seq: seq, Disk: e.disk, Payload: payload})
	}
}

// unmap makes [from, to) a hole, in steps of the lesser of its length and the blocks held.
func (d *diskIndex) unmap(from, to block.LBA) {
	if uint64(to-from) < uint64(len(d.blocks)) {
		for lba := from; lba < to; lba++ {
			delete(d.blocks, lba)
		}
	} else {
		maps.DeleteFunc(d.blocks, func(lba block.LBA, _ loc) bool { return from <= lba && lba < to })
	}
	d.addHole(from, to)
}

func (d *diskIndex) addHole(from, to block.LBA) {
	d.holes.Descend(from, func(s, e block.LBA) bool {
		if e >= from {
			from, to = s, max(to, e)
		}
		return false
	})
	var gone []block.LBA
	d.holes.Ascend(from, func(s, e block.LBA) bool {
		if s > to {
			return false
		}
		gone, to = append(gone, s), max(to, e)
		return true
	})
	for _, s := range gone {
		d.holes.Delete(s)
	}
	d.holes.Set(from, to)
}

// lookup fills in those of out that are None and known here; it returns how many it filled.
func (d *diskIndex) lookup(lba block.LBA, out []Found) (filled int) {
	for i := range out {
		if out[i].State != None {
			continue
		}
		if at, ok := d.blocks[lba+block.LBA(i)]; ok {
			out[i] = Found{State: Present, Place: at.place, CRC: at.crc}
			filled++
		}
	}
	if d.holes.Len() == 0 || filled == len(out) {
		return filled
	}
	end := lba + block.LBA(len(out))
	mark := func(s, e block.LBA) {
		for x := max(s, lba); x < min(e, end); x++ {
			if f := &out[x-lba]; f.State == None {
				f.State = Hole
				filled++
			}
		}
	}
	d.holes.Descend(lba, func(s, e block.LBA) bool { mark(s, e); return false })
	d.holes.Ascend(lba+1, func(s, e block.LBA) bool {
		mark(s, e)
		return s < end
	})
	return filled
}

// Pins keep the slots of blocks found by Lookup from changing hands. The zero value is ready; it
// must not be copied while it holds pins.
type Pins struct {
	space *tier.Space
	few   [4]int
	n     int
	more  []int
}

func (p *Pins) add(s *tier.Space, slot int) {
	for _, x := range p.few[:p.n] {
		if x == slot {
			return
		}
	}
	if slices.Contains(p.more, slot) {
		return
	}
	if !s.Pin(slot) { // Publish drops the index entries first, so this is our bug
		panic(fmt.Sprintf("writeback: %s changes hands with unpublished blocks", tier.Name(slot)))
	}
	p.space = s
	if p.n < len(p.few) {
		p.few[p.n] = slot
		p.n++
		return
	}
	p.more = append(p.more, slot)
}

// Release lets go of the slots. Pins may be used again.
func (p *Pins) Release() {
	for _, s := range p.few[:p.n] {
		p.space.Unpin(s)
	}
	for _, s := range p.more {
		p.space.Unpin(s)
	}
	p.n, p.more = 0, p.more[:0]
}

// Lookup tells for each block from lba on what the log knows, newest first, and pins the slots of
// those present until pins is released. It waits for no I/O. Safe for concurrent use.
func (l *Log) Lookup(disk block.DiskID, lba block.LBA, out []Found, pins *Pins) {
	clear(out)
	l.idx.RLock()
	defer l.idx.RUnlock()
	missing := len(out)
	for i := len(l.gens) - 1; i >= 0 && missing > 0; i-- {
		if d := l.gens[i].disks[disk]; d != nil {
			missing -= d.lookup(lba, out)
		}
	}
	for i := range out {
		if out[i].State == Present {
			pins.add(l.space, out[i].Place.Slot())
		}
	}
}

// ReadBlocks fills p, one block per Found: data is read, neighbours in one go, and checked; holes
// are zeroed; None is left alone. The caller holds the pins, or a Frozen not yet published. A block
// that fails its checksum gives ErrDamaged. disk and lba serve the error only.
func (l *Log) ReadBlocks(disk block.DiskID, lba block.LBA, found []Found, p []byte) error {
	for i := 0; i < len(found); {
		f := found[i]
		n := 1
		switch f.State {
		case Hole:
			clear(p[i*block.Size:][:block.Size])
		case Present:
			for i+n < len(found) && found[i+n].State == Present && found[i+n].Place == f.Place+tier.Place(n) {
				n++
			}
			if err := l.readRun(disk, lba+block.LBA(i), found[i:i+n], p[i*block.Size:][:n*block.Size]); err != nil {
				return err
			}
		}
		i += n
	}
	return nil
}

func (l *Log) readRun(disk block.DiskID, lba block.LBA, run []Found, p []byte) error {
	at := run[0].Place
	if err := l.space.ReadAt(at, p); err != nil {
		return fmt.Errorf("read disk %d block %d: %w", disk, lba, err)
	}
	for i, f := range run {
		if block.CRC(p[i*block.Size:][:block.Size]) != f.CRC {
			return fmt.Errorf("%w: %s block %d, holding block %d of disk %d, fails its checksum",
				ErrDamaged, tier.Name(at.Slot()), int(at.Block())+i, uint64(lba)+uint64(i), disk)
		}
	}
	return nil
}

// Frozen is the net effect of the records after the freeze before it, up to and including Seq. It
// does not change, and its slots stay, until it is published. Safe for concurrent use.
type Frozen struct {
	Seq Seq // the horizon of a cut made from it
	gen *generation
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
// It does not wait for stability: before a cut of it is committed, Sync must have succeeded.
func (l *Log) Freeze() *Frozen {
	l.idx.Lock()
	defer l.idx.Unlock()
	g := l.gens[len(l.gens)-1]
	l.gens = append(l.gens, newGeneration(g.last))
	return &Frozen{Seq: g.last, gen: g}
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
func (f *Frozen) Disks() []block.DiskID { return slices.Sorted(maps.Keys(f.gen.disks)) }

// Blocks lists a disk's data blocks by ascending LBA. It sorts anew at each call.
func (f *Frozen) Blocks(disk block.DiskID) []Block {
	d := f.gen.disks[disk]
	if d == nil {
		return nil
	}
	list := make([]Block, 0, len(d.blocks))
	for lba, at := range d.blocks {
		list = append(list, Block{LBA: lba, Place: at.place, CRC: at.crc})
	}
	slices.SortFunc(list, func(a, b Block) int { return cmp.Compare(a.LBA, b.LBA) })
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

// Dirty is what the cloud does not hold yet.
type Dirty struct {
	// Bytes is the net data, counted once per generation that holds it, and a block for each unmapped
	// range and each operation: it is 0 only if everything is published.
	Bytes  int64
	Oldest time.Time // of the first record, zero if there is none
}

// merge adds o to d.
func (d *Dirty) merge(o Dirty) {
	d.Bytes += o.Bytes
	if !o.Oldest.IsZero() && (d.Oldest.IsZero() || o.Oldest.Before(d.Oldest)) {
		d.Oldest = o.Oldest
	}
}

// add adds blocks whose oldest record is of that time, in ns since 1970, if it is not 0.
func (d *Dirty) add(blocks int, oldest int64) {
	o := Dirty{Bytes: int64(blocks) * block.Size}
	if oldest != 0 {
		o.Oldest = time.Unix(0, oldest)
	}
	d.merge(o)
}

func (g *generation) dirty() (sum Dirty) {
	for _, d := range g.disks {
		sum.add(len(d.blocks)+d.holes.Len(), 0)
	}
	sum.add(len(g.ops), g.oldest)
	return sum
}

// Unpublished is what a lost host would cost, in all.
func (l *Log) Unpublished() (sum Dirty) {
	l.idx.RLock()
	defer l.idx.RUnlock()
	for _, g := range l.gens {
		sum.merge(g.dirty())
	}
	return sum
}

// UnpublishedOf is what a lost host would cost one disk.
func (l *Log) UnpublishedOf(disk block.DiskID) (sum Dirty) {
	l.idx.RLock()
	defer l.idx.RUnlock()
	for _, g := range l.gens {
		if d := g.disks[disk]; d != nil {
			sum.add(len(d.blocks)+d.holes.Len(), d.oldest)
		}
		for _, o := range g.ops {
			if o.Disk == disk {
				sum.add(1, g.oldest)
			}
		}
	}
	return sum
}
