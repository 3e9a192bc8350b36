package writeback

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"graindisk/block"
	"graindisk/internal/crashtest"
	"graindisk/tier"
)

const (
	slotFiles = "tier/slot-*"
	metaFiles = "tier/meta-*"
)

// keepNothing reboots to what is stable and nothing else.
func (r *rig) keepNothing() *crashtest.FS { return r.fs.RebootKeep(1, crashtest.KeepNone) }

// stableNow is what a power cut would leave at least: blocks 0, 1, … of disk 1.
func (r *rig) stableNow(want ...int64) {
	r.t.Helper()
	if _, err := r.reopen(r.keepNothing); err != nil {
		r.t.Fatal(err)
	}
	if err := r.log.DropThrough(0); err != nil {
		r.t.Fatal(err)
	}
	r.expect(0, want...)
}

func TestFailedCallsAreSurvived(t *testing.T) {
	for _, c := range []struct {
		name  string
		fault crashtest.Fault
	}{
		{"a sync", crashtest.Fault{Op: crashtest.OpSync, Path: slotFiles, Count: 1}},
		{"a sync, and those of two fresh files", crashtest.Fault{Op: crashtest.OpSync, Path: slotFiles, Count: 3}},
		{"a write", crashtest.Fault{Op: crashtest.OpWrite, Path: slotFiles, Count: 1}},
		{"a write, and those into two fresh files", crashtest.Fault{Op: crashtest.OpWrite, Path: slotFiles, Count: 3}},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := newRig(t, 8, 64)
			r.append(data(0, 1))
			r.sync()
			r.settle()
			r.append(data(1, 2))
			r.fs.Inject(c.fault)
			r.append(data(2, 3, 4))
			r.sync()
			if got := r.log.Health(); got.Mended != 1 || got.Failed != nil {
				t.Errorf("health is %+v", got)
			}
			r.expect(0, 1, 2, 3, 4)
			r.append(data(4, 5)) // goes on in the same file
			r.sync()
			if _, busy, _ := r.space.Counts(); busy > 1+aheadSlots {
				t.Errorf("%d slots are busy: one was lost", busy)
			}
			r.stableNow(1, 2, 3, 4, 5)
		})
	}
}

// settle waits until the slots ahead are ready, so that faults meet the log's own calls only.
func (r *rig) settle() {
	for ready := 0; ready < aheadSlots; time.Sleep(time.Millisecond) {
		r.log.mu.Lock()
		ready = len(r.log.ready)
		r.log.mu.Unlock()
	}
}

func TestFailedRenameOrFolderSyncIsSurvived(t *testing.T) {
	for _, op := range []crashtest.Op{crashtest.OpRename, crashtest.OpSyncDir} {
		t.Run(op.String(), func(t *testing.T) {
			r := newRig(t, 8, 64)
			r.append(data(0, 1))
			r.settle()
			r.fs.Inject(crashtest.Fault{Op: crashtest.OpSync, Path: slotFiles, Count: 1})
			r.fs.Inject(crashtest.Fault{Op: op, Count: 2})
			r.sync()
			r.stableNow(1)
		})
	}
}

func TestLogStopsWhenNoFreshFileTakesIt(t *testing.T) {
	for _, op := range []crashtest.Op{crashtest.OpSync, crashtest.OpWrite} {
		t.Run(op.String(), func(t *testing.T) {
			r := newRig(t, 8, 64)
			r.append(data(0, 1))
			r.sync()
			r.append(data(1, 2))
			r.settle()
			stable := r.log.Stable()
			r.fs.Inject(crashtest.Fault{Op: op, Path: slotFiles})
			_, appended := r.log.Append(bg, []Record{data(2, 3)})
			if err := errors.Join(appended, r.log.Sync(bg)); !errors.Is(err, ErrFailed) {
				t.Fatalf("append and sync: %v", err)
			}
			r.fs.ClearFaults()
			for range 2 {
				if err := r.log.Sync(bg); !errors.Is(err, ErrFailed) {
					t.Errorf("sync after the log stopped: %v", err)
				}
				if _, err := r.log.Append(bg, []Record{data(2, 3)}); !errors.Is(err, ErrFailed) {
					t.Errorf("append after the log stopped: %v", err)
				}
			}
			if r.log.Stable() != stable {
				t.Errorf("stable went from %d to %d", stable, r.log.Stable())
			}
			r.expect(0, 1, 2)
			r.stableNow(1)
		})
	}
}

