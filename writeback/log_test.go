package writeback

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"path"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"graindisk/block"
	"graindisk/internal/crashtest"
	"graindisk/internal/vfs"
	"graindisk/tier"
)

var bg = context.Background()

// rig is a log on a file system that can crash.
type rig struct {
	t          *testing.T
	fs         *crashtest.FS
	slots      int
	slotBlocks int
	space      *tier.Space
	log        *Log
}

func newRig(t *testing.T, slots, slotBlocks int) *rig {
	t.Helper()
	r := &rig{t: t, fs: crashtest.NewFS(crashtest.Options{}), slots: slots, slotBlocks: slotBlocks}
	if err := errors.Join(r.fs.MkdirAll(testDir), r.fs.SyncDir(".")); err != nil {
		t.Fatal(err)
	}
	r.space = openSpace(t, r.fs, testDir, slots, slotBlocks)
	l, err := Create(r.options())
	if err != nil {
		t.Fatal(err)
	}
	r.log = l
	l.flyFreely()
	t.Cleanup(func() { r.log.Close() })
	return r
}

func (r *rig) options() Options {
	return Options{FS: r.fs, Dir: testDir, Space: r.space, Pool: testPool}
}

// reopen closes the log, hands its files over to after, and opens it there.
func (r *rig) reopen(after func() *crashtest.FS) (*Recovered, error) {
	r.t.Helper()
	r.log.Close()
	r.fs = after()
	r.space = openSpace(r.t, r.fs, testDir, r.slots, r.slotBlocks)
	l, rec, err := Open(r.options())
	if err == nil {
		r.log = l
	}
	return rec, err
}

func (r *rig) append(recs ...Record) Seq {
	r.t.Helper()
	last, err := r.log.Append(bg, recs)
	if err != nil {
		r.t.Fatal(err)
	}
	return last
}

func (r *rig) sync() {
	r.t.Helper()
	if err := r.log.Sync(bg); err != nil {
		r.t.Fatal(err)
	}
}

// expect reads n blocks of disk 1 and compares their stamps; -1 is not in the log, 0 a hole.
func (r *rig) expect(lba block.LBA, want ...int64) {
	r.t.Helper()
	found := make([]Found, len(want))
	var pins Pins
	r.log.Lookup(1, lba, found, &pins)
	defer pins.Release()
	p := make([]byte, len(want)*block.Size)
	if err := r.log.ReadBlocks(1, lba, found, p); err != nil {
		r.t.Fatal(err)
	}
	for i, w := range want {
		got := int64(-1)
		if found[i].State != None {
			got = int64(binary.LittleEndian.Uint64(p[i*block.Size:]))
		}
		if got != w {
			r.t.Errorf("block %d: %d, want %d", lba+block.LBA(i), got, w)
		}
	}
}

func data(lba block.LBA, stamps ...uint64) Record {
	r := Record{Kind: Data, Disk: 1, LBA: lba}
	for _, s := range stamps {
		r.Data = append(r.Data, stampBlock(s)...)
	}
	return r
}

func unmap(lba block.LBA, blocks uint64) Record {
	return Record{Kind: Unmap, Disk: 1, LBA: lba, Blocks: blocks}
}

func TestLookupSeesTheNewestOfAllGenerations(t *testing.T) {
	r := newRig(t, 8, 64)
	r.append(data(0, 1, 2, 3, 4))
	r.log.Freeze()
	r.append(unmap(1, 2), data(2, 30))
	r.expect(0, 1, 0, 30, 4, -1)
	r.append(unmap(0, 1<<34))
	r.expect(0, 0, 0, 0, 0, 0)
	r.append(data(3, 40))
	r.expect(2, 0, 40, 0)
	if got := r.log.Unpublished(); got.Bytes != 6*block.Size || got.Oldest.IsZero() {
		t.Errorf("unpublished %+v, want five blocks and a hole", got)
	}
	if got := r.log.UnpublishedOf(2); got.Bytes != 0 || !got.Oldest.IsZero() {
		t.Errorf("unpublished of an untouched disk %+v", got)
	}
}

