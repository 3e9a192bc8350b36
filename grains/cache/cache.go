// Package cache finds clean blocks on the SSD tier by the name of the extent they belong to, so that
// clones of a disk share one copy. It holds an index and the slots it fills itself; what is in
// the other slots was written by the log and adopted once it had been published, without copying.
//
//	log ── Adopt ──►  index: extent, blocks ─► slot, block     (256 shards by extent)
//	store ── Fill ─►  per slot: its entries and the CRC32C of every block
//	                  Read: RAM ► index ► pin the slot ► read ► compare the CRCs ► unpin
//
// The cache promises nothing: a block that is gone, unreadable or fails its checksum is a miss.
// What it returns has been checked since it was last at rest.
//
// Slots are evicted whole, in two queues, before they are needed (S3-FIFO):
//
//	Adopt, first Fill ─► small ── read since ──► main ◄─┐ read again since
//	                       │        (copied)      │ ────┘
//	                       └──────► ghost ◄───────┘
//	                                  └── Fill of a name it remembers ─► main
//
// The small queue is the slots of the log and those of first fills; it is reduced first while it has
// more than a tenth of the clean slots. Copies are at most half of a slot from small, three quarters of one
// from main; what is only written is never copied. Reading by zipf (s = 1) from four times the tier, with
// and without as many reads of a scan woven in, the zipf part hits (TestScanRobsNobody)
//
//	          alone    beside a scan
//	this     83.2 %        81.9 %
//	LRU      81.5 %        66.7 %
//	FIFO     78.1 %        61.6 %
//
// whatever the length of the extents, since the ghost grows with their number: with one for 64 KiB extents the scan
// costs 4.5 points at 4 KiB, with half of what it has now 3.
//
// A full tier is apportioned between disks (shares.go). With four disks whose working sets are 1, 2, 4 and
// 8 sixths of the tier there are 1.07 times the misses of the best fixed split of an LRU, after 20
// periods and again 20 periods after the sets have swapped; a scanner beside them costs each disk less
// than 2 points (TestSharesFollowTheWorkingSets).
//
// What nothing maps any more is dropped by name (Forget) as soon as the maps tell, on the tier and in RAM, and is not
// filled again; after a restart Sweep drops what the saved index still names. A slot in which nothing is
// left is given back by the next Save, one in which little is left loses it as if it had not been read.
//
// The RAM cache answers a 4 KiB read for 0.6 µs of CPU where the page cache and the CRC take 1.6; not to
// find one there costs nothing that can be measured (BenchmarkReadHit). It answers what it has without
// counting a read on the tier; eviction there asks it instead.
//
// A slot that the cache fills starts with one header block and is never synced; the header's random
// id is what tells, after a restart, that the slot still holds what the saved index says.
//
//	0       4         6       8          16   32    4092  4096
//	+-------+---------+-------+----------+----+------+-----+-----------+
//	| GDCS  | version | flags | incompat | id | zero | crc | blocks ...|
//	+-------+---------+-------+----------+----+------+-----+-----------+
//
// The index of a slot is kept beside it, in slot-NNNNNN.idx (save.go): written once, when the slot is clean,
// and never synced either. After a restart only the heads of these files are read before the
// cache serves; the rest comes in the background.
//
// Memory, all without pointers: per run of adjacent blocks of one extent 13.25 bytes for the entry and
// 4.8 to 6 for its place in the hash table, per block of a slot in use 4 for the CRC, per 64 KiB of
// tier, or per entry if there are more, 4 for the ghost. That is 1.4 MiB per GiB of tier at 64 KiB extents and 5.6
// to 5.9 MiB at 4 KiB (TestIndexMemory), where a ghost that has grown takes another 0.9. With Options.IndexBytes that is bounded, exactly (memory.go): near the bound the oldest
// slots are evicted, at it nothing more is cached, so that a tier too large for its memory is used in part.
//
// Extent names are unique within a pool, so each pool has a Cache of its own; all may share one
// tier. The tier's evict callback must call DropSlot of each, the take callback MakeRoom.
package cache

import (
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/zeebo/xxh3"

	"graindisk/block"
	"graindisk/internal/planted"
	"graindisk/internal/vfs"
	"graindisk/tier"
)

