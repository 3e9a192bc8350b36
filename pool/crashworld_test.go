package pool

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"path"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"graindisk/backend"
	"graindisk/backend/backendtest"
	"graindisk/block"
	"graindisk/internal/crashtest"
	"graindisk/vdisk"
)

// The pools of these tests: small enough that files fill, slots are reused and cuts have many segments.
const (
	crashSlotBytes    = 32 * block.Size
	crashSlots        = 24
	crashSegmentBytes = 64 << 10
	crashTargets      = 3
	crashWait         = 24 * time.Hour // after which a request counts as hung; nearly always in a bubble's time
	sectorsPerBlock   = block.Size / crashtest.SectorSize
)

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
	stores [crashTargets]*backendtest.Memory
	fs     *crashtest.FS
	model  *crashtest.Model
	disks  []*crashDisk
	auto   bool // cuts happen by age as well
	tight  bool // checkpoints, local and published, come often

	p     *Pool
	life  *life
	loss  loss // since the disks were last checked
	exact map[uint64][][]byte
	stale []*life // of dead processes; late requests may still be on their way
	stats *crashStats
	trace *trace
}

// crashDisk is a disk of the world. Its number in the model is its number in the pool.
type crashDisk struct {
	id        block.DiskID
	name      string
	blocks    int
	created   bool
	published bool // its creation
}

// crashStats counts what the histories went through.
type crashStats struct {
	histories, opens, checks, twice            atomic.Int64
	crashes                                    [lostHost + 1]atomic.Int64
	inRecovery, atStore, published, ops, exact atomic.Int64
}

func (s *crashStats) String() string {
	return fmt.Sprintf("%d histories, %d opens, %d process crashes, %d power cuts, %d lost hosts, %d clean closes; "+
		"%d cut at a request to a target, %d inside recovery; %d states checked, %d of them as exact cuts, %d recovered twice; %d operations, %d publications",
		s.histories.Load(), s.opens.Load(), s.crashes[lostProcess].Load(), s.crashes[lostPower].Load(), s.crashes[lostHost].Load(),
		s.crashes[lostNothing].Load(), s.atStore.Load(), s.inRecovery.Load(), s.checks.Load(), s.exact.Load(), s.twice.Load(),
		s.ops.Load(), s.published.Load())
}

// life is one process as its targets see it: when it dies, and when a target goes away.
type life struct {
	fs      *crashtest.FS
	stores  [crashTargets]*backendtest.Faulty
	calls   atomic.Int64
	cutAt   int64 // the power goes at this request; 0 is never
	offline int   // target that is away during requests [offFrom, offTo); -1 is none
	offFrom int64
	offTo   int64
	stats   *crashStats

	// ctx ends with the process: what waits for a dead one would wait for ever.
	ctx    context.Context
	cancel context.CancelFunc
}

// newLife draws what happens between a new process and its targets.
func (w *world) newLife(calm bool) *life {
	l := &life{fs: w.fs, offline: -1, stats: w.stats}
	l.ctx, l.cancel = context.WithTimeout(context.Background(), crashWait)
	l.fs.SetGate(w.sched)
	l.fs.OnPowerCut(l.cancel)
	for i := range l.stores {
		l.stores[i] = backendtest.NewFaulty(w.stores[i], w.rng.Uint64())
		if !calm {
			l.stores[i].SetRates(backendtest.Rates{backendtest.Refused: 0.01, backendtest.LostReply: 0.02, backendtest.Late: 0.01})
		}
		l.stores[i].Before = l.before
	}
	if calm {
		return l
	}
	if w.rng.IntN(3) == 0 {
		l.cutAt = 1 + w.rng.Int64N(80)
	}
	if w.rng.IntN(3) == 0 {
		l.offline, l.offFrom = w.rng.IntN(crashTargets), w.rng.Int64N([...]int64{8, 40}[w.rng.IntN(2)])
		l.offTo = l.offFrom + 10 + w.rng.Int64N(60)
	}
	return l
}

func (l *life) before(op, key string) error {
	n := l.calls.Add(1)
	if l.offline >= 0 {
		l.stores[l.offline].SetOffline(n >= l.offFrom && n < l.offTo)
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
		sched: sched, rng: rand.New(rand.NewPCG(seed, 1)), model: crashtest.NewModel(), exact: map[uint64][][]byte{}, stats: stats, trace: tr,
	}
	for i := range w.stores {
		w.stores[i] = backendtest.NewMemory(fmt.Sprintf("target-%d", i))
	}
	w.fs = crashtest.NewFS(crashtest.Options{Seed: w.rng.Uint64()})
	w.auto, w.tight = w.rng.IntN(3) == 0, w.rng.IntN(2) == 0
	for i := range 2 + w.rng.IntN(2) {
		d := &crashDisk{id: block.DiskID(i + 1), name: fmt.Sprintf("disk%d", i+1), blocks: 64 + w.rng.IntN(193)}
		w.disks = append(w.disks, d)
		w.model.AddDisk(d.id, d.blocks*sectorsPerBlock)
	}
	w.life = w.newLife(true)
	return w, Create(w.life.ctx, w.options(w.fs, w.life))
}

