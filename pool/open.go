package pool

import (
	"context"
	"errors"
	"fmt"
	"path"
	"time"

	"github.com/google/uuid"

	"graindisk/backend"
	"graindisk/block"
	"graindisk/grains/cache"
	"graindisk/grains/segment"
	"graindisk/pool/root"
	"graindisk/tier"
	"graindisk/vdisk"
	"graindisk/vdisk/densetree"
	"graindisk/writeback"
)

// Open opens the pool on o.Targets with the tier in o.TierDir.
//
//	tier           root of the pool            result
//	--------------------------------------------------------------------------------------
//	our log        ours                        served from the log at once; claimed again later
//	our log        not to be had               the same
//	our log        another's                   refused; with Takeover, or if our log holds nothing
//	                                           unpublished and theirs is released: log set aside
//	empty          released                    claimed; maps read from the targets
//	empty          held                        refused; with Takeover claimed as of the newest cut
//	empty          none, targets all empty     created, if CreateEmpty; else refused
//	our log        none                        refused: the targets lost their roots
func Open(ctx context.Context, o Options) (*Pool, error) {
	o = o.withDefaults()
	if err := o.validate(); err != nil {
		return nil, err
	}
	p, err := open(ctx, o)
	if err != nil {
		return nil, fmt.Errorf("open pool %s: %w", o.Name, err)
	}
	return p, nil
}

func open(ctx context.Context, o Options) (*Pool, error) {
	if err := errors.Join(o.FS.MkdirAll(o.TierDir), o.FS.SyncDir(path.Dir(o.TierDir))); err != nil {
		return nil, fmt.Errorf("tier: %w", err)
	}
	id, err := writeback.ReadIdentity(o.FS, o.TierDir)
	haveLog := err == nil
	if err != nil && !errors.Is(err, writeback.ErrNoLog) {
		return nil, err
	}
	p := &Pool{
		o: o, disks: map[string]*vdisk.Disk{}, trees: map[block.DiskID]*densetree.Tree{}, nextDisk: 1,
		segments: map[block.SegmentID]segment.Info{}, sick: map[block.TargetID]time.Time{},
	}
	p.pub.disks = map[block.DiskID]segment.DiskMeta{}
	p.pub.kick = make(chan chan<- error)
	if p.reg, err = root.Open(root.Options{Targets: rootTargets(o.Targets), Log: o.Log}); err != nil {
		return nil, err
	}
	p.reader = segment.NewReader(segment.ReaderOptions{Targets: p.segmentStore, IndexCacheBytes: o.IndexBytes, Log: o.Log})

	view, err := p.readRoot(ctx, haveLog)
	if err != nil {
		return nil, err
	}
	if haveLog && view != nil && view.Val.Owner != id.Log.String() {
		if err := p.setAside(id, view); err != nil {
			return nil, err
		}
		haveLog = false
	}
	if haveLog {
		err = p.openLocal(ctx, id, view)
	} else {
		err = p.openFresh(ctx, view)
	}
	if err != nil {
		return nil, errors.Join(err, p.closeTier())
	}
	pctx, cancel := context.WithCancel(context.Background())
	p.pub.cancel, p.pub.done = cancel, make(chan struct{})
	go p.publish(pctx)
	return p, nil
}

// readRoot reads the root. With a log on the tier it gives up after RootTimeout and returns nil: the
// log alone is enough to serve. Without one it creates the pool where that is allowed.
func (p *Pool) readRoot(ctx context.Context, haveLog bool) (*root.Copy, error) {
	timeout := p.o.RootTimeout
	if !haveLog {
		timeout = max(timeout, 30*time.Second)
	}
	rctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	view, err := p.reg.Read(rctx)
	switch {
	case err == nil && (view.Quorum || !haveLog):
		return view.Best, p.mapTargets(view)
	case errors.Is(err, root.ErrNotCreated) && haveLog:
		return nil, fmt.Errorf("%w, but the tier %s holds this pool's log: were the targets emptied or swapped? restore them, or move the tier away to start anew", err, p.o.TierDir)
	case errors.Is(err, root.ErrNotCreated) && p.o.CreateEmpty:
		if err := Create(ctx, p.o); err != nil {
			return nil, err
		}
		p.o.CreateEmpty = false
		return p.readRoot(ctx, false)
	case errors.Is(err, root.ErrNotCreated):
		return nil, fmt.Errorf("%w; make one with \"gateway pool create\": %w", ErrNoPool, err)
	case haveLog && ctx.Err() == nil && (err == nil || errors.Is(err, root.ErrNoQuorum)):
		p.o.Log.Warn("root not read, serving from the log", "pool", p.o.Name, "err", err)
		return nil, nil
	}
	return nil, err
}

