package pool

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/cryptotest"
	"testing/synctest"
	"time"

	"graindisk/backend"
	"graindisk/block"
	"graindisk/grains/segment"
	"graindisk/internal/crashtest"
	"graindisk/internal/planted"
	"graindisk/pool/root"
	"graindisk/vdisk"
	"graindisk/writeback"
)

// crashCycles is the lives of the process in one history, those that die in recovery aside.
const crashCycles = 10

// TestCrash runs histories of clients at work on small disks, each ended by a process crash, a power cut
// at a drawn call on the tier or request to a target, a lost host or a clean close, and compares what
// comes back with what the clients were told. GRAINDISK_SEED runs one history again, GRAINDISK_SOAK
// (a duration) runs new ones for that long, from that seed if both are set, and GRAINDISK_FRESH does so for
// runs that are no soak. A seed decides what is asked, what fails and in which order calls at the fakes go on, and
// so all of a history, or nearly always: see TestCrashRepeats.
func TestCrash(t *testing.T) {
	var stats crashStats
	seed, given := crashSeed(t)
	n, until := crashHistories, time.Time{}
	if s := cmp.Or(os.Getenv("GRAINDISK_SOAK"), os.Getenv("GRAINDISK_FRESH")); s != "" {
		d, err := time.ParseDuration(s)
		if err != nil {
			t.Fatal("GRAINDISK_SOAK or GRAINDISK_FRESH:", err)
		}
		until = time.Now().Add(d)
	} else if given {
		n = 1
	}
	t.Logf("seeds from %d", seed)
	for i := 0; (i < n || time.Now().Before(until)) && !t.Failed() && !outOfCPU(t); i++ {
		if _, err := runHistory(t, seed+uint64(i), &stats); err != nil {
			t.Error(err)
		}
	}
	t.Logf("COUNT seeds from %d: %v", seed, &stats)
	for _, line := range stats.lines() {
		t.Logf("COUNT %s", line)
	}
	if t.Failed() || n < crashHistories || n < crashHistoriesTelling || outOfCPU(t) {
		return
	}
	for _, floor := range []struct {
		what      string
		got, want int64
	}{
		{"states checked", stats.checks.Load(), crashHistories * crashCycles},
		{"process crashes", stats.crashes[lostProcess].Load(), crashHistories},
		{"power cuts", stats.crashes[lostPower].Load(), crashHistories},
		{"lost hosts", stats.crashes[lostHost].Load(), crashHistories / 2},
		{"clean closes", stats.crashes[lostNothing].Load(), crashHistories / 2},
		{"map runs opened", stats.mapRuns.Load(), crashHistories * crashCycles},
		{"crashes inside recovery", stats.inRecovery.Load(), crashHistories / 2},
		{"cuts at a request to a target", stats.atStore.Load(), crashHistories},
		{"recoveries done twice", stats.twice.Load(), crashHistories / 2},
		{"cuts known to the byte", stats.exact.Load(), crashHistories / 10},
		{"publications", stats.published.Load(), crashHistories},
		{"usage tables recounted", stats.recounts.Load(), crashHistories * crashCycles},
		{"usage tables held against a flat map", stats.compacted.Load(), crashHistories},
		{"trapped blocks in those", stats.trapped.Load(), crashHistories},
	} {
		if floor.got < floor.want {
			t.Errorf("%s: %d, want at least %d: the histories do not reach what they are for", floor.what, floor.got, floor.want)
		}
	}
	for _, what := range crashKinds {
		if stats.count(what) == 0 {
			t.Errorf("%s: never: the histories do not reach what they are for", what)
		}
	}
}

// outOfCPU tells whether the process has used more processor time than GRAINDISK_CPU, a duration, allows.
func outOfCPU(t *testing.T) bool {
	s := os.Getenv("GRAINDISK_CPU")
	if s == "" {
		return false
	}
	limit, err := time.ParseDuration(s)
	var used syscall.Rusage
	if err = errors.Join(err, syscall.Getrusage(syscall.RUSAGE_SELF, &used)); err != nil {
		t.Fatal("GRAINDISK_CPU:", err)
	}
	return time.Duration(used.Utime.Nano()+used.Stime.Nano()) > limit
}

