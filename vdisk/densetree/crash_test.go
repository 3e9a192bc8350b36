package densetree

import (
	"errors"
	"io/fs"
	"math/rand/v2"
	"os"
	"path"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"graindisk/block"
	"graindisk/internal/crashtest"
)

// small are the options of a tree that merges all the time.
func small(d *disk, books *ledger, guard *sync.RWMutex) Options {
	var id atomic.Uint64
	return Options{Level0Max: 8, RunMax: 8, installRuns: 1, Store: d.store, NextRunID: func() uint64 { return id.Add(1) },
		Lost: books.lost, Guard: guard.RLocker()}
}

// TestTreeSurvivesPowerCut cuts the power at many of the calls that change the file system, at all of
// them with GRAINDISK_SOAK set, goes back
// to the newest checkpoint, and expects it whole: what was put by then, and losses that still add up.
func TestTreeSurvivesPowerCut(t *testing.T) {
	const n = 2048
	r := newRand(t)
	seed := r.Uint64()
	restored := 0
	stride := 40
	if os.Getenv("GRAINDISK_SOAK") != "" {
		stride = 1
	}
	for cut := 1 + r.IntN(stride); ; cut += 1 + r.IntN(2*stride-1) {
		rng := rand.New(rand.NewPCG(seed, 1))
		fsys := crashtest.NewFS(crashtest.Options{Seed: seed, CutAfter: cut})
		d := &disk{fs: fsys, dir: "/", cache: 1}
		d.open(t)
		books, model := newLedger(), newFlat(n)
		var guard sync.RWMutex
		o := small(d, books, &guard)
		tree := New(o)
		var last *checkpoint
		next := block.NewExtentID(1, 0)
		for op := 0; op < 60 && !fsys.WasCut(); op++ {
			es := randomPut(rng, n, &next)
			for _, e := range es {
				books.stored(e)
				model.put(e)
			}
			tree.Put(es)
			if op%3 == 0 {
				_ = tree.Flush() // fails if the power goes
			}
			if op%5 == 0 && !fsys.WasCut() {
				last = save(t, d, &guard, tree, books, model)
			}
		}
		done := !fsys.WasCut()
		fsys.PowerCut()
		tree.Close()
		if last != nil {
			restored++
			d.fs = fsys.Reboot(seed + uint64(cut))
			books, model = last.books.clone(), last.model.clone()
			o.Lost = books.lost
			tree = last.restore(t, d, o)
			model.check(t, tree, 0, n)
			for range 20 { // may hide what a merge was cut short over
				es := randomPut(rng, n, &next)
				for _, e := range es {
					books.stored(e)
					model.put(e)
				}
				tree.Put(es)
			}
			must(t, tree.Compact())
			model.check(t, tree, 0, n)
			books.check(t, model, true)
			tree.Close()
			d.store.Keep(nil, false)
			if names, err := d.fs.ReadDir("/"); err != nil || len(names) > 0 {
				t.Fatalf("cut %d: %d files are left: %v", cut, len(names), err)
			}
		}
		if done {
			break
		}
	}
	if restored < 10 {
		t.Errorf("only %d cuts had a checkpoint to go back to", restored)
	}
}

