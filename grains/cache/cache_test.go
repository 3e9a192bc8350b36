package cache

import (
	"bytes"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"graindisk/block"
	"graindisk/internal/vfs"
	"graindisk/tier"
)

const testSlotBlocks = 32

// rig is a small tier in a temporary folder with a cache over it.
type rig struct {
	*Cache
	t     *testing.T
	space *tier.Space
	dir   string
}

func newRig(t *testing.T, slots int) *rig {
	t.Helper()
	return openRig(t, t.TempDir(), slots)
}

func openRig(t *testing.T, dir string, slots int) *rig {
	t.Helper()
	s, err := tier.Open(tier.Options{FS: vfs.OS{}, Dir: dir, SlotBytes: testSlotBlocks * block.Size, Slots: slots})
	if err != nil {
		t.Fatal(err)
	}
	s.Claimed()
	c, err := New(s, Options{FS: vfs.OS{}, Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	s.OnEvict(c.DropSlot)
	s.OnTake(c.MakeRoom)
	r := &rig{c, t, s, dir}
	t.Cleanup(r.close)
	return r
}

// settle waits until nothing goes on in the background.
func (c *Cache) settle() { c.work.Wait() }

func (r *rig) close() {
	r.Close()
	r.space.Close()
}

// content is what block i of an extent holds in these tests.
func content(id block.ExtentID, i int) []byte {
	p := make([]byte, block.Size)
	src := rand.New(rand.NewPCG(uint64(id), uint64(i)))
	for j := 0; j < 64; j += 8 {
		binary.LittleEndian.PutUint64(p[j:], src.Uint64())
	}
	return p
}

func extent(id block.ExtentID, off, blocks int) []byte {
	var p []byte
	for i := range blocks {
		p = append(p, content(id, off+i)...)
	}
	return p
}

// logSlot is a slot filled as the log would, to be adopted from.
func (r *rig) logSlot(header uint64) int {
	r.t.Helper()
	slot, err := r.space.Take(0)
	if err != nil {
		r.t.Fatal(err)
	}
	if err := r.space.Prewrite(slot); err != nil {
		r.t.Fatal(err)
	}
	p := make([]byte, block.Size)
	binary.LittleEndian.PutUint64(p, header)
	r.write(tier.NewPlace(slot, 0), p)
	return slot
}

func (r *rig) write(at tier.Place, p []byte) {
	r.t.Helper()
	if err := r.space.WriteAt(at, [][]byte{p}); err != nil {
		r.t.Fatal(err)
	}
}

// put writes block i of an extent to the tier and says where it is.
func (r *rig) put(id block.ExtentID, i int, at tier.Place) BlockRef {
	r.t.Helper()
	p := content(id, i)
	r.write(at, p)
	return BlockRef{at, block.CRC(p)}
}

// wants expects a hit or a miss, and the right bytes.
func (r *rig) wants(hit bool, id block.ExtentID, off, blocks int) {
	r.t.Helper()
	p := make([]byte, blocks*block.Size)
	if got := r.Read(id, off, blocks, p); got != hit {
		r.t.Errorf("extent %v [%d,+%d): hit %v, want %v", id, off, blocks, got, hit)
	} else if got && !bytes.Equal(p, extent(id, off, blocks)) {
		r.t.Errorf("extent %v [%d,+%d): wrong bytes", id, off, blocks)
	}
}

func TestAdoptedBlocksAreFound(t *testing.T) {
	r := newRig(t, 8)
	a, b := r.logSlot(1), r.logSlot(2)
	whole, scattered := block.NewExtentID(1, 0), block.NewExtentID(1, 1)
	var refs []BlockRef
	for i := range 16 {
		refs = append(refs, r.put(whole, i, tier.NewPlace(a, uint32(1+i))))
	}
	r.Adopt(1, whole, refs)
	r.Adopt(1, scattered, []BlockRef{
		r.put(scattered, 0, tier.NewPlace(b, 9)),
		r.put(scattered, 1, tier.NewPlace(a, 20)),
		r.put(scattered, 2, tier.NewPlace(a, 21)),
		r.put(scattered, 3, tier.NewPlace(a, 19)),
		r.put(scattered, 4, tier.NewPlace(b, 10)),
	})
	r.wants(true, whole, 0, 16)
	r.wants(true, whole, 15, 1)
	r.wants(true, whole, 3, 7)
	r.wants(true, whole, 3, 0)
	r.wants(false, whole, 0, 17)
	r.wants(false, whole, 16, 1)
	for off := range 5 {
		for n := 1; off+n <= 5; n++ {
			r.wants(true, scattered, off, n)
		}
	}
	r.wants(false, block.NewExtentID(1, 2), 0, 1)
	if s := r.Stats(); s.Entries != 5 || s.Bytes != 21*block.Size {
		t.Errorf("%d entries of %d bytes, want 1+4 of 21 blocks", s.Entries, s.Bytes)
	}

	r.DropSlot(b)
	r.wants(true, whole, 0, 16)
	r.wants(true, scattered, 1, 3)
	r.wants(false, scattered, 0, 2)
	r.wants(false, scattered, 4, 1)
	r.Drop(whole)
	r.wants(false, whole, 0, 1)
	r.DropSlot(a)
	if s := r.Stats(); s.Entries != 0 || s.Bytes != 0 || s.Evicted != 4 {
		t.Errorf("after the slots are gone: %+v", s)
	}
}

func TestAdoptingAgainReplaces(t *testing.T) {
	r := newRig(t, 8)
	a, b := r.logSlot(1), r.logSlot(2)
	r.Adopt(1, 7, []BlockRef{r.put(7, 0, tier.NewPlace(a, 1)), r.put(7, 1, tier.NewPlace(a, 2))})
	r.Adopt(1, 7, []BlockRef{r.put(7, 0, tier.NewPlace(b, 1)), r.put(7, 1, tier.NewPlace(b, 2))})
	r.DropSlot(a)
	r.wants(true, 7, 0, 2)
	if s := r.Stats(); s.Entries != 1 {
		t.Errorf("%d entries, want 1", s.Entries)
	}
}

// TestFillIsBounded fills ten times what the tier holds: the newest is found, the oldest has made
// room, and the slots reserved for the log are left alone.
func TestFillIsBounded(t *testing.T) {
	const slots, n = 8, 80 * testSlotBlocks / 16
	r := newRig(t, slots)
	for i := range n {
		id := block.ExtentID(i)
		r.Fill(1, id, extent(id, 0, 16))
		r.settle() // the next slot is ready in time, so that no fill is skipped
		r.wants(true, id, 0, 16)
	}
	s := r.Stats()
	if s.Fills.Total() != n || s.FillsSkipped != 0 {
		t.Errorf("%d fills, %d skipped of %d", s.Fills.Total(), s.FillsSkipped, n)
	}
	if s.Evicted == 0 || s.Bytes > slots*testSlotBlocks*block.Size {
		t.Errorf("%d evicted, %d bytes in the index", s.Evicted, s.Bytes)
	}
	r.wants(false, 0, 0, 16)
	if free, _, clean := r.space.Counts(); free+clean < 2 {
		t.Errorf("%d free and %d clean slots left for the log, want 2", free, clean)
	}
	r.Fill(1, n-1, extent(n-1, 0, 16))
	if again := r.Stats(); again.Fills != s.Fills {
		t.Error("filled what is there")
	}
}

func TestFillWithoutASlotIsSkipped(t *testing.T) {
	r := newRig(t, 4)
	for range 3 {
		r.logSlot(1)
	}
	r.Fill(1, 1, extent(1, 0, 4))
	r.wants(false, 1, 0, 4)
	if s := r.Stats(); s.FillsSkipped != 1 {
		t.Errorf("%d fills skipped, want 1", s.FillsSkipped)
	}
	if free, busy, _ := r.space.Counts(); free != 1 || busy != 3 {
		t.Errorf("%d free, %d busy: the cache took a slot of the log's", free, busy)
	}
}

func TestFillLongerThanASlotIsSkipped(t *testing.T) {
	r := newRig(t, 8)
	r.Fill(1, 1, extent(1, 0, testSlotBlocks))
	r.wants(false, 1, 0, 1)
	r.Fill(1, 2, extent(2, 0, testSlotBlocks-1))
	r.wants(true, 2, 0, testSlotBlocks-1)
}

// TestCorruptionIsAMiss flips one bit on the tier below the cache.
func TestCorruptionIsAMiss(t *testing.T) {
	r := newRig(t, 8)
	r.Fill(1, 1, extent(1, 0, 4))
	r.Fill(1, 2, extent(2, 0, 4))
	var buf [4]run
	runs, _ := r.find(1, 2, 1, buf[:0], false)
	at := runs[0].place
	unpin(r.space, runs)
	f, err := os.OpenFile(filepath.Join(r.dir, tier.Name(at.Slot())), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	bad := content(1, 2)
	bad[4000] ^= 1
	if _, err := f.WriteAt(bad, int64(at.Block())*block.Size); err != nil {
		t.Fatal(err)
	}
	r.wants(true, 1, 0, 2) // the block is not in it
	r.wants(false, 1, 2, 1)
	r.wants(false, 1, 0, 2) // forgotten
	r.wants(true, 2, 0, 4)
	if s := r.Stats(); s.CRCFailures != 1 || s.Hits != 2 || s.Misses != 2 {
		t.Errorf("stats %+v", s)
	}
}

// brittle is a tier whose reads or writes fail.
type brittle struct {
	*tier.Space
	reads, writes, prewrites atomic.Bool
	onWrite                  func(slot int) // told before each write that succeeds
	onPrewrite               func()         // the same
}

var errIO = errors.New("input/output error")

func (b *brittle) ReadAt(at tier.Place, p []byte) error {
	if b.reads.Load() {
		return errIO
	}
	return b.Space.ReadAt(at, p)
}

func (b *brittle) WriteAt(at tier.Place, bufs [][]byte) error {
	if b.writes.Load() {
		return errIO
	}
	if b.onWrite != nil {
		b.onWrite(at.Slot())
	}
	return b.Space.WriteAt(at, bufs)
}

func (b *brittle) Prewrite(slot int) error {
	if b.prewrites.Load() {
		return errIO
	}
	if b.onPrewrite != nil {
		b.onPrewrite()
	}
	return b.Space.Prewrite(slot)
}

// TestFillsWaitForTheFirstSlot fills from many sides while the first slot is being made ready, as after an open.
func TestFillsWaitForTheFirstSlot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, 8)
		b := &brittle{Space: r.space, onPrewrite: func() { time.Sleep(time.Second) }}
		c, err := New(b, Options{})
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		var all sync.WaitGroup
		for id := range block.ExtentID(3) {
			all.Go(func() { c.Fill(1, id+1, extent(id+1, 0, 1)) })
		}
		all.Wait()
		for id := range block.ExtentID(3) {
			if !c.Has(id+1, 1) {
				t.Errorf("fill %d was skipped", id+1)
			}
		}
	})
}

