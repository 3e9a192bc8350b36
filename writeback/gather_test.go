package writeback

import (
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"testing"

	"graindisk/block"
	"graindisk/internal/vfs"
	"graindisk/tier"
)

// wantRuns cuts a frozen disk's blocks into wants of at most max blocks.
func wantRuns(f *Frozen, disk block.DiskID, most int) (ws []Want) {
	bs := f.Blocks(disk)
	for len(bs) > 0 {
		n := 1
		for n < len(bs) && n < most && bs[n].LBA == bs[0].LBA+block.LBA(n) && bs[n].Place == bs[0].Place+tier.Place(n) {
			n++
		}
		ws = append(ws, Want{Disk: disk, Blocks: bs[:n], Dst: make([]byte, n*block.Size)})
		bs = bs[n:]
	}
	return ws
}

// TestGatherFindsEveryBlock writes random runs over several files and gathers what is left of them.
func TestGatherFindsEveryBlock(t *testing.T) {
	seed := rand.Uint64()
	rng := rand.New(rand.NewPCG(seed, 0))
	r := newRig(t, 24, 128)
	model := map[block.LBA]uint64{}
	stamp := uint64(0)
	for range 120 {
		lba := block.LBA(rng.IntN(600))
		var stamps []uint64
		for i := range 1 + rng.IntN(1+rng.IntN(24)) {
			stamp++
			stamps = append(stamps, stamp)
			model[lba+block.LBA(i)] = stamp
		}
		r.append(data(lba, stamps...))
	}
	if d := r.log.Unfrozen(); d.Bytes != int64(len(model))*block.Size || d.Oldest.IsZero() {
		t.Errorf("unfrozen %+v, want %d blocks", d, len(model))
	}
	f := r.log.Freeze()
	if d := r.log.Unfrozen(); d.Bytes != 0 || !d.Oldest.IsZero() {
		t.Errorf("just frozen, and unfrozen is %+v", d)
	}
	ws := wantRuns(f, 1, 16)
	if err := r.log.Gather(ws); err != nil {
		t.Fatalf("seed %d: %v", seed, err)
	}
	for _, w := range ws {
		for i, b := range w.Blocks {
			if got := binary.LittleEndian.Uint64(w.Dst[i*block.Size:]); got != model[b.LBA] {
				t.Fatalf("seed %d: block %d: %d, want %d", seed, b.LBA, got, model[b.LBA])
			}
			delete(model, b.LBA)
		}
	}
	if len(model) != 0 {
		t.Errorf("seed %d: %d blocks not gathered", seed, len(model))
	}
	victim := ws[rng.IntN(len(ws))].Blocks[0]
	r.corrupt(victim.Place)
	if err := r.log.Gather(ws); !errors.Is(err, ErrDamaged) {
		t.Errorf("seed %d: damage to block %d: %v", seed, victim.LBA, err)
	}
}

// countingFS counts reads.
type countingFS struct {
	vfs.FS
	reads *int
}

type countingFile struct {
	vfs.File
	reads *int
}

func (c countingFS) Open(p string) (vfs.File, error) {
	f, err := c.FS.Open(p)
	return countingFile{f, c.reads}, err
}

func (c countingFS) Create(p string) (vfs.File, error) {
	f, err := c.FS.Create(p)
	return countingFile{f, c.reads}, err
}

func (f countingFile) ReadAt(p []byte, off int64) (int, error) {
	*f.reads++
	return f.File.ReadAt(p, off)
}

// TestGatherReadsInLogOrder writes blocks in an order that has nothing to do with their place on the
// disk, and counts the reads that bring all of them back.
func TestGatherReadsInLogOrder(t *testing.T) {
	r := newRig(t, 8, 512)
	r.log.Close()
	reads := 0
	space, err := tier.Open(tier.Options{FS: countingFS{r.fs, &reads}, Dir: testDir, SlotBytes: 512 * block.Size, Slots: 8})
	if err != nil {
		t.Fatal(err)
	}
	r.space = space
	if r.log, _, err = Open(r.options()); err != nil {
		t.Fatal(err)
	}
	const n = 400
	for i, lba := range rand.New(rand.NewPCG(1, 1)).Perm(n) {
		r.append(data(block.LBA(2*lba), uint64(i+1)))
	}
	f := r.log.Freeze()
	before := reads
	if err := r.log.Gather(wantRuns(f, 1, 16)); err != nil {
		t.Fatal(err)
	}
	// A header lies between any two blocks: 800 blocks in reads of 256.
	if got := reads - before; got > 6 {
		t.Errorf("%d reads for %d blocks that lie side by side", got, n)
	}
}
