package tier

import (
	"bytes"
	"errors"
	"sync"
	"sync/atomic"
	"testing"

	"graindisk/block"
	"graindisk/internal/crashtest"
	"graindisk/internal/vfs"
)

func open(t *testing.T, dir string, slots int) *Space {
	t.Helper()
	s, err := Open(Options{FS: vfs.OS{}, Dir: dir, SlotBytes: 8 * block.Size, Slots: slots})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	s.Claimed()
	return s
}

// TestNothingChangesHandsBeforeItIsClaimed opens a tier, larger at the last start, and asks for all that
// would destroy what a slot holds before recovery has said which ones it needs.
func TestNothingChangesHandsBeforeItIsClaimed(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir, 6)
	for i := range 6 {
		if err := s.Prewrite(i); err != nil {
			t.Fatal(err)
		}
	}
	s, err := Open(Options{FS: vfs.OS{}, Dir: dir, SlotBytes: 8 * block.Size, Slots: 4})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	s.SetClean(1)
	s.SetKept(2)
	if i, err := s.Take(0); !errors.Is(err, ErrNoSlot) {
		t.Errorf("took slot %d, %v", i, err)
	}
	if i, err := s.TakeMade(0); !errors.Is(err, ErrNoSlot) {
		t.Errorf("took slot %d, %v", i, err)
	}
	if s.Evict(1) || s.Evict(2) {
		t.Error("a slot was evicted")
	}
	if err := s.Reclaim(4, 0); err != nil {
		t.Error(err)
	}
	for i := range 6 {
		if !s.Exists(i) {
			t.Errorf("slot %d has lost its file", i)
		}
	}
	s.SetBusy(5)
	s.Claimed()
	if err := s.Reclaim(4, 0); err != nil {
		t.Error(err)
	}
	for i := range 6 {
		if want := i == 1 || i == 2 || i == 5; s.Exists(i) != want {
			t.Errorf("slot %d has its space: %v, want %v", i, s.Exists(i), want)
		}
	}
	if _, err := s.Take(0); err != nil {
		t.Error(err)
	}
}

func TestTakeEvictsTheOldestCleanSlotNobodyReads(t *testing.T) {
	s := open(t, t.TempDir(), 4)
	var evicted []int
	s.OnEvict(func(i int) {
		if s.Pin(i) {
			t.Errorf("slot %d could be pinned while it changed hands", i)
		}
		evicted = append(evicted, i)
	})
	var got []int
	for range 4 {
		i, err := s.Take(0)
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, i)
	}
	if _, err := s.Take(0); !errors.Is(err, ErrNoSlot) {
		t.Fatalf("all busy: got %v", err)
	}
	s.SetClean(got[2])
	s.SetClean(got[0])
	s.SetClean(got[1])
	s.Pin(got[2])
	if _, err := s.Take(3); !errors.Is(err, ErrNoSlot) {
		t.Fatalf("three available, three reserved: got %v", err)
	}
	i, err := s.Take(2)
	if err != nil || i != got[0] {
		t.Fatalf("took %d, %v; want the oldest unpinned, %d", i, err, got[0])
	}
	s.Unpin(got[2])
	if i, err = s.Take(0); err != nil || i != got[2] {
		t.Fatalf("took %d, %v; want %d", i, err, got[2])
	}
	if len(evicted) != 2 {
		t.Fatalf("told of %v", evicted)
	}
	if !s.Pin(got[2]) {
		t.Fatal("a taken slot cannot be pinned")
	}
}

func TestKeptSlotsGoLast(t *testing.T) {
	s := open(t, t.TempDir(), 4)
	for i := range 4 {
		if i%2 == 0 {
			s.SetKept(i)
		} else {
			s.SetClean(i)
		}
	}
	if free, busy, clean := s.Counts(); free != 0 || busy != 0 || clean != 4 || s.Kept() != 2 {
		t.Fatalf("%d free, %d busy, %d clean, %d kept", free, busy, clean, s.Kept())
	}
	var free []int
	s.OnTake(func(n int) { free = append(free, n) })
	for _, want := range []int{1, 3, 0, 2} {
		if i, err := s.Take(0); err != nil || i != want {
			t.Fatalf("took %d, %v; want %d", i, err, want)
		}
	}
	if len(free) != 4 || free[0] != 0 {
		t.Fatalf("told of %v free slots", free)
	}
}

