package cache

import (
	"errors"
	"math/rand/v2"
	"runtime"
	"sync"
	"testing"

	"graindisk/block"
	"graindisk/tier"
)

// allocated adds up what the index has.
func (c *Cache) allocated() int64 {
	n := 4*int64(len(c.ghost.cells)) + recentBytes + shardCount*shardBytes + 8*int64(len(c.slots))
	for i := range c.shards {
		n += 4 * int64(len(c.shards[i].cells))
	}
	for i := range c.slots {
		if s := c.slots[i].Load(); s != nil && !s.saved {
			n += slotBytes(c.slotBlocks) + int64(s.count()+chunkLen-1)/chunkLen*chunkBytes
		}
	}
	return n
}

// TestIndexBoundHoldsUnderConcurrency fills, adopts, reads, forgets and saves from all sides at once.
func TestIndexBoundHoldsUnderConcurrency(t *testing.T) {
	const slots, slotBlocks = 24, 1024
	limit := memoryMin(slots, slotBlocks)
	m := newSim(t, slots, slotBlocks, Options{IndexBytes: limit, Reserve: 4})
	m.ghost.init(slots * slotBlocks)
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	var wg sync.WaitGroup
	for g := range 4 {
		rnd := rand.New(rand.NewPCG(seed, uint64(g)))
		wg.Go(func() {
			var p [4 * block.Size]byte
			for i := 0; i < 8000 || i < 2_000_000 && m.counters.evicted.Load() == 0; i++ {
				id := block.ExtentID(rnd.IntN(30000))
				if !m.Read(id, 0, 4, p[:]) {
					m.Fill(1, id, zeroBlocks[:4*block.Size])
					runtime.Gosched() // to whoever makes slots ready
				}
				if rnd.IntN(10) == 0 {
					m.Forget(id, 4)
				}
				if got := m.memory.used.Load(); got > limit {
					t.Errorf("%d bytes of at most %d", got, limit)
					return
				}
			}
		})
	}
	wg.Wait()
	m.settle()
	if err := m.Save(); err != nil {
		t.Fatal(err)
	}
	if got := m.Stats().MemoryBytes; got != m.allocated() {
		t.Errorf("%d bytes counted, %d there are", got, m.allocated())
	}
	if s := m.Stats(); s.Fills.Total() == 0 || s.Evicted == 0 {
		t.Errorf("nothing was filled or evicted: %+v", s)
	}
}

// TestLoadKeepsToTheBound opens a tier whose saved index no longer fits: the youngest slots are known, the rest is cold.
func TestLoadKeepsToTheBound(t *testing.T) {
	dir := t.TempDir()
	r := openRig(t, dir, 40)
	for id := range block.ExtentID(40 * 3) {
		r.Fill(1, id, extent(id, 0, 8))
		r.settle()
	}
	r.close()
	r = openRig(t, dir, 40)
	r.memory.init(r.memory.used.Load()+12*(slotBytes(testSlotBlocks)+chunkBytes), testSlotBlocks)
	r.loaded(func(int) bool { return false })
	s := r.Stats()
	if s.MemoryBytes > r.memory.limit || s.MemoryBytes != r.allocated() || s.Entries < 9 || s.Entries > 36 {
		t.Errorf("%d of at most %d bytes, %d entries", s.MemoryBytes, r.memory.limit, s.Entries)
	}
	r.wants(false, 1, 0, 8)
	if err := r.Save(); err != nil {
		t.Fatal(err)
	}
	if free, _, clean := r.space.Counts(); clean > 14 || free+clean < 30 {
		t.Errorf("%d free and %d clean slots: those that are not known should be free", free, clean)
	}
}

func TestTooLittleMemoryIsRefused(t *testing.T) {
	s, err := tier.Open(tier.Options{FS: &nullFS{files: map[string]*nullFile{}}, SlotBytes: 1 << 20, Slots: 64})
	if err != nil {
		t.Fatal(err)
	}
	least := memoryMin(64, 256)
	if _, err := New(s, Options{IndexBytes: least - 1}); !errors.Is(err, ErrMemory) {
		t.Errorf("one byte too few: %v", err)
	}
	if _, err := New(s, Options{IndexBytes: least}); err != nil {
		t.Errorf("just enough: %v", err)
	}
}
