package cache

import (
	"math/bits"
	"slices"
	"sync"

	"graindisk/block"
)

// shard is one part of the index: a hash table by extent, open addressing with linear probing. A cell
// holds the entry's number, which is slot times blocks per slot plus its number within the slot, plus
// one; 0 is an empty cell. The bits that this leaves are the tag, part of the extent's hash, so that
// few foreign entries are looked at. Live entries of one extent never overlap.
//
//	31       n n-1            0      n = bits of the number of blocks of the tier
//	+---------+----------------+
//	| tag     | entry + 1      |
//	+---------+----------------+
//
// It grows by a quarter when it is five sixths full: 4.8 to 6 bytes per entry.
type shard struct {
	mu     sync.RWMutex
	cells  []uint32
	used   int
	blocks int64
	_      [8]byte
}

const (
	shardCount = 256
	cellsMin   = 16
)

// hash spreads extent names: the upper 8 bits choose the shard, the next 32 the cell, the lowest the tag.
func hash(id block.ExtentID) uint64 {
	h := uint64(id) * 0x9e3779b97f4a7c15
	h ^= h >> 32
	h *= 0xd6e8feb86659fd93
	return h ^ h>>32
}

func (s *shard) home(h uint64) int {
	return int(uint64(uint32(h>>24)) * uint64(len(s.cells)) >> 32)
}

func (s *shard) next(i int) int {
	if i++; i == len(s.cells) {
		return 0
	}
	return i
}

// cell is what the table holds for an entry.
func (c *Cache) cell(h uint64, slot int, entry uint32) uint32 {
	return uint32(h)<<c.refBits | (uint32(slot)*c.slotBlocks + entry + 1)
}

// entry is what a cell stands for.
func (c *Cache) entry(cell uint32) (info *slotInfo, slot int, entry uint32) {
	ref := cell&(1<<c.refBits-1) - 1
	slot = int(ref / c.slotBlocks)
	return c.slots[slot].Load(), slot, ref % c.slotBlocks
}

// tagged reports whether a cell may belong to an extent of that hash.
func (c *Cache) tagged(cell uint32, h uint64) bool {
	return (cell^uint32(h)<<c.refBits)>>c.refBits == 0
}

// find appends the runs that make up [off, off+blocks) of an extent, clipped and in order, each with
// its slot pinned, or pins nothing and reports false. While an entry is in the index its slot
// holds what the entry says or cannot be pinned, since DropSlot comes before the slot is used again.
// With touch, the read counts.
func (c *Cache) find(id block.ExtentID, off, blocks int, runs []run, touch bool) ([]run, bool) {
	h := hash(id)
	s := &c.shards[h>>56]
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.used == 0 {
		return nil, false
	}
	for i := s.home(h); s.cells[i] != 0; i = s.next(i) {
		if !c.tagged(s.cells[i], h) {
			continue
		}
		info, slot, n := c.entry(s.cells[i])
		if info.extent(n) != id {
			continue
		}
		r := info.run(slot, n)
		if r.off >= off+blocks || r.off+r.blocks <= off {
			continue
		}
		if touch && (r.blocks <= blocks || c.recent.first(h)) {
			info.touch(n)
		}
		runs = append(runs, r.clip(off, off+blocks))
	}
	if len(runs) > 1 {
		slices.SortFunc(runs, func(a, b run) int { return a.off - b.off })
	}
	end := off
	for _, r := range runs {
		if r.off != end {
			return nil, false
		}
		end += r.blocks
	}
	if end != off+blocks {
		return nil, false
	}
	for i, r := range runs {
		if !c.space.Pin(r.place.Slot()) {
			unpin(c.space, runs[:i])
			return nil, false
		}
	}
	return runs, true
}

// placed is an entry that is in its slot but not yet in the hash table.
type placed struct {
	slot  int
	entry uint32
}

// replace makes the entries all that is known of an extent.
func (c *Cache) replace(id block.ExtentID, entries []placed) {
	h := hash(id)
	s := &c.shards[h>>56]
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.used > 0 {
		for i := s.home(h); s.cells[i] != 0; {
			if c.tagged(s.cells[i], h) {
				if info, _, n := c.entry(s.cells[i]); info.extent(n) == id {
					c.removeLocked(s, i) // another cell may have come here
					continue
				}
			}
			i = s.next(i)
		}
	}
	for _, e := range entries {
		c.insertLocked(s, h, e)
	}
}

// insertMissing makes an entry known unless one that overlaps it is.
func (c *Cache) insertMissing(id block.ExtentID, e placed) {
	h := hash(id)
	s := &c.shards[h>>56]
	r := c.slots[e.slot].Load().run(e.slot, e.entry)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.used > 0 {
		for i := s.home(h); s.cells[i] != 0; i = s.next(i) {
			if !c.tagged(s.cells[i], h) {
				continue
			}
			info, slot, n := c.entry(s.cells[i])
			if info.extent(n) != id {
				continue
			}
			if o := info.run(slot, n); o.off < r.off+r.blocks && r.off < o.off+o.blocks {
				return
			}
		}
	}
	c.insertLocked(s, h, e)
}

