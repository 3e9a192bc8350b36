package pool

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sort"
	"time"

	"graindisk/block"
	"graindisk/grains/segment"
	"graindisk/vdisk"
	"graindisk/vdisk/densetree"
	"graindisk/writeback"
)

// Operations on disks are records in the log, each with the row that the disk has from then on, and reach the
// targets with the cut that holds them. A deleted disk goes this way:
//
//	disk ──delete──► deleted: name free, map kept ──UndeleteWindow──► dropped: all of it a hole ──merge──► empty
//	     ◄─undelete─                                                  row stays, as a tombstone
//
// A tombstone tells a configuration that names the disk that it was deleted, so that it is not made again, empty,
// as if nothing had been. The drop is a record as well: from the cut that holds it on the map is one hole, which a
// merge brings down through all levels, a run at a time; each run's losses are counted out as it is put in place, so a
// crash in between loses and doubles nothing (see densetree). Then its segments die.

var (
	// ErrInUse means that clients have the disk open.
	ErrInUse = errors.New("disk is in use")
	// ErrShrink means that a disk would become smaller, and that was not asked for.
	ErrShrink = errors.New("the disk would lose its end")
)

// beginOp waits for its turn to operate on disks, endOp ends it.
func (p *Pool) beginOp(ctx context.Context) error {
	if ctx.Err() != nil { // goes before what may be had as well
		return ctx.Err()
	}
	select {
	case p.ops <- struct{}{}:
	case <-ctx.Done():
		return ctx.Err()
	}
	err := p.gate()
	if err != nil {
		p.endOp()
	}
	return err
}

func (p *Pool) endOp() { <-p.ops }

// answer is how an operation ends that ended with err: its success is told like any other, once that may be (hold). If
// ctx ends first, or the pool has another owner, it may be on record all the same. No turn is held meanwhile.
func (p *Pool) answer(ctx context.Context, what, name string, err error) error {
	if err != nil {
		return err
	}
	if err := p.hold(ctx); err != nil {
		return fmt.Errorf("%s disk %s: %w", what, name, err)
	}
	return nil
}

// recordRow puts a disk's new row on record, and in force once it is. If it fails, it may be on record all the same.
func (p *Pool) recordRow(ctx context.Context, id block.DiskID, row segment.DiskMeta) error {
	payload, err := json.Marshal(op{Row: &row})
	if err != nil {
		return err
	}
	if err := p.appendOp(ctx, id, payload); err != nil {
		return err
	}
	p.setRow(id, row)
	return nil
}

func (p *Pool) setRow(id block.DiskID, row segment.DiskMeta) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.rows[id] = row
}

