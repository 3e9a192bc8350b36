// Package cache finds clean blocks on the SSD tier by the name of the extent they belong to, so that
// clones of a disk share one copy. It holds an index and the slots it fills itself; what is in
// the other slots was written by the log and adopted once it had been published, without copying.
//
//	log ── Adopt ──►  index: extent, blocks ─► slot, block     (16 shards by extent)
//	store ── Fill ─►  per slot: CRC32C of every block          (one table while the slot is known)
//	                  Read: index ► pin the slot ► read ► compare the CRCs ► unpin
//
// The cache promises nothing: a block that is gone, unreadable or fails its checksum is a miss.
// What it returns has been checked since it was last at rest.
//
// A slot that the cache fills starts with one header block and is never synced; the header's random
// id is what tells, after a restart, that the slot still holds what the saved index says.
//
//	0       4         6       8          16   32    4092  4096
//	+-------+---------+-------+----------+----+------+-----+-----------+
//	| GDCS  | version | flags | incompat | id | zero | crc | blocks ...|
//	+-------+---------+-------+----------+----+------+-----+-----------+
//
// Memory: 24 bytes per run of adjacent blocks of one extent, 4 to 8 for its place in a hash
// chain, 4 per block of a slot in use for the CRCs; without pointers. With the slab's spare room that
// is 1.5 MiB per GiB of tier at 64 KiB extents and 9.6 MiB at 4 KiB (BenchmarkIndexMemory).
//
// Extent names are unique within a pool, so each pool has a Cache of its own; all may share one
// tier. The tier's evict callback must call DropSlot of each.
package cache

import (
	"fmt"
	"log/slog"
	"sync/atomic"

	"github.com/zeebo/xxh3"

	"graindisk/block"
	"graindisk/internal/planted"
	"graindisk/tier"
)

// space is what the cache needs of a tier.Space.
type space interface {
	Slots() int
	SlotBlocks() int
	Exists(slot int) bool
	Take(reserve int) (int, error)
	Prewrite(slot int) error
	SetClean(slot int)
	Free(slot int)
	Pin(slot int) bool
	Unpin(slot int)
	ReadAt(at tier.Place, p []byte) error
	WriteAt(at tier.Place, bufs [][]byte) error
}

// ExtentBlocksMax is the longest extent that is cached; longer ones are always a miss.
const ExtentBlocksMax = 1<<lengthBits - 1

// BlockRef is one block on the tier and the CRC32C it must have.
type BlockRef struct {
	Place tier.Place
	CRC   uint32
}

// Options of a cache; a zero field means its default.
type Options struct {
	Reserve int          // slots that filling leaves free or clean for the log; default 2
	Log     *slog.Logger // default: nowhere
}

// Cache is safe for concurrent use.
type Cache struct {
	space      space
	slotBlocks uint32
	reserve    int
	log        *slog.Logger
	shards     [shardCount]shard
	slots      []atomic.Pointer[slotInfo] // by slot; nil while the cache knows nothing in it
	age        atomic.Uint64
	fill       filler
	flights    flights
	counters   counters
}

// slotInfo is what the cache knows of one slot from its first block there until the slot is evicted.
type slotInfo struct {
	age   uint64          // rises with each slot that becomes known
	stamp uint64          // hash of the slot's first block, which no two tenures share; 0 if unknown
	crcs  []atomic.Uint32 // by block
}

type counters struct {
	hits, misses, fills, fillsSkipped, evicted, crcFailures, readErrors, fetches, shared atomic.Uint64
}

