package densetree

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"

	"graindisk/block"
)

var (
	opsFlag  = flag.Int("ops", 100_000, "random operations of the model test")
	seedFlag = flag.Uint64("seed", 0, "seed of the random tests; 0 takes the clock")
)

func newRand(t testing.TB) *rand.Rand {
	seed := *seedFlag
	if seed == 0 {
		seed = uint64(time.Now().UnixNano())
	}
	t.Logf("seed %d", seed)
	return rand.New(rand.NewPCG(seed, 1))
}

// flat is the oracle: what each block of a small disk is, and how often each extent block is mapped.
type flat struct {
	blocks []Entry // of one block each; LBA is its own index
	mapped map[block.ExtentID]int
}

func newFlat(n int) *flat {
	f := &flat{blocks: make([]Entry, n), mapped: map[block.ExtentID]int{}}
	for i := range f.blocks {
		f.blocks[i] = Entry{LBA: block.LBA(i), Blocks: 1}
	}
	return f
}

func (f *flat) put(e Entry) {
	for i := range e.Blocks {
		b := &f.blocks[uint64(e.LBA)+i]
		if b.Kind == Data {
			f.mapped[b.Extent]--
		}
		*b = Entry{LBA: e.LBA + block.LBA(i), Blocks: 1, Kind: e.Kind}
		if e.Kind == Data {
			b.Extent, b.Off, b.Orig = e.Extent, e.Off+uint16(i), e.Orig
			f.mapped[b.Extent]++
		}
	}
}

// check compares a lookup with the oracle block by block, and its form with what is promised.
func (f *flat) check(t *testing.T, m mapping, lba block.LBA, n uint64) {
	t.Helper()
	next := lba
	full := m.Lookup(lba, n, func(e Entry) bool {
		if e.LBA != next || e.Blocks == 0 || e.End() > lba+block.LBA(n) {
			t.Fatalf("lookup [%d,+%d): got %+v where %d comes next", lba, n, e, next)
		}
		next = e.End()
		for i := range e.Blocks {
			got := Entry{LBA: e.LBA + block.LBA(i), Blocks: 1, Kind: e.Kind, Extent: e.Extent, Orig: e.Orig}
			if e.Kind == Data {
				got.Off = e.Off + uint16(i)
			}
			if want := f.blocks[got.LBA]; got != want {
				t.Fatalf("lookup [%d,+%d): got %+v, want %+v", lba, n, got, want)
			}
		}
		return true
	})
	if !full || next != lba+block.LBA(n) {
		t.Fatalf("lookup [%d,+%d) ended at %d, full %v", lba, n, next, full)
	}
}

type mapping interface {
	Lookup(block.LBA, uint64, func(Entry) bool) bool
}

// ledger counts stored and lost blocks per extent.
type ledger map[block.ExtentID]int

func (l ledger) lost(ls []Loss) {
	for _, x := range ls {
		l[x.Extent] -= int(x.Blocks)
	}
}

// randomEntry is an entry on a disk of n blocks: mostly data of up to 16 blocks, whole or in part.
func randomEntry(r *rand.Rand, n int, extent block.ExtentID) Entry {
	switch k := r.IntN(1000); {
	case k == 0:
		l := 1 + r.IntN(n/4)
		return Entry{LBA: block.LBA(r.IntN(n - l)), Blocks: uint64(l), Kind: Hole}
	case k < 150:
		l := 1 + r.IntN(40)
		return Entry{LBA: block.LBA(r.IntN(n - l)), Blocks: uint64(l), Kind: Hole + Kind(r.IntN(2))}
	default:
		l, off := 1+r.IntN(16), r.IntN(3)
		return Entry{LBA: block.LBA(r.IntN(n - l)), Blocks: uint64(l), Kind: Data,
			Extent: extent, Off: uint16(off), Orig: uint16(off + l + r.IntN(3))}
	}
}

// randomPut is a few entries that do not overlap each other, in no order.
func randomPut(r *rand.Rand, n int, next *block.ExtentID) []Entry {
	var es []Entry
	for range 1 + r.IntN(12) {
		*next += block.ExtentID(1 + r.IntN(2)*r.IntN(1000))
		e := randomEntry(r, n, *next)
		free := func(e Entry) bool {
			return e.End() <= block.LBA(n) &&
				!slices.ContainsFunc(es, func(o Entry) bool { return e.LBA < o.End() && o.LBA < e.End() })
		}
		if !free(e) {
			continue
		}
		es = append(es, e)
		// The same extent again right behind, sometimes going on where it ended, sometimes not.
		again := e
		again.LBA, again.Off, again.Orig = e.End(), uint16(r.IntN(3))*uint16(e.Blocks), 3*e.Orig
		if e.Kind == Data && r.IntN(4) == 0 && free(again) {
			es[len(es)-1].Orig = again.Orig
			es = append(es, again)
		}
	}
	return es
}

