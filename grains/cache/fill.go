package cache

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"sync"
	"time"

	"graindisk/block"
	"graindisk/tier"
)

const (
	noSlot       = -1
	slotMagic    = "GDCS"
	slotVersion  = 1
	fillRetryGap = 10 * time.Second // between attempts after an I/O error
)

// filler appends to one slot at a time; the next is prepared while the second half of it is filled,
// because a slot's first use writes all of it. Who finds no slot ready while one is being
// prepared does without: filling must not hold up a read.
type filler struct {
	kept bool // whether its slots are of the main queue

	mu        sync.Mutex
	prepared  sync.Cond // with mu: preparing is over
	open      int       // slot being filled, or noSlot
	at        uint32    // its next block
	next      int       // slot ready to be filled, or noSlot
	preparing bool
	closed    bool
	retryAt   time.Time // no slot is prepared before
}

// Fill stores a clean extent of a disk, all its blocks, if there is room and the disk is not over its
// share; data is not kept. A fill skipped or failed is a miss later, nothing else.
func (c *Cache) Fill(disk block.DiskID, id block.ExtentID, data []byte) {
	n := len(data) / block.Size
	if len(data)%block.Size != 0 {
		panic("cache: fill of a part of a block")
	}
	if n == 0 || c.has(id, n) {
		return
	}
	if n > ExtentBlocksMax || n >= int(c.slotBlocks) {
		c.counters.fillsSkipped.Add(1)
		return
	}
	d := uint8(disk)
	proved, young := c.ghost.take(id)
	c.shares.want(d, young)
	if proved {
		c.counters.remembered.Add(1)
	}
	if !proved && c.shares.over(d, int64(c.slotBlocks)) {
		c.ghost.add(id, d)
		c.counters.fillsSkipped.Add(1)
		return
	}
	f := &c.small
	if proved && c.useMain {
		f = &c.main
	}
	at, ok := c.room(f, uint32(n))
	if !ok {
		if proved {
			c.ghost.add(id, d)
		}
		c.counters.fillsSkipped.Add(1)
		return
	}
	defer c.space.Unpin(at.Slot())
	if !c.store(f, at, data) {
		return
	}
	c.recent.first(hash(id)) // the rest of the pass that missed it does not make it hot
	if e, ok := c.add(c.info(at.Slot()), newEntry{id, d, run{place: at, blocks: n}}, false); ok {
		c.replace(id, []placed{{at.Slot(), e}})
		c.counters.fills[c.info(at.Slot()).queue()].Add(1)
		c.counters.filledBytes.Add(uint64(len(data)))
	}
	c.makeMemory()
}

// store writes data, whole blocks, to a place that room reserved, and notes its CRCs.
func (c *Cache) store(f *filler, at tier.Place, data []byte) bool {
	if err := c.space.WriteAt(at, [][]byte{data}); err != nil {
		c.log.Warn("cache fill failed", "slot", at.Slot(), "error", err)
		c.abandon(f, at.Slot())
		return false
	}
	crcs := c.info(at.Slot()).crcs[at.Block():]
	for i := range len(data) / block.Size {
		crcs[i].Store(block.CRC(data[i*block.Size : (i+1)*block.Size]))
	}
	return true
}

// room reserves n blocks in the open slot and pins it: it may be full, clean and evicted soon.
func (c *Cache) room(f *filler, n uint32) (tier.Place, bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for tried := false; f.open == noSlot || f.at+n > c.slotBlocks; {
		switch {
		case f.closed:
			return 0, false
		case f.next != noSlot:
			c.giveUpLocked(f)
			f.open, f.at, f.next = f.next, 1, noSlot
		case f.preparing: // by another: what many want at once right after an open would be fetched again and again, were it not kept
			f.prepared.Wait()
		case tried:
			return 0, false
		default:
			tried = true
			c.prepareLocked(f)
		}
	}
	if !c.space.Pin(f.open) {
		return 0, false
	}
	at := tier.NewPlace(f.open, f.at)
	f.at += n
	if f.at > c.slotBlocks/2 && f.next == noSlot && !f.preparing && !f.closed {
		c.work.Go(func() {
			f.mu.Lock()
			defer f.mu.Unlock()
			if f.next == noSlot && !f.preparing {
				c.prepareLocked(f)
			}
		})
	}
	return at, true
}

