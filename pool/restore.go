package pool

import (
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"graindisk/backend"
	"graindisk/block"
	"graindisk/grains/segment"
	"graindisk/writeback"
)

// A shard that was lost, damaged or never stored is made anew from k others and stored under its own name,
// which no other bytes ever had. Where it goes to another target than the segment's row says, the row changes:
//
//	k others read, each checked ─► shard rebuilt and checked ─► stored ─► read back, compared
//	     ─► placement record stable in the metadata log ─► segment table and usage table ─► readers
//	     ─► a published checkpoint holds the row
//
// Until the last step a fresh host looks for the shard where it was, so the segment still counts as below
// strength: see repairer.unpublished. A crash before the record leaves an object that the next attempt finds
// under its name, with the same bytes. If that goes elsewhere, or if the host with the record is lost before the last step, the
// object is a stray: no row has it. It is never read, fsck counts it, and it is deleted with its segment.

// metaPlacement is the kind of the metadata record that says where the shards of a segment are from here on:
//
//	u64 segment | u64 epoch | u8 shards, then for each: u16 target, 0 = not stored
//
// A record of a segment that the table has not got says nothing: the segment was deleted since.
const metaPlacement uint8 = 24

type placement struct {
	id      block.SegmentID
	epoch   uint64
	targets []block.TargetID // as many as the segment has shards
}

func (pl placement) encode() []byte {
	b := binary.LittleEndian.AppendUint64(nil, uint64(pl.id))
	b = binary.LittleEndian.AppendUint64(b, pl.epoch)
	b = append(b, uint8(len(pl.targets)))
	for _, t := range pl.targets {
		b = binary.LittleEndian.AppendUint16(b, uint16(t))
	}
	return b
}

const placementHeadLen = 17

func decodePlacement(b []byte) (placement, error) {
	if len(b) < placementHeadLen || b[16] == 0 || int(b[16]) > segment.KMax+segment.MMax || len(b) != placementHeadLen+2*int(b[16]) {
		return placement{}, fmt.Errorf("placement record of %d bytes: %w", len(b), writeback.ErrDamaged)
	}
	pl := placement{id: block.SegmentID(binary.LittleEndian.Uint64(b)), epoch: binary.LittleEndian.Uint64(b[8:])}
	for t := b[placementHeadLen:]; len(t) > 0; t = t[2:] {
		pl.targets = append(pl.targets, block.TargetID(binary.LittleEndian.Uint16(t)))
	}
	return pl, nil
}

// errGone means that a segment was deleted while a shard of it was being restored.
var errGone = errors.New("segment is gone")

// segmentInfo is the row of a segment, as of the last repair.
func (p *Pool) segmentInfo(id block.SegmentID) (segment.Info, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	info, ok := p.segments[id]
	return info, ok
}

// restoreShard makes one shard of a segment anew from k intact others and stores it on target to, under its own
// name; the object found there may have other bytes only if it is known to be damaged, and is then replaced. What
// was stored is read back and compared. If to is not where the segment's row has the shard, the row is changed, on
// record first. Errors match segment.ErrDamaged if it is proven that too few others are intact, errGone, and what
// the stores said; nothing but an object may have changed then. At most restoresMax run at a time, the others
// wait; each has the bytes of k+1 shards in memory. One that is stored lets the next begin while it is read back, with
// the bytes of two.
func (p *Pool) restoreShard(ctx context.Context, info segment.Info, shard int, to block.TargetID, damaged bool) error {
	select {
	case p.repair.slots <- struct{}{}:
	case <-ctx.Done():
		return ctx.Err()
	}
	free := sync.OnceFunc(func() { <-p.repair.slots })
	defer free()
	if now, ok := p.segmentInfo(info.ID); !ok || now.Epoch != info.Epoch || shard < 0 || shard >= now.Shards() {
		return fmt.Errorf("restore shard %d of segment %d: %w", shard, info.ID, errGone)
	} else {
		info = now
	}
	err := p.restore(ctx, info, shard, to, damaged, free)
	if err == nil {
		if err = p.placeShard(info, shard, to); errors.Is(err, errGone) {
			p.dropRestored(info, shard, to)
		}
	}
	if err != nil {
		return fmt.Errorf("restore shard %d of segment %d: %w", shard, info.ID, err)
	}
	return nil
}

