package pool

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"

	"graindisk/block"
	"graindisk/grains/cache"
	"graindisk/grains/segment"
	"graindisk/internal/planted"
	"graindisk/pool/root"
	"graindisk/vdisk"
	"graindisk/vdisk/densetree"
	"graindisk/writeback"
)

// Bounds on what the publisher does at a time.
const (
	uploadsMax = 2    // banks in flight: each holds up to SegmentBytes*(k+m)/k in memory
	segReserve = 4096 // segment numbers that one root commit makes usable ahead of need
)

// publisher is the state of the publisher goroutine and nobody else's.
type publisher struct {
	cut     uint64 // newest published cut
	cutCRC  uint32 // of its record
	horizon writeback.Seq
	nextSeg block.SegmentID
	disks   map[block.DiskID]segment.DiskMeta // the disk table as of the newest cut
	ckpt    checkpointer

	kick   chan chan<- error // a request for a cut; answered when it is published
	cancel context.CancelFunc
	done   chan struct{}
}

// publish claims the pool, if that has not been done, and makes cuts until ctx ends.
func (p *Pool) publish(ctx context.Context) {
	defer close(p.pub.done)
	tick := time.NewTicker(min(p.o.MaxDirtyAge/4, time.Second))
	defer tick.Stop()
	if err := p.ensureClaimed(ctx); err != nil {
		if ctx.Err() == nil {
			p.stopPublishing(err)
		}
		return
	}
	for {
		var waiting []chan<- error
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			if !p.cutDue() {
				continue
			}
		case w := <-p.pub.kick:
			waiting = append(waiting, w)
		}
		err := p.makeCut(ctx)
		if err != nil && ctx.Err() == nil {
			p.stopPublishing(err)
		}
		for _, w := range waiting {
			w <- err
		}
		if err != nil {
			return
		}
	}
}

// stopPublishing notes that no further cut will be made. A pool that has another owner serves nothing
// any more; one whose tier failed goes on with what it can still do, and its writes fail by themselves.
func (p *Pool) stopPublishing(err error) {
	err = fmt.Errorf("pool %s: publish: %w", p.o.Name, err)
	p.o.Log.Error("publishing stopped", "pool", p.o.Name, "err", err)
	if errors.Is(err, root.ErrFenced) || errors.Is(err, root.ErrHeld) || errors.Is(err, root.ErrNewer) || errors.Is(err, ErrForeignTier) {
		p.gateFn.CompareAndSwap(nil, &gate{fmt.Errorf("%w: %w", vdisk.ErrFenced, err)})
	}
	p.broken.Store(&gate{err})
}

func (p *Pool) cutDue() bool {
	pr := p.log.Pressure()
	return !pr.Dirty.Oldest.IsZero() && (pr.Dirty.Bytes >= p.o.CutBytes || time.Since(pr.Dirty.Oldest) >= p.o.MaxDirtyAge || pr.Busy > pr.Slots/2)
}

func (p *Pool) isClaimed() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.claimed
}

// makeCut publishes all that is in the log now. It returns nil when that is done, and an error only
// when ctx ends or publishing is impossible for good; a silent store is waited for.
func (p *Pool) makeCut(ctx context.Context) error {
	if err := p.checkpointIfDue(ctx); err != nil { // a life before may have died of it
		return err
	}
	if p.log.Unpublished().Oldest.IsZero() {
		return nil
	}
	f, err := p.freeze(ctx)
	if err != nil {
		return err
	}
	start := time.Now()
	rec, stored, err := p.storeCut(ctx, f)
	if err != nil {
		return err
	}
	last := stored[len(stored)-1]
	if planted.Bug("cut: on record before the root") {
		_ = p.log.AppendMeta(metaPublication, encodePublication(rec, rec.AllSegments(last.sealed.Info), indexes(stored)))
	}
	if err := p.commitCut(ctx, rec, last.sealed.Info); err != nil {
		return err
	}
	if err := p.log.AppendMeta(metaPublication, encodePublication(rec, rec.AllSegments(last.sealed.Info), indexes(stored))); err != nil {
		return err
	}
	for _, s := range stored {
		p.reader.Remember(s.sealed.Info, s.sealed.Index)
		p.adopt(s)
	}
	p.applyCut(rec, last.sealed.Info, indexes(stored))
	if err := p.log.Publish(f); err != nil {
		return err
	}
	p.o.Log.Debug("cut published", "pool", p.o.Name, "cut", rec.Cut, "segments", len(stored), "horizon", rec.Horizon, "took", time.Since(start))
	return p.checkpointIfDue(ctx)
}

