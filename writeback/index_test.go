package writeback

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"

	"graindisk/block"
	"graindisk/tier"
)

// check tells what is wrong with the tree, counting everything anew.
func (t *runs) check() error {
	var bytes int64
	blocks, last := 0, block.LBA(0)
	if len(t.firsts) != len(t.nodes) {
		return fmt.Errorf("%d firsts of %d nodes", len(t.firsts), len(t.nodes))
	}
	for ni, n := range t.nodes {
		if len(n.leaves) == 0 || len(n.leaves) > nodeMax || len(n.firsts) != len(n.leaves) || n.firsts[0] != t.firsts[ni] {
			return fmt.Errorf("node %d: %d leaves, %d firsts, first %d and %d", ni, len(n.leaves), len(n.firsts), n.firsts[0], t.firsts[ni])
		}
		bytes += n.bytes()
		for li, l := range n.leaves {
			if len(l) == 0 || len(l) > leafMax || n.firsts[li] != l[0].lba() {
				return fmt.Errorf("leaf %d.%d: %d runs, begins at %d, said to at %d", ni, li, len(l), l[0].lba(), n.firsts[li])
			}
			bytes += int64(cap(l)) * runBytes
			for _, r := range l {
				if r.lba() < last {
					return fmt.Errorf("run at %d before %d", r.lba(), last)
				}
				blocks, last = blocks+r.blocks(), r.end()
			}
		}
	}
	if blocks != t.blocks || bytes != t.bytes {
		return fmt.Errorf("%d blocks in %d bytes, counted %d in %d", blocks, bytes, t.blocks, t.bytes)
	}
	return nil
}

// TestRunsMatchAFlatMap sets and clears at random, densely and sparsely, so that leaves and nodes come
// and go, and compares with a map.
func TestRunsMatchAFlatMap(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	for _, c := range []struct {
		name           string
		space          uint64
		longest, steps int
	}{
		{"dense", 600, 40, 4000},
		{"single blocks", 200_000, 1, 40_000},
		{"long", 600_000, 9000, 400},
		{"in order", 0, 3, 60_000},
	} {
		t.Run(c.name, func(t *testing.T) {
			rng := rand.New(rand.NewPCG(seed, 1))
			var tree runs
			model := map[block.LBA]tier.Place{}
			at := block.LBA(0)
			for i := range c.steps {
				n := 1 + rng.IntN(c.longest)
				lba, place := at, tier.NewPlace(i, 0)
				if c.space > 0 {
					lba = block.LBA(rng.Uint64N(c.space))
				}
				if at += block.LBA(n); rng.IntN(10) == 0 {
					place = tier.NewPlace(i-1, uint32(rng.IntN(5)))
				}
				if rng.IntN(8) < 5 || c.space == 0 && rng.IntN(9) > 0 {
					tree.set(lba, n, place)
					for k := range n {
						model[lba+block.LBA(k)] = place + tier.Place(k)
					}
				} else {
					if c.space > 0 && rng.IntN(40) == 0 {
						n *= int(c.space) / c.longest / 3 // much at once
					}
					tree.clear(lba, lba+block.LBA(n))
					for k := range min(n, 1<<20) {
						delete(model, lba+block.LBA(k))
					}
				}
				if i%(c.steps/10) == 0 || i < 40 {
					if err := tree.same(model, rng); err != nil {
						t.Fatalf("seed %d, step %d: %v", seed, i, err)
					}
				}
			}
			for len(tree.nodes) > 0 {
				for _, r := range tree.takeLeaf() {
					for k := range r.blocks() {
						if p, ok := model[r.lba()+block.LBA(k)]; !ok || p != r.place+tier.Place(k) {
							t.Fatalf("seed %d: taken: block %d at %d", seed, r.lba()+block.LBA(k), r.place)
						}
						delete(model, r.lba()+block.LBA(k))
					}
				}
			}
			if len(model) > 0 || tree.blocks != 0 || tree.bytes != 0 {
				t.Errorf("%d blocks were not taken; empty, the tree has %d blocks and %d bytes", len(model), tree.blocks, tree.bytes)
			}
		})
	}
}

