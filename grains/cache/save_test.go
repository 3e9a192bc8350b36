package cache

import (
	"bytes"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"graindisk/block"
	"graindisk/tier"
)

// loaded waits until all of the index is there.
func (r *rig) loaded(busy func(int) bool) {
	r.t.Helper()
	if err := r.Load(busy); err != nil {
		r.t.Fatal(err)
	}
	r.WaitLoaded()
}

func TestLoadFindsWhatWasThere(t *testing.T) {
	dir := t.TempDir()
	r := openRig(t, dir, 10)
	log := r.logSlot(77)
	r.Adopt(3, 1, []BlockRef{r.put(1, 0, tier.NewPlace(log, 9)), r.put(1, 1, tier.NewPlace(log, 3))})
	for id := block.ExtentID(10); id < 20; id++ {
		r.Fill(4, id, extent(id, 0, 8))
		r.settle()
	}
	before := r.Stats()
	r.close()

	r = openRig(t, dir, 10)
	r.loaded(func(slot int) bool { return slot == log })
	r.wants(true, 1, 0, 2)
	for id := block.ExtentID(10); id < 20; id++ {
		r.wants(true, id, 0, 8)
	}
	if after := r.Stats(); after.Entries != before.Entries || after.Bytes != before.Bytes {
		t.Errorf("%d entries of %d bytes, before %d of %d", after.Entries, after.Bytes, before.Entries, before.Bytes)
	}
	if got := r.shares.used[3].Load(); got != 2 {
		t.Errorf("disk 3 has %d blocks, want 2", got)
	}
	if got := r.shares.used[4].Load(); got != 80 {
		t.Errorf("disk 4 has %d blocks, want 80", got)
	}
	if free, busy, clean := r.space.Counts(); free != 6 || busy != 0 || clean != 4 {
		t.Errorf("%d free, %d busy, %d clean: want the four slots of the fills clean, the log's left alone", free, busy, clean)
	}
	// The oldest slot makes room first.
	r.space.OnTake(nil)
	for range 8 {
		if _, err := r.space.Take(0); err != nil {
			t.Fatal(err)
		}
	}
	r.wants(false, 10, 0, 8)
	r.wants(true, 19, 0, 8)
}

// TestSaveWritesWhatBecameClean kills the cache instead of closing it: what was clean at the last Save
// is there again, the slot that was being filled is cold, and a slot's index is written only once.
func TestSaveWritesWhatBecameClean(t *testing.T) {
	dir := t.TempDir()
	r := openRig(t, dir, 10)
	log := r.logSlot(77)
	r.Adopt(1, 1, []BlockRef{r.put(1, 0, tier.NewPlace(log, 9))})
	for id := block.ExtentID(10); id < 16; id++ {
		r.Fill(1, id, extent(id, 0, 8)) // three to a slot, so that the second is not given up yet
		r.settle()
	}
	save := func() (files []string) {
		t.Helper()
		if err := r.Save(); err != nil {
			t.Fatal(err)
		}
		files, err := filepath.Glob(filepath.Join(dir, "*"+saveSuffix))
		if err != nil {
			t.Fatal(err)
		}
		return files
	}
	if got := save(); len(got) != 1 {
		t.Fatalf("files %v, want that of the one full slot", got)
	}
	r.space.SetClean(log)
	if got := save(); len(got) != 2 {
		t.Fatalf("files %v, want the log's slot too", got)
	}
	for _, name := range save() {
		if err := os.Remove(name); err != nil {
			t.Fatal(err)
		}
	}
	if got := save(); len(got) != 0 {
		t.Fatalf("%v written again though nothing changed", got)
	}
	r.Adopt(1, 2, []BlockRef{r.put(2, 0, tier.NewPlace(log, 5))})
	for i := range r.slots {
		if info := r.slots[i].Load(); info != nil {
			info.dirty.Store(true)
		}
	}
	save()

	next := openRig(t, dir, 10)
	next.loaded(never)
	next.wants(true, 1, 0, 1)
	next.wants(true, 2, 0, 1)
	next.wants(true, 10, 0, 8)
	next.wants(true, 12, 0, 8)
	next.wants(false, 13, 0, 8)
}