func TestHolesMerge(t *testing.T) {
	g := newGeneration(0)
	d := g.disk(1, 1)
	for _, h := range [][2]block.LBA{{10, 20}, {30, 40}, {20, 30}, {5, 8}, {50, 60}, {7, 55}, {61, 62}} {
		d.unmap(h[0], h[1])
	}
	got := (&Frozen{gen: g}).Holes(1)
	if want := []Range{{5, 55}, {61, 1}}; fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("holes %v, want %v", got, want)
	}
}

func TestDataLargerThanAFileIsSplit(t *testing.T) {
	r := newRig(t, 16, 16)
	var stamps []uint64
	var want []int64
	for i := range 50 {
		stamps, want = append(stamps, uint64(i+1)), append(want, int64(i+1))
	}
	r.append(data(7, stamps...), unmap(0, 3))
	r.expect(0, 0, 0, 0)
	r.expect(7, want...)
	if _, err := r.reopen(r.fs.ProcessCrash); err != nil {
		t.Fatal(err)
	}
	r.expect(7, want...)
}

func TestUnsoundRecordsAreRefused(t *testing.T) {
	r := newRig(t, 8, 16)
	for name, rec := range map[string]Record{
		"no data":         {Kind: Data, Disk: 1},
		"part of a block": {Kind: Data, Disk: 1, Data: make([]byte, 100)},
		"beyond the end":  data(lbaMax, 1),
		"empty unmap":     unmap(3, 0),
		"endless unmap":   unmap(3, 1<<63),
		"unknown kind":    {Kind: dataRef, Disk: 1, Blocks: 1},
		"large operation": {Kind: Op, Data: make([]byte, 16*block.Size)},
	} {
		if _, err := r.log.Append(bg, []Record{rec}); err == nil {
			t.Errorf("%s was accepted", name)
		}
	}
	if err := r.log.AppendMeta(metaSealed, nil); err == nil {
		t.Error("a metadata record of the log's own kind was accepted")
	}
}

// slotOf is the slot that holds a block of disk 1.
func (r *rig) placeOf(lba block.LBA) tier.Place {
	var f [1]Found
	var pins Pins
	r.log.Lookup(1, lba, f[:], &pins)
	pins.Release()
	return f[0].Place
}

func (r *rig) corrupt(at tier.Place) {
	r.t.Helper()
	if err := r.fs.Corrupt(path.Join(testDir, tier.Name(at.Slot())), int64(at.Block())*block.Size+99); err != nil {
		r.t.Fatal(err)
	}
}

func TestBadBatchBelowAStableOneIsDamage(t *testing.T) {
	for name, back := range map[string]tier.Place{"payload": 0, "header": 1, "file header": 2} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, 8, 64)
			r.append(data(0, 1))
			r.sync()
			r.append(data(1, 2)) // its header says that record 1 is stable
			r.corrupt(r.placeOf(0) - back)
			if _, err := r.reopen(r.fs.ProcessCrash); !errors.Is(err, ErrDamaged) {
				t.Fatalf("open: %v", err)
			}
		})
	}
}

func TestBadBatchAboveStableIsATornTail(t *testing.T) {
	r := newRig(t, 8, 64)
	r.append(data(0, 1))
	r.sync()
	r.append(data(0, 2))
	r.append(data(1, 3))
	r.corrupt(r.placeOf(0))
	for range 2 {
		rec, err := r.reopen(r.fs.ProcessCrash)
		if err != nil {
			t.Fatal(err)
		}
		if rec.End != 1 {
			t.Errorf("recovered through %d, want 1", rec.End)
		}
		r.expect(0, 1, -1)
	}
	if last := r.append(data(1, 4)); last != 2 {
		t.Errorf("went on at %d, want 2", last)
	}
	if _, err := r.reopen(r.fs.ProcessCrash); err != nil {
		t.Fatal(err)
	}
	r.expect(0, 1, 4)
}