// space is what the cache needs of a tier.Space.
type space interface {
	Slots() int
	Usable() int
	SlotBlocks() int
	Exists(slot int) bool
	Counts() (free, busy, clean int)
	Kept() int
	Clean(slot int) bool
	Oldest(kept bool) (slot int, ok bool)
	Take(reserve int) (int, error)
	Evict(slot int) bool
	Reclaim(n, keep int) error
	Prewrite(slot int) error
	SetClean(slot int)
	SetKept(slot int)
	Free(slot int)
	Pin(slot int) bool
	Unpin(slot int)
	ReadAt(at tier.Place, p []byte) error
	WriteAt(at tier.Place, bufs [][]byte) error
}

// ExtentBlocksMax is the longest extent that is cached, a grain of 256 KiB; longer ones are always a miss.
const ExtentBlocksMax = 1 << lengthBits

// BlockRef is one block on the tier and the CRC32C it must have.
type BlockRef struct {
	Place tier.Place
	CRC   uint32
}

// ErrMemory means a bound of the index that is too low for the tier.
var ErrMemory = errors.New("too little memory for the tier")

// Options of a cache; a zero field means its default.
type Options struct {
	Reserve  int   // slots that filling leaves free or clean for the log; default 2
	RAMBytes int64 // bound of the RAM cache, everything counted; default none
	// IndexBytes bounds the memory of the index; what it has no room for is not cached. Default: no bound.
	IndexBytes int64
	FS         vfs.FS           // where the index is saved; default nowhere
	Dir        string           // of the tier
	Now        func() time.Time // for the periods of the shares; default time.Now
	Log        *slog.Logger     // default: nowhere
}

// Cache is safe for concurrent use.
type Cache struct {
	space      space
	fs         vfs.FS // nil: the index is not saved
	dir        string
	slotBlocks uint32
	refBits    int // of a cell that name an entry
	reserve    int
	ahead      int // free slots below which slots are evicted
	useMain    bool
	log        *slog.Logger
	shards     [shardCount]shard
	slots      []atomic.Pointer[slotInfo] // by slot; nil while the cache knows nothing in it
	age        atomic.Uint64
	small      filler
	main       filler
	evictor    evictor
	ghost      ghost
	recent     recent
	shares     shares
	ram        *ram           // nil: none
	loading    sync.WaitGroup // of Load
	loaded     chan struct{}  // closed when Load has found all
	work       sync.WaitGroup // all else in the background; what starts there may start more
	closing    atomic.Bool
	counters   counters
	entries    atomic.Int64 // in the index
	memory     memory
}

// counters are counted as things happen; those of two are of the small and of the main queue.
type counters struct {
	hits, fills, slotsEvicted                              [2]atomic.Uint64
	ramHits, misses, remembered, fillsSkipped, filledBytes atomic.Uint64
	adoptsSkipped, moved, movedBytes, evicted, forgotten   atomic.Uint64
	crcFailures, readErrors                                atomic.Uint64
}

// queue is which of two counters a slot's go to.
func (s *slotInfo) queue() int {
	if s.kept {
		return 1
	}
	return 0
}

