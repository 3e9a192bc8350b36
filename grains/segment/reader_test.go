package segment

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"

	"graindisk/backend"
	"graindisk/block"
)

// TestEveryProfile writes and reads a segment in each profile, whole and with every single shard lost.
func TestEveryProfile(t *testing.T) {
	ctx, rng := t.Context(), seeded(t)
	for k := uint8(1); k <= KMax; k++ {
		for m := uint8(0); m <= MMax; m++ {
			list := randomExtents(rng, 1+rng.IntN(40), 4)
			s := build(t, BuildOptions{ID: 300, Epoch: 7, K: k, M: m}, list, nil)
			for n, b := range s.Shards {
				if _, err := OpenShard(b); err != nil {
					t.Fatalf("%d+%d shard %d: %v", k, m, n, err)
				}
				if k == 1 && !bytes.Equal(b[HeaderBytes:s.Info.indexOffset()], s.Shards[0][HeaderBytes:s.Info.indexOffset()]) {
					t.Fatalf("1+%d: shard %d is no copy", m, n)
				}
			}
			stores := newTargets(s.Info.Shards())
			stores.put(s)
			if err := readAll(ctx, NewReader(ReaderOptions{Targets: stores.get, Pool: testPool}), s.Info, list); err != nil {
				t.Fatalf("%d+%d: %v", k, m, err)
			}
			for lost := range s.Info.Shards() {
				stores[lost].fail = errors.New("gone")
				r := NewReader(ReaderOptions{Targets: stores.get})
				r.Remember(s.Info, s.Index)
				err := readAll(ctx, r, s.Info, list)
				inUse := slices.ContainsFunc(s.Index.Entries, func(e Entry) bool { return int(e.Shard) == lost })
				if (m > 0 || !inUse) != (err == nil) {
					t.Fatalf("%d+%d without shard %d: %v", k, m, lost, err)
				}
				stores[lost].fail = nil
			}
		}
	}
}

// TestEveryLoss takes away or damages every choice of m shards, in every mixture of the two, and then
// one shard more.
func TestEveryLoss(t *testing.T) {
	ctx, rng := t.Context(), seeded(t)
	for _, p := range [][2]uint8{{1, 1}, {2, 1}, {2, 2}, {3, 2}, {4, 2}, {1, 4}, {3, 4}} {
		k, m := p[0], p[1]
		list := randomExtents(rng, 3*int(k), 3)
		s := build(t, BuildOptions{ID: 5, Epoch: 1, K: k, M: m}, list, nil)
		n := int(k + m)
		losses(n, int(m), func(lost []int) {
			for damaged := range 1 << len(lost) {
				stores := newTargets(n)
				stores.put(s)
				for i, shard := range lost {
					if damaged>>i&1 == 0 {
						delete(stores[shard].objects, s.Info.Key(shard))
						continue
					}
					for off := HeaderBytes + 17; off < int(s.Info.ObjectBytes()); off += 256 { // every extent, index and all
						stores.flip(s.Info, shard, int64(off))
					}
				}
				var reported sync.Map
				r := NewReader(ReaderOptions{Targets: stores.get, OnDegraded: func(_ block.SegmentID, shard int, err error) { reported.Store(shard, err) }})
				if err := readAll(ctx, r, s.Info, list); err != nil {
					t.Fatalf("%d+%d without %v, damaged %b: %v", k, m, lost, damaged, err)
				}
				for shard := range n {
					if _, ok := reported.Load(shard); ok && !slices.Contains(lost, shard) {
						t.Fatalf("%d+%d without %v: intact shard %d reported", k, m, lost, shard)
					}
				}
			}
		})
		losses(n, int(m)+1, func(lost []int) {
			stores := newTargets(n)
			stores.put(s)
			for _, shard := range lost {
				delete(stores[shard].objects, s.Info.Key(shard))
			}
			r := NewReader(ReaderOptions{Targets: stores.get})
			slot := slices.IndexFunc(s.Index.Entries, func(e Entry) bool { return slices.Contains(lost, int(e.Shard)) })
			if slot < 0 { // only parity was lost
				return
			}
			if _, _, err := r.Extent(ctx, s.Info, slot); !errors.Is(err, backend.ErrNotFound) || errors.Is(err, ErrDamaged) {
				t.Fatalf("%d+%d without %v: %v", k, m, lost, err)
			}
		})
	}
}