func TestLostFileBelowAStableClaimIsDamage(t *testing.T) {
	for range 50 {
		r := newRig(t, 10, 8)
		r.fs.Inject(crashtest.Fault{Op: crashtest.OpWrite, Path: "*/meta-*", Count: 1}) // no Sealed record
		r.append(data(0, 1))
		first := r.placeOf(0)
		r.sync()
		for i := range block.LBA(3) {
			if _, err := r.log.Append(bg, []Record{data(i+1, uint64(i+2))}); err != nil {
				break
			}
		}
		r.corrupt(first)
		_, err := r.reopen(r.fs.ProcessCrash)
		if err == nil { // the record whose write failed is there whole, or was written anew before the crash
			continue
		}
		if !errors.Is(err, ErrDamaged) {
			t.Fatalf("open: %v", err)
		}
		return
	}
	t.Error("the file was sealed every time")
}

func TestDamagedBlockIsNeverReturned(t *testing.T) {
	r := newRig(t, 8, 64)
	r.append(data(0, 1, 2))
	r.corrupt(r.placeOf(1))
	found := make([]Found, 2)
	var pins Pins
	r.log.Lookup(1, 0, found, &pins)
	defer pins.Release()
	if err := r.log.ReadBlocks(1, 0, found, make([]byte, 2*block.Size)); !errors.Is(err, ErrDamaged) {
		t.Fatalf("read: %v", err)
	}
}

// TestGuestDataCannotImitateABatch writes a byte copy of the log into the log, cuts the tail off
// where a copied header could be met, and expects nothing of the copy to come to life.
func TestGuestDataCannotImitateABatch(t *testing.T) {
	r := newRig(t, 12, 64)
	r.append(data(0, 1), data(1, 2))
	r.append(unmap(0, 1))
	r.sync()
	image := make([]byte, 12*block.Size)
	if err := r.space.ReadAt(tier.NewPlace(r.placeOf(1).Slot(), 0), image); err != nil {
		t.Fatal(err)
	}
	r.append(Record{Kind: Data, Disk: 1, LBA: 100, Data: image})
	at := r.placeOf(100)
	r.append(data(0, 3))
	r.corrupt(at - 1) // the header of the batch with the image: the scan now meets the image itself
	if _, err := r.reopen(r.fs.ProcessCrash); err != nil {
		t.Fatal(err)
	}
	r.expect(0, 0, 2, -1)
	r.expect(100, -1)
}

// TestEarlierLapsStayDead reuses the slots many times and recovers after each lap with a torn tail.
func TestEarlierLapsStayDead(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	fsys := crashtest.NewFS(crashtest.Options{Seed: seed})
	h, err := newHistory(t, seed, fsys)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { h.quit() }()
	for lap := range 12 {
		for range 60 {
			if err := h.append(3); err != nil {
				t.Fatal(err)
			}
		}
		if err := h.run(3); err != nil {
			t.Fatal(err)
		}
		least := h.stable
		h.fs.PowerCut() // before Close could sync
		h.log.Close()
		if err := h.recover(h.fs.Reboot(seed+uint64(lap)), least); err != nil {
			t.Fatalf("lap %d: %v", lap, err)
		}
	}
}

func TestMetadataTornTailAndDamage(t *testing.T) {
	r := newRig(t, 8, 16)
	for i := range byte(3) {
		if err := r.log.AppendMeta(OpaqueMin, []byte{i}); err != nil {
			t.Fatal(err)
		}
	}
	name := path.Join(testDir, metaName(1))
	last := int64(4 * block.Size) // header, Term, then three of ours
	if err := r.fs.Corrupt(name, last+40); err != nil {
		t.Fatal(err)
	}
	rec, err := r.reopen(r.fs.ProcessCrash)
	if err != nil || len(rec.Meta) != 2 {
		t.Fatalf("torn tail: %v, %v", rec, err)
	}
	if err := r.log.AppendMeta(OpaqueMin, []byte{9}); err != nil {
		t.Fatal(err)
	}
	rec, err = r.reopen(r.fs.ProcessCrash)
	if err != nil || len(rec.Meta) != 3 || rec.Meta[2].Payload[0] != 9 {
		t.Fatalf("after the torn tail: %v, %v", rec, err)
	}
	r.log.Close()
	if err := r.fs.Corrupt(name, last-block.Size+40); err != nil {
		t.Fatal(err)
	}
	if _, err = r.reopen(r.fs.ProcessCrash); !errors.Is(err, ErrDamaged) {
		t.Fatalf("damage: %v", err)
	}
}

