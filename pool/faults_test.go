package pool

import (
	"context"
	"errors"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"graindisk/backend/adaptive"
	"graindisk/backend/backendtest"
	"graindisk/pool/root"
)

// TestNoFaultOfAStoreIsSeen lets one kind of fault befall the targets, all of them where they only fail and one of
// them where it answers falsely, while disks are written, published, and read by a host that has nothing of its own.
func TestNoFaultOfAStoreIsSeen(t *testing.T) {
	for _, c := range []struct {
		fault   backendtest.Fault
		rate    float64
		targets int
	}{
		{backendtest.Refused, 0.15, 3},
		{backendtest.Throttled, 0.15, 3},
		{backendtest.LostReply, 0.15, 3},
		{backendtest.Late, 0.15, 3},
		{backendtest.Delayed, 0.3, 3},
		{backendtest.Reset, 0.2, 3},
		{backendtest.Twice, 0.5, 3},
		{backendtest.Echo, 0.3, 3},
		{backendtest.Truncated, 0.5, 1},
		{backendtest.Flipped, 0.5, 1},
	} {
		t.Run(c.fault.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { testFault(t, c.fault, c.rate, c.targets) })
		})
	}
}

func testFault(t *testing.T, fault backendtest.Fault, rate float64, targets int) {
	r := newRig(t, func(o *Options) {
		for i := range o.Targets {
			o.Targets[i].Store = adaptive.New(o.Targets[i].Store, adaptive.Options{})
		}
	})
	for i, s := range r.stores {
		s.Delay = func(ctx context.Context, _, _ string) error {
			select {
			case <-time.After(rand.N(3 * time.Second)):
			case <-ctx.Done():
			}
			return nil
		}
		if i < targets {
			s.SetRates(backendtest.Rates{fault: rate})
		}
	}
	a, b := make([]byte, 3<<20), make([]byte, 2<<20)
	for round := range 5 {
		r.scribble(r.disk("a", int64(len(a))), a, 12)
		r.scribble(r.disk("b", int64(len(b))), b, 12)
		r.publish()
		if round%2 == 1 {
			r.abandon()
			r.newHost()
			r.open(true)
		}
		r.expect(r.disk("a", int64(len(a))), a)
		r.expect(r.disk("b", int64(len(b))), b)
	}
	hit := 0
	for _, s := range r.stores {
		hit += s.Injected()[fault]
	}
	t.Logf("%v befell %d requests", fault, hit)
	if hit < 5 {
		t.Errorf("the fault befell %d requests", hit)
	}
	if st := r.pool.Status(); st.State != "serving" || st.Error != "" || st.Space.DamagedSegments != 0 {
		t.Errorf("state %s, error %q, %+v", st.State, st.Error, st.Space)
	}
	switch fault {
	case backendtest.Echo, backendtest.Twice, backendtest.Delayed, backendtest.Reset: // every put of a shard took effect the first time
		r.expectNoDoubles()
	}
	for _, s := range r.stores { // what arrives twice or late must not be hanging about in a pool that is closed
		s.Settle()
	}
	r.abandon()
}

// expectNoDoubles expects that everything stored as a segment is one the pool knows, with all of its shards.
func (r *rig) expectNoDoubles() {
	r.t.Helper()
	names := map[string]int{}
	for _, m := range r.memory {
		for key := range m.Objects() {
			if name, _, ok := strings.Cut(key, "."); ok && strings.HasPrefix(key, "seg/") {
				names[name]++
			}
		}
	}
	if known := r.pool.Status().Segments; len(names) != known {
		r.t.Errorf("%d segments are stored, the pool knows %d", len(names), known)
	}
	for id, info := range r.infos() {
		if slices.Contains(info.Targets, 0) {
			r.t.Errorf("segment %d is without some of its shards: %v", id, info.Targets)
		}
	}
}

// TestASlowLineIsNoError has all targets at the end of one line with 2 s of latency and 256 KiB/s.
func TestASlowLineIsNoError(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		line := backendtest.NewLine(0, 0)
		r := newRig(t, func(o *Options) {
			for i := range o.Targets {
				o.Targets[i].Store = adaptive.New(backendtest.NewSlow(o.Targets[i].Store, line), adaptive.Options{})
			}
		})
		line.Set(2*time.Second, 256<<10)
		model := make([]byte, 2<<20)
		start := time.Now()
		r.scribble(r.disk("d", int64(len(model))), model, 30)
		if took := time.Since(start); took != 0 {
			t.Errorf("writes took %v of the store's time", took)
		}
		r.publish()
		if took := time.Since(start); took < 4*time.Second {
			t.Errorf("published after %v: the line is not slow", took)
		}
		r.abandon()
		r.newHost()
		r.open(true)
		r.expect(r.disk("d", int64(len(model))), model)
		r.abandon()
	})
}

// TestAStaleListMakesNoPool has the lists of all targets show nothing of a pool that is there.
func TestAStaleListMakesNoPool(t *testing.T) {
	r := newRig(t, nil)
	model := make([]byte, 1<<20)
	r.scribble(r.disk("d", int64(len(model))), model, 10)
	r.publish()
	r.abandon()
	for _, m := range r.memory {
		m.SetListLag(1 << 30)
		if objs, _, err := m.List(t.Context(), "", "", 1); err != nil || len(objs) != 0 {
			t.Fatalf("the list is not stale: %v, %v", objs, err)
		}
	}
	before := r.memory[0].Objects()
	r.newHost()
	if err := Create(t.Context(), r.options(false)); !errors.Is(err, root.ErrExists) {
		t.Errorf("create: %v", err)
	}
	if after := r.memory[0].Objects(); !slices.Equal(slices.Sorted(maps.Keys(before)), slices.Sorted(maps.Keys(after))) || string(before[root.Key]) != string(after[root.Key]) {
		t.Error("the refused creation changed the store")
	}
	r.open(true)
	r.expect(r.disk("d", int64(len(model))), model)
}
