package pool

import (
	"context"
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"

	"graindisk/backend"
	"graindisk/block"
	"graindisk/grains/cache"
	"graindisk/grains/extent"
	"graindisk/grains/fetch"
	"graindisk/grains/segment"
	"graindisk/internal/planted"
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
//	empty          held                        refused; with Takeover, if its owner gives no sign of life
//	                                           while it is watched, claimed as of the newest cut
//	empty          none, targets all empty     created, if CreateEmpty; else refused
//	our log        none                        refused: the targets lost their roots
func Open(ctx context.Context, o Options) (*Pool, error) {
	o = o.withDefaults()
	if err := o.validate(); err != nil {
		return nil, err
	}
	p, err := open(ctx, o)
	if errors.Is(err, errRootNeeded) && o.RootLook < o.RootTimeout {
		o.RootLook = o.RootTimeout
		p, err = open(ctx, o)
	}
	if err != nil {
		return nil, fmt.Errorf("open pool %s: %w", o.Name, err)
	}
	return p, nil
}

func open(ctx context.Context, o Options) (*Pool, error) {
	o.Targets = countTargets(o.Targets)
	if err := errors.Join(o.FS.MkdirAll(o.TierDir), o.FS.SyncDir(path.Dir(o.TierDir))); err != nil {
		return nil, fmt.Errorf("tier: %w", err)
	}
	if err := writeback.FinishAside(o.FS, o.TierDir, isQuarantine); err != nil {
		return nil, err
	}
	id, err := writeback.ReadIdentity(o.FS, o.TierDir)
	haveLog := err == nil
	if err != nil && !errors.Is(err, writeback.ErrNoLog) {
		return nil, err
	}
	p := newMaps(o)
	p.buffers = segment.NewBuffers(banksMax * o.SegmentBytes * 3 / 2)
	p.ops = make(chan struct{}, 1)
	p.repair.init()
	p.pulse.init(o.Watch)
	ro := root.Options{Targets: rootTargets(o.Targets), Log: o.Log}
	if haveLog {
		p.slotBytes = id.SlotBytes
		p.uuid = uuid.UUID(id.Pool)
		ro.Pool = p.uuid.String()
	}
	if p.reg, err = root.Open(ro); err != nil {
		return nil, err
	}
	p.reader = segment.NewReader(segment.ReaderOptions{
		Targets: p.segmentStore, IndexCacheBytes: o.IndexBytes, Indexes: tierIndexes{p}, Avoid: p.avoided, Log: o.Log,
		OnDegraded: p.metDamaged,
	})

	view, err := p.readRoot(ctx, haveLog)
	if err != nil {
		return nil, err
	}
	var seen *Sighting // of an owner whose tenure we may end
	var refused *OwnedError
	if view != nil && view.Val.State == root.Held && !(haveLog && view.Val.Owner == id.Log.String()) {
		c, s, err := p.consent(ctx, view)
		if err != nil && !(haveLog && errors.As(err, &refused)) {
			return nil, err
		}
		if err == nil {
			view, seen, p.val = c, s, c.Val
		}
	}
	if haveLog && view != nil && view.Val.Owner != id.Log.String() {
		unused, err := p.setAside(ctx, id, view, refused)
		if err != nil {
			return nil, err
		}
		haveLog = false
		if unused {
			p.logID = id.Log
		}
	}
	if haveLog {
		err = p.openLocal(ctx, id, view)
	} else {
		err = p.openFresh(ctx, view, seen)
	}
	if err != nil {
		return nil, errors.Join(err, p.closeTier())
	}
	p.nameDisks()
	o.warnOfRAM()
	p.warnOfWitnesses()
	p.sweepCache()
	if p.quarantines, err = readQuarantines(o.FS, o.TierDir); err != nil {
		o.Log.Warn("quarantine not listed", "pool", o.Name, "err", err)
	}
	p.tookOver(seen)
	if view == nil { // nothing could be learnt from the root: as if we had gone on running
		p.pulse.renew(p.pulse.now(), true)
	}
	pctx, cancel := context.WithCancel(context.Background())
	p.pub.cancel, p.pub.done, p.pub.local = cancel, make(chan struct{}), make(chan struct{})
	p.scrubs.init(pctx.Done())
	p.ahead.Go(func() { p.warmUp(pctx) })
	p.keepScrubbing(pctx)
	p.ahead.Go(func() { p.bringMaps(pctx) })
	if o.Beat > 0 {
		p.ahead.Go(func() { p.keepBeating(pctx) })
	}
	if o.Watch > 0 || o.Beat > 0 {
		p.ahead.Go(func() { p.keepPulse(pctx) })
	}
	go p.publish(pctx)
	go func() {
		defer close(p.pub.local)
		var repairing sync.WaitGroup
		repairing.Go(func() { p.keepRepaired(pctx) })
		p.keepLocal(pctx)
		repairing.Wait()
	}()
	return p, nil
}

// newMaps is a pool of which nothing is open, with empty maps.
func newMaps(o Options) *Pool {
	p := &Pool{
		o: o, disks: map[string]*vdisk.Disk{}, rows: map[block.DiskID]segment.DiskMeta{}, trees: map[block.DiskID]*densetree.Tree{}, nextDisk: 1,
		segments: map[block.SegmentID]segment.Info{}, sick: map[block.TargetID]sickness{}, usage: extent.NewUsage(),
	}
	p.boots.init()
	p.pub = newPublisher()
	return p
}

// errRootNeeded means that the root could not be read and the tier alone is not enough to serve.
var errRootNeeded = errors.New("the targets do not answer")

// readRoot reads the root. With a log on the tier it gives up after RootLook and returns nil if the
// targets may be away: the log alone is enough to serve. Targets that answer without a root of this pool
// are another matter: they were emptied or swapped. Without a log it creates the pool where that is allowed.
func (p *Pool) readRoot(ctx context.Context, haveLog bool) (*root.Copy, error) {
	timeout, read := p.o.RootLook, p.lookAtRoot
	if !haveLog {
		timeout, read = max(p.o.RootTimeout, 30*time.Second), p.reg.Read
	}
	rctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	view, err := read(rctx)
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	if newer := newerRoot(view); newer != nil {
		return nil, newer
	}
	if err == nil && view.Quorum {
		return view.Best, p.mapTargets(view)
	}
	count := map[root.State]int{}
	for _, t := range view.Targets {
		count[t.State]++
	}
	n := len(view.Targets)
	switch {
	case !haveLog && count[root.Missing] == n && p.o.CreateEmpty:
		if err := Create(ctx, p.o); err != nil {
			return nil, err
		}
		p.o.CreateEmpty = false
		return p.readRoot(ctx, false)
	case !haveLog && count[root.Missing] == n:
		return nil, fmt.Errorf("%w; make one with \"gateway pool create\": %w", ErrNoPool, err)
	case haveLog && count[root.Foreign] > n/2:
		return nil, fmt.Errorf("%w: the tier %s belongs to pool %s and the targets to another; use another tier directory: %w", ErrForeignTier, p.o.TierDir, p.uuid, err)
	case haveLog && count[root.OK]+count[root.Unreachable] > n/2:
		p.o.Log.Warn("root not read, serving from the log", "pool", p.o.Name, "looked", timeout, "err", err)
		return nil, nil
	case err == nil: // some copies are good, too few to trust
		err = view.Err()
	}
	return nil, fmt.Errorf("%w%s", err, p.rootAdvice(count, haveLog))
}

// lookAtRoot reads the root from a quorum, which shows whatever was committed; one target that hangs does not hold it
// up, unless its copy alone could tell which member it is.
func (p *Pool) lookAtRoot(ctx context.Context) (root.View, error) {
	view, err := p.reg.ReadQuorum(ctx)
	if err == nil && view.Quorum && !p.knowsTargets(view) {
		return p.reg.Read(ctx)
	}
	return view, err
}

// knowsTargets tells whether every target is a member of the pool by its copy of the root or, where that
// was not read, by its name. One that got another name is a member by its copy alone.
func (p *Pool) knowsTargets(view root.View) bool {
	for _, t := range view.Targets {
		named := func(m root.Member) bool { return m.Name == t.Name }
		if t.State == root.Unreachable && !slices.ContainsFunc(view.Best.Val.Cfg.Members, named) {
			return false
		}
	}
	return true
}

// rootAdvice is the next step for someone whose targets do not give a root.
func (p *Pool) rootAdvice(count map[root.State]int, haveLog bool) string {
	var s string
	if count[root.Missing]+count[root.Foreign] > 0 {
		s += "; were targets emptied or swapped? restore them"
		if haveLog {
			s += fmt.Sprintf(", or move the tier %s away to start anew", p.o.TierDir)
		}
	}
	if count[root.Unreachable] > 0 {
		s += "; check the endpoint and the credentials of those that do not answer"
	}
	return s
}

// newerRoot is the error of a target whose copy was written by a newer release; nil if there is none.
func newerRoot(v root.View) error {
	for _, t := range v.Targets {
		if t.State == root.Newer {
			return fmt.Errorf("target %s: %w", t.Name, t.Err)
		}
	}
	return nil
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
	p.roots, p.rootErrs = map[block.TargetID]root.State{}, map[block.TargetID]error{}
	for _, m := range members {
		p.names[m.ID] = m.Name
		for i, t := range p.o.Targets {
			known := len(views) > 0 && views[i].State == root.OK
			if known && views[i].Copy.Member == m.UUID || !known && t.Name == m.Name {
				p.stores[m.ID], p.names[m.ID] = t.Store, t.Name
				if len(views) > 0 {
					p.roots[m.ID], p.rootErrs[m.ID] = views[i].State, views[i].Err
				}
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

func (p *Pool) rootState(t block.TargetID) string {
	p.storesMu.RLock()
	defer p.storesMu.RUnlock()
	return string(p.roots[t])
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
	var err error
	if p.runs, err = densetree.OpenStore(densetree.StoreOptions{
		FS: p.o.FS, Dir: p.o.TierDir, Cache: densetree.NewPageCache(p.o.MapBytes),
	}); err != nil {
		return nil, err
	}
	log, rec, err := writeback.Open(p.logOptions())
	if err != nil {
		return nil, err
	}
	p.log = log
	if err := p.cache.Load(p.space.Busy); err != nil {
		p.o.Log.Warn("cache starts cold", "pool", p.o.Name, "err", err)
	}
	return rec, nil
}

func (p *Pool) openSpace() error {
	was, err := tier.SlotBytesOf(p.o.FS, p.o.TierDir)
	if err != nil {
		return err
	}
	slotBytes := p.o.SlotBytes
	switch { // another tier size now would give another; the log is in slots of this
	case p.slotBytes > 0:
		slotBytes = p.slotBytes
	case was%block.Size == 0 && was >= slotBytesMin:
		slotBytes = was
	}
	space, err := tier.Open(tier.Options{
		FS: p.o.FS, Dir: p.o.TierDir, SlotBytes: slotBytes, Slots: max(slotsMin, int(p.o.TierBytes/slotBytes)),
	})
	if err != nil {
		return err
	}
	p.space = space
	if p.cache, err = cache.New(space, cache.Options{RAMBytes: p.o.RAMBytes, IndexBytes: p.o.CacheIndexBytes, FS: p.o.FS, Dir: p.o.TierDir, Log: p.o.Log}); err != nil {
		if errors.Is(err, cache.ErrMemory) {
			err = fmt.Errorf("tier of %d bytes: %w; set a larger tier.ram, twice that, or a smaller tier.size", p.o.TierBytes, err)
		}
		return err
	}
	space.OnEvict(p.cache.DropSlot)
	space.OnTake(p.cache.MakeRoom)
	p.fetcher = fetch.New(fetch.Options{Source: p.fetchExtents, Cache: tierExtents{p.cache, p}})
	return nil
}

// closeTier closes what openTier opened, as far as it came, so that it can be opened again.
func (p *Pool) closeTier() error {
	err := p.endTier()
	p.fetcher, p.cache, p.log, p.space = nil, nil, nil, nil
	return err
}

// endTier closes it for good: what asks a pool that is closed gets answers or errors.
func (p *Pool) endTier() error {
	var errs []error
	p.endBoots()
	p.ahead.Wait()
	if p.fetcher != nil {
		p.fetcher.Close()
	}
	p.reader.Close()
	p.closeMaps()
	if p.cache != nil {
		p.cache.Close()
	}
	if p.log != nil {
		errs = append(errs, p.log.Close())
	}
	if p.space != nil {
		errs = append(errs, p.space.Close())
	}
	return errors.Join(errs...)
}

func (p *Pool) logOptions() writeback.Options {
	return writeback.Options{Space: p.space, FS: p.o.FS, Dir: p.o.TierDir, Pool: writeback.UUID(p.uuid), Log: p.o.Log,
		MaxExposure: p.o.MaxExposure, MaxExposureAge: p.o.MaxExposureAge}
}

// openFresh opens the pool from the targets alone, into an empty tier, or into one whose log was made
// for that before and never used. The identity of the log is stable before the claim, so that a crash
// between the two, or a claim whose outcome is unknown, leaves a log that the root may name. seen is the owner whose
// tenure it may end; nil if nobody held the pool.
func (p *Pool) openFresh(ctx context.Context, view *root.Copy, seen *Sighting) error {
	var consent *root.Consent
	if seen != nil {
		consent = &root.Consent{Epoch: seen.Epoch, Owner: seen.Log}
	}
	if err := p.refuseNewer(ctx, view.Val); err != nil {
		return err
	}
	if p.logID == (writeback.UUID{}) {
		if err := p.createLog(); err != nil {
			return err
		}
	}
	if _, err := p.openTier(); err != nil {
		return err
	}
	if err := p.claim(ctx, root.ClaimOptions{Consent: consent}); err != nil {
		return withTakeover(err)
	}
	v := p.value()
	if planted.Bug("root: maps of a copy that was never committed") {
		v = view.Val
	}
	if err := p.loadRoot(ctx, v); err != nil {
		return err
	}
	if err := p.log.DropThrough(p.pub.horizon); err != nil {
		return err
	}
	p.runs.RemoveOrphans()
	return p.settle(ctx)
}

// createLog makes a new, empty log on the tier.
func (p *Pool) createLog() error {
	if err := p.openSpace(); err != nil {
		return err
	}
	log, err := writeback.Create(p.logOptions())
	if err != nil {
		return err
	}
	p.logID, p.slotBytes = log.UUID(), p.space.SlotBytes()
	return errors.Join(log.Close(), p.closeTier())
}

// withTakeover adds the next step to a refusal.
func withTakeover(err error) error {
	if held := new(root.HeldError); errors.As(err, &held) {
		return fmt.Errorf("%w; stop it there, or take the pool over as of cut %d with --takeover, which gives up what that owner acknowledged since", err, held.Cut)
	}
	return err
}

// claim makes us the owner of the pool. The new epoch is on record in the tier before any target
// hears of it: a tier that does not know the root's epoch is an older copy of itself.
func (p *Pool) claim(ctx context.Context, o root.ClaimOptions) error {
	o.Owner, o.OwnerName, o.Above = p.logID.String(), p.o.Host, p.epoch.Load()
	o.Epoch = func(b root.Ballot) error {
		p.mapsMu.Lock()
		defer p.mapsMu.Unlock()
		p.raiseEpoch(b.Epoch)
		p.firstEpoch.CompareAndSwap(0, b.Epoch)
		p.mu.Lock()
		p.val.State = root.Held // claimed, or as good as: replaying the record says so too
		p.mu.Unlock()
		if planted.Bug("claim: epoch not on record") {
			return nil
		}
		return p.log.AppendMeta(metaEpoch, encodeEpoch(b.Epoch))
	}
	at := p.pulse.now()
	v, err := p.reg.Claim(ctx, o)
	if err != nil {
		return err
	}
	p.pulse.renew(at, true)
	p.mu.Lock()
	p.val = v
	p.mu.Unlock()
	p.noteClaim()
	p.pub.nextSeg = max(p.pub.nextSeg, block.SegmentID(v.SegLimit))
	isThin := len(v.Checkpoints) > 0 && thin(len(v.Checkpoints[0].Targets), v)
	if v.Cfg.No > 1 || isThin {
		p.repair.weak.Store(true) // it may have been left so
	}
	if isThin {
		p.repair.thin.Store(true)
	}
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
		if ctx.Err() != nil || final(err) {
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
	view, err := p.lookAtRoot(ctx)
	if err != nil {
		return err
	}
	if err := errors.Join(newerRoot(view), view.Err()); err != nil {
		return err
	}
	if err := p.checkAge(view.Best); err != nil {
		return err
	}
	if err := p.claim(ctx, root.ClaimOptions{Own: true}); err != nil {
		return err
	}
	p.setMembers(p.value().Cfg.Members, view.Targets)
	if err := p.catchUp(ctx, p.value(), true); err != nil {
		return err
	}
	p.mu.Lock()
	p.claimed = true
	p.mu.Unlock()
	return nil
}

// checkAge refuses a tier that does not know of an epoch which its own log has claimed.
func (p *Pool) checkAge(c *root.Copy) error {
	if e := c.Accepted.Epoch; c.Val.Owner == p.logID.String() && e > p.epoch.Load() {
		return fmt.Errorf("%w: it knows epoch %d, the pool is at %d under the same log %s: the tier %s is an older copy of itself; move it away and open with --takeover",
			ErrForeignTier, p.epoch.Load(), e, p.logID, p.o.TierDir)
	}
	return nil
}

// quarantine begins the name of the folder that holds a log which lost its pool.
const quarantine = "quarantine-"

func isQuarantine(name string) bool { return strings.HasPrefix(name, quarantine) }

// setAside moves a log that is not the owner's out of the way: if it holds nothing unpublished and the
// pool is released, or if that was asked for. A log that was never used stays, and unused is true: a
// claim of its own may still be under way, so another log would find the pool held by it. refused, if not nil,
// says why the pool cannot be had. What the log holds unpublished is listed before it moves; see lost.go.
func (p *Pool) setAside(ctx context.Context, id writeback.Identity, c *root.Copy, refused *OwnedError) (unused bool, err error) {
	v := c.Val
	p.logID = id.Log
	rec, err := p.openTier()
	if err == nil {
		_, err = p.replay(rec)
	}
	if err == nil {
		err = p.log.DropThrough(p.pub.horizon)
	}
	if err != nil {
		return false, errors.Join(err, p.closeTier())
	}
	dirty := p.log.Unpublished()
	goes := refused == nil && (p.o.Takeover || v.State == root.Released && dirty.Oldest.IsZero())
	if goes && !dirty.Oldest.IsZero() {
		if err := p.listAside(ctx, rec, c); err != nil {
			return false, errors.Join(err, p.closeTier())
		}
	}
	if err := p.closeTier(); err != nil {
		return false, err
	}
	p.val = v
	p.forget()
	if len(rec.State) == 0 && rec.End == 0 && dirty.Oldest.IsZero() {
		if refused != nil {
			return true, refused
		}
		return true, nil
	}
	p.epoch.Store(0)
	p.logID = writeback.UUID{}
	if refused != nil {
		return false, fmt.Errorf("%w: the tier %s holds log %s with %d unpublished bytes, which a takeover would set aside; the pool is %w", ErrForeignTier, p.o.TierDir, id.Log, dirty.Bytes, refused)
	}
	if !goes {
		return false, fmt.Errorf("%w: the tier %s holds log %s with %d unpublished bytes; the pool is %s, at epoch %d and cut %d, by log %s on %s; keep this tier if those bytes matter, or set it aside and take the pool over with --takeover",
			ErrForeignTier, p.o.TierDir, id.Log, dirty.Bytes, v.State, c.Accepted.Epoch, v.Cut, v.Owner, v.OwnerName)
	}
	to := path.Join(p.o.TierDir, quarantine+id.Log.String())
	p.o.Log.Warn("log of an earlier owner set aside", "pool", p.o.Name, "log", id.Log, "unpublished_bytes", dirty.Bytes, "in", to)
	p.slotBytes = 0
	return false, writeback.SetAside(p.o.FS, p.o.TierDir, to)
}