// mapTargets learns which configured target is which member of the pool.
func (p *Pool) mapTargets(view root.View) error {
	u, err := uuid.Parse(view.Pool)
	if err != nil {
		return fmt.Errorf("root: pool uuid %q: %w", view.Pool, err)
	}
	p.uuid = u
	p.setMembers(view.Best.Val.Cfg.Members, view.Targets)
	p.val = view.Best.Val
	return nil
}

// setMembers fills the table of stores: a member is found by the uuid in its copy of the root, or by
// its name where the copy cannot be read.
func (p *Pool) setMembers(members []root.Member, views []root.TargetView) {
	p.storesMu.Lock()
	defer p.storesMu.Unlock()
	p.stores, p.names = map[block.TargetID]backend.Store{}, map[block.TargetID]string{}
	for _, m := range members {
		p.names[m.ID] = m.Name
		for i, t := range p.o.Targets {
			known := len(views) > 0 && views[i].State == root.OK
			if known && views[i].Copy.Member == m.UUID || !known && t.Name == m.Name {
				p.stores[m.ID], p.names[m.ID] = t.Store, t.Name
			}
		}
	}
}

func (p *Pool) store(t block.TargetID) (backend.Store, bool) {
	p.storesMu.RLock()
	defer p.storesMu.RUnlock()
	s, ok := p.stores[t]
	return s, ok
}

// segmentStore is store for readers of segments.
func (p *Pool) segmentStore(t block.TargetID) (segment.Store, bool) { return p.store(t) }

// raiseEpoch notes an epoch that this log has claimed or is about to.
func (p *Pool) raiseEpoch(e uint64) {
	if e > p.epoch.Load() {
		p.epoch.Store(e)
	}
}

func (p *Pool) targetName(t block.TargetID) string {
	p.storesMu.RLock()
	defer p.storesMu.RUnlock()
	if n := p.names[t]; n != "" {
		return n
	}
	return fmt.Sprintf("#%d", t)
}

// openTier opens the slots and the log in them, and wires the cache to both.
func (p *Pool) openTier() (*writeback.Recovered, error) {
	if err := p.openSpace(); err != nil {
		return nil, err
	}
	log, rec, err := writeback.Open(p.logOptions())
	if err != nil {
		return nil, err
	}
	p.log = log
	return rec, nil
}

func (p *Pool) openSpace() error {
	was, err := tier.SlotBytesOf(p.o.FS, p.o.TierDir)
	if err != nil {
		return err
	}
	if was%block.Size == 0 && was >= slotBytesMin {
		p.o.SlotBytes = was // another tier size now would give another; the log is in slots of this
	}
	space, err := tier.Open(tier.Options{
		FS: p.o.FS, Dir: p.o.TierDir, SlotBytes: p.o.SlotBytes, Slots: max(slotsMin, int(p.o.TierBytes/p.o.SlotBytes)),
	})
	if err != nil {
		return err
	}
	p.space = space
	if p.cache, err = cache.New(space, cache.Options{Log: p.o.Log}); err != nil {
		return err
	}
	space.OnEvict(p.cache.DropSlot)
	return nil
}

// closeTier closes what openTier opened, as far as it came.
func (p *Pool) closeTier() error {
	var errs []error
	if p.cache != nil {
		p.cache.Close()
	}
	if p.log != nil {
		errs = append(errs, p.log.Close())
	}
	if p.space != nil {
		errs = append(errs, p.space.Close())
	}
	p.cache, p.log, p.space = nil, nil, nil
	return errors.Join(errs...)
}

func (p *Pool) logOptions() writeback.Options {
	return writeback.Options{Space: p.space, FS: p.o.FS, Dir: p.o.TierDir, Pool: writeback.UUID(p.uuid), Log: p.o.Log}
}

// openFresh opens the pool from the targets alone, into an empty tier. The identity of the new log is
// stable before the claim, so that a crash between the two leaves a log that the root may name.
func (p *Pool) openFresh(ctx context.Context, view *root.Copy) error {
	if err := p.openSpace(); err != nil {
		return err
	}
	log, err := writeback.Create(p.logOptions())
	if err != nil {
		return err
	}
	p.logID = log.UUID()
	if err := errors.Join(log.Close(), p.closeTier()); err != nil {
		return err
	}
	var consent *root.Consent
	if p.o.Takeover {
		consent = &root.Consent{Epoch: view.Accepted.Epoch, Owner: view.Val.Owner}
	}
	if _, err := p.openTier(); err != nil {
		return err
	}
	if err := p.claim(ctx, consent); err != nil {
		if held := new(root.HeldError); errors.As(err, &held) { // nothing was promised: an empty tier is left empty
			err = fmt.Errorf("%w; stop it there, or take the pool over as of cut %d with --takeover, which gives up what that owner acknowledged since", err, held.Cut)
			err = errors.Join(err, p.closeTier(), writeback.Discard(p.o.FS, p.o.TierDir))
		}
		return err
	}
	if err := p.loadRoot(ctx, p.value()); err != nil {
		return err
	}
	if err := p.log.DropThrough(p.pub.horizon); err != nil {
		return err
	}
	f, err := p.localCheckpoint(ctx)
	if err != nil {
		return err
	}
	return p.log.Publish(f)
}