// TestLostBytesAreNotFlushed spoils a block that a failed sync left in the page cache alone.
func TestLostBytesAreNotFlushed(t *testing.T) {
	r := newRig(t, 8, 64)
	r.append(data(0, 1))
	r.sync()
	r.append(data(1, 2))
	r.corrupt(r.placeOf(1))
	r.fs.Inject(crashtest.Fault{Op: crashtest.OpSync, Path: slotFiles, Count: 1})
	if err := r.log.Sync(bg); !errors.Is(err, ErrFailed) || !errors.Is(err, ErrDamaged) {
		t.Fatalf("sync over a lost write: %v", err)
	}
}

// TestDamageBelowStableDoesNotStopTheMending copies a block that rotted after it was stable as it is.
func TestDamageBelowStableDoesNotStopTheMending(t *testing.T) {
	r := newRig(t, 8, 64)
	r.append(data(0, 1))
	r.sync()
	r.append(data(1, 2))
	r.corrupt(r.placeOf(0))
	r.fs.Inject(crashtest.Fault{Op: crashtest.OpSync, Path: slotFiles, Count: 1})
	r.sync()
	r.expect(1, 2)
}

func TestFailedMetadataAppendIsSurvived(t *testing.T) {
	for _, op := range []crashtest.Op{crashtest.OpWrite, crashtest.OpSync} {
		for _, count := range []int{1, 3} {
			for _, failure := range []error{syscall.EIO, syscall.ENOSPC} {
				t.Run(fmt.Sprint(op, count, failure), func(t *testing.T) {
					r := newRig(t, 8, 64)
					if err := r.log.AppendMeta(20, []byte("before")); err != nil {
						t.Fatal(err)
					}
					before := r.log.meta.file
					r.fs.Inject(crashtest.Fault{Op: op, Path: metaFiles, Count: count, Err: failure})
					for _, s := range []string{"large" + string(make([]byte, 3*block.Size)), "after"} {
						if err := r.log.AppendMeta(20, []byte(s)); err != nil {
							t.Fatal(err)
						}
					}
					if inDoubt := op == crashtest.OpSync || failure == syscall.EIO; (r.log.meta.file != before) != inDoubt {
						t.Error("went on in a file that is in doubt, or left one that is not")
					}
					rec, err := r.reopen(r.keepNothing)
					if err != nil {
						t.Fatal(err)
					}
					if len(rec.Meta) != 3 || string(rec.Meta[0].Payload) != "before" || string(rec.Meta[2].Payload) != "after" {
						t.Fatalf("metadata records %q", rec.Meta)
					}
				})
			}
		}
	}
}

// TestRefusedRecordIsNotLeftBehind starts a new metadata file while the record that was refused in the
// one before, of which all may have been written, waits to be tried again.
func TestRefusedRecordIsNotLeftBehind(t *testing.T) {
	r := newRig(t, 8, 64)
	for range 40 { // what a refused write leaves is drawn: from none to all of it
		r.fs.Inject(crashtest.Fault{Op: crashtest.OpWrite, Path: metaFiles, Count: 1, Err: syscall.ENOSPC})
		m := &r.log.meta
		m.mu.Lock()
		err := m.appendLocked(20, []byte("refused"))
		m.mu.Unlock()
		if !errors.Is(err, syscall.ENOSPC) {
			t.Fatalf("append: %v", err)
		}
		if _, err := r.log.FreezeAndRotate(bg); err != nil {
			t.Fatal(err)
		}
	}
	rec, err := r.reopen(r.fs.ProcessCrash)
	if err != nil {
		t.Fatal(err)
	}
	if len(rec.Meta) != 0 {
		t.Errorf("records %q", rec.Meta)
	}
}