// dropRestored has the object deleted that was stored for a segment which went meanwhile. What its row had there goes
// with it, if it has not gone already; else no checkpoint ever had it.
func (p *Pool) dropRestored(info segment.Info, shard int, to block.TargetID) {
	if info.Targets[shard] != to || !p.known(info.ID, info.Epoch) {
		p.doomKeys(to, []string{info.Key(shard)})
	}
}

// restoresMax is how many shards are restored at a time, and as many are read back; restoreTimeout is for one transfer of one.
const (
	restoresMax    = 2
	restoreTimeout = 2 * time.Minute
)

// restore is restoreShard but for the tables; it calls stored once the shard is.
func (p *Pool) restore(ctx context.Context, info segment.Info, shard int, to block.TargetID, damaged bool, stored func()) error {
	store, ok := p.store(to)
	if !ok {
		return fmt.Errorf("target %s is not configured", p.targetName(to))
	}
	others, err := p.intactShards(ctx, info, shard)
	if err != nil {
		return err
	}
	body, err := segment.RebuildShard(others, shard)
	if err != nil {
		return err
	}
	p.foreground.yield(ctx, yieldMax)
	key := info.Key(shard)
	if damaged {
		err = replaceShard(ctx, store, key, body)
	} else {
		err = putShard(ctx, store, key, body)
	}
	stored()
	if err == nil {
		p.foreground.yield(ctx, yieldMax)
		err = isStored(ctx, store, key, body)
	}
	return p.judge(ctx, to, err)
}

// intactShards reads k whole shards beside the one given and checks them; each that fails is made up for by
// another. The result is by shard number.
func (p *Pool) intactShards(ctx context.Context, info segment.Info, but int) ([][]byte, error) {
	var rest []int
	for s, t := range info.Targets {
		if _, ok := p.store(t); ok && s != but {
			rest = append(rest, s)
		}
	}
	slices.SortStableFunc(rest, func(a, b int) int { // those that failed lately last
		late := func(s int) int {
			if p.avoided(info.Targets[s]) {
				return 1
			}
			return 0
		}
		return cmp.Compare(late(a), late(b))
	})
	objects, have := make([][]byte, info.Shards()), 0
	var proven, passing []error
	for have < int(info.K) {
		n := int(info.K) - have
		if n > len(rest) {
			if len(passing) > 0 {
				return nil, fmt.Errorf("%d of %d others could be read: %w", have, info.K, errors.Join(passing...))
			}
			return nil, fmt.Errorf("%d of %d others are intact: %w: %w", have, info.K, segment.ErrDamaged, errors.Join(proven...))
		}
		errs := make([]error, n)
		var wg sync.WaitGroup
		for i, s := range rest[:n] {
			p.foreground.yield(ctx, yieldMax)
			wg.Go(func() { objects[s], errs[i] = p.wholeShard(ctx, info, s) })
		}
		wg.Wait()
		for _, err := range errs {
			switch {
			case err == nil:
				have++
			case errors.Is(err, segment.ErrDamaged), errors.Is(err, backend.ErrNotFound):
				proven = append(proven, err)
			default:
				passing = append(passing, err)
			}
		}
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		rest = rest[n:]
	}
	return objects, nil
}

// damageReads is how many times a shard is read before it counts as damaged: bytes may be hurt on their way.
const damageReads = 3

// wholeShard reads one shard and checks every byte of it, and that it is the one asked for.
func (p *Pool) wholeShard(ctx context.Context, info segment.Info, shard int) (b []byte, err error) {
	for range damageReads {
		if b, err = p.readShardOnce(ctx, info, shard); !errors.Is(err, segment.ErrDamaged) {
			break
		}
	}
	return b, err
}