// TestFailedMergesLoseNothing makes writes, syncs and creations of run files fail, one kind after the
// other, and expects the tree to go on, to say so, and to merge once they succeed again.
func TestFailedMergesLoseNothing(t *testing.T) {
	const n = 2048
	faults := []crashtest.Fault{
		{Op: crashtest.OpWrite, Path: "run-*", Err: syscall.ENOSPC},
		{Op: crashtest.OpWrite, Path: "run-*", Skip: 5},
		{Op: crashtest.OpSync, Path: "run-*", Skip: 3},
		{Op: crashtest.OpCreate, Path: "run-*"},
		{Op: crashtest.OpSyncDir},
	}
	for skip := 1; skip < 24; skip += 3 { // wherever in a merge, of which several parts are in place by then
		faults = append(faults, crashtest.Fault{Op: crashtest.OpRead, Path: "run-*", Skip: skip})
	}
	for _, fault := range faults {
		t.Run(fault.Op.String(), func(t *testing.T) {
			r := newRand(t)
			fsys := crashtest.NewFS(crashtest.Options{})
			d := &disk{fs: fsys, dir: "/", cache: 1 << 20}
			d.open(t)
			books, model := newLedger(), newFlat(n)
			var guard sync.RWMutex
			var failed atomic.Int64
			o := small(d, books, &guard)
			o.MergeFailed = func(error) { failed.Add(1) }
			tree := New(o)
			next := block.NewExtentID(1, 0)
			put := func(times int) {
				for range times {
					es := randomPut(r, n, &next)
					for _, e := range es {
						books.stored(e)
						model.put(e)
					}
					tree.Put(es)
				}
			}
			put(200)
			must(t, tree.Flush())
			fsys.Inject(fault)
			put(200)
			if err := tree.Flush(); err == nil || failed.Load() == 0 {
				t.Errorf("flush on a broken disk: %v; %d failures told", err, failed.Load())
			}
			if s := tree.Stats(); s.MergeErr == nil || s.Level0 <= o.Level0Max {
				t.Errorf("no sign of trouble: %+v", s)
			}
			if fault.Op != crashtest.OpRead {
				model.check(t, tree, 0, n)
			}
			books.check(t, model, false)
			fsys.ClearFaults()
			put(10)
			must(t, tree.Compact())
			model.check(t, tree, 0, n)
			books.check(t, model, true)
			if s := tree.Stats(); s.MergeErr != nil || s.Level0 != 0 {
				t.Errorf("still in trouble: %+v", s)
			}
			tree.Close()
			d.store.Keep(nil, false)
			if names, err := fsys.ReadDir("/"); err != nil || len(names) > 0 {
				t.Errorf("%d files are left: %v", len(names), err)
			}
		})
	}
}

// TestDamagedPagesAreNamed flips a bit in every page of a run's file in turn, and takes the file away.
func TestDamagedPagesAreNamed(t *testing.T) {
	fsys := crashtest.NewFS(crashtest.Options{})
	d := &disk{fs: fsys, dir: "/", cache: 1}
	d.open(t)
	run, err := d.store.Adopt(manyRun())
	must(t, err)
	must(t, d.store.Sync())
	name := path.Base(d.store.path(run.File()))
	es := list(t, run)
	tree, err := Load(Options{Store: d.store}, []*Run{run})
	must(t, err)
	defer tree.Close()
	all := func() error { return tree.Lookup(0, uint64(run.Last)+1, func(Entry) bool { return true }) }
	must(t, all())
	for no := range run.firsts {
		at := run.offset(no) + int64(no)*97
		must(t, fsys.Corrupt(name, at))
		d.store.o.Cache = NewPageCache(1)
		err := all()
		if want := "run 9: page " + string(rune('0'+no)); !errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), name) {
			t.Errorf("page %d: %v", no, err)
		}
		if no > 0 { // the others are read as ever
			must(t, tree.Lookup(es[0].LBA, 1, func(e Entry) bool { return e.Kind != None }))
		}
		must(t, fsys.Corrupt(name, at))
	}
	must(t, all())
	must(t, fsys.Remove("/"+name))
	d.store.o.Cache = NewPageCache(1)
	if err := all(); !errors.Is(err, ErrCorrupt) || !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("without the file: %v", err)
	}
	if _, err := d.store.Open(run.File(), run.ID); !errors.Is(err, ErrCorrupt) {
		t.Errorf("opened without the file: %v", err)
	}
}