func TestMetadataThatNoFileTakesStopsTheLog(t *testing.T) {
	r := newRig(t, 8, 64)
	r.fs.Inject(crashtest.Fault{Op: crashtest.OpSync, Path: metaFiles})
	if err := r.log.AppendMeta(20, nil); !errors.Is(err, ErrFailed) {
		t.Errorf("append metadata: %v", err)
	}
	if _, err := r.log.Append(bg, []Record{data(0, 1)}); !errors.Is(err, ErrFailed) {
		t.Errorf("append: %v", err)
	}
}

// TestTornCopyIsPassedOver leaves a copy of a file that is not sealed, whose header is torn, in another
// slot, with a file after the first that is stable.
func TestTornCopyIsPassedOver(t *testing.T) {
	r := newRig(t, 8, 16)
	r.settle()
	r.fs.Inject(crashtest.Fault{Op: crashtest.OpWrite, Path: metaFiles, Err: syscall.ENOSPC}) // no Sealed record
	for i := range 10 {
		r.append(data(block.LBA(i), uint64(i+1)))
	}
	r.sync()
	r.log.mu.Lock()
	for len(r.log.ready) == 0 { // the log is about to make one ready
		r.log.mu.Unlock()
		time.Sleep(time.Millisecond)
		r.log.mu.Lock()
	}
	from, to, files := r.log.files[0], r.log.ready[0].slot, len(r.log.files)
	r.log.mu.Unlock()
	if files != 2 || from.sealed {
		t.Fatalf("%d files", files)
	}
	if err := r.log.copyFile(from, to); err != nil {
		t.Fatal(err)
	}
	r.corrupt(tier.NewPlace(to, 0))
	if _, err := r.reopen(r.fs.ProcessCrash); err != nil {
		t.Fatal(err)
	}
	if err := r.log.DropThrough(0); err != nil {
		t.Fatal(err)
	}
	r.expect(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10)
}

// lines counts log lines.
type lines struct {
	slog.Handler
	n *atomic.Int64
}

func (h lines) Enabled(context.Context, slog.Level) bool { return true }
func (h lines) Handle(context.Context, slog.Record) error {
	h.n.Add(1)
	return nil
}

// TestRefusedWritesWait lets the tier's file system refuse every call of a kind for a while.
func TestRefusedWritesWait(t *testing.T) {
	all := func(err error, ops ...crashtest.Op) (list []crashtest.Fault) {
		for _, op := range ops {
			list = append(list, crashtest.Fault{Op: op, Err: err})
		}
		return list
	}
	for _, c := range []struct {
		name   string
		faults []crashtest.Fault
	}{
		{"full", all(syscall.ENOSPC, crashtest.OpWrite, crashtest.OpCreate)},
		{"over quota", all(syscall.EDQUOT, crashtest.OpWrite, crashtest.OpSync)},
		{"read-only", all(syscall.EROFS, crashtest.OpWrite, crashtest.OpCreate, crashtest.OpRename, crashtest.OpRemove,
			crashtest.OpTruncate, crashtest.OpSync, crashtest.OpSyncDir)},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := newRig(t, 8, 64)
			var said atomic.Int64
			r.log.opts.Log = slog.New(lines{n: &said})
			r.append(data(0, 1))
			r.sync()
			r.settle()
			for _, f := range c.faults {
				r.fs.Inject(f)
			}
			var wg sync.WaitGroup
			var appended, noted atomic.Bool
			wg.Go(func() {
				_, err := r.log.Append(bg, []Record{data(1, 2)})
				if appended.Store(true); err != nil {
					t.Error(err)
				}
			})
			wg.Go(func() {
				err := r.log.AppendMeta(20, []byte("x"))
				if noted.Store(true); err != nil {
					t.Error(err)
				}
			})
			for r.log.Health().Waits == nil || said.Load() == 0 { // it tries again and again
				time.Sleep(time.Millisecond)
			}
			ctx, cancel := context.WithTimeout(bg, 20*time.Millisecond)
			defer cancel()
			if _, err := r.log.Append(ctx, []Record{data(3, 4)}); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("append whose time is up: %v", err)
			}
			if appended.Load() || noted.Load() {
				t.Error("acknowledged while nothing can be written")
			}
			r.expect(0, 1)
			if err := r.log.Failed(); err != nil {
				t.Fatal(err)
			}
			r.fs.ClearFaults()
			wg.Wait()
			r.sync()
			if h := r.log.Health(); h.Waits != nil || !h.Since.IsZero() {
				t.Errorf("health is %+v", h)
			}
			if n := said.Load(); n < 2 || n > 5 { // waits, goes on, a file written anew if syncs failed
				t.Errorf("%d log lines", n)
			}
			r.stableNow(1, 2)
		})
	}
}