// freeze fixes the next cut and makes the log stable through it. When the metadata log has grown
// long the freeze is also the point of a local checkpoint.
func (p *Pool) freeze(ctx context.Context) (*writeback.Frozen, error) {
	if p.log.MetaBytes() < p.o.CheckpointBytes {
		f := p.log.Freeze()
		return f, p.log.Sync(ctx)
	}
	return p.localCheckpoint(ctx)
}

// storeCut packs the frozen index into segments and stores them, the one with the cut's record last.
func (p *Pool) storeCut(ctx context.Context, f *writeback.Frozen) (*segment.CutRecord, []*storedSegment, error) {
	rec := &segment.CutRecord{
		Epoch: p.epoch.Load(), Cut: p.pub.cut + 1, PrevCut: p.pub.cut, PrevCRC: p.pub.cutCRC, Horizon: uint64(f.Seq),
		Time: time.Now().Unix(),
	}
	var err error
	if rec.Disks, err = diskChanges(f); err != nil {
		return nil, nil, err
	}
	banks := planBanks(f, p.value().SegmentBytes)
	stored := make([]*storedSegment, len(banks))
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(uploadsMax)
	for i, b := range banks[:len(banks)-1] {
		g.Go(func() (err error) {
			stored[i], err = p.storeSegment(gctx, b, f.Seq, rec.Cut, nil)
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return nil, nil, err
	}
	for _, s := range stored[:len(banks)-1] {
		rec.Segments = append(rec.Segments, s.sealed.Info)
	}
	last, err := p.storeSegment(ctx, banks[len(banks)-1], f.Seq, rec.Cut, rec)
	if err != nil {
		return nil, nil, err
	}
	stored[len(banks)-1] = last
	return rec, stored, nil
}

// diskChanges is the frozen generation's net effect on each disk, its data aside.
func diskChanges(f *writeback.Frozen) ([]segment.DiskChange, error) {
	metas := map[block.DiskID]*segment.DiskMeta{}
	ids := f.Disks()
	for _, o := range f.Ops() {
		m, err := decodeOp(o.Payload)
		if err != nil {
			return nil, err
		}
		metas[o.Disk] = &m
		ids = append(ids, o.Disk)
	}
	slices.Sort(ids)
	var chs []segment.DiskChange
	for _, id := range slices.Compact(ids) {
		ch := segment.DiskChange{Disk: id, Meta: metas[id]}
		for _, h := range f.Holes(id) {
			ch.Unmaps = append(ch.Unmaps, segment.Run(h))
		}
		if ch.Meta != nil || len(ch.Unmaps) > 0 {
			chs = append(chs, ch)
		}
	}
	return chs, nil
}

// commitCut commits the root with the cut, whose last segment is last.
func (p *Pool) commitCut(ctx context.Context, rec *segment.CutRecord, last segment.Info) error {
	v := p.value()
	v.Cut, v.Horizon, v.LastCRC = rec.Cut, rec.Horizon, rec.CRC()
	v.Cuts = append(v.Cuts[:len(v.Cuts):len(v.Cuts)], cutRef(rec, last))
	if need := uint64(p.pub.nextSeg) + segReserve/2; v.SegLimit < need {
		v.SegLimit = uint64(p.pub.nextSeg) + segReserve
	}
	return p.commit(ctx, v)
}

// commit brings the root to v, however long the targets take. It fails when ctx ends or when
// another owner has claimed the pool.
func (p *Pool) commit(ctx context.Context, v root.Value) error {
	for wait := backoff(0); ; wait = wait.next() {
		cctx, cancel := context.WithTimeout(ctx, 30*time.Second)
		err := p.reg.Commit(cctx, v)
		cancel()
		switch {
		case err == nil:
			p.mu.Lock()
			p.val = v
			p.mu.Unlock()
			return nil
		case !errors.Is(err, root.ErrUnknown), ctx.Err() != nil, final(err):
			return err
		}
		p.o.Log.Warn("root not committed, trying again", "pool", p.o.Name, "err", err)
		if err := wait.sleep(ctx); err != nil {
			return err
		}
	}
}

func (p *Pool) value() root.Value {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.val
}

// applyCut brings the maps to the cut: unmaps, then extents, then the disk table. It is the same for
// a cut just published and for one read back at recovery.
func (p *Pool) applyCut(rec *segment.CutRecord, last segment.Info, idx []*segment.Index) {
	for _, ch := range rec.Disks {
		if ch.Meta != nil {
			p.pub.disks[ch.Disk] = *ch.Meta
			p.addDisk(ch.Disk, *ch.Meta)
		}
	}
	p.mu.Lock()
	for _, info := range rec.Segments {
		p.segments[info.ID] = info
	}
	p.segments[last.ID] = last
	p.mu.Unlock()
	for _, ch := range rec.Disks {
		if t := p.tree(ch.Disk); t != nil && len(ch.Unmaps) > 0 {
			holes := make([]densetree.Entry, len(ch.Unmaps))
			for i, r := range ch.Unmaps {
				holes[i] = densetree.Entry{LBA: r.LBA, Blocks: r.Blocks, Kind: densetree.Hole}
			}
			if planted.Bug("cut: unmaps after the blocks") {
				defer t.Put(holes)
				continue
			}
			t.Put(holes)
		}
	}
	for _, x := range idx {
		p.mapSegment(x)
	}
	p.pub.cut, p.pub.cutCRC, p.pub.horizon = rec.Cut, rec.CRC(), writeback.Seq(rec.Horizon)
}

// mapSegment puts every extent of a segment into its disk's tree.
func (p *Pool) mapSegment(x *segment.Index) {
	for i := 0; i < len(x.Entries); {
		disk := x.Entries[i].Disk
		var es []densetree.Entry
		for ; i < len(x.Entries) && x.Entries[i].Disk == disk; i++ {
			e := x.Entries[i]
			es = append(es, densetree.Entry{
				LBA: e.LBA, Blocks: uint64(e.Blocks), Kind: densetree.Data,
				Extent: block.NewExtentID(x.Info.ID, i), Orig: e.Blocks,
			})
		}
		if t := p.tree(disk); t != nil {
			t.Put(es)
		}
	}
}

// An extentPlan is blocks of one grain of one disk that become one extent.
type extentPlan struct {
	disk   block.DiskID
	blocks []writeback.Block // consecutive LBAs
}

// planBanks cuts the frozen blocks, sorted by disk and LBA, into extents that do not cross a grain,
// and those into banks of one segment each. There is always at least one bank, if need be empty.
func planBanks(f *writeback.Frozen, segmentBytes int64) [][]extentPlan {
	var banks [][]extentPlan
	var bank []extentPlan
	var bytes int64
	for _, disk := range f.Disks() {
		bs := f.Blocks(disk)
		for len(bs) > 0 {
			n := 1
			for n < len(bs) && bs[n].LBA == bs[0].LBA+block.LBA(n) && bs[n].LBA%grainBlocks != 0 {
				n++
			}
			if bytes+int64(n)*block.Size > segmentBytes || len(bank) == block.ExtentsMax {
				banks, bank, bytes = append(banks, bank), nil, 0
			}
			bank = append(bank, extentPlan{disk, bs[:n]})
			bytes += int64(n) * block.Size
			bs = bs[n:]
		}
	}
	if len(bank) > 0 || len(banks) == 0 {
		banks = append(banks, bank)
	}
	return banks
}

// adopt turns the log's copies of a segment's extents into cache.
func (p *Pool) adopt(s *storedSegment) {
	var refs []cache.BlockRef
	for slot, e := range s.plan {
		refs = refs[:0]
		for _, b := range e.blocks {
			refs = append(refs, cache.BlockRef{Place: b.Place, CRC: b.CRC})
		}
		p.cache.Adopt(block.NewExtentID(s.sealed.Info.ID, slot), refs)
	}
}