func (t *runs) same(model map[block.LBA]tier.Place, rng *rand.Rand) error {
	if err := t.check(); err != nil {
		return err
	}
	n := 0
	var err error
	t.visit(0, lbaMax, func(r run) bool {
		for k := range r.blocks() {
			n++
			if p, ok := model[r.lba()+block.LBA(k)]; !ok || p != r.place+tier.Place(k) {
				err = fmt.Errorf("block %d at %d, want %d, %v", r.lba()+block.LBA(k), r.place+tier.Place(k), p, ok)
				return false
			}
		}
		return true
	})
	if err == nil && n != len(model) {
		err = fmt.Errorf("%d blocks, want %d", n, len(model))
	}
	for lba := range model { // some, at random
		from := lba - min(lba, block.LBA(rng.IntN(20)))
		to := lba + block.LBA(rng.IntN(20)) + 1
		seen := map[block.LBA]bool{}
		t.visit(from, to, func(r run) bool {
			for x := max(from, r.lba()); x < min(to, r.end()); x++ {
				seen[x] = true
			}
			return true
		})
		for x := from; x < to; x++ {
			if _, ok := model[x]; ok != seen[x] {
				return fmt.Errorf("looking at [%d, %d): block %d %v, want %v", from, to, x, seen[x], ok)
			}
		}
		if n--; n < len(model)-30 {
			break
		}
	}
	return err
}

// TestIndexMatchesAFlatOracle drives a log with random records, freezes, publications and checkpoints,
// and compares lookups, frozen views and counters with maps.
func TestIndexMatchesAFlatOracle(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 2))
	r := newRig(t, 64, 64)
	type oracle map[block.LBA]int64 // 0 is a hole
	gens := []oracle{{}}
	var frozen []*Frozen
	stamp := int64(0)
	for step := range 1500 {
		active := gens[len(gens)-1]
		switch x := rng.IntN(100); {
		case x < 60:
			lba, n := block.LBA(rng.IntN(300)), 1+rng.IntN(12)
			rec := data(lba)
			for i := range n {
				stamp++
				rec.Data = append(rec.Data, stampBlock(uint64(stamp))...)
				active[lba+block.LBA(i)] = stamp
			}
			r.append(rec)
		case x < 80:
			lba, n := block.LBA(rng.IntN(300)), 1+rng.IntN(60)
			r.append(unmap(lba, uint64(n)))
			for i := range n {
				active[lba+block.LBA(i)] = 0
			}
		case x < 84:
			frozen = append(frozen, r.log.Freeze())
			gens = append(gens, oracle{})
		case x < 88 || len(frozen) > 3:
			if len(frozen) > 0 {
				r.sync()
				if err := r.log.Publish(frozen[0]); err != nil {
					t.Fatal(err)
				}
				frozen, gens = frozen[1:], gens[1:]
			}
		case x < 91:
			if err := r.log.Checkpoint(bg, func() ([]byte, error) { return []byte("state"), nil }); err != nil {
				t.Fatal(err)
			}
		}
		lba := block.LBA(rng.IntN(300))
		want := make([]int64, 40)
		for i := range want {
			want[i] = -1
			for _, g := range gens {
				if v, ok := g[lba+block.LBA(i)]; ok {
					want[i] = v
				}
			}
		}
		r.expect(lba, want...)
		if t.Failed() {
			t.Fatalf("seed %d, step %d", seed, step)
		}
	}
	units := 0
	for i, f := range frozen {
		has := oracle{}
		for _, h := range f.Holes(1) {
			for k := range h.Blocks {
				has[h.LBA+block.LBA(k)] = 0
			}
		}
		blocks := f.Blocks(1)
		if !slices.IsSortedFunc(blocks, func(a, b Block) int { return int(a.LBA) - int(b.LBA) }) {
			t.Errorf("seed %d: blocks out of order", seed)
		}
		for _, b := range blocks {
			p := make([]byte, block.Size)
			if err := r.log.ReadBlocks(1, b.LBA, []Found{{Present, b.CRC, b.Place}}, p); err != nil {
				t.Fatal(err)
			}
			has[b.LBA] = int64(le.Uint64(p))
		}
		if fmt.Sprint(has) != fmt.Sprint(gens[i]) {
			t.Errorf("seed %d: frozen %d holds\n%v, want\n%v", seed, i, has, gens[i])
		}
		if got, want := f.Bytes(), int64(len(blocks)+len(f.Holes(1)))*block.Size; got != want {
			t.Errorf("seed %d: frozen %d says %d bytes, want %d", seed, i, got, want)
		}
		units += len(blocks) + len(f.Holes(1))
	}
	last := Frozen{gen: r.log.gens[len(r.log.gens)-1], crcs: r.log.crcs}
	units += len(last.Blocks(1)) + len(last.Holes(1))
	for what, d := range map[string]Dirty{"in all": r.log.Unpublished(), "of the disk": r.log.UnpublishedOf(1)} {
		if d.Bytes != int64(units)*block.Size {
			t.Errorf("seed %d: %d bytes unpublished %s, want %d", seed, d.Bytes, what, int64(units)*block.Size)
		}
	}
}

