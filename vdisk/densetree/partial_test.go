package densetree

import (
	"errors"
	"math/rand/v2"
	"syscall"
	"testing"

	"graindisk/block"
	"graindisk/internal/crashtest"
)

// elsewhere is encoded runs by their IDs, as the targets have them.
type elsewhere map[uint64][]byte

// add encodes runs.
func (e elsewhere) add(t *testing.T, runs []*Run) {
	for _, r := range runs {
		e[r.ID] = encode(t, r)
	}
}

// pages is what Bring's fetch is asked for.
func (e elsewhere) pages(r *Run) func(no, n int) ([]byte, error) {
	return func(no, n int) ([]byte, error) {
		off, length := r.PageRange(no, n)
		return e[r.ID][off : off+length], nil
	}
}

// partial makes a store have the heads of all runs.
func (e elsewhere) partial(t *testing.T, d *disk, ids []uint64) (runs []*Run) {
	t.Helper()
	for _, id := range ids {
		b := e[id]
		n := HeadLen(int64(len(b)))
		if n == 0 {
			t.Fatalf("no head in %d bytes", len(b))
		}
		head, err := DecodeHead(b[:n])
		must(t, err)
		if head.EncodedLen() != int64(len(b)) || head.ID != id {
			t.Fatalf("head of run %d, %d bytes; want %d, %d", head.ID, head.EncodedLen(), id, len(b))
		}
		r, err := d.store.AddPartial(head)
		must(t, err)
		runs = append(runs, r)
	}
	must(t, d.store.Sync())
	return runs
}

// farTree is a tree of partial runs over a flat model, and where their pages are.
func farTree(t *testing.T, d *disk, o Options) (*Tree, *flat, elsewhere, []*Run) {
	t.Helper()
	const n = 4096
	r := newRand(t)
	src := New(Options{Level0Max: 64, RunMax: 600, Store: newDisk(t).store})
	defer src.Close()
	model := newFlat(n)
	next := block.NewExtentID(1, 0)
	for i := 0; i < 400 || len(treeRuns(src)) < 2; i++ {
		es := randomPut(r, n, &next)
		for _, e := range es {
			model.put(e)
		}
		src.Put(es)
		if i >= 399 {
			must(t, src.Flush())
		}
	}
	far := elsewhere{}
	runs := treeRuns(src)
	far.add(t, runs)
	partial := far.partial(t, d, ids(runs))
	o.Store = d.store
	tree, err := Load(o, append([]*Run(nil), partial...))
	must(t, err)
	return tree, model, far, partial
}

// lookupFar is a lookup that has what is absent brought, in pages, as often as it takes.
func lookupFar(t *testing.T, tree *Tree, far elsewhere) (brought int) {
	t.Helper()
	for {
		err := tree.Lookup(0, 4096, func(Entry) bool { return true })
		if err == nil {
			return brought
		}
		pe := new(PageError)
		if !errors.As(err, &pe) || pe.Partial() == nil || !errors.Is(err, ErrAbsent) {
			t.Fatalf("lookup in partial runs: %v", err)
		}
		r := pe.Partial()
		b, _ := far.pages(r)(pe.Page, 1)
		must(t, r.Put(pe.Page, b))
		if brought++; brought > 10000 {
			t.Fatal("the same page is asked for again and again")
		}
	}
}

func TestHeadLenFindsTheHead(t *testing.T) {
	for pages := 1; pages < 3000; pages++ {
		n := headBytes(pages) + pages*pageBytes
		if got := HeadLen(int64(n)); got != headBytes(pages) {
			t.Fatalf("%d pages: head of %d bytes, want %d", pages, got, headBytes(pages))
		}
		if got := HeadLen(int64(n + 1)); got != 0 {
			t.Fatalf("%d bytes have a head of %d", n+1, got)
		}
	}
	for _, n := range []int64{-4096, 0, 1, 4096, 1 << 62} {
		if got := HeadLen(n); got != 0 {
			t.Errorf("%d bytes have a head of %d", n, got)
		}
	}
}

// TestPartialRuns looks up in runs of which only the heads are here, tries to merge them, and brings them.
func TestPartialRuns(t *testing.T) {
	d := newDisk(t)
	tree, model, far, partial := farTree(t, d, Options{Level0Max: 64, RunMax: 1000})
	if len(partial) < 2 {
		t.Fatalf("%d runs", len(partial))
	}
	if n := lookupFar(t, tree, far); n < len(partial) {
		t.Errorf("a lookup of everything brought %d pages of %d runs", n, len(partial))
	}
	model.check(t, tree, 0, 4096)
	es := grains(0, 64, 4, block.NewExtentID(9, 0))
	for _, e := range es {
		model.put(e)
	}
	tree.Put(es)
	if err := tree.Compact(); !errors.Is(err, ErrAbsent) {
		t.Errorf("a merge over partial runs: %v", err)
	}
	model.check(t, tree, 0, 4096)
	for i, r := range partial {
		if err := r.Bring(far.pages(r)); err != nil {
			t.Fatal(err)
		}
		if got := len(d.store.Partial()); r.Partial() || got != len(partial)-1-i {
			t.Errorf("%d runs are partial after %d of %d were brought", got, i+1, len(partial))
		}
	}
	tree.Retry()
	must(t, tree.Flush())
	must(t, tree.Compact())
	model.check(t, tree, 0, 4096)
}