func TestDamagedCheckpointIsNotSkippedSilently(t *testing.T) {
	r := newRig(t, 8, 16)
	for i := range uint64(2) {
		r.append(data(0, i+1))
		c, err := r.log.FreezeAndRotate(bg)
		if err != nil {
			t.Fatal(err)
		}
		if err := r.log.WriteCheckpoint(c, []byte("state")); err != nil {
			t.Fatal(err)
		}
	}
	rec, err := r.reopen(r.fs.ProcessCrash)
	if err != nil || string(rec.State) != "state" {
		t.Fatalf("%v, %v", rec, err)
	}
	r.expect(0, 2)
	r.log.Close()
	if err := r.fs.Corrupt(path.Join(testDir, ckptName(2)), block.Size+3); err != nil {
		t.Fatal(err)
	}
	if _, err := r.reopen(r.fs.ProcessCrash); !errors.Is(err, ErrDamaged) {
		t.Fatalf("open: %v", err)
	}
}

func TestOpenAndCreateRefuse(t *testing.T) {
	r := newRig(t, 8, 16)
	r.log.Close()
	o := r.options()
	if _, err := Create(o); !errors.Is(err, ErrExists) {
		t.Errorf("create over a log: %v", err)
	}
	o.Pool = UUID{9}
	if _, _, err := Open(o); !errors.Is(err, ErrForeign) {
		t.Errorf("open for another pool: %v", err)
	}
	if err := r.fs.MkdirAll("empty"); err != nil {
		t.Fatal(err)
	}
	o = r.options()
	o.Dir = "empty"
	if _, _, err := Open(o); !errors.Is(err, ErrNoLog) {
		t.Errorf("open of nothing: %v", err)
	}
	if err := r.fs.Remove(path.Join(testDir, identityName)); err != nil {
		t.Fatal(err)
	}
	if err := r.fs.Rename(path.Join(testDir, metaName(1)), path.Join(testDir, metaName(2))); err != nil {
		t.Fatal(err)
	}
	if _, err := Create(r.options()); !errors.Is(err, ErrDamaged) {
		t.Errorf("create over remains: %v", err)
	}
}

func TestHorizonAboveTheEndDropsEverything(t *testing.T) {
	r := newRig(t, 8, 16)
	r.append(data(0, 1))
	if _, err := r.reopen(r.fs.ProcessCrash); err != nil {
		t.Fatal(err)
	}
	if err := r.log.DropThrough(100); err != nil {
		t.Fatal(err)
	}
	r.expect(0, -1)
	if last := r.append(data(0, 2)); last != 101 {
		t.Errorf("went on at %d, want 101", last)
	}
	rec, err := r.reopen(r.fs.ProcessCrash)
	if err != nil || rec.End != 101 {
		t.Fatalf("%+v, %v", rec, err)
	}
	r.expect(0, 2)
}

