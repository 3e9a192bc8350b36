package pool

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"testing/synctest"

	"graindisk/backend"
	"graindisk/grains/segment"
	"graindisk/pool/root"
	"graindisk/vdisk"
)

// loseRoot deletes what a rebuild must do without.
func (r *rig) loseRoot() {
	r.t.Helper()
	for _, m := range r.memory {
		for _, key := range m.Keys() {
			if !strings.HasPrefix(key, "seg/") {
				if err := m.Delete(context.Background(), key); err != nil {
					r.t.Fatal(err)
				}
			}
		}
	}
}

// rebuild makes the root anew and opens the pool on a new host.
func (r *rig) rebuild(ro RebuildOptions) *RebuildReport {
	r.t.Helper()
	r.newHost()
	rep, err := Rebuild(context.Background(), r.options(false), ro)
	if err != nil {
		r.t.Fatal(err)
	}
	if !rep.Restored {
		r.t.Fatalf("nothing was restored: %+v", rep)
	}
	r.open(false)
	return rep
}

// expectCounts compares the usage table with a recount.
func (r *rig) expectCounts() {
	r.t.Helper()
	rep, err := r.pool.CheckUsage(r.t.Context())
	if err != nil || len(rep.Leaks)+len(rep.Low) > 0 {
		r.t.Errorf("usage: %+v, %v", rep, err)
	}
}

// A history is a pool in use: several disks, written, trimmed and created by one client, by owner after owner,
// each of which dies. What every cut of every owner holds is kept.
type diskHistory struct {
	*rig
	rng   *rand.Rand
	names []string
	now   map[string][]byte
	cuts  map[[2]uint64]map[string][]byte // by epoch and cut
	// The cut that a rebuild must bring back: the newest committed one, or one above it that is complete.
	epoch, cut uint64
	frail      bool // that cut is there, but not twice
}

func (h *diskHistory) snapshot() map[string][]byte {
	s := map[string][]byte{}
	for n, b := range h.now {
		s[n] = slices.Clone(b)
	}
	return s
}

// work makes a few changes.
func (h *diskHistory) work() {
	h.t.Helper()
	if len(h.now) == 0 || len(h.now) < 4 && h.rng.IntN(3) == 0 {
		name := fmt.Sprintf("d%d", len(h.now))
		size := (1 + h.rng.IntN(3)) << 20
		h.disk(name, int64(size))
		h.now[name], h.names = make([]byte, size), append(h.names, name)
	}
	for range 1 + h.rng.IntN(16) {
		name := h.names[h.rng.IntN(len(h.names))]
		d, m := h.disk(name, 0), h.now[name]
		n := 1 + h.rng.IntN(200<<10)
		off := h.rng.IntN(len(m) - n)
		if h.rng.IntN(3) == 0 {
			if err := d.Write(context.Background(), []vdisk.Op{{Kind: vdisk.OpZero, Off: int64(off), Len: int64(n)}}, false); err != nil {
				h.t.Fatal(err)
			}
			clear(m[off:][:n])
			continue
		}
		p := make([]byte, n)
		for i := range p {
			p[i] = byte(h.rng.Uint32())
		}
		copy(m[off:], p)
		h.write(d, int64(off), p)
	}
}

// commit publishes a cut.
func (h *diskHistory) commit() {
	h.t.Helper()
	h.publish()
	h.took(h.pool.value().Cut)
}

func (h *diskHistory) took(cut uint64) {
	h.epoch, h.cut, h.frail = h.pool.epoch.Load(), cut, false
	h.cuts[[2]uint64{h.epoch, cut}] = h.snapshot()
}

// die ends the owner's life in one of the ways in which owners die.
func (h *diskHistory) die() {
	h.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), putTimeout*10)
	defer cancel()
	how := h.rng.IntN(4)
	for _, st := range h.stores {
		st.Before = func(op, key string) error {
			switch {
			case op != "put":
				return nil
			case how >= 1 && key == root.Key: // the cut is stored and never committed
			case !strings.HasPrefix(key, "seg/"), how < 2, how == 2 && h.stores[0] == st:
				return nil
			} // of each segment at most one shard is stored, or none
			return &backend.Error{Op: op, Key: key, Store: "t", Class: backend.Transient}
		}
	}
	cut := h.pool.value().Cut + 1
	h.work()
	done := make(chan error)
	go func() { done <- h.pool.Publish(ctx) }()
	if how == 0 {
		if err := <-done; err != nil {
			h.t.Fatal(err)
		}
		h.took(cut)
	} else {
		synctest.Wait() // as far as it gets without its root
		switch recorded, complete := h.stored(h.pool.epoch.Load(), cut); {
		case complete:
			h.took(cut)
			h.frail = how == 2
		case recorded: // this owner found the cut before committed
			h.epoch, h.cut, h.frail = h.newest(cut-1), cut-1, false
		}
	}
	h.abandon()
	if how > 0 {
		<-done
	}
	for _, st := range h.stores {
		st.Before = nil
	}
	// A new owner takes over what is committed.
	h.newHost()
	h.open(true)
	cut = h.pool.value().Cut
	h.now = h.cuts[[2]uint64{h.newest(cut), cut}]
	h.now = h.snapshot()
	h.names = slices.Sorted(maps.Keys(h.now))
}