func TestEvictFreesACleanSlotNobodyReads(t *testing.T) {
	s := open(t, t.TempDir(), 4)
	told := 0
	s.OnEvict(func(int) { told++ })
	if s.Evict(1) {
		t.Fatal("evicted a free slot")
	}
	s.SetClean(1)
	s.SetKept(2)
	if i, ok := s.Oldest(false); !ok || i != 1 {
		t.Fatalf("oldest clean slot %d, %v", i, ok)
	}
	if i, ok := s.Oldest(true); !ok || i != 2 {
		t.Fatalf("oldest kept slot %d, %v", i, ok)
	}
	s.Pin(1)
	if s.Evict(1) {
		t.Fatal("evicted a pinned slot")
	}
	s.Unpin(1)
	if !s.Evict(1) || !s.Evict(2) || told != 2 {
		t.Fatalf("not evicted; told %d times", told)
	}
	if free, busy, clean := s.Counts(); free != 4 || busy != 0 || clean != 0 {
		t.Fatalf("%d free, %d busy, %d clean", free, busy, clean)
	}
	if !s.Pin(1) {
		t.Fatal("a slot that was evicted cannot be pinned")
	}
}

// TestSpaceGoesBackToTheFileSystem takes, fills and frees all slots: Reclaim leaves what it is told to,
// and a slot that gave up its space is written in full before it is used again.
func TestSpaceGoesBackToTheFileSystem(t *testing.T) {
	fsys := crashtest.NewFS(crashtest.Options{Seed: 1})
	s := openOn(t, fsys, 6)
	const slotBytes = 8 * block.Size
	for range 6 {
		i, err := s.Take(0)
		if err == nil {
			err = s.Prewrite(i)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	s.SetClean(3)
	for _, i := range []int{0, 1, 2, 4} {
		s.Free(i)
	}
	if got := fsys.UsedBytes(); got != 6*slotBytes {
		t.Fatalf("%d bytes used, want %d", got, 6*slotBytes)
	}
	for range 2 {
		if err := s.Reclaim(2, 1); err != nil {
			t.Fatal(err)
		}
		if got := fsys.UsedBytes(); got < 3*slotBytes || got > 4*slotBytes {
			t.Fatalf("%d bytes used", got)
		}
	}
	if got := fsys.UsedBytes(); got != 3*slotBytes {
		t.Fatalf("%d bytes used with one free slot prewritten, one clean, one busy: want %d", got, 3*slotBytes)
	}
	if free, busy, clean := s.Counts(); free != 4 || busy != 1 || clean != 1 {
		t.Fatalf("%d free, %d busy, %d clean", free, busy, clean)
	}
	for range 4 {
		i, err := s.Take(1)
		if err == nil {
			err = s.Prewrite(i)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if got := fsys.UsedBytes(); got != 6*slotBytes {
		t.Fatalf("%d bytes used after prewriting all: want %d", got, 6*slotBytes)
	}
}

// TestSmallerTier opens a tier with fewer slots than it has files: what recovery claims stays until it
// is clean, nothing beyond is taken, and Reclaim removes the files, whatever crashes between.
func TestSmallerTier(t *testing.T) {
	const slotBytes = 8 * block.Size
	for cut := 1; ; cut++ {
		fsys := crashtest.NewFS(crashtest.Options{Seed: uint64(cut)})
		s := openOn(t, fsys, 8)
		for range 8 {
			i, err := s.Take(0)
			if err == nil {
				err = s.Prewrite(i)
			}
			if err == nil {
				err = s.WriteAt(NewPlace(i, 1), [][]byte{bytes.Repeat([]byte{byte(i + 1)}, block.Size)})
			}
			if err == nil {
				err = s.Sync(i)
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		fsys.CutAfter(cut)
		err := shrinkTo4(t, fsys)
		was := fsys.WasCut()
		if !was && err != nil {
			t.Fatal(err)
		}
		if was {
			fsys = fsys.Reboot(uint64(cut))
			if err := shrinkTo4(t, fsys); err != nil {
				t.Fatalf("cut=%d: %v", cut, err)
			}
		}
		if got := fsys.UsedBytes(); got != 5*slotBytes {
			t.Fatalf("cut=%d: %d bytes used, want four slots and the busy one", cut, got)
		}
		if !was {
			return
		}
	}
}

// shrinkTo4 opens the tier with four slots, slots 2 and 6 being claimed.
func shrinkTo4(t *testing.T, fsys vfs.FS) error {
	s, err := Open(Options{FS: fsys, Dir: "tier", SlotBytes: 8 * block.Size, Slots: 4})
	if err != nil {
		return err
	}
	if s.Slots() > 8 || s.Slots() < 7 || s.Usable() != 4 {
		t.Fatalf("%d slots, %d usable", s.Slots(), s.Usable())
	}
	s.SetBusy(2)
	s.SetBusy(6)
	if s.Slots() == 8 {
		s.SetClean(7)
	}
	s.Claimed()
	var evicted []int
	s.OnEvict(func(i int) { evicted = append(evicted, i) })
	if err := s.Reclaim(0, 0); err != nil {
		return err
	}
	for range 3 {
		if i, err := s.Take(0); err != nil || i >= 4 || i == 2 {
			t.Fatalf("took slot %d, %v", i, err)
		}
	}
	if i, err := s.Take(0); !errors.Is(err, ErrNoSlot) {
		t.Fatalf("took slot %d, %v: none is left", i, err)
	}
	p := make([]byte, block.Size)
	for _, i := range []int{2, 6} {
		if err := s.ReadAt(NewPlace(i, 1), p); err != nil {
			return err
		}
		if p[0] != byte(i+1) || p[block.Size-1] != byte(i+1) {
			t.Fatalf("claimed slot %d lost its bytes", i)
		}
	}
	if s.Exists(5) || s.Exists(4) {
		t.Fatal("a slot beyond the tier still exists")
	}
	return nil
}

func openOn(t *testing.T, fsys vfs.FS, slots int) *Space {
	t.Helper()
	if err := errors.Join(fsys.MkdirAll("tier"), fsys.SyncDir(".")); err != nil {
		t.Fatal(err)
	}
	s, err := Open(Options{FS: fsys, Dir: "tier", SlotBytes: 8 * block.Size, Slots: slots})
	if err != nil {
		t.Fatal(err)
	}
	s.Claimed()
	return s
}

func TestSlotsKeepTheirBytesOverReopen(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir, 4)
	i, _ := s.Take(0)
	if err := s.Prewrite(i); err != nil {
		t.Fatal(err)
	}
	want := bytes.Repeat([]byte{7}, 2*block.Size)
	if err := s.WriteAt(NewPlace(i, 3), [][]byte{want[:100], want[100:]}); err != nil {
		t.Fatal(err)
	}
	if err := s.Sync(i); err != nil {
		t.Fatal(err)
	}
	s = open(t, dir, 4)
	if n, err := SlotBytesOf(vfs.OS{}, dir); err != nil || n != 8*block.Size {
		t.Fatalf("slot size found to be %d, %v", n, err)
	}
	if !s.Exists(i) {
		t.Fatal("a prewritten slot is not known after reopening")
	}
	got := make([]byte, len(want))
	if err := s.ReadAt(NewPlace(i, 3), got); err != nil || !bytes.Equal(got, want) {
		t.Fatalf("read back differs, err %v", err)
	}
	s.SetBusy(i)
	for range 3 {
		if j, err := s.Take(0); err != nil || j == i {
			t.Fatalf("took %d, %v: slot %d is busy", j, err, i)
		}
	}
}

// TestReadersNeverSeeASlotChangeHands pins and reads slots while they are evicted and refilled; a
// reader that found a slot in the index under its lock must read what the index promised.
func TestReadersNeverSeeASlotChangeHands(t *testing.T) {
	s := open(t, t.TempDir(), 4)
	var mu sync.RWMutex
	index := map[int]byte{}
	s.OnEvict(func(i int) { mu.Lock(); delete(index, i); mu.Unlock() })
	var done atomic.Bool
	var wg sync.WaitGroup
	for range 2 {
		wg.Go(func() {
			p := make([]byte, block.Size)
			for n := 0; !done.Load(); n++ {
				i := n % 4
				mu.RLock()
				want, ok := index[i]
				ok = ok && s.Pin(i)
				mu.RUnlock()
				if !ok {
					continue
				}
				if err := s.ReadAt(NewPlace(i, 1), p); err != nil || p[0] != want || p[block.Size-1] != want {
					t.Errorf("slot %d: got %d, want %d, err %v", i, p[0], want, err)
				}
				s.Unpin(i)
			}
		})
	}
	for n := range 2000 {
		i, err := s.Take(0)
		if err != nil {
			continue
		}
		if err := s.Prewrite(i); err != nil {
			t.Fatal(err)
		}
		if err := s.WriteAt(NewPlace(i, 1), [][]byte{bytes.Repeat([]byte{byte(n)}, block.Size)}); err != nil {
			t.Fatal(err)
		}
		mu.Lock()
		index[i] = byte(n)
		mu.Unlock()
		s.SetClean(i)
	}
	done.Store(true)
	wg.Wait()
}
