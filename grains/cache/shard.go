package cache

import (
	"slices"
	"sync"

	"graindisk/block"
	"graindisk/tier"
)

// run is adjacent blocks of one extent that are adjacent on the tier too.
type run struct {
	place  tier.Place
	off    int // of the first block, within the extent
	blocks int
}

// follows reports whether next is the block behind r.
func (r run) follows(next tier.Place) bool {
	return r.place.Slot() == next.Slot() && r.place.Block()+uint32(r.blocks) == next.Block()
}

// entry is a run in the index. A dead one is out of its hash chain but stays in its slot's list until
// the slot is evicted; a free one waits to be used again. Links are indexes into the slab, 0 ends.
//
//	63        44 43            20 19    10 9         0
//	+-----------+----------------+--------+-----------+
//	| slot      | block          | off    | blocks    |  loc; blocks = 0 is dead or free
//	+-----------+----------------+--------+-----------+
type entry struct {
	extent   block.ExtentID
	loc      uint64
	next     uint32 // in the hash chain, or in the free list
	slotNext uint32 // in the slot's list
}

const (
	entryBytes = 24
	slotBits   = 20
	blockBits  = 24
	lengthBits = 10
	lengthMask = 1<<lengthBits - 1
)

func newEntry(id block.ExtentID, r run) entry {
	return entry{extent: id, loc: uint64(r.place.Slot())<<44 | uint64(r.place.Block())<<20 |
		uint64(r.off)<<lengthBits | uint64(r.blocks)}
}

func (e *entry) run() run {
	place := tier.NewPlace(int(e.loc>>44), uint32(e.loc>>20)&(1<<blockBits-1))
	return run{place: place, off: int(e.loc>>lengthBits) & lengthMask, blocks: e.blocks()}
}

func (e *entry) blocks() int { return int(e.loc & lengthMask) }

// shard is one sixteenth of the index: a hash table whose entries are also listed by slot.
// Live entries of one extent never overlap.
type shard struct {
	mu      sync.RWMutex
	slab    []entry  // slab[0] is not used
	free    uint32   // first of the free list
	buckets []uint32 // heads of the hash chains; a power of two of them
	bySlot  []uint32 // heads of the slots' lists
	live    int      // entries in hash chains
	blocks  int64    // of those
}

func (s *shard) init(slots int) {
	s.slab = make([]entry, 1)
	s.buckets = make([]uint32, 16)
	s.bySlot = make([]uint32, slots)
}

func (s *shard) bucketLocked(id block.ExtentID) *uint32 {
	return &s.buckets[uint32(hash(id)>>28)&uint32(len(s.buckets)-1)]
}

// find appends the runs that make up [off, off+blocks) of an extent, clipped and in order, each with
// its slot pinned, or pins nothing and reports false. While an entry is in the index its slot
// holds what the entry says or cannot be pinned, since DropSlot comes before the slot is used again.
func (s *shard) find(id block.ExtentID, off, blocks int, runs []run, pins space) ([]run, bool) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	for i := *s.bucketLocked(id); i != 0; i = s.slab[i].next {
		e := &s.slab[i]
		if e.extent != id {
			continue
		}
		if r := e.run(); r.off < off+blocks && r.off+r.blocks > off {
			runs = append(runs, r.clip(off, off+blocks))
		}
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
		if !pins.Pin(r.place.Slot()) {
			unpin(pins, runs[:i])
			return nil, false
		}
	}
	return runs, true
}

// clip is the part of r within the extent's blocks [from, to).
func (r run) clip(from, to int) run {
	if head := from - r.off; head > 0 {
		r = run{place: tier.NewPlace(r.place.Slot(), r.place.Block()+uint32(head)), off: from, blocks: r.blocks - head}
	}
	r.blocks = min(r.blocks, to-r.off)
	return r
}

// replace makes runs all that is known of an extent.
func (s *shard) replace(id block.ExtentID, runs []run) {
	s.mu.Lock()
	defer s.mu.Unlock()
	link := s.bucketLocked(id)
	for i := *link; i != 0; i = *link {
		if e := &s.slab[i]; e.extent == id {
			*link = e.next
			s.killLocked(e)
		} else {
			link = &e.next
		}
	}
	for _, r := range runs {
		s.addLocked(id, r)
	}
}

// add makes a run known, which overlaps none that is.
func (s *shard) add(id block.ExtentID, r run) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.addLocked(id, r)
}

func (s *shard) addLocked(id block.ExtentID, r run) {
	if s.live >= len(s.buckets) {
		s.growLocked()
	}
	i := s.free
	if i != 0 {
		s.free = s.slab[i].next
	} else {
		i = uint32(len(s.slab))
		s.slab = append(s.slab, entry{})
	}
	e := newEntry(id, r)
	bucket, list := s.bucketLocked(id), &s.bySlot[r.place.Slot()]
	e.next, e.slotNext = *bucket, *list
	*bucket, *list = i, i
	s.slab[i] = e
	s.live++
	s.blocks += int64(r.blocks)
}

// growLocked doubles the buckets.
func (s *shard) growLocked() {
	old := s.buckets
	s.buckets = make([]uint32, 2*len(old))
	for _, i := range old {
		for i != 0 {
			e := &s.slab[i]
			next, head := e.next, s.bucketLocked(e.extent)
			e.next, *head = *head, i
			i = next
		}
	}
}

// killLocked counts an entry out that has left its hash chain.
func (s *shard) killLocked(e *entry) {
	s.live--
	s.blocks -= int64(e.blocks())
	e.loc &^= lengthMask
}

// dropSlot forgets all entries of a slot and returns how many were live.
func (s *shard) dropSlot(slot int) uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	before := s.live
	for i := s.bySlot[slot]; i != 0; {
		e := &s.slab[i]
		if e.blocks() > 0 {
			s.unlinkLocked(i)
			s.killLocked(e)
		}
		e.next, s.free = s.free, i
		i = e.slotNext
	}
	s.bySlot[slot] = 0
	return uint64(before - s.live)
}

// unlinkLocked takes entry i out of its hash chain.
func (s *shard) unlinkLocked(i uint32) {
	link := s.bucketLocked(s.slab[i].extent)
	for *link != i {
		link = &s.slab[*link].next
	}
	*link = s.slab[i].next
}

// collect appends the live entries of a slot.
func (s *shard) collect(slot int, out []entry) []entry {
	s.mu.RLock()
	defer s.mu.RUnlock()
	for i := s.bySlot[slot]; i != 0; i = s.slab[i].slotNext {
		if e := s.slab[i]; e.blocks() > 0 {
			out = append(out, e)
		}
	}
	return out
}

func (s *shard) size() (entries int, blocks, memory int64) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	memory = int64(cap(s.slab))*entryBytes + 4*int64(len(s.buckets)+len(s.bySlot))
	return s.live, s.blocks, memory
}
