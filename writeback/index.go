package writeback

import (
	"sync/atomic"

	"github.com/tidwall/btree"

	"graindisk/block"
	"graindisk/tier"
)

// checksums has the CRC of every block of the log's files: by slot, then by block in the slot, so that
// the index needs none. A file's list is made with its first block and dropped when its slot becomes
// clean; it is not used for another file, so who copied the list of lists still reads the old ones.
type checksums struct {
	slotBlocks int
	slots      []atomic.Pointer[[]uint32]
	files      *atomic.Int64 // lists there are
}

func newChecksums(s *tier.Space) checksums {
	return checksums{s.SlotBlocks(), make([]atomic.Pointer[[]uint32], s.Slots()), new(atomic.Int64)}
}

// put notes the checksums of blocks from a place on, before the index names them.
func (c *checksums) put(at tier.Place, crcs []uint32) {
	p := c.slots[at.Slot()].Load()
	if p == nil {
		list := make([]uint32, c.slotBlocks)
		p = &list
		c.slots[at.Slot()].Store(p)
		c.files.Add(1)
	}
	copy((*p)[at.Block():], crcs)
}

// putEncoded is put for checksums as they are stored; it reports false if the tier has no such place.
func (c *checksums) putEncoded(at tier.Place, b []byte) bool {
	n := len(b) / 4
	if at.Slot() >= len(c.slots) || uint64(at.Block())+uint64(n) > uint64(c.slotBlocks) {
		return false
	}
	c.put(at, nil)
	for i, list := 0, c.of(at, n); i < n; i++ {
		list[i] = le.Uint32(b[4*i:])
	}
	return true
}

// of is the checksums of n blocks from a place on. They do not change while an index names the blocks.
func (c *checksums) of(at tier.Place, n int) []uint32 {
	return (*c.slots[at.Slot()].Load())[at.Block():][:n]
}

// drop forgets a slot's blocks; no index names any.
func (c *checksums) drop(slot int) {
	if c.slots[slot].Swap(nil) != nil {
		c.files.Add(-1)
	}
}

// snapshot is the checksums of all blocks that are known now, whatever is dropped later.
func (c *checksums) snapshot() checksums {
	s := checksums{c.slotBlocks, make([]atomic.Pointer[[]uint32], len(c.slots)), new(atomic.Int64)}
	for i := range c.slots {
		s.slots[i].Store(c.slots[i].Load())
	}
	return s
}

// memory is what the checksums take, in bytes.
func (c *checksums) memory() int64 {
	return c.files.Load()*int64(c.slotBlocks)*4 + int64(len(c.slots))*8
}

// diskIndex is the net effect of a generation's records on one disk. A block in data is data even
// where holes covers it: an unmap takes out the blocks it hits, a later write puts them back.
type diskIndex struct {
	data   runs
	holes  btree.Map[block.LBA, block.LBA] // start → end; disjoint, not touching
	ops    int                             // OP records
	oldest int64                           // time of the first record, ns since 1970
}

// generation is the net effect of the records after the freeze before it, up to last.
type generation struct {
	last   Seq
	oldest int64 // time of the first record, 0 while there is none
	disks  map[block.DiskID]*diskIndex
	ops    []OpRecord
	units  int  // blocks, holes and operations, over all disks
	split  bool // by a checkpoint that will fold back into it what comes after: it is in no cut yet
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
		d = &diskIndex{oldest: now}
		g.disks[id] = d
	}
	return d
}

// units is what of d counts as unpublished.
func (d *diskIndex) units() int { return d.data.blocks + d.holes.Len() + d.ops }

// apply adds one record. For Data, place is that of the first block, whose checksums are known
// already. For Op, payload is kept.
func (g *generation) apply(seq Seq, now int64, e entry, place tier.Place, payload []byte) {
	g.last = seq
	d := g.disk(e.disk, now)
	before := d.units()
	switch e.kind {
	case Data:
		d.data.set(block.LBA(e.lba), int(e.blocks), place)
	case Unmap:
		d.unmap(block.LBA(e.lba), block.LBA(e.lba+e.blocks))
	case Op:
		d.ops++
		g.ops = append(g.ops, OpRecord{Seq: seq, Disk: e.disk, Payload: payload})
	}
	g.units += d.units() - before
}

// unmap makes [from, to) a hole, in steps of the runs and holes within it.
func (d *diskIndex) unmap(from, to block.LBA) {
	d.data.clear(from, to)
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
func (d *diskIndex) lookup(lba block.LBA, out []Found, crcs *checksums) (filled int) {
	end := lba + block.LBA(len(out))
	d.data.visit(lba, end, func(r run) bool {
		from, to := max(r.lba(), lba), min(r.end(), end)
		place := r.place + tier.Place(from-r.lba())
		sums := crcs.of(place, int(to-from))
		for i := range sums {
			if f := &out[int(from-lba)+i]; f.State == None {
				*f = Found{State: Present, Place: place + tier.Place(i), CRC: sums[i]}
				filled++
			}
		}
		return true
	})
	if d.holes.Len() == 0 || filled == len(out) {
		return filled
	}
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

// merge applies a later generation on top of g.
func (g *generation) merge(from *generation) {
	for id, d := range from.disks {
		to := g.disk(id, d.oldest)
		before := to.units()
		d.holes.Scan(func(s, e block.LBA) bool { to.unmap(s, e); return true })
		d.data.visit(0, lbaMax, func(r run) bool { to.data.set(r.lba(), r.blocks(), r.place); return true })
		to.ops += d.ops
		g.units += to.units() - before
	}
	g.mergeRest(from)
}

// mergeRest takes over what a later generation has beside its disks.
func (g *generation) mergeRest(from *generation) {
	if from.oldest != 0 && (g.oldest == 0 || from.oldest < g.oldest) {
		g.oldest = from.oldest
	}
	g.ops = append(g.ops, from.ops...)
	g.last = from.last
}

// memory is what the generation's index takes, in bytes.
func (g *generation) memory() (n int64) {
	for _, d := range g.disks {
		n += diskBytes + d.data.memory() + int64(d.holes.Len())*holeBytes
	}
	for _, o := range g.ops {
		n += opBytes + int64(len(o.Payload))
	}
	return n
}

// What things in a generation take, beside what they hold; the share of a hole in its tree and that of
// a disk in the map are rounded up.
const (
	diskBytes = 256
	holeBytes = 40
	opBytes   = 40
)

// IndexBytes is the memory that the index takes: all generations and the checksums, room to grow
// included.
func (l *Log) IndexBytes() int64 {
	l.idx.RLock()
	defer l.idx.RUnlock()
	n := l.crcs.memory()
	for _, g := range l.gens {
		n += g.memory()
	}
	return n
}
