package cache

import (
	"bytes"
	"math/rand/v2"
	"runtime"
	"sync"
	"testing"

	"graindisk/block"
	"graindisk/tier"
)

// TestRAMMatchesModel offers and gets random blocks: what is found is right, and there are never more
// than there are frames.
func TestRAMMatchesModel(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 1))
	r, err := newRAM(1 << 20)
	if err != nil {
		t.Fatal(err)
	}
	defer r.close()
	hits := 0
	for step := range 40_000 {
		id := block.ExtentID(rnd.IntN(60))
		if step%50 == 0 {
			blocks := 1 + rnd.IntN(ExtentBlocksMax)
			r.drop(id, blocks)
			if r.holdsAny(id, 0, blocks) {
				t.Fatalf("extent %d is there after it was dropped", id)
			}
		}
		off := rnd.IntN(ExtentBlocksMax)
		n := 1 + rnd.IntN(min(4, ExtentBlocksMax-off))
		p := make([]byte, n*block.Size)
		if !r.get(id, off, p) {
			for i := range n {
				p[i*block.Size], p[i*block.Size+1], p[(i+1)*block.Size-1] = byte(id), byte(off+i), 1
			}
			r.offer(id, off, p)
			continue
		}
		hits++
		for i := range n {
			if b := p[i*block.Size:]; b[0] != byte(id) || b[1] != byte(off+i) || b[block.Size-1] != 1 {
				t.Fatalf("extent %d block %d: wrong bytes", id, off+i)
			}
		}
	}
	if hits == 0 {
		t.Error("no hits")
	}
	for i := range r.shards {
		s := &r.shards[i]
		cells := 0
		for _, c := range s.table {
			if c != 0 {
				cells++
			}
		}
		if cells != s.used-s.spare || s.used > len(s.extent) || len(s.frames) != len(s.extent)*block.Size {
			t.Errorf("shard %d: %d cells, %d used, %d of them empty, of %d frames", i, cells, s.used, s.spare, len(s.extent))
		}
	}
}

// TestRAMUsesDroppedFramesFirst fills a RAM cache and drops a third: that much comes in at its first read, and
// nothing that was kept leaves for it.
func TestRAMUsesDroppedFramesFirst(t *testing.T) {
	r, err := newRAM(1 << 20)
	if err != nil {
		t.Fatal(err)
	}
	defer r.close()
	var p [block.Size]byte
	held := map[block.ExtentID]bool{}
	for id := range block.ExtentID(1000) {
		r.offer(id, 0, p[:])
		if r.holdsAny(id, 0, 1) {
			held[id] = true
		}
	}
	room := map[*ramShard]int{}
	for id := range held {
		if id%3 == 0 {
			r.drop(id, 16)
			s, _ := r.shard(id)
			room[s]++
			delete(held, id)
		}
	}
	if len(room) == 0 {
		t.Fatal("nothing was dropped")
	}
	for id := block.ExtentID(2000); id < 4000; id++ {
		s, _ := r.shard(id)
		if r.offer(id, 0, p[:]); r.holdsAny(id, 0, 1) != (room[s] > 0) {
			t.Fatalf("extent %d: %d frames of its shard are empty, and it came in: %v", id, room[s], r.holdsAny(id, 0, 1))
		}
		room[s]--
	}
	for id := range held {
		if !r.holdsAny(id, 0, 1) {
			t.Errorf("extent %d left though there were empty frames", id)
		}
	}
}

// TestRAMIsBounded adds up everything the RAM cache has, on the heap and off it.
func TestRAMIsBounded(t *testing.T) {
	for _, bytes := range []int64{256 << 10, 10 << 20, 24<<20 + 12345} {
		heap := heapBytes()
		r, err := newRAM(bytes)
		if err != nil {
			t.Fatal(err)
		}
		p := make([]byte, 16*block.Size)
		for id := range block.ExtentID(bytes / 4096) {
			r.offer(id, 0, p)
			r.offer(id, 0, p)
		}
		p = nil
		all := heapBytes() - heap + int64(len(r.mem))
		t.Logf("bound %d: %d counted, %d measured", bytes, r.bytes, all)
		if r.bytes > bytes || all > bytes+16<<10 { // the runtime rounds each table up to a size class
			t.Errorf("bound %d: %d counted, %d measured", bytes, r.bytes, all)
		}
		if r.bytes < bytes*95/100 && bytes > 1<<20 { // else shards round
			t.Errorf("bound %d: only %d used", bytes, r.bytes)
		}
		runtime.KeepAlive(r)
		r.close()
	}
	if _, err := newRAM(100 << 10); err == nil {
		t.Error("made in too little RAM")
	}
}

