package cache

import (
	"container/list"
	"io/fs"
	"math/rand/v2"
	"runtime"
	"sort"
	"sync"
	"testing"
	"time"

	"graindisk/block"
	"graindisk/internal/vfs"
	"graindisk/tier"
)

// nullFS is a file system whose files read as zeroes whatever is written, so that a policy can be
// tested on many tiers' worth of bytes.
type nullFS struct {
	vfs.FS
	mu    sync.Mutex
	files map[string]*nullFile
}

type nullFile struct {
	vfs.File
	size int64
}

func (f *nullFS) Open(name string) (vfs.File, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if file := f.files[name]; file != nil {
		return file, nil
	}
	return nil, fs.ErrNotExist
}

func (f *nullFS) Create(name string) (vfs.File, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.files[name] = &nullFile{}
	return f.files[name], nil
}

func (*nullFS) ReadDir(string) ([]fs.DirEntry, error) { return nil, nil }
func (*nullFS) SyncDir(string) error                  { return nil }

func (f *nullFile) ReadAt(p []byte, _ int64) (int, error)  { clear(p); return len(p), nil }
func (f *nullFile) WriteAt(p []byte, _ int64) (int, error) { return len(p), nil }
func (f *nullFile) WritevAt(_ [][]byte, _ int64) error     { return nil }
func (f *nullFile) Truncate(int64) error                   { return nil }
func (f *nullFile) Size() (int64, error)                   { return f.size, nil }
func (f *nullFile) Sync() error                            { return nil }
func (f *nullFile) Close() error                           { return nil }

// sim is a cache over a tier that keeps nothing, with a clock of its own.
type sim struct {
	*Cache
	space *tier.Space
	time  time.Time
}

const simSlotBlocks = 32

func newSim(t testing.TB, slots, slotBlocks int, o Options) *sim {
	t.Helper()
	s, err := tier.Open(tier.Options{FS: &nullFS{files: map[string]*nullFile{}}, SlotBytes: int64(slotBlocks) * block.Size, Slots: slots})
	if err != nil {
		t.Fatal(err)
	}
	s.Claimed()
	m := &sim{space: s}
	o.Now = func() time.Time { return m.time }
	if m.Cache, err = New(s, o); err != nil {
		t.Fatal(err)
	}
	m.ghost.init(16 * int64(slots) * int64(slotBlocks)) // a block stands for an extent of 64 KiB here
	s.OnEvict(m.DropSlot)
	s.OnTake(m.MakeRoom)
	t.Cleanup(m.Close)
	return m
}

var (
	zeroBlocks [ExtentBlocksMax * block.Size]byte
	zeroCRC    = block.CRC(zeroBlocks[:block.Size])
)

// read reads an extent of one block and fills it after a miss.
func (m *sim) read(disk block.DiskID, id block.ExtentID) bool {
	var p [block.Size]byte
	if m.Read(id, 0, 1, p[:]) {
		return true
	}
	m.Fill(disk, id, p[:])
	m.settle()
	return false
}

// write fills a slot as the log does, adopts it extent by extent, and makes it clean.
func (m *sim) write(t testing.TB, disk block.DiskID, first block.ExtentID, blocks int) (next block.ExtentID) {
	t.Helper()
	slot, err := m.space.Take(0)
	if err != nil {
		t.Fatal(err)
	}
	if err := m.space.Prewrite(slot); err != nil {
		t.Fatal(err)
	}
	refs := make([]BlockRef, blocks)
	for at := 1; at+blocks <= m.space.SlotBlocks(); at += blocks {
		for i := range refs {
			refs[i] = BlockRef{tier.NewPlace(slot, uint32(at+i)), zeroCRC}
		}
		m.Adopt(disk, first, refs)
		first++
	}
	m.space.SetClean(slot)
	m.settle()
	return first
}

// zipf draws from n names, the i-th with weight 1/(i+1).
type zipf struct {
	sums  []float64
	names []int
	rnd   *rand.Rand
}

func newZipf(seed uint64, n int) *zipf {
	z := &zipf{rnd: rand.New(rand.NewPCG(seed, 1)), sums: make([]float64, n)}
	z.names = z.rnd.Perm(n)
	sum := 0.0
	for i := range z.sums {
		sum += 1 / float64(i+1)
		z.sums[i] = sum
	}
	return z
}

func (z *zipf) next() int {
	return z.names[sort.SearchFloat64s(z.sums, z.rnd.Float64()*z.sums[len(z.sums)-1])]
}