// crashHistoriesTelling is from how many histories on every kind of event must have come up.
const crashHistoriesTelling = 50

var crashKinds = []string{
	"I1 states compared after a process crash", "I1 states compared after a power cut", "I1 states compared after a lost host",
	"I1 states compared after a clean close", "I5 recoveries repeated",
	"I2 entries checked", "I3 roots followed", "I4 puts checked", "I6 bytes rotten in slots",
	"I6 slots unreadable", "I6 shards rotten", "I6 disks read through rot", "disks made in mid-life", "disks deleted", "disks undeleted", "disks dropped", "disks renamed", "disks resized",
	"segments reclaimed", "objects of checkpoints reclaimed", "I3 segments of checkpoints checked",
	"faults armed: sync", "faults armed: write", "faults armed: syncdir", "faults armed: create", "faults armed: remove",
	"tiers filled", "tier sizes drawn anew", "histories of large pools", "histories with small levels",
	"histories with far maps", "lives with far maps", "lives that ended with far maps", "I1 states compared with far maps",
	"local checkpoints between cuts", "stripes of several data shards", "lives with a target away", "lives with two targets away", "lives with a target that garbles",
	"requests that arrived twice", "power cut at write:slot-", "power cut at sync:slot-", "power cut at write:meta-",
	"power cut at sync:meta-", "power cut at write:ckpt-A", "targets lost for good", "targets refilled", "shards restored",
	"histories of mirrors", "segments on half a mirror",
}

// crashSeed is the seed to begin with, and whether it was given.
func crashSeed(t *testing.T) (seed uint64, given bool) {
	s := os.Getenv("GRAINDISK_SEED")
	if s == "" {
		return uint64(time.Now().UnixNano()), false
	}
	seed, err := strconv.ParseUint(s, 10, 64)
	if err != nil {
		t.Fatal("GRAINDISK_SEED:", err)
	}
	return seed, true
}

// stuckAfter is how long nothing may happen in a history, by the clock on the wall: it takes a fifth of a second
// of processor time in all.
const stuckAfter = 40 * time.Second

// What a bug sends round in a circle must not run for ever, or take all the memory there is: nothing is collected while a
// process lives. A history makes 10,000 calls, a few 20,000, and one life allocates 30 MB, in a large pool 300.
const (
	watchEvery = 100 * time.Millisecond
	movesMax   = 200_000
	heapMax    = 3 << 29
	heapIdle   = 256 << 20 // what is not in use is collected between two lives when there is so much
)

func heapBytes() uint64 {
	heap := []metrics.Sample{{Name: "/memory/classes/heap/objects:bytes"}}
	metrics.Read(heap)
	return heap[0].Value.Uint64()
}

// watchHistory panics, with all stacks, when nothing happens in a history any more, when it goes on and on, and when it
// takes too much memory. It returns what ends it.
func watchHistory(seed uint64, sched *atomic.Pointer[crashtest.Sched]) (end func()) {
	done := make(chan struct{})
	go func() {
		tick := time.NewTicker(watchEvery)
		defer tick.Stop()
		for was, since := uint64(0), time.Duration(0); since < stuckAfter; since += watchEvery {
			select {
			case <-done:
				return
			case <-tick.C:
			}
			if s := sched.Load(); s != nil && s.Moves() != was {
				was, since = s.Moves(), 0
			}
			if was > movesMax {
				panic(fmt.Sprintf("GRAINDISK_SEED=%d goes round in a circle, of %d calls so far:\n%s", seed, was, stacks()))
			}
			if heap := heapBytes(); heap > heapMax {
				panic(fmt.Sprintf("GRAINDISK_SEED=%d takes %d bytes of memory:\n%s", seed, heap, stacks()))
			}
		}
		panic(fmt.Sprintf("GRAINDISK_SEED=%d hangs:\n%s", seed, stacks()))
	}()
	return func() { close(done) }
}