// TestFlushOfStableRecordsPasses syncs while the file system refuses all.
func TestFlushOfStableRecordsPasses(t *testing.T) {
	r := newRig(t, 8, 64)
	r.append(data(0, 1))
	r.sync()
	r.settle()
	for _, op := range []crashtest.Op{crashtest.OpWrite, crashtest.OpSync} {
		r.fs.Inject(crashtest.Fault{Op: op, Err: syscall.EROFS})
	}
	ctx, cancel := context.WithTimeout(bg, 20*time.Millisecond)
	defer cancel()
	if _, err := r.log.Append(ctx, []Record{data(1, 2)}); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("append: %v", err)
	}
	r.sync()
	r.expect(0, 1)
	r.log.Close() // does not wait for the file system
}

// TestFullFileSystemReusesSlots fills the file system before the tier has all its files: those it has
// must go on, as publication frees them.
func TestFullFileSystemReusesSlots(t *testing.T) {
	r := newRig(t, 14, 16)
	r.append(data(0, 1))
	r.settle()
	r.fs.Inject(crashtest.Fault{Op: crashtest.OpCreate, Path: slotFiles, Err: syscall.ENOSPC})
	for i := range 40 {
		r.append(data(block.LBA(i%8), uint64(i), uint64(i), uint64(i), uint64(i)))
		if err := errors.Join(r.log.Sync(bg), r.log.Publish(r.log.Freeze())); err != nil {
			t.Fatal(err)
		}
	}
}

// TestFullCapacity runs out of room in the middle of a slot's making, and finds it again.
func TestFullCapacity(t *testing.T) {
	r := newRig(t, 14, 64)
	r.append(data(0, 1))
	r.settle()
	r.fs.SetCapacity(r.fs.UsedBytes() + 20*block.Size)
	var wg sync.WaitGroup
	wg.Go(func() {
		for i := range 100 { // in 4 files, of which there are 3
			r.append(data(1, uint64(i), uint64(i)))
		}
	})
	for r.log.Health().Waits == nil {
		time.Sleep(time.Millisecond)
	}
	r.fs.SetCapacity(0)
	wg.Wait()
	r.sync()
	if r.log.Health().Waits != nil {
		t.Error("it still says that it waits")
	}
	r.stableNow(1, 99, 99)
}

// TestCloseDoesNotWaitForAFullFileSystem closes a log whose last write is refused for good.
func TestCloseDoesNotWaitForAFullFileSystem(t *testing.T) {
	r := newRig(t, 8, 64)
	r.append(data(0, 1))
	r.settle()
	r.fs.Inject(crashtest.Fault{Op: crashtest.OpSync, Path: slotFiles, Err: syscall.ENOSPC})
	if err := r.log.Close(); !errors.Is(err, ErrFailed) {
		t.Errorf("closed over a write that is not stable: %v", err)
	}
}

// TestStopWaitingEndsAMetadataAppend stops waiting while the log is still open.
func TestStopWaitingEndsAMetadataAppend(t *testing.T) {
	r := newRig(t, 8, 64)
	r.fs.Inject(crashtest.Fault{Op: crashtest.OpWrite, Path: metaFiles, Err: syscall.ENOSPC})
	ended := make(chan error)
	go func() { ended <- r.log.AppendMeta(20, nil) }()
	for r.log.Health().Waits == nil {
		time.Sleep(time.Millisecond)
	}
	r.log.StopWaiting()
	if err := <-ended; !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("append metadata: %v", err)
	}
	r.append(data(0, 1)) // what is not refused goes on
}