// TestFullTierHoldsBackDataOnly fills the tier, and expects DATA to wait while UNMAP, OP, Sync and
// reads pass, until a publication frees slots.
func TestFullTierHoldsBackDataOnly(t *testing.T) {
	r := newRig(t, 6, 8)
	stuck := make(chan error, 1)
	var n atomic.Uint64
	go func() {
		for {
			ctx, cancel := context.WithTimeout(bg, 200*time.Millisecond)
			_, err := r.log.Append(ctx, []Record{data(block.LBA(n.Load()), n.Load()+1)})
			cancel()
			if err != nil {
				stuck <- err
				return
			}
			n.Add(1)
		}
	}()
	if err := <-stuck; !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("full tier: %v", err)
	}
	if !r.log.Pressure().Waiting || n.Load() == 0 {
		t.Errorf("after %d blocks: %+v", n.Load(), r.log.Pressure())
	}
	waiting := make(chan error, 1)
	go func() {
		_, err := r.log.Append(bg, []Record{data(500, 500)})
		waiting <- err
	}()
	for i := range block.LBA(6) {
		r.append(unmap(i, 1), Record{Kind: Op, Disk: 1, Data: []byte("op")})
	}
	r.sync()
	r.expect(0, 0, 0)
	select {
	case err := <-waiting:
		t.Fatalf("data passed on a full tier: %v", err)
	default:
	}
	f := r.log.Freeze()
	r.sync()
	if err := r.log.AppendMeta(OpaqueMin, []byte("published")); err != nil {
		t.Fatal(err)
	}
	if err := r.log.Publish(f); err != nil {
		t.Fatal(err)
	}
	if err := <-waiting; err != nil {
		t.Fatal(err)
	}
	r.expect(500, 500)
}

func TestCancelledAppendLeavesTheQueue(t *testing.T) {
	r := newRig(t, 4, 4)
	for i := range uint64(100) {
		ctx, cancel := context.WithTimeout(bg, 100*time.Millisecond)
		_, err := r.log.Append(ctx, []Record{data(0, i+1)})
		cancel()
		if err != nil {
			break
		}
	}
	ctx, cancel := context.WithCancel(bg)
	cancel()
	if _, err := r.log.Append(ctx, []Record{data(0, 7)}); !errors.Is(err, context.Canceled) {
		t.Fatalf("append: %v", err)
	}
	r.append(unmap(0, 1))
	r.expect(0, 0)
}