// TestTreeMatchesFlatModel runs random operations against a flat array, over many small merges,
// and expects the losses to add up to the block once all levels are one.
func TestTreeMatchesFlatModel(t *testing.T) {
	const n = 8192
	r := newRand(t)
	books := ledger{}
	o := Options{Level0Max: 4, RunMax: 4, Lost: books.lost}
	tree, model := New(o), newFlat(n)
	var snap *Snapshot
	var old *flat
	next := block.NewExtentID(1, 0)
	for op := 0; op < *opsFlag; {
		switch k := r.IntN(1000); {
		case k == 0:
			tree.Flush()
		case k == 1:
			tree.Compact()
			checkBooks(t, books, model)
		case k == 2:
			tree = reload(t, o, tree)
		case k < 5:
			snap, old = tree.Snapshot(), &flat{blocks: slices.Clone(model.blocks)}
		case k < 400:
			lba := r.IntN(n)
			model.check(t, tree, block.LBA(lba), uint64(r.IntN(min(64, n-lba)+1)))
		case k < 403:
			model.check(t, tree, 0, n)
			if snap != nil {
				old.check(t, snap, 0, n)
			}
		default:
			es := randomPut(r, n, &next)
			op += len(es)
			for _, e := range es {
				if e.Kind == Data {
					books[e.Extent] += int(e.Blocks)
				}
				model.put(e)
			}
			tree.Put(es)
		}
	}
	model.check(t, tree, 0, n)
	if s := tree.Stats(); s.Levels < 3 || s.Runs < 100 {
		t.Errorf("too little was merged to mean anything: %+v", s)
	}
	tree.Compact()
	model.check(t, tree, 0, n)
	checkBooks(t, books, model)
}

// checkBooks expects stored minus lost to be what the model still maps, for every extent.
func checkBooks(t *testing.T, books ledger, model *flat) {
	t.Helper()
	for id, n := range books {
		if n != model.mapped[id] {
			t.Fatalf("extent %v: stored minus lost is %d blocks, %d are mapped", id, n, model.mapped[id])
		}
		if n == 0 { // gone for good: names are not used again
			delete(books, id)
			delete(model.mapped, id)
		}
	}
}

// reload takes the tree through its stored form.
func reload(t *testing.T, o Options, tree *Tree) *Tree {
	t.Helper()
	var runs []*Run
	for _, r := range tree.Snapshot().Runs() {
		got, err := DecodeRun(r.Encode())
		if err != nil {
			t.Fatal(err)
		}
		runs = append(runs, got)
	}
	slices.Reverse(runs)
	loaded, err := Load(o, runs)
	if err != nil {
		t.Fatal(err)
	}
	return loaded
}

// sparse is an oracle for huge ranges: a list of entries cut by hand.
type sparse []Entry

func (s sparse) put(e Entry) sparse {
	var out sparse
	for _, o := range s {
		if o.LBA < e.LBA && o.End() > o.LBA { // the part before e
			p := o
			p.Blocks = uint64(min(o.End(), e.LBA) - o.LBA)
			out = append(out, p)
		}
		if o.End() > e.End() { // the part behind e
			p := o
			p.LBA = max(o.LBA, e.End())
			p.Blocks = uint64(o.End() - p.LBA)
			if p.Kind == Data {
				p.Off += uint16(p.LBA - o.LBA)
			}
			out = append(out, p)
		}
	}
	return append(out, e)
}

func (s sparse) at(lba block.LBA) Entry {
	for _, o := range s {
		if o.LBA <= lba && lba < o.End() {
			e := Entry{LBA: lba, Blocks: 1, Kind: o.Kind, Extent: o.Extent, Orig: o.Orig}
			if o.Kind == Data {
				e.Off = o.Off + uint16(lba-o.LBA)
			}
			return e
		}
	}
	return Entry{LBA: lba, Blocks: 1}
}

