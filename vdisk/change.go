package vdisk

import (
	"context"
	"fmt"

	"graindisk/block"
	"graindisk/writeback"
)

// A change of a disk as a whole is a barrier: it holds all block locks, which every write holds some of, so each
// write lies wholly before it or after it, in the log too, and checks again then what it was admitted for.

// Use notes that a client has the disk open until release, which is to be called once.
func (d *Disk) Use() (release func(), err error) {
	d.users.Add(1)
	if err := d.open(); err != nil {
		d.users.Add(-1)
		return nil, err
	}
	return func() { d.users.Add(-1) }, nil
}

// Users is how many clients have the disk open.
func (d *Disk) Users() int { return int(d.users.Load()) }

// Rename gives the disk another name. The caller sees to it that no other disk has it.
func (d *Disk) Rename(name string) { d.name.Store(&name) }

// Delete ends the disk: requests that come later fail with ErrDeleted. Then record, which puts that on record, is
// called, with no write under way; if it fails the disk goes on.
func (d *Disk) Delete(record func() error) error {
	d.lock(allLocks, true)
	defer d.unlock(allLocks, true)
	err := fmt.Errorf("disk %s: %w", d.Name(), ErrDeleted)
	d.gone.Store(&err)
	if err := record(); err != nil {
		d.gone.Store(nil)
		return err
	}
	return nil
}

// Resize makes the disk size bytes long, a multiple of block.Size, by the record of the log that op is. What is
// cut off is unmapped first, so that it is zeroes should the disk grow again. A failed one may have unmapped it.
func (d *Disk) Resize(ctx context.Context, size int64, op writeback.Record) error {
	d.lock(allLocks, true)
	defer d.unlock(allLocks, true)
	if err := d.open(); err != nil {
		return err
	}
	recs := []writeback.Record{op}
	if was := d.size.Load(); size < was {
		recs = []writeback.Record{
			{Kind: writeback.Unmap, Disk: d.o.ID, LBA: block.LBA(size / block.Size), Blocks: uint64((was - size) / block.Size)}, op,
		}
	}
	if _, err := d.o.Log.Append(ctx, recs); err != nil {
		return fmt.Errorf("resize disk %s: %w", d.Name(), err)
	}
	d.size.Store(size)
	return nil
}

// unchanged checks again, with the locks of ops held, what they were admitted for.
func (d *Disk) unchanged(ops []Op) error {
	if err := d.gone.Load(); err != nil {
		return *err
	}
	for i := range ops {
		if err := d.within(ops[i].Off, ops[i].Len); err != nil {
			return err
		}
	}
	return nil
}

const allLocks = ^lockSet(0)