// TestACheckpointFoldsWhatCameMeanwhile writes, unmaps and reads while checkpoints split the active
// generation and fold it: a reader never sees an older block than one it saw before, and in the end one
// generation holds everything.
func TestACheckpointFoldsWhatCameMeanwhile(t *testing.T) {
	r := newRig(t, 256, 256)
	const blocks = 64
	var wg sync.WaitGroup
	var stop atomic.Bool
	wg.Go(func() {
		last := [blocks]uint64{}
		found := make([]Found, blocks)
		p := make([]byte, blocks*block.Size)
		for !stop.Load() {
			var pins Pins
			r.log.Lookup(1, 0, found, &pins)
			err := r.log.ReadBlocks(1, 0, found, p)
			pins.Release()
			if err != nil {
				t.Error(err)
				return
			}
			for i, f := range found {
				if v := le.Uint64(p[i*block.Size:]); f.State == Present && v < last[i] {
					t.Errorf("block %d went back from %d to %d", i, last[i], v)
					return
				} else if f.State == Present {
					last[i] = v
				}
			}
		}
	})
	wg.Go(func() {
		for !stop.Load() {
			if err := r.log.Checkpoint(bg, func() ([]byte, error) { return nil, nil }); err != nil {
				t.Error(err)
				return
			}
		}
	})
	rng := rand.New(rand.NewPCG(7, 7))
	want := make([]int64, blocks)
	for i := range want {
		want[i] = -1
	}
	for stamp := int64(1); stamp < 2500; stamp++ {
		i := rng.IntN(blocks)
		if rng.IntN(4) == 0 {
			n := min(1+rng.IntN(8), blocks-i)
			r.append(unmap(block.LBA(i), uint64(n)))
			clear(want[i : i+n])
			continue
		}
		r.append(data(block.LBA(i), uint64(stamp)))
		want[i] = stamp
	}
	stop.Store(true)
	wg.Wait()
	r.expect(0, want...)
	if len(r.log.gens) != 1 {
		t.Errorf("%d generations after the last checkpoint, want one", len(r.log.gens))
	}
	if _, err := r.reopen(r.fs.ProcessCrash); err != nil {
		t.Fatal(err)
	}
	r.expect(0, want...)
}