// TestLongHolesOverSixtyFourTiB mixes entries of a few blocks with holes and bases of terabytes.
func TestLongHolesOverSixtyFourTiB(t *testing.T) {
	const size = 64 << 40 / block.Size
	r := newRand(t)
	tree := New(Options{Level0Max: 16, RunMax: 8})
	model := sparse{}
	put := func(e Entry) {
		model = model.put(e)
		tree.Put([]Entry{e})
	}
	put(Entry{Blocks: size, Kind: Base})
	for i := range 1500 {
		lba := block.LBA(r.Uint64N(size - 16))
		if len(model) > 0 && r.IntN(2) == 0 {
			near := model[r.IntN(len(model))]
			lba = min(near.End()-1, size-16)
		}
		switch r.IntN(30) {
		case 0:
			put(Entry{LBA: lba, Blocks: 1 + r.Uint64N(uint64(size-lba)), Kind: Hole})
		case 1:
			put(Entry{LBA: lba, Blocks: 1 + r.Uint64N(uint64(size-lba)/16+1), Kind: Base})
		default:
			put(Entry{LBA: lba, Blocks: 16, Kind: Data, Extent: block.ExtentID(i), Orig: 16})
		}
	}
	tree.Put([]Entry{{LBA: size / 2, Blocks: size / 4, Kind: Hole}})
	model = model.put(Entry{LBA: size / 2, Blocks: size / 4, Kind: Hole})
	for range 2 {
		next := block.LBA(0)
		tree.Lookup(0, size, func(e Entry) bool {
			if e.LBA != next {
				t.Fatalf("got %+v where %d comes next", e, next)
			}
			next = e.End()
			for _, at := range []uint64{0, e.Blocks / 2, e.Blocks - 1} {
				want := model.at(e.LBA + block.LBA(at))
				got := Entry{LBA: want.LBA, Blocks: 1, Kind: e.Kind, Extent: e.Extent, Orig: e.Orig}
				if e.Kind == Data {
					got.Off = e.Off + uint16(at)
				}
				if got != want {
					t.Fatalf("got %+v, want %+v", got, want)
				}
			}
			return true
		})
		if next != size {
			t.Fatalf("lookup ended at %d of %d", next, size)
		}
		tree.Compact()
	}
	tree.Put([]Entry{{Blocks: size, Kind: Hole}})
	tree.Compact()
	if s := tree.Stats(); s.Entries != 1 {
		t.Errorf("%d entries after one hole over everything, want 1", s.Entries)
	}
}

// grains are n whole extents of 16 blocks each, every step grains.
func grains(first, n, step int, extent block.ExtentID) []Entry {
	es := make([]Entry, n)
	for i := range es {
		es[i] = Entry{LBA: block.LBA(16 * (first + i*step)), Blocks: 16, Kind: Data,
			Extent: extent + block.ExtentID(i), Orig: 16}
	}
	return es
}

func ids(runs []*Run) []uint64 {
	var out []uint64
	for _, r := range runs {
		out = append(out, r.ID)
	}
	return out
}

func TestMergeRewritesOnlyWhatItOverlaps(t *testing.T) {
	// Ten runs of 100 grains on level 1, with room for 100 grains between two of them.
	full := func(t *testing.T) (*Tree, []uint64) {
		var id uint64
		tree := New(Options{Level0Max: 1000, RunMax: 100, NextRunID: func() uint64 { id++; return id }})
		for i := range 10 {
			tree.Put(grains(200*i, 100, 1, block.ExtentID(1000*i)))
			tree.Flush()
		}
		if got := ids(tree.Runs()); !slices.Equal(got, []uint64{1, 2, 3, 4, 5, 6, 7, 8, 9, 10}) {
			t.Fatalf("runs %v before", got)
		}
		return tree, ids(tree.Runs())
	}
	const one = 16 * 200 // blocks from one run to the next
	data := func(lba int) []Entry {
		return []Entry{{LBA: block.LBA(lba), Blocks: 16, Kind: Data, Extent: 1 << 20, Orig: 16}}
	}
	for _, c := range []struct {
		name string
		put  []Entry
		gone []uint64
		more int // new runs
	}{
		{"a write inside one run rewrites that", data(3*one + 32), []uint64{4}, 1},
		{"a write between two runs is a new run", data(3*one + 16*150), nil, 1},
		{"two writes far apart rewrite two runs", append(data(0), data(9*one)...), []uint64{1, 10}, 2},
		{"a hole over two whole runs and gaps takes their place",
			[]Entry{{LBA: 2*one - 16, Blocks: 2 * one, Kind: Hole}}, []uint64{3, 4}, 1},
		{"a write behind all runs is a new run", data(20 * one), nil, 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			tree, before := full(t)
			tree.Put(c.put)
			tree.Flush()
			after := ids(tree.Runs())
			var gone []uint64
			for _, id := range before {
				if !slices.Contains(after, id) {
					gone = append(gone, id)
				}
			}
			if !slices.Equal(gone, c.gone) || len(after) != len(before)-len(gone)+c.more {
				t.Errorf("rewrote %v, want %v; runs %v", gone, c.gone, after)
			}
		})
	}
}