func TestRequestCounts(t *testing.T) {
	ctx := t.Context()
	list := randomExtents(seeded(t), 64, 2)
	s := build(t, BuildOptions{ID: 9, Epoch: 1, K: 4, M: 2}, list, nil)
	stores := newTargets(6)
	stores.put(s)
	r := NewReader(ReaderOptions{Targets: stores.get})
	expect := func(what string, slot, want int) {
		t.Helper()
		data, e, err := r.Extent(ctx, s.Info, slot)
		if err == nil {
			err = list[slot].check(data, e)
		}
		if got := stores.reads(); err != nil || got != want {
			t.Fatalf("%s: %d requests, want %d; %v", what, got, want, err)
		}
	}
	expect("first read: index and extent", 3, 2)
	expect("second read", 60, 1)
	stores[s.Index.Entries[60].Shard].fail = errors.New("away")
	expect("its shard away: k others", 60, 1+4)
	stores[s.Index.Entries[60].Shard].fail = nil
	r = NewReader(ReaderOptions{Targets: stores.get})
	r.Remember(s.Info, s.Index)
	expect("index remembered", 0, 1)
	if _, err := r.Index(ctx, s.Info); err != nil || stores.reads() != 0 {
		t.Fatal("a cached index costs a request")
	}
	if err := readAll(ctx, r, s.Info, list); err != nil || stores.reads() != 4 {
		t.Fatalf("whole segment: not one request per data shard; %v", err)
	}
}

// TestPlan checks which slots share a request.
func TestPlan(t *testing.T) {
	const grain = 16 * block.Size
	var list []extent
	for i := range 200 {
		list = append(list, extent{disk: 1, lba: block.LBA(i * 16), blocks: 16, data: make([]byte, grain)})
	}
	s := build(t, BuildOptions{ID: 1, K: 2, M: 1}, list, nil) // 100 grains of 64 KiB per shard
	for _, c := range []struct {
		name  string
		slots []int
		want  string
	}{
		{"one", []int{5}, "0:5-6"},
		{"nothing", nil, ""},
		{"neighbours in any order", []int{7, 5, 6}, "0:5-8"},
		{"the same twice", []int{5, 5}, "0:5-6"},
		{"a gap of 128 KiB is read over", []int{5, 8}, "0:5-9"},
		{"a gap of 192 KiB is not", []int{5, 9}, "0:5-6 0:9-10"},
		{"two shards", []int{99, 100}, "0:99-100 1:0-1"},
		{"4 MiB is the most", func() (all []int) {
			for i := range 100 {
				all = append(all, i)
			}
			return
		}(), "0:0-64 0:64-100"},
	} {
		runs, err := plan(s.Index, c.slots)
		var got []string
		for _, r := range runs {
			got = append(got, fmt.Sprintf("%d:%d-%d", r.shard, r.off/grain, (r.off+r.n)/grain))
		}
		if g := strings.Join(got, " "); err != nil || g != c.want {
			t.Errorf("%s: %q, want %q; %v", c.name, g, c.want, err)
		}
	}
	if _, err := plan(s.Index, []int{200}); !errors.Is(err, ErrDamaged) {
		t.Errorf("slot past the end: %v", err)
	}
	x := *s.Index
	x.Entries = slices.Clone(x.Entries)
	x.Entries[3].Codec = codecs
	if _, err := plan(&x, []int{3}); !errors.Is(err, ErrNewer) {
		t.Errorf("unknown codec: %v", err)
	}
}

