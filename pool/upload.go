package pool

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"graindisk/backend"
	"graindisk/block"
	"graindisk/grains/segment"
	"graindisk/internal/planted"
	"graindisk/writeback"
)

const (
	smallBytes  = 1 << 20          // a segment of less payload is 1+m: no parity to gain
	putAttempts = 4                // per shard, before its target is passed over
	putTimeout  = 30 * time.Second // per attempt; a target that lets one run out is passed over at once
	sickTimeMin = 30 * time.Second // how long a target that failed is passed over; doubles while it fails
	sickTimeMax = 8 * time.Minute
)

// storedSegment is a segment on its targets, with the plan it was packed from.
type storedSegment struct {
	plan   []extentPlan
	sealed *segment.Sealed
}

func indexes(ss []*storedSegment) []*segment.Index {
	xs := make([]*segment.Index, len(ss))
	for i, s := range ss {
		xs[i] = s.sealed.Index
	}
	return xs
}

// storeSegment packs a bank and stores its shards, with the cut's record if rec is not nil. A target
// that fails is passed over, and the bank is packed again under a new number for those that live;
// with fewer than m+1 of those it waits. seq is the cut's horizon, the newest a write in it can be. It fails only when ctx ends or the log cannot be read.
func (p *Pool) storeSegment(ctx context.Context, plan []extentPlan, seq writeback.Seq, cut uint64, rec *segment.CutRecord) (*storedSegment, error) {
	var payload int64
	for _, e := range plan {
		payload += int64(len(e.blocks)) * block.Size
	}
	for wait := backoff(0); ; wait = wait.next() {
		k, m, targets := p.placement(payload)
		if targets == nil {
			p.o.Log.Warn("too few targets to publish, waiting", "pool", p.o.Name, "need", p.value().Stripe.Parity+1)
			if err := wait.sleep(ctx); err != nil {
				return nil, err
			}
			continue
		}
		id, err := p.segmentNumber(ctx)
		if err != nil {
			return nil, err
		}
		sealed, err := p.pack(plan, seq, rec, segment.BuildOptions{
			Pool: p.uuid, ID: id, Epoch: p.epoch.Load(), K: k, M: m, Cut: cut, PayloadBytes: payload, ExtentBytesMax: GrainBytes,
		}, rotate(targets, int(id)))
		if err != nil {
			return nil, err
		}
		err = p.putShards(ctx, sealed)
		if err == nil || planted.Bug("segment: a failed shard counts as stored") {
			sealed.Shards = nil // a cut may have far more of them than memory
			return &storedSegment{plan, sealed}, nil
		}
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		p.o.Log.Warn("segment not stored, packing it again", "pool", p.o.Name, "segment", id, "err", err)
		if err := wait.sleep(ctx); err != nil {
			return nil, err
		}
	}
}

// pack reads a bank's blocks back from the log and seals them. Every block is checked on the way.
func (p *Pool) pack(plan []extentPlan, seq writeback.Seq, rec *segment.CutRecord, o segment.BuildOptions, targets []block.TargetID) (*segment.Sealed, error) {
	b, err := segment.NewBuilder(o)
	if err != nil {
		return nil, err
	}
	var found [grainBlocks]writeback.Found
	for _, e := range plan {
		dst, err := b.Add(e.disk, e.blocks[0].LBA, len(e.blocks), uint64(seq))
		if err != nil {
			return nil, err
		}
		for i, at := range e.blocks {
			found[i] = writeback.Found{State: writeback.Present, CRC: at.CRC, Place: at.Place}
		}
		if err := p.log.ReadBlocks(e.disk, e.blocks[0].LBA, found[:len(e.blocks)], dst); err != nil {
			return nil, err
		}
	}
	return b.Seal(rec, targets[:int(o.K)+int(o.M)])
}

// segmentNumber is the next number, made usable by a root commit if need be.
func (p *Pool) segmentNumber(ctx context.Context) (block.SegmentID, error) {
	select {
	case p.segTurn <- struct{}{}:
	case <-ctx.Done():
		return 0, ctx.Err()
	}
	defer func() { <-p.segTurn }()
	v := p.value()
	if uint64(p.pub.nextSeg) >= v.SegLimit {
		v.SegLimit = uint64(p.pub.nextSeg) + segReserve
		if err := p.commit(ctx, v); err != nil {
			return 0, err
		}
	}
	id := p.pub.nextSeg
	p.pub.nextSeg++
	return id, nil
}

// placement chooses the profile and the targets, in order of their number, for a segment: the pool's
// own, 1+m for a small one, or the widest that the live targets allow while no target holds more than
// its share. With fewer than m+1 live it falls back on those that failed; it returns no targets if fewer
// than m+1 are configured at all.
func (p *Pool) placement(payload int64) (k, m uint8, targets []block.TargetID) {
	p.mu.Lock()
	defer p.mu.Unlock()
	var live, there []block.TargetID
	all := 0
	for _, mem := range p.val.Cfg.Members {
		if mem.Witness {
			continue
		}
		all++
		if _, ok := p.store(mem.ID); !ok {
			continue
		}
		there = append(there, mem.ID)
		if !p.avoidedLocked(mem.ID) {
			live = append(live, mem.ID)
		}
	}
	K, M := p.val.Stripe.Data, p.val.Stripe.Parity
	least := min(M+1, all)
	if len(live) < least {
		live = there // nothing is gained by sparing those that failed: they are asked until they answer
	}
	if len(live) < least {
		return 0, 0, nil
	}
	each := (K + M + all - 1) / all // shards of one stripe on one target
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

// rotate turns the list of targets by n, so that parity and small segments spread evenly.
func rotate(ts []block.TargetID, n int) []block.TargetID {
	out := make([]block.TargetID, len(ts))
	for i := range ts {
		out[i] = ts[(i+n)%len(ts)]
	}
	return out
}

// putShards stores all shards at the same time. Targets that fail are passed over from now on.
func (p *Pool) putShards(ctx context.Context, s *segment.Sealed) error {
	errs := make([]error, len(s.Shards))
	var wg sync.WaitGroup
	for i, t := range s.Info.Targets {
		wg.Go(func() {
			store, _ := p.store(t)
			errs[i] = p.judge(ctx, t, putShard(ctx, store, s.Info.Key(i), s.Shards[i]))
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

// sickness is how long a target is passed over because it failed.
type sickness struct {
	until time.Time
	time  time.Duration // this time
}

// judge notes how a target did, and names it in the error.
func (p *Pool) judge(ctx context.Context, t block.TargetID, err error) error {
	if err == nil || ctx.Err() != nil {
		if err == nil {
			p.mu.Lock()
			delete(p.sick, t)
			p.mu.Unlock()
		}
		return err
	}
	p.mu.Lock()
	s := sickness{time: min(max(2*p.sick[t].time, sickTimeMin), sickTimeMax)}
	s.until = time.Now().Add(s.time)
	p.sick[t] = s
	p.mu.Unlock()
	return fmt.Errorf("target %s: %w", p.targetName(t), err)
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
