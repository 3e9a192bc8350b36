package cache

import (
	"sync"
	"sync/atomic"

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

// clip is the part of r within the extent's blocks [from, to).
func (r run) clip(from, to int) run {
	if head := from - r.off; head > 0 {
		r = run{place: tier.NewPlace(r.place.Slot(), r.place.Block()+uint32(head)), off: from, blocks: r.blocks - head}
	}
	r.blocks = min(r.blocks, to-r.off)
	return r
}

// slotInfo is what the cache knows of one slot from its first block there until the slot is evicted.
// Entries are only added; one that is in no hash table any more is dead.
type slotInfo struct {
	age   uint64 // rises with each slot that becomes known
	stamp uint64 // hash of the slot's first block, which no two tenures share; 0 if unknown
	kept  bool   // a slot of the main queue
	saved bool   // known from its file, which has not been read yet; there are no CRCs and no entries
	crcs  []atomic.Uint32

	memory atomic.Int64 // reserved for all this

	live  atomic.Int32 // entries in the hash tables
	dirty atomic.Bool  // there are entries that its file has not

	mu     sync.Mutex // for adding
	n      uint32
	chunks []atomic.Pointer[chunk]
}

// chunk is entries in the order in which they came, without pointers and without room for growth.
type chunk struct {
	extent [chunkLen]block.ExtentID
	loc    [chunkLen]uint32
	reads  [chunkLen / 16]atomic.Uint32 // two bits each: reads since it came here, at most 3
	disk   [chunkLen]uint8
}

// The place of an entry within its slot:
//
//	31         12 11    6 5          0
//	+------------+-------+------------+
//	| block      | off   | blocks - 1 |
//	+------------+-------+------------+
const (
	chunkLen   = 256
	blockBits  = 20
	lengthBits = 6
	lengthMask = 1<<lengthBits - 1
)

func packLoc(r run) uint32 {
	return r.place.Block()<<(2*lengthBits) | uint32(r.off)<<lengthBits | uint32(r.blocks-1)
}

func unpackLoc(slot int, loc uint32) run {
	return run{
		place: tier.NewPlace(slot, loc>>(2*lengthBits)),
		off:   int(loc >> lengthBits & lengthMask), blocks: int(loc&lengthMask) + 1,
	}
}

func newSlotInfo(slotBlocks uint32) *slotInfo {
	return &slotInfo{
		crcs:   make([]atomic.Uint32, slotBlocks),
		chunks: make([]atomic.Pointer[chunk], (slotBlocks+chunkLen-1)/chunkLen),
	}
}

// newEntry is one run of an extent that a disk brought in.
type newEntry struct {
	id   block.ExtentID
	disk uint8
	run
}

// add appends an entry and returns its number; false if the slot has as many as blocks already, which
// needs the same blocks under several names, or if more refuses the memory for another chunk.
func (s *slotInfo) add(e newEntry, more func() bool) (uint32, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if int(s.n) >= len(s.crcs) {
		return 0, false
	}
	i := s.n
	p := &s.chunks[i/chunkLen]
	if p.Load() == nil {
		if !more() {
			return 0, false
		}
		p.Store(new(chunk))
	}
	c := p.Load()
	c.extent[i%chunkLen], c.loc[i%chunkLen], c.disk[i%chunkLen] = e.id, packLoc(e.run), e.disk
	s.n++
	return i, true
}

// count is how many entries there are, dead ones among them.
func (s *slotInfo) count() uint32 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.n
}

func (s *slotInfo) chunk(i uint32) *chunk          { return s.chunks[i/chunkLen].Load() }
func (s *slotInfo) extent(i uint32) block.ExtentID { return s.chunk(i).extent[i%chunkLen] }
func (s *slotInfo) disk(i uint32) uint8            { return s.chunk(i).disk[i%chunkLen] }
func (s *slotInfo) run(slot int, i uint32) run     { return unpackLoc(slot, s.chunk(i).loc[i%chunkLen]) }
func (s *slotInfo) blocks(i uint32) int            { return int(s.chunk(i).loc[i%chunkLen]&lengthMask) + 1 }
func (s *slotInfo) word(i uint32) (*atomic.Uint32, uint32) {
	return &s.chunk(i).reads[i%chunkLen/16], 2 * (i % 16)
}

// reads is how often an entry was read, up to 3.
func (s *slotInfo) reads(i uint32) uint32 {
	w, shift := s.word(i)
	return w.Load() >> shift & 3
}

// touch counts a read. A count lost to another one at the same time does not matter.
func (s *slotInfo) touch(i uint32) {
	w, shift := s.word(i)
	if v := w.Load(); v>>shift&3 < 3 {
		w.CompareAndSwap(v, v+1<<shift)
	}
}

// setReads sets the count of an entry that nobody has found yet.
func (s *slotInfo) setReads(i, reads uint32) {
	w, shift := s.word(i)
	w.Or(reads << shift)
}
