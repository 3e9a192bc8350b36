package writeback

import (
	"cmp"
	"fmt"
	"slices"

	"graindisk/block"
	"graindisk/internal/planted"
	"graindisk/tier"
)

// How Gather turns blocks into reads. [tune]
const (
	gatherGapMax   = 32 << 10 // bytes read in vain rather than by another call
	gatherDirect   = 32 << 10 // a run of so much is read straight to where it belongs
	gatherBytesMax = 1 << 20  // of one read of several runs
)

// Want is a run of blocks of a Frozen and the room for their data.
type Want struct {
	Disk   block.DiskID
	Blocks []Block // consecutive on the disk and on the tier; at least one
	Dst    []byte  // len(Blocks) blocks
}

// Gather fills the room of every want, in the order in which the blocks lie on the tier and in as few
// reads as that allows, and checks every block. It sorts wants. The caller holds a Frozen not yet
// published. A block that fails its checksum gives ErrDamaged.
func (l *Log) Gather(wants []Want) error {
	slices.SortFunc(wants, func(a, b Want) int { return cmp.Compare(a.Blocks[0].Place, b.Blocks[0].Place) })
	var scratch []byte
	for len(wants) > 0 {
		first := wants[0].Blocks[0].Place
		n, size := 1, len(wants[0].Dst)
		for n < len(wants) && len(wants[n-1].Dst) < gatherDirect && len(wants[n].Dst) < gatherDirect {
			next := wants[n].Blocks[0].Place
			end := first + tier.Place(size/block.Size)
			if next.Slot() != first.Slot() || next > end+gatherGapMax/block.Size ||
				int(next-first)*block.Size+len(wants[n].Dst) > gatherBytesMax {
				break
			}
			size = max(size, int(next-first)*block.Size+len(wants[n].Dst))
			n++
		}
		var err error
		if n == 1 {
			err = l.space.ReadAt(first, wants[0].Dst)
		} else {
			if scratch == nil {
				scratch = make([]byte, gatherBytesMax)
			}
			err = l.space.ReadAt(first, scratch[:size])
			for _, w := range wants[:n] {
				copy(w.Dst, scratch[int(w.Blocks[0].Place-first)*block.Size:])
			}
		}
		if err != nil {
			return fmt.Errorf("read disk %d block %d and %d runs more: %w", wants[0].Disk, wants[0].Blocks[0].LBA, n-1, err)
		}
		for _, w := range wants[:n] {
			if err := w.check(); err != nil {
				return err
			}
		}
		wants = wants[n:]
	}
	return nil
}

func (w *Want) check() error {
	for i, b := range w.Blocks {
		if block.CRC(w.Dst[i*block.Size:][:block.Size]) != b.CRC {
			return fmt.Errorf("%w: %s block %d, holding block %d of disk %d, fails its checksum",
				ErrDamaged, tier.Name(b.Place.Slot()), b.Place.Block(), b.LBA, w.Disk)
		}
	}
	return nil
}

// Unfrozen is what has been written since the last freeze: the next cut as far as it has come.
func (l *Log) Unfrozen() (sum Dirty) {
	l.ensureIndex()
	l.idx.RLock()
	defer l.idx.RUnlock()
	n := len(l.gens)
	if n > 1 && l.gens[n-2].split && !planted.Bug("log: a checkpoint hides what is in no cut") {
		sum.add(l.gens[n-2].units, l.gens[n-2].oldest)
	}
	sum.add(l.gens[n-1].units, l.gens[n-1].oldest)
	return sum
}
