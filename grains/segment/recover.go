package segment

import (
	"context"
	"fmt"
	"math/bits"
	"sync"
)

// rebuildRange gives n bytes at off of the area of one shard that cannot be trusted, from the same
// range of k others, read side by side. ok checks the result. If k others give bytes that are not ok,
// the rest is read too and every choice of k is tried: k good ones among them are always found. why
// is what was wrong with the shard itself.
func (r *Reader) rebuildRange(ctx context.Context, info Info, shard int, why error, off int64, n int, ok func([]byte) bool) ([]byte, error) {
	g := gather{r: r, info: info, off: off, n: n, pieces: make([][]byte, info.Shards()), errs: []error{why}}
	for s := range info.Shards() {
		if s != shard && info.Targets[s] != 0 {
			g.rest = append(g.rest, s)
		}
	}
	k := int(info.K)
	for g.have < k && len(g.rest) > 0 && ctx.Err() == nil {
		g.fetch(ctx, k-g.have)
	}
	if g.have < k || ctx.Err() != nil {
		return nil, fmt.Errorf("rebuild shard %d: %d of %d others answered: %w", shard, g.have, k, verdict(ctx, g.errs))
	}
	p, err := g.solve(shard, g.got())
	if err != nil || ok(p) {
		return p, err
	}
	if g.fetch(ctx, len(g.rest)); g.have > k {
		got := g.got()
		// Every k-subset of got, as masks of k bits in ascending order (Gosper's step).
		for set := uint32(1)<<k - 1; set < 1<<len(got) && ctx.Err() == nil; set = nextSubset(set) {
			if p, err := g.solve(shard, pick(got, set)); err != nil || ok(p) {
				return p, err
			}
		}
	}
	g.errs = append(g.errs, fmt.Errorf("shard %d rebuilt from %v: checksum: %w", shard, g.got(), ErrDamaged))
	return nil, verdict(ctx, g.errs)
}

// gather collects one byte range of several shards.
type gather struct {
	r    *Reader
	info Info
	off  int64
	n    int

	rest   []int    // shards not yet asked
	pieces [][]byte // by shard; nil = not at hand
	have   int      // pieces at hand
	errs   []error
}

// fetch asks the next count shards at once and waits for all.
func (g *gather) fetch(ctx context.Context, count int) {
	count = min(count, len(g.rest))
	batch := g.rest[:count]
	g.rest = g.rest[count:]
	errs := make([]error, count)
	var wg sync.WaitGroup
	for i, s := range batch {
		wg.Go(func() {
			p := make([]byte, g.n)
			if errs[i] = readShard(ctx, g.r.o.Targets, g.info, s, p, HeaderBytes+g.off); errs[i] == nil {
				g.pieces[s] = p
			}
		})
	}
	wg.Wait()
	for i, err := range errs {
		if err == nil {
			g.have++
			continue
		}
		g.errs = append(g.errs, err)
		if ctx.Err() == nil {
			g.r.degraded(g.info, batch[i], err)
		}
	}
}

// got lists the shards at hand.
func (g *gather) got() []int {
	var got []int
	for s, p := range g.pieces {
		if p != nil {
			got = append(got, s)
		}
	}
	return got
}

// solve rebuilds shard from the first k pieces of those in from.
func (g *gather) solve(shard int, from []int) ([]byte, error) {
	pieces := make([][]byte, len(g.pieces))
	for _, s := range from[:g.info.K] {
		pieces[s] = g.pieces[s]
	}
	return reconstruct(g.info.K, g.info.M, pieces, shard)
}

// pick is the members of all whose bit is set.
func pick(all []int, set uint32) []int {
	out := make([]int, 0, bits.OnesCount32(set))
	for ; set != 0; set &= set - 1 {
		out = append(out, all[bits.TrailingZeros32(set)])
	}
	return out
}

// nextSubset is the next larger number with as many bits set; set is not 0.
func nextSubset(set uint32) uint32 {
	low := set & -set
	up := set + low
	return up | (set^up)>>2/low
}
