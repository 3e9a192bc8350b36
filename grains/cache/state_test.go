package cache

import (
	"bytes"
	"encoding/binary"
	"errors"
	"flag"
	"os"
	"path/filepath"
	"testing"

	"graindisk/block"
	"graindisk/tier"
)

var update = flag.Bool("update", false, "rewrite the golden files")

func never(int) bool { return false }

// oldState is an index in the form that local checkpoints held before version 2 of the cache.
func oldState(t *testing.T) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("testdata", "state.golden"))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// oldRig is a tier that holds what oldState says. Slot b has been used for something else if anew.
func oldRig(t *testing.T, anew bool) *rig {
	r := newRig(t, 8)
	a, b := r.logSlot(1), r.logSlot(2)
	r.put(1, 0, tier.NewPlace(b, 1))
	r.put(1, 1, tier.NewPlace(b, 2))
	r.put(1, 2, tier.NewPlace(a, 30))
	r.put(2, 0, tier.NewPlace(b, 31))
	if anew {
		r.write(tier.NewPlace(b, 0), make([]byte, block.Size))
	}
	return r
}

func TestRestoreReadsTheOldForm(t *testing.T) {
	r := oldRig(t, false)
	p := make([]byte, 3*block.Size)
	busy := -1
	err := r.Restore(oldState(t), func(slot int) bool {
		if busy < 0 {
			busy = slot
		}
		return slot == busy
	})
	if err != nil {
		t.Fatal(err)
	}
	if !r.Read(block.NewExtentID(3, 4), 0, 3, p) || !bytes.Equal(p, extent(1, 0, 3)) {
		t.Error("an extent in two slots is not there")
	}
	if !r.Read(block.NewExtentID(2, 9), 0, 1, p[:block.Size]) || !bytes.Equal(p[:block.Size], content(2, 0)) {
		t.Error("an extent of one block is not there")
	}
	if _, busy, clean := r.space.Counts(); busy != 1 || clean != 1 {
		t.Errorf("%d busy, %d clean: want the one that is claimed busy, the other clean", busy, clean)
	}

	r = oldRig(t, true)
	if err := r.Restore(oldState(t), never); err != nil {
		t.Fatal(err)
	}
	if r.Read(block.NewExtentID(2, 9), 0, 1, p[:block.Size]) || r.Stats().Entries != 1 || r.Stats().CRCFailures != 0 {
		t.Errorf("a slot used anew was taken over: %+v", r.Stats())
	}
}

func TestRestoreRefuses(t *testing.T) {
	good := oldState(t)
	refused := func(name string, b []byte, want error) {
		t.Helper()
		r := newRig(t, 8)
		if err := r.Restore(b, never); !errors.Is(err, want) {
			t.Errorf("%s: %v, want %v", name, err, want)
		}
		if s := r.Stats(); s.Entries != 0 {
			t.Errorf("%s: %d entries", name, s.Entries)
		}
	}
	change := func(at int, to byte) []byte {
		b := bytes.Clone(good)
		b[at] = to
		return sealState(b)
	}
	refused("a newer version", change(4, 2), ErrNewer)
	refused("version 0", change(4, 0), ErrCorrupt)
	refused("an unknown incompat bit", change(15, 1), ErrNewer)
	refused("flags", change(6, 1), ErrCorrupt)
	refused("another magic", change(0, 'X'), ErrCorrupt)
	refused("other slots", change(16, testSlotBlocks+1), ErrCorrupt)
	refused("more slots than there are", change(20, 200), ErrCorrupt)
	refused("fewer slots than there are", change(20, 1), ErrCorrupt)
	refused("another length", change(24, 1), ErrCorrupt)
	refused("a slot beyond the tier", change(stateHeader, 100), ErrCorrupt)
	refused("too little", good[:8], ErrCorrupt)
	r := newRig(t, 8)
	for i := range good {
		b := bytes.Clone(good)
		b[i] ^= 0x10
		if err := r.Restore(b, never); !errors.Is(err, ErrCorrupt) && !errors.Is(err, ErrNewer) {
			t.Errorf("byte %d changed: %v", i, err)
		}
	}
}

// sealState puts the right checksum under b, so that what lies behind it is tested.
func sealState(b []byte) []byte {
	if len(b) >= stateHeader+stateCRC {
		sum := len(b) - stateCRC
		binary.LittleEndian.PutUint32(b[sum:], block.CRC(b[:sum]))
	}
	return b
}

// anySpace is a tier that agrees to everything, for fuzzing.
type anySpace struct{}

func (anySpace) Slots() int                         { return 8 }
func (anySpace) SlotBlocks() int                    { return testSlotBlocks }
func (anySpace) Exists(int) bool                    { return true }
func (anySpace) Take(int) (int, error)              { return 0, tier.ErrNoSlot }
func (anySpace) Prewrite(int) error                 { return nil }
func (anySpace) SetClean(int)                       {}
func (anySpace) SetKept(int)                        {}
func (anySpace) Usable() int                        { return 8 }
func (anySpace) Counts() (free, busy, clean int)    { return 0, 8, 0 }
func (anySpace) Kept() int                          { return 0 }
func (anySpace) Clean(int) bool                     { return false }
func (anySpace) Oldest(bool) (int, bool)            { return 0, false }
func (anySpace) Evict(int) bool                     { return false }
func (anySpace) Reclaim(int, int) error             { return nil }
func (anySpace) Free(int)                           {}
func (anySpace) Pin(int) bool                       { return true }
func (anySpace) Unpin(int)                          {}
func (anySpace) ReadAt(tier.Place, []byte) error    { return errIO } // stamp 0
func (anySpace) WriteAt(tier.Place, [][]byte) error { return nil }

func FuzzRestore(f *testing.F) {
	golden, err := os.ReadFile(filepath.Join("testdata", "state.golden"))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(golden)
	zero := bytes.Clone(golden)
	copy(zero[stateHeader+2:], make([]byte, 8)) // the stamp that anySpace has
	f.Add(zero)
	f.Add(golden[:stateHeader])
	f.Fuzz(func(t *testing.T, b []byte) {
		c, err := New(anySpace{}, Options{})
		if err != nil {
			t.Fatal(err)
		}
		err = c.Restore(sealState(bytes.Clone(b)), never)
		if err != nil && !errors.Is(err, ErrCorrupt) && !errors.Is(err, ErrNewer) {
			t.Fatalf("unexpected kind of error: %v", err)
		}
		s := c.Stats()
		if err != nil && s.Entries != 0 {
			t.Fatalf("%d entries after %v", s.Entries, err)
		}
		if s.Entries > len(b) {
			t.Fatalf("%d entries from %d bytes", s.Entries, len(b))
		}
		readNothing(t, c)
	})
}

// readNothing expects that no entry of a cache over anySpace can be read.
func readNothing(t *testing.T, c *Cache) {
	p := make([]byte, block.Size)
	for slot := range c.slots {
		info := c.slots[slot].Load()
		if info == nil {
			continue
		}
		for i := range info.count() {
			if c.Read(info.extent(i), info.run(slot, i).off, 1, p) {
				t.Fatal("read from a tier that cannot be read")
			}
		}
	}
}