func stacks() []byte {
	buf := make([]byte, 1<<20)
	return buf[:runtime.Stack(buf, true)]
}

// runHistory runs one history in a new world and returns what was scheduled in it.
func runHistory(t *testing.T, seed uint64, stats *crashStats) (tr *trace, err error) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1)) // see crashtest.Sched
	var sched atomic.Pointer[crashtest.Sched]
	defer watchHistory(seed, &sched)()
	warmCodec(t)
	if planted.Built {
		fmt.Printf("history GRAINDISK_SEED=%d\n", seed) // for who finds a panic
	}
	synctest.Test(t, func(t *testing.T) {
		cryptotest.SetGlobalRandom(t, seed)
		// A collection would make goroutines wait in places where the scheduler does not expect it.
		defer debug.SetGCPercent(debug.SetGCPercent(-1))
		tr, err = history(t, seed, stats, &sched)
	})
	runtime.GC()
	return tr, err
}

// warmCodec has the codec make its channels outside of any bubble, once.
func warmCodec(t *testing.T) {
	codecOnce.Do(func() {
		b, err := segment.NewBuilder(segment.BuildOptions{ID: 1, K: 1, PayloadBytes: block.Size, Codec: segment.CodecZstd})
		if err == nil {
			err = b.AddData(1, 0, make([]byte, block.Size), 1)
		}
		var sealed *segment.Sealed
		if err == nil {
			sealed, err = b.Seal(nil, []block.TargetID{1})
		}
		if err = errors.Join(err, sealed.Verify()); err != nil { // which unpacks it again
			t.Fatal(err)
		}
	})
}

var codecOnce sync.Once

func history(t *testing.T, seed uint64, stats *crashStats, at *atomic.Pointer[crashtest.Sched]) (tr *trace, err error) {
	tr = &trace{}
	sched := crashtest.NewSched(seed, tr.choice)
	at.Store(sched)
	defer sched.Stop()
	jitter = seededJitter(seed)
	w, err := newWorld(seed, sched, tr, stats)
	if err != nil {
		return tr, fmt.Errorf("GRAINDISK_SEED=%d: %w", seed, err)
	}
	stats.histories.Add(1)
	for cycle := range crashCycles {
		w.note("cycle %d", cycle)
		if err = w.cycle(); err != nil {
			err = fmt.Errorf("GRAINDISK_SEED=%d, cycle %d: %w", seed, cycle, err)
			w.note("failed: %v", err)
			break
		}
		if heapBytes() > heapIdle {
			runtime.GC() // nobody is alive whom it would make wait
		}
	}
	sched.Stop()
	if err != nil && !planted.Built {
		w.files(t)
		w.trace.show(t)
	}
	w.fs.PowerCut()
	w.stop()
	return tr, err
}

// seededJitter replaces jitter. No two draws are alike, since the order in which timers of one moment fire
// is not in the seed.
func seededJitter(seed uint64) func(time.Duration) time.Duration {
	var mu sync.Mutex
	rng := rand.New(rand.NewPCG(seed, 4))
	return func(d time.Duration) time.Duration {
		mu.Lock()
		defer mu.Unlock()
		return time.Duration(rng.Int64N(int64(d)))
	}
}

// cycle is one life: recovery, however often it takes, checks, work, and an end.
func (w *world) cycle() error {
	if err := w.recover(); err != nil {
		return err
	}
	dead, err := w.work()
	if err != nil {
		return err
	}
	if !dead && w.rng.IntN(4) == 0 {
		return w.closeClean()
	}
	w.down(w.drawLoss())
	return nil
}