// TestConcurrentUse has appenders, each with blocks of its own, readers, syncers, freezes,
// publications and checkpoints at once; each appender must always read what it wrote last, from
// the log or, once published, from the model of what was.
func TestConcurrentUse(t *testing.T) {
	const writers, blocks, rounds = 8, 16, 150
	r := newRig(t, 24, 32)
	var published [writers * blocks]atomic.Uint64
	var done atomic.Bool
	var background, work sync.WaitGroup
	background.Go(func() {
		var list []*Frozen
		for n := 0; !done.Load(); n++ {
			if n%4 == 0 {
				c, err := r.log.FreezeAndRotate(bg)
				if err == nil {
					err = r.log.WriteCheckpoint(c, nil)
				}
				if err != nil {
					t.Error(err)
					return
				}
				list = append(list, c.Frozen)
			} else {
				list = append(list, r.log.Freeze())
			}
			if err := publishAll(r, list, published[:]); err != nil {
				t.Error(err)
				return
			}
			list = list[:0]
		}
	})
	background.Go(func() {
		for !done.Load() {
			if err := r.log.Sync(bg); err != nil {
				t.Error(err)
				return
			}
			r.log.Unpublished()
			r.log.Pressure()
		}
	})
	for w := range uint64(writers) {
		work.Go(func() {
			var last [blocks]uint64
			rng := rand.New(rand.NewPCG(w, 1))
			for i := range uint64(rounds) {
				at := rng.IntN(blocks - 2)
				stamp := w<<32 | i + 1
				last[at], last[at+1] = stamp, stamp
				if _, err := r.log.Append(bg, []Record{data(block.LBA(int(w)*blocks+at), stamp, stamp)}); err != nil {
					t.Error(err)
					return
				}
				if err := r.checkOwn(int(w)*blocks, last[:], published[:]); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	work.Wait()
	done.Store(true)
	background.Wait()
}

func publishAll(r *rig, list []*Frozen, published []atomic.Uint64) error {
	p := make([]byte, block.Size)
	for _, f := range list {
		for _, b := range f.Blocks(1) {
			if err := r.log.ReadBlocks(1, b.LBA, []Found{{Present, b.CRC, b.Place}}, p); err != nil {
				return err
			}
			published[b.LBA].Store(binary.LittleEndian.Uint64(p))
		}
		if err := r.log.Sync(bg); err != nil {
			return err
		}
		if err := r.log.AppendMeta(OpaqueMin, nil); err != nil {
			return err
		}
		if err := r.log.Publish(f); err != nil {
			return err
		}
	}
	return nil
}

func (r *rig) checkOwn(lba int, want []uint64, published []atomic.Uint64) error {
	found := make([]Found, len(want))
	var pins Pins
	r.log.Lookup(1, block.LBA(lba), found, &pins)
	defer pins.Release()
	p := make([]byte, len(want)*block.Size)
	if err := r.log.ReadBlocks(1, block.LBA(lba), found, p); err != nil {
		return err
	}
	for i, w := range want {
		got := binary.LittleEndian.Uint64(p[i*block.Size:])
		if found[i].State == None {
			got = published[lba+i].Load()
		}
		if got != w {
			return fmt.Errorf("block %d: %#x, want %#x (state %d)", lba+i, got, w, found[i].State)
		}
	}
	return nil
}

func TestDescribeNamesWhatIsThere(t *testing.T) {
	r := newRig(t, 8, 8)
	r.append(data(0, 1, 2, 3), Record{Kind: Op, Disk: 4, Data: []byte("snap")})
	r.append(data(0, 1, 2, 3), unmap(3, 9))
	c, err := r.log.FreezeAndRotate(bg)
	if err == nil {
		err = r.log.WriteCheckpoint(c, []byte("state"))
	}
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	if err := Describe(&out, r.fs, testDir); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"identity: log " + r.log.UUID().String(), "checkpoint 1 through 5", "meta-000002: metadata log 2 after 1",
		"log file 1 of term", "op on disk 4, 4 bytes", "unmap disk 1, 9 blocks at 3", "whole"} {
		if !bytes.Contains(out.Bytes(), []byte(want)) {
			t.Errorf("%q is missing in\n%s", want, &out)
		}
	}
}

func benchLog(b *testing.B) *Log {
	dir := b.TempDir()
	space, err := tier.Open(tier.Options{FS: vfs.OS{}, Dir: dir, SlotBytes: 64 << 20, Slots: 16})
	if err != nil {
		b.Fatal(err)
	}
	l, err := Create(Options{FS: vfs.OS{}, Dir: dir, Space: space, Pool: testPool})
	if err != nil {
		b.Fatal(err)
	}
	stop, ended := make(chan struct{}), make(chan struct{})
	go func() { // publish now and then, so that there is always space
		defer close(ended)
		tick := time.NewTicker(50 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-stop:
				return
			case <-tick.C:
				f := l.Freeze()
				if err := errors.Join(l.Sync(bg), l.Publish(f)); err != nil {
					b.Error(err)
				}
			}
		}
	}()
	b.Cleanup(func() { close(stop); <-ended; l.Close(); space.Close() })
	return l
}

func BenchmarkAppend(b *testing.B) {
	for _, c := range []struct {
		name    string
		callers int
		bytes   int
		sync    bool
	}{
		{"callers=1/io=4KiB", 1, 4 << 10, false},
		{"callers=32/io=4KiB", 32, 4 << 10, false},
		{"callers=1/io=4KiB/sync", 1, 4 << 10, true},
		{"callers=32/io=4KiB/sync", 32, 4 << 10, true},
		{"callers=4/io=1MiB", 4, 1 << 20, false},
	} {
		b.Run(c.name, func(b *testing.B) {
			l := benchLog(b)
			b.SetBytes(int64(c.bytes))
			var n atomic.Int64
			var wg sync.WaitGroup
			for id := range c.callers {
				wg.Go(func() {
					p := make([]byte, c.bytes)
					rng := rand.New(rand.NewPCG(uint64(id), 1))
					for n.Add(1) <= int64(b.N) {
						lba := block.LBA(rng.IntN(1<<18)) * block.LBA(c.bytes/block.Size)
						if _, err := l.Append(bg, []Record{{Kind: Data, Disk: 1, LBA: lba, Data: p}}); err != nil {
							b.Error(err)
						}
						if c.sync {
							if err := l.Sync(bg); err != nil {
								b.Error(err)
							}
						}
					}
				})
			}
			wg.Wait()
		})
	}
}
