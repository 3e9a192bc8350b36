package pool

import (
	"bytes"
	"context"
	"io/fs"
	"math/rand/v2"
	"path"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"graindisk/block"
	"graindisk/grains/bootprofile"
	"graindisk/vdisk"
)

const bootSize = 8 << 20

// bootGrains are the grains that a guest reads as it boots, in its order.
func bootGrains() []int { return rand.New(rand.NewPCG(1, 1)).Perm(bootSize / GrainBytes)[:40] }

// boot reads a little of each grain.
func (r *rig) boot(d *vdisk.Disk, model []byte, grains []int) {
	r.t.Helper()
	p := make([]byte, block.Size)
	for _, g := range grains {
		off := g*GrainBytes + g%16*block.Size
		if err := d.Read(context.Background(), p, int64(off)); err != nil || !bytes.Equal(p, model[off:][:len(p)]) {
			r.t.Fatalf("grain %d: %v", g, err)
		}
	}
}

// closed closes the pool and returns it: its files can still be read and written.
func (r *rig) closed() *Pool {
	r.t.Helper()
	p := r.pool
	r.close()
	return p
}

// bootedRig is a pool with a disk that has been booted once, and closed.
func bootedRig(t *testing.T) (*rig, []byte, *Pool) {
	r := newRig(t, func(o *Options) { o.CheckpointCuts = 1 })
	model := r.fill("d", bootSize)
	r.close()
	r.open(false)
	r.boot(r.disk("d", bootSize), model, bootGrains())
	r.write(r.disk("other", 1<<20), 0, make([]byte, block.Size)) // so that there is something to publish
	return r, model, r.closed()
}

// bootAgain expects the second boot to ask the targets for nothing, because the first was read ahead.
func (r *rig) bootAgain(model []byte) {
	r.t.Helper()
	r.pool.ahead.Wait()
	grains := bootGrains()
	if got := r.pool.boots.warmed.Load(); got != int64(len(grains))*GrainBytes {
		r.t.Errorf("%d bytes were read ahead, the boot had %d", got, len(grains)*GrainBytes)
	}
	if f := r.pool.fetcher.Stats().Fetched; f != uint64(len(grains)) {
		r.t.Errorf("%d extents were fetched, want the boot's %d", f, len(grains))
	}
	before := r.reads()
	r.boot(r.disk("d", bootSize), model, grains)
	if n := r.reads() - before; n != 0 {
		r.t.Errorf("the second boot made %d requests", n)
	}
	r.expect(r.disk("d", bootSize), model) // and the rest is where it was
}

// TestASecondBootComesFromTheTier boots once, loses what the tier caches or the whole host, and boots again.
func TestASecondBootComesFromTheTier(t *testing.T) {
	t.Run("on a fresh host", func(t *testing.T) {
		r, model, _ := bootedRig(t)
		r.newHost()
		r.open(false)
		r.bootAgain(model)
		names, err := r.fs.ReadDir("/host/tier") // this host keeps it too
		if err != nil || !slices.ContainsFunc(names, func(e fs.DirEntry) bool { return e.Name() == "boot-000001" }) {
			t.Errorf("no profile on the tier: %v, %v", names, err)
		}
	})
	t.Run("on a tier that lost its index", func(t *testing.T) {
		r, model, _ := bootedRig(t)
		r.loseIndex()
		r.open(false)
		r.bootAgain(model)
	})
}

// loseIndex makes all slots of the tier cold.
func (r *rig) loseIndex() {
	r.t.Helper()
	names, err := r.fs.ReadDir("/host/tier")
	if err != nil {
		r.t.Fatal(err)
	}
	for _, e := range names {
		if strings.HasSuffix(e.Name(), ".idx") {
			if err := r.fs.Remove(path.Join("/host/tier", e.Name())); err != nil {
				r.t.Fatal(err)
			}
		}
	}
}

// TestAWarmTierReadsNothingAhead opens again what was closed a moment ago.
func TestAWarmTierReadsNothingAhead(t *testing.T) {
	r, model, _ := bootedRig(t)
	before := r.reads()
	r.open(false)
	r.pool.ahead.Wait()
	if n := r.reads() - before; n != 0 || r.pool.boots.warmed.Load() != 0 {
		t.Errorf("%d requests, %d bytes read ahead", n, r.pool.boots.warmed.Load())
	}
	r.expect(r.disk("d", bootSize), model)
}

