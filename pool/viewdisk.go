package pool

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"slices"
	"sync"

	"golang.org/x/sync/errgroup"

	"graindisk/block"
	"graindisk/grains/segment"
	"graindisk/vdisk"
	"graindisk/vdisk/densetree"
)

// ViewDisk is a disk of a View, with its map in memory: some 2 to 8 bytes per extent. Safe for concurrent use.
type ViewDisk struct {
	v    *View
	info ViewedDisk
	tree *densetree.Tree
}

// How an image is read: in jobs that hold this much data, so many of them side by side, each from so many segments
// at a time. Together they take some 150 MB of memory. [tune]
const (
	viewJobBytes    = 4 << 20
	viewJobs        = 12
	viewJobSegments = 4

	viewParts = 4 // parts of a checkpoint read side by side; each takes some 16 MB meanwhile
)

// Disk reads the map of a disk. It fails with ErrNoDisk, as OpenView does, or with ErrViewExpired.
func (v *View) Disk(ctx context.Context, name string) (*ViewDisk, error) {
	for id, d := range v.disks {
		if d.meta.Name != name || d.meta.Flags&segment.DiskDeleted != 0 {
			continue
		}
		if d.meta.Parent != 0 || d.meta.BaseVersion != 0 {
			return nil, fmt.Errorf("disk %s stands on another version (%d, %d), which this release cannot read: %w", name, d.meta.Parent, d.meta.BaseVersion, segment.ErrNewer)
		}
		var tree *densetree.Tree
		err := v.patiently(ctx, func(ctx context.Context) (err error) {
			tree, err = v.loadMap(ctx, id, d.runs)
			return err
		})
		if err != nil && ctx.Err() == nil {
			err = fmt.Errorf("map of disk %s: %w", name, v.explain(ctx, err))
		}
		if err != nil {
			return nil, err
		}
		return &ViewDisk{v, ViewedDisk{Name: name, ID: uint32(id), SizeBytes: int64(d.meta.SizeBytes)}, tree}, nil
	}
	return nil, fmt.Errorf("disk %s: %w", name, ErrNoDisk)
}

// loadMap makes the map of one disk: the runs of the checkpoint, then cut by cut.
func (v *View) loadMap(ctx context.Context, disk block.DiskID, refs []runRef) (*densetree.Tree, error) {
	runs, err := v.readRuns(ctx, refs)
	if err != nil {
		return nil, err
	}
	tree, err := densetree.Load(densetree.Options{}, runs)
	if err != nil {
		return nil, err
	}
	type step struct {
		holes []densetree.Entry
		info  segment.Info // if holes is nil
	}
	steps := func(yield func(step) bool) {
		for _, c := range v.cuts {
			for _, ch := range c.rec.Disks {
				if ch.Disk == disk && len(ch.Unmaps) > 0 && !yield(step{holes: holesOf(ch)}) {
					return
				}
			}
			for _, info := range c.infos {
				if !yield(step{info: info}) {
					return
				}
			}
		}
	}
	err = inOrder(ctx, steps, viewAtOnce, func(ctx context.Context, s step) (*segment.Index, error) {
		if s.holes != nil {
			return nil, nil
		}
		return v.p.reader.Index(ctx, s.info)
	}, func(s step, x *segment.Index) error {
		if s.holes != nil {
			tree.Put(s.holes)
			return nil
		}
		eachMapped(x, func(d block.DiskID, es []densetree.Entry) {
			if d == disk {
				tree.Put(es)
			}
		})
		return nil
	})
	if err != nil {
		tree.Close()
		return nil, err
	}
	return tree, nil
}

// readRuns reads runs of a checkpoint into memory.
func (v *View) readRuns(ctx context.Context, refs []runRef) ([]*densetree.Run, error) {
	parts := map[partID][]runRef{}
	var ids []partID
	for _, r := range refs {
		id := partID{r.Epoch, r.N, r.Part}
		if parts[id] == nil {
			ids = append(ids, id)
		}
		parts[id] = append(parts[id], r)
	}
	var runs []*densetree.Run
	err := inOrder(ctx, slices.Values(ids), viewParts, func(ctx context.Context, id partID) ([]*densetree.Run, error) {
		body, err := v.p.getPart(ctx, id.epoch, id.n, id.part)
		if err != nil {
			return nil, err
		}
		var rs []*densetree.Run
		for _, ref := range parts[id] {
			r, err := ref.decode(body)
			if err != nil {
				return nil, err
			}
			rs = append(rs, r)
		}
		return rs, nil
	}, func(_ partID, rs []*densetree.Run) error {
		runs = append(runs, rs...)
		return nil
	})
	return runs, err
}

