package segment

import (
	"context"
	"errors"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"graindisk/backend"
	"graindisk/block"
)

// sleep waits d of the bubble's time, or until ctx ends.
func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// hang never answers.
func hang(ctx context.Context, _ int64) error { <-ctx.Done(); return ctx.Err() }

func after(d time.Duration) func(context.Context, int64) error {
	return func(ctx context.Context, _ int64) error { return sleep(ctx, d) }
}

// countingGate wraps a gate and counts the requests that reach it.
func countingGate(n *atomic.Int64, gate func(context.Context, int64) error) func(context.Context, int64) error {
	return func(ctx context.Context, off int64) error { n.Add(1); return gate(ctx, off) }
}

// slotsIn lists the slots that lie in one shard.
func slotsIn(s *Sealed, shard int) []int {
	var slots []int
	for i, e := range s.Index.Entries {
		if int(e.Shard) == shard {
			slots = append(slots, i)
		}
	}
	return slots
}

// TestHedgesCutTheTail makes 10 000 reads with one target of which one answer in thirty is slow.
func TestHedgesCutTheTail(t *testing.T) {
	rng := seeded(t)
	list := randomExtents(rng, 64, 1)
	s := build(t, BuildOptions{ID: 6, Epoch: 1, K: 2, M: 1}, list, nil)
	measure := func(hedged bool) (p99 time.Duration, requests int64, stats ReadStats) {
		synctest.Test(t, func(t *testing.T) {
			stores := newTargets(3)
			stores.put(s)
			var asked atomic.Int64
			var mu sync.Mutex
			for i, st := range stores {
				st.gate = countingGate(&asked, func(ctx context.Context, _ int64) error {
					mu.Lock()
					d := 5*time.Millisecond + time.Duration(rng.IntN(5000))*time.Microsecond
					if i == 0 && rng.IntN(30) == 0 {
						d = 500 * time.Millisecond
					}
					mu.Unlock()
					return sleep(ctx, d)
				})
			}
			r := NewReader(ReaderOptions{Targets: stores.get})
			defer r.Close()
			r.Remember(s.Info, s.Index)
			if !hedged {
				r.hedges.tokens.Store(-1 << 40)
			}
			const reads = 10000
			took := make([]time.Duration, reads)
			slots := make([]int, reads)
			for i := range slots {
				slots[i] = rng.IntN(len(list))
			}
			for i, slot := range slots {
				start := time.Now()
				data, e, err := r.Extent(t.Context(), s.Info, slot)
				if err := errors.Join(err, list[slot].check(data, e)); err != nil {
					t.Fatal(err)
				}
				took[i] = time.Since(start)
			}
			slices.Sort(took)
			p99, requests, stats = took[reads*99/100], asked.Load(), r.Stats()
			if int64(stats.Reads) != reads || stats.Extra*20 > stats.Reads {
				t.Errorf("%+v: more than 5 %% of extra requests", stats)
			}
		})
		return p99, requests, stats
	}
	slow, plain, denied := measure(false)
	if denied.Denied < 100 || denied.Hedged != 0 { // one in 90 reads is slow
		t.Errorf("without a budget: %+v", denied)
	}
	fast, requests, stats := measure(true)
	t.Logf("p99 %v with %d requests, hedged %v with %d; %+v", slow, plain, fast, requests, stats)
	if plain != 10000 || requests > plain*105/100 {
		t.Errorf("%d requests without hedging, %d with", plain, requests)
	}
	if fast > slow/10 || stats.Won == 0 {
		t.Errorf("p99 %v, hedged %v", slow, fast)
	}
}

