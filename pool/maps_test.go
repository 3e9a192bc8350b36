package pool

import (
	"context"
	"errors"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"graindisk/block"
	"graindisk/vdisk"
	"graindisk/vdisk/densetree"
)

// smallMaps is for pools whose maps have many runs.
func smallMaps(o *Options) {
	o.CheckpointCuts, o.CheckpointBytes, o.mapLevel0, o.mapRun, o.tableRows = 4, 20<<10, 8, 20, 30
}

// runFiles lists the files of runs on the tier.
func (r *rig) runFiles() (names []string) {
	r.t.Helper()
	all, err := r.fs.ReadDir("/host/tier")
	if err != nil {
		r.t.Fatal(err)
	}
	for _, e := range all {
		if strings.HasPrefix(e.Name(), "run-") {
			names = append(names, "/host/tier/"+e.Name())
		}
	}
	return names
}

func (r *rig) corrupt(file string, at int64) {
	r.t.Helper()
	if err := r.fs.Corrupt(file, at); err != nil {
		r.t.Fatal(err)
	}
}

func (r *rig) close() {
	r.t.Helper()
	if err := r.pool.Close(context.Background()); err != nil {
		r.t.Fatal(err)
	}
	r.pool = nil
}

// mappedRig is a pool, opened again, whose disk has a map of several runs, all of them in a published checkpoint.
func mappedRig(t *testing.T) (*rig, *vdisk.Disk, []byte) {
	t.Helper()
	r := newRig(t, smallMaps)
	model := make([]byte, testDisk)
	d := r.disk("d", testDisk)
	for range 8 {
		r.scribble(d, model, 12)
		r.publish()
	}
	if err := d.Tree().Flush(); err != nil {
		t.Fatal(err)
	}
	model[0] = 1 // one more cut, for a checkpoint that has all runs
	r.write(d, 0, model[:1])
	r.close()
	r.open(false)
	return r, r.disk("d", testDisk), model
}

// TestDamagedMapsAreHadAgain damages the maps' files under a running pool and under one that is down.
func TestDamagedMapsAreHadAgain(t *testing.T) {
	r, d, model := mappedRig(t)
	files := r.runFiles()
	if len(files) < 5 {
		t.Fatalf("only %d files of runs", len(files))
	}
	for _, f := range files {
		r.corrupt(f, block.Size+30)
	}
	lookup := func() error {
		return d.Tree().Lookup(0, testDisk/block.Size, func(densetree.Entry) bool { return true })
	}
	if err := lookup(); !errors.Is(err, densetree.ErrCorrupt) {
		t.Fatalf("damage done, but lookup says %v", err)
	}
	if ok, err := d.TryRead(make([]byte, testDisk), 0); ok || err != nil {
		t.Errorf("read without the targets: %v, %v", ok, err)
	}
	part := []byte("part of a block")
	copy(model[12345:], part)
	r.write(d, 12345, part)
	r.expect(d, model)
	if err := lookup(); err != nil {
		t.Errorf("after mending: %v", err)
	}
	if err := r.pool.mending(t.Context(), d.Tree().Compact); err != nil { // which may meet damage that lookups did not: their pages were cached
		t.Errorf("merging what was mended: %v", err)
	}

	// A damaged head is found at open; what was not published is in the log.
	r.scribble(d, model, 5)
	r.publish()
	r.close()
	r.open(false)
	d = r.disk("d", testDisk)
	r.scribble(d, model, 5)
	r.expect(d, model)
	r.abandon()
	r.corrupt(r.runFiles()[0], 40)
	r.open(false)
	r.expect(r.disk("d", testDisk), model)
	r.abandon() // before the next cut, with its local checkpoint: the same again
	r.open(false)
	r.expect(r.disk("d", testDisk), model)
	r.publish()
	r.abandon()
	for _, s := range r.stores {
		s.SetOffline(true)
	}
	r.open(false) // without the targets
	for _, s := range r.stores {
		s.SetOffline(false)
	}
	r.expect(r.disk("d", testDisk), model)
}