// newest is the epoch that committed a cut: of those that made one of its number the highest.
func (h *diskHistory) newest(cut uint64) (epoch uint64) {
	for c := range h.cuts {
		if c[1] == cut {
			epoch = max(epoch, c[0])
		}
	}
	return epoch
}

// stored looks whether any shard has the record of a cut, and whether k shards of all its segments are there.
func (h *diskHistory) stored(epoch, cut uint64) (recorded, complete bool) {
	shards, k := map[segKey]int{}, map[segKey]int{}
	var need []segKey
	for _, m := range h.memory {
		for key, body := range m.Objects() {
			id, _, _, ok := segment.ParseKey(key)
			if !ok {
				continue
			}
			sh, err := segment.OpenShard(body)
			if err != nil {
				h.t.Fatal(err)
			}
			s := segKey{id, sh.Trailer.Info.Epoch}
			shards[s]++
			k[s] = int(sh.Trailer.Info.K)
			if c := sh.Cut; c != nil && c.Epoch == epoch && c.Cut == cut {
				recorded, need = true, append(need[:0], s)
				for _, i := range c.Segments {
					need = append(need, segKey{i.ID, i.Epoch})
				}
			}
		}
	}
	return recorded, recorded && !slices.ContainsFunc(need, func(s segKey) bool { return shards[s] == 0 || shards[s] < k[s] })
}

// hurt takes away what may be lost: a target, or a shard of each segment, and damages index, record or trailer
// of others.
func (h *diskHistory) hurt() (how string) {
	switch n := h.rng.IntN(6); {
	case h.frail || n == 0:
		return "nothing lost"
	case n == 1:
		i := h.rng.IntN(3)
		h.memory[i].Wipe()
		return fmt.Sprintf("target %d wiped", i)
	case n == 2:
		i := h.rng.IntN(3)
		h.memory, h.stores = slices.Delete(h.memory, i, i+1), slices.Delete(h.stores, i, i+1)
		return fmt.Sprintf("target %d gone", i)
	case n == 3:
		h.memory[0], h.memory[2] = h.memory[2], h.memory[0]
		h.stores[0], h.stores[2] = h.stores[2], h.stores[0]
		return "two targets have changed places"
	case n == 4:
		for key, b := range h.memory[0].Objects() {
			if strings.HasPrefix(key, "seg/") {
				if _, err := h.memory[1].Put(context.Background(), key, b, backend.Cond{}); err != nil {
					h.t.Fatal(err)
				}
			}
		}
		h.memory[0].Wipe()
		return "all of a target was moved to another"
	}
	shards := map[segKey][]int{}
	for i, m := range h.memory {
		for _, key := range m.Keys() {
			if id, epoch, _, ok := segment.ParseKey(key); ok {
				shards[segKey{id, epoch}] = append(shards[segKey{id, epoch}], i)
			}
		}
	}
	for k, at := range shards {
		if len(at) < 2 { // never complete
			continue
		}
		m := h.memory[at[h.rng.IntN(len(at))]]
		for _, key := range m.Keys() {
			if id, epoch, _, ok := segment.ParseKey(key); !ok || (segKey{id, epoch}) != k {
				continue
			}
			if h.rng.IntN(2) == 0 {
				_ = m.Delete(context.Background(), key)
			} else {
				at := h.rng.IntN(600)
				m.Damage(key, func(b []byte) []byte { b[len(b)-1-at%len(b)] ^= 4; return b })
			}
		}
	}
	return "a shard of each segment lost or damaged"
}

// TestRebuildAfterRandomHistories loses the root of pools with random histories and compares every disk with
// what it held in the cut that comes back, which is never older than the newest that was committed.
func TestRebuildAfterRandomHistories(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	for i := range uint64(4) {
		t.Run(fmt.Sprint(i), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { rebuildHistory(t, rand.New(rand.NewPCG(seed, i))) })
		})
	}
}