// TestIndexStaysWithinItsBudget fills an index with 1 GiB in random writes and checks the budget of
// DESIGN section 4 at every moment of the second half, in the index's own count and on the heap.
func TestIndexStaysWithinItsBudget(t *testing.T) {
	const gib = 1 << 30 / block.Size
	for _, c := range []struct {
		write  int // blocks
		budget int64
	}{
		{1, 6 << 20},
		{16, 3 << 19},
	} {
		t.Run(fmt.Sprintf("%d KiB", c.write*4), func(t *testing.T) {
			before := heapBytes()
			l := &Log{gens: []*generation{newGeneration(0)}, crcs: checksums{16384, make([]atomic.Pointer[[]uint32], 17), new(atomic.Int64)}}
			g := l.gens[0]
			rng := rand.New(rand.NewPCG(9, uint64(c.write)))
			crcs := make([]uint32, c.write)
			worst, most := 0.0, int64(0)
			for n := 0; n < gib; {
				lba := block.LBA(rng.Uint64N(1<<34/uint64(c.write))) * block.LBA(c.write) // of 64 TiB
				place := tier.NewPlace(n/16384, uint32(n%16384))
				l.crcs.put(place, crcs)
				g.apply(Seq(n+1), 1, entry{Data, 1, uint64(lba), uint64(c.write)}, place, nil)
				n += c.write
				if n >= gib/2 && n%256 == 0 {
					b := l.IndexBytes()
					worst = max(worst, float64(b)*gib/float64(n))
					most = max(most, b)
				}
			}
			if worst > float64(c.budget) {
				t.Errorf("at the worst moment %.2f MiB per GiB, budget %.2f", worst/(1<<20), float64(c.budget)/(1<<20))
			}
			heap, own := heapBytes()-before, l.IndexBytes()
			if heap > own+own/20+64<<10 {
				t.Errorf("%d bytes on the heap, %d counted: more than 5 %% apart", heap, own)
			}
			t.Logf("%.2f MiB per GiB at the worst moment, %.2f counted at the end, %.2f on the heap", worst/(1<<20), float64(own)/(1<<20), float64(heap)/(1<<20))
			if a := testing.AllocsPerRun(100, func() {
				var out [16]Found
				g.disks[1].lookup(block.LBA(rng.Uint64N(1<<34)), out[:], &l.crcs)
			}); a > 0 {
				t.Errorf("a lookup allocates %v times", a)
			}
			for id := range g.disks { // and all of it goes with the blocks
				g.disks[id].unmap(0, lbaMax)
			}
			if left := g.memory(); left > 1<<10 {
				t.Errorf("%d bytes are left after everything was unmapped", left)
			}
			runtime.KeepAlive(l)
		})
	}
}

func heapBytes() int64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.GC()
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// randomGenerations are two generations, the second after the first, on three disks.
func randomGenerations(rng *rand.Rand) (old, young *generation, crcs checksums) {
	crcs = checksums{1 << 12, make([]atomic.Pointer[[]uint32], 1), new(atomic.Int64)}
	gens := []*generation{newGeneration(0), newGeneration(0)}
	for i := range 1 + rng.IntN(600) {
		g, disk := gens[i%2], block.DiskID(1+rng.IntN(3))
		e := entry{Data, disk, rng.Uint64N(200), 1 + rng.Uint64N(6)}
		place := tier.NewPlace(0, uint32(i*6))
		switch rng.IntN(5) {
		case 0:
			e.kind = Unmap
		case 1:
			e = entry{Op, disk, 1, 1}
		default:
			crcs.put(place, make([]uint32, e.blocks))
		}
		g.apply(Seq(i+1), int64(i+1), e, place, []byte("x"))
	}
	return gens[0], gens[1], crcs
}

// seen is all that the generations, oldest first, know.
func seen(crcs *checksums, gens ...*generation) (all [3][220]Found) {
	for i := len(gens) - 1; i >= 0; i-- {
		for disk := range all {
			if d := gens[i].disks[block.DiskID(disk+1)]; d != nil {
				d.lookup(0, all[disk][:], crcs)
			}
		}
	}
	return all
}

