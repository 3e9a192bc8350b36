package pool

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"math/rand/v2"
	"path"
	"slices"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"graindisk/backend"
	"graindisk/backend/backendtest"
	"graindisk/block"
	"graindisk/grains/segment"
	"graindisk/internal/crashtest"
	"graindisk/pool/root"
)

// The pools of these tests are of two shapes. Most are small: files fill, slots are reused, cuts have many
// segments. Some are large enough for whole batches and for stripes of more than one data shard.
type crashShape struct {
	slotBytes, segmentBytes int64
	slots                   int
	blocks                  int // of a disk, at least; up to twice as many
	writeBlocks             int // at most in one write
	steps                   int // of a life at most
}

var (
	smallPool = crashShape{32 * block.Size, 64 << 10, 24, 64, 12, 80}
	largePool = crashShape{640 * block.Size, smallBytes + 5*GrainBytes, 14, 640, 200, 24}
)

const (
	crashTargets    = 3
	crashWait       = time.Hour // of a life, after which a request counts as hung; nearly always in a bubble's time. They take seconds, few two minutes
	sectorsPerBlock = block.Size / crashtest.SectorSize
)

const never = math.MaxInt64

// errDead is what the targets say to a process that has died.
var errDead = errors.New("the process is dead")

// loss is what a crash takes away; each takes more than the one before.
type loss int

const (
	lostNothing loss = iota // a clean close
	lostProcess
	lostPower
	lostHost
)

func (l loss) String() string {
	return [...]string{"clean close", "process crash", "power cut", "lost host"}[l]
}

// world is a host with its tier, three targets, the disks' clients, and a model of what those were told.
// A block of the model is one sector of a disk, so that writes below a block can be told apart.
type world struct {
	rng    *rand.Rand
	sched  *crashtest.Sched // nil: everything goes on at once
	stores [crashTargets]*guarded
	fs     *crashtest.FS
	shape  crashShape
	level0 int // entries of a map in memory, and
	run    int // in one run: small in some histories, so that they merge; 0 is the default
	codec  segment.Codec
	far    int64 // Options.mapRate of a world whose hosts fetch pages of maps one by one; 0 is one that fetches runs whole
	hot    int   // blocks of the first disk that many writes go to; 0 is none
	slots  int   // of the tier, in this life
	model  *crashtest.Model
	disks  []*crashDisk
	auto   bool          // cuts happen by age as well
	grace  time.Duration // of deleting
	tight  bool          // checkpoints, local and published, come often, and publications are recorded in pieces

	// In some histories targets are lost for good, one after another, each once the one before is refilled.
	lossRng *rand.Rand // nil in the others
	emptied int        // the target that was lost and is not whole again yet; -1 is none

	mirror bool // profile 1+1 on two targets, and a witness: what one of the two does not take is on the other alone

	p      *Pool
	life   *life
	loss   loss // since the disks were last checked
	exact  map[uint64][][]byte
	newest atomic.Uint64 // cut that was said to be published
	stale  []*life       // of dead processes; late requests may still be on their way
	stats  *crashStats
	trace  *trace
}

// life is one process as its targets see it: when it dies, and when a target goes away.
type life struct {
	fs      *crashtest.FS
	stores  [crashTargets]*backendtest.Faulty
	calls   atomic.Int64
	cutAt   int64 // the power goes at this request; 0 is never
	offline []int // targets that are away during requests [offFrom, offTo)
	offFrom int64
	offTo   int64
	stats   *crashStats

	rootPuts  atomic.Int64
	offAtRoot int64 // the write of the root with which the targets go away; 0 is none
	offCalls  int64 // for so many requests
	offCut    bool  // and the power goes before they are back

	liar int         // target of which bytes arrive wrong; -1 is none
	calm atomic.Bool // see quiet
	hurt atomic.Bool // a fault of the tier was armed: the log may stop

	// ctx ends with the process: what waits for a dead one would wait for ever.
	ctx    context.Context
	cancel context.CancelFunc
}

