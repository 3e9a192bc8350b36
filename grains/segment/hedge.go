package segment

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"
)

// errLate stands for a shard that did not answer in time: it proves neither damage nor absence.
var errLate = errors.New("shard did not answer in time")

// hedgeMargin is how much slower than its target's p95 a read must be before others are asked, as
// p95/4: one read in twenty is slower than the p95 by itself, and would spend the whole budget.
const hedgeMargin = 4

// ReadStats count the requests of a Reader since it was made.
type ReadStats struct {
	Reads   uint64 // ranges and indexes that were wanted
	Hedged  uint64 // of them, how many were asked of others because the first was slow
	Extra   uint64 // requests that hedging cost; at most 5 % of Reads
	Denied  uint64 // slow reads that were not hedged because the budget was spent
	Won     uint64 // hedges that came first
	Avoided uint64 // reads that did not wait for a sick target
	Stalled uint64 // reads given up on after stallTime
}

type readCounts struct{ reads, hedged, extra, denied, won, avoided, stalled atomic.Uint64 }

// Stats counts.
func (r *Reader) Stats() ReadStats {
	c := &r.counts
	return ReadStats{
		Reads: c.reads.Load(), Hedged: c.hedged.Load(), Extra: c.extra.Load(), Denied: c.denied.Load(), Won: c.won.Load(),
		Avoided: c.avoided.Load(), Stalled: c.stalled.Load(),
	}
}

// outcome is the end of one way to get a range.
type outcome struct {
	buf     []byte
	rebuilt bool
	err     error
}

// race gets one range of a shard's area by one way or two, whichever ends well first:
//
//	healthy target    the shard ──► slower than 1.25 × its p95, and the budget allows it ─┐
//	                      │ └──► failed, or stalled ──────────────────────────────────────┤
//	sick target       (once a second it is asked, too)                                    └► k others
//	                      └─── if they do not suffice ◄─────────────────────────────────────┘
type race struct {
	r       *Reader
	info    Info
	shard   int
	off     int64
	n       int
	ok      func([]byte) bool
	done    chan outcome // room for both
	running int
	direct  bool // the shard was asked
	others  bool // k others were asked
	hedged  bool // and only for speed
	why     error
}