// TestLoadLeavesOutSlotsUsedAnew overwrites slots behind the saved index's back, as happens when
// the gateway dies some time after Save.
func TestLoadLeavesOutSlotsUsedAnew(t *testing.T) {
	dir := t.TempDir()
	r := openRig(t, dir, 10)
	var slots []int
	for i := range 4 {
		slot := r.logSlot(uint64(i + 1))
		id := block.ExtentID(i)
		r.Adopt(1, id, []BlockRef{r.put(id, 0, tier.NewPlace(slot, 1))})
		r.space.SetClean(slot)
		slots = append(slots, slot)
	}
	r.close()
	anew := make([]byte, block.Size)
	anew[0] = 99
	r = openRig(t, dir, 10)
	r.write(tier.NewPlace(slots[1], 0), anew)
	r.write(tier.NewPlace(slots[3], 1), anew) // a block that was lost: the slot is the same
	r.close()
	if err := os.Remove(filepath.Join(dir, tier.Name(slots[2]))); err != nil {
		t.Fatal(err)
	}

	r = openRig(t, dir, 10)
	r.loaded(never)
	r.wants(true, 0, 0, 1)
	r.wants(false, 1, 0, 1)
	r.wants(false, 2, 0, 1)
	if s := r.Stats(); s.Entries != 2 || s.CRCFailures != 0 {
		t.Errorf("%d entries, %d CRC failures", s.Entries, s.CRCFailures)
	}
	r.wants(false, 3, 0, 1)
	if s := r.Stats(); s.CRCFailures != 1 {
		t.Errorf("%d CRC failures, want 1", s.CRCFailures)
	}
}

// TestServesBeforeTheIndexIsLoaded has slots evicted, and their extents filled again, between the two
// stages of Load.
func TestServesBeforeTheIndexIsLoaded(t *testing.T) {
	dir := t.TempDir()
	r := openRig(t, dir, 10)
	for id := range block.ExtentID(12) {
		r.Fill(1, id, extent(id, 0, 8))
		r.settle()
	}
	r.close()
	r = openRig(t, dir, 10)
	heads := map[int]*slotInfo{}
	r.closing.Store(true) // the second stage does nothing
	r.loaded(never)
	r.closing.Store(false)
	var slots []int
	for i := range r.slots {
		if info := r.slots[i].Load(); info != nil {
			heads[i] = info
			slots = append(slots, i)
		}
	}
	if len(slots) != 4 {
		t.Fatalf("%d slots known, want 4", len(slots))
	}
	r.wants(false, 0, 0, 8) // not yet
	first, _ := r.space.Oldest(false)
	if !r.space.Evict(first) {
		t.Fatal("not evicted")
	}
	r.Fill(1, 11, extent(11, 0, 8))
	r.settle()
	r.wants(true, 11, 0, 8)
	r.loadSlots(slots)
	r.wants(false, 0, 0, 8)
	for id := block.ExtentID(3); id < 12; id++ {
		r.wants(true, id, 0, 8)
	}
	if s := r.Stats(); s.Entries != 9 {
		t.Errorf("%d entries, want 9", s.Entries)
	}
}

