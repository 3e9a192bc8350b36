package vdisk

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"

	"graindisk/block"
	"graindisk/vdisk/densetree"
	"graindisk/writeback"
)

// TryRead fills p from off and reports true if every byte is in memory or on the local tier; it
// reports false at once, with p undefined, when a target must be asked.
func (d *Disk) TryRead(p []byte, off int64) (bool, error) {
	if err := d.check(off, int64(len(p))); err != nil {
		return false, err
	}
	ok := true
	err := aligned(p, off, func(lba block.LBA, q []byte) error {
		missing, err := d.readLocal(lba, q, nil, nil)
		ok = len(missing) == 0
		if d.mendable(err) != nil { // Read will try
			ok, err = false, nil
		}
		return err
	})
	d.observe(off, int64(len(p)), !ok)
	return ok && err == nil, err
}

// Read fills p from off, asking targets for what is not local.
func (d *Disk) Read(ctx context.Context, p []byte, off int64) error {
	if err := d.check(off, int64(len(p))); err != nil {
		return err
	}
	return aligned(p, off, func(lba block.LBA, q []byte) error {
		missing, err := d.readMending(ctx, lba, q, nil)
		d.observe(off, int64(len(p)), len(missing) > 0)
		for err == nil && len(missing) > 0 {
			if err = d.o.Extents.Read(ctx, missing, nil); err == nil {
				return nil
			}
			err = fmt.Errorf("disk %s: %w", d.Name(), err)
			if !errors.Is(err, ErrMoved) {
				return err
			}
			again, lookErr := d.readMending(ctx, lba, q, nil)
			if lookErr == nil && sameExtents(missing, again) {
				return err
			}
			missing, err = again, lookErr
		}
		return err
	})
}

// sameExtents tells whether the map names what it named before: then what is not stored is missing.
func sameExtents(a, b []Piece) bool {
	return slices.EqualFunc(a, b, func(x, y Piece) bool { return x.ID == y.ID && x.at == y.at })
}

// readMending is readLocal that has a damaged map mended on the way.
func (d *Disk) readMending(ctx context.Context, lba block.LBA, q []byte, holes *[]span) ([]Piece, error) {
	missing, err := d.readLocal(lba, q, nil, holes)
	for pe := d.mendable(err); pe != nil; pe = d.mendable(err) { // each time another run, or page
		if d.o.MendMap(ctx, pe) != nil {
			if ctx.Err() != nil { // it waited for targets
				err = ctx.Err()
			}
			break
		}
		if holes != nil {
			*holes = (*holes)[:0]
		}
		missing, err = d.readLocal(lba, q, nil, holes)
	}
	return missing, err
}

// mendable is the page of the map that err is about, if it may be had again.
func (d *Disk) mendable(err error) *densetree.PageError {
	if pe := new(densetree.PageError); d.o.MendMap != nil && errors.As(err, &pe) {
		return pe
	}
	return nil
}

// aligned calls read with whole blocks that cover p at off, through a buffer if p is not aligned.
func aligned(p []byte, off int64, read func(lba block.LBA, q []byte) error) error {
	if len(p) == 0 {
		return nil
	}
	head := int(off % block.Size)
	lba := block.LBA(off / block.Size)
	if head == 0 && len(p)%block.Size == 0 {
		return read(lba, p)
	}
	n := (head + len(p) + block.Size - 1) / block.Size * block.Size
	buf := getBuffer(n)
	defer putBuffer(buf)
	if err := read(lba, *buf); err != nil {
		return err
	}
	copy(p, (*buf)[head:])
	return nil
}

var foundPool = sync.Pool{New: func() any { return new([]writeback.Found) }}

// readLocal fills q, whole blocks from lba, with all that is local, and returns the pieces that a
// target must give. have may hold extents that the caller fetched a moment ago. holes, if not nil, is
// given what was never stored or was unmapped, in order.
func (d *Disk) readLocal(lba block.LBA, q []byte, have map[block.ExtentID][]byte, holes *[]span) ([]Piece, error) {
	n := len(q) / block.Size
	fp := foundPool.Get().(*[]writeback.Found)
	defer foundPool.Put(fp)
	if cap(*fp) < n {
		*fp = make([]writeback.Found, n)
	}
	found := (*fp)[:n]
	var pins writeback.Pins
	d.o.Log.Lookup(d.o.ID, lba, found, &pins)
	err := d.o.Log.ReadBlocks(d.o.ID, lba, found, q)
	pins.Release()
	if err != nil {
		return nil, fmt.Errorf("disk %s: %w", d.Name(), err)
	}
	var missing []Piece
	for i := 0; i < n; {
		if found[i].State != writeback.None {
			if found[i].State == writeback.Hole && holes != nil {
				addSpan(holes, i*block.Size, (i+1)*block.Size)
			}
			i++
			continue
		}
		j := i + 1
		for j < n && found[j].State == writeback.None {
			j++
		}
		if missing, err = d.readMapped(lba, q, i, j, have, holes, missing); err != nil {
			return nil, err
		}
		i = j
	}
	return missing, nil
}

// readMapped does the same for blocks [i, j) of q below the log: by the tree alone.
func (d *Disk) readMapped(lba block.LBA, q []byte, i, j int, have map[block.ExtentID][]byte, holes *[]span, missing []Piece) ([]Piece, error) {
	err := d.o.Tree.Lookup(lba+block.LBA(i), uint64(j-i), func(e densetree.Entry) bool {
		at := int(e.LBA-lba) * block.Size
		end := at + int(e.Blocks)*block.Size
		dst := q[at:end]
		switch {
		case e.Kind != densetree.Data:
			clear(dst)
			if holes != nil && e.Kind == densetree.Hole {
				addSpan(holes, at, end)
			}
		case have[e.Extent] != nil:
			copy(dst, have[e.Extent][int(e.Off)*block.Size:])
		case !d.o.Extents.ReadCached(e.Extent, int(e.Off), dst):
			missing = append(missing, Piece{d.o.ID, e.Extent, int(e.Orig), int(e.Off), dst, at})
		}
		return true
	})
	switch {
	case err == nil:
		return missing, nil
	case errors.Is(err, densetree.ErrClosed):
		return nil, fmt.Errorf("disk %s: %w", d.Name(), ErrClosed)
	}
	return nil, fmt.Errorf("disk %s: map: %w: %w", d.Name(), ErrDamaged, err)
}