func rebuildHistory(t *testing.T, rng *rand.Rand) {
	h := &diskHistory{rng: rng, now: map[string][]byte{}, cuts: map[[2]uint64]map[string][]byte{}}
	h.rig = newRig(t, func(o *Options) { o.CheckpointCuts, o.mapLevel0, o.mapRun, o.SegmentBytes = 3, 64, 32, 1280<<10 })
	for range 2 + rng.IntN(3) {
		for range 1 + rng.IntN(4) {
			h.work()
			h.commit()
		}
		h.die()
	}
	committed := h.pool.value().Cut
	h.abandon()
	how := h.hurt()
	h.loseRoot()
	rep := h.rebuild(RebuildOptions{})
	t.Logf("%s: cut %d of epoch %d came back, %d was committed: %+v", how, rep.Cut, rep.CutEpoch, committed, rep)
	if rep.Cut != h.cut || rep.CutEpoch != h.epoch || rep.Cut < committed {
		t.Fatalf("cut %d of epoch %d came back, want cut %d of epoch %d; %d is committed", rep.Cut, rep.CutEpoch, h.cut, h.epoch, committed)
	}
	h.now = h.cuts[[2]uint64{h.epoch, h.cut}]
	h.expectAll(rep)
	h.placed()
	for _, m := range h.memory {
		for _, key := range m.Keys() {
			if id, _, _, ok := segment.ParseKey(key); ok && uint64(id)+segReserve > h.pool.value().SegLimit {
				t.Errorf("segment %d is there, and numbers from %d on are free", id, h.pool.value().SegLimit)
			}
		}
	}
	// The pool goes on: its cuts, its next owner, and the next rebuild.
	h.names = slices.Sorted(maps.Keys(h.now))
	for range 3 {
		h.work()
		h.commit()
	}
	h.abandon()
	h.loseRoot()
	rep = h.rebuild(RebuildOptions{})
	if rep.Cut != h.cut || rep.CutEpoch != h.epoch {
		t.Fatalf("the second time cut %d of epoch %d came back, want cut %d of epoch %d", rep.Cut, rep.CutEpoch, h.cut, h.epoch)
	}
	h.expectAll(rep)
	h.noNumberTwice()
	h.placed()
	if names, err := h.fs.ReadDir("/host/tier.rebuild"); err != nil || len(names) > 0 {
		t.Errorf("scratch space holds %v, %v", names, err)
	}
}

// placed expects every shard that is stored to be where the pool looks for it, and no other to be looked for.
func (h *diskHistory) placed() {
	h.t.Helper()
	for _, info := range h.pool.segments {
		for shard, t := range info.Targets {
			found := 0
			for i, m := range h.memory {
				if !slices.Contains(m.Keys(), info.Key(shard)) {
					continue
				}
				found++
				if h.pool.targetName(t) == fmt.Sprintf("t%d", i) {
					found = -9
				}
			}
			if found > 0 || found == 0 && t != 0 {
				h.t.Errorf("segment %d shard %d is not at target %d (%s), but at %d others", info.ID, shard, t, h.pool.targetName(t), found)
			}
		}
	}
}

// noNumberTwice expects that no segment number was used by two tenures, orphans included.
func (h *diskHistory) noNumberTwice() {
	h.t.Helper()
	epochs := map[uint64]uint64{}
	for _, m := range h.memory {
		for _, key := range m.Keys() {
			id, epoch, _, ok := segment.ParseKey(key)
			if e, used := epochs[uint64(id)]; ok && used && e != epoch {
				h.t.Errorf("segment %d is of epoch %d and of epoch %d", id, e, epoch)
			}
			if ok {
				epochs[uint64(id)] = epoch
			}
		}
	}
}

// expectAll compares all disks with the model.
func (h *diskHistory) expectAll(rep *RebuildReport) {
	h.t.Helper()
	if len(rep.Disks) != len(h.now) || len(h.pool.Disks()) != len(h.now) {
		h.t.Fatalf("disks %v came back, want %d", rep.Disks, len(h.now))
	}
	for _, d := range rep.Disks {
		if int(d.SizeBytes) != len(h.now[d.Name]) {
			h.t.Errorf("disk %s has %d bytes, want %d", d.Name, d.SizeBytes, len(h.now[d.Name]))
		}
		h.expect(h.disk(d.Name, 0), h.now[d.Name])
	}
	h.expectCounts()
}