// readRange gets n bytes at off of a shard's area: from the shard, unchecked, or rebuilt, checked by ok.
func (r *Reader) readRange(ctx context.Context, info Info, shard int, off int64, n int, ok func([]byte) bool) (buf []byte, rebuilt bool, err error) {
	r.counts.reads.Add(1)
	r.hedges.earn()
	a := race{r: r, info: info, shard: shard, off: off, n: n, ok: ok, done: make(chan outcome, 2)}
	t := info.Targets[shard]
	stored := 0
	for s, t := range info.Targets {
		if s != shard && t != 0 {
			stored++
		}
	}
	if stored < int(info.K) { // nobody else can help
		buf = make([]byte, n)
		err = r.readShard(ctx, info, shard, buf, HeaderBytes+off)
		if err != nil && ctx.Err() == nil {
			r.degraded(info, shard, err)
			err = verdict(ctx, []error{err})
		}
		return buf, false, err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if r.sickness(t) == healthy {
		a.ask(ctx)
	} else {
		a.why = errLate
		if t == 0 {
			a.why = errNotStored
			a.direct = true // as it were
		} else {
			r.counts.avoided.Add(1)
			if r.targets.of(t).probe() {
				a.ask(ctx)
			}
		}
		a.askOthers(ctx)
	}
	o := a.run(ctx)
	return o.buf, o.rebuilt, o.err
}

// ask asks the shard itself.
func (a *race) ask(ctx context.Context) {
	a.direct = true
	a.running++
	a.r.wg.Go(func() {
		buf := make([]byte, a.n)
		err := a.r.readShard(ctx, a.info, a.shard, buf, HeaderBytes+a.off)
		a.done <- outcome{buf, false, err}
	})
}

// askOthers rebuilds the range from k others.
func (a *race) askOthers(ctx context.Context) {
	a.others = true
	a.running++
	why := a.why
	a.r.wg.Go(func() {
		buf, err := a.r.rebuildRange(ctx, a.info, a.shard, why, a.off, a.n, a.ok)
		a.done <- outcome{buf, true, err}
	})
}

// run waits for the first that ends well, or for the last that fails.
func (a *race) run(ctx context.Context) outcome {
	h := a.r.targets.of(a.info.Targets[a.shard])
	p95 := h.p95(a.n)
	stall := time.NewTimer(max(stallTime, 4*p95))
	defer stall.Stop()
	var hedge <-chan time.Time // never, while no p95 is known
	if p95 > 0 && !a.others {
		t := time.NewTimer(p95 + p95/hedgeMargin)
		defer t.Stop()
		hedge = t.C
	}
	var failed outcome
	for {
		select {
		case o := <-a.done:
			if a.running--; o.err == nil {
				if o.rebuilt && a.hedged {
					a.r.counts.won.Add(1)
				}
				return o
			}
			a.lost(ctx, o)
			if failed.err == nil || o.rebuilt {
				failed = o
			}
			if a.running == 0 {
				return failed
			}
		case <-hedge:
			switch {
			case a.others:
			case !a.r.hedges.take(int(a.info.K)):
				a.r.counts.denied.Add(1)
			default:
				a.hedged, a.why = true, errLate
				a.r.counts.hedged.Add(1)
				a.r.counts.extra.Add(uint64(a.info.K))
				a.askOthers(ctx)
			}
		case <-stall.C:
			if !a.others {
				h.stalled()
				a.r.counts.stalled.Add(1)
				a.why = errLate
				a.askOthers(ctx)
			}
		case <-ctx.Done():
			return outcome{err: context.Cause(ctx)}
		}
	}
}

// lost takes note of a way that failed and tries the other if that was not done.
func (a *race) lost(ctx context.Context, o outcome) {
	if ctx.Err() != nil {
		return
	}
	if o.rebuilt {
		if !a.direct {
			a.ask(ctx)
		}
		return
	}
	a.r.degraded(a.info, a.shard, o.err)
	if !a.others {
		a.why = o.err
		a.askOthers(ctx)
	}
}

// fetchIndex reads the index: from the IndexStore, or from one shard after the other, starting at a
// different one for each segment, so that the load spreads. A shard that fails or is slow makes it ask
// the next beside; the first answer that fits wins. If there is none, those whose bytes were wrong are asked once
// more: they may have been hurt on their way, and of a stripe that lacks shards one may be all there is.
func (r *Reader) fetchIndex(ctx context.Context, info Info) (*Index, error) {
	if err := info.validate(); err != nil {
		return nil, fmt.Errorf("read index: %w: %w", err, ErrDamaged)
	}
	if r.o.Indexes != nil {
		if b := r.o.Indexes.LoadIndex(info.ID, int(info.IndexBytes)); b != nil {
			if x, err := r.decodeIndex(b, info); err == nil {
				return x, nil
			}
		}
	}
	r.counts.reads.Add(1)
	r.hedges.earn()
	order := make([]int, 0, info.Shards())
	for _, level := range []int{healthy, sick, sick + 1} {
		for n := range info.Shards() {
			shard := int((uint64(info.ID) + uint64(n)) % uint64(info.Shards()))
			if r.sickness(info.Targets[shard]) == level {
				order = append(order, shard)
			}
		}
	}
	x, b, errs, hurt := r.raceIndex(ctx, info, order)
	if x == nil && len(hurt) > 0 && ctx.Err() == nil {
		var more []error
		x, b, more, _ = r.raceIndex(ctx, info, hurt)
		errs = append(errs, more...)
	}
	if x == nil {
		return nil, fmt.Errorf("read index of segment %d: %w", info.ID, verdict(ctx, errs))
	}
	if r.o.Indexes != nil {
		r.o.Indexes.SaveIndex(info.ID, b)
	}
	return x, nil
}

// raceIndex asks shards in order until one gives the index. If none does, hurt are those that gave wrong bytes.
func (r *Reader) raceIndex(ctx context.Context, info Info, order []int) (x *Index, b []byte, errs []error, hurt []int) {
	type answer struct {
		shard int
		b     []byte
		x     *Index
		err   error
	}
	rctx, cancel := context.WithCancel(ctx)
	defer cancel()
	answers := make(chan answer, len(order))
	out, last, wait := 0, 0, stallTime
	ask := func() {
		if len(order) == 0 {
			return
		}
		shard := order[0]
		order = order[1:]
		out++
		last, wait = shard, stallTime
		if p95 := r.targets.of(info.Targets[shard]).p95(int(info.IndexBytes)); p95 > 0 {
			wait = min(wait, p95+p95/hedgeMargin)
		}
		r.wg.Go(func() {
			a := answer{shard: shard, b: make([]byte, info.IndexBytes)}
			if a.err = r.readShard(rctx, info, shard, a.b, info.indexOffset()); a.err == nil {
				a.x, a.err = r.decodeIndex(a.b, info)
			}
			answers <- a
		})
	}
	ask()
	start := time.Now()
	late := time.NewTimer(wait)
	defer late.Stop()
	for out > 0 {
		select {
		case a := <-answers:
			if out--; a.err == nil {
				return a.x, a.b, nil, nil
			}
			if errs = append(errs, a.err); ctx.Err() != nil {
				return nil, nil, errs, nil
			}
			if wrongBytes(a.err) {
				hurt = append(hurt, a.shard)
			}
			r.degraded(info, a.shard, a.err)
			ask()
		case <-late.C:
			switch {
			case time.Since(start) >= stallTime:
				r.targets.of(info.Targets[last]).stalled()
				r.counts.stalled.Add(1)
				ask()
			case len(order) > 0 && r.hedges.take(1):
				r.counts.hedged.Add(1)
				r.counts.extra.Add(1)
				ask()
			case len(order) > 0:
				r.counts.denied.Add(1)
			}
			late.Reset(stallTime)
		case <-ctx.Done():
			return nil, nil, append(errs, ctx.Err()), nil
		}
	}
	return nil, nil, errs, hurt
}
