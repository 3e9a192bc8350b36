package segment

import (
	"context"
	"math/bits"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"graindisk/backend"
	"graindisk/block"
)

// How targets are judged. [tune]
const (
	windowReads  = 64               // the last reads of a size that a target's p95 is taken from
	windowMin    = 16               // reads before there is a p95
	windowFresh  = 8                // reads after which it is taken again
	failsMax     = 3                // failures in a row that make a target sick
	probeGap     = time.Second      // between reads of a sick target, made beside those of others
	trustTime    = 10 * time.Second // how long a read that succeeded says more than ReaderOptions.Avoid
	stallTime    = 2 * time.Second  // a read that takes this long, and 4 × the p95, counts as failed
	sizeClasses  = 5                // up to 16, 64, 256 KiB, 1 MiB, more
	sizeClassMin = 16 << 10
)

// health is what the reads of one target say about it.
type health struct {
	mu     sync.Mutex
	reads  [sizeClasses]window // by size, since a large read takes longer
	fails  int                 // in a row
	probed time.Time           // when a sick target was last tried
	good   time.Time           // when a read last succeeded
}

// window is the time that the last reads took.
type window struct {
	took  [windowReads]time.Duration
	n     int // reads so far
	p95   time.Duration
	fresh int // reads since p95 was taken
}

func (w *window) add(d time.Duration) {
	w.took[w.n%windowReads] = d
	w.n++
	if w.fresh++; w.n >= windowMin && (w.p95 == 0 || w.fresh >= windowFresh) {
		sorted := slices.Clone(w.took[:min(w.n, windowReads)])
		slices.Sort(sorted)
		w.p95, w.fresh = max(1, sorted[(len(sorted)*95-1)/100]), 0
	}
}

func sizeClass(n int) int {
	return min(sizeClasses-1, (bits.Len(uint(max(0, n-1)/sizeClassMin))+1)/2)
}

// p95 is the time that 19 of 20 reads of about n bytes took lately, or 0 while too few are known.
func (h *health) p95(n int) time.Duration {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.reads[sizeClass(n)].p95
}

// note records a read of n bytes. One that was given up says only that it would have taken longer.
func (h *health) note(n int, took time.Duration, err error, givenUp bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	w := &h.reads[sizeClass(n)]
	switch {
	case givenUp:
		if w.p95 > 0 && took > w.p95 {
			w.add(took)
		}
	case err == nil:
		w.add(took)
		h.fails, h.good = 0, time.Now()
	default:
		switch backend.ClassOf(err) {
		case backend.NotFound, backend.Short: // it did answer
			h.fails = 0
		default:
			h.failedLocked()
		}
	}
}

func (h *health) failedLocked() {
	h.fails++
	h.probed = time.Now()
}

// stalled notes a read that has been waited for long enough.
func (h *health) stalled() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.failedLocked()
}

// The answers of sickness.
const (
	healthy = iota
	sick    // do not wait for it
)

// sickness tells how far a target can be relied upon; no target at all is worst.
func (r *Reader) sickness(t block.TargetID) int {
	if t == 0 {
		return sick + 1
	}
	h := r.targets.of(t)
	avoid := r.o.Avoid(t)
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.fails >= failsMax || avoid && time.Since(h.good) > trustTime {
		return sick
	}
	return healthy
}

// probe reports, once every probeGap, that a sick target should be tried again.
func (h *health) probe() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if time.Since(h.probed) < probeGap {
		return false
	}
	h.probed = time.Now()
	return true
}

// targetTable finds the health of targets, of which there are few for ever.
type targetTable struct{ m sync.Map }

func (t *targetTable) of(id block.TargetID) *health {
	if h, ok := t.m.Load(id); ok {
		return h.(*health)
	}
	h, _ := t.m.LoadOrStore(id, new(health))
	return h.(*health)
}

// readShard is the function of that name with the target's health noted.
func (r *Reader) readShard(ctx context.Context, info Info, shard int, p []byte, off int64) error {
	t := info.Targets[shard]
	if t == 0 {
		return errNotStored
	}
	start := time.Now()
	err := readShard(ctx, r.o.Targets, info, shard, p, off)
	r.targets.of(t).note(len(p), time.Since(start), err, err != nil && ctx.Err() != nil)
	return err
}

// hedgeBudget bounds the requests made only for speed to one in hedgeShare, from the first read on.
type hedgeBudget struct{ tokens atomic.Int64 } // hedgeShare of them are one request

const (
	hedgeShare  = 20 // 5 %
	hedgeSaving = 64 // requests that may be saved up
)

// earn is called once for every read of a shard.
func (b *hedgeBudget) earn() {
	if b.tokens.Load() < hedgeSaving*hedgeShare {
		b.tokens.Add(1)
	}
}

// take spends n requests if there are as many.
func (b *hedgeBudget) take(n int) bool {
	for {
		have := b.tokens.Load()
		if have < int64(n)*hedgeShare {
			return false
		}
		if b.tokens.CompareAndSwap(have, have-int64(n)*hedgeShare) {
			return true
		}
	}
}