// claim makes us the owner of the pool. The new epoch is on record in the tier before any target
// hears of it: a tier that does not know the root's epoch is an older copy of itself.
func (p *Pool) claim(ctx context.Context, consent *root.Consent) error {
	v, err := p.reg.Claim(ctx, root.ClaimOptions{
		Owner: p.logID.String(), OwnerName: p.o.Host, Consent: consent, Above: p.epoch.Load(),
		Epoch: func(b root.Ballot) error {
			p.raiseEpoch(b.Epoch)
			return p.log.AppendMeta(metaEpoch, encodeEpoch(b.Epoch))
		},
	})
	if err != nil {
		return err
	}
	p.mu.Lock()
	p.val, p.claimed = v, true
	p.mu.Unlock()
	p.pub.nextSeg = max(p.pub.nextSeg, block.SegmentID(v.SegLimit))
	p.o.Log.Info("pool claimed", "pool", p.o.Name, "epoch", p.epoch.Load(), "cut", v.Cut)
	return nil
}

// ensureClaimed claims the pool if a log that was opened without its root has not done so yet. Cuts
// that the root has and the tier does not know of are read from the targets.
func (p *Pool) ensureClaimed(ctx context.Context) error {
	if p.isClaimed() {
		return nil
	}
	for wait := backoff(0); ; wait = wait.next() {
		cctx, cancel := context.WithTimeout(ctx, time.Minute)
		err := p.reclaim(cctx)
		cancel()
		if err == nil {
			return nil
		}
		if ctx.Err() != nil || !errors.Is(err, root.ErrNoQuorum) {
			return err
		}
		p.o.Log.Warn("pool not claimed, trying again", "pool", p.o.Name, "err", err)
		if err := wait.sleep(ctx); err != nil {
			return err
		}
	}
}

// reclaim claims the pool for a log that serves already.
func (p *Pool) reclaim(ctx context.Context) error {
	view, err := p.reg.Read(ctx)
	if err != nil {
		return err
	}
	if !view.Quorum {
		return fmt.Errorf("%w: too few targets answer", root.ErrNoQuorum)
	}
	if err := p.checkAge(view.Best); err != nil {
		return err
	}
	if err := p.claim(ctx, nil); err != nil {
		return err
	}
	p.setMembers(p.value().Cfg.Members, view.Targets)
	return p.catchUp(ctx, p.value())
}

// checkAge refuses a tier that does not know of an epoch which its own log has claimed.
func (p *Pool) checkAge(c *root.Copy) error {
	if e := c.Accepted.Epoch; c.Val.Owner == p.logID.String() && e > p.epoch.Load() {
		return fmt.Errorf("%w: it knows epoch %d, the pool is at %d under the same log %s: the tier %s is an older copy of itself; move it away and open with --takeover",
			ErrForeignTier, p.epoch.Load(), e, p.logID, p.o.TierDir)
	}
	return nil
}

// setAside moves a log that is not the owner's out of the way, if that loses nothing or was asked for.
func (p *Pool) setAside(id writeback.Identity, view *root.Copy) error {
	if p.uuid != uuid.UUID(id.Pool) {
		return fmt.Errorf("%w: the tier %s belongs to pool %s, the targets to pool %s; use another tier directory",
			ErrForeignTier, p.o.TierDir, id.Pool, p.uuid)
	}
	_, err := p.openTier()
	if err == nil {
		err = p.log.DropThrough(0)
	}
	if err != nil {
		return errors.Join(err, p.closeTier())
	}
	dirty := p.log.Unpublished().Bytes
	if err := p.closeTier(); err != nil {
		return err
	}
	v := view.Val
	if dirty > 0 && !p.o.Takeover {
		return fmt.Errorf("%w: log %s with %d unpublished bytes; the pool is at epoch %d, owner %s (%s), cut %d; keep the tier %s, or set its writes aside with --takeover",
			ErrForeignTier, id.Log, dirty, view.Accepted.Epoch, v.Owner, v.OwnerName, v.Cut, p.o.TierDir)
	}
	to := path.Join(p.o.TierDir, "quarantine-"+id.Log.String())
	p.o.Log.Warn("log of an earlier owner set aside", "pool", p.o.Name, "log", id.Log, "unpublished_bytes", dirty, "in", to)
	return writeback.SetAside(p.o.FS, p.o.TierDir, to)
}
