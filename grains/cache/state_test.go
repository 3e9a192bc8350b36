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

func TestRestoreFindsWhatWasThere(t *testing.T) {
	dir := t.TempDir()
	r := openRig(t, dir, 10)
	log := r.logSlot(77)
	r.Adopt(1, []BlockRef{r.put(1, 0, tier.NewPlace(log, 9)), r.put(1, 1, tier.NewPlace(log, 3))})
	for id := block.ExtentID(10); id < 20; id++ {
		r.Fill(id, extent(id, 0, 8))
		r.fill.wg.Wait()
	}
	state := r.AppendState([]byte("before"))[len("before"):]
	before := r.Stats()
	r.close()

	r = openRig(t, dir, 10)
	if err := r.Restore(state, func(slot int) bool { return slot == log }); err != nil {
		t.Fatal(err)
	}
	r.wants(true, 1, 0, 2)
	for id := block.ExtentID(10); id < 20; id++ {
		r.wants(true, id, 0, 8)
	}
	if after := r.Stats(); after.Entries != before.Entries || after.Bytes != before.Bytes {
		t.Errorf("%d entries of %d bytes, before %d of %d", after.Entries, after.Bytes, before.Entries, before.Bytes)
	}
	if free, busy, clean := r.space.Counts(); free != 6 || busy != 0 || clean != 4 {
		t.Errorf("%d free, %d busy, %d clean: want the four slots of the fills clean, the log's left alone", free, busy, clean)
	}
	// The oldest slot makes room first.
	for range 8 {
		if _, err := r.space.Take(0); err != nil {
			t.Fatal(err)
		}
	}
	r.wants(false, 10, 0, 8)
	r.wants(true, 19, 0, 8)
}

// TestRestoreLeavesOutSlotsUsedAnew overwrites slots behind the saved state's back, as happens when
// the gateway dies some time after the last checkpoint.
func TestRestoreLeavesOutSlotsUsedAnew(t *testing.T) {
	dir := t.TempDir()
	r := openRig(t, dir, 10)
	var slots []int
	for i := range 3 {
		slot := r.logSlot(uint64(i + 1))
		id := block.ExtentID(i)
		r.Adopt(id, []BlockRef{r.put(id, 0, tier.NewPlace(slot, 1))})
		slots = append(slots, slot)
	}
	state := r.AppendState(nil)
	anew := make([]byte, block.Size)
	anew[0] = 99
	r.write(tier.NewPlace(slots[1], 0), anew)
	r.close()
	if err := os.Remove(filepath.Join(dir, tier.Name(slots[2]))); err != nil {
		t.Fatal(err)
	}

	r = openRig(t, dir, 10)
	if err := r.Restore(state, never); err != nil {
		t.Fatal(err)
	}
	r.wants(true, 0, 0, 1)
	r.wants(false, 1, 0, 1)
	r.wants(false, 2, 0, 1)
	if s := r.Stats(); s.Entries != 1 || s.CRCFailures != 0 {
		t.Errorf("%d entries, %d CRC failures", s.Entries, s.CRCFailures)
	}
}

// goldenState is the state of a small cache that is the same every time.
func goldenState(t *testing.T) []byte {
	r := newRig(t, 8)
	a, b := r.logSlot(1), r.logSlot(2)
	r.Adopt(block.NewExtentID(3, 4), []BlockRef{
		r.put(1, 0, tier.NewPlace(b, 1)), r.put(1, 1, tier.NewPlace(b, 2)), r.put(1, 2, tier.NewPlace(a, 30)),
	})
	r.Adopt(block.NewExtentID(2, 9), []BlockRef{r.put(2, 0, tier.NewPlace(b, 31))})
	return r.AppendState(nil)
}

func TestStateGolden(t *testing.T) {
	path := filepath.Join("testdata", "state.golden")
	got := goldenState(t)
	if *update {
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("saved form changed:\n got %x\nwant %x", got, want)
	}
}

func TestRestoreRefuses(t *testing.T) {
	good := goldenState(t)
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
	refused("nothing", nil, ErrCorrupt)
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
		p := make([]byte, block.Size)
		for i := range c.slots {
			for j := range c.shards {
				for _, e := range c.shards[j].collect(i, nil) {
					if c.Read(e.extent, e.run().off, 1, p) {
						t.Fatal("read from a tier that cannot be read")
					}
				}
			}
		}
	})
}