// TestTheLoserOfARaceIsCancelled has a shard hang once after its target has proved fast.
func TestTheLoserOfARaceIsCancelled(t *testing.T) {
	list := randomExtents(seeded(t), 40, 2)
	s := build(t, BuildOptions{ID: 6, Epoch: 1, K: 2, M: 1}, list, nil)
	synctest.Test(t, func(t *testing.T) {
		stores := newTargets(3)
		stores.put(s)
		for _, st := range stores {
			st.gate = after(10 * time.Millisecond)
		}
		r := NewReader(ReaderOptions{Targets: stores.get})
		r.Remember(s.Info, s.Index)
		slot := slotsIn(s, 0)[0]
		for range 100 {
			if _, _, err := r.Extent(t.Context(), s.Info, slot); err != nil {
				t.Fatal(err)
			}
		}
		var ended atomic.Bool
		stores[0].gate = func(ctx context.Context, off int64) error {
			defer ended.Store(true)
			return hang(ctx, off)
		}
		start := time.Now()
		r.Each(t.Context(), s.Info, []int{slot}, func(_ int, data []byte, e Entry, err error) {
			if err := errors.Join(err, list[slot].check(data, e)); err != nil {
				t.Fatal(err)
			}
		})
		if d := time.Since(start); d > 25*time.Millisecond {
			t.Errorf("the hedge came after %v", d)
		}
		r.Close()
		if !ended.Load() {
			t.Error("the slow request goes on")
		}
	})
}

// TestASlowShardWinsWhereOthersFail hedges a read whose other shards are gone.
func TestASlowShardWinsWhereOthersFail(t *testing.T) {
	list := randomExtents(seeded(t), 40, 2)
	s := build(t, BuildOptions{ID: 6, Epoch: 1, K: 2, M: 1}, list, nil)
	synctest.Test(t, func(t *testing.T) {
		stores := newTargets(3)
		stores.put(s)
		stores[0].gate = after(10 * time.Millisecond)
		r := NewReader(ReaderOptions{Targets: stores.get})
		defer r.Close()
		r.Remember(s.Info, s.Index)
		slot := slotsIn(s, 0)[0]
		for range 100 {
			if _, _, err := r.Extent(t.Context(), s.Info, slot); err != nil {
				t.Fatal(err)
			}
		}
		stores[0].gate = after(time.Second)
		stores[1].fail = errors.New("away")
		data, e, err := r.Extent(t.Context(), s.Info, slot)
		if err := errors.Join(err, list[slot].check(data, e)); err != nil || r.Stats().Hedged != 1 {
			t.Fatal(err, r.Stats())
		}
	})
}

// TestASickTargetIsNotWaitedFor blackholes one target, reads, and brings it back.
func TestASickTargetIsNotWaitedFor(t *testing.T) {
	list := randomExtents(seeded(t), 40, 2)
	s := build(t, BuildOptions{ID: 6, Epoch: 1, K: 2, M: 1}, list, nil)
	synctest.Test(t, func(t *testing.T) {
		stores := newTargets(3)
		stores.put(s)
		var asked atomic.Int64
		stores[0].gate = countingGate(&asked, hang)
		stores[1].gate, stores[2].gate = after(10*time.Millisecond), after(10*time.Millisecond)
		r := NewReader(ReaderOptions{Targets: stores.get})
		defer r.Close()
		r.Remember(s.Info, s.Index)
		slot := slotsIn(s, 0)[0]
		read := func() time.Duration {
			t.Helper()
			start := time.Now()
			data, e, err := r.Extent(t.Context(), s.Info, slot)
			if err := errors.Join(err, list[slot].check(data, e)); err != nil {
				t.Fatal(err)
			}
			return time.Since(start)
		}
		for i := range failsMax {
			if d := read(); d != stallTime+10*time.Millisecond {
				t.Errorf("read %d of a target that hangs took %v", i, d)
			}
		}
		asked.Store(0)
		for range 1000 { // ten seconds
			if d := read(); d != 10*time.Millisecond {
				t.Fatalf("a read waited %v for a sick target", d)
			}
		}
		if n := asked.Load(); n < 9 || n > 10 {
			t.Errorf("the sick target was tried %d times in ten seconds", n)
		}
		stores[0].gate = countingGate(&asked, after(time.Millisecond))
		time.Sleep(probeGap)
		read() // finds it well
		asked.Store(0)
		for range 10 {
			if d := read(); d != time.Millisecond {
				t.Errorf("a read of the target that is back took %v", d)
			}
		}
		if asked.Load() != 10 || r.Stats().Extra != 0 {
			t.Errorf("%d reads of the target that is back; %+v", asked.Load(), r.Stats())
		}
	})
}