// randomFault arms one passing failure of whatever the log may call next.
func randomFault(rng *rand.Rand) crashtest.Fault {
	ops := []crashtest.Op{crashtest.OpWrite, crashtest.OpWrite, crashtest.OpSync, crashtest.OpSync, crashtest.OpSync,
		crashtest.OpRename, crashtest.OpCreate, crashtest.OpSyncDir}
	return crashtest.Fault{
		Op: ops[rng.IntN(len(ops))], Skip: rng.IntN(4), Count: 1 + rng.IntN(2),
		Path: []string{"", slotFiles, slotFiles, metaFiles}[rng.IntN(4)],
		Err:  []error{syscall.EIO, syscall.EIO, syscall.ENOSPC, syscall.EROFS}[rng.IntN(4)],
	}
}

// own is what one appender of TestFailuresAndAPowerCut knows of its block.
type own struct {
	acked  []Seq // of stamp i+1
	issued uint64
}

// TestFailuresAndAPowerCut lets concurrent appenders write while calls fail, cuts the power at every
// few calls, and expects back what a Sync that returned nil had covered, and of the rest a prefix.
func TestFailuresAndAPowerCut(t *testing.T) {
	base := *seedFlag
	if base == 0 {
		base = rand.Uint64()
	}
	t.Logf("seed %d", base)
	for run := range 60 {
		if failuresRun(t, base+uint64(run), 12+6*run); t.Failed() {
			t.Fatalf("seed %d, run %d", base, run)
		}
	}
}

func failuresRun(t *testing.T, seed uint64, cut int) {
	const appenders = 4
	fsys := crashtest.NewFS(crashtest.Options{Seed: seed, CutAfter: cut})
	h, err := newHistory(t, seed, fsys)
	if err != nil {
		return // the cut fell into Create
	}
	defer func() { h.quit() }()
	var stable atomic.Uint64
	var wg sync.WaitGroup
	var all [appenders]own
	for id := range all {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(seed, uint64(id)))
			all[id].run(h, block.LBA(id), rng, &stable)
		})
	}
	wg.Wait()
	h.log.Close()
	fsys.ClearFaults()
	for again := range uint64(2) {
		fsys = fsys.Reboot(seed + again)
		h.end()
		h.fs = fsys
		h.watch()
		if h.space, err = tryOpenSpace(fsys, testDir, testSlots, testSlotBlocks); err != nil {
			t.Fatal(err)
		}
		l, rec, err := Open(h.options())
		if err != nil {
			t.Fatal(err)
		}
		h.log = l
		if err := l.DropThrough(0); err != nil {
			t.Fatal(err)
		}
		if rec.End < Seq(stable.Load()) {
			t.Fatalf("recovered through %d, stable through %d", rec.End, stable.Load())
		}
		for id := range all {
			all[id].check(t, l, block.LBA(id), rec.End)
		}
		stable.Store(uint64(rec.End))
		l.Close()
	}
}

// run appends, syncs and lets calls fail until the power is cut or the log stops.
func (o *own) run(h *history, lba block.LBA, rng *rand.Rand, stable *atomic.Uint64) {
	for o.issued < 16 {
		if rng.IntN(6) == 0 {
			h.fs.Inject(randomFault(rng))
		}
		o.issued++
		last, err := h.log.Append(h.ctx, []Record{data(lba, o.issued)})
		if err != nil {
			return
		}
		o.acked = append(o.acked, last)
		if rng.IntN(3) > 0 {
			continue
		}
		if h.log.Sync(h.ctx) != nil {
			return
		}
		for s := stable.Load(); s < uint64(last) && !stable.CompareAndSwap(s, uint64(last)); s = stable.Load() {
		}
	}
}

// check wants the newest record at or below end: an acknowledged one, or the one that was under way.
func (o *own) check(t *testing.T, l *Log, lba block.LBA, end Seq) {
	want := uint64(0)
	for i, s := range o.acked {
		if s <= end {
			want = uint64(i + 1)
		}
	}
	var f [1]Found
	var pins Pins
	p := make([]byte, block.Size)
	l.Lookup(1, lba, f[:], &pins)
	defer pins.Release()
	if err := l.ReadBlocks(1, lba, f[:], p); err != nil {
		t.Error(err)
	}
	got := le.Uint64(p)
	if got != want && (got != want+1 || int(want) != len(o.acked) || got > o.issued) {
		t.Errorf("block %d is %d, want %d (of %d acknowledged), recovered through %d", lba, got, want, len(o.acked), end)
	}
}