func (p *Pool) readShardOnce(ctx context.Context, info segment.Info, shard int) ([]byte, error) {
	t := info.Targets[shard]
	store, ok := p.store(t)
	if !ok {
		return nil, fmt.Errorf("target %s: %w", p.targetName(t), ErrNoTarget)
	}
	gctx, cancel := context.WithTimeout(ctx, restoreTimeout)
	defer cancel()
	b := make([]byte, info.ObjectBytes())
	err := store.ReadAt(gctx, info.Key(shard), b, 0)
	if errors.Is(err, backend.ErrShort) {
		err = fmt.Errorf("%w: %w", segment.ErrDamaged, err)
	}
	var s *segment.Shard
	if err == nil {
		s, err = segment.OpenShard(b)
	}
	if err == nil && (s.Trailer.Info.ID != info.ID || s.Trailer.Info.Epoch != info.Epoch || int(s.Trailer.Shard) != shard || s.Trailer.Pool != p.uuid) {
		err = fmt.Errorf("is shard %d of segment %d of epoch %d: %w", s.Trailer.Shard, s.Trailer.Info.ID, s.Trailer.Info.Epoch, segment.ErrDamaged)
	}
	if err != nil {
		return nil, fmt.Errorf("shard %d on target %s: %w", shard, p.targetName(t), err)
	}
	return b, nil
}

// replaceShard stores body under a name that may hold damaged bytes of the same object. The condition is
// what was seen there a moment ago, so that an object that somebody deletes meanwhile does not come back.
func replaceShard(ctx context.Context, store backend.Store, key string, body []byte) (err error) {
	wait := backoff(0)
	for range putAttempts {
		actx, cancel := context.WithTimeout(ctx, restoreTimeout)
		cond := backend.Cond{Absent: true}
		var have backend.Info
		if have, err = store.Stat(actx, key); err == nil {
			cond = backend.Cond{Match: have.ETag}
		}
		if err == nil || errors.Is(err, backend.ErrNotFound) {
			_, err = store.Put(actx, key, body, cond)
		}
		cancel()
		if err == nil {
			return nil
		}
		if c := backend.ClassOf(err); c != backend.Transient && c != backend.Throttled && c != backend.Precondition && c != backend.NotFound {
			return err
		}
		if wait.sleep(ctx) != nil {
			return ctx.Err()
		}
		wait = wait.next()
	}
	return err
}

// isStored reads an object back and compares it.
func isStored(ctx context.Context, store backend.Store, key string, body []byte) (err error) {
	wait := backoff(0)
	for range putAttempts {
		gctx, cancel := context.WithTimeout(ctx, restoreTimeout)
		var have []byte
		have, _, err = store.Get(gctx, key, int64(len(body)))
		cancel()
		if err == nil && !bytes.Equal(have, body) {
			err = fmt.Errorf("%s was stored and reads back as other bytes: %w", key, segment.ErrDamaged)
		}
		if c := backend.ClassOf(err); err == nil || c != backend.Transient && c != backend.Throttled {
			return err
		}
		if wait.sleep(ctx) != nil {
			return ctx.Err()
		}
		wait = wait.next()
	}
	return err
}

// placeShard makes it known that a shard is on target to: on record first, then to all who read.
func (p *Pool) placeShard(info segment.Info, shard int, to block.TargetID) error {
	p.mapsMu.Lock()
	defer p.mapsMu.Unlock()
	now, ok := p.segmentInfo(info.ID)
	switch {
	case !ok || now.Epoch != info.Epoch:
		return errGone
	case now.Targets[shard] == to:
		return nil
	}
	pl := placement{id: info.ID, epoch: info.Epoch, targets: slices.Clone(now.Targets)}
	pl.targets[shard] = to
	if err := p.log.AppendMeta(metaPlacement, pl.encode()); err != nil {
		return err
	}
	p.applyPlacement(pl)
	return nil
}

// applyPlacement brings the tables to what a record says. It runs with mapsMu held, or while nobody serves yet.
func (p *Pool) applyPlacement(pl placement) {
	info, ok := p.segmentInfo(pl.id)
	if !ok || info.Epoch != pl.epoch || info.Shards() != len(pl.targets) {
		return // deleted since
	}
	info.Targets = pl.targets
	p.mu.Lock()
	p.segments[pl.id] = info
	p.mu.Unlock()
	p.usageFailed(p.usage.SetTargets(pl.id, pl.targets))
	p.repair.moved(pl.id)
}