// TestTheLastTargetsAreAskedHoweverSick reads when those that are well do not suffice.
func TestTheLastTargetsAreAskedHoweverSick(t *testing.T) {
	list := randomExtents(seeded(t), 40, 2)
	s := build(t, BuildOptions{ID: 6, Epoch: 1, K: 2, M: 1}, list, nil)
	stores := newTargets(3)
	stores.put(s)
	stores[1].fail = errors.New("away")
	r := NewReader(ReaderOptions{Targets: stores.get, Avoid: func(id block.TargetID) bool { return id == 1 }})
	defer r.Close()
	if err := readAll(t.Context(), r, s.Info, list[:0]); err != nil {
		t.Fatal(err)
	}
	slot := slotsIn(s, 0)[0]
	data, e, err := r.Extent(t.Context(), s.Info, slot)
	if err := errors.Join(err, list[slot].check(data, e)); err != nil || r.Stats().Avoided != 1 {
		t.Fatal(err, r.Stats())
	}
}

// TestWithoutParityNothingIsHedged reads 1000 times from a profile of 2+0 with an uneven target.
func TestWithoutParityNothingIsHedged(t *testing.T) {
	rng := seeded(t)
	list := randomExtents(rng, 40, 2)
	s := build(t, BuildOptions{ID: 6, Epoch: 1, K: 2, M: 0}, list, nil)
	synctest.Test(t, func(t *testing.T) {
		stores := newTargets(2)
		stores.put(s)
		var asked atomic.Int64
		stores[0].gate = countingGate(&asked, func(ctx context.Context, _ int64) error {
			return sleep(ctx, time.Duration(1+rng.IntN(4000))*time.Millisecond)
		})
		stores[1].gate = countingGate(&asked, after(1))
		r := NewReader(ReaderOptions{Targets: stores.get})
		defer r.Close()
		r.Remember(s.Info, s.Index)
		for range 1000 {
			if _, _, err := r.Extent(t.Context(), s.Info, rng.IntN(len(list))); err != nil {
				t.Fatal(err)
			}
		}
		if asked.Load() != 1000 {
			t.Errorf("%d requests for 1000 reads", asked.Load())
		}
	})
}

// TestAnIndexIsHadFromTheNextShard hangs the shard that a segment's index is read from first.
func TestAnIndexIsHadFromTheNextShard(t *testing.T) {
	s := build(t, BuildOptions{ID: 6, Epoch: 1, K: 2, M: 1}, randomExtents(seeded(t), 40, 2), nil)
	synctest.Test(t, func(t *testing.T) {
		stores := newTargets(3)
		stores.put(s)
		stores[6%3].gate = hang
		r := NewReader(ReaderOptions{Targets: stores.get})
		defer r.Close()
		start := time.Now()
		if _, err := r.Index(t.Context(), s.Info); err != nil || time.Since(start) != stallTime {
			t.Fatalf("%v after %v", err, time.Since(start))
		}
	})
}

