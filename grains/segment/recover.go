package segment

import (
	"cmp"
	"context"
	"fmt"
	"math/bits"
	"slices"
	"time"
)

// rebuildRange gives n bytes at off of the area of one shard that cannot be trusted, from the same
// range of k others, read side by side; one that fails or does not answer for long is replaced. ok checks the result. If k others give bytes that are not ok,
// the rest is read too and every choice of k is tried: k good ones among them are always found. why
// is what was wrong with the shard itself.
func (r *Reader) rebuildRange(ctx context.Context, info Info, shard int, why error, off int64, n int, ok func([]byte) bool) ([]byte, error) {
	g := gather{r: r, info: info, off: off, n: n, pieces: make([][]byte, info.Shards()), errs: []error{why}}
	for s := range info.Shards() {
		if s != shard && info.Targets[s] != 0 {
			g.rest = append(g.rest, s)
		}
	}
	slices.SortStableFunc(g.rest, func(a, b int) int { // the sick last
		return cmp.Compare(r.sickness(info.Targets[a]), r.sickness(info.Targets[b]))
	})
	k := int(info.K)
	g.fetch(ctx, k, true)
	if g.have < k || ctx.Err() != nil {
		return nil, fmt.Errorf("rebuild shard %d: %d of %d others answered: %w", shard, g.have, k, verdict(ctx, g.errs))
	}
	p, err := g.solve(shard, g.got())
	if err != nil || ok(p) {
		return p, err
	}
	if g.fetch(ctx, g.have+len(g.rest), false); g.have > k {
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

// fetch asks shards until want pieces are at hand or there are none left to ask. Each that fails, or
// keeps all waiting for stallTime, makes it ask one more. Only if patient it waits for the last ones.
func (g *gather) fetch(ctx context.Context, want int, patient bool) {
	type answer struct {
		shard int
		p     []byte
		err   error
	}
	answers := make(chan answer, len(g.rest)) // nobody is kept from ending
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	out := map[int]bool{} // shards asked that have not answered
	ask := func() {
		if len(g.rest) == 0 {
			return
		}
		s := g.rest[0]
		g.rest = g.rest[1:]
		out[s] = true
		g.r.wg.Go(func() {
			p := make([]byte, g.n)
			err := g.r.readShard(ctx, g.info, s, p, HeaderBytes+g.off)
			answers <- answer{s, p, err}
		})
	}
	for range want - g.have {
		ask()
	}
	stall := time.NewTimer(stallTime)
	defer stall.Stop()
	for len(out) > 0 && g.have < want {
		select {
		case a := <-answers:
			delete(out, a.shard)
			if a.err == nil {
				g.pieces[a.shard] = a.p
				g.have++
				continue
			}
			if g.errs = append(g.errs, a.err); ctx.Err() == nil {
				g.r.degraded(g.info, a.shard, a.err)
			}
			ask()
		case <-stall.C:
			for s := range out {
				g.r.targets.of(g.info.Targets[s]).stalled()
			}
			if len(g.rest) == 0 && !patient {
				g.errs = append(g.errs, errLate)
				return
			}
			ask()
			stall.Reset(stallTime)
		case <-ctx.Done():
			return
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
