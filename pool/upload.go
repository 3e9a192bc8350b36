package pool

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"graindisk/backend"
	"graindisk/block"
	"graindisk/grains/segment"
	"graindisk/internal/planted"
	"graindisk/pool/root"
)

const (
	smallBytes  = 1 << 20          // a segment of less payload is 1+m: no parity to gain
	putAttempts = 4                // per shard, before its target is passed over
	putTimeout  = 30 * time.Second // per attempt; a target that lets one run out is passed over at once
	sickTimeMin = 30 * time.Second // how long a target that failed is passed over; doubles while it fails
	sickTimeMax = 8 * time.Minute
	lostAfter   = 30 * time.Second // how long a target must have failed before stripes are stored weaker for it. [tune]
)

// storedSegment is a segment on its targets, with the plan it was packed from.
type storedSegment struct {
	plan  []extentPlan
	info  segment.Info // without the targets that lack their shard
	index *segment.Index
}

func indexes(ss []*storedSegment) []*segment.Index {
	xs := make([]*segment.Index, len(ss))
	for i, s := range ss {
		xs[i] = s.index
	}
	return xs
}

// storeBank seals a bank, with the cut's record if rec is not nil, and stores its shards; it gives the
// bank's token and memory back. A target that fails is passed over from then on. If what was stored
// survives the loss of any one target all the same, that is enough; else the bank is filled again under a
// new number, for those that live. It fails only when ctx ends, another owner has claimed the pool, or the
// log cannot be read.
func (p *Pool) storeBank(ctx context.Context, b *bank, rec *segment.CutRecord) (storedSegment, error) {
	defer func() { p.dropBank(b) }()
	for wait := backoff(0); ; wait = wait.next() {
		if rec != nil {
			rec.Epoch = b.epoch
		}
		sealed, err := b.builder.Seal(rec, b.targets)
		if err != nil {
			return storedSegment{}, err
		}
		info, err := p.putShards(ctx, sealed)
		// Nobody may still be sending from memory that is used again.
		whole := err == nil && !slices.Contains(info.Targets, 0)
		if err == nil {
			err = sealed.Verify()
		}
		sealed.Release(whole)
		if err == nil {
			return storedSegment{b.plan, info, sealed.Index}, nil
		}
		if ctx.Err() != nil {
			return storedSegment{}, ctx.Err()
		}
		p.o.Log.Warn("segment not stored, packing it again", "pool", p.o.Name, "segment", b.id, "err", err)
		if err := wait.sleep(ctx); err != nil {
			return storedSegment{}, err
		}
		p.uploadFailed(sealed.Info) // its number is not used again
		next, err := p.refill(ctx, b)
		if next != nil {
			b = next
		}
		if err != nil {
			return storedSegment{}, err
		}
	}
}

// segmentNumber is the next number, made usable by a root commit if need be.
func (p *Pool) segmentNumber(ctx context.Context) (block.SegmentID, error) {
	for {
		p.segMu.Lock()
		id := p.pub.nextSeg
		if uint64(id) < p.value().SegLimit {
			p.pub.nextSeg++
			p.segMu.Unlock()
			return id, nil
		}
		p.segMu.Unlock()
		err := p.update(ctx, func(v *root.Value) { v.SegLimit = max(v.SegLimit, uint64(id)+segReserve) })
		if err != nil {
			return 0, err
		}
	}
}

// placement chooses the profile and the targets, in order of their number, for a segment: the pool's
// own, 1+m for a small one, or the widest that the live targets allow while no target holds more than
// its share. It takes so many that their shares hold 1+m shards. If fewer are live it falls back on those that failed, but
// not on those that have for lostAfter: as many as the profile survives may be lost, and where that leaves no room for 1+m
// (1+1 on two targets) the segment is stored with what room there is, its other targets being 0, and repaired later. It returns
// no targets if there are fewer than that.
func (p *Pool) placement(payload int64) (k, m uint8, targets []block.TargetID) {
	p.mu.Lock()
	defer p.mu.Unlock()
	var live, there, kept []block.TargetID // not avoided; configured; of these not lost
	all := dataMembers(p.val.Cfg)
	for _, t := range all {
		if _, ok := p.store(t); !ok {
			continue
		}
		there = append(there, t)
		if !p.avoidedLocked(t) {
			live = append(live, t)
		}
		if s, sick := p.sick[t]; !sick || time.Since(s.since) < p.o.lostAfter {
			kept = append(kept, t)
		}
	}
	K, M, each := p.val.Stripe.Data, p.val.Stripe.Parity, shardsOnEach(p.val.Stripe, len(all))
	least := (M + each) / each // of these each holds its share of M+1 shards
	lost := len(all) - len(kept)
	switch {
	case len(live) >= least:
	case len(kept) > 0 && len(kept) < least && lost <= M/each:
		for range each {
			targets = append(targets, kept...)
		}
		return 1, uint8(M), append(targets, make([]block.TargetID, 1+M-len(targets))...)
	case len(there) >= least:
		live = there // nothing is gained by sparing those that failed: they are asked until they answer
	default:
		return 0, 0, nil
	}
	K = min(K, each*len(live)-M)
	if payload < smallBytes || K < 1 {
		K = 1
	}
	for len(targets) < K+M {
		targets = append(targets, live...)
	}
	return uint8(K), uint8(M), targets
}

// avoidedLocked tells whether a target failed a moment ago.
func (p *Pool) avoidedLocked(t block.TargetID) bool { return time.Now().Before(p.sick[t].until) }