// TestTwoShardsHang rebuilds with two shards that never answer, one of them among the k asked first.
func TestTwoShardsHang(t *testing.T) {
	list := randomExtents(seeded(t), 40, 2)
	s := build(t, BuildOptions{ID: 6, Epoch: 1, K: 2, M: 2}, list, nil)
	synctest.Test(t, func(t *testing.T) {
		stores := newTargets(4)
		stores.put(s)
		stores[0].gate, stores[1].gate = hang, hang
		r := NewReader(ReaderOptions{Targets: stores.get})
		defer r.Close()
		r.Remember(s.Info, s.Index)
		slot := slotsIn(s, 0)[0]
		for i := range 5 {
			start := time.Now()
			data, e, err := r.Extent(t.Context(), s.Info, slot)
			if err := errors.Join(err, list[slot].check(data, e)); err != nil {
				t.Fatal(err)
			}
			if d, want := time.Since(start), max(0, 2*stallTime*time.Duration(min(1, failsMax-i))); d != want {
				t.Errorf("read %d took %v, want %v", i, d, want)
			}
		}
	})
}

// memIndexes is an IndexStore in memory.
type memIndexes map[block.SegmentID][]byte

func (m memIndexes) LoadIndex(id block.SegmentID, bytes int) []byte {
	if b := m[id]; len(b) == bytes {
		return b
	}
	return nil
}
func (m memIndexes) SaveIndex(id block.SegmentID, b []byte) { m[id] = slices.Clone(b) }

// TestAnIndexIsFetchedOnceForEver reads a segment with readers that share nothing but an IndexStore.
func TestAnIndexIsFetchedOnceForEver(t *testing.T) {
	list := randomExtents(seeded(t), 40, 2)
	s := build(t, BuildOptions{ID: 6, Epoch: 1, K: 2, M: 1}, list, nil)
	stores := newTargets(3)
	stores.put(s)
	kept := memIndexes{}
	read := func(r *Reader, want int) {
		t.Helper()
		data, e, err := r.Extent(t.Context(), s.Info, 7)
		if err := errors.Join(err, list[7].check(data, e)); err != nil {
			t.Fatal(err)
		}
		if n := stores.reads(); n != want {
			t.Errorf("%d requests, want %d", n, want)
		}
	}
	read(NewReader(ReaderOptions{Targets: stores.get, Indexes: kept}), 2)
	read(NewReader(ReaderOptions{Targets: stores.get, Indexes: kept}), 1)
	kept[6][100] ^= 1
	read(NewReader(ReaderOptions{Targets: stores.get, Indexes: kept}), 2) // damage is a miss, and mended
	read(NewReader(ReaderOptions{Targets: stores.get, Indexes: kept}), 1)
	clear(kept)
	r := NewReader(ReaderOptions{Targets: stores.get, Indexes: kept})
	r.Remember(s.Info, s.Index)
	if len(kept) != 0 {
		t.Error("an index was kept before its first use")
	}
	read(r, 1)
	read(NewReader(ReaderOptions{Targets: stores.get, Indexes: kept}), 1)
}

// TestP95 compares with the definition.
func TestP95(t *testing.T) {
	var w window
	for i := range windowMin - 1 {
		w.add(time.Duration(i))
	}
	if w.p95 != 0 {
		t.Error("a p95 of too few reads")
	}
	for range 10*windowReads + 1 { // so that the last one below is one after which the p95 is taken
		w.add(time.Duration(1 + rand.IntN(1e6)))
	}
	for i := range windowReads {
		w.add(time.Duration(i + 1))
	}
	if w.p95 != 61 { // 61 of 64 are 95 %
		t.Errorf("p95 of 1..64 is %d", w.p95)
	}
	for n, want := range map[int]int{0: 0, 1: 0, 16 << 10: 0, 16<<10 + 1: 1, 64 << 10: 1, 64<<10 + 1: 2, 256 << 10: 2, 1 << 20: 3, 1<<20 + 1: 4, 4 << 20: 4} {
		if sizeClass(n) != want {
			t.Errorf("%d bytes are of class %d, want %d", n, sizeClass(n), want)
		}
	}
	var h health
	for range 3 {
		h.note(1, 0, &backend.Error{Class: backend.NotFound}, false)
	}
	if h.fails != 0 {
		t.Error("an object that is not there made its target sick")
	}
}
