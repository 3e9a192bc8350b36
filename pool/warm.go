package pool

import (
	"cmp"
	"context"
	"slices"
	"time"

	"graindisk/block"
	"graindisk/grains/bootprofile"
	"graindisk/grains/fetch"
	"graindisk/vdisk"
)

// Reading boot profiles ahead. It goes on in the background from the open on, and never costs a guest anything
// but what one small fetch does:
//
//   - one fetch of at most warmBatch is under way at a time, and none begins while a guest waits for a target,
//     for up to warmYield;
//   - no faster than warmRate;
//   - into free slots of the tier only: it stops where something would have to be evicted, or the index has no
//     memory, and at a quarter of the tier;
//   - what is on the tier is not asked for, so that a warm restart asks for nothing;
//   - Close ends it.
const (
	warmBatch = 1 << 20               // bytes [tune]
	warmYield = time.Second           // [tune]
	warmRate  = 64 << 20              // bytes per second [tune]
	warmPart  = 4                     // of the tier
	warmPoll  = 20 * time.Millisecond // while a slot is being made ready
)

// warming is a disk with what is left to read ahead of it.
type warming struct {
	disk   *vdisk.Disk
	ranges []bootprofile.Range
}

// next takes up to n bytes off the front, as a range in bytes.
func (w *warming) next(n int64) (from, to int64) {
	r := &w.ranges[0]
	blocks := uint32(min(int64(r.Blocks), n/block.Size))
	from = int64(r.First) * block.Size
	r.First += block.LBA(blocks)
	if r.Blocks -= blocks; r.Blocks == 0 {
		w.ranges = w.ranges[1:]
	}
	return from, from + int64(blocks)*block.Size
}

// warmUp reads the boot profiles of all disks ahead, in turns, until ctx ends or there is no room for more.
func (p *Pool) warmUp(ctx context.Context) {
	var list []*warming
	p.mu.Lock()
	for _, d := range p.disks {
		list = append(list, &warming{disk: d})
	}
	p.mu.Unlock()
	slices.SortFunc(list, func(a, b *warming) int { return cmp.Compare(a.disk.ID(), b.disk.ID()) }) // see crashtest.Sched
	for _, w := range list {
		if prof, ok := p.loadBoot(w.disk.ID()); ok && p.o.BootBytes > 0 {
			w.ranges = prof.Ranges
		}
	}
	select {
	case <-p.cache.Loaded():
	case <-ctx.Done():
		return
	}
	batch := min(warmBatch, p.space.SlotBytes()/2)
	left := p.o.TierBytes / warmPart
	for len(list) > 0 {
		rest := list[:0]
		for _, w := range list {
			if len(w.ranges) == 0 {
				continue
			}
			from, to := w.next(batch)
			n, ok := p.warm(ctx, w.disk, from, to, left)
			if left -= n; !ok {
				return
			}
			rest = append(rest, w)
		}
		list = rest
	}
}

// warm reads a range of a disk ahead; false if that was the last, or it is more than left.
func (p *Pool) warm(ctx context.Context, d *vdisk.Disk, from, to, left int64) (bytes int64, ok bool) {
	var wants []fetch.Want
	for _, x := range d.Pieces(ctx, from, to) {
		if !p.cache.Has(x.ID, x.Orig) {
			wants = append(wants, fetch.Want{Disk: x.Disk, ID: x.ID, Blocks: x.Orig})
			bytes += int64(x.Orig) * block.Size
		}
	}
	if len(wants) == 0 {
		return 0, ctx.Err() == nil
	}
	if bytes > left || !p.roomToWarm(ctx, int(bytes/block.Size)) {
		return 0, false
	}
	p.foreground.yield(ctx, warmYield)
	start := time.Now()
	err := p.fetcher.Get(ctx, wants, func([]fetch.Result) {}) // what cannot be read will be asked for by who wants it
	if err != nil {
		return 0, false
	}
	p.boots.warmed.Add(bytes)
	return bytes, pause(ctx, time.Duration(bytes)*time.Second/warmRate-time.Since(start))
}

// roomToWarm waits until the tier has free room for so many blocks, or reports that it has none.
func (p *Pool) roomToWarm(ctx context.Context, blocks int) bool {
	for {
		yes, later := p.cache.Spare(blocks)
		if yes || !later || !pause(ctx, warmPoll) {
			return yes
		}
	}
}

// pause waits; false if ctx ended.
func pause(ctx context.Context, d time.Duration) bool {
	if d <= 0 {
		return ctx.Err() == nil
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}