func (g *generation) recount() (units int) {
	for _, d := range g.disks {
		blocks := 0
		d.data.visit(0, lbaMax, func(r run) bool { blocks += r.blocks(); return true })
		units += blocks + d.holes.Len()
	}
	return units + len(g.ops)
}

// TestMergingChangesNoLookup merges a generation into the one before, at once and step by step.
func TestMergingChangesNoLookup(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 3))
	for range 200 {
		old, young, crcs := randomGenerations(rng)
		want := seen(&crcs, old, young)
		oldest, last, ops := min(old.oldest, max(young.oldest, 1)), young.last, append(slices.Clone(old.ops), young.ops...)
		if rng.IntN(2) == 0 {
			old.merge(young)
		} else {
			for all := false; !all; {
				all = old.takeOver(young, 1+rng.IntN(4))
				if seen(&crcs, old, young) != want {
					t.Fatalf("seed %d: a step changed a lookup", seed)
				}
				if old.units+young.units < old.recount() {
					t.Fatalf("seed %d: %d and %d units, %d in the old one alone", seed, old.units, young.units, old.recount())
				}
			}
			if len(young.disks) != 0 || young.units != 0 {
				t.Fatalf("seed %d: %d disks, %d units are left behind", seed, len(young.disks), young.units)
			}
		}
		if seen(&crcs, old) != want || old.oldest != oldest || old.last != last || fmt.Sprint(old.ops) != fmt.Sprint(ops) {
			t.Fatalf("seed %d: merged, from %d to %d with %d operations, want %d to %d, %d", seed, old.oldest, old.last, len(old.ops), oldest, last, len(ops))
		}
		if old.units != old.recount() {
			t.Fatalf("seed %d: %d units, %d counted", seed, old.units, old.recount())
		}
		opsOf := map[block.DiskID]int{}
		for _, o := range old.ops {
			opsOf[o.Disk]++
		}
		for id, d := range old.disks {
			if d.ops != opsOf[id] {
				t.Fatalf("seed %d: disk %d has %d operations, want %d", seed, id, d.ops, opsOf[id])
			}
		}
	}
}

// TestACheckpointHidesNothingFromTheNextCut looks, while checkpoints that end no generation are being
// written, at what is in no cut yet: whoever asks for a cut must not hear that there is nothing to publish.
func TestACheckpointHidesNothingFromTheNextCut(t *testing.T) {
	r := newRig(t, 16, 16)
	r.append(data(0, 1), data(1, 2))
	unfrozen := func(when string, blocks int64) {
		t.Helper()
		if d := r.log.Unfrozen(); d.Bytes != blocks*block.Size || d.Oldest.IsZero() != (blocks == 0) {
			t.Errorf("%s: %d bytes since %v are in no cut, want %d blocks", when, d.Bytes, d.Oldest, blocks)
		}
	}
	for _, fails := range []error{nil, errors.New("no state")} {
		err := r.log.Checkpoint(bg, func() ([]byte, error) {
			unfrozen("during a checkpoint", 2)
			r.append(data(5, 3))
			unfrozen("with a write after its freeze", 3)
			r.append(unmap(5, 1), data(5, 4))
			return nil, fails
		})
		if !errors.Is(err, fails) {
			t.Fatal(err)
		}
		r.append(unmap(5, 1))
		unfrozen("after a checkpoint", 3)
		f := r.log.Freeze()
		unfrozen("after a freeze", 0)
		r.append(data(9, 5))
		unfrozen("of the next cut", 1)
		if err := r.log.Publish(f); err != nil {
			t.Fatal(err)
		}
		f = r.log.Freeze()
		if err := r.log.Publish(f); err != nil {
			t.Fatal(err)
		}
		r.append(data(0, 1), data(1, 2))
	}
}
