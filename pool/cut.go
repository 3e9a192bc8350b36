package pool

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"graindisk/block"
	"graindisk/grains/cache"
	"graindisk/grains/segment"
	"graindisk/internal/planted"
	"graindisk/internal/turn"
	"graindisk/pool/root"
	"graindisk/vdisk"
	"graindisk/vdisk/densetree"
	"graindisk/writeback"
)

// segReserve is how many segment numbers one root commit makes usable ahead of need.
const segReserve = 4096

// publisher is the state of publishing. What is not said to be otherwise belongs to the committer, and to
// whoever has the pool before it starts or after it ended.
type publisher struct {
	cut     uint64 // newest published cut
	cutCRC  uint32 // of its record
	horizon writeback.Seq
	nextSeg block.SegmentID                   // guarded by Pool.segMu
	disks   map[block.DiskID]segment.DiskMeta // the disk table as of the newest cut
	ckpt    checkpointer
	// What reclaim is about; see there. It changes with own and Pool.mapsMu held.
	doomed   []doomed
	gone     *segment.Gone // as the newest record says that has one, of cut
	goneCut  uint64
	nextDisk block.DiskID // above all that the maps ever knew
	pending  *restatement // for the next record

	own    turn.Lock         // held by the committer over a cut, and by who does its work in between
	force  atomic.Bool       // the next cut is made even of nothing
	early  chan struct{}     // holds a token while reclaim writes to the log or asks for a cut, and from Close on
	kick   chan chan<- error // a request for a cut; answered when it is published
	banks  chan struct{}     // holds a token for each bank in use
	commit chan struct{}     // holds a token while somebody changes the root
	cancel context.CancelFunc
	done   chan struct{} // of the publisher
	local  chan struct{} // of keepLocal
}

func newPublisher() publisher {
	return publisher{
		disks: map[block.DiskID]segment.DiskMeta{}, nextDisk: 1, kick: make(chan chan<- error),
		banks: make(chan struct{}, banksMax), commit: make(chan struct{}, 1), early: make(chan struct{}, 1),
	}
}

// pendingCut is a cut on its way from the packer to the committer. One without a frozen generation only
// carries those who wait for all before it.
type pendingCut struct {
	f       *writeback.Frozen
	start   time.Time
	stores  *errgroup.Group // is storing segs
	stop    context.CancelFunc
	segs    []*storedSegment // all but the last; filled in when stores is done
	last    *bank            // will hold the cut's record
	waiting []chan<- error
	done    chan struct{} // closed when the committer is finished with it
}

// answer tells those who asked for the cut.
func (c *pendingCut) answer(err error) {
	for _, w := range c.waiting {
		w <- err
	}
	close(c.done)
}

// publish claims the pool, if that has not been done, and makes cuts until ctx ends. The packer freezes a
// cut, fills its banks and has them stored; the committer waits for that, stores the one with the record
// and commits, cut after cut. So the banks of one cut are on their way while the root of the one before is
// being committed, and no more than that: the packer waits for the committer to take its cut.
func (p *Pool) publish(ctx context.Context) {
	defer close(p.pub.done)
	err := p.ensureClaimed(ctx)
	if err == nil {
		err = p.checkpointIfDue(ctx) // a life before may have died of it
	}
	if err == nil {
		cuts := make(chan *pendingCut)
		g, gctx := errgroup.WithContext(ctx)
		g.Go(func() error { return p.packCuts(gctx, cuts) })
		g.Go(func() error { return p.commitCuts(gctx, cuts) })
		g.Go(func() error { return p.reclaimSpace(gctx) })
		err = g.Wait()
	}
	p.failed(ctx, err)
	if p.isFenced() {
		p.noteFence()
	}
}