func TestIOErrorsAreMisses(t *testing.T) {
	r := newRig(t, 8)
	b := &brittle{Space: r.space}
	c, err := New(b, Options{})
	if err != nil {
		t.Fatal(err)
	}
	p := make([]byte, 4*block.Size)

	b.prewrites.Store(true)
	c.Fill(1, 1, extent(1, 0, 4))
	if free, busy, _ := r.space.Counts(); free != 8 || busy != 0 || c.Read(1, 0, 4, p) {
		t.Errorf("%d free, %d busy after a slot could not be made", free, busy)
	}
	b.prewrites.Store(false)
	c.Fill(1, 1, extent(1, 0, 4))
	if c.Read(1, 0, 4, p) {
		t.Error("filled at once after an I/O error")
	}
	c.small.retryAt = time.Time{}
	c.Fill(1, 1, extent(1, 0, 4))
	if !c.Read(1, 0, 4, p) {
		t.Error("not filled after the pause")
	}

	b.writes.Store(true)
	c.Fill(1, 2, extent(2, 0, 4))
	if c.Read(2, 0, 4, p) || !c.Read(1, 0, 4, p) {
		t.Error("a failed write must lose its own blocks alone")
	}
	b.reads.Store(true)
	if c.Read(1, 0, 4, p) || c.Stats().ReadErrors != 1 {
		t.Error("a failed read must be a miss and be counted")
	}
	c.Close()
	if _, busy, _ := r.space.Counts(); busy != 0 {
		t.Errorf("%d slots busy after Close", busy)
	}
}