// avoided is avoidedLocked for those who do not hold the lock.
func (p *Pool) avoided(t block.TargetID) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.avoidedLocked(t)
}

// rotate turns the list of targets by n, so that parity and small segments spread evenly. Zeroes stay at the end, where
// parity is.
func rotate(ts []block.TargetID, n int) []block.TargetID {
	out := make([]block.TargetID, len(ts))
	named := len(ts)
	if i := slices.Index(ts, 0); i >= 0 {
		named = i
	}
	for i := range named {
		out[i] = ts[(i+n)%named]
	}
	return out
}

// putShards stores all shards at the same time, making way for reads. It returns where they are: a shard
// that its target did not take is missing, if what is left survives the loss of any one target; and so is one that was
// planned for none.
func (p *Pool) putShards(ctx context.Context, s *segment.Sealed) (segment.Info, error) {
	info := s.Info
	info.Targets = slices.Clone(info.Targets)
	errs := make([]error, len(s.Shards))
	begin := time.Now()
	var wg sync.WaitGroup
	for i, t := range s.Info.Targets {
		if !p.log.Pressure().Waiting {
			p.foreground.yield(ctx, yieldMax-time.Since(begin))
		}
		if t == 0 {
			continue
		}
		wg.Go(func() {
			store, ok := p.store(t)
			if !ok { // replaced since the bank was filled
				errs[i] = fmt.Errorf("target %s: %w", p.targetName(t), ErrNoTarget)
				return
			}
			errs[i] = p.judge(ctx, t, putShard(ctx, store, s.Info.Key(i), s.Shards[i]))
		})
	}
	wg.Wait()
	for i, err := range errs {
		if err != nil && !planted.Bug("segment: a failed shard counts as stored") {
			info.Targets[i] = 0
		}
	}
	err := errors.Join(errs...)
	if err != nil && (ctx.Err() != nil || !strong(info)) {
		return info, err
	}
	if slices.Contains(info.Targets, 0) {
		p.o.Log.Warn("segment stored without some of its shards", "pool", p.o.Name, "segment", uint64(info.ID), "targets", info.Targets, "err", err)
	}
	return info, nil
}

// strong tells whether a segment survives the loss of any one target that has shards of it.
func strong(i segment.Info) bool {
	stored, most := 0, 0
	on := map[block.TargetID]int{}
	for _, t := range i.Targets {
		if t != 0 {
			stored++
			on[t]++
			most = max(most, on[t])
		}
	}
	return stored-most >= int(i.K)
}

// sickness is how long a target is passed over because it failed.
type sickness struct {
	until time.Time
	time  time.Duration // this time
	since time.Time     // nothing it was asked for came to a good end since
}

// judge notes how a target did, and names it in the error.
func (p *Pool) judge(ctx context.Context, t block.TargetID, err error) error {
	if err == nil || ctx.Err() != nil {
		if err == nil {
			p.recovered(t)
		}
		return err
	}
	p.mu.Lock()
	s := sickness{time: min(max(2*p.sick[t].time, sickTimeMin), sickTimeMax), since: p.sick[t].since}
	s.until = time.Now().Add(s.time)
	if s.since.IsZero() {
		s.since = time.Now()
	}
	p.sick[t] = s
	p.mu.Unlock()
	return fmt.Errorf("target %s: %w", p.targetName(t), err)
}

// recovered notes that a target does what it is asked for. If it did not before, what was stored with fewer copies
// meanwhile is worth a look.
func (p *Pool) recovered(t block.TargetID) {
	p.mu.Lock()
	_, was := p.sick[t]
	delete(p.sick, t)
	p.mu.Unlock()
	if was && p.repair.thin.Swap(false) {
		p.repair.weak.Store(true)
		p.repair.nudge()
	}
}

// putShard stores one object under a name that nobody else uses. Finding the name taken may be the
// echo of our own attempt whose reply was lost: then what is there is what we sent.
func putShard(ctx context.Context, store backend.Store, key string, body []byte) error {
	var err error
	wait := backoff(0)
	for attempt := range putAttempts {
		actx, cancel := context.WithTimeout(ctx, putTimeout)
		_, err = store.Put(actx, key, body, backend.Cond{Absent: true})
		if errors.Is(err, backend.ErrPrecondition) {
			var have []byte
			if have, _, err = store.Get(actx, key, int64(len(body))); err == nil && !bytes.Equal(have, body) {
				cancel()
				return fmt.Errorf("%s holds other bytes: %w", key, backend.ErrPrecondition)
			}
		}
		ranOut := actx.Err() != nil
		cancel()
		if err == nil {
			return nil
		}
		if c := backend.ClassOf(err); ranOut || c != backend.Transient && c != backend.Throttled {
			return err
		}
		if attempt == putAttempts-1 {
			break
		}
		if wait.sleep(ctx) != nil {
			return ctx.Err()
		}
		wait = wait.next()
	}
	return err
}

// backoff is a wait that doubles up to five seconds, with jitter.
type backoff time.Duration

func (b backoff) next() backoff {
	return min(max(b, backoff(50*time.Millisecond))*2, backoff(5*time.Second))
}

// jitter draws from [0, d). Tests whose seed decides everything replace it.
var jitter = rand.N[time.Duration]

// sleep waits, or fails with ctx's error.
func (b backoff) sleep(ctx context.Context) error {
	d := time.Duration(max(b, backoff(50*time.Millisecond)))
	t := time.NewTimer(d/2 + jitter(d))
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return nil
	}
}