// TestSmallRunsDoNotPileUp merges a thousand single entries in and expects full runs to result.
func TestSmallRunsDoNotPileUp(t *testing.T) {
	r := newRand(t)
	tree := New(Options{Level0Max: 1000, RunMax: 50})
	for i := range 1000 {
		tree.Put(grains(2*r.IntN(1<<20), 1, 1, block.ExtentID(i)))
		tree.Flush()
	}
	if s := tree.Stats(); s.Runs > 2*s.Entries/25+1 {
		t.Errorf("%d runs for %d entries", s.Runs, s.Entries)
	}
}

// TestLevelsKeepTheirSizes fills a tree in order and at random and looks at the shape.
func TestLevelsKeepTheirSizes(t *testing.T) {
	r := newRand(t)
	tree := New(Options{Level0Max: 32, RunMax: 16})
	for i := range 20_000 {
		at := i
		if i%2 == 0 {
			at = r.IntN(1 << 20)
		}
		tree.Put(grains(at, 1, 1, block.ExtentID(3*i)))
	}
	limit := 32
	for i, row := range tree.c.levels {
		if limit *= 16; rowLen(row) > limit {
			t.Errorf("level %d has %d entries, limit %d", i+1, rowLen(row), limit)
		}
		for j, run := range row {
			if run.Level != i+1 || run.Len() > 16 || run.Len() == 0 {
				t.Errorf("level %d: run %d of %d entries says level %d", i+1, run.ID, run.Len(), run.Level)
			}
			if j > 0 && row[j-1].Last >= run.First {
				t.Errorf("level %d: runs %d and %d overlap", i+1, row[j-1].ID, run.ID)
			}
		}
	}
	if s := tree.Stats(); s.Levels < 3 || s.Level0 >= 32 {
		t.Errorf("unexpected shape %+v", s)
	}
}

func TestStoringTheSameMappingAgainLosesNothing(t *testing.T) {
	tree := New(Options{Lost: func(ls []Loss) { t.Errorf("lost %v", ls) }})
	es := grains(0, 10, 1, 100)
	tree.Put(es)
	tree.Flush()
	tree.Put(es) // over level 1
	tree.Put(es) // over level 0
	tree.Put([]Entry{{LBA: 20, Blocks: 5, Kind: Data, Extent: 101, Off: 4, Orig: 16}})
	tree.Compact()
}

func TestNeighboursComeBackAsOnePiece(t *testing.T) {
	tree := New(Options{})
	tree.Put([]Entry{{LBA: 0, Blocks: 8, Kind: Data, Extent: 7, Orig: 16}, {LBA: 100, Blocks: 10, Kind: Hole}})
	tree.Flush()
	tree.Put([]Entry{{LBA: 8, Blocks: 8, Kind: Data, Extent: 7, Off: 8, Orig: 16}, {LBA: 110, Blocks: 10, Kind: Hole}})
	want := []Entry{
		{LBA: 4, Blocks: 12, Kind: Data, Extent: 7, Off: 4, Orig: 16},
		{LBA: 16, Blocks: 84},
		{LBA: 100, Blocks: 20, Kind: Hole},
		{LBA: 120, Blocks: 80},
	}
	var got []Entry
	tree.Lookup(4, 196, func(e Entry) bool { got = append(got, e); return true })
	if !slices.Equal(got, want) {
		t.Errorf("got %+v\nwant %+v", got, want)
	}
	got = nil
	if tree.Lookup(4, 196, func(e Entry) bool { got = append(got, e); return len(got) < 2 }) || len(got) != 2 {
		t.Errorf("lookup went on after false: %+v", got)
	}
	if tree.Lookup(4, 0, func(Entry) bool { t.Error("a piece of an empty range"); return true }) != true {
		t.Error("empty lookup said it was stopped")
	}
}

func TestPutRefusesNonsense(t *testing.T) {
	for _, e := range []Entry{
		{LBA: 1, Blocks: 1},
		{LBA: 1, Blocks: 1, Kind: Base + 1},
		{LBA: 1, Kind: Hole},
		{LBA: EndMax, Blocks: 1, Kind: Hole},
		{LBA: 2, Blocks: 1<<64 - 1, Kind: Base},
		{LBA: 1, Blocks: 4, Kind: Data, Off: 3, Orig: 6},
		{LBA: 1, Blocks: 1 << 16, Kind: Data, Orig: 1<<16 - 1},
	} {
		t.Run(fmt.Sprintf("%+v", e), func(t *testing.T) {
			defer func() {
				if recover() == nil {
					t.Error("stored")
				}
			}()
			New(Options{}).Put([]Entry{e})
		})
	}
}

