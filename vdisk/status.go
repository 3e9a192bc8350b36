package vdisk

import (
	"context"
	"errors"
	"fmt"

	"graindisk/block"
	"graindisk/vdisk/densetree"
	"graindisk/writeback"
)

// Extent is a range of a disk of which the same is known.
type Extent struct {
	Len  int64 // bytes, not zero
	Hole bool  // nothing is stored and it reads as zeroes
}

// statusSteps is how many pieces of the map and of the log one call looks at, give or take one look at
// either. [tune]
const statusSteps = 64 << 10

// FastZero tells that OpZero of whole blocks never costs more than to write them: it is one record in
// the log, however long it is, and waits neither for room nor for a target.
func (d *Disk) FastZero() bool { return true }

// Status tells what [off, off+n) is made of, in order from off on: at least one extent and at most limit,
// which is not zero; neighbours differ. It tells of less than n bytes where that would take too long. Data may
// be told where there is a hole, never a hole where there are data.
func (d *Disk) Status(ctx context.Context, off, n int64, limit int) ([]Extent, error) {
	if err := d.check(off, n); err != nil || n == 0 {
		return nil, err
	}
	lba, end := block.LBA(off/block.Size), block.LBA((off+n+block.Size-1)/block.Size)
	var out []Extent
	steps, at := 0, off
	err := d.ranges(ctx, lba, end, func(e densetree.Entry) bool {
		to := min(off+n, int64(e.End())*block.Size)
		hole, k := e.Kind == densetree.Hole, len(out)
		switch {
		case k > 0 && out[k-1].Hole == hole:
			out[k-1].Len += to - at
		case k == limit:
			return false
		default:
			out = append(out, Extent{to - at, hole})
		}
		at = to
		steps++
		return steps < statusSteps
	})
	if len(out) > 0 { // after an error too: who asks for the rest meets it
		return out, nil
	}
	return nil, err
}

// ranges calls fn with what [lba, end) is made of, in order, until fn returns false: an Entry of the tree's
// where the log has nothing newer, one of kind Data and extent 0 where it has data, and Hole for all that
// was never written or is unmapped. A damaged map is mended on the way.
func (d *Disk) ranges(ctx context.Context, lba, end block.LBA, fn func(densetree.Entry) bool) error {
	states := make([]writeback.StateRange, 64)
	for more := true; more && lba < end; {
		if err := ctx.Err(); err != nil {
			return err
		}
		n := d.o.Log.States(d.o.ID, lba, end, states)
		for _, s := range states[:n] {
			e := densetree.Entry{LBA: lba, Blocks: uint64(s.End - lba), Kind: densetree.Data}
			switch s.State {
			case writeback.None:
				var err error
				if more, err = d.mapped(ctx, lba, s.End, fn); err != nil {
					return err
				}
			case writeback.Hole:
				e.Kind = densetree.Hole
				more = fn(e)
			default:
				more = fn(e)
			}
			if lba = s.End; !more {
				break
			}
		}
	}
	return nil
}

// mapped is ranges by the tree alone; more is what fn returned last.
func (d *Disk) mapped(ctx context.Context, lba, end block.LBA, fn func(densetree.Entry) bool) (more bool, err error) {
	for more = true; more && lba < end; {
		err := d.o.Tree.Lookup(lba, uint64(end-lba), func(e densetree.Entry) bool {
			if lba = e.End(); e.Kind == densetree.None {
				e.Kind = densetree.Hole
			}
			more = fn(e)
			return more
		})
		switch pe := d.mendable(err); {
		case err == nil || pe != nil && d.o.MendMap(ctx, pe) == nil: // on from where it stopped
		case ctx.Err() != nil:
			return false, ctx.Err()
		case errors.Is(err, densetree.ErrClosed):
			return false, fmt.Errorf("disk %s: %w", d.Name(), ErrClosed)
		default:
			return false, fmt.Errorf("disk %s: map: %w: %w", d.Name(), ErrDamaged, err)
		}
	}
	return more, nil
}

const (
	// prefetchWindow is how much Prefetch asks for at a time, in bytes. [tune]
	prefetchWindow = 4 << 20
	// prefetchMax is how many bytes one Prefetch asks for at most. [tune]
	prefetchMax = 1 << 30
)

// Prefetch brings what [off, off+n) is made of to the tier, as far as the tier wants it, and waits for
// that. What is there already is read, which checks it. It ends early after prefetchMax bytes.
func (d *Disk) Prefetch(ctx context.Context, off, n int64) error {
	if err := d.check(off, n); err != nil || n == 0 {
		return err
	}
	lba, end := block.LBA(off/block.Size), block.LBA((off+n+block.Size-1)/block.Size)
	buf := getBuffer(int(min(prefetchWindow, uint64(end-lba)*block.Size)))
	defer putBuffer(buf)
	for asked := 0; lba < end && asked < prefetchMax; {
		var ps []Piece
		room := *buf
		err := d.ranges(ctx, lba, end, func(e densetree.Entry) bool {
			lba = e.End()
			if e.Kind != densetree.Data || e.Orig == 0 {
				return true
			}
			if need := int(e.Blocks) * block.Size; need > len(room) {
				lba -= block.LBA((need - len(room)) / block.Size)
				e.Blocks = uint64(len(room) / block.Size)
			}
			dst := room[:int(e.Blocks)*block.Size]
			room = room[len(dst):]
			if len(dst) > 0 {
				ps = append(ps, Piece{Disk: d.o.ID, ID: e.Extent, Orig: int(e.Orig), Off: int(e.Off), Dst: dst})
			}
			return len(room) > 0
		})
		if err != nil {
			return err
		}
		asked += len(*buf) - len(room)
		missing := ps[:0]
		for _, p := range ps {
			if !d.o.Extents.ReadCached(p.ID, p.Off, p.Dst) {
				missing = append(missing, p)
			}
		}
		if len(missing) == 0 {
			continue
		}
		if err := d.o.Extents.Read(ctx, missing, nil); err != nil {
			return fmt.Errorf("disk %s: %w", d.Name(), err)
		}
	}
	return nil
}