// begin begins an operation on a disk, which endOp ends, with what the table has of it.
func (p *Pool) begin(ctx context.Context, name string) (d *vdisk.Disk, row segment.DiskMeta, err error) {
	if err := p.beginOp(ctx); err != nil {
		return nil, row, err
	}
	if d, err = p.Disk(name); err != nil {
		p.endOp()
		return nil, row, err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	return d, p.rows[d.ID()], nil
}

// DeleteDisk takes a disk away: its name is free at once, and for UndeleteWindow it can be had back. It fails with
// ErrInUse while clients have it open, unless force is set: then their requests fail from here on. With purge it is
// dropped at once and cannot be had back. It is on record when DeleteDisk returns.
func (p *Pool) DeleteDisk(ctx context.Context, name string, force, purge bool) error {
	return p.answer(ctx, "delete", name, p.deleteDisk(ctx, name, force, purge))
}

func (p *Pool) deleteDisk(ctx context.Context, name string, force, purge bool) error {
	d, row, err := p.begin(ctx, name)
	if err != nil {
		return fmt.Errorf("delete disk: %w", err)
	}
	defer p.endOp()
	if n := d.Users(); n > 0 && !force {
		return fmt.Errorf("delete disk %s: %w by %d connections; close them, or cut them off with --force", name, ErrInUse, n)
	}
	row.Flags |= segment.DiskDeleted
	row.DeletedAt = time.Now().Unix()
	if purge {
		row.Flags |= segment.DiskDropped
	}
	payload, err := json.Marshal(op{Row: &row})
	if err != nil {
		return err
	}
	ctx = context.WithoutCancel(ctx)
	err = d.Delete(func() error {
		_, err := p.log.Append(ctx, []writeback.Record{{Kind: writeback.Op, Disk: d.ID(), Data: payload}})
		return err
	})
	if err != nil {
		return fmt.Errorf("delete disk %s: %w", name, err)
	}
	p.mu.Lock()
	delete(p.disks, name)
	p.rows[d.ID()] = row
	p.mu.Unlock()
	if err := p.log.Sync(ctx); err != nil {
		return fmt.Errorf("delete disk %s: %w", name, err)
	}
	p.o.Log.Info("disk deleted", "pool", p.o.Name, "disk", name, "id", uint32(d.ID()), "purge", purge)
	return nil
}

// UndeleteDisk brings back the disk that was deleted last under a name, or the one with the number id if that is not
// 0, under the name as, or its own if as is empty. ErrNoDisk if there is none that can be had back.
func (p *Pool) UndeleteDisk(ctx context.Context, name string, id block.DiskID, as string) (*vdisk.Disk, error) {
	d, err := p.undeleteDisk(ctx, name, id, as)
	return d, p.answer(ctx, "undelete", name, err)
}

func (p *Pool) undeleteDisk(ctx context.Context, name string, id block.DiskID, as string) (*vdisk.Disk, error) {
	if err := p.beginOp(ctx); err != nil {
		return nil, err
	}
	defer p.endOp()
	p.mu.Lock()
	var found block.DiskID
	for i, row := range p.rows {
		if row.Name == name && row.Flags&(segment.DiskDeleted|segment.DiskDropped) == segment.DiskDeleted && (id == 0 || id == i) {
			if old := p.rows[found]; found == 0 || row.DeletedAt > old.DeletedAt || row.DeletedAt == old.DeletedAt && i > found {
				found = i
			}
		}
	}
	row := p.rows[found]
	if as == "" {
		as = name
	}
	_, taken := p.disks[as]
	p.mu.Unlock()
	if found == 0 {
		return nil, fmt.Errorf("undelete disk %s: %w that can be had back; see \"gateway disk list --deleted\"", name, ErrNoDisk)
	}
	if taken {
		return nil, fmt.Errorf("undelete disk %s: %w; give it another name with --as", as, ErrExists)
	}
	row.Name, row.Flags, row.DeletedAt = as, row.Flags&^segment.DiskDeleted, 0
	if err := p.recordRow(context.WithoutCancel(ctx), found, row); err != nil {
		return nil, fmt.Errorf("undelete disk %s: %w", name, err)
	}
	p.openDisk(found, row)
	p.o.Log.Info("disk undeleted", "pool", p.o.Name, "disk", as, "id", uint32(found))
	return p.Disk(as)
}

// RenameDisk gives a disk another name. Who has it open keeps it. With tombstone the old name is remembered as that
// of a deleted disk, for a configuration that goes on to name it.
func (p *Pool) RenameDisk(ctx context.Context, name, to string, tombstone bool) (*vdisk.Disk, error) {
	d, err := p.renameDisk(ctx, name, to, tombstone)
	return d, p.answer(ctx, "rename", name, err)
}

func (p *Pool) renameDisk(ctx context.Context, name, to string, tombstone bool) (*vdisk.Disk, error) {
	d, row, err := p.begin(ctx, name)
	if err != nil {
		return nil, fmt.Errorf("rename disk: %w", err)
	}
	defer p.endOp()
	if _, err := p.Disk(to); err == nil {
		return nil, fmt.Errorf("rename disk %s to %s: %w; choose another name", name, to, ErrExists)
	}
	if tombstone && !p.WasDeleted(name) {
		p.mu.Lock()
		id := p.nextDisk
		p.mu.Unlock()
		stone := segment.DiskMeta{Name: name, Flags: segment.DiskDeleted | segment.DiskDropped, DeletedAt: time.Now().Unix()}
		if err := p.recordRow(context.WithoutCancel(ctx), id, stone); err != nil {
			return nil, fmt.Errorf("rename disk %s: %w", name, err)
		}
		p.addDisk(id, stone)
	}
	row.Name = to
	if err := p.recordRow(context.WithoutCancel(ctx), d.ID(), row); err != nil {
		return nil, fmt.Errorf("rename disk %s: %w", name, err)
	}
	d.Rename(to)
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.disks, name)
	p.disks[to] = d
	return d, nil
}

// ResizeDisk makes a disk size bytes long; the caller has checked the size. A disk becomes smaller only with shrink,
// else ErrShrink: what is cut off is gone. A client learns the size when it connects: one that is connected goes on
// with the old one, and beyond a smaller disk's end its requests fail.
func (p *Pool) ResizeDisk(ctx context.Context, name string, size int64, shrink bool) (*vdisk.Disk, error) {
	d, err := p.resizeDisk(ctx, name, size, shrink)
	return d, p.answer(ctx, "resize", name, err)
}

func (p *Pool) resizeDisk(ctx context.Context, name string, size int64, shrink bool) (*vdisk.Disk, error) {
	d, row, err := p.begin(ctx, name)
	if err != nil {
		return nil, fmt.Errorf("resize disk: %w", err)
	}
	defer p.endOp()
	if size < d.Size() && !shrink {
		return nil, fmt.Errorf("resize disk %s from %d to %d bytes: %w; --shrink says that it may", name, d.Size(), size, ErrShrink)
	}
	row.SizeBytes = uint64(size)
	payload, err := json.Marshal(op{Row: &row})
	if err != nil {
		return nil, err
	}
	ctx = context.WithoutCancel(ctx)
	if err := d.Resize(ctx, size, writeback.Record{Kind: writeback.Op, Disk: d.ID(), Data: payload}); err != nil {
		return nil, err
	}
	p.setRow(d.ID(), row)
	if err := p.log.Sync(ctx); err != nil {
		return nil, fmt.Errorf("resize disk %s: %w", name, err)
	}
	return d, nil
}