func TestLoadRefusesWhatCannotBe(t *testing.T) {
	run := func(id uint64, level, first int) *Run {
		return newRun(id, level, []packed{pack(grains(first, 1, 1, 5)[0])})
	}
	for name, runs := range map[string][]*Run{
		"the same run twice":         {run(1, 1, 0), run(1, 1, 5)},
		"overlapping runs, level 2":  {run(1, 2, 3), run(2, 2, 3)},
		"overlapping runs, level 0":  {run(1, 0, 3), run(2, 0, 3)},
		"a level that cannot exist":  {run(1, levelsMax+1, 3)},
		"a level below all counting": {run(1, -1, 3)},
	} {
		if _, err := Load(Options{}, runs); err == nil {
			t.Errorf("%s: loaded", name)
		}
	}
	if _, err := Load(Options{RunMax: 1 << 20}, nil); err == nil {
		t.Error("options out of bounds: loaded")
	}
	tree, err := Load(Options{}, []*Run{run(41, 1, 0)})
	if err != nil {
		t.Fatal(err)
	}
	tree.Put(grains(0, 1, 1, 9))
	tree.Flush()
	if got := ids(tree.Runs()); !slices.Equal(got, []uint64{42}) {
		t.Errorf("runs %v after a merge, want one new name, 42", got)
	}
}

// TestReadersGoOnWhileMerging has readers check, during thousands of merges, that lookups are
// complete and that no block ever shows an older extent than it showed before.
func TestReadersGoOnWhileMerging(t *testing.T) {
	const n, rounds = 512, 100                      // grains, passes over all of them
	tree := New(Options{Level0Max: 20, RunMax: 10}) // so that all of it needs two levels
	tree.Put(grains(0, n, 1, 0))
	done := make(chan struct{})
	var wg sync.WaitGroup
	for range 3 {
		wg.Go(func() {
			var seen [n]block.ExtentID
			look := func(m mapping, fresh bool) {
				next := block.LBA(0)
				m.Lookup(0, 16*n, func(e Entry) bool {
					g := e.LBA / 16
					if e.LBA != next || e.Kind != Data || e.Blocks != 16 || e.Extent%n != block.ExtentID(g) {
						t.Errorf("bad piece %+v at %d", e, next)
						return false
					}
					if fresh && e.Extent < seen[g] {
						t.Errorf("grain %d went back from %v to %v", g, seen[g], e.Extent)
					}
					seen[g] = max(seen[g], e.Extent)
					next = e.End()
					return true
				})
				if next != 16*n {
					t.Errorf("lookup ended at %d", next)
				}
			}
			for i := 0; ; i++ {
				select {
				case <-done:
					return
				default:
				}
				look(tree, true)
				if i%16 == 0 {
					look(tree.Snapshot(), true)
				}
			}
		})
	}
	r := newRand(t)
	for round := 1; round <= rounds; round++ {
		es := grains(0, n, 1, block.ExtentID(round*n))
		r.Shuffle(n, func(i, j int) { es[i], es[j] = es[j], es[i] })
		for chunk := range slices.Chunk(es, 1+r.IntN(100)) {
			tree.Put(chunk)
		}
	}
	close(done)
	wg.Wait()
	if s := tree.Stats(); s.Merged < n*rounds || s.Levels < 2 {
		t.Errorf("too little was merged for this test to mean anything: %+v", s)
	}
}

// TestLossesNameTheWholeAndComeUnderTheGuard overwrites part of an extent in level 0 and another part by
// a merge: both losses say how large the extent was, and are told with the guard held.
func TestLossesNameTheWholeAndComeUnderTheGuard(t *testing.T) {
	var guard sync.RWMutex
	var got []Loss
	tree := New(Options{Guard: &guard, Lost: func(ls []Loss) {
		if guard.TryRLock() {
			t.Error("a loss is told without the guard")
		}
		got = append(got, ls...)
	}})
	tree.Put([]Entry{{LBA: 0, Blocks: 16, Kind: Data, Extent: 7, Orig: 16}})
	tree.Put([]Entry{{LBA: 2, Blocks: 3, Kind: Hole}})
	tree.Flush()
	tree.Put([]Entry{{LBA: 10, Blocks: 4, Kind: Data, Extent: 8, Orig: 4}})
	tree.Compact()
	if want := []Loss{{Extent: 7, Orig: 16, Blocks: 3}, {Extent: 7, Orig: 16, Blocks: 4}}; !slices.Equal(got, want) {
		t.Errorf("told %v, want %v", got, want)
	}
}