// TestMergesHaveDamagedMapsAgain damages all runs of a map whose pages are cached, so that no lookup meets it.
func TestMergesHaveDamagedMapsAgain(t *testing.T) {
	r, d, model := mappedRig(t)
	r.expect(d, model)
	for _, f := range r.runFiles() {
		r.corrupt(f, block.Size+30)
	}
	if err := d.Tree().Compact(); !errors.Is(err, densetree.ErrCorrupt) {
		t.Fatalf("damage done, but a merge says %v", err)
	}
	if err := r.pool.mending(t.Context(), d.Tree().Compact); err != nil {
		t.Errorf("merging what the targets have: %v", err)
	}
	r.expect(d, model)
	r.checkAll()

	r.pool.repair.ask(wantCheckpoint) // which has the merged runs
	r.publish()
	r.close()
	r.open(false)
	d = r.disk("d", testDisk)
	r.expect(d, model)
	for _, f := range r.runFiles() {
		r.corrupt(f, block.Size+30)
	}
	if rep, err := r.pool.Fsck(t.Context(), false, false); err != nil || rep.Bad() || len(rep.Leaks) > 0 {
		t.Errorf("a recount of what the targets have: %+v, %v", rep, err)
	}
}

// TestADamagedMapThatIsNowhereElseIsDamage damages runs that no published checkpoint holds.
func TestADamagedMapThatIsNowhereElseIsDamage(t *testing.T) {
	r := newRig(t, func(o *Options) { smallMaps(o); o.CheckpointCuts = 100 })
	model := make([]byte, testDisk)
	d := r.disk("d", testDisk)
	for range 4 {
		r.scribble(d, model, 12)
		r.publish()
	}
	if err := d.Tree().Flush(); err != nil {
		t.Fatal(err)
	}
	r.pool.runs.Keep(nil, true) // sweeps
	for _, f := range r.runFiles() {
		r.corrupt(f, block.Size+30)
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if err := d.Read(ctx, make([]byte, testDisk), 0); !errors.Is(err, vdisk.ErrDamaged) || !strings.Contains(err.Error(), "run-") {
		t.Errorf("read over a damaged map: %v", err)
	}
}

// TestPublishedCheckpointsStayIncremental restarts a pool with a large map and expects the next
// checkpoint to store little of it again, and a fresh host to find all of it.
func TestPublishedCheckpointsStayIncremental(t *testing.T) {
	r := newRig(t, func(o *Options) { smallMaps(o); o.mapLevel0 = 64 })
	model := make([]byte, testDisk)
	d := r.disk("d", testDisk)
	for i := 0; i < len(model); i += 2 * block.Size { // every other block
		model[i] = byte(1 + rand.IntN(200))
		r.write(d, int64(i), model[i:i+block.Size])
	}
	r.publish()
	if err := d.Tree().Flush(); err != nil {
		t.Fatal(err)
	}
	// restart changes one block and closes the pool, which publishes a checkpoint.
	restart := func() {
		t.Helper()
		model[0]++
		r.write(r.disk("d", testDisk), 0, model[:block.Size])
		r.close()
		r.open(false)
	}
	count := func() (again, old int) {
		t.Helper()
		if len(r.pool.value().Checkpoints) == 0 {
			t.Fatal("no checkpoint was published")
		}
		ref := r.pool.value().Checkpoints[0]
		s, err := r.pool.readManifest(context.Background(), ref)
		if err != nil {
			t.Fatal(err)
		}
		if len(s.Tables) == 0 {
			t.Error("the manifest is not cut into tables")
		}
		for _, run := range s.Disks[0].Runs {
			if run.Epoch == ref.Epoch && run.N == ref.N {
				again++
			} else {
				old++
			}
		}
		return again, old
	}
	restart()
	if again, old := count(); again < 20 || old != 0 {
		t.Errorf("the first checkpoint stores %d runs and names %d old ones", again, old)
	}
	restart()
	if again, old := count(); again > 3 || old < 20 {
		t.Errorf("after a restart a checkpoint stores %d runs and names %d old ones", again, old)
	}
	// A run that the newest checkpoint on the targets does not name is stored again.
	r.publish() // has claimed the pool
	r.pool.mu.Lock()
	r.pool.val.Checkpoints = nil
	r.pool.mu.Unlock()
	restart()
	if again, old := count(); again < 20 || old != 0 {
		t.Errorf("with the old checkpoint gone the next stores %d runs and names %d old ones", again, old)
	}
	r.abandon()
	r.newHost()
	r.open(true)
	r.expect(r.disk("d", testDisk), model)
}