// DeletedDisk describes a disk that was deleted.
type DeletedDisk struct {
	Name      string    `json:"name"`
	ID        uint32    `json:"id"`
	Pool      string    `json:"pool"`
	SizeBytes int64     `json:"size_bytes"`
	DeletedAt time.Time `json:"deleted_at"`              // to the second
	Until     time.Time `json:"undelete_until,omitzero"` // zero if it cannot be had back any more
	Dropped   bool      `json:"dropped,omitempty"`       // only its name is left
}

// DeletedDisks lists deleted disks by name, the newest first; with dropped those too that cannot be had back.
func (p *Pool) DeletedDisks(dropped bool) []DeletedDisk {
	p.mu.Lock()
	defer p.mu.Unlock()
	out := []DeletedDisk{}
	for id, row := range p.rows {
		if row.Flags&segment.DiskDeleted == 0 {
			continue
		}
		d := DeletedDisk{Name: row.Name, ID: uint32(id), Pool: p.o.Name, SizeBytes: int64(row.SizeBytes), DeletedAt: time.Unix(row.DeletedAt, 0).UTC()}
		if d.Dropped = row.Flags&segment.DiskDropped != 0; !d.Dropped {
			d.Until = d.DeletedAt.Add(p.o.UndeleteWindow.Truncate(time.Second))
		}
		if dropped || !d.Dropped {
			out = append(out, d)
		}
	}
	sort.Slice(out, func(i, j int) bool {
		if out[i].Name != out[j].Name {
			return out[i].Name < out[j].Name
		}
		return out[i].ID > out[j].ID
	})
	return out
}

// WasDeleted tells whether a disk of that name, which is not there, was deleted here some day.
func (p *Pool) WasDeleted(name string) bool {
	return slices.ContainsFunc(p.DeletedDisks(true), func(d DeletedDisk) bool { return d.Name == name })
}

// dropDisks drops the disks whose window has passed, and has the maps of those that are dropped give up what they
// hold, once a cut has made holes of them.
func (p *Pool) dropDisks(ctx context.Context) error {
	if err := p.beforeClose(func() error { return p.dropDue(ctx) }); err != nil {
		return err
	}
	p.pub.own.Lock()
	p.mapsMu.Lock()
	var empty []block.DiskID
	for _, id := range slices.Sorted(maps.Keys(p.pub.disks)) {
		if p.pub.disks[id].Flags&segment.DiskDropped != 0 && p.tree(id).Stats().Entries > 0 {
			empty = append(empty, id)
		}
	}
	p.mapsMu.Unlock()
	p.pub.own.Unlock()
	var errs []error // a map that is far or damaged keeps no other
	for _, id := range empty {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err := p.emptyMap(ctx, id); err != nil {
			errs = append(errs, fmt.Errorf("drop the map of disk %d: %w", id, err))
		}
	}
	return errors.Join(errs...)
}

// emptyMap merges the hole down that a dropped disk is, and puts an empty map in place of what remains. No cut changes
// the map any more.
func (p *Pool) emptyMap(ctx context.Context, id block.DiskID) error {
	t := p.tree(id)
	t.Put([]densetree.Entry{{Blocks: diskBlocksMax, Kind: densetree.Hole}})
	if err := p.mending(ctx, t.Compact); err != nil {
		return err
	}
	p.pub.own.Lock()
	p.mapsMu.Lock()
	p.mu.Lock()
	p.trees[id] = densetree.New(p.treeOptions())
	p.mu.Unlock()
	p.mapsMu.Unlock()
	p.pub.own.Unlock()
	t.Close()
	return nil
}

// dropDue puts on record that disks are dropped whose window has passed.
func (p *Pool) dropDue(ctx context.Context) error {
	if err := p.beginOp(ctx); err != nil {
		return err
	}
	defer p.endOp()
	due := map[block.DiskID]segment.DiskMeta{}
	before := time.Now().Add(-p.o.UndeleteWindow).Unix()
	p.mu.Lock()
	for id, row := range p.rows {
		if row.Flags&(segment.DiskDeleted|segment.DiskDropped) == segment.DiskDeleted && row.DeletedAt <= before {
			due[id] = row
		}
	}
	p.mu.Unlock()
	for _, id := range slices.Sorted(maps.Keys(due)) {
		row := due[id]
		row.Flags |= segment.DiskDropped
		if err := p.recordRow(ctx, id, row); err != nil {
			return fmt.Errorf("drop disk %s: %w", row.Name, err)
		}
		p.o.Log.Info("deleted disk dropped", "pool", p.o.Name, "disk", row.Name, "id", uint32(id))
	}
	return nil
}
