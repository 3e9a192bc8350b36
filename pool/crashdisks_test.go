package pool

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"graindisk/block"
	"graindisk/vdisk"
)

// diskVersion is what the table may say of a disk at some moment.
type diskVersion struct {
	name             string
	blocks           int
	deleted, dropped bool
}

// crashDisk is a disk of the world. Its number in the model is its number in the pool; what the model has of it is as
// long as it ever is. The versions of its row are a history of their own: each is stable when the operation returns, so
// after the loss of a process the last that was acknowledged must be there or one after it, and after the loss of
// a host the last that was said to be published. The first client alone operates on disks.
type crashDisk struct {
	id     block.DiskID
	blocks int
	names  int // given so far

	mu        sync.Mutex
	versions  []diskVersion // as issued; the first is its creation
	acked     int           // how many were acknowledged
	published int           // and are in a cut
	now       diskVersion   // as the clients know it
	changing  bool          // by the first client: others meet either version
}

func (d *crashDisk) name() string { return fmt.Sprintf("disk%d", d.id) }

func (d *crashDisk) created() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.acked > 0
}

// view is what the clients know of the disk.
func (d *crashDisk) view() (now diskVersion, changing bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.now, d.changing
}

// issue begins a change to v, settle ends one that has succeeded.
func (d *crashDisk) issue(v diskVersion) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.versions, d.changing = append(d.versions, v), true
}

func (d *crashDisk) settle() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.acked, d.now, d.changing = len(d.versions), d.versions[len(d.versions)-1], false
}

// shown takes what a pool shows of the disk's row, if it has one, for what happened.
func (d *crashDisk) shown(l loss, v diskVersion, there bool) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	least := d.acked
	if l == lostHost {
		least = d.published
	}
	if !there {
		if least > 0 {
			return fmt.Errorf("disk %d is not there after a %v; %d versions of it must be: %+v", d.id, l, least, d.versions)
		}
		d.versions, d.acked, d.published, d.now, d.changing = nil, 0, 0, diskVersion{}, false
		return nil
	}
	for i := len(d.versions); i >= max(1, least); i-- {
		if d.versions[i-1] == v {
			d.versions, d.acked = d.versions[:i], i
			d.published = min(d.published, i)
			if l == lostHost {
				d.published = i
			}
			d.now, d.changing = v, false
			return nil
		}
	}
	return fmt.Errorf("disk %d is back as %+v after a %v; it was %+v, and the first %d must be there", d.id, v, l, d.versions, least)
}

// version is what a pool's table says of a disk.
func (p *Pool) version(id block.DiskID) (diskVersion, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	row, ok := p.rows[id]
	return diskVersion{row.Name, int(row.SizeBytes / block.Size), row.Flags&1 != 0, row.Flags&2 != 0}, ok
}

// rowDisk finds the disk of a row, also if it is deleted: then to look at what is kept of it.
func (p *Pool) rowDisk(id block.DiskID, v diskVersion) (*vdisk.Disk, error) {
	if !v.deleted {
		return p.Disk(v.name)
	}
	return vdisk.New(vdisk.Options{ID: id, Name: v.name, Size: int64(v.blocks) * block.Size, Log: p.log, Tree: p.tree(id), Extents: p, Gate: p.gate, MendMap: p.mendMap}), nil
}

// operate does one operation on a whole disk.
func (c *client) operate(ctx context.Context, d *crashDisk) error {
	now, _ := d.view()
	next := now
	var holes []uint64
	hole := func(from, to int) {
		if to > from {
			holes = append(holes, c.w.model.IssueHole(d.id, block.LBA(from*sectorsPerBlock), (to-from)*sectorsPerBlock))
		}
	}
	var what string
	var do func() error
	switch n := c.rng.IntN(10); {
	case now.dropped:
		return nil
	case now.deleted:
		what, next.deleted = "undeleted", false
		if c.rng.IntN(2) == 0 {
			d.names++
			next.name = fmt.Sprintf("%s-%d", d.name(), d.names)
		}
		do = func() error { return errOf(c.p.UndeleteDisk(ctx, now.name, d.id, next.name)) }
	case n < 3:
		what, next.deleted = "deleted", true
		do = func() error { return c.p.DeleteDisk(ctx, now.name, true, false) }
	case n == 3 && d.id > 1:
		what, next.deleted, next.dropped = "dropped", true, true
		hole(0, d.blocks)
		do = func() error { return c.p.DeleteDisk(ctx, now.name, true, true) }
	case n < 7:
		what = "renamed"
		d.names++
		next.name = fmt.Sprintf("%s-%d", d.name(), d.names)
		do = func() error { return errOf(c.p.RenameDisk(ctx, now.name, next.name, false)) }
	default:
		what = "resized"
		next.blocks = d.blocks/2 + c.rng.IntN(d.blocks-d.blocks/2+1)
		hole(next.blocks, now.blocks)
		do = func() error { return errOf(c.p.ResizeDisk(ctx, now.name, int64(next.blocks)*block.Size, true)) }
	}
	c.w.stats.inc("disks " + what)
	c.w.note("disk %d: %s", d.id, what)
	d.issue(next)
	if err := c.w.unlessDead(ctx, do); err != nil {
		return err
	}
	d.settle()
	for _, id := range holes {
		c.w.model.Stable(id)
	}
	return nil
}

func errOf[T any](_ T, err error) error { return err }

// unlessDead does an operation on disks. The pool does not let go before the log has taken or refused the record,
// which the log of a dead process may never do.
func (w *world) unlessDead(ctx context.Context, do func() error) error {
	done := make(chan error, 1)
	go func() { done <- do() }()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// tolerable tells whether a request on a disk may fail so: the disk is being changed, or was since it was found.
func (c *client) tolerable(d *crashDisk, err error) bool {
	now, changing := d.view()
	return errors.Is(err, vdisk.ErrDeleted) || errors.Is(err, vdisk.ErrRange) || errors.Is(err, ErrNoDisk) && (changing || now.deleted)
}

// rowsPublished notes what of the disks a cut holds: the versions that were acknowledged when it was asked for.
func (w *world) rowsPublished(acked []int) {
	for i, d := range w.disks {
		d.mu.Lock()
		d.published = max(d.published, min(acked[i], d.acked))
		d.mu.Unlock()
	}
}

// acked is how many versions of each disk were acknowledged.
func (w *world) acked() (n []int) {
	for _, d := range w.disks {
		d.mu.Lock()
		n = append(n, d.acked)
		d.mu.Unlock()
	}
	return n
}

// shownDisks takes what the pool's table says for what happened.
func (w *world) shownDisks(p *Pool) error {
	for _, d := range w.disks {
		v, there := p.version(d.id)
		if err := d.shown(w.loss, v, there); err != nil {
			return err
		}
	}
	return nil
}

// contentOf reads a disk, as long as it ever is: what lies beyond its end is zeroes, as is one that is dropped.
func (w *world) contentOf(p *Pool, d *crashDisk) ([]byte, error) {
	b := make([]byte, d.blocks*block.Size)
	v, there := p.version(d.id)
	if !there || v.dropped {
		return b, nil
	}
	vd, err := p.rowDisk(d.id, v)
	if err != nil {
		return nil, err
	}
	if vd.ID() != d.id || vd.Size() != int64(v.blocks)*block.Size || vd.Name() != v.name {
		return nil, fmt.Errorf("disk %s, number %d of %d bytes, is in the table as %d: %+v", vd.Name(), vd.ID(), vd.Size(), d.id, v)
	}
	return b, vd.Read(w.life.ctx, b[:vd.Size()], 0)
}