// TestScanPassesRAMBy reads a hot set that fits, then a scan of ten times the cache.
func TestScanPassesRAMBy(t *testing.T) {
	r, err := newRAM(4 << 20)
	if err != nil {
		t.Fatal(err)
	}
	defer r.close()
	p := make([]byte, block.Size)
	read := func(id block.ExtentID) bool {
		if r.get(id, 0, p) {
			return true
		}
		r.offer(id, 0, p)
		return false
	}
	for range 3 {
		for id := range block.ExtentID(500) {
			read(id)
		}
	}
	hits := func() (n int) {
		for id := range block.ExtentID(500) {
			if read(id) {
				n++
			}
		}
		return n
	}
	before := hits()
	for id := range block.ExtentID(10_000) {
		read(1<<40 + id)
	}
	after := hits()
	if before < 490 || after < before*98/100 {
		t.Errorf("%d hits of 500 before the scan, %d after", before, after)
	}
}

// TestRAMServesReads has the same blocks read again, and the tier below lose them.
func TestRAMServesReads(t *testing.T) {
	r := newRig(t, 8)
	c, err := New(r.space, Options{RAMBytes: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	slot := r.logSlot(1)
	c.Adopt(1, 1, []BlockRef{r.put(1, 0, tier.NewPlace(slot, 1)), r.put(1, 1, tier.NewPlace(slot, 2))})
	p := make([]byte, 2*block.Size)
	for range 3 {
		if !c.Read(1, 0, 2, p) || !bytes.Equal(p, extent(1, 0, 2)) {
			t.Fatal("not read")
		}
	}
	if s := c.Stats(); s.Hits != 3 || s.RAMHits != 2 || s.RAMBytes == 0 || s.RAMBytes > 1<<20 {
		t.Errorf("stats %+v", s)
	}
	r.write(tier.NewPlace(slot, 1), make([]byte, 2*block.Size))
	if !c.Read(1, 1, 1, p[:block.Size]) || !bytes.Equal(p[:block.Size], content(1, 1)) {
		t.Error("not read from RAM")
	}
}

// TestWhatRAMServesStaysOnTheTier reads an extent only from RAM until its slot is evicted.
func TestWhatRAMServesStaysOnTheTier(t *testing.T) {
	m := newSim(t, 64, simSlotBlocks, Options{RAMBytes: 1 << 20})
	id := m.write(t, 1, 0, 1)
	m.ram.offer(7, 0, zeroBlocks[:block.Size])
	for range 200 {
		id = m.write(t, 1, id, 1)
	}
	if !m.has(7, 1) || m.has(8, 1) {
		t.Errorf("extent 7, in RAM, on the tier: %v; extent 8: %v", m.has(7, 1), m.has(8, 1))
	}
}

func TestRAMIsSafeForConcurrentUse(t *testing.T) {
	r, err := newRAM(512 << 10)
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for g := range uint64(4) {
		wg.Go(func() {
			rnd := rand.New(rand.NewPCG(g, 1))
			p := make([]byte, 2*block.Size)
			for range 5000 {
				id := block.ExtentID(rnd.IntN(100))
				if r.get(id, 3, p) {
					if p[0] != byte(id) || p[2*block.Size-1] != byte(id) {
						t.Errorf("extent %d: wrong bytes", id)
					}
					continue
				}
				p[0], p[2*block.Size-1] = byte(id), byte(id)
				r.offer(id, 3, p)
				r.holdsAny(id, 3, 2)
			}
		})
	}
	wg.Wait()
	r.close()
	if r.get(1, 3, make([]byte, block.Size)) {
		t.Error("found in a closed cache")
	}
	r.offer(1, 3, make([]byte, block.Size))
}