// TestFilesLiveAsLongAsTheyAreNeeded follows one file through a snapshot and a checkpoint.
func TestFilesLiveAsLongAsTheyAreNeeded(t *testing.T) {
	d := newDisk(t)
	tree := New(Options{Store: d.store})
	defer tree.Close()
	files := func() int {
		names, err := d.fs.ReadDir("/")
		must(t, err)
		return len(names)
	}
	put := func(extent block.ExtentID) {
		tree.Put(grains(0, 100, 1, extent))
		must(t, tree.Flush())
	}
	put(0)
	snap := tree.Snapshot()
	d.store.Keep(snap.Runs(), false)
	put(1000)
	if files() != 2 {
		t.Errorf("%d files while a snapshot and a checkpoint need the old one", files())
	}
	snap.Release()
	snap.Release()
	put(2000)
	if files() != 2 {
		t.Errorf("%d files while the checkpoint needs the oldest", files())
	}
	snap = tree.Snapshot()
	d.store.Keep(snap.Runs(), true)
	put(3000)
	if files() != 3 {
		t.Errorf("%d files while it is not known which checkpoint counts", files())
	}
	d.store.Keep(snap.Runs(), false)
	if files() != 2 {
		t.Errorf("%d files once it is", files())
	}
	snap.Release()
	d.store.Keep(nil, false)
	if files() != 1 {
		t.Errorf("%d files for one run", files())
	}
	// A new process removes what its checkpoint does not name.
	run := treeRuns(tree)[0]
	other := &disk{fs: d.fs, dir: "/", cache: 1}
	other.open(t)
	if _, err := other.store.Adopt(manyRun()); err != nil {
		t.Fatal(err)
	}
	third := &disk{fs: d.fs, dir: "/", cache: 1}
	third.open(t)
	_, err := third.store.Open(run.File(), run.ID)
	must(t, err)
	if _, err := third.store.Open(run.File(), run.ID+1); !errors.Is(err, ErrCorrupt) {
		t.Errorf("opened by another name: %v", err)
	}
	third.store.RemoveOrphans()
	if files() != 1 {
		t.Errorf("%d files after the orphans went", files())
	}
}

// TestPageCacheKeepsItsBound reads a hundred times more pages than it may keep.
func TestPageCacheKeepsItsBound(t *testing.T) {
	const bytes = 64 * slotBytes
	c := NewPageCache(bytes)
	for i := range uint64(6400) {
		c.put(pageKey{i, int(i % 7)}, make(page, pageBytes))
		c.get(pageKey{i / 2, int(i / 2 % 7)})
		if c.Bytes() > bytes {
			t.Fatalf("%d bytes cached, %d allowed", c.Bytes(), bytes)
		}
	}
	if c.Bytes() < bytes/2 {
		t.Errorf("only %d bytes of %d are used", c.Bytes(), bytes)
	}
}

// TestReplayDoesNotWait puts more than level 0 holds while it is told to hold, on a disk that cannot
// store a run, and expects it all to be there, and merged once it may.
func TestReplayDoesNotWait(t *testing.T) {
	fsys := crashtest.NewFS(crashtest.Options{})
	d := &disk{fs: fsys, dir: "/", cache: 1}
	d.open(t)
	var hold atomic.Bool
	tree := New(Options{Level0Max: 8, Store: d.store, Hold: &hold})
	defer tree.Close()
	hold.Store(true)
	fsys.Inject(crashtest.Fault{Op: crashtest.OpCreate})
	tree.Put(grains(0, 1000, 2, 0))
	tree.Put(grains(1, 1000, 2, 5000))
	if s := tree.Stats(); s.Level0 != 2000 || s.Runs != 0 || s.MergeErr != nil {
		t.Errorf("held, but %+v", s)
	}
	fsys.ClearFaults()
	hold.Store(false)
	tree.Put(grains(5000, 1, 1, 9000))
	must(t, tree.Flush())
	if s := tree.Stats(); s.Level0 != 0 || s.Entries != 2001 {
		t.Errorf("released, but %+v", s)
	}
}
