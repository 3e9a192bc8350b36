package pool

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"

	"graindisk/backend/backendtest"
	"graindisk/block"
	"graindisk/internal/crashtest"
	"graindisk/pool/root"
	"graindisk/vdisk"
)

// rig is a small pool over three stores in memory and a file system that can crash.
type rig struct {
	t      testing.TB
	fs     *crashtest.FS
	stores []*backendtest.Faulty
	memory []*backendtest.Memory // behind the stores
	opt    func(*Options)
	pool   *Pool
}

func newRig(t *testing.T, opt func(*Options)) *rig { return newRigFor(t, opt) }

func newRigFor(t testing.TB, opt func(*Options)) *rig {
	t.Helper()
	r := &rig{t: t, opt: opt}
	for i := range 3 {
		r.memory = append(r.memory, backendtest.NewMemory(fmt.Sprintf("mem%d", i)))
		r.stores = append(r.stores, backendtest.NewFaulty(r.memory[i], uint64(i)))
	}
	r.newHost()
	r.open(false)
	t.Cleanup(func() {
		if r.pool != nil {
			ctx, cancel := context.WithCancel(context.Background())
			cancel()
			r.pool.Close(ctx)
		}
	})
	return r
}

func (r *rig) newHost() {
	r.fs = crashtest.NewFS(crashtest.Options{Seed: rand.Uint64()})
	if err := errors.Join(r.fs.MkdirAll("/host"), r.fs.SyncDir("/")); err != nil {
		r.t.Fatal(err)
	}
}

func (r *rig) options(takeover bool) Options {
	o := Options{
		Name: "p", FS: r.fs, TierDir: "/host/tier", TierBytes: 16 << 20, SlotBytes: 1 << 20, SegmentBytes: 256 << 10,
		MaxDirtyAge: time.Hour, CreateEmpty: true, Takeover: takeover, Host: "here",
	}
	for i, s := range r.stores {
		o.Targets = append(o.Targets, Target{Name: fmt.Sprintf("t%d", i), Store: s})
	}
	if r.opt != nil {
		r.opt(&o)
	}
	return o
}

func (r *rig) open(takeover bool) {
	r.t.Helper()
	if err := r.tryOpen(takeover); err != nil {
		r.t.Fatal(err)
	}
}

func (r *rig) tryOpen(takeover bool) (err error) {
	r.pool, err = Open(context.Background(), r.options(takeover))
	return err
}

// abandon ends the pool as it is, without publishing.
func (r *rig) abandon() {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	r.pool.Close(ctx)
	r.pool = nil
}

func (r *rig) disk(name string, size int64) *vdisk.Disk {
	r.t.Helper()
	d, err := r.pool.Disk(name)
	if errors.Is(err, ErrNoDisk) {
		d, err = r.pool.CreateDisk(context.Background(), name, size)
	}
	if err != nil {
		r.t.Fatal(err)
	}
	return d
}

func (r *rig) write(d *vdisk.Disk, off int64, p []byte) {
	r.t.Helper()
	if err := d.Write(context.Background(), []vdisk.Op{{Kind: vdisk.OpWrite, Off: off, Len: int64(len(p)), Data: p}}, true); err != nil {
		r.t.Fatal(err)
	}
}

func (r *rig) publish() {
	r.t.Helper()
	if err := r.pool.Publish(context.Background()); err != nil {
		r.t.Fatal(err)
	}
}

func (r *rig) expect(d *vdisk.Disk, want []byte) {
	r.t.Helper()
	got := make([]byte, len(want))
	if err := d.Read(context.Background(), got, 0); err != nil {
		r.t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		for i := range got {
			if got[i] != want[i] {
				r.t.Fatalf("disk %s differs from byte %d on", d.Name(), i)
			}
		}
	}
}

const testDisk = 4 << 20

// scribble writes random pieces to disk and model.
func (r *rig) scribble(d *vdisk.Disk, model []byte, n int) {
	r.t.Helper()
	for range n {
		p := make([]byte, 1+rand.IntN(40<<10))
		for i := range p {
			p[i] = byte(rand.Uint32())
		}
		off := rand.IntN(len(model) - len(p))
		copy(model[off:], p)
		r.write(d, int64(off), p)
	}
}