// Info describes the disk.
func (d *ViewDisk) Info() ViewedDisk { return d.info }

// Close gives the map back.
func (d *ViewDisk) Close() { d.tree.Close() }

// ReadAt fills p from off. Every byte was checked. It fails with vdisk.ErrRange, with vdisk.ErrDamaged for what is lost,
// with ErrViewExpired, or with what the targets said for as long as ViewOptions.Patience.
func (d *ViewDisk) ReadAt(ctx context.Context, p []byte, off int64) error {
	if off < 0 || int64(len(p)) > d.info.SizeBytes || off > d.info.SizeBytes-int64(len(p)) {
		return fmt.Errorf("disk %s: read of %d bytes at %d: %w", d.info.Name, len(p), off, vdisk.ErrRange)
	}
	clear(p)
	var err error
	for j := range d.jobs(off, off+int64(len(p)), &err) {
		d.v.do(ctx, j)
		for _, part := range j.parts() {
			if part.Err != nil {
				return part.Err
			}
			if part.Data == nil {
				continue
			}
			if at := part.Off - off; at >= 0 {
				copy(p[at:], part.Data)
			} else {
				copy(p, part.Data[-at:])
			}
		}
	}
	return err
}

// ViewPart is a range of a disk, in order: stored bytes, zeroes that are not stored, or what cannot be read.
type ViewPart struct {
	Off, Len int64  // bytes; multiples of block.Size
	Data     []byte // nil for zeroes; good only until the next part
	Err      error  // as of ReadAt; Data is nil
}

// Stream reads the whole disk, in order and without a gap, a few MiB ahead of use. What cannot be read is a part by
// itself and does not end the stream; an error of use does, and is returned.
func (d *ViewDisk) Stream(ctx context.Context, use func(ViewPart) error) error {
	var unread error
	err := inOrder(ctx, d.jobs(0, d.info.SizeBytes, &unread), viewJobs, func(ctx context.Context, j *viewJob) (struct{}, error) {
		d.v.do(ctx, j)
		return struct{}{}, ctx.Err()
	}, func(j *viewJob, _ struct{}) error {
		for _, p := range j.parts() {
			if err := use(p); err != nil {
				return err
			}
		}
		return nil
	})
	return errors.Join(err, unread)
}

// Stored is how many bytes of the disk the map says are stored.
func (d *ViewDisk) Stored() (n int64, err error) {
	for j := range d.jobs(0, d.info.SizeBytes, &err) {
		n += int64(j.bytes)
	}
	return n, err
}

// viewJob is a range of a disk and the stored pieces in it, in order; the rest of it is zeroes.
type viewJob struct {
	from, to block.LBA
	pieces   []viewPiece
	bytes    int    // of all pieces
	buf      []byte // their data, back to back
}

type viewPiece struct {
	densetree.Entry
	at  int // in buf
	err error
}

// jobs divides the blocks that hold bytes from to to. err is set if the map cannot be read to its end.
func (d *ViewDisk) jobs(from, to int64, err *error) iter.Seq[*viewJob] {
	return func(yield func(*viewJob) bool) {
		first, end := block.LBA(from/block.Size), block.LBA((to+block.Size-1)/block.Size)
		more := true
		j := &viewJob{from: first}
		*err = d.tree.Lookup(first, uint64(end-first), func(e densetree.Entry) bool {
			switch e.Kind {
			case densetree.None, densetree.Hole:
				return true
			case densetree.Base:
				j.pieces = append(j.pieces, viewPiece{Entry: e, at: j.bytes, err: fmt.Errorf("it is in another version: %w", segment.ErrNewer)})
				return true
			}
			if n := int(e.Blocks) * block.Size; j.bytes > 0 && j.bytes+n > viewJobBytes {
				j.to = e.LBA
				if more = yield(j); !more {
					return false
				}
				j = &viewJob{from: e.LBA}
			}
			j.pieces = append(j.pieces, viewPiece{Entry: e, at: j.bytes})
			j.bytes += int(e.Blocks) * block.Size
			return true
		})
		if j.to = end; more && *err == nil && j.from < end {
			yield(j)
		}
	}
}