// failed stops publishing for what is not the end of ctx, before anybody is told of it.
func (p *Pool) failed(ctx context.Context, err error) {
	if err != nil && ctx.Err() == nil && p.broken.Load() == nil {
		p.stopPublishing(err)
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

// cutDue tells whether the next cut should be made now: enough has come together, or it has waited for
// long enough, or space on the tier runs out. While a cut is under way that will return space, only writers
// that wait already are a reason to make a small one.
func (p *Pool) cutDue(underWay bool) bool {
	d := p.log.Unfrozen()
	if d.Oldest.IsZero() {
		return false
	}
	if d.Bytes >= p.o.CutBytes || time.Since(d.Oldest) >= p.o.MaxDirtyAge {
		return true
	}
	free, busy, clean := p.space.Counts()
	if !underWay && busy >= (free+busy+clean)/cutShare+logSlots {
		return true
	}
	return free+clean < logSlots && p.log.Pressure().Waiting // not only for a slot that is being made ready
}

func (p *Pool) isClaimed() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.claimed
}

// packCuts makes cuts when they are due and hands them to the committer. It returns an error only when ctx
// ends or publishing is impossible for good; a silent store is waited for.
func (p *Pool) packCuts(ctx context.Context, cuts chan<- *pendingCut) error {
	defer close(cuts)
	tick := time.NewTicker(max(time.Millisecond, min(p.o.MaxDirtyAge/4, cutPoll)))
	defer tick.Stop()
	latest := make(chan struct{}) // closed: the committer is idle
	close(latest)
	quiet := time.Now() // when a cut was under way last
	for {
		c := &pendingCut{done: make(chan struct{})}
		w, err := p.nextAsked(ctx, tick.C)
		if err != nil {
			return err
		}
		if w != nil {
			c.waiting = append(c.waiting, w)
		} else {
			underWay := !isClosed(latest)
			if underWay {
				quiet = time.Now()
			} else if time.Since(quiet) > buffersIdle {
				p.buffers.Drop()
			}
			if !p.cutDue(underWay) {
				continue
			}
		}
		if forced := p.pub.force.Swap(false); forced || !p.log.Unfrozen().Oldest.IsZero() {
			err = p.packCut(ctx, c, latest)
		}
		if err == nil {
			select {
			case cuts <- c:
				latest = c.done
				continue
			case <-ctx.Done():
				err = ctx.Err()
			}
		}
		p.dropCut(c)
		p.failed(ctx, err)
		c.answer(err)
		return err
	}
}

// nextAsked waits for who asks for a cut, or for the next tick: then it returns nil. Of what is ready at once
// the end comes first, then who asks, so that a run of the crash test can be repeated.
func (p *Pool) nextAsked(ctx context.Context, tick <-chan time.Time) (chan<- error, error) {
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	select {
	case w := <-p.pub.kick:
		return w, nil
	default:
	}
	select {
	case <-ctx.Done():
		return nil, ctx.Err()
	case w := <-p.pub.kick:
		return w, nil
	case <-tick:
		return nil, nil
	}
}

// When the packer looks whether a cut is due, and how much of the tier may be unpublished before it is:
// one part in cutShare, beside the slots that the log always has in hand.
const (
	cutPoll  = 100 * time.Millisecond
	cutShare = 3
	logSlots = 3
)

// buffersIdle is how long memory for segments is kept that no cut needs.
const buffersIdle = 30 * time.Second

func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// packCut freezes the log, and fills and stores all banks of the cut but the last, which it fills only.
func (p *Pool) packCut(ctx context.Context, c *pendingCut, idle <-chan struct{}) (err error) {
	c.start = time.Now()
	if c.f, err = p.freeze(ctx, idle); err != nil {
		return err
	}
	sctx, stop := context.WithCancel(ctx)
	c.stop = stop
	c.stores, sctx = errgroup.WithContext(sctx)
	defer func() {
		if err != nil && sctx.Err() != nil && ctx.Err() == nil { // the echo of what a bank met
			err = c.stores.Wait()
		}
	}()
	for plan := planExtents(c.f); ; {
		if err := p.takeBank(sctx); err != nil {
			return err
		}
		b, rest, err := p.fillBank(sctx, plan, c.f.Seq)
		if err != nil {
			p.dropBank(b)
			return err
		}
		if len(rest) == 0 {
			c.last = b
			return nil
		}
		plan = rest
		s := &storedSegment{}
		c.segs = append(c.segs, s)
		c.stores.Go(func() (err error) {
			*s, err = p.storeBank(sctx, b, nil)
			return err
		})
	}
}

func (p *Pool) takeBank(ctx context.Context) error {
	if ctx.Err() != nil { // goes before what may be had as well
		return ctx.Err()
	}
	select {
	case p.pub.banks <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// dropBank gives back the token of takeBank and the memory of the bank, if there is one.
func (p *Pool) dropBank(b *bank) {
	if b != nil && b.builder != nil {
		b.builder.Discard()
	}
	<-p.pub.banks
}

// dropCut ends what a cut has under way that will not be committed.
func (p *Pool) dropCut(c *pendingCut) {
	if c.stores != nil {
		c.stop()
		_ = c.stores.Wait() // the reason why it is dropped is known
	}
	if c.last != nil {
		p.dropBank(c.last)
		c.last = nil
	}
}

// enterCut brings the tier and the maps up to a cut that the root has.
func (p *Pool) enterCut(f *writeback.Frozen, rec *segment.CutRecord, segs []*storedSegment, infos []segment.Info) error {
	p.mapsMu.Lock()
	defer p.mapsMu.Unlock()
	idx := indexes(segs)
	if err := p.recordPublication(rec, infos, idx); err != nil {
		return err
	}
	for _, s := range segs {
		p.reader.Remember(s.info, s.index)
		p.adopt(s)
	}
	p.applyCut(rec, infos, idx)
	if err := p.log.Publish(f); err != nil {
		return err
	}
	if err := p.cache.Save(); err != nil { // costs a warm start, nothing else
		p.o.Log.Warn("cache index not saved", "pool", p.o.Name, "err", err)
	}
	return nil
}

// freeze fixes the next cut and makes the log stable through it. When the metadata log has grown
// long the freeze is also the point of a local checkpoint, which holds the maps as they are between two
// cuts: so it waits until the committer is idle.
func (p *Pool) freeze(ctx context.Context, idle <-chan struct{}) (*writeback.Frozen, error) {
	if p.log.MetaBytes() < p.o.CheckpointBytes {
		f := p.log.Freeze()
		return f, p.log.Sync(ctx)
	}
	select {
	case <-idle:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	return p.localCheckpoint(ctx)
}

// commitCuts publishes the packer's cuts in order.
func (p *Pool) commitCuts(ctx context.Context, cuts <-chan *pendingCut) (err error) {
	for c := range cuts {
		if err == nil && c.f != nil {
			err = p.publishCut(ctx, c)
		}
		if err == nil {
			err = p.checkpointIfWanted(ctx)
		}
		if err != nil {
			p.dropCut(c)
			p.failed(ctx, err)
		}
		c.answer(err)
		if err != nil {
			return err
		}
	}
	return nil
}

// publishCut stores the segment with the cut's record, commits the root with the cut, and brings the tier
// and the maps up to it.
func (p *Pool) publishCut(ctx context.Context, c *pendingCut) error {
	defer c.stop()
	if err := c.stores.Wait(); err != nil {
		return err
	}
	rec := &segment.CutRecord{
		Epoch: c.last.epoch, Cut: p.pub.cut + 1, PrevCut: p.pub.cut, PrevCRC: p.pub.cutCRC, Horizon: uint64(c.f.Seq),
		Time: time.Now().Unix(),
	}
	p.pub.own.Lock()
	defer p.pub.own.Unlock()
	var err error
	if rec.Disks, err = diskChanges(c.f); err != nil {
		return err
	}
	limit := c.last.id
	for _, s := range c.segs {
		limit = min(limit, s.info.ID)
	}
	p.restate(rec, limit)
	for _, s := range c.segs {
		rec.Segments = append(rec.Segments, s.info)
	}
	b := c.last
	c.last = nil // storeBank gives it back
	last, err := p.storeBank(ctx, b, rec)
	if err != nil {
		return err
	}
	segs := append(c.segs, &last)
	infos := rec.AllSegments(last.info)
	if planted.Bug("cut: on record before the root") {
		_ = p.recordPublication(rec, infos, indexes(segs))
	}
	if err := p.commitCut(ctx, rec, last.info); err != nil {
		return err
	}
	if err := p.enterCut(c.f, rec, segs, infos); err != nil {
		return err
	}
	p.o.Log.Debug("cut published", "pool", p.o.Name, "cut", rec.Cut, "segments", len(segs), "bytes", c.f.Bytes(),
		"horizon", rec.Horizon, "took", time.Since(c.start))
	return p.checkpointIfDue(ctx)
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
	p.segMu.Lock()
	next := uint64(p.pub.nextSeg)
	p.segMu.Unlock()
	return p.update(ctx, func(v *root.Value) {
		v.Cut, v.Horizon, v.LastCRC = rec.Cut, rec.Horizon, rec.CRC()
		v.Cuts = append(v.Cuts[:len(v.Cuts):len(v.Cuts)], cutRef(rec, last))
		if v.SegLimit < next+segReserve/2 {
			v.SegLimit = next + segReserve
		}
	})
}

// update commits the root as last committed with a change, one at a time.
func (p *Pool) update(ctx context.Context, change func(*root.Value)) error {
	if ctx.Err() != nil { // goes before what may be had as well
		return ctx.Err()
	}
	select {
	case p.pub.commit <- struct{}{}:
	case <-ctx.Done():
		return ctx.Err()
	}
	defer func() { <-p.pub.commit }()
	v := p.value()
	change(&v)
	return p.commit(ctx, v)
}

// commit brings the root to v, which follows what update holds fast, however long the targets take. It fails when ctx ends or when
// another owner has claimed the pool.
func (p *Pool) commit(ctx context.Context, v root.Value) error {
	if p.reg == nil { // Rebuild puts the value itself, once there is all that it names
		p.val = v
		return nil
	}
	for wait := backoff(0); ; wait = wait.next() {
		cctx, cancel := context.WithTimeout(ctx, 30*time.Second)
		err := p.reg.Commit(cctx, v)
		cancel()
		switch {
		case err == nil:
			p.mu.Lock()
			p.val = v
			p.mu.Unlock()
			p.noteCommit()
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
// a cut just published and for one read back at recovery. infos are its segments, by where they were stored.
func (p *Pool) applyCut(rec *segment.CutRecord, infos []segment.Info, idx []*segment.Index) {
	for _, ch := range rec.Disks {
		if ch.Meta != nil {
			p.pub.disks[ch.Disk] = *ch.Meta
			p.pub.nextDisk = max(p.pub.nextDisk, ch.Disk+1)
			p.addDisk(ch.Disk, *ch.Meta)
		}
	}
	p.mu.Lock()
	for _, info := range infos {
		p.segments[info.ID] = info
	}
	p.mu.Unlock()
	p.addUsage(infos, rec.Time)
	for _, ch := range rec.Disks {
		if t := p.tree(ch.Disk); t != nil && len(ch.Unmaps) > 0 {
			holes := holesOf(ch)
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
	for _, ch := range rec.Disks {
		if t := p.tree(ch.Disk); t != nil && ch.Meta != nil && ch.Meta.Flags&segment.DiskDropped != 0 {
			t.Put([]densetree.Entry{{Blocks: diskBlocksMax, Kind: densetree.Hole}})
		}
	}
	if rec.Gone != nil {
		p.pub.gone, p.pub.goneCut = rec.Gone, rec.Cut
	}
	p.pub.cut, p.pub.cutCRC, p.pub.horizon = rec.Cut, rec.CRC(), writeback.Seq(rec.Horizon)
}

// diskBlocksMax is the length of the longest disk.
const diskBlocksMax = 64 << 40 / block.Size

// mapSegment puts every extent of a segment into its disk's tree.
func (p *Pool) mapSegment(x *segment.Index) {
	eachMapped(x, func(disk block.DiskID, es []densetree.Entry) {
		if t := p.tree(disk); t != nil {
			t.Put(es)
		}
	})
}

// eachMapped calls fn for each disk that a segment has extents of, with the entries of its tree.
func eachMapped(x *segment.Index, fn func(block.DiskID, []densetree.Entry)) {
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
		fn(disk, es)
	}
}

// adopt turns the log's copies of a segment's extents into cache.
func (p *Pool) adopt(s *storedSegment) {
	var refs []cache.BlockRef
	for slot, e := range s.plan {
		refs = refs[:0]
		for _, b := range e.blocks {
			refs = append(refs, cache.BlockRef{Place: b.Place, CRC: b.CRC})
		}
		p.cache.Adopt(e.disk, block.NewExtentID(s.info.ID, slot), refs)
	}
}

// holesOf are a cut's unmaps of a disk, as its tree has them.
func holesOf(ch segment.DiskChange) []densetree.Entry {
	holes := make([]densetree.Entry, len(ch.Unmaps))
	for i, r := range ch.Unmaps {
		holes[i] = densetree.Entry{LBA: r.LBA, Blocks: r.Blocks, Kind: densetree.Hole}
	}
	return holes
}