// recover opens the pool until a process lives long enough to be looked at, checks it, and now and then
// cuts the power at once to see that the next recovery finds the same.
func (w *world) recover() error {
	for {
		if alive, err := w.open(); err != nil {
			return err
		} else if !alive {
			continue
		}
		far := len(w.p.runs.Partial()) > 0
		all, err := w.content(w.p)
		if err != nil {
			if w.fs.WasCut() {
				w.stats.inRecovery.Add(1)
				w.down(w.drawLoss())
				continue
			}
			return fmt.Errorf("read after a %v: %w", w.loss, err)
		}
		if far {
			w.stats.inc("I1 states compared with far maps")
		}
		wasLoss := w.loss
		if err := errors.Join(w.check(all), w.checkStored(), w.checkUsage(w.rng.IntN(4) == 0)); err != nil {
			return err
		}
		if w.rng.IntN(4) == 0 {
			if err := w.checkRot(all); err != nil {
				return err
			}
		}
		if w.rng.IntN(4) > 0 {
			return nil
		}
		if err := w.again(all); err != nil {
			return fmt.Errorf("recovered again after a %v: %w", wasLoss, err)
		}
		return nil
	}
}

// again ends the process that has just recovered and expects the next ones to show the same.
func (w *world) again(all [][]byte) error {
	w.stats.twice.Add(1)
	w.stats.inc("I5 recoveries repeated")
	for first := true; first || w.p == nil; first = false {
		w.down([...]loss{lostProcess, lostPower}[w.rng.IntN(2)])
		if _, err := w.open(); err != nil {
			return err
		}
		if w.p == nil && w.loss == lostHost { // it was lost while opening: the model knows what to expect
			return w.recover()
		}
		if w.p == nil {
			continue
		}
		now, err := w.content(w.p)
		switch {
		case err != nil && w.fs.WasCut():
			w.stop()
			continue
		case err != nil:
			return err
		case w.loss != lostHost:
			if err := same(all, now); err != nil {
				return err
			}
		}
		if err := errors.Join(w.check(now), w.checkUsage(false)); err != nil {
			return err
		}
	}
	return nil
}

// work runs clients until they are through or the process dies; dead tells which.
func (w *world) work() (dead bool, err error) {
	ctx := w.life.ctx
	if err := w.createMissing(ctx, 1+w.rng.IntN(len(w.disks))); err != nil {
		return w.died(err)
	}
	n := 1 + w.rng.IntN(2)*w.rng.IntN(3)
	if w.rng.IntN(2) == 0 {
		w.fs.CutAfter(1 + w.rng.IntN(300))
	}
	steps := 10 + w.rng.IntN(w.shape.steps)/n
	if w.rng.IntN(6) == 0 {
		w.injure(40)
	} else if w.rng.IntN(12) == 0 {
		w.squeeze()
	}
	w.note("%d clients, %d steps each", n, steps)
	errs := make([]error, n+1)
	var wg sync.WaitGroup
	w.loseTarget(ctx, &wg, &errs[n])
	for i := range n {
		c := &client{w: w, p: w.p, rng: rand.New(rand.NewPCG(w.rng.Uint64(), 2)), name: fmt.Sprintf("client-%d", i), creates: i == 0, alone: n == 1}
		wg.Go(func() {
			for range steps {
				if errs[i] = c.step(ctx); errs[i] != nil {
					return
				}
			}
		})
	}
	wg.Wait()
	for _, err := range errs {
		if err != nil {
			return w.died(err)
		}
	}
	err = w.checkUsage(w.rng.IntN(2) == 0)
	if s := w.p.Status().Space; err == nil && !w.fs.WasCut() {
		w.stats.add("segments reclaimed", s.ReclaimedSegments)
		w.stats.add("objects of checkpoints reclaimed", s.ReclaimedObjects)
		err = w.checkRoot()
	}
	return w.fs.WasCut(), err
}

// died passes on an error of a process that lives, unless the log has stopped after a fault.
func (w *world) died(err error) (bool, error) {
	if w.life.hurt.Load() && w.p.log.Failed() != nil && !w.fs.WasCut() {
		w.note("stopped: %v", err)
		w.stats.inc("lives that a fault ended")
		return true, nil
	}
	if w.fs.WasCut() {
		w.note("died: %v", err)
		return true, nil
	}
	return false, err
}

