package writeback

import (
	"fmt"

	"graindisk/block"
	"graindisk/tier"
)

// State says what the log knows of a block.
type State uint8

// What Lookup may find.
const (
	None    State = iota // not in the log: look below
	Present              // data, at Place
	Hole                 // unmapped: reads as zeroes
)

// Found is what the log knows of one block.
type Found struct {
	State State
	CRC   uint32 // of the block's 4 KiB, if Present
	Place tier.Place
}

// Lookup tells for each block from lba on what the log knows, newest first, and pins the slots of
// those present until pins is released. It waits for no I/O. Safe for concurrent use.
func (l *Log) Lookup(disk block.DiskID, lba block.LBA, out []Found, pins *Pins) {
	clear(out)
	l.ensureIndex()
	l.idx.RLock()
	defer l.idx.RUnlock()
	missing := len(out)
	for i := len(l.gens) - 1; i >= 0 && missing > 0; i-- {
		if d := l.gens[i].disks[disk]; d != nil {
			missing -= d.lookup(lba, out, &l.crcs)
		}
	}
	for i := range out {
		if out[i].State == Present {
			pins.add(l.space, out[i].Place.Slot())
		}
	}
}

// ReadBlocks fills p, one block per Found: data is read, neighbours in one go, and checked; holes
// are zeroed; None is left alone. The caller holds the pins, or a Frozen not yet published. A block
// that fails its checksum gives ErrDamaged. disk and lba serve the error only.
func (l *Log) ReadBlocks(disk block.DiskID, lba block.LBA, found []Found, p []byte) error {
	for i := 0; i < len(found); {
		f := found[i]
		n := 1
		switch f.State {
		case Hole:
			clear(p[i*block.Size:][:block.Size])
		case Present:
			for i+n < len(found) && found[i+n].State == Present && found[i+n].Place == f.Place+tier.Place(n) {
				n++
			}
			if err := l.readRun(disk, lba+block.LBA(i), found[i:i+n], p[i*block.Size:][:n*block.Size]); err != nil {
				return err
			}
		}
		i += n
	}
	return nil
}

func (l *Log) readRun(disk block.DiskID, lba block.LBA, run []Found, p []byte) error {
	at := run[0].Place
	if err := l.space.ReadAt(at, p); err != nil {
		return fmt.Errorf("read disk %d block %d: %w", disk, lba, err)
	}
	for i, f := range run {
		if block.CRC(p[i*block.Size:][:block.Size]) != f.CRC {
			return fmt.Errorf("%w: %s block %d, holding block %d of disk %d, fails its checksum",
				ErrDamaged, tier.Name(at.Slot()), int(at.Block())+i, uint64(lba)+uint64(i), disk)
		}
	}
	return nil
}