// New makes an empty cache over the slots of s.
func New(s space, o Options) (*Cache, error) {
	if o.Reserve == 0 {
		o.Reserve = 2
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if s.Slots() > 1<<slotBits || s.SlotBlocks() > 1<<blockBits {
		return nil, fmt.Errorf("cache: %d slots of %d blocks: at most %d of %d",
			s.Slots(), s.SlotBlocks(), 1<<slotBits, 1<<blockBits)
	}
	c := &Cache{
		space: s, slotBlocks: uint32(s.SlotBlocks()), reserve: o.Reserve, log: o.Log,
		slots: make([]atomic.Pointer[slotInfo], s.Slots()),
		fill:  filler{open: noSlot, next: noSlot},
	}
	for i := range c.shards {
		c.shards[i].init(s.Slots())
	}
	c.flights.init()
	return c, nil
}

// Adopt makes published blocks of the log part of the cache: refs[i] is block i of the extent. The
// slots are still busy: the caller makes them clean afterwards.
func (c *Cache) Adopt(id block.ExtentID, refs []BlockRef) {
	if len(refs) == 0 || len(refs) > ExtentBlocksMax {
		return
	}
	var buf [8]run
	runs := buf[:0]
	for i, ref := range refs {
		c.info(ref.Place.Slot()).crcs[ref.Place.Block()].Store(ref.CRC)
		if n := len(runs); n > 0 && runs[n-1].follows(ref.Place) {
			runs[n-1].blocks++
			continue
		}
		runs = append(runs, run{place: ref.Place, off: i, blocks: 1})
	}
	c.shard(id).replace(id, runs)
}

// info is what is known of a slot, which the caller keeps from being evicted.
func (c *Cache) info(slot int) *slotInfo {
	if s := c.slots[slot].Load(); s != nil {
		return s
	}
	s := &slotInfo{age: c.age.Add(1), stamp: c.stamp(slot), crcs: make([]atomic.Uint32, c.slotBlocks)}
	if c.slots[slot].CompareAndSwap(nil, s) {
		return s
	}
	return c.slots[slot].Load()
}

// stamp hashes the first block of a slot; 0 if it cannot be read.
func (c *Cache) stamp(slot int) uint64 {
	var p [block.Size]byte
	if err := c.space.ReadAt(tier.NewPlace(slot, 0), p[:]); err != nil {
		return 0
	}
	return xxh3.Hash(p[:])
}

// Read fills p with blocks [off, off+blocks) of the extent and reports true, or reports false if not
// all of them are there and good; p is then undefined. len(p) must be blocks times block.Size.
func (c *Cache) Read(id block.ExtentID, off, blocks int, p []byte) bool {
	if c.read(id, off, blocks, p) {
		c.counters.hits.Add(1)
		return true
	}
	c.counters.misses.Add(1)
	return false
}

func (c *Cache) read(id block.ExtentID, off, blocks int, p []byte) bool {
	if len(p) != blocks*block.Size {
		panic(fmt.Errorf("cache: read of %d blocks into %d bytes", blocks, len(p)))
	}
	var buf [16]run
	runs, ok := c.shard(id).find(id, off, blocks, buf[:0], c.space)
	if !ok {
		return false
	}
	good := true
	for _, r := range runs {
		if good {
			good = c.readRun(id, r, p[(r.off-off)*block.Size:][:r.blocks*block.Size])
		}
		c.space.Unpin(r.place.Slot())
	}
	if !good {
		c.Drop(id)
	}
	return good
}

// readRun fills p from the pinned slot and checks it.
func (c *Cache) readRun(id block.ExtentID, r run, p []byte) bool {
	if err := c.space.ReadAt(r.place, p); err != nil {
		c.counters.readErrors.Add(1)
		c.log.Warn("cached blocks cannot be read", "extent", id, "slot", r.place.Slot(), "error", err)
		return false
	}
	crcs := c.slots[r.place.Slot()].Load().crcs[r.place.Block():]
	for i := range r.blocks {
		if block.CRC(p[i*block.Size:(i+1)*block.Size]) != crcs[i].Load() && !planted.Bug("cache: checksum not compared") {
			c.counters.crcFailures.Add(1)
			c.log.Warn("cached block failed its checksum", "extent", id, "block", r.off+i,
				"slot", r.place.Slot(), "at", int(r.place.Block())+i)
			return false
		}
	}
	return true
}

// has reports whether all blocks of an extent are in the index.
func (c *Cache) has(id block.ExtentID, blocks int) bool {
	var buf [16]run
	runs, ok := c.shard(id).find(id, 0, blocks, buf[:0], c.space)
	if ok {
		unpin(c.space, runs)
	}
	return ok
}

func unpin(s space, runs []run) {
	for _, r := range runs {
		s.Unpin(r.place.Slot())
	}
}

// Drop forgets an extent.
func (c *Cache) Drop(id block.ExtentID) { c.shard(id).replace(id, nil) }

// DropSlot forgets all blocks on a slot. The tier's evict callback calls it, when the slot can no
// longer be pinned; whoever frees a slot of which blocks were adopted calls it first.
func (c *Cache) DropSlot(slot int) {
	if c.slots[slot].Load() == nil || planted.Bug("cache: slot reused without forgetting it") {
		return
	}
	for i := range c.shards {
		c.counters.evicted.Add(c.shards[i].dropSlot(slot))
	}
	c.slots[slot].Store(nil)
}

// Close ends filling and the fetches under way, and waits for them. No other method may be under way
// or be called later, except Fetch, which fails with ErrClosed.
func (c *Cache) Close() {
	c.flights.close()
	c.closeFill()
}

// Stats are counts since New and the present size.
type Stats struct {
	Hits, Misses uint64 // calls of Read
	Fills        uint64 // extents filled
	FillsSkipped uint64 // for want of a slot
	Evicted      uint64 // entries that left with their slot
	CRCFailures  uint64 // blocks that were not what was stored
	ReadErrors   uint64
	Fetches      uint64 // calls of get
	Shared       uint64 // calls of Fetch that shared another's get
	Entries      int    // runs of adjacent blocks in the index
	Bytes        int64  // of the blocks in the index
	MemoryBytes  int64  // of the index itself
}

// Stats counts.
func (c *Cache) Stats() Stats {
	n := &c.counters
	s := Stats{
		Hits: n.hits.Load(), Misses: n.misses.Load(), Fills: n.fills.Load(), FillsSkipped: n.fillsSkipped.Load(),
		Evicted: n.evicted.Load(), CRCFailures: n.crcFailures.Load(), ReadErrors: n.readErrors.Load(),
		Fetches: n.fetches.Load(), Shared: n.shared.Load(),
	}
	for i := range c.shards {
		entries, blocks, memory := c.shards[i].size()
		s.Entries += entries
		s.Bytes += blocks * block.Size
		s.MemoryBytes += memory
	}
	for i := range c.slots {
		if c.slots[i].Load() != nil {
			s.MemoryBytes += 4 * int64(c.slotBlocks)
		}
	}
	return s
}

const shardCount = 16

// hash spreads extent names: the upper 4 bits choose the shard, those below the bucket.
func hash(id block.ExtentID) uint64 { return uint64(id) * 0x9e3779b97f4a7c15 }

func (c *Cache) shard(id block.ExtentID) *shard { return &c.shards[hash(id)>>60] }