// TestADamagedProfileIsNone tears the file, and takes one of another pool.
func TestADamagedProfileIsNone(t *testing.T) {
	for name, change := range map[string]func([]byte) []byte{
		"torn":            func(b []byte) []byte { return b[:len(b)-1] },
		"of another pool": func(b []byte) []byte { p, _ := bootprofile.Decode(b); p.Pool[3]++; return p.Encode() },
		"too long":        func(b []byte) []byte { return append(b, make([]byte, bootprofile.BytesMax)...) },
	} {
		r, model, p := bootedRig(t)
		b, err := p.readBoot(1)
		if err != nil || len(b) < 40 {
			t.Fatalf("%d bytes of profile: %v", len(b), err)
		}
		if err := p.writeBoot(1, change(b), ".test"); err != nil {
			t.Fatal(err)
		}
		r.loseIndex()
		r.open(false)
		r.pool.ahead.Wait()
		if n := r.pool.boots.warmed.Load(); n != 0 {
			t.Errorf("%s: %d bytes were read ahead", name, n)
		}
		r.expect(r.disk("d", bootSize), model)
	}
}

// TestAShortRecordingReplacesNothing reads one block after the next open: the profile stays. Reading half as much
// as in the first boot makes a new one.
func TestAShortRecordingReplacesNothing(t *testing.T) {
	r, model, _ := bootedRig(t)
	for _, c := range []struct{ read, want int }{{1, 40}, {20, 20}, {39, 39}} {
		r.open(false)
		r.boot(r.disk("d", bootSize), model, bootGrains()[:c.read])
		b, err := r.closed().readBoot(1)
		if err != nil {
			t.Fatal(err)
		}
		p, err := bootprofile.Decode(b)
		if err != nil || p.Blocks() != int64(c.want*grainBlocks) {
			t.Errorf("after reading %d grains the profile has %d, %v; want %d", c.read, p.Blocks()/grainBlocks, err, c.want)
		}
	}
}

// TestRecordingEndsByItself has a recording end with its time, with the process alive and then killed.
func TestRecordingEndsByItself(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, nil)
		model := r.fill("d", bootSize)
		r.publish()
		d := r.disk("d", bootSize)
		r.boot(d, model, bootGrains()[:10])
		time.Sleep(bootWindow / 2)
		r.boot(d, model, bootGrains()[10:30])
		time.Sleep(bootWindow)
		r.boot(d, model, bootGrains()[30:])
		synctest.Wait()
		b, err := r.pool.readBoot(1)
		if err != nil {
			t.Fatal(err)
		}
		if p, err := bootprofile.Decode(b); err != nil || p.Blocks() != 30*grainBlocks {
			t.Errorf("%d grains recorded in a minute, %v; want 30", p.Blocks()/grainBlocks, err)
		}
		r.abandon()
	})
}

// allOf is a profile of a whole disk.
func allOf(size int64) []bootprofile.Range {
	return []bootprofile.Range{{First: 0, Blocks: uint32(size / block.Size)}}
}

// TestWarmingEvictsNothing has a tier that is cold but for what was read a moment ago, and a profile of more than
// the rest of it can hold.
func TestWarmingEvictsNothing(t *testing.T) {
	const size, hotSize = 24 << 20, 8 << 20
	profile := int64(-1)
	r := newRig(t, func(o *Options) { o.BootBytes = profile }) // a tier of 16 MiB
	model := r.fill("d", size)
	r.close()
	r.loseIndex()
	r.open(false)
	hot := model[size-hotSize:]
	p := make([]byte, hotSize)
	for before := -1; r.reads() != before; { // until all of it comes from the tier: a busy cache leaves fills out
		before = r.reads()
		if err := r.disk("d", size).Read(context.Background(), p, size-hotSize); err != nil {
			t.Fatal(err)
		}
	}
	d := r.disk("d", size).ID()
	if err := r.closed().keepBoot(d, allOf(size)); err != nil {
		t.Fatal(err)
	}
	profile = 0
	r.open(false)
	r.pool.ahead.Wait()
	s, warmed := r.pool.cache.Stats(), r.pool.boots.warmed.Load()
	free, _, _ := r.pool.space.Counts()
	t.Logf("%d bytes were read ahead, %d slots are left free", warmed, free)
	if s.Evicted > 0 || free < 2 || warmed == 0 || warmed > 3<<20 {
		t.Errorf("%d bytes were read ahead, %d entries evicted, %d slots are left free", warmed, s.Evicted, free)
	}
	before := r.reads()
	if err := r.disk("d", size).Read(context.Background(), p, size-hotSize); err != nil || !bytes.Equal(p, hot) {
		t.Fatal(err)
	}
	if n := r.reads() - before; n > 0 {
		t.Errorf("%d requests for what was hot", n)
	}
}