// TestRebuildRefusesWhereARootIs asks for a rebuild while one target holds a copy, readable or not, or does not answer.
func TestRebuildRefusesWhereARootIs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, nil)
		model := make([]byte, testDisk)
		r.scribble(r.disk("d", testDisk), model, 20)
		r.publish()
		r.abandon()
		copyOfRoot := r.memory[1].Objects()[root.Key]
		r.loseRoot()
		refused := func(want error) {
			t.Helper()
			before := r.memory[0].Keys()
			rep, err := Rebuild(t.Context(), r.options(false), RebuildOptions{})
			if !errors.Is(err, want) || rep != nil {
				t.Errorf("%+v, %v, want %v", rep, err, want)
			}
			if !slices.Equal(r.memory[0].Keys(), before) {
				t.Error("a refused rebuild has written")
			}
		}
		put := func(body []byte) {
			if _, err := r.memory[1].Put(t.Context(), root.Key, body, backend.Cond{}); err != nil {
				t.Fatal(err)
			}
		}
		put(copyOfRoot)
		refused(root.ErrExists)
		put([]byte("no root"))
		refused(root.ErrDamaged)
		r.loseRoot()
		r.stores[1].SetOffline(true)
		if _, err := Rebuild(t.Context(), r.options(false), RebuildOptions{}); err == nil || !strings.Contains(err.Error(), "take one that is gone for good out") {
			t.Errorf("with a target away: %v", err)
		}
		r.stores[1].SetOffline(false)
		rep, err := Rebuild(t.Context(), r.options(false), RebuildOptions{DryRun: true})
		if err != nil || rep.Restored || rep.Cut != 1 || len(rep.Disks) != 1 {
			t.Errorf("dry run: %+v, %v", rep, err)
		}
		for i, m := range r.memory {
			if slices.ContainsFunc(m.Keys(), func(k string) bool { return !strings.HasPrefix(k, "seg/") }) {
				t.Errorf("a dry run has written to target %d", i)
			}
		}
		r.rebuild(RebuildOptions{})
		r.expect(r.disk("d", testDisk), model)
		refused(root.ErrExists)
	})
}

// TestRebuildIsFinishedByTheNext cuts the putting of the root short after each copy.
func TestRebuildIsFinishedByTheNext(t *testing.T) {
	for there := range 3 {
		synctest.Test(t, func(t *testing.T) {
			r := newRig(t, nil)
			model := make([]byte, testDisk)
			r.scribble(r.disk("d", testDisk), model, 20)
			r.publish()
			r.abandon()
			r.loseRoot()
			r.newHost()
			for i, st := range r.stores {
				st.Before = func(op, key string) error {
					if op == "put" && key == root.Key && i >= there {
						return &backend.Error{Op: op, Key: key, Store: "t", Class: backend.Transient}
					}
					return nil
				}
			}
			rep, err := Rebuild(t.Context(), r.options(false), RebuildOptions{})
			if err == nil || rep.Restored {
				t.Fatalf("%+v, %v", rep, err)
			}
			for _, st := range r.stores {
				st.Before = nil
			}
			rep = r.rebuild(RebuildOptions{})
			if finished := len(rep.Notes) > 0; finished != (there > 0) {
				t.Errorf("with %d copies there: %q", there, rep.Notes)
			}
			r.expect(r.disk("d", testDisk), model)
		})
	}
}

// TestRebuildOfAnOlderCut loses all of one segment, takes the older cut that is offered, goes on from there, and
// expects the next rebuild to follow what was written since and not what was given up.
func TestRebuildOfAnOlderCut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, nil)
		model := make([]byte, testDisk)
		var before []byte
		for i := range 6 {
			r.scribble(r.disk("d", testDisk), model, 10)
			r.publish()
			if i == 2 {
				before = slices.Clone(model)
			}
		}
		lost := r.pool.value().Cuts[3].Segment.ID
		r.abandon()
		r.loseRoot()
		for _, m := range r.memory {
			for _, key := range m.Keys() {
				if id, _, _, ok := segment.ParseKey(key); ok && id == lost {
					if err := m.Delete(t.Context(), key); err != nil {
						t.Fatal(err)
					}
				}
			}
		}
		r.newHost()
		if rep, err := Rebuild(t.Context(), r.options(false), RebuildOptions{}); !errors.Is(err, segment.ErrDamaged) || !strings.Contains(err.Error(), "give --cut 3") {
			t.Fatalf("cut 4 is lost: %+v, %v", rep, err)
		}
		if rep, err := Rebuild(t.Context(), r.options(false), RebuildOptions{Cut: 5}); !errors.Is(err, segment.ErrDamaged) {
			t.Fatalf("cut 5 needs cut 4: %+v, %v", rep, err)
		}
		if rep, err := Rebuild(t.Context(), r.options(false), RebuildOptions{Cut: 7}); err == nil || errors.Is(err, segment.ErrDamaged) {
			t.Fatalf("there is no cut 7: %+v, %v", rep, err)
		}
		if rep := r.rebuild(RebuildOptions{Cut: 3}); rep.Cut != 3 {
			t.Fatalf("%+v", rep)
		}
		r.expect(r.disk("d", 0), before)
		r.scribble(r.disk("d", 0), before, 10)
		r.publish()
		r.abandon()
		r.loseRoot()
		if rep := r.rebuild(RebuildOptions{}); rep.Cut != 4 {
			t.Fatalf("%+v", rep)
		}
		r.expect(r.disk("d", 0), before)
	})
}