func TestSlotChangingHandsIsAMiss(t *testing.T) {
	r := newRig(t, 4)
	for i := range block.ExtentID(4) {
		slot := r.logSlot(uint64(i))
		r.Adopt(1, i, []BlockRef{r.put(i, 0, tier.NewPlace(slot, 1))})
		r.space.SetClean(slot)
	}
	r.space.OnTake(nil) // nobody evicts but Take
	r.space.OnEvict(func(slot int) {
		r.wants(false, 0, 0, 1) // still in the index, but too late
		r.wants(true, 1, 0, 1)
		r.DropSlot(slot)
		r.wants(false, 0, 0, 1)
	})
	if _, err := r.space.Take(0); err != nil {
		t.Fatal(err)
	}
	if s := r.Stats(); s.Evicted != 1 {
		t.Errorf("%d evicted, want 1", s.Evicted)
	}
}

// TestSlotStaysWhileAFillWrites fills the rest of a slot, which makes it clean, while an earlier fill
// is still writing there: the tier must not hand it out before that ends.
func TestSlotStaysWhileAFillWrites(t *testing.T) {
	r := newRig(t, 8)
	b := &brittle{Space: r.space}
	c, err := New(b, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	r.space.OnEvict(c.DropSlot)
	r.space.OnTake(nil)           // nobody evicts but Take
	c.Fill(1, 1, extent(1, 0, 1)) // opens the slot
	writing := false
	b.onWrite = func(slot int) {
		if writing {
			return
		}
		writing = true
		c.Fill(1, 3, extent(3, 0, testSlotBlocks-1)) // does not fit any more
		if _, _, clean := r.space.Counts(); clean != 1 {
			t.Fatalf("%d clean slots: this test tests nothing", clean)
		}
		for ready := false; !ready; runtime.Gosched() { // the slot made ready ahead of need is not to be this one, once the fill has ended
			c.small.mu.Lock()
			ready = c.small.next != noSlot
			c.small.mu.Unlock()
		}
		for {
			taken, err := r.space.Take(0)
			if err != nil {
				break
			}
			if taken == slot {
				t.Error("the slot was handed out under the fill")
			}
		}
	}
	c.Fill(1, 2, extent(2, 0, 4))
	p := make([]byte, 4*block.Size)
	if !c.Read(2, 0, 4, p) || !bytes.Equal(p, extent(2, 0, 4)) {
		t.Error("the fill is not there")
	}
}

// TestGapBetweenOverlappingEntries has entries that no cache makes.
func TestGapBetweenOverlappingEntries(t *testing.T) {
	r := newRig(t, 8)
	slot := r.logSlot(1)
	for i := range uint32(8) {
		r.put(1, int(i), tier.NewPlace(slot, 1+i))
	}
	var entries []placed
	for i := range 2 {
		e, _ := r.add(r.info(slot), newEntry{1, 0, run{place: tier.NewPlace(slot, uint32(1+i)), off: i, blocks: 2}}, false)
		entries = append(entries, placed{slot, e})
	}
	r.replace(1, entries)
	r.wants(false, 1, 0, 4)
}

// TestEvictionWhileReading has a log and fills turn the small tier over while readers check all
// they get. The content of every extent follows from its name.
func TestEvictionWhileReading(t *testing.T) {
	r := newRig(t, 8)
	var err error
	if r.ram, err = newRAM(300 << 10); err != nil {
		t.Fatal(err)
	}
	const names = 200
	var stop atomic.Bool
	var hits atomic.Uint64
	var wg sync.WaitGroup
	for g := range 3 {
		wg.Go(func() {
			rnd := rand.New(rand.NewPCG(uint64(g), 1))
			p := make([]byte, 8*block.Size)
			for !stop.Load() {
				id := block.ExtentID(rnd.IntN(names))
				off := rnd.IntN(8)
				n := 1 + rnd.IntN(8-off)
				if r.Read(id, off, n, p[:n*block.Size]) {
					hits.Add(1)
					if !bytes.Equal(p[:n*block.Size], extent(id, off, n)) {
						t.Errorf("extent %v [%d,+%d): wrong bytes", id, off, n)
						return
					}
				}
			}
		})
	}
	wg.Go(func() { // fills
		rnd := rand.New(rand.NewPCG(8, 1))
		for !stop.Load() {
			id := block.ExtentID(rnd.IntN(names / 2))
			r.Fill(1, id, extent(id, 0, 8))
		}
	})
	for round := range 400 { // the log: a slot of interleaved extents, adopted, then clean
		slot, err := r.space.Take(0)
		if errors.Is(err, tier.ErrNoSlot) {
			continue
		}
		if err == nil {
			err = r.space.Prewrite(slot)
		}
		if err != nil {
			t.Fatal(err)
		}
		a, b := block.ExtentID(names/2+round%(names/2)), block.ExtentID(names/2+(round*7+1)%(names/2))
		refs := map[block.ExtentID][]BlockRef{}
		for i := range 8 {
			for j, id := range []block.ExtentID{a, b} {
				p := content(id, i)
				at := tier.NewPlace(slot, uint32(1+2*i+j))
				if err := r.space.WriteAt(at, [][]byte{p}); err != nil {
					t.Fatal(err)
				}
				refs[id] = append(refs[id], BlockRef{at, block.CRC(p)})
			}
		}
		for id := range refs {
			r.Adopt(1, id, refs[id][:8])
		}
		r.space.SetClean(slot)
		if round%50 == 0 {
			r.Drop(a)
			if err := r.Save(); err != nil {
				t.Error(err)
			}
		}
	}
	stop.Store(true)
	wg.Wait()
	s := r.Stats()
	if s.CRCFailures+s.ReadErrors != 0 {
		t.Errorf("%d CRC failures, %d read errors: a slot changed hands under a reader", s.CRCFailures, s.ReadErrors)
	}
	if hits.Load() == 0 || s.Evicted == 0 || s.Fills.Total() == 0 {
		t.Errorf("nothing was tested: %+v", s)
	}
}

// TestIndexMatchesModel runs random operations against plain maps.
func TestIndexMatchesModel(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 1))
	r := newRig(t, 40)
	const names, slots = 300, 16
	var taken [slots]int
	for i := range taken {
		taken[i] = r.logSlot(uint64(i + 1))
	}
	model := map[block.ExtentID][]tier.Place{}
	drop := func(slot int) {
		r.DropSlot(slot)
		for _, places := range model {
			for i, at := range places {
				if at.Slot() == slot {
					places[i] = gone
				}
			}
		}
	}
	for range 20_000 {
		for _, slot := range taken { // here blocks are adopted again and again; a log writes them once
			if info := r.slots[slot].Load(); info != nil && info.count() > testSlotBlocks-10 {
				drop(slot)
			}
		}
		id := block.ExtentID(rnd.IntN(names))
		switch rnd.IntN(10) {
		case 0:
			drop(taken[rnd.IntN(slots)])
		case 1:
			r.Drop(id)
			delete(model, id)
		case 2, 3, 4:
			var refs []BlockRef
			var places []tier.Place
			at := tier.NewPlace(taken[rnd.IntN(slots)], 1)
			for range 1 + rnd.IntN(10) {
				if rnd.IntN(3) == 0 || int(at.Block()) == testSlotBlocks {
					at = tier.NewPlace(taken[rnd.IntN(slots)], uint32(1+rnd.IntN(testSlotBlocks-1)))
				}
				refs = append(refs, BlockRef{Place: at})
				places = append(places, at)
				at = tier.NewPlace(at.Slot(), at.Block()+1)
			}
			r.Adopt(1, id, refs)
			model[id] = places
		default:
			off, n := rnd.IntN(12), 1+rnd.IntN(6)
			runs, ok := r.find(id, off, n, nil, false)
			var got []tier.Place
			for _, p := range runs {
				for i := range p.blocks {
					got = append(got, tier.NewPlace(p.place.Slot(), p.place.Block()+uint32(i)))
				}
			}
			unpin(r.space, runs)
			want := off+n <= len(model[id])
			for i := 0; want && i < n; i++ {
				want = model[id][off+i] != gone
			}
			if ok != want {
				t.Fatalf("extent %v [%d,+%d): found %v, model says %v", id, off, n, ok, want)
			}
			for i := range got {
				if got[i] != model[id][off+i] {
					t.Fatalf("extent %v block %d: at %x, model says %x", id, off+i, got[i], model[id][off+i])
				}
			}
		}
	}
	blocks := 0
	for _, places := range model {
		for _, at := range places {
			if at != gone {
				blocks++
			}
		}
	}
	if s := r.Stats(); s.Bytes != int64(blocks)*block.Size {
		t.Errorf("%d bytes in the index, model has %d", s.Bytes, blocks*block.Size)
	}
	for _, slot := range taken {
		r.DropSlot(slot)
	}
	for i := range r.shards {
		s := &r.shards[i]
		for at, cell := range s.cells {
			if cell != 0 {
				t.Errorf("shard %d, empty: cell %d is not", i, at)
			}
		}
		if s.used != 0 || s.blocks != 0 {
			t.Errorf("shard %d, empty: %d entries of %d blocks", i, s.used, s.blocks)
		}
	}
	if n := r.shares.total.Load(); n != 0 {
		t.Errorf("%d blocks counted to disks of an empty cache", n)
	}
}

const gone = ^tier.Place(0)