// newLife draws what happens between a new process and its targets.
func (w *world) newLife(calm bool) *life {
	l := &life{fs: w.fs, stats: w.stats}
	l.ctx, l.cancel = context.WithTimeout(context.Background(), crashWait)
	l.fs.SetGate(w.sched)
	l.fs.OnPowerCut(func() {
		go func() { // when all wait for something: nobody then finds ctx at its end and something else ready
			w.sched.Park("power lost")
			l.cancel()
		}()
	})
	for i := range l.stores {
		l.stores[i] = backendtest.NewFaulty(w.stores[i], w.rng.Uint64())
		l.stores[i].Before = l.before
		if w.mirror { // half of one has no parity: what is hurt again and again is damage
			l.stores[i].HurtOnce()
		}
	}
	if calm {
		return l
	}
	if w.rng.IntN(3) == 0 {
		l.cutAt = 1 + w.rng.Int64N(80)
	}
	if was := w.life; was != nil && len(was.offline) == 2 && was.calls.Load() >= was.offFrom && w.rng.IntN(4) > 0 {
		for i := range crashTargets { // what only one target has heard of is away now, or goes once that was read
			if !slices.Contains(was.offline, i) {
				l.offline, l.offFrom, l.offTo = []int{i}, w.rng.Int64N(2)*(3+w.rng.Int64N(4)), 10+w.rng.Int64N(60)
			}
		}
		w.stats.inc("lives without the target that was alone before")
	} else if w.rng.IntN(3) == 0 {
		l.offline = w.rng.Perm(crashTargets)[:1+w.rng.IntN(2)]
		l.offFrom = w.rng.Int64N([...]int64{8, 40}[w.rng.IntN(2)])
		l.offTo = l.offFrom + 10 + w.rng.Int64N(60)
		if w.rng.IntN(2) == 0 { // just when the root is written
			l.offFrom, l.offTo, l.offAtRoot = never, never, 1+w.rng.Int64N(40)
			l.offCalls, l.offCut = 10+w.rng.Int64N(60), w.rng.IntN(2) == 0
		}
		w.stats.inc([...]string{"", "lives with a target away", "lives with two targets away"}[len(l.offline)])
	}
	l.liar = -1
	if w.rng.IntN(4) == 0 {
		l.liar = w.rng.IntN(crashTargets)
		w.stats.inc("lives with a target that garbles")
	}
	if w.emptied >= 0 { // what is lost and what is garbled on its way are more than parity is for
		l.liar = -1
	}
	l.quiet(false)
	return l
}

// quiet ends all that befalls requests, or begins it; it reports whether the process lives.
func (l *life) quiet(on bool) bool {
	l.calm.Store(on)
	for i, s := range l.stores {
		r := backendtest.Rates{}
		if !on {
			r = backendtest.Rates{backendtest.Refused: 0.01, backendtest.Throttled: 0.005, backendtest.LostReply: 0.02, backendtest.Late: 0.01}
			if i == l.liar {
				r[backendtest.Flipped], r[backendtest.Truncated] = 0.03, 0.02
			}
		} else {
			s.SetOffline(false)
		}
		s.SetRates(r)
	}
	return !l.fs.WasCut()
}

func (l *life) before(op, key string) error {
	n := l.calls.Add(1)
	if op == "put" && key == root.Key && l.rootPuts.Add(1) == l.offAtRoot {
		l.offFrom, l.offTo = n, n+l.offCalls
		if l.offCut {
			l.cutAt = n + 1 + l.offCalls*2/3
		}
		l.stats.inc("targets that went away at a write of the root")
	}
	for _, i := range l.offline {
		l.stores[i].SetOffline(n >= l.offFrom && n < l.offTo && !l.calm.Load())
	}
	if n == l.cutAt && !l.fs.WasCut() {
		l.stats.atStore.Add(1)
		l.fs.PowerCut()
	}
	if l.fs.WasCut() {
		return &backend.Error{Op: op, Store: "target", Key: key, Class: backend.Transient, Err: errDead}
	}
	return nil
}