// TestEmptySlotsGiveTheirSpaceBack drops all that is in the clean slots: Save frees them, and the files
// of all but a few lose their space.
func TestEmptySlotsGiveTheirSpaceBack(t *testing.T) {
	const slots = 40
	dir := t.TempDir()
	r := openRig(t, dir, slots)
	const n = 30 * 3
	for id := range block.ExtentID(n) {
		r.Fill(1, id, extent(id, 0, 8))
		r.settle()
	}
	if err := r.Save(); err != nil {
		t.Fatal(err)
	}
	used := func() (bytes int64) {
		for i := range slots {
			if st, err := os.Stat(filepath.Join(dir, tier.Name(i))); err == nil {
				bytes += st.Size()
			}
		}
		return bytes
	}
	before := used()
	for id := range block.ExtentID(n) {
		if id%3 != 0 || id < 45 {
			r.Drop(id)
		}
	}
	if err := r.Save(); err != nil {
		t.Fatal(err)
	}
	const slotBytes = testSlotBlocks * block.Size
	if got := before - used(); got != (15-surplusSlots)*slotBytes {
		t.Errorf("%d slots gave up their space, want the 15 empty ones but %d", got/slotBytes, surplusSlots)
	}
	files, err := filepath.Glob(filepath.Join(dir, "*"+saveSuffix))
	if err != nil || len(files) != 14 {
		t.Errorf("%d saved indexes, %v: want one per clean slot", len(files), err)
	}
	for id := range block.ExtentID(n) {
		r.wants(id%3 == 0 && id >= 45, id, 0, 8)
	}
	for id := block.ExtentID(1000); id < 1000+45; id++ { // all the room can be used again
		r.Fill(1, id, extent(id, 0, 8))
		r.settle()
		r.wants(true, id, 0, 8)
	}
}

// TestSweepForgetsWhatDiedMeanwhile loads an index in which half of the extents have died since it was written.
func TestSweepForgetsWhatDiedMeanwhile(t *testing.T) {
	dir := t.TempDir()
	r := openRig(t, dir, 16)
	const n = 12
	for id := range block.ExtentID(n) {
		r.Fill(1, id, extent(id, 0, 8))
		r.settle()
	}
	r.close()
	r = openRig(t, dir, 16)
	r.loaded(func(int) bool { return false })
	r.Sweep(func(id block.ExtentID) bool { return id < n/2 })
	r.settle()
	for id := range block.ExtentID(n) {
		r.wants(id >= n/2, id, 0, 8)
	}
	_, _, before := r.space.Counts()
	if err := r.Save(); err != nil {
		t.Fatal(err)
	}
	if _, _, clean := r.space.Counts(); clean >= before {
		t.Errorf("%d clean slots before the next Save and %d after it: the dead ones hold their space", before, clean)
	}
}

// goldenSave is the saved index of a small slot that is the same every time.
func goldenSave(t *testing.T) []byte {
	r := newRig(t, 8)
	a, b := r.logSlot(1), r.logSlot(2)
	r.Adopt(7, block.NewExtentID(3, 4), []BlockRef{
		r.put(1, 0, tier.NewPlace(b, 1)), r.put(1, 1, tier.NewPlace(b, 2)), r.put(1, 2, tier.NewPlace(a, 30)),
	})
	r.Adopt(258, block.NewExtentID(2, 9), []BlockRef{r.put(2, 0, tier.NewPlace(b, 31))})
	r.Adopt(1, block.NewExtentID(9, 9), []BlockRef{r.put(2, 0, tier.NewPlace(b, 29))})
	r.Drop(block.NewExtentID(9, 9))
	return r.appendSlot(nil, b, r.slots[b].Load())
}

func TestSaveGolden(t *testing.T) {
	path := filepath.Join("testdata", "slot.idx.golden")
	got := goldenSave(t)
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

func TestDescribeASavedIndex(t *testing.T) {
	var b bytes.Buffer
	if err := Describe(&b, goldenSave(t)); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"slot         1 of 32 blocks, small queue", "entries      2,", "blocks 0-1 at block 1, disk 7", "blocks 0-0 at block 31, disk 2"} {
		if !bytes.Contains(b.Bytes(), []byte(want)) {
			t.Errorf("%q is missing in\n%s", want, b.String())
		}
	}
	if err := Describe(&b, goldenSave(t)[:70]); !errors.Is(err, ErrCorrupt) {
		t.Errorf("cut short: %v", err)
	}
}

// sealSaved puts the right checksums into b.
func sealSaved(b []byte) []byte {
	if len(b) >= saveHeader+4 {
		binary.LittleEndian.PutUint32(b[60:], block.CRC(b[:60]))
		binary.LittleEndian.PutUint32(b[len(b)-4:], block.CRC(b[:len(b)-4]))
	}
	return b
}

func discard(block.ExtentID, uint8, run, []byte) {}

