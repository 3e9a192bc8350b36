package tier

import (
	"bytes"
	"errors"
	"sync"
	"sync/atomic"
	"testing"

	"graindisk/block"
	"graindisk/internal/vfs"
)

func open(t *testing.T, dir string, slots int) *Space {
	t.Helper()
	s, err := Open(Options{FS: vfs.OS{}, Dir: dir, SlotBytes: 8 * block.Size, Slots: slots})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
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
