package densetree

import (
	"math/rand/v2"
	"os"
	"runtime"
	"sync"
	"testing"

	"graindisk/block"
	"graindisk/internal/vfs"
)

// cells is an oracle that needs 8 bytes per block and 1 per extent. A cell is kind | offset in the
// extent << 2 | number of the extent << 10.
type cells struct {
	cells        []uint64
	orig         []uint8 // per extent
	stored, live []int32 // blocks per segment
	mapped       int
}

func (c *cells) extent(n uint64) block.ExtentID {
	return block.NewExtentID(1+block.SegmentID(n/block.ExtentsMax), int(n%block.ExtentsMax))
}

func (c *cells) put(e Entry, n uint64) {
	for i := range e.Blocks {
		cell := &c.cells[uint64(e.LBA)+i]
		if Kind(*cell&3) == Data {
			c.live[*cell>>10/block.ExtentsMax]--
			c.mapped--
		}
		if *cell = uint64(e.Kind); e.Kind == Data {
			*cell |= i<<2 | n<<10
			c.live[n/block.ExtentsMax]++
			c.mapped++
		}
	}
}

func (c *cells) check(t *testing.T, tree *Tree, lba block.LBA, blocks uint64) {
	t.Helper()
	next := lba
	must(t, tree.Lookup(lba, blocks, func(e Entry) bool {
		if e.LBA != next {
			t.Fatalf("got %+v where %d comes next", e, next)
		}
		for i := range e.Blocks {
			cell := c.cells[uint64(e.LBA)+i]
			ok := Kind(cell&3) == e.Kind
			if ok && e.Kind == Data {
				ok = e.Extent == c.extent(cell>>10) && uint64(e.Off)+i == cell>>2&0xff && e.Orig == uint16(c.orig[cell>>10])
			}
			if !ok {
				t.Fatalf("block %d: got %+v, want cell %#x", e.LBA+block.LBA(i), e, cell)
			}
		}
		next = e.End()
		return true
	}))
	if next != lba+block.LBA(blocks) {
		t.Fatalf("lookup of [%d,+%d) ended at %d", lba, blocks, next)
	}
}

// batch is entries as one publication would bring: sorted, not overlapping, data within one grain.
func (c *cells) batch(r *rand.Rand, n int, next *uint64) (es []Entry, numbers []uint64) {
	size := uint64(len(c.cells))
	for range n {
		e := Entry{LBA: block.LBA(r.Uint64N(size)), Kind: Hole}
		switch k := r.IntN(100_000); {
		case k == 0:
			e.Blocks = 1 + r.Uint64N(size/256)
		case k < 15_000:
			e.Blocks = 1 + r.Uint64N(64)
		default:
			e.Kind, e.Blocks = Data, 1+r.Uint64N(16-uint64(e.LBA)%16)
		}
		e.Blocks = min(e.Blocks, size-uint64(e.LBA))
		es = append(es, e)
	}
	es = distinct(es)
	kept := es[:0]
	for _, e := range es {
		if len(kept) > 0 && kept[len(kept)-1].End() > e.LBA {
			continue
		}
		if e.Kind == Data {
			e.Orig, e.Extent = uint16(e.Blocks), c.extent(*next)
			numbers = append(numbers, *next)
			c.orig = append(c.orig, uint8(e.Orig))
			if seg := *next / block.ExtentsMax; int(seg) == len(c.stored) {
				c.stored, c.live = append(c.stored, 0), append(c.live, 0)
			}
			c.stored[len(c.stored)-1] += int32(e.Blocks)
			*next++
		} else {
			numbers = append(numbers, 0)
		}
		kept = append(kept, e)
	}
	return kept, numbers
}

func heap() int64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.GC()
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// TestTenMillionWrites puts random overlapping writes and unmaps on real files, compares lookups with
// the oracle, expects the losses of every segment to be never more, and at the end exactly, what the
// oracle says, and the tree to take at most 1.5 bytes of memory per mapped block, pages cached and
// level 0 included. It is ten million with GRAINDISK_SOAK set, else 3 % of that.
func TestTenMillionWrites(t *testing.T) {
	puts, size, cache := 300_000, 1<<20, int64(256<<10)
	if os.Getenv("GRAINDISK_SOAK") != "" {
		puts, size, cache = 10_000_000, 16<<20, 4<<20
	}
	r := newRand(t)
	model := &cells{cells: make([]uint64, size), orig: make([]uint8, 0, puts), stored: make([]int32, 0, 512), live: make([]int32, 0, 512)}
	d := &disk{fs: vfs.OS{}, dir: t.TempDir(), cache: cache}
	var guard sync.RWMutex
	var lostMu sync.Mutex      // a Put and a merge may lose at the same moment
	lost := make([]int32, 512) // per segment
	before := heap()
	d.open(t)
	tree := New(Options{Store: d.store, Guard: guard.RLocker(), MergeFailed: func(err error) { t.Error(err) }, Lost: func(ls []Loss) {
		lostMu.Lock()
		defer lostMu.Unlock()
		for _, l := range ls {
			lost[l.Extent.Segment()-1] += int32(l.Blocks)
		}
	}})
	defer tree.Close()
	books := func(exact bool) {
		t.Helper()
		guard.Lock()
		defer guard.Unlock()
		for i, stored := range model.stored {
			if dead := stored - model.live[i]; lost[i] > dead || exact && lost[i] != dead {
				t.Fatalf("segment %d: %d blocks lost, the oracle says %d", i+1, lost[i], dead)
			}
		}
	}
	var next uint64
	for put := 0; put < puts; {
		es, numbers := model.batch(r, 1+r.IntN(8192), &next)
		for i, e := range es {
			model.put(e, numbers[i])
		}
		tree.Put(es)
		put += len(es)
		for range len(es) / 8 {
			n := 1 + r.Uint64N(64)
			model.check(t, tree, block.LBA(r.Uint64N(uint64(size)-n)), n)
		}
		if r.IntN(20) == 0 {
			books(false)
		}
	}
	tree.writer.Lock() // at rest: a merge needs some 2 MB, one at a time for all trees
	must(t, tree.wait())
	tree.writer.Unlock()
	used := heap() - before // cached pages and both levels 0 are on the heap
	s := tree.Stats()
	t.Logf("%d puts, %d blocks mapped, %d entries in %d runs of %d levels, %d bytes in files", s.Put, model.mapped, s.Entries, s.Runs, s.Levels, s.Bytes)
	t.Logf("memory: %d bytes, %.2f per mapped block; counted: %d of the tree, %d of cached pages", used, float64(used)/float64(model.mapped), s.MemoryBytes, d.store.o.Cache.Bytes())
	t.Logf("merges wrote %.1f bytes per entry put, %.2f times its %d bytes", float64(s.MergedBytes)/float64(s.Put), float64(s.MergedBytes)/float64(s.Put)/packedBytes, packedBytes)
	// The constant is what does not grow with the map, and the heap's own noise.
	if most := int64(model.mapped)*3/2 + 128<<10; used > most {
		t.Errorf("%d bytes of memory for %d mapped blocks, at most %d are allowed", used, model.mapped, most)
	}
	model.check(t, tree, 0, uint64(size))
	must(t, tree.Compact())
	books(true)
	model.check(t, tree, 0, uint64(size))
	runtime.KeepAlive(model)
}