func TestDecodeSavedRefuses(t *testing.T) {
	good := goldenSave(t)
	refused := func(name string, b []byte, want error) {
		t.Helper()
		if _, err := decodeSaved(b, discard); !errors.Is(err, want) {
			t.Errorf("%s: %v, want %v", name, err, want)
		}
	}
	change := func(at int, to byte) []byte {
		b := bytes.Clone(good)
		b[at] = to
		return sealSaved(b)
	}
	refused("a newer version", change(4, 2), ErrNewer)
	refused("version 0", change(4, 0), ErrCorrupt)
	refused("an unknown incompat bit", change(15, 1), ErrNewer)
	refused("another magic", change(0, 'X'), ErrCorrupt)
	refused("padding", change(50, 1), ErrCorrupt)
	refused("more entries than there are", change(40, 3), ErrCorrupt)
	refused("fewer entries than there are", change(40, 1), ErrCorrupt)
	refused("another length", change(44, 1), ErrCorrupt)
	refused("fewer blocks than are used", change(36, 4), ErrCorrupt)
	refused("nothing", nil, ErrCorrupt)
	for i := range good {
		b := bytes.Clone(good)
		b[i] ^= 0x10
		if _, err := decodeSaved(b, discard); !errors.Is(err, ErrCorrupt) && !errors.Is(err, ErrNewer) {
			t.Errorf("byte %d changed: %v", i, err)
		}
	}
	for n := range good {
		if _, err := decodeSaved(good[:n], discard); err == nil {
			t.Errorf("cut to %d bytes: no error", n)
		}
	}
}

// TestDamagedIndexIsACoolSlot flips a byte behind the head, which only the second stage of Load reads.
func TestDamagedIndexIsACoolSlot(t *testing.T) {
	dir := t.TempDir()
	r := openRig(t, dir, 8)
	r.Fill(1, 1, extent(1, 0, 8))
	r.close()
	files, err := filepath.Glob(filepath.Join(dir, "*"+saveSuffix))
	if err != nil || len(files) != 1 {
		t.Fatalf("%v, %v", files, err)
	}
	b, err := os.ReadFile(files[0])
	if err != nil {
		t.Fatal(err)
	}
	b[saveHeader+7] ^= 1
	if err := os.WriteFile(files[0], b, 0o600); err != nil {
		t.Fatal(err)
	}
	r = openRig(t, dir, 8)
	r.loaded(never)
	r.wants(false, 1, 0, 8)
	r.Fill(1, 1, extent(1, 0, 8))
	r.wants(true, 1, 0, 8)
	if err := r.Save(); err != nil {
		t.Fatal(err)
	}
	if _, _, clean := r.space.Counts(); clean != 0 {
		t.Errorf("%d clean slots, want the damaged one freed", clean)
	}
}

func FuzzDecodeSaved(f *testing.F) {
	golden, err := os.ReadFile(filepath.Join("testdata", "slot.idx.golden"))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(golden)
	f.Add(golden[:saveHeader])
	f.Fuzz(func(t *testing.T, b []byte) {
		n, blocks := 0, 0
		end := uint32(0)
		h, err := decodeSaved(sealSaved(bytes.Clone(b)), func(_ block.ExtentID, _ uint8, r run, crcs []byte) {
			n++
			blocks += r.blocks
			if r.place.Block() < end || r.off+r.blocks > ExtentBlocksMax || len(crcs) != 4*r.blocks {
				t.Fatalf("entry %+v after block %d, %d bytes of CRCs", r, end, len(crcs))
			}
			end = r.place.Block() + uint32(r.blocks)
		})
		if err != nil && !errors.Is(err, ErrCorrupt) && !errors.Is(err, ErrNewer) {
			t.Fatalf("unexpected kind of error: %v", err)
		}
		if 4*blocks > len(b) || n > len(b) {
			t.Fatalf("%d entries of %d blocks from %d bytes", n, blocks, len(b))
		}
		if err == nil && (n != int(h.entries) || end > h.slotBlocks) {
			t.Fatalf("%d entries up to block %d, head %+v", n, end, h)
		}
	})
}