// TestAPoolComesBackFromItsTargetsAlone loses the host after every few cuts, with published
// checkpoints in between, and one target more each time, put back afterwards.
func TestAPoolComesBackFromItsTargetsAlone(t *testing.T) {
	r := newRig(t, func(o *Options) { o.CheckpointCuts, o.CheckpointBytes = 3, 20<<10 })
	model := make([]byte, testDisk)
	for round := range 6 {
		d := r.disk("d", testDisk)
		r.expect(d, model)
		for range 4 {
			r.scribble(d, model, 12)
			if err := d.Write(context.Background(), []vdisk.Op{{Kind: vdisk.OpTrim, Off: 1 << 20, Len: 64 << 10}}, false); err != nil {
				t.Fatal(err)
			}
			clear(model[1<<20:][:64<<10])
			r.publish()
		}
		r.abandon()
		r.newHost()
		lost := r.stores[round%3]
		lost.SetOffline(true)
		err := r.tryOpen(false)
		if !errors.Is(err, root.ErrHeld) || !strings.Contains(err.Error(), "--takeover") {
			t.Fatalf("round %d: opened without consent: %v", round, err)
		}
		r.open(true)
		r.expect(r.disk("d", testDisk), model)
		lost.SetOffline(false)
	}
	if n := len(r.pool.value().Checkpoints); n != 2 {
		t.Errorf("the root names %d checkpoints, want 2", n)
	}
}

// TestATargetThatIsDownStopsNothing writes and publishes with one target away, and reads it all back
// with each other target away in turn.
func TestATargetThatIsDownStopsNothing(t *testing.T) {
	r := newRig(t, nil)
	model := make([]byte, testDisk)
	d := r.disk("d", testDisk)
	r.scribble(d, model, 20)
	r.publish()
	r.stores[1].SetOffline(true)
	r.scribble(d, model, 20)
	r.publish()
	r.stores[1].SetOffline(false)
	for i := range r.stores {
		r.abandon()
		r.newHost()
		r.stores[i].SetOffline(true)
		r.open(true)
		r.expect(r.disk("d", testDisk), model)
		r.stores[i].SetOffline(false)
	}
}

// TestTheTierStaysWithinItsSize writes and reads many times the tier through it.
func TestTheTierStaysWithinItsSize(t *testing.T) {
	const size = 48 << 20 // three times the tier
	r := newRig(t, func(o *Options) { o.MaxDirtyAge = 20 * time.Millisecond })
	model := make([]byte, size)
	d := r.disk("d", size)
	for off := 0; off < size; off += 1 << 20 {
		p := model[off:][:1<<20]
		for i := 0; i < len(p); i += block.Size {
			p[i] = byte(rand.Uint32())
		}
		r.write(d, int64(off), p)
	}
	r.publish()
	r.expect(d, model)
	if used := r.fs.UsedBytes(); used > 24<<20 {
		t.Errorf("a tier of 16 MiB takes %d bytes", used)
	}
}

