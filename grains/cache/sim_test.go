//go:build !race

package cache

// Long simulations, of one thing after the other: the race detector makes them ten times slower and has nothing
// to find in them.

import (
	"container/list"
	"math/rand/v2"
	"runtime"
	"slices"
	"testing"

	"graindisk/block"
	"graindisk/tier"
)

// TestScanRobsNobody reads by zipf from four times the tier, with and without as many reads of a scan woven in.
func TestScanRobsNobody(t *testing.T) {
	const slots, reads = 192, 200_000
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	const blocks = slots * simSlotBlocks
	run := func(scan bool, read func(block.ExtentID) bool) float64 {
		z := newZipf(seed, 4*blocks)
		hits := 0
		for i := range reads {
			if scan {
				read(block.ExtentID(1<<40 + i))
			}
			if read(block.ExtentID(z.next())) && i >= reads/2 {
				hits++
			}
		}
		return 100 * float64(hits) / (reads / 2)
	}
	ours := func(scan, small bool) float64 {
		m := newSim(t, slots, simSlotBlocks, Options{})
		if small { // a block stands for an extent of 4 KiB
			m.ghost.init(blocks)
		}
		return run(scan, func(id block.ExtentID) bool { return m.read(1, id) })
	}
	theirs := func(scan, fifo bool) float64 {
		l := &lru{n: blocks, fifo: fifo, at: map[block.ExtentID]*list.Element{}}
		return run(scan, l.read)
	}
	alone, beside := ours(false, false), ours(true, false)
	smallAlone, smallBeside := ours(false, true), ours(true, true)
	lruAlone, lruBeside := theirs(false, false), theirs(true, false)
	fifoAlone, fifoBeside := theirs(false, true), theirs(true, true)
	t.Logf("zipf hits: %.1f %% alone, %.1f %% beside a scan; LRU %.1f and %.1f %%, FIFO %.1f and %.1f %%",
		alone, beside, lruAlone, lruBeside, fifoAlone, fifoBeside)
	t.Logf("in extents of 4 KiB: %.1f %% alone, %.1f beside a scan", smallAlone, smallBeside)
	if alone-beside >= 2 || smallAlone-smallBeside >= 2 {
		t.Errorf("the scan costs %.1f points, %.1f in extents of 4 KiB, want less than 2", alone-beside, smallAlone-smallBeside)
	}
	if beside < lruBeside+8 || beside < fifoBeside+8 || alone < fifoAlone+1 || alone < lruAlone-2 {
		t.Error("not as much better than plain FIFO and LRU as it was")
	}
}

// TestIndexMemory adopts a tier full of extents in an order like that of cuts, and compares what the
// index takes, as counted and on the heap, with the bound of the design.
func TestIndexMemory(t *testing.T) {
	const gib = 1 << 30
	for _, c := range []struct {
		blocks, slots int
		mib           float64
	}{{16, 64, 1.5}, {1, 16, 6}, {1, 20, 6}, {1, 23, 6}} {
		heap := heapBytes()
		m := newSim(t, c.slots, 16384, Options{})
		m.ghost.init(int64(c.slots) * 16384) // as it is
		refs := make([]BlockRef, c.blocks)
		rnd := rand.New(rand.NewPCG(1, 1))
		n := 16384 / c.blocks
		perm := rnd.Perm(c.slots * n)
		for i, at := range perm {
			slot, blk := at/n, uint32(at%n*c.blocks)
			for j := range refs {
				refs[j] = BlockRef{tier.NewPlace(slot, blk+uint32(j)), zeroCRC}
			}
			m.Adopt(1, block.NewExtentID(block.SegmentID(1+i/8192), i%8192), refs)
		}
		size := float64(c.slots*16384*block.Size) / gib
		heap = heapBytes() - heap
		counted := m.Stats().MemoryBytes
		perm = nil
		t.Logf("%d KiB extents, %d slots: %.2f MiB per GiB counted, %.2f on the heap", 4*c.blocks, c.slots,
			float64(counted)/(1<<20)/size, float64(heap-int64(8*cap(perm)))/(1<<20)/size)
		if got := float64(counted) / (1 << 20) / size; got > c.mib {
			t.Errorf("%.2f MiB per GiB at %d KiB extents, want at most %.1f", got, 4*c.blocks, c.mib)
		}
		if got := float64(heap) / (1 << 20) / size; got > c.mib {
			t.Errorf("%.2f MiB of heap per GiB at %d KiB extents, want at most %.1f", got, 4*c.blocks, c.mib)
		}
		runtime.KeepAlive(m)
	}
}

// writeAll is the log writing a tier's worth of extents of so many blocks, read back now and then.
func (m *sim) writeAll(t *testing.T, first block.ExtentID, blocks int, check func()) block.ExtentID {
	var p [block.Size]byte
	for range m.space.Slots() {
		was := first
		first = m.write(t, 1, first, blocks)
		for id := was; id < first; id += 7 {
			m.Read(id, 0, 1, p[:])
		}
		check()
	}
	return first
}