func newWorld(seed uint64, sched *crashtest.Sched, tr *trace, stats *crashStats) (*world, error) {
	w := &world{
		emptied: -1, sched: sched, rng: rand.New(rand.NewPCG(seed, 1)), model: crashtest.NewModel(), exact: map[uint64][][]byte{}, stats: stats, trace: tr,
	}
	for i := range w.stores {
		w.stores[i] = newGuarded(fmt.Sprintf("target-%d", i), w.rng.Uint64(), stats)
		w.stores[i].SetListLag(w.rng.IntN(6))
	}
	w.shape = smallPool
	if w.rng.IntN(8) == 0 {
		w.shape = largePool
		stats.inc("histories of large pools")
	}
	if w.rng.IntN(2) == 0 {
		w.level0, w.run = 2+w.rng.IntN(12), 2+w.rng.IntN(20)
		stats.inc("histories with small levels")
	}
	if w.rng.IntN(2) == 0 {
		w.hot = 1 + w.rng.IntN(6)
	}
	if w.far = [...]int64{0, -1, 1 << 20, 1 << 30}[w.rng.IntN(4)]; w.far != 0 {
		stats.inc("histories with far maps")
	}
	w.slots = w.shape.slots
	w.fs = crashtest.NewFS(crashtest.Options{Seed: w.rng.Uint64()})
	w.auto, w.tight, w.codec = w.rng.IntN(3) == 0, w.rng.IntN(2) == 0, segment.Codec(w.rng.IntN(3))
	w.grace = time.Duration(1+w.rng.Int64N([...]int64{60, 4000}[w.rng.IntN(4)/3])) * time.Millisecond
	for i := range 2 + w.rng.IntN(2) {
		d := &crashDisk{id: block.DiskID(i + 1), blocks: w.shape.blocks + w.rng.IntN(2*w.shape.blocks)}
		w.disks = append(w.disks, d)
		w.model.AddDisk(d.id, d.blocks*sectorsPerBlock)
	}
	if rng := rand.New(rand.NewPCG(seed, 9)); rng.IntN(5) == 0 { // of its own: the other histories stay as they were
		w.lossRng = rng
	} else if w.mirror = rng.IntN(5) == 0; w.mirror {
		stats.inc("histories of mirrors")
	}
	w.life = w.newLife(true)
	return w, Create(w.life.ctx, w.options(w.fs, w.life))
}

func (w *world) note(format string, args ...any) {
	fmt.Fprintf(w.trace, "---- "+format+"\n", args...)
}

// options are those of a process with the given life on the given file system.
func (w *world) options(fs *crashtest.FS, l *life) Options {
	o := Options{
		Name: "main", FS: fs, TierDir: "/tier", TierBytes: int64(w.slots) * w.shape.slotBytes, SlotBytes: w.shape.slotBytes,
		SegmentBytes: w.shape.segmentBytes, Compression: w.codec, mapLevel0: w.level0, mapRun: w.run, MaxDirtyAge: time.Hour, Host: "host", Log: slog.New(slog.NewTextHandler(w.trace, &slog.HandlerOptions{Level: slog.LevelDebug})),
	}
	o.DeleteGrace, o.UndeleteWindow = w.grace, 1000*time.Hour
	o.reclaimTick, o.reclaimRound = 3*time.Millisecond+w.grace/7, 2*time.Millisecond+w.grace/3
	if w.tight {
		o.CheckpointCuts, o.CheckpointBytes, o.tableRows, o.publicationBytes = 6, 64<<10, 10, 300
	}
	if w.far != 0 {
		o.mapWhole, o.mapRate = -1, w.far
	}
	if w.auto {
		o.MaxDirtyAge = 20 * time.Millisecond
	}
	for i, s := range l.stores {
		o.Targets = append(o.Targets, Target{Name: fmt.Sprintf("t%d", i), Store: scheduled{s, w.sched}, Witness: w.mirror && i == crashTargets-1})
	}
	if w.mirror {
		o.Data, o.Parity, o.lostAfter = 1, 1, 10*time.Millisecond
	}
	return o
}