// TestVerdicts checks what callers are told when the shards do not suffice.
func TestVerdicts(t *testing.T) {
	ctx := t.Context()
	list := randomExtents(seeded(t), 12, 3)
	s := build(t, BuildOptions{ID: 77, Epoch: 3, K: 2, M: 1}, list, nil)
	away := &backend.Error{Op: "read", Class: backend.Transient}
	for _, c := range []struct {
		name              string
		break_            func(targets)
		notFound, damaged bool
		transient         bool
	}{
		{"all gone", func(x targets) {
			for i := range x {
				clear(x[i].objects)
			}
		}, true, false, false},
		{"all away", func(x targets) { x[0].fail, x[1].fail, x[2].fail = away, away, away }, false, false, true},
		{"one gone, one away", func(x targets) { clear(x[0].objects); x[1].fail = away }, false, false, true},
		{"one damaged, one away", func(x targets) { x.flip(s.Info, 0, HeaderBytes+1); x[2].fail = away }, false, false, true},
		{"two damaged", func(x targets) { x.flip(s.Info, 0, HeaderBytes+1); x.flip(s.Info, 1, HeaderBytes+1) }, false, true, false},
		{"one damaged, one gone", func(x targets) { x.flip(s.Info, 0, HeaderBytes+1); clear(x[1].objects) }, true, true, false},
		{"one damaged, one cut short", func(x targets) {
			x.flip(s.Info, 0, HeaderBytes+1)
			x[1].objects[s.Info.Key(1)] = make([]byte, 100)
		}, false, true, false},
	} {
		stores := newTargets(3)
		stores.put(s)
		c.break_(stores)
		r := NewReader(ReaderOptions{Targets: stores.get})
		r.Remember(s.Info, s.Index)
		_, _, err := r.Extent(ctx, s.Info, 0)
		var be *backend.Error
		transient := errors.As(err, &be) && be.Class == backend.Transient
		if err == nil || errors.Is(err, backend.ErrNotFound) != c.notFound || errors.Is(err, ErrDamaged) != c.damaged || transient != c.transient {
			t.Errorf("%s: %v", c.name, err)
		}
	}
}

// TestOneBadPieceFailsAlone damages one extent beyond repair and expects all others.
func TestOneBadPieceFailsAlone(t *testing.T) {
	list := randomExtents(seeded(t), 30, 3)
	s := build(t, BuildOptions{ID: 8, K: 2, M: 1}, list, nil)
	stores := newTargets(3)
	stores.put(s)
	e := s.Index.Entries[4]
	for shard := range 3 {
		if shard == int(e.Shard) || shard == 2 {
			stores.flip(s.Info, shard, HeaderBytes+int64(e.Offset)+99)
		}
	}
	r := NewReader(ReaderOptions{Targets: stores.get})
	var got []int
	all := make([]int, len(list))
	for i := range all {
		all[i] = i
	}
	err := r.Extents(t.Context(), s.Info, all, func(slot int, data []byte, e Entry) error {
		got = append(got, slot)
		return list[slot].check(data, e)
	})
	slices.Sort(got)
	if !errors.Is(err, ErrDamaged) || !slices.Equal(got, slices.Delete(all, 4, 5)) {
		t.Fatalf("delivered %v; %v", got, err)
	}
	stop := errors.New("enough")
	if err := r.Extents(t.Context(), s.Info, []int{0, 1, 2}, func(int, []byte, Entry) error { return stop }); err != stop {
		t.Fatalf("error of fn: %v", err)
	}
}

// TestAnotherObject serves other segments' bytes in the place of the right ones.
func TestAnotherObject(t *testing.T) {
	ctx := t.Context()
	list := randomExtents(seeded(t), 20, 1)
	other := slices.Clone(list) // the same places, so that all lengths agree
	for i := range other {
		other[i].data = bytes.Repeat([]byte{byte(i)}, block.Size)
	}
	right := build(t, BuildOptions{ID: 1, Epoch: 4, K: 2, M: 1}, list, nil)
	for _, wrong := range []BuildOptions{{ID: 2, Epoch: 4, K: 2, M: 1}, {ID: 1, Epoch: 5, K: 2, M: 1}} {
		s := build(t, wrong, other, nil)
		stores := newTargets(3)
		stores.put(right)
		stores[0].objects[right.Info.Key(0)] = s.Shards[0]
		degraded := 0
		r := NewReader(ReaderOptions{Targets: stores.get, OnDegraded: func(block.SegmentID, int, error) { degraded++ }})
		r.Remember(right.Info, right.Index)
		if err := readAll(ctx, r, right.Info, list); err != nil || degraded == 0 {
			t.Fatalf("data of segment %d epoch %d passed (%d reports): %v", wrong.ID, wrong.Epoch, degraded, err)
		}
		for n := range stores { // the index, too
			stores[n].objects[right.Info.Key(n)] = s.Shards[n]
		}
		if _, err := NewReader(ReaderOptions{Targets: stores.get}).Index(ctx, right.Info); !errors.Is(err, ErrDamaged) {
			t.Fatalf("index of segment %d epoch %d passed: %v", wrong.ID, wrong.Epoch, err)
		}
	}
	stores := newTargets(3)
	stores.put(right)
	if _, err := NewReader(ReaderOptions{Targets: stores.get, Pool: [16]byte{1}}).Index(ctx, right.Info); !errors.Is(err, ErrDamaged) {
		t.Fatalf("index of another pool: %v", err)
	}
}