// parts is what became of the job, in order, neighbours of one kind joined.
func (j *viewJob) parts() []ViewPart {
	var out []ViewPart
	at := j.from
	add := func(p ViewPart) {
		if n := len(out); n > 0 && p.Data != nil && out[n-1].Data != nil {
			last := &out[n-1]
			last.Len += p.Len
			last.Data = last.Data[:len(last.Data)+len(p.Data)] // which lies right behind
			return
		}
		out = append(out, p)
	}
	hole := func(to block.LBA) {
		if at < to {
			add(ViewPart{Off: int64(at) * block.Size, Len: int64(to-at) * block.Size})
		}
	}
	for _, x := range j.pieces {
		hole(x.LBA)
		n := int64(x.Blocks) * block.Size
		p := ViewPart{Off: int64(x.LBA) * block.Size, Len: n, Err: x.err}
		if x.err == nil {
			p.Data = j.buf[x.at:][:n]
		}
		add(p)
		at = x.End()
	}
	hole(j.to)
	return out
}

// do reads a job's pieces; each has its outcome afterwards.
func (v *View) do(ctx context.Context, j *viewJob) {
	j.buf = make([]byte, j.bytes)
	bySegment := map[block.SegmentID][]int{}
	var order []block.SegmentID
	for i, x := range j.pieces {
		if x.err != nil {
			continue
		}
		seg := x.Extent.Segment()
		if bySegment[seg] == nil {
			order = append(order, seg)
		}
		bySegment[seg] = append(bySegment[seg], i)
	}
	var g errgroup.Group
	g.SetLimit(viewJobSegments)
	for _, seg := range order {
		g.Go(func() error { v.readSegment(ctx, j, seg, bySegment[seg]); return nil })
	}
	_ = g.Wait() // the functions above return nil
}

// readSegment reads those pieces of a job that lie in one segment.
func (v *View) readSegment(ctx context.Context, j *viewJob, seg block.SegmentID, pieces []int) {
	left := map[int][]int{} // slot → pieces
	for _, i := range pieces {
		slot := j.pieces[i].Extent.Slot()
		left[slot] = append(left[slot], i)
	}
	fail := func(slot int, err error) {
		for _, i := range left[slot] {
			j.pieces[i].err = fmt.Errorf("extent %s: %w", j.pieces[i].Extent, err)
		}
		delete(left, slot)
	}
	info, ok := v.segments[seg]
	if !ok {
		for slot := range left {
			fail(slot, fmt.Errorf("its segment is not in the pool's table: %w", vdisk.ErrDamaged))
		}
		return
	}
	gone := map[int]error{}
	err := v.patiently(ctx, func(ctx context.Context) (passing error) {
		slots := make([]int, 0, len(left))
		for s := range left {
			if gone[s] == nil {
				slots = append(slots, s)
			}
		}
		slices.Sort(slots)
		v.p.reader.Each(ctx, info, slots, func(slot int, data []byte, e segment.Entry, err error) {
			switch {
			case err == nil:
				err = j.take(left[slot], data, e)
			case lost(err), errors.Is(err, segment.ErrNewer):
			default:
				passing = err
				return
			}
			if err != nil {
				gone[slot] = err
				return
			}
			delete(left, slot)
		})
		return passing
	})
	fate := sync.OnceValue(func() error { return v.fate(ctx) }) // one look at the root for them all
	for slot, err := range gone {
		if lost(err) {
			err = judge(err, fate())
		}
		fail(slot, err)
	}
	for slot := range left {
		fail(slot, err)
	}
}

// take copies what the pieces want of an extent.
func (j *viewJob) take(pieces []int, data []byte, e segment.Entry) error {
	for _, i := range pieces {
		x := &j.pieces[i]
		if e.Blocks != x.Orig {
			return fmt.Errorf("it has %d blocks, the map says %d: %w", e.Blocks, x.Orig, segment.ErrDamaged)
		}
		copy(j.buf[x.at:][:x.Blocks*block.Size], data[int(x.Off)*block.Size:])
	}
	return nil
}
