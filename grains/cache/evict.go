package cache

import (
	"cmp"
	"runtime"
	"slices"
	"sync"

	"graindisk/block"
	"graindisk/tier"
)

// evictor keeps a few slots free, ahead of need, so that neither the log nor a fill waits for copies.
type evictor struct {
	mu      sync.Mutex
	running bool
	closed  bool
	buf     []byte // of the one that runs
}

const (
	aheadMax      = 4       // free slots that are enough
	smallPart     = 10      // the small queue is reduced first while it has more than a tenth of the clean slots
	mainSlotsMin  = 16      // in a smaller tier the main queue would take too much from the log: there is none
	rescueBuffer  = 64      // blocks copied at a time
	evictAttempts = 1 << 16 // until the last reader of a slot has gone
	surplusSlots  = 8       // free slots that keep their space
)

// MakeRoom starts to evict if fewer slots are free than should be. The tier's OnTake callback calls it.
func (c *Cache) MakeRoom(free int) {
	if free < c.ahead {
		c.startEvicting()
	}
}

func (c *Cache) startEvicting() {
	e := &c.evictor
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.running || e.closed {
		return
	}
	e.running = true
	c.work.Go(c.evict)
}

// evict runs until enough slots are free and the index is below its bound, or nothing can be evicted.
func (c *Cache) evict() {
	e := &c.evictor
	for {
		free, _, _ := c.space.Counts()
		e.mu.Lock()
		if free >= c.ahead && !c.memory.short() || e.closed {
			e.running = false
			e.mu.Unlock()
			return
		}
		e.mu.Unlock()
		if !c.evictOne(free > 0) {
			e.mu.Lock()
			e.running = false
			e.mu.Unlock()
			return
		}
	}
}

// evictOne frees the slot whose turn it is. What was read there moves to the main queue, if rescue says
// that there is time; what was not leaves its name in the ghost.
func (c *Cache) evictOne(rescue bool) bool {
	_, _, clean := c.space.Counts()
	kept := c.space.Kept()
	fromMain := kept > 0 && clean-kept <= max(1, clean/smallPart)
	slot, ok := c.space.Oldest(fromMain)
	if !ok || !c.space.Pin(slot) {
		return ok
	}
	c.shares.fill()
	if info := c.slots[slot].Load(); info != nil && !info.saved {
		moved := map[uint32]bool(nil)
		if rescue && c.useMain {
			moved = c.rescue(slot, info)
		}
		c.remember(slot, info, moved)
	}
	c.space.Unpin(slot)
	for range evictAttempts {
		if c.space.Evict(slot) {
			return true
		}
		if !c.space.Clean(slot) {
			return true // somebody else took it
		}
		runtime.Gosched()
	}
	return false
}

// remember puts the names of what is about to leave into the ghost.
func (c *Cache) remember(slot int, info *slotInfo, moved map[uint32]bool) {
	c.growGhost()
	last := block.ExtentID(0)
	for i := range info.count() {
		id := info.extent(i)
		if moved[i] || id == last || !c.alive(id, placed{slot, i}) {
			continue
		}
		last = id
		c.ghost.add(id, info.disk(i))
	}
}

// candidate is an entry that may move to the main queue.
type candidate struct {
	entry, reads uint32
}

// rescue copies what was read since it came to the slot to the main queue, most read first, up to half
// of the slot from the small queue and three quarters from the main one, so that every eviction gains.
// In the main queue an entry has to be read again for each further round.
func (c *Cache) rescue(slot int, info *slotInfo) map[uint32]bool {
	budget := int(c.slotBlocks) / 2
	if info.kept {
		budget = int(c.slotBlocks) * 3 / 4
	}
	moved := map[uint32]bool{}
	var batch []candidate
	limit := min(rescueBuffer, max(1, int(c.slotBlocks)/64)) // little is left unused at the end of a slot
	blocks := 0
	flush := func() {
		for _, e := range c.copyOut(slot, info, batch, blocks) {
			moved[e] = true
		}
		batch, blocks = batch[:0], 0
	}
	for _, x := range c.candidates(slot, info, budget) {
		n := info.blocks(x.entry)
		if blocks+n > limit {
			flush()
		}
		batch, blocks = append(batch, x), blocks+n
	}
	flush()
	return moved
}

// candidates chooses what is worth copying, within budget, in order of place.
func (c *Cache) candidates(slot int, info *slotInfo, budget int) []candidate {
	var found []candidate
	for i := range info.count() {
		disk := info.disk(i)
		reads := info.reads(i)
		if reads == 0 && c.ram != nil && c.inRAM(info.extent(i), info.run(slot, i)) {
			reads = 1 // the RAM cache answers its reads
		}
		floor := reads == 0 && info.kept && c.shares.low(disk)
		if reads == 0 && !floor || reads < 2 && c.shares.over(disk, 0) || !c.alive(info.extent(i), placed{slot, i}) {
			continue
		}
		found = append(found, candidate{i, reads})
	}
	slices.SortStableFunc(found, func(a, b candidate) int { return cmp.Compare(b.reads, a.reads) })
	n := 0
	for ; n < len(found); n++ {
		if budget -= info.blocks(found[n].entry); budget < 0 {
			break
		}
	}
	found = found[:n]
	slices.SortFunc(found, func(a, b candidate) int {
		return cmp.Compare(info.run(slot, a.entry).place, info.run(slot, b.entry).place)
	})
	return found
}

// copyOut copies entries of the pinned slot to the main queue and returns those that got there.
func (c *Cache) copyOut(slot int, info *slotInfo, batch []candidate, blocks int) (moved []uint32) {
	if len(batch) == 0 {
		return nil
	}
	if c.evictor.buf == nil {
		c.evictor.buf = make([]byte, rescueBuffer*block.Size)
	}
	at, ok := c.room(&c.main, uint32(blocks))
	if !ok {
		return nil
	}
	defer c.space.Unpin(at.Slot())
	buf := c.evictor.buf[:blocks*block.Size]
	good := batch[:0]
	n := 0
	for _, x := range batch {
		r := info.run(slot, x.entry)
		if c.readRun(info.extent(x.entry), r, buf[n*block.Size:][:r.blocks*block.Size]) {
			good = append(good, x)
			n += r.blocks
		} else {
			c.remove(info.extent(x.entry), placed{slot, x.entry})
		}
	}
	if n == 0 || !c.store(&c.main, at, buf[:n*block.Size]) {
		return nil
	}
	c.counters.movedBytes.Add(uint64(n) * block.Size)
	to := c.info(at.Slot())
	for _, x := range good {
		r := info.run(slot, x.entry)
		e, ok := c.add(to, newEntry{info.extent(x.entry), info.disk(x.entry), run{place: at, off: r.off, blocks: r.blocks}}, true)
		if ok && info.kept && x.reads > 1 {
			to.setReads(e, x.reads-1)
		}
		if ok && c.move(info.extent(x.entry), placed{slot, x.entry}, placed{at.Slot(), e}) {
			moved = append(moved, x.entry)
			c.counters.moved.Add(1)
		}
		at = tier.NewPlace(at.Slot(), at.Block()+uint32(r.blocks))
	}
	return moved
}

// inRAM reports whether any block of a run is in the RAM cache.
func (c *Cache) inRAM(id block.ExtentID, r run) bool { return c.ram.holdsAny(id, r.off, r.blocks) }

func (e *evictor) close() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.closed = true
}