// New makes an empty cache over the slots of s.
func New(s space, o Options) (*Cache, error) {
	if o.Reserve == 0 {
		o.Reserve = 2
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	blocks := int64(s.Slots()) * int64(s.SlotBlocks())
	if blocks >= 1<<32 || s.SlotBlocks() > 1<<blockBits {
		return nil, fmt.Errorf("cache: %d slots of %d blocks: at most %d blocks, %d in a slot",
			s.Slots(), s.SlotBlocks(), int64(1<<32-1), 1<<blockBits)
	}
	if least := memoryMin(s.Slots(), uint32(s.SlotBlocks())); o.IndexBytes > 0 && o.IndexBytes < least {
		return nil, fmt.Errorf("cache: %d bytes for the index of %d slots of %d bytes: %w, at least %d are needed",
			o.IndexBytes, s.Slots(), s.SlotBlocks()*block.Size, ErrMemory, least)
	}
	c := &Cache{
		space: s, fs: o.FS, dir: o.Dir, slotBlocks: uint32(s.SlotBlocks()), reserve: o.Reserve, log: o.Log,
		refBits: refBitsOf(s.Slots(), s.SlotBlocks()),
		ahead:   min(aheadMax, max(1, s.Usable()/32)),
		useMain: s.Usable() >= mainSlotsMin,
		slots:   make([]atomic.Pointer[slotInfo], s.Slots()),
		small:   filler{open: noSlot, next: noSlot},
		main:    filler{open: noSlot, next: noSlot, kept: true},
		loaded:  make(chan struct{}),
	}
	if o.RAMBytes > 0 {
		var err error
		if c.ram, err = newRAM(o.RAMBytes); err != nil {
			return nil, err
		}
	}
	c.small.prepared.L, c.main.prepared.L = &c.small.mu, &c.main.mu
	c.ghost.init(blocks)
	c.shares.init(o.Now)
	c.memory.init(o.IndexBytes, c.slotBlocks)
	c.memory.used.Store(4*int64(len(c.ghost.cells)) + recentBytes + shardCount*shardBytes + 8*int64(len(c.slots)))
	return c, nil
}

// Adopt makes published blocks of the log part of the cache: refs[i] is block i of the extent, which
// disk wrote. The slots are still busy: the caller makes them clean afterwards.
func (c *Cache) Adopt(disk block.DiskID, id block.ExtentID, refs []BlockRef) {
	if len(refs) == 0 || len(refs) > ExtentBlocksMax {
		return
	}
	var buf [8]run
	runs := buf[:0]
	for i, ref := range refs {
		info := c.info(ref.Place.Slot())
		if info == nil {
			c.counters.adoptsSkipped.Add(1)
			c.makeMemory()
			return
		}
		info.crcs[ref.Place.Block()].Store(ref.CRC)
		if n := len(runs); n > 0 && runs[n-1].follows(ref.Place) {
			runs[n-1].blocks++
			continue
		}
		runs = append(runs, run{place: ref.Place, off: i, blocks: 1})
	}
	var placedBuf [8]placed
	entries := placedBuf[:0]
	for _, r := range runs {
		slot := r.place.Slot()
		e, ok := c.add(c.info(slot), newEntry{id, uint8(disk), r}, false)
		if !ok {
			c.counters.adoptsSkipped.Add(1)
			break // an extent that is not whole would only take room
		}
		entries = append(entries, placed{slot, e})
	}
	if len(entries) == len(runs) {
		c.replace(id, entries)
	}
	c.makeMemory()
}

// info is what is known of a slot, which the caller keeps from being evicted; nil if there is no memory
// to know anything.
func (c *Cache) info(slot int) *slotInfo {
	if s := c.slots[slot].Load(); s != nil {
		return s
	}
	s := c.newInfo(false)
	if s == nil {
		return nil
	}
	return c.know(slot, false, s)
}

// know makes a slot known by s, unless it is.
func (c *Cache) know(slot int, kept bool, s *slotInfo) *slotInfo {
	s.age, s.stamp, s.kept = c.age.Add(1), c.stamp(slot), kept
	if c.slots[slot].CompareAndSwap(nil, s) {
		return s
	}
	c.giveBack(s)
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
		return true
	}
	c.counters.misses.Add(1)
	return false
}

