package pool

import (
	"context"
	"io/fs"
	"math/rand/v2"
	"strings"
	"syscall"
	"testing"
	"time"

	"graindisk/block"
	"graindisk/internal/crashtest"
)

// fill writes the whole of a disk in pieces of 64 KiB.
func (r *rig) fill(name string, size int) []byte {
	r.t.Helper()
	d := r.disk(name, int64(size))
	model := make([]byte, size)
	for off := 0; off < size; off += 64 << 10 {
		p := model[off:][:64<<10]
		for i := 0; i < len(p); i += block.Size {
			p[i], p[i+1] = byte(rand.Uint32()), byte(i>>12)
		}
		r.write(d, int64(off), p)
	}
	return model
}

// TestTheCacheIsWarmAfterARestart reads everything after a clean close, and after the death of the process:
// then only what lay in the slots that were not full yet is asked of the targets.
func TestTheCacheIsWarmAfterARestart(t *testing.T) {
	r := newRig(t, func(o *Options) { o.RAMBytes = 1 << 20 })
	model := r.fill("d", 6<<20)
	r.publish()
	if err := r.pool.Close(context.Background()); err != nil {
		t.Fatal(err)
	}
	restart := func() int {
		r.open(false)
		before := r.reads()
		r.pool.cache.WaitLoaded()
		r.expect(r.disk("d", int64(len(model))), model)
		return r.reads() - before
	}
	if n := restart(); n != 0 {
		t.Errorf("%d requests to the targets after a clean close, want none", n)
	}

	model = r.fill("d", 6<<20)
	r.publish()
	r.fs = r.fs.ProcessCrash()
	killed := restart()
	if s := r.pool.cache.Stats(); s.CRCFailures > 0 || killed >= 20 {
		t.Errorf("%d requests to the targets after a kill; %+v", killed, s)
	}
	t.Logf("%d requests to the targets after a kill", killed)
}

// TestTheTierChangesItsSize fills most of a tier with writes that cannot be published, and goes on with
// half of it, and then with twice.
func TestTheTierChangesItsSize(t *testing.T) {
	size := int64(16 << 20)
	r := newRig(t, func(o *Options) { o.TierBytes, o.RootTimeout = size, 200*time.Millisecond })
	for _, s := range r.stores {
		s.SetOffline(true)
	}
	model := r.fill("d", 10<<20)
	r.abandon()
	for _, s := range r.stores {
		s.SetOffline(false)
	}
	size = 8 << 20
	r.open(false)
	d := r.disk("d", int64(len(model)))
	r.expect(d, model)
	r.publish()
	p := make([]byte, 1<<20)
	for i := range 24 {
		p[0] = byte(i)
		copy(model, p)
		r.write(d, 0, p)
		r.publish()
	}
	r.expect(d, model)
	if n, used := r.slotFiles(); n > 8 || used > 8 {
		t.Errorf("%d slot files, up to number %d, in a tier of 8", n, used-1)
	}
	r.abandon()
	size = 24 << 20
	r.open(false)
	d = r.disk("d", int64(len(model)))
	r.expect(d, model)
	if free, _, clean := r.pool.space.Counts(); free+clean < 16 {
		t.Errorf("%d free and %d clean slots in a tier grown to 24", free, clean)
	}
	model = r.fill("d", 10<<20)
	r.publish()
	r.expect(r.disk("d", int64(len(model))), model)
}

// TestAnOpenThatFailsLeavesASmallerTierAlone fails once to recover a tier that has been made smaller since,
// at each sync of the recovery in turn. What the log holds beyond the new size must be there when an open
// succeeds.
func TestAnOpenThatFailsLeavesASmallerTierAlone(t *testing.T) {
	size := int64(16 << 20)
	r := newRig(t, func(o *Options) { o.TierBytes, o.RootTimeout = size, 200*time.Millisecond })
	for _, s := range r.stores {
		s.SetOffline(true)
	}
	model := r.fill("d", 10<<20)
	r.abandon()
	for _, s := range r.stores {
		s.SetOffline(false)
	}
	size = 8 << 20
	was, used := r.slotFiles()
	if used <= 8 {
		t.Fatalf("slots up to number %d are in use, none is beyond the smaller tier", used-1)
	}
	failed := 0
	for skip := 0; ; skip++ {
		r.fs.Inject(crashtest.Fault{Op: crashtest.OpSync, Path: "host/tier/*", Skip: skip, Count: 1, Err: syscall.EIO})
		p, err := Open(context.Background(), r.options(false))
		r.fs.ClearFaults()
		if err == nil {
			r.pool = p
			break
		}
		failed++
		if n, _ := r.slotFiles(); n != was {
			t.Fatalf("%d of %d slot files are left after an open that failed with: %v", n, was, err)
		}
	}
	if failed < 3 {
		t.Errorf("only %d opens failed", failed)
	}
	r.expect(r.disk("d", int64(len(model))), model)
}

// slotFiles counts the slot files on the tier, and tells how many slots it takes to have the last.
func (r *rig) slotFiles() (n, slots int) {
	r.t.Helper()
	names, err := r.fs.ReadDir("/host/tier")
	if err != nil {
		r.t.Fatal(err)
	}
	for _, e := range names {
		if strings.HasPrefix(e.Name(), "slot-") && !strings.HasSuffix(e.Name(), ".idx") {
			n++
			slots = max(slots, number(e)+1)
		}
	}
	return n, slots
}

func number(e fs.DirEntry) (n int) {
	for _, c := range strings.TrimPrefix(e.Name(), "slot-") {
		n = 10*n + int(c-'0')
	}
	return n
}