// lru is the least recently used cache of n extents, or a plain queue.
type lru struct {
	n     int
	fifo  bool
	order list.List
	at    map[block.ExtentID]*list.Element
}

func (l *lru) read(id block.ExtentID) bool {
	if e := l.at[id]; e != nil {
		if !l.fifo {
			l.order.MoveToFront(e)
		}
		return true
	}
	l.at[id] = l.order.PushFront(id)
	if l.order.Len() > l.n {
		delete(l.at, l.order.Remove(l.order.Back()).(block.ExtentID))
	}
	return false
}

// TestWritesAloneAreNotCopied has a log turn the tier over many times while a few extents are read.
func TestWritesAloneAreNotCopied(t *testing.T) {
	const slots = 64
	for _, hot := range []int{0, 10} {
		m := newSim(t, slots, simSlotBlocks, Options{})
		id := block.ExtentID(0)
		written := uint64(0)
		var p [block.Size]byte
		for range 20 * slots {
			id = m.write(t, 1, id, 1)
			written += simSlotBlocks * block.Size
			for i := range hot {
				m.Read(block.ExtentID(i), 0, 1, p[:])
			}
		}
		s := m.Stats()
		if limit := written * uint64(hot) / 200; s.MovedBytes > limit {
			t.Errorf("%d hot: %d bytes copied for %d written, want at most %d", hot, s.MovedBytes, written, limit)
		}
		for i := range hot {
			if !m.Read(block.ExtentID(i), 0, 1, p[:]) {
				t.Errorf("extent %d was read all the time, and is gone", i)
			}
		}
		if m.Read(block.ExtentID(hot), 0, 1, p[:]) {
			t.Error("what was not read is still there")
		}
	}
}

// TestPartialReadsOfOnePassCountOnce reads extents of 64 KiB in pieces of 4 KiB, all of them once, as a
// scan does: nothing may pass for hot. Read twice with time between, they are.
func TestPartialReadsOfOnePassCountOnce(t *testing.T) {
	for passes := range 3 {
		m := newSim(t, 64, 1024, Options{})
		var p [block.Size]byte
		for pass := range 1 + passes {
			for id := range block.ExtentID(1000) {
				if pass == 0 {
					m.Fill(1, id, zeroBlocks[:16*block.Size])
					m.settle()
				}
				for i := range 16 {
					m.Read(id, i, 1, p[:])
				}
			}
		}
		for range 500 { // others take their place
			m.write(t, 1, block.ExtentID(1<<40), 16)
		}
		if s := m.Stats(); passes == 0 && s.Moved > 0 || passes > 0 && s.Moved < 400 {
			t.Errorf("%d passes: %d extents were taken for hot", 1+passes, s.Moved)
		}
	}
}

// TestSmallTiersLeaveRoomForTheLog has a tier of the least size, all of which is read again and again.
func TestSmallTiersLeaveRoomForTheLog(t *testing.T) {
	m := newSim(t, 8, simSlotBlocks, Options{})
	for i := range 5000 {
		m.read(1, block.ExtentID(1+i%400))
		m.read(1, block.ExtentID(1+i%50))
		if _, busy, _ := m.space.Counts(); busy > 2 {
			t.Fatalf("read %d: the cache keeps %d slots of 8 busy", i, busy)
		}
	}
	if s := m.Stats(); s.Hits == 0 || s.Moved > 0 {
		t.Errorf("stats %+v", s)
	}
}

// TestSlotsAreFreeAheadOfNeed takes slots of a full tier one by one, as a log does, with much to copy.
func TestSlotsAreFreeAheadOfNeed(t *testing.T) {
	m := newSim(t, 128, simSlotBlocks, Options{})
	for id := range block.ExtentID(128 * simSlotBlocks) {
		m.read(1, id)
		m.read(1, id)
	}
	for n := range 200 {
		if free, _, _ := m.space.Counts(); free < m.ahead {
			t.Fatalf("slot %d: %d free slots, want %d", n, free, m.ahead)
		}
		m.write(t, 1, block.ExtentID(1<<40+n*simSlotBlocks), 1)
	}
	if m.Stats().Moved == 0 {
		t.Error("nothing was copied: this tests nothing")
	}
}

func heapBytes() int64 {
	runtime.GC()
	runtime.GC()
	var s runtime.MemStats
	runtime.ReadMemStats(&s)
	return int64(s.HeapAlloc)
}