// open starts a process on the tier. False means that it died on the way and was taken down.
func (w *world) open() (bool, error) {
	w.stats.opens.Add(1)
	recovering := w.loss != lostNothing
	if recovering && w.rng.IntN(3) == 0 {
		w.fs.CutAfter(1 + w.rng.IntN(60))
	}
	smaller := false
	if w.rng.IntN(4) == 0 {
		was := w.slots
		w.slots = w.shape.slots*3/4 + w.rng.IntN(w.shape.slots/2+1)
		if w.rng.IntN(2) == 0 {
			w.slots = slotsMin + w.rng.IntN(w.shape.slots-slotsMin)
		}
		smaller = w.slots < was
		w.stats.inc("tier sizes drawn anew")
	}
	for try := 0; ; try++ {
		w.life = w.newLife(false)
		if smaller && try == 0 && w.rng.IntN(4) > 0 {
			w.injure(5)
		} else if w.rng.IntN(10) == 0 {
			w.injure(20)
		}
		o := w.options(w.fs, w.life)
		o.Takeover = w.loss == lostHost
		p, err := Open(w.life.ctx, o)
		w.stale = append(w.stale, w.life)
		if err == nil {
			w.p = p
			for _, d := range w.disks {
				if tree := p.tree(d.id); tree != nil {
					w.stats.mapRuns.Add(int64(tree.Stats().Runs))
				}
			}
			if n := len(p.runs.Partial()); n > 0 {
				w.stats.inc("lives with far maps")
			}
			w.note("open: cut %d, epoch %d", p.pubCut(), p.epoch.Load())
			return true, nil
		}
		if w.fs.WasCut() {
			w.note("open: died: %v", err)
			w.stats.inRecovery.Add(1)
			w.down(w.drawLoss())
			return false, nil
		}
		// What is read while opening is asked for once: a hiccup of two targets is enough to fail.
		if try == 30 {
			return false, fmt.Errorf("open, %d times: %w", try+1, err)
		}
		w.note("open: %v", err)
		if w.life.hurt.Load() { // as whoever starts the gateway again
			w.stats.inc("opens that a fault ended")
			w.life.cancel()
			w.fs.SetGate(nil)
			w.fs.ClearFaults()
			continue
		}
		w.life.cancel()
	}
}

// injure arms a fault of the tier's file system: calls of one kind fail, the first after at most skip others.
func (w *world) injure(skip int) {
	f := crashtest.Fault{
		Op: [...]crashtest.Op{crashtest.OpSync, crashtest.OpSync, crashtest.OpWrite, crashtest.OpWrite, crashtest.OpSyncDir,
			crashtest.OpCreate, crashtest.OpRemove}[w.rng.IntN(7)],
		Path: [...]string{"", "tier/slot-*", "tier/slot-*", "tier/meta-*", "tier/ckpt-*"}[w.rng.IntN(5)],
		Skip: w.rng.IntN(skip), Count: 1 + w.rng.IntN(3)*w.rng.IntN(2),
	}
	if w.rng.IntN(3) == 0 {
		f.Err = syscall.ENOSPC
	}
	if w.rng.IntN(2) == 0 { // while it is being mended
		f.CutAfter = 1 + w.rng.IntN(8)
	}
	w.life.hurt.Store(true)
	w.fs.Inject(f)
	w.stats.inc("faults armed: " + f.Op.String())
	w.note("armed: %+v", f)
}

// squeeze fills the tier's file system for a while.
func (w *world) squeeze() {
	w.life.hurt.Store(true)
	fs := w.fs
	fs.SetCapacity(fs.UsedBytes() + w.rng.Int64N(3*w.shape.slotBytes))
	time.AfterFunc(time.Millisecond+time.Duration(w.rng.Int64N(int64(2*time.Second))), func() { fs.SetCapacity(0) })
	w.stats.inc("tiers filled")
	w.note("full")
}

// pubCut is the newest cut that the root is known to hold.
func (p *Pool) pubCut() uint64 { return p.value().Cut }

// down ends the process, if there is one, and takes from the host what l says.
func (w *world) down(l loss) {
	w.fs.PowerCut()
	if w.p != nil && len(w.p.runs.Partial()) > 0 {
		w.stats.inc("lives that ended with far maps")
	}
	w.stop()
	w.stats.crashes[l].Add(1)
	if in := w.fs.CutIn(); in != "" {
		w.stats.inc("power cut at " + in)
	}
	w.fs.ClearFaults()
	w.fs.SetCapacity(0)
	w.loss = max(w.loss, l)
	w.note("%v", l)
	switch l {
	case lostProcess:
		w.fs = w.fs.ProcessCrash()
	case lostPower:
		w.fs = w.fs.RebootKeep(w.rng.Uint64(), w.drawKeep())
	case lostHost:
		w.fs = crashtest.NewFS(crashtest.Options{Seed: w.rng.Uint64()})
	}
	for len(w.stale) > 0 && w.rng.IntN(2) == 0 { // requests that were on their way arrive now, or later
		for _, s := range w.stale[0].stores {
			s.Settle()
		}
		w.stale = w.stale[1:]
	}
	fmt.Fprintf(w.trace, tracedState+"%016x\n", w.stats.state(w))
}