// closeClean closes the pool. Everything is published then, for this host and any other.
func (w *world) closeClean() error {
	mark := w.model.Mark()
	p := w.p
	w.p = nil // Close ends it, come what may
	if err := p.Close(w.life.ctx); err != nil {
		if w.fs.WasCut() || w.life.hurt.Load() && (errors.Is(err, writeback.ErrFailed) || errors.Is(err, syscall.EIO) || errors.Is(err, syscall.ENOSPC)) {
			w.down(w.drawLoss())
			return nil
		}
		return fmt.Errorf("close: %w", err)
	}
	if err := w.checkRoot(); err != nil {
		return fmt.Errorf("after a clean close: %w", err)
	}
	w.model.Published(p.pubCut(), mark)
	w.saidPublished(p.pubCut())
	w.rowsPublished(w.acked())
	w.down(lostNothing)
	w.moveOn()
	return nil
}

// TestOldHostComesBack takes a pool over while the old owner's tier still holds acknowledged writes. The
// old host may never serve over the new owner's disks, let alone publish into them.
func TestOldHostComesBack(t *testing.T) {
	for _, tt := range []struct {
		name     string
		released bool // the new owner has closed the pool by then
		away     bool // the targets answer only once the old host serves from its log
	}{
		{"while the new owner serves", false, false},
		{"after the new owner has closed", true, false},
		{"without targets at first, while the new owner serves", false, true},
		{"without targets at first, after the new owner has closed", true, true},
	} {
		t.Run(tt.name, func(t *testing.T) { oldHostComesBack(t, tt.released, tt.away) })
	}
}

func oldHostComesBack(t *testing.T, released, away bool) {
	w, err := newWorld(1, nil, &trace{}, &crashStats{})
	if err != nil {
		t.Fatal(err)
	}
	w.auto = false
	d := w.disks[0]
	start := func(fs *crashtest.FS, takeover bool) (*Pool, *life, error) {
		w.fs = fs
		l := w.newLife(true)
		t.Cleanup(l.cancel)
		o := w.options(fs, l)
		o.Takeover = takeover
		p, err := Open(l.ctx, o)
		return p, l, err
	}
	write := func(p *Pool, l *life, fill byte) {
		t.Helper()
		vd, err := p.Disk(d.name())
		if err == nil {
			err = vd.Write(l.ctx, []vdisk.Op{{Kind: vdisk.OpWrite, Len: block.Size, Data: bytes.Repeat([]byte{fill}, block.Size)}}, true)
		}
		if err != nil {
			t.Fatal(err)
		}
	}

	old := w.fs
	p, l, err := start(old, false)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.CreateDisk(l.ctx, d.name(), int64(d.blocks)*block.Size); err != nil {
		t.Fatal(err)
	}
	if err := p.Publish(l.ctx); err != nil {
		t.Fatal(err)
	}
	write(p, l, 'a') // acknowledged, and only here
	w.p, w.life = p, l
	w.fs.PowerCut()
	w.stop()
	old = old.RebootKeep(1, crashtest.KeepAll)

	p, l, err = start(crashtest.NewFS(crashtest.Options{}), true)
	if err != nil {
		t.Fatal(err)
	}
	write(p, l, 'b')
	if err := p.Publish(l.ctx); err != nil {
		t.Fatal(err)
	}
	if released {
		if err := p.Close(l.ctx); err != nil {
			t.Fatal(err)
		}
	} else {
		t.Cleanup(func() {
			if err := p.Close(l.ctx); err != nil {
				t.Errorf("the new owner: %v", err)
			}
		})
	}
	before := w.stores[0].Objects()["root"]

	w.fs = old
	zl := w.newLife(true)
	t.Cleanup(zl.cancel)
	o := w.options(old, zl)
	o.RootTimeout = 100 * time.Millisecond
	for _, s := range zl.stores {
		s.SetOffline(away)
	}
	z, err := Open(zl.ctx, o)
	if !away {
		if !errors.Is(err, ErrForeignTier) {
			t.Fatalf("the old host opened the pool: %v", err)
		}
		return
	}
	if err != nil {
		t.Fatal(err) // with its log alone it goes on as if it had never stopped
	}
	for _, s := range zl.stores {
		s.SetOffline(false)
	}
	err = z.Publish(zl.ctx)
	if !errors.Is(err, root.ErrFenced) && !errors.Is(err, root.ErrHeld) && !errors.Is(err, ErrForeignTier) {
		t.Errorf("the old host published over the new owner: %v", err)
	}
	if vd, err := z.Disk(d.name()); err == nil {
		if err := vd.Flush(zl.ctx); !errors.Is(err, vdisk.ErrFenced) {
			t.Errorf("the old host still serves: %v", err)
		}
	}
	old.PowerCut()
	w.p, w.life = z, zl
	w.stop()
	if after := w.stores[0].Objects()["root"]; !bytes.Equal(before, after) {
		t.Error("the old host changed the root")
	}
}

