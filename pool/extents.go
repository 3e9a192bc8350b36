package pool

import (
	"context"
	"errors"
	"fmt"

	"graindisk/backend"
	"graindisk/block"
	"graindisk/grains/cache"
	"graindisk/grains/fetch"
	"graindisk/grains/segment"
	"graindisk/vdisk"
)

// ReadCached implements vdisk.Extents.
func (p *Pool) ReadCached(id block.ExtentID, off int, dst []byte) bool {
	return p.fetcher.Landed(id, off, dst) || p.cache.Read(id, off, len(dst)/block.Size, dst)
}

// Read implements vdisk.Extents. It waits for targets that do not answer, until ctx ends; only
// damage that no shard can mend is an error.
func (p *Pool) Read(ctx context.Context, ps []vdisk.Piece, ready func([]vdisk.Done)) error {
	defer p.foreground.enter()()
	wants := make([]fetch.Want, len(ps))
	for i, x := range ps {
		wants[i] = fetch.Want{Disk: x.Disk, ID: x.ID, Blocks: x.Orig}
	}
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	if ready == nil {
		ready = func(done []vdisk.Done) {
			for _, d := range done {
				if d.Err != nil {
					stop(d.Err)
				}
			}
		}
	}
	done := make([]vdisk.Done, 0, len(ps))
	err := p.fetcher.Get(ctx, wants, func(rs []fetch.Result) {
		done = done[:0]
		for _, r := range rs {
			x := ps[r.I]
			if r.Err == nil {
				copy(x.Dst, r.Data[x.Off*block.Size:])
				p.fetcher.Passed(x.ID, x.Off+len(x.Dst)/block.Size)
			} else {
				r.Err = fmt.Errorf("extent %s: %w", x.ID, r.Err)
			}
			done = append(done, vdisk.Done{Piece: r.I, Err: r.Err})
		}
		ready(done)
	})
	if err == nil && ctx.Err() != nil { // the last one failed
		err = context.Cause(ctx)
	}
	return err
}

// aheadsMax is how many streams may have their readahead resolved at a time.
const aheadsMax = 4

// Ahead implements vdisk.Extents.
func (p *Pool) Ahead(resolve func() []vdisk.Piece, done func(fetched int)) bool {
	if p.aheads.Add(1) > aheadsMax {
		p.aheads.Add(-1)
		return false
	}
	p.ahead.Go(func() {
		defer p.aheads.Add(-1)
		ps := resolve()
		wants := make([]fetch.Want, len(ps))
		for i, x := range ps {
			wants[i] = fetch.Want{Disk: x.Disk, ID: x.ID, Blocks: x.Orig}
		}
		done(p.fetcher.Ahead(wants))
	})
	return true
}

// AheadMax implements vdisk.Extents.
func (p *Pool) AheadMax() int64 { return p.fetcher.Window() }

// fetchExtents reads extents of one segment from the targets; it is the fetcher's Source.
func (p *Pool) fetchExtents(ctx context.Context, seg block.SegmentID, wants []fetch.Want, got func(int, []byte, error)) {
	fail := func(err error) {
		for i := range wants {
			got(i, nil, err) // those told already stay as they are
		}
	}
	info, ok := p.segmentInfo(seg)
	if !ok {
		fail(fmt.Errorf("segment %d is not in the pool's table: %w: %w", seg, vdisk.ErrMoved, vdisk.ErrDamaged))
		return
	}
	left := make(map[int]int, len(wants)) // slot → want
	for i, w := range wants {
		left[w.ID.Slot()] = i
	}
	for wait := backoff(0); ; wait = wait.next() {
		slots := make([]int, 0, len(left))
		for s := range left {
			slots = append(slots, s)
		}
		var passing error // why some are left
		p.reader.Each(ctx, info, slots, func(slot int, data []byte, e segment.Entry, err error) {
			i := left[slot]
			switch {
			case err == nil && int(e.Blocks) != wants[i].Blocks:
				err = fmt.Errorf("it has %d blocks, the map says %d: %w", e.Blocks, wants[i].Blocks, vdisk.ErrDamaged)
			case err == nil, errors.Is(err, segment.ErrNewer):
			case errors.Is(err, segment.ErrDamaged), errors.Is(err, backend.ErrNotFound):
				if !p.hasSegment(seg) { // it died while its targets were waited for, and was reclaimed
					err = fmt.Errorf("%w: %w", vdisk.ErrMoved, err)
				} else {
					p.o.Log.Error("extent cannot be read", "pool", p.o.Name, "segment", seg, "slot", slot, "err", err)
				}
				err = fmt.Errorf("%w: %w", vdisk.ErrDamaged, err)
			default:
				passing = err
				return
			}
			delete(left, slot)
			got(i, data, err)
		})
		if len(left) == 0 {
			return
		}
		if ctx.Err() == nil {
			p.o.Log.Warn("targets do not answer, read waits", "pool", p.o.Name, "segment", seg, "err", passing)
		}
		if err := wait.sleep(ctx); err != nil {
			fail(err)
			return
		}
		if now, ok := p.segmentInfo(seg); ok { // a shard may have been restored elsewhere
			info = now
		}
	}
}

func (p *Pool) hasSegment(seg block.SegmentID) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	_, ok := p.segments[seg]
	return ok
}

// tierExtents is the cache as the fetcher wants it.
type tierExtents struct {
	*cache.Cache
	p *Pool
}

// Fill stores an extent unless nothing maps it any more: it may have died while it was on its way. It dies
// before it is forgotten, so one of the two undoes what was filled in between.
func (t tierExtents) Fill(disk block.DiskID, id block.ExtentID, data []byte) {
	if !t.p.usage.Alive(id) {
		return
	}
	t.Cache.Fill(disk, id, data)
	if !t.p.usage.Alive(id) {
		t.Forget(id, len(data)/block.Size)
	}
}

// tierIndexes keeps the indexes of segments on the tier: a restart must not cost a request for each.
// It is cached, like an extent, under a slot that no extent can have, padded with zeroes.
type tierIndexes struct{ p *Pool }

const indexSlot = 0xffff // beyond block.ExtentsMax

func indexBlocks(bytes int) int { return (bytes + block.Size - 1) / block.Size }

// LoadIndex implements segment.IndexStore.
func (t tierIndexes) LoadIndex(id block.SegmentID, bytes int) []byte {
	name, n := block.NewExtentID(id, indexSlot), indexBlocks(bytes)
	if t.p.cache == nil || !t.p.cache.Has(name, n) {
		return nil
	}
	b := make([]byte, n*block.Size)
	if !t.p.cache.Read(name, 0, n, b) {
		return nil
	}
	return b[:bytes]
}

// SaveIndex implements segment.IndexStore.
func (t tierIndexes) SaveIndex(id block.SegmentID, b []byte) {
	if t.p.cache == nil {
		return
	}
	padded := make([]byte, indexBlocks(len(b))*block.Size)
	copy(padded, b)
	t.p.cache.Fill(0, block.NewExtentID(id, indexSlot), padded)
}