// TestPartialRunsTakeNoWrongPage offers pages of other places, other runs and flipped bits.
func TestPartialRunsTakeNoWrongPage(t *testing.T) {
	d := newDisk(t)
	tree, model, far, partial := farTree(t, d, Options{})
	a, b := partial[0], partial[1]
	wrong := [][]byte{}
	other, _ := far.pages(b)(0, 1)
	flipped, _ := far.pages(a)(0, 1)
	flipped = append([]byte(nil), flipped...)
	flipped[77] ^= 4
	wrong = append(wrong, other, flipped, make([]byte, pageBytes), nil, flipped[:100])
	if a.Pages() > 1 {
		next, _ := far.pages(a)(1, 1)
		wrong = append(wrong, next)
	}
	for i, w := range wrong {
		if err := a.Put(0, w); !errors.Is(err, ErrCorrupt) {
			t.Errorf("wrong page %d was put: %v", i, err)
		}
		if err := a.Bring(func(no, n int) ([]byte, error) { return w, nil }); !errors.Is(err, ErrCorrupt) || !a.Partial() {
			t.Errorf("run brought with wrong page %d: %v", i, err)
		}
	}
	lookupFar(t, tree, far)
	model.check(t, tree, 0, 4096)
}

// TestPartialRunsSurvivePowerCuts cuts the power, or has calls fail, while pages come and runs are brought, and opens the store
// again: what was complete is whole without any other copy, the rest is found where it was.
func TestPartialRunsSurvivePowerCuts(t *testing.T) {
	rng := newRand(t)
	seed := rng.Uint64()
	complete := 0
	for round := range 30 {
		rng := rand.New(rand.NewPCG(seed, uint64(round)))
		fsys := crashtest.NewFS(crashtest.Options{Seed: rng.Uint64()})
		d := &disk{fs: fsys, dir: "/", cache: 1}
		d.open(t)
		tree, model, far, partial := farTree(t, d, Options{})
		mode := rng.IntN(3)
		switch mode {
		case 0:
			fsys.CutAfter(1 + rng.IntN(6*len(partial)))
		case 1:
			op := [...]crashtest.Op{crashtest.OpSync, crashtest.OpWrite}[rng.IntN(2)]
			fsys.Inject(crashtest.Fault{Op: op, Path: "run-*", Skip: rng.IntN(2 * len(partial)), Count: 1 + rng.IntN(3), Err: syscall.EIO})
		}
		for range rng.IntN(12) {
			r := partial[rng.IntN(len(partial))]
			if rng.IntN(2) == 0 {
				no := rng.IntN(r.Pages())
				b, _ := far.pages(r)(no, 1)
				must(t, r.Put(no, b))
			} else {
				_ = r.Bring(far.pages(r)) // may fail
			}
		}
		fsys.ClearFaults()
		if mode != 0 { // where the power goes only below
			lookupFar(t, tree, far)
			model.check(t, tree, 0, 4096)
		}
		fsys.PowerCut()
		tree.Close()
		d.fs = fsys.Reboot(rng.Uint64())
		d.open(t)
		var runs []*Run
		for _, r := range partial {
			open := d.store.OpenPartial
			if !r.Partial() {
				open = d.store.Open
				complete++
			}
			again, err := open(r.File(), r.ID)
			must(t, err)
			runs = append(runs, again)
		}
		tree, err := Load(Options{Store: d.store}, runs)
		must(t, err)
		lookupFar(t, tree, far) // which fails if a complete run lacks a page
		model.check(t, tree, 0, 4096)
		for _, r := range runs {
			must(t, r.Bring(far.pages(r)))
		}
		must(t, tree.Compact())
		model.check(t, tree, 0, 4096)
		tree.Close()
	}
	if complete < 8 {
		t.Errorf("only %d runs were complete before the power went", complete)
	}
}

// FuzzDecodeHead expects no panic, and that what is decoded is encoded the same.
func FuzzDecodeHead(f *testing.F) {
	for _, r := range []*Run{goldenRun(), manyRun()} {
		b, _ := r.Encode()
		f.Add(b[:headBytes(len(r.firsts))])
		f.Add(seal(b[:headBytes(len(r.firsts))]))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := DecodeHead(b)
		if err != nil {
			if !errors.Is(err, ErrCorrupt) && !errors.Is(err, ErrNewer) {
				t.Fatalf("error of no kind: %v", err)
			}
			return
		}
		if HeadLen(r.EncodedLen()) != len(b) || string(r.head()) != string(b) {
			t.Fatal("encoded otherwise")
		}
	})
}