// TestHalfCommittedCut kills the process when a cut's root has reached one target of three, lets the next
// one see that copy, and takes the target away before the claim. The claim then goes on from the cut before,
// and what the half committed one held must be in the next.
func TestHalfCommittedCut(t *testing.T) {
	w, err := newWorld(1, nil, &trace{}, &crashStats{})
	if err != nil {
		t.Fatal(err)
	}
	w.auto = false
	d := w.disks[0]
	var gone [crashTargets]func(op, key string) bool // whether the target fails a call
	start := func() {
		t.Helper()
		w.life = w.newLife(true)
		for i, s := range w.life.stores {
			before := s.Before
			s.Before = func(op, key string) error {
				if err := before(op, key); err != nil || gone[i] == nil || !gone[i](op, key) {
					return err
				}
				return &backend.Error{Op: op, Store: "target", Key: key, Class: backend.Transient, Err: errors.New("away")}
			}
		}
		o := w.options(w.fs, w.life)
		o.Takeover = w.loss == lostHost
		if w.p, err = Open(w.life.ctx, o); err != nil {
			t.Fatal(err)
		}
	}
	write := func(at int64) []byte {
		t.Helper()
		data := bytes.Repeat([]byte{byte('a' + at)}, block.Size)
		vd, err := w.p.Disk(d.name())
		if err == nil {
			err = vd.Write(w.life.ctx, []vdisk.Op{{Kind: vdisk.OpWrite, Off: at * block.Size, Len: block.Size, Data: data}}, true)
		}
		if err != nil {
			t.Fatal(err)
		}
		return data
	}

	start()
	if _, err := w.p.CreateDisk(w.life.ctx, d.name(), int64(d.blocks)*block.Size); err != nil {
		t.Fatal(err)
	}
	if err := w.p.Publish(w.life.ctx); err != nil {
		t.Fatal(err)
	}
	want := write(0)
	var tried atomic.Int32
	refuse := func(op, key string) bool {
		if op == "put" && key == "root" {
			if tried.Add(1) == 4 { // both others were asked, and asked again
				w.fs.PowerCut()
			}
			return true
		}
		return false
	}
	gone[1], gone[2] = refuse, refuse
	if err := w.p.Publish(w.life.ctx); err == nil {
		t.Fatal("published with one target of three")
	}
	w.down(lostProcess)

	gone[1], gone[2] = nil, nil
	var seen atomic.Bool
	gone[0] = func(op, key string) bool { return seen.Swap(true) } // all but the first call, for the root
	start()
	if err := w.p.Publish(w.life.ctx); err != nil {
		t.Fatal(err)
	}
	want = append(want, write(1)...)
	if err := w.p.Publish(w.life.ctx); err != nil {
		t.Fatal(err)
	}
	for _, l := range []loss{lostPower, lostHost} {
		w.down(l)
		start()
		vd, err := w.p.Disk(d.name())
		if err != nil {
			t.Fatal(err)
		}
		got := make([]byte, len(want))
		if err := vd.Read(w.life.ctx, got, 0); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, want) {
			t.Fatalf("after a %v: block 0 shows %q..., block 1 %q...", l, got[:1], got[block.Size:][:1])
		}
		w.loss = lostNothing
	}
	w.fs.PowerCut()
	w.stop()
}