// stop ends the goroutines of a process that is dead already.
func (w *world) stop() {
	w.life.cancel()
	if w.p == nil {
		return
	}
	w.p.pub.cancel()
	<-w.p.pub.done
	<-w.p.pub.local
	_ = w.p.closeTier() // the dead tier complains
	w.p = nil
}

func (w *world) drawLoss() loss {
	n := w.rng.IntN(10)
	if l := w.life; l.offCut && l.calls.Load() >= l.offFrom && w.rng.IntN(2) == 0 {
		n = 9 // as it wrote the root
	}
	switch {
	case n < 4:
		return lostProcess
	case n < 7:
		return lostPower
	}
	return lostHost
}

func (w *world) drawKeep() crashtest.Keep {
	return [...]crashtest.Keep{crashtest.KeepRandom, crashtest.KeepRandom, crashtest.KeepNone, crashtest.KeepAll,
		crashtest.KeepPrefix, crashtest.KeepSectors}[w.rng.IntN(6)]
}

// moveOn goes on after a clean close: in a new process, after a power cut, or on another host.
func (w *world) moveOn() {
	switch w.rng.IntN(3) {
	case 0:
		w.fs = w.fs.ProcessCrash()
	case 1:
		w.fs = w.fs.RebootKeep(w.rng.Uint64(), w.drawKeep())
	case 2:
		w.fs = crashtest.NewFS(crashtest.Options{Seed: w.rng.Uint64()})
		w.note("another host")
	}
}

// content reads all disks; one that is not there is all zeroes.
func (w *world) content(p *Pool) ([][]byte, error) {
	if err := w.shownDisks(p); err != nil {
		return nil, err
	}
	all := make([][]byte, len(w.disks))
	for i, d := range w.disks {
		var err error
		if all[i], err = w.contentOf(p, d); err != nil {
			return nil, err
		}
	}
	return all, nil
}

// reader shows content to the model.
func (w *world) reader(all [][]byte) crashtest.Read {
	return func(disk block.DiskID, lba block.LBA) (crashtest.Stamp, error) {
		return parseSector(all[disk-1][int(lba)*crashtest.SectorSize:][:crashtest.SectorSize])
	}
}

// check compares a pool that was just opened with the model, and makes what it shows the past.
func (w *world) check(all [][]byte) error {
	w.stats.checks.Add(1)
	w.stats.inc("I1 states compared after a " + w.loss.String())
	read := w.reader(all)
	var err error
	switch w.loss {
	case lostNothing, lostProcess:
		err = w.model.CheckProcessCrash(read)
	case lostPower:
		err = w.model.CheckPrefix(read)
	case lostHost:
		cut := w.p.pubCut()
		if err = w.model.CheckCut(read, cut); err == nil && cut < w.newest.Load() {
			err = fmt.Errorf("the pool is back at cut %d, and cut %d was said to be published", cut, w.newest.Load())
		}
		if was, ok := w.exact[cut]; ok && err == nil {
			w.stats.exact.Add(1)
			err = same(was, all)
		}
	}
	if err != nil {
		return fmt.Errorf("after a %v: %w", w.loss, err)
	}
	w.loss = lostNothing
	return w.model.Recover(read)
}

// same tells where two contents differ.
func same(a, b [][]byte) error {
	for i := range a {
		for s := 0; s < len(a[i]); s += crashtest.SectorSize {
			x, y := a[i][s:][:crashtest.SectorSize], b[i][s:][:crashtest.SectorSize]
			if !bytes.Equal(x, y) {
				sx, _ := parseSector(x)
				sy, _ := parseSector(y)
				return fmt.Errorf("disk %d sector %d showed %v, now it shows %v", i+1, s/crashtest.SectorSize, sx, sy)
			}
		}
	}
	return nil
}

// files lists the tier for a person who looks for a bug.
func (w *world) files(t *testing.T) {
	names, err := w.fs.ReadDir("/tier")
	if err != nil {
		return
	}
	for _, e := range names {
		f, err := w.fs.Open(path.Join("/tier", e.Name()))
		if err != nil {
			continue
		}
		size, _ := f.Size()
		t.Logf("  %s: %d bytes", e.Name(), size)
		_ = f.Close()
	}
}