// warmingRig is a pool that is being opened on a fresh host with a profile of a whole disk of size bytes, over a wire.
func warmingRig(t *testing.T, latency time.Duration, size int) *rig {
	w := newWire(latency, 1e12)
	r, d, _ := farRig(t, w, size)
	p := r.pool
	r.abandon()
	if err := p.keepBoot(d.ID(), allOf(int64(size))); err != nil {
		t.Fatal(err)
	}
	r.open(false)
	return r
}

// TestWarmingIsPaced reads 24 MiB ahead, as fast as it may, then beside guests that wait for targets all the time.
func TestWarmingIsPaced(t *testing.T) {
	const size = 24 << 20
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		r := warmingRig(t, time.Nanosecond, size)
		opened := time.Since(start)
		r.pool.ahead.Wait()
		took := time.Since(start) - opened
		if want := time.Duration(size) * time.Second / warmRate; r.pool.boots.warmed.Load() != size || took < want*9/10 || took > 2*want {
			t.Errorf("%d bytes in %v, want about %v", r.pool.boots.warmed.Load(), took, want)
		}
		r.abandon()
	})
	synctest.Test(t, func(t *testing.T) {
		r := warmingRig(t, time.Nanosecond, size)
		leave := r.pool.foreground.enter()
		before := r.pool.boots.warmed.Load()
		time.Sleep(5 * warmYield)
		if n := r.pool.boots.warmed.Load() - before; n < 4*warmBatch || n > 7*warmBatch {
			t.Errorf("%d bytes in %v beside guests that wait", n, 5*warmYield)
		}
		leave()
		r.pool.ahead.Wait()
		if n := r.pool.boots.warmed.Load(); n != size {
			t.Errorf("%d bytes in the end", n)
		}
		r.abandon()
	})
}

// TestCloseEndsWarming closes a pool that has read little of a profile, over a store that takes a second.
func TestCloseEndsWarming(t *testing.T) {
	const size = 24 << 20
	synctest.Test(t, func(t *testing.T) {
		r := warmingRig(t, time.Second, size)
		time.Sleep(5 * time.Second)
		p, start := r.pool, time.Now()
		r.abandon()
		if took := time.Since(start); took > 3*time.Second {
			t.Errorf("Close took %v", took)
		}
		if n := p.boots.warmed.Load(); n == 0 || n > size/2 {
			t.Errorf("%d bytes of %d were read ahead in five seconds", n, size)
		}
	})
}

// TestProfilesInACheckpoint splits a snapshot with boot profiles into tables and joins it again: each profile is
// there once, and counts as the rows that its length is worth.
func TestProfilesInACheckpoint(t *testing.T) {
	s := &snapshot{Format: snapshotFormat, Cut: 3}
	var profiles [][]byte
	for id := block.DiskID(1); id <= 5; id++ {
		p := bootprofile.Profile{Disk: id}
		for i := range 100 * int(id) {
			p.Ranges = append(p.Ranges, bootprofile.Range{First: block.LBA(1000 * i), Blocks: 16})
		}
		profiles = append(profiles, p.Encode())
		d := diskState{Disk: id, Boot: profiles[id-1]}
		for i := range 4 {
			d.Runs = append(d.Runs, runRef{ID: uint64(id)*10 + uint64(i), Part: 1, Len: 5})
		}
		s.Disks = append(s.Disks, d)
	}
	manifest, tables, err := s.split(2, 3)
	if err != nil || len(tables) < 9 { // 25 rows, and as many again for the profiles
		t.Fatalf("%d tables, %v", len(tables), err)
	}
	got, err := decodeSnapshot(manifest)
	if err != nil || len(got.Disks) > 0 {
		t.Fatalf("%+v, %v", got, err)
	}
	for i, ref := range got.Tables {
		if err := got.join(ref, tables[i]); err != nil {
			t.Fatal(err)
		}
	}
	for i, d := range got.Disks {
		if !bytes.Equal(d.Boot, profiles[i]) || len(d.Runs) != 4 {
			t.Errorf("disk %d: a profile of %d bytes, want %d; %d runs", d.Disk, len(d.Boot), len(profiles[i]), len(d.Runs))
		}
	}
	if n := bytes.Count(bytes.Join(tables, nil), []byte(`"boot"`)); n != 5 {
		t.Errorf("%d profiles in the tables, want 5", n)
	}
	var text strings.Builder
	describeTable(&text, got.Disks, nil)
	if !strings.Contains(text.String(), "boot       200 ranges, 13107200 bytes\n") {
		t.Errorf("described as %s", text.String())
	}
}
