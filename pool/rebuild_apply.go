package pool

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path"

	"github.com/google/uuid"

	"graindisk/backend"
	"graindisk/block"
	"graindisk/grains/segment"
	"graindisk/pool/root"
	"graindisk/vdisk/densetree"
)

// restore makes the maps of the chain, stores them as a checkpoint, and then puts the root that names it.
func (b *rebuilder) restore(ctx context.Context, h *cutHistory, chain []*rebuildCut) (err error) {
	if err := b.clearScratch(); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.clearScratch()) }()
	p, err := b.newPool()
	if err != nil {
		return err
	}
	defer p.closeMaps()
	for _, c := range chain {
		for _, d := range c.disks { // its extents may be in older cuts, if the row was stated again
			if p.trees[d] == nil {
				p.trees[d] = densetree.New(p.treeOptions())
			}
		}
	}
	if err := b.apply(ctx, p, h, chain); err != nil {
		return err
	}
	b.ro.Progress(RebuildProgress{Phase: "write", Done: b.rep.Segments, Total: b.rep.Segments})
	if err := p.publishCheckpoint(ctx); err != nil {
		return err
	}
	v := p.value()
	v.Cut, v.Horizon, v.LastCRC = p.pub.cut, uint64(p.pub.horizon), p.pub.cutCRC
	err = root.Recreate(ctx, rootTargets(b.o.Targets), p.uuid.String(), v, root.Ballot{Epoch: b.top, Claimant: uuid.NewString()})
	if err != nil {
		return fmt.Errorf("the maps are stored, the root is not, or not everywhere: %w; try again", err)
	}
	b.rep.Restored = true
	b.o.Log.Info("pool rebuilt", "pool", b.o.Name, "cut", v.Cut, "epoch", b.top, "disks", len(b.rep.Disks), "segments", b.rep.Segments)
	return nil
}

// newPool is a pool without a tier: maps, usage table and targets, enough to apply cuts and to store a checkpoint.
func (b *rebuilder) newPool() (*Pool, error) {
	p := newMaps(b.o)
	p.uuid = b.s.pool
	p.epoch.Store(b.top)
	p.stores, p.names = map[block.TargetID]backend.Store{}, map[block.TargetID]string{}
	p.val = root.Value{
		Format: root.ValueFormat, Cfg: root.Config{No: 1}, State: root.Released,
		SegLimit: min(uint64(b.s.number)+rebuildNumbers, uint64(block.SegmentMax-1)), Stripe: b.stripe,
		GrainBytes: GrainBytes, SegmentBytes: b.o.SegmentBytes,
	}
	for i, t := range b.rep.Targets {
		id := block.TargetID(t.ID)
		p.val.Cfg.Members = append(p.val.Cfg.Members, root.Member{ID: id, UUID: uuid.NewString(), Name: t.Name, Witness: t.Witness})
		p.stores[id], p.names[id] = b.s.stores[i], t.Name
	}
	var err error
	if err = b.o.FS.MkdirAll(b.ro.Scratch); err == nil {
		p.runs, err = densetree.OpenStore(densetree.StoreOptions{FS: b.o.FS, Dir: b.ro.Scratch, Cache: densetree.NewPageCache(b.o.MapBytes)})
	}
	if err != nil {
		return nil, fmt.Errorf("scratch space: %w", err)
	}
	return p, nil
}

// clearScratch removes what an earlier rebuild, or this one, left in its folder.
func (b *rebuilder) clearScratch() error {
	names, err := b.o.FS.ReadDir(b.ro.Scratch)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	for _, e := range names {
		err = errors.Join(err, b.o.FS.Remove(path.Join(b.ro.Scratch, e.Name())))
	}
	if err != nil {
		return fmt.Errorf("scratch space: %w", err)
	}
	return nil
}

// readTail is a segment's index and record, being read.
type readTail struct {
	done chan struct{} // closed when the rest is set
	x    *segment.Index
	rec  *segment.CutRecord
	err  error
}

// apply brings the maps through the chain, cut after cut, reading ahead.
func (b *rebuilder) apply(ctx context.Context, p *Pool, h *cutHistory, chain []*rebuildCut) error {
	type step struct {
		cut  *rebuildCut
		segs []*foundSegment // to be mapped, in order; the holder, if it is needed, is last
	}
	var steps []step
	h.needed(chain, func(c *rebuildCut, segs []*foundSegment) { steps = append(steps, step{c, segs}) })

	ctx, cancel := context.WithCancel(ctx)
	reads := make(chan *readTail, rebuildAhead)
	defer func() { // whoever reads ahead ends before the targets may be closed
		cancel()
		for r := range reads {
			<-r.done
		}
	}()
	go func() { // per cut: the record and the holder's index first, then the others
		defer close(reads)
		read := func(f *foundSegment) bool {
			r := &readTail{done: make(chan struct{})}
			select {
			case reads <- r:
			case <-ctx.Done():
				return false
			}
			go func() {
				defer close(r.done)
				r.x, r.rec, r.err = b.s.tail(ctx, f)
			}()
			return true
		}
		for _, s := range steps {
			if !read(s.cut.holder) {
				return
			}
			for _, f := range s.segs {
				if f != s.cut.holder && !read(f) {
					return
				}
			}
		}
	}()
	next := func() (*readTail, error) {
		r, ok := <-reads
		if !ok {
			return nil, context.Cause(ctx)
		}
		<-r.done
		return r, r.err
	}
	done := 0
	for _, s := range steps {
		head, err := next()
		if err != nil {
			return fmt.Errorf("%v: %w", s.cut, err)
		}
		if head.rec == nil || head.rec.CRC() != s.cut.crc {
			return fmt.Errorf("%v: its record changed while it was read: %w", s.cut, segment.ErrDamaged)
		}
		infos, idx := make([]segment.Info, len(s.segs)), make([]*segment.Index, len(s.segs))
		for i, f := range s.segs {
			r := head
			if f != s.cut.holder {
				if r, err = next(); err != nil {
					return fmt.Errorf("%v: %w", s.cut, err)
				}
			}
			infos[i], idx[i] = f.info, r.x
		}
		p.applyCut(head.rec, infos, idx)
		p.countOut(idx)
		done += len(idx)
		b.ro.Progress(RebuildProgress{Phase: "apply", Done: done, Total: b.rep.Segments})
	}
	if g := p.usageErr.Load(); g != nil {
		return fmt.Errorf("the cuts contradict each other: %w", g.err)
	}
	return nil
}

// countOut counts extents as dead whose disk has no row in any record that is left: it was deleted.
func (p *Pool) countOut(idx []*segment.Index) {
	var ls []densetree.Loss
	for _, x := range idx {
		for slot, e := range x.Entries {
			if p.tree(e.Disk) == nil {
				ls = append(ls, densetree.Loss{Extent: block.NewExtentID(x.Info.ID, slot), Orig: e.Blocks, Blocks: e.Blocks})
			}
		}
	}
	p.maps.RLock()
	defer p.maps.RUnlock()
	p.lost(ls)
}