// move makes to the place of what from was, or reports that from is not in the index any more.
func (c *Cache) move(id block.ExtentID, from, to placed) bool {
	h := hash(id)
	s := &c.shards[h>>56]
	s.mu.Lock()
	defer s.mu.Unlock()
	i := c.cellLocked(s, h, from)
	if i < 0 {
		return false
	}
	c.removeLocked(s, i)
	c.insertLocked(s, h, to)
	return true
}

// remove takes an entry out of the index, if it is there.
func (c *Cache) remove(id block.ExtentID, e placed) bool {
	h := hash(id)
	s := &c.shards[h>>56]
	s.mu.Lock()
	defer s.mu.Unlock()
	i := c.cellLocked(s, h, e)
	if i >= 0 {
		c.removeLocked(s, i)
	}
	return i >= 0
}

// alive reports whether an entry is in the index.
func (c *Cache) alive(id block.ExtentID, e placed) bool {
	h := hash(id)
	s := &c.shards[h>>56]
	s.mu.RLock()
	defer s.mu.RUnlock()
	return c.cellLocked(s, h, e) >= 0
}

// cellLocked is where an entry is in the table, or -1.
func (c *Cache) cellLocked(s *shard, h uint64, e placed) int {
	if s.used == 0 {
		return -1
	}
	want := c.cell(h, e.slot, e.entry)
	for i := s.home(h); s.cells[i] != 0; i = s.next(i) {
		if s.cells[i] == want {
			return i
		}
	}
	return -1
}

// insertLocked makes an entry known. Without memory for a larger table it does not: what is left in the
// slot is never found.
func (c *Cache) insertLocked(s *shard, h uint64, e placed) {
	if 6*(s.used+1) > 5*len(s.cells) && !c.resizeLocked(s, max(cellsMin, len(s.cells)+len(s.cells)/4)) {
		return
	}
	i := s.home(h)
	for s.cells[i] != 0 {
		i = s.next(i)
	}
	s.cells[i] = c.cell(h, e.slot, e.entry)
	s.used++
	info := c.slots[e.slot].Load()
	n := info.blocks(e.entry)
	s.blocks += int64(n)
	c.shares.use(info.disk(e.entry), n)
	info.live.Add(1)
	c.entries.Add(1)
	info.dirty.Store(true)
}

// removeLocked empties a cell and moves up those behind it that it was in the way of.
func (c *Cache) removeLocked(s *shard, i int) {
	info, _, entry := c.entry(s.cells[i])
	n := info.blocks(entry)
	s.used--
	s.blocks -= int64(n)
	c.shares.use(info.disk(entry), -n)
	info.live.Add(-1)
	c.entries.Add(-1)
	for j := s.next(i); s.cells[j] != 0; j = s.next(j) {
		other, _, n := c.entry(s.cells[j])
		home := s.home(hash(other.extent(n)))
		// It may move to i unless its home lies behind i, cyclically within (i, j].
		if i <= j && i < home && home <= j || i > j && (i < home || home <= j) {
			continue
		}
		s.cells[i] = s.cells[j]
		i = j
	}
	s.cells[i] = 0
}

// resizeLocked makes the table n cells long, if there is memory for that.
func (c *Cache) resizeLocked(s *shard, n int) bool {
	more := 4 * int64(n-len(s.cells))
	if more > 0 && !c.memory.reserve(more, false) {
		return false
	}
	if more < 0 {
		defer c.memory.used.Add(more)
	}
	old := s.cells
	s.cells = make([]uint32, n)
	for _, cell := range old {
		if cell == 0 {
			continue
		}
		info, _, n := c.entry(cell)
		i := s.home(hash(info.extent(n)))
		for s.cells[i] != 0 {
			i = s.next(i)
		}
		s.cells[i] = cell
	}
	return true
}

// shrink gives back the memory of tables that are less than a third full.
func (c *Cache) shrink() {
	for i := range c.shards {
		s := &c.shards[i]
		s.mu.Lock()
		if n := max(cellsMin, s.used+s.used/2); 2*n < len(s.cells) {
			c.resizeLocked(s, n)
		}
		s.mu.Unlock()
	}
}

// dropSlot forgets all entries of a slot and returns how many were live.
func (c *Cache) dropSlot(slot int, info *slotInfo) (dropped uint64) {
	if info.live.Load() == 0 {
		return 0
	}
	for i := range info.count() {
		if c.remove(info.extent(i), placed{slot, i}) {
			dropped++
		}
	}
	c.shrink()
	return dropped
}

func (s *shard) size() (entries int, blocks int64) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.used, s.blocks
}

// refBitsOf is how many bits name an entry, plus one for none.
func refBitsOf(slots, slotBlocks int) int { return bits.Len64(uint64(slots) * uint64(slotBlocks)) }