// TestAMissIsFetchedOnce has many readers ask for one grain that is not on the tier.
func TestAMissIsFetchedOnce(t *testing.T) {
	r := newRig(t, nil)
	model := make([]byte, testDisk)
	first := r.disk("d", testDisk)
	r.scribble(first, model, 100)
	r.write(first, 0, bytes.Repeat([]byte{5}, block.Size))
	copy(model, bytes.Repeat([]byte{5}, block.Size))
	r.publish()
	r.abandon()
	r.newHost()
	r.open(true)
	d := r.disk("d", testDisk)
	const readers = 16
	gate := make(chan struct{}) // holds every answer back until all readers have asked
	for _, st := range r.stores {
		st.Before = func(op, _ string) error {
			if op == "read" {
				<-gate
			}
			return nil
		}
	}
	before := r.reads()
	var asked sync.WaitGroup
	errs := make(chan error)
	asked.Add(readers)
	for range readers {
		go func() {
			got := make([]byte, block.Size)
			asked.Done()
			errs <- errors.Join(d.Read(context.Background(), got, 0), differ(got, model[:block.Size]))
		}()
	}
	asked.Wait()
	close(gate)
	for range readers {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
	if n := r.reads() - before; n < 1 || n > 2 {
		t.Errorf("%d readers of one grain made %d reads; want one for the segment's index and one for the grain", readers, n)
	}
}

func differ(got, want []byte) error {
	if !bytes.Equal(got, want) {
		return errors.New("wrong bytes")
	}
	return nil
}

func (r *rig) reads() (n int) {
	for _, s := range r.stores {
		n += s.Counts()["read"]
	}
	return n
}

// TestAFormerOwnerIsRefusedAndKeepsItsLog takes a pool over while its owner lives.
func TestAFormerOwnerIsRefusedAndKeepsItsLog(t *testing.T) {
	r := newRig(t, nil)
	model := make([]byte, testDisk)
	d := r.disk("d", testDisk)
	r.scribble(d, model, 5)
	r.publish()
	old, oldFS := r.pool, r.fs
	r.newHost()
	r.open(true)
	r.expect(r.disk("d", testDisk), model)
	if err := d.Write(context.Background(), []vdisk.Op{{Kind: vdisk.OpWrite, Len: 4096, Data: make([]byte, 4096)}}, true); err != nil {
		t.Fatalf("a fenced owner that does not know it yet: %v", err)
	}
	if err := old.Publish(context.Background()); !errors.Is(err, root.ErrFenced) {
		t.Fatalf("the former owner published: %v", err)
	}
	if err := d.Flush(context.Background()); !errors.Is(err, vdisk.ErrFenced) {
		t.Fatalf("the former owner still serves: %v", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	old.Close(ctx)
	newer, newFS := r.pool, r.fs
	r.fs = oldFS
	if err := r.tryOpen(false); !errors.Is(err, ErrForeignTier) {
		t.Fatalf("the former owner's tier was opened: %v", err)
	}
	r.pool, r.fs = newer, newFS
}

// TestTiersAndTargetsThatDoNotBelongTogether covers the refusals of the table at Open.
func TestTiersAndTargetsThatDoNotBelongTogether(t *testing.T) {
	r := newRig(t, nil)
	d := r.disk("d", testDisk)
	r.write(d, 0, make([]byte, 4096))
	r.abandon()
	theirs := r.stores

	r.stores = nil
	for i := range 3 {
		r.stores = append(r.stores, backendtest.NewFaulty(backendtest.NewMemory("other"), uint64(i)))
	}
	if err := r.tryOpen(false); !errors.Is(err, root.ErrNotCreated) {
		t.Errorf("emptied targets under a tier: %v", err)
	}
	for _, s := range r.stores {
		if objs, _, err := s.List(context.Background(), "", "", 10); err != nil || len(objs) > 0 {
			t.Errorf("opening wrote to emptied targets: %v %v", objs, err)
		}
	}
	host := r.fs
	r.newHost()
	r.open(false) // another pool
	r.abandon()
	r.fs = host
	if err := r.tryOpen(false); !errors.Is(err, ErrForeignTier) {
		t.Errorf("another pool's targets under a tier: %v", err)
	}
	r.stores = theirs
	r.open(false)
}

// TestServingGoesOnWithoutTargets opens and writes with every target away, and publishes when they
// are back.
func TestServingGoesOnWithoutTargets(t *testing.T) {
	r := newRig(t, func(o *Options) { o.RootTimeout = 200 * time.Millisecond })
	model := make([]byte, testDisk)
	r.scribble(r.disk("d", testDisk), model, 10)
	r.abandon()
	for _, s := range r.stores {
		s.SetOffline(true)
	}
	r.open(false)
	d := r.disk("d", testDisk)
	r.expect(d, model)
	r.scribble(d, model, 10)
	for _, s := range r.stores {
		s.SetOffline(false)
	}
	r.publish()
	r.abandon()
	r.newHost()
	r.open(true)
	r.expect(r.disk("d", testDisk), model)
}

// TestACleanCloseReleases closes and opens elsewhere without consent.
func TestACleanCloseReleases(t *testing.T) {
	r := newRig(t, nil)
	model := make([]byte, testDisk)
	r.scribble(r.disk("d", testDisk), model, 10)
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if err := r.pool.Close(ctx); err != nil {
		t.Fatal(err)
	}
	first := r.fs
	r.newHost()
	r.open(false)
	r.expect(r.disk("d", testDisk), model)
	if err := r.pool.Close(ctx); err != nil {
		t.Fatal(err)
	}
	r.fs = first // its log holds nothing unpublished: set aside without a word lost
	r.open(false)
	r.expect(r.disk("d", testDisk), model)
}

// TestADiskWhoseCreatorLeftKeepsItsNumber creates a disk for a client that is gone already, another
// for one that is not, and recovers.
func TestADiskWhoseCreatorLeftKeepsItsNumber(t *testing.T) {
	r := newRig(t, nil)
	gone, leave := context.WithCancel(context.Background())
	leave()
	_, _ = r.pool.CreateDisk(gone, "a", testDisk) // whatever it is told
	r.write(r.disk("b", testDisk), 0, bytes.Repeat([]byte{2}, block.Size))
	r.write(r.disk("a", testDisk), 0, bytes.Repeat([]byte{1}, block.Size))
	for range 2 {
		a, b := r.disk("a", testDisk), r.disk("b", testDisk)
		if a.ID() == b.ID() {
			t.Fatalf("both disks have number %d", a.ID())
		}
		r.expect(a, bytes.Repeat([]byte{1}, block.Size))
		r.expect(b, bytes.Repeat([]byte{2}, block.Size))
		r.abandon()
		r.open(false)
	}
}

// TestStatusTellsOfATargetWithoutItsRoot empties one target under a pool.
func TestStatusTellsOfATargetWithoutItsRoot(t *testing.T) {
	r := newRig(t, nil)
	r.disk("d", testDisk)
	r.publish()
	r.abandon()
	if err := r.stores[1].Delete(context.Background(), root.Key); err != nil {
		t.Fatal(err)
	}
	r.open(false)
	for i, s := range r.pool.Status().Targets {
		if want := map[bool]string{true: "missing", false: "ok"}[i == 1]; s.Root != want {
			t.Errorf("target %s: root %q, want %q", s.Name, s.Root, want)
		}
	}
}
