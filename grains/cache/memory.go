package cache

import "sync/atomic"

// memory is what the index takes, and its bound. Whatever the index allocates is reserved first, so that
// used never exceeds limit; what is refused is not cached, and the oldest slots are evicted until there is room:
//
//	0 ─────────────────────────────── evicting ──── full ──── limit
//	  blocks come in                │ they do, and │ only what │
//	                                │ slots leave  │ is copied │
//
// Copying between queues may use the last part, so that what is read often survives an eviction for
// want of memory.
type memory struct {
	limit    int64 // 0: none
	evicting int64
	full     int64
	used     atomic.Int64
	beside   atomic.Int64 // what others count against the same bound
	refused  atomic.Uint64
}

// slotBytes is what a slot takes before its first entry.
func slotBytes(slotBlocks uint32) int64 {
	return 4*int64(slotBlocks) + 8*int64((slotBlocks+chunkLen-1)/chunkLen) + 128
}

const (
	chunkBytes = chunkLen*(8+4+1) + chunkLen/4
	shardBytes = 64
	// memorySlotsMin is how many slots an index must have room for: one being filled, one next, for both
	// queues, and as many clean ones.
	memorySlotsMin = 8
)

// memoryMin is the least bound with which a cache over that many slots is of any use.
func memoryMin(slots int, slotBlocks uint32) int64 {
	blocks := int64(slots) * int64(slotBlocks)
	fixed := 4*ghostCells(blocks) + recentBytes + shardCount*(shardBytes+4*cellsMin) + 8*int64(slots)
	return fixed + memorySlotsMin*(slotBytes(slotBlocks)+chunkBytes)
}

func (m *memory) init(limit int64, slotBlocks uint32) {
	m.limit = limit
	part := min(max(limit/16, slotBytes(slotBlocks)), limit/4)
	m.evicting, m.full = limit-part, limit-part/2
}

// reserve takes n bytes if the bound allows it, for a copy to the main queue or for what comes in.
func (m *memory) reserve(n int64, copying bool) bool {
	limit := m.full
	if copying {
		limit = m.limit
	}
	for {
		was := m.used.Load()
		if m.limit > 0 && was+n+m.others() > limit {
			m.refused.Add(1)
			return false
		}
		if m.used.CompareAndSwap(was, was+n) {
			return true
		}
	}
}

// spare takes n bytes if there is so much room that nothing is evicted for them.
func (m *memory) spare(n int64) bool {
	if m.limit > 0 && m.used.Load()+m.others()+n > m.evicting {
		return false
	}
	return m.reserve(n, false)
}

// short reports whether slots should be evicted to make room.
func (m *memory) short() bool {
	return m.limit > 0 && m.used.Load()+m.others() > m.evicting
}

// others is what is counted beside: half of the bound stays for the cache.
func (m *memory) others() int64 { return min(m.beside.Load(), m.limit/2) }

// CountBeside says how many bytes of others count against the bound of the index from now on, up to half of it.
func (c *Cache) CountBeside(bytes int64) {
	c.memory.beside.Store(bytes)
	c.makeMemory()
}

// makeMemory starts to evict if the index is near its bound.
func (c *Cache) makeMemory() {
	if c.memory.short() {
		c.startEvicting()
	}
}

// newInfo is what will be known of a slot; nil if there is no memory for it.
func (c *Cache) newInfo(copying bool) *slotInfo {
	n := slotBytes(c.slotBlocks)
	if !c.memory.reserve(n, copying) {
		return nil
	}
	s := newSlotInfo(c.slotBlocks)
	s.memory.Store(n)
	return s
}

// giveBack ends the reservation of what was known of a slot.
func (c *Cache) giveBack(s *slotInfo) { c.memory.used.Add(-s.memory.Swap(0)) }

// add appends an entry to what is known of a slot; false if there is no room for it.
func (c *Cache) add(s *slotInfo, e newEntry, copying bool) (uint32, bool) {
	return s.add(e, func() bool {
		if !c.memory.reserve(chunkBytes, copying) {
			return false
		}
		s.memory.Add(chunkBytes)
		return true
	})
}