// TestIndexKeepsToItsBound turns a tier over, in small extents, large ones and small ones again, with memory for
// half of the index and for all of it, alone and beside others.
func TestIndexKeepsToItsBound(t *testing.T) {
	const slots, slotBlocks = 48, 2048
	for _, c := range []struct {
		name   string
		limit  int64
		beside int64
		part   float64 // of the tier that is cached at least, small and large extents
		large  float64
	}{
		{"room for all", slots * slotBlocks * 32, 0, 0.7, 0.7},
		{"room for half", slots * slotBlocks * 12, 0, 0.25, 0.7},
		{"half of that is taken by others", slots * slotBlocks * 12, slots * slotBlocks * 100, 0.1, 0.4},
	} {
		t.Run(c.name, func(t *testing.T) {
			m := newSim(t, slots, slotBlocks, Options{IndexBytes: c.limit})
			m.ghost.init(slots * slotBlocks) // as it is
			m.CountBeside(c.beside)
			limit := c.limit - min(c.beside, c.limit/2)
			check := func() {
				if got := m.Stats().MemoryBytes; got > limit || got != m.allocated() {
					t.Fatalf("%d bytes counted, %d there are, of at most %d", got, m.allocated(), limit)
				}
			}
			heap := heapBytes()
			next := block.ExtentID(1)
			for _, blocks := range []int{1, 16, 1} {
				for range 2 {
					next = m.writeAll(t, next, blocks, check)
				}
				s := m.Stats()
				cached := float64(s.Bytes) / (slots * slotBlocks * block.Size)
				t.Logf("extents of %d blocks: %.0f %% of the tier cached with %d of %d bytes, %d skipped", blocks, 100*cached, s.MemoryBytes, limit, s.AdoptsSkipped)
				if want := map[int]float64{1: c.part, 16: c.large}[blocks]; cached < want {
					t.Errorf("extents of %d blocks: %.2f of the tier cached, want %.2f", blocks, cached, want)
				}
			}
			if grown := heapBytes() - heap - int64(len(m.evictor.buf)); grown > limit+limit/8 {
				t.Errorf("%d bytes of heap for an index of at most %d", grown, limit)
			}
			for i := range slots {
				m.space.Evict(i)
			}
			if got := m.Stats().MemoryBytes; got != m.allocated() || got > memoryMin(slots, slotBlocks)+4*int64(len(m.ghost.cells)) {
				t.Errorf("%d bytes are left of an index that is empty", got)
			}
		})
	}
}

func TestSharesFollowTheWorkingSets(t *testing.T) {
	const seed = 1    // fixed, and the run is deterministic: by chance alone one in ten would be over the bound
	const periods = 5 // that are measured
	m := newSim(t, simSlots, simSlotBlocks, Options{})
	loads := simLoads(seed, 1, 2, 4, 8)
	m.play(20, loads)
	got := total(m.play(periods, loads)) / periods
	equal, best := lruSplit(seed, 1, 2, 4, 8)
	t.Logf("%d misses per period after 20; LRU: %d in equal parts, %d in the best", got, equal, best)
	if float64(got) > 1.1*float64(best) {
		t.Errorf("%d misses, want at most 1.1 times the %d of the best split", got, best)
	}

	// A scanner comes, reading as much as each of the others.
	before := m.play(periods, loads)
	beside := m.play(periods, append(slices.Clone(loads), scanLoad(5)))
	reads := float64(periods * simPeriodReads / 4)
	for i := range loads {
		fall := 100 * float64(beside[i]-before[i]) / reads
		t.Logf("disk %d: %.1f %% misses alone, %.1f beside a scanner", i+1, 100*float64(before[i])/reads, 100*float64(beside[i])/reads)
		if fall >= 2 {
			t.Errorf("disk %d loses %.1f points to the scanner, want less than 2", i+1, fall)
		}
	}
	if used := m.shares.used[5].Load(); used > simSlots*simSlotBlocks/10 {
		t.Errorf("the scanner has %d blocks of %d", used, simSlots*simSlotBlocks)
	}

	// The working sets swap.
	loads = simLoads(seed+1, 8, 4, 2, 1)
	m.play(20, loads)
	got = total(m.play(periods, loads)) / periods
	t.Logf("%d misses per period, 20 periods after the working sets swapped", got)
	if float64(got) > 1.1*float64(best) {
		t.Errorf("%d misses after the swap, want at most 1.1 times %d", got, best)
	}
}

// TestIdleDiskKeepsTheFloor has a disk prove its blocks hot and go idle, while another turns the tier over.
func TestIdleDiskKeepsTheFloor(t *testing.T) {
	m := newSim(t, simSlots, simSlotBlocks, Options{})
	const idle = simSlots * simSlotBlocks / 100 // half the floor
	id := m.write(t, 2, 0, 1)
	for range 3 {
		for i := range block.ExtentID(idle) {
			m.read(1, 1<<40+i)
		}
	}
	for range 20 * simSlots {
		id = m.write(t, 2, id, 1)
		for i := range block.ExtentID(simSlotBlocks) {
			m.read(2, id-1-i) // all of it is read twice, and so copied
			m.read(2, id-1-i)
		}
	}
	if got := m.shares.used[1].Load(); got < idle*2/3 { // half of a slot at most moves at once
		t.Errorf("%d of the idle disk's %d blocks are left", got, idle)
	}
}