// TestIndexIsFetchedOnce lets many readers ask at once; the first gives up and another takes over.
func TestIndexIsFetchedOnce(t *testing.T) {
	list := randomExtents(seeded(t), 10, 2)
	s := build(t, BuildOptions{ID: 3, K: 1, M: 1}, list, nil)
	synctest.Test(t, func(t *testing.T) {
		stores := newTargets(2)
		stores.put(s)
		release := make(chan struct{})
		gate := func(ctx context.Context, _ int64) error {
			select {
			case <-release:
				return nil
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		stores[0].gate, stores[1].gate = gate, gate
		r := NewReader(ReaderOptions{Targets: stores.get})
		first, cancel := context.WithCancelCause(t.Context())
		reason := errors.New("client left")
		var wg sync.WaitGroup
		wg.Go(func() {
			if _, err := r.Index(first, s.Info); !errors.Is(err, reason) {
				t.Errorf("cancelled leader: %v", err)
			}
		})
		synctest.Wait() // it is at the gate
		for range 20 {
			wg.Go(func() {
				if x, err := r.Index(t.Context(), s.Info); err != nil || len(x.Entries) != len(list) {
					t.Errorf("follower: %v", err)
				}
			})
		}
		synctest.Wait() // all wait for the first
		cancel(reason)
		synctest.Wait() // one of them is at the gate, the others wait for it
		close(release)
		wg.Wait()
		if n := stores.reads(); n != 1 {
			t.Errorf("%d reads of the index completed", n)
		}
	})
}

// TestIndexCacheIsBounded counts bytes, evicts the oldest and always keeps the last.
func TestIndexCacheIsBounded(t *testing.T) {
	ctx, rng := t.Context(), seeded(t)
	stores := newTargets(1)
	var infos []Info
	var one int64
	for id := range 5 {
		s := build(t, BuildOptions{ID: block.SegmentID(id + 1), K: 1}, randomExtents(rng, 50, 1), nil)
		stores.put(s)
		infos = append(infos, s.Info)
		one = s.Index.memBytes()
	}
	r := NewReader(ReaderOptions{Targets: stores.get, IndexCacheBytes: 3 * one})
	load := func(i int) int {
		if _, err := r.Index(ctx, infos[i]); err != nil {
			t.Fatal(err)
		}
		return stores.reads()
	}
	for i := range infos {
		load(i)
	}
	if load(4)+load(3)+load(2) != 0 || load(0) != 1 || r.indexBytes != 3*one {
		t.Fatalf("the three last used are not what is cached, in %d bytes", r.indexBytes)
	}
	r.o.IndexCacheBytes = 1
	if load(1) != 1 || load(1) != 0 || r.indexes.Len() != 1 || r.indexBytes != one {
		t.Fatalf("%d indexes in %d bytes", r.indexes.Len(), r.indexBytes)
	}
}

func TestDegradedSegment(t *testing.T) {
	list := randomExtents(seeded(t), 20, 2)
	s := build(t, BuildOptions{ID: 2, K: 2, M: 1}, list, nil)
	stores := newTargets(3)
	stores.put(s)
	info := s.Info
	info.Targets = []block.TargetID{0, 2, 3} // shard 0 was never stored
	r := NewReader(ReaderOptions{Targets: stores.get, OnDegraded: func(_ block.SegmentID, shard int, err error) { t.Errorf("shard %d reported: %v", shard, err) }})
	if err := readAll(t.Context(), r, info, list); err != nil || stores[0].reads != 0 {
		t.Fatalf("%d reads of a shard that is not there: %v", stores[0].reads, err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, _, err := r.Extent(ctx, info, 0); !errors.Is(err, context.Canceled) {
		t.Fatalf("cancelled read: %v", err)
	}
}