// Spare tells whether so many blocks can be filled in now without anything being evicted for them, now or because
// of them. It may take a slot and make it ready; later says to ask again in a moment, because one is being made ready.
func (c *Cache) Spare(blocks int) (yes, later bool) {
	need := min(blocks+ExtentBlocksMax, int(c.slotBlocks)-1) // the end of a slot may be left unused
	f := &c.small
	f.mu.Lock()
	defer f.mu.Unlock()
	for range 2 {
		room := 0
		if f.open != noSlot {
			room = int(c.slotBlocks - f.at)
		}
		if f.next != noSlot {
			room = int(c.slotBlocks) - 1
		}
		switch free, _, _ := c.space.Counts(); {
		case c.memory.short(), f.closed, free <= c.ahead+c.reserve: // the next slot is taken ahead of need
			return false, false
		case room >= need:
			return true, false
		case f.preparing:
			return false, true
		}
		c.prepareLocked(f)
	}
	return false, false
}

// giveUpLocked lets the open slot be evicted.
func (c *Cache) giveUpLocked(f *filler) {
	switch {
	case f.open == noSlot:
	case f.kept:
		c.space.SetKept(f.open)
	default:
		c.space.SetClean(f.open)
	}
	f.open = noSlot
}

// prepareLocked takes a slot and makes it the next; the lock is not held meanwhile.
func (c *Cache) prepareLocked(f *filler) {
	if f.closed || time.Now().Before(f.retryAt) {
		return
	}
	f.preparing = true
	f.mu.Unlock()
	slot, err := c.prepare(f.kept)
	f.mu.Lock()
	f.preparing = false
	f.prepared.Broadcast()
	switch {
	case errors.Is(err, tier.ErrNoSlot):
	case err != nil:
		f.retryAt = time.Now().Add(fillRetryGap)
		c.log.Warn("no cache slot", "error", err)
	default:
		f.next = slot
	}
}

// prepare takes a slot and gives it its length and its header. Without memory to know it there is none.
func (c *Cache) prepare(kept bool) (int, error) {
	info := c.newInfo(kept)
	if info == nil {
		c.makeMemory()
		return noSlot, tier.ErrNoSlot
	}
	slot, err := c.space.Take(c.reserve)
	if err != nil {
		c.giveBack(info)
		return noSlot, err
	}
	err = c.space.Prewrite(slot)
	if err == nil {
		err = c.space.WriteAt(tier.NewPlace(slot, 0), [][]byte{newSlotHeader()})
	}
	if err != nil {
		c.giveBack(info)
		c.space.Free(slot)
		return noSlot, err
	}
	c.know(slot, kept, info)
	return slot, nil
}

// newSlotHeader is the first block of a slot, as drawn in the package comment.
func newSlotHeader() []byte {
	b := make([]byte, block.Size)
	copy(b, slotMagic)
	binary.LittleEndian.PutUint16(b[4:], slotVersion)
	rand.Read(b[16:32])
	binary.LittleEndian.PutUint32(b[block.Size-4:], block.CRC(b[:block.Size-4]))
	return b
}

// abandon gives up a slot that cannot be written; what it holds stays readable until it is evicted.
func (c *Cache) abandon(f *filler, slot int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.retryAt = time.Now().Add(fillRetryGap)
	if f.open == slot {
		c.giveUpLocked(f)
	}
}

// close ends filling, but for what is under way.
func (f *filler) close() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.closed = true
}

// release lets go of the slots of a closed filler: the open one becomes clean and the next goes back.
func (c *Cache) release(f *filler) {
	f.mu.Lock()
	defer f.mu.Unlock()
	c.giveUpLocked(f)
	if f.next != noSlot {
		c.DropSlot(f.next)
		c.space.Free(f.next)
	}
	f.next = noSlot
}