func (w *world) note(format string, args ...any) {
	fmt.Fprintf(w.trace, "---- "+format+"\n", args...)
}

// trace keeps what the world and the pools say, for the day a check fails.
type trace struct {
	mu    sync.Mutex
	lines []string
	hash  uint64 // of what was scheduled
}

// choice notes what the scheduler let go on.
func (t *trace) choice(label string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.lines = append(t.lines, "     > "+label)
}

// show prints the end of it.
func (t *trace) show(tb testing.TB) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, line := range t.lines[max(0, len(t.lines)-250):] {
		tb.Log(line)
	}
}

func (t *trace) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.lines = append(t.lines, strings.TrimSuffix(string(p), "\n"))
	return len(p), nil
}

// options are those of a process with the given life on the given file system.
func (w *world) options(fs *crashtest.FS, l *life) Options {
	o := Options{
		Name: "main", FS: fs, TierDir: "/tier", TierBytes: crashSlots * crashSlotBytes, SlotBytes: crashSlotBytes,
		SegmentBytes: crashSegmentBytes, MaxDirtyAge: time.Hour, Host: "host", Log: slog.New(slog.NewTextHandler(w.trace, &slog.HandlerOptions{Level: slog.LevelDebug})),
	}
	if w.tight {
		o.CheckpointCuts, o.CheckpointBytes = 6, 64<<10
	}
	if w.auto {
		o.MaxDirtyAge = 20 * time.Millisecond
	}
	for i, s := range l.stores {
		o.Targets = append(o.Targets, Target{Name: fmt.Sprintf("t%d", i), Store: scheduled{s, w.sched}})
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
	for try := 0; ; try++ {
		w.life = w.newLife(false)
		o := w.options(w.fs, w.life)
		o.Takeover = w.loss == lostHost
		p, err := Open(w.life.ctx, o)
		w.stale = append(w.stale, w.life)
		if err == nil {
			w.p = p
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
		w.life.cancel()
	}
}

// pubCut is the newest cut that the root is known to hold.
func (p *Pool) pubCut() uint64 { return p.value().Cut }

// down ends the process, if there is one, and takes from the host what l says.
func (w *world) down(l loss) {
	w.fs.PowerCut()
	w.stop()
	w.stats.crashes[l].Add(1)
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
}

// stop ends the goroutines of a process that is dead already.
func (w *world) stop() {
	w.life.cancel()
	if w.p == nil {
		return
	}
	w.p.pub.cancel()
	<-w.p.pub.done
	_ = w.p.closeTier() // the dead tier complains
	w.p = nil
}

func (w *world) drawLoss() loss {
	switch n := w.rng.IntN(10); {
	case n < 4:
		return lostProcess
	case n < 8:
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
	all := make([][]byte, len(w.disks))
	for i, d := range w.disks {
		all[i] = make([]byte, d.blocks*block.Size)
		vd, err := p.Disk(d.name)
		switch {
		case errors.Is(err, ErrNoDisk) && (!d.created || w.loss == lostHost && !d.published):
			d.created = false
			continue
		case err != nil:
			return nil, err
		case vd.ID() != d.id || vd.Size() != int64(d.blocks)*block.Size:
			return nil, fmt.Errorf("disk %s came back with number %d and %d bytes", d.name, vd.ID(), vd.Size())
		}
		d.created = true
		if err := vd.Read(w.life.ctx, all[i], 0); err != nil {
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
	read := w.reader(all)
	var err error
	switch w.loss {
	case lostNothing, lostProcess:
		err = w.model.CheckProcessCrash(read)
	case lostPower:
		err = w.model.CheckPrefix(read)
	case lostHost:
		cut := w.p.pubCut()
		err = w.model.CheckCut(read, cut)
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

// stampSector fills a sector with what tells operation op on it from any other.
//
//	0    8      16     24    28
//	+----+------+------+-----+------------+
//	| op | disk | lba  | crc | filling... |
//	+----+------+------+-----+------------+
func stampSector(b []byte, op uint64, disk block.DiskID, sector block.LBA) {
	le := binary.LittleEndian
	le.PutUint64(b, op)
	le.PutUint64(b[8:], uint64(disk))
	le.PutUint64(b[16:], uint64(sector))
	x := op*0x9e3779b97f4a7c15 ^ uint64(sector)
	for i := 28; i < crashtest.SectorSize; i += 4 {
		x = x*6364136223846793005 + 1442695040888963407
		le.PutUint32(b[i:], uint32(x>>32))
	}
	le.PutUint32(b[24:], block.CRC(b[:24])^block.CRC(b[28:]))
}

var zeroSector [crashtest.SectorSize]byte

func parseSector(b []byte) (crashtest.Stamp, error) {
	if bytes.Equal(b, zeroSector[:]) {
		return crashtest.Stamp{}, nil
	}
	le := binary.LittleEndian
	if le.Uint32(b[24:]) != block.CRC(b[:24])^block.CRC(b[28:]) {
		return crashtest.Stamp{}, fmt.Errorf("%w: %x...", crashtest.ErrNotStamped, b[:28])
	}
	return crashtest.Stamp{Op: le.Uint64(b), Disk: block.DiskID(le.Uint64(b[8:])), LBA: block.LBA(le.Uint64(b[16:]))}, nil
}

// client sends requests to the disks, one at a time.
type client struct {
	w     *world
	p     *Pool
	rng   *rand.Rand
	name  string
	alone bool // no other client is at work
}

// step sends one request. An error of a living process is wrong.
func (c *client) step(ctx context.Context) error {
	c.w.sched.Park(c.name)
	d := c.w.disks[c.rng.IntN(len(c.w.disks))]
	vd, err := c.p.Disk(d.name)
	if err != nil {
		return err
	}
	c.w.stats.ops.Add(1)
	switch n := c.rng.IntN(100); {
	case n < 6:
		return c.publish(ctx)
	case n < 16:
		mark := c.w.model.Mark()
		if err := vd.Flush(ctx); err != nil {
			return err
		}
		c.w.model.Flushed(d.id, mark)
		return nil
	}
	var ops []vdisk.Op
	var ids []uint64
	for range 1 + c.rng.IntN(4)/3*c.rng.IntN(4) {
		op, issued := c.draw(d)
		ops, ids = append(ops, op), append(ids, issued...)
	}
	stable := c.rng.IntN(10) == 0
	if err := vd.Write(ctx, ops, stable); err != nil {
		return err
	}
	for _, id := range ids {
		if stable {
			c.w.model.Stable(id)
		} else {
			c.w.model.Acked(id)
		}
	}
	return nil
}

// draw makes up one write, trim or write of zeroes and issues it to the model. Every block is an
// operation of its own to the model, since the log may split a write between blocks.
func (c *client) draw(d *crashDisk) (vdisk.Op, []uint64) {
	sectors := d.blocks * sectorsPerBlock
	kind := vdisk.OpWrite
	most := 12 * sectorsPerBlock
	switch n := c.rng.IntN(20); {
	case n < 2:
		kind, most = vdisk.OpTrim, 64*sectorsPerBlock
	case n < 4:
		kind = vdisk.OpZero
	case n < 8:
		most = 12
	}
	if c.rng.IntN(2) == 0 {
		most = min(most, sectorsPerBlock)
	}
	first := c.rng.IntN(sectors)
	count := 1 + c.rng.IntN(min(most, sectors-first))
	if c.rng.IntN(4) > 0 && kind == vdisk.OpWrite && most >= sectorsPerBlock { // whole blocks
		first -= first % sectorsPerBlock
		count = max(count-count%sectorsPerBlock, sectorsPerBlock)
	}
	op := vdisk.Op{Kind: kind, Off: int64(first) * crashtest.SectorSize, Len: int64(count) * crashtest.SectorSize}
	end := first + count
	if kind == vdisk.OpTrim {
		first = (first + sectorsPerBlock - 1) / sectorsPerBlock * sectorsPerBlock
		end -= end % sectorsPerBlock
	}
	if kind == vdisk.OpWrite {
		op.Data = make([]byte, op.Len)
	}
	var ids []uint64
	for from := first; from < end; {
		to := min(end, from/sectorsPerBlock*sectorsPerBlock+sectorsPerBlock)
		if kind != vdisk.OpWrite {
			ids = append(ids, c.w.model.IssueHole(d.id, block.LBA(from), to-from))
		} else {
			id, _ := c.w.model.IssueWrite(d.id, block.LBA(from), to-from)
			for s := from; s < to; s++ {
				stampSector(op.Data[(s-first)*crashtest.SectorSize:][:crashtest.SectorSize], id, d.id, block.LBA(s))
			}
			ids = append(ids, id)
		}
		from = to
	}
	return op, ids
}

// publish asks for a cut. With nobody else at work the cut is known to the byte.
func (c *client) publish(ctx context.Context) error {
	w := c.w
	mark := w.model.Mark()
	if err := c.p.Publish(ctx); err != nil {
		return err
	}
	cut := c.p.pubCut()
	w.model.Published(cut, mark)
	w.stats.published.Add(1)
	if !c.alone {
		return nil
	}
	for _, d := range w.disks {
		d.published = true
	}
	if all, err := w.content(c.p); err == nil {
		w.exact[cut] = all
	}
	return nil
}

// createMissing makes the disks that are not there.
func (w *world) createMissing(ctx context.Context) error {
	for _, d := range w.disks {
		if d.created {
			continue
		}
		if _, err := w.p.Disk(d.name); errors.Is(err, ErrNoDisk) {
			if err := w.create(ctx, d); err != nil {
				return err
			}
		}
		d.created = true
	}
	return nil
}

// create makes a disk. The pool does not let go before the log has taken or refused the record, which the
// log of a dead process may never do.
func (w *world) create(ctx context.Context, d *crashDisk) error {
	p, done := w.p, make(chan error, 1)
	go func() {
		vd, err := p.CreateDisk(ctx, d.name, int64(d.blocks)*block.Size)
		if err == nil && vd.ID() != d.id {
			err = fmt.Errorf("disk %s was made as number %d, not %d", d.name, vd.ID(), d.id)
		}
		done <- err
	}()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
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