func (c *Cache) read(id block.ExtentID, off, blocks int, p []byte) bool {
	if len(p) != blocks*block.Size {
		panic(fmt.Errorf("cache: read of %d blocks into %d bytes", blocks, len(p)))
	}
	if c.ram != nil && c.ram.get(id, off, p) {
		c.counters.ramHits.Add(1)
		return true
	}
	var buf [16]run
	runs, ok := c.find(id, off, blocks, buf[:0], true)
	if !ok {
		return false
	}
	good, queue := true, 0
	if len(runs) > 0 {
		queue = c.slots[runs[0].place.Slot()].Load().queue()
	}
	for _, r := range runs {
		if good {
			good = c.readRun(id, r, p[(r.off-off)*block.Size:][:r.blocks*block.Size])
		}
		c.space.Unpin(r.place.Slot())
	}
	if !good {
		c.Drop(id)
		return false
	}
	c.counters.hits[queue].Add(1)
	if c.ram != nil {
		c.ram.offer(id, off, p)
	}
	return true
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

// Has reports whether all blocks of an extent are in the index; whether they are good, only Read finds
// out.
func (c *Cache) Has(id block.ExtentID, blocks int) bool { return c.has(id, blocks) }

// has reports whether all blocks of an extent are in the index.
func (c *Cache) has(id block.ExtentID, blocks int) bool {
	var buf [16]run
	runs, ok := c.find(id, 0, blocks, buf[:0], false)
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

// Drop forgets an extent on the tier. Save gives back the slots in which nothing is left.
func (c *Cache) Drop(id block.ExtentID) { c.replace(id, nil) }

// Forget drops an extent of so many blocks that nothing wants any more, on the tier and in RAM. It costs no
// I/O: what it leaves on the tier goes with its slot.
func (c *Cache) Forget(id block.ExtentID, blocks int) {
	c.counters.forgotten.Add(1)
	c.Drop(id)
	if c.ram != nil {
		c.ram.drop(id, min(blocks, ExtentBlocksMax))
	}
}

// Sweep forgets, in the background and once all that Load found is in the index, what dead says nothing wants
// any more.
func (c *Cache) Sweep(dead func(block.ExtentID) bool) {
	c.work.Go(func() {
		c.loading.Wait()
		for slot := range c.slots {
			if c.closing.Load() {
				return
			}
			if c.slots[slot].Load() == nil || !c.space.Pin(slot) {
				continue
			}
			if info := c.slots[slot].Load(); info != nil && !info.saved {
				for i := range info.count() {
					if id := info.extent(i); dead(id) {
						c.remove(id, placed{slot, i})
					}
				}
			}
			c.space.Unpin(slot)
		}
	})
}

// DropSlot forgets all blocks on a slot. The tier's evict callback calls it, when the slot can no
// longer be pinned; whoever frees a slot of which blocks were adopted calls it first.
func (c *Cache) DropSlot(slot int) {
	info := c.slots[slot].Load()
	if info == nil || planted.Bug("cache: slot reused without forgetting it") {
		return
	}
	if n := c.dropSlot(slot, info); n > 0 {
		c.counters.evicted.Add(n)
		c.counters.slotsEvicted[info.queue()].Add(1)
	}
	c.slots[slot].Store(nil)
	c.giveBack(info)
}

// Close ends filling and evicting, waits for them, and saves the index. No other method may be under way
// or be called later.
func (c *Cache) Close() {
	c.closing.Store(true)
	c.evictor.close()
	c.small.close()
	c.main.close()
	c.loading.Wait()
	c.work.Wait()
	c.release(&c.small)
	c.release(&c.main)
	if err := c.save(true); err != nil {
		c.log.Warn("cache index not saved", "error", err)
	}
	if c.ram != nil {
		c.ram.close()
	}
}

// Queue is a count for each of the two queues of slots.
type Queue struct{ Small, Main uint64 }

// Total is both.
func (q Queue) Total() uint64 { return q.Small + q.Main }

func both(n *[2]atomic.Uint64) Queue { return Queue{n[0].Load(), n[1].Load()} }

// Stats are counts since New and the present size.
type Stats struct {
	Hits, Misses  uint64 // calls of Read
	RAMHits       uint64 // of Hits, answered from RAM
	SSDHits       Queue  // of Hits, by the queue of the first block
	Fills         Queue  // extents filled, by the queue they went to
	Remembered    uint64 // extents to fill that the ghost knew
	FillsSkipped  uint64 // for want of a slot, or over the disk's share
	FilledBytes   uint64 // written to the tier by fills
	AdoptsSkipped uint64 // extents of the log that the index had no memory for
	Moved         uint64 // runs copied to the main queue
	MovedBytes    uint64
	Evicted       uint64 // entries that left with their slot
	SlotsEvicted  Queue  // slots with something in them
	Forgotten     uint64 // extents that nothing maps any more
	CRCFailures   uint64 // blocks that were not what was stored
	ReadErrors    uint64
	Entries       int   // runs of adjacent blocks in the index
	Bytes         int64 // of the blocks in the index
	MemoryBytes   int64 // of the index itself, the ghost included; never more than MemoryMax
	MemoryMax     int64 // Options.IndexBytes
	RAMBytes      int64 // bound of the RAM cache, everything counted
	RAMUsedBytes  int64 // of the blocks in it
}

// Stats counts.
func (c *Cache) Stats() Stats {
	n := &c.counters
	s := Stats{
		Misses: n.misses.Load(), RAMHits: n.ramHits.Load(), SSDHits: both(&n.hits),
		Fills: both(&n.fills), Remembered: n.remembered.Load(), FillsSkipped: n.fillsSkipped.Load(), FilledBytes: n.filledBytes.Load(),
		AdoptsSkipped: n.adoptsSkipped.Load(), Moved: n.moved.Load(), MovedBytes: n.movedBytes.Load(),
		Evicted: n.evicted.Load(), SlotsEvicted: both(&n.slotsEvicted), Forgotten: n.forgotten.Load(),
		CRCFailures: n.crcFailures.Load(), ReadErrors: n.readErrors.Load(),
		MemoryBytes: c.memory.used.Load(), MemoryMax: c.memory.limit,
	}
	s.Hits = s.RAMHits + s.SSDHits.Total()
	for i := range c.shards {
		entries, blocks := c.shards[i].size()
		s.Entries += entries
		s.Bytes += blocks * block.Size
	}
	if c.ram != nil {
		s.RAMBytes, s.RAMUsedBytes = c.ram.bytes, c.ram.used()
	}
	return s
}
