package writeback

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"graindisk/block"
	"graindisk/internal/crashtest"
	"graindisk/internal/vfs"
	"graindisk/tier"
)

const (
	testDir        = "tier"
	testSlotBlocks = 16
	testSlots      = 14
	metaHorizon    = OpaqueMin // kind of the test pool's publication records
)

var (
	seedFlag  = flag.Uint64("seed", 0, "first seed of the power-cut histories; 0 draws one")
	histories = flag.Int("histories", 2, "number of power-cut histories")
)

var testPool = UUID{1, 2, 3}

// openSpace makes or reopens the tier of a test.
func openSpace(t testing.TB, fsys vfs.FS, dir string, slots, slotBlocks int) *tier.Space {
	t.Helper()
	s, err := tryOpenSpace(fsys, dir, slots, slotBlocks)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func tryOpenSpace(fsys vfs.FS, dir string, slots, slotBlocks int) (*tier.Space, error) {
	return tier.Open(tier.Options{FS: fsys, Dir: dir, SlotBytes: int64(slotBlocks) * block.Size, Slots: slots})
}

// unit is one record of the histories: one block written, one range unmapped, or one operation, so
// that units[i] has sequence i+1.
type unit struct {
	kind   Kind
	disk   block.DiskID
	lba    block.LBA
	blocks uint64
	stamp  uint64
}

func (u unit) record() Record {
	r := Record{Kind: u.kind, Disk: u.disk, LBA: u.lba, Blocks: u.blocks}
	switch u.kind {
	case Data:
		r.Data = stampBlock(u.stamp)
	case Op:
		r.Data = binary.LittleEndian.AppendUint64(nil, u.stamp)
	}
	return r
}

func stampBlock(stamp uint64) []byte {
	b := make([]byte, block.Size)
	for i := 0; i < len(b); i += 8 {
		binary.LittleEndian.PutUint64(b[i:], stamp)
	}
	return b
}

const (
	testDisks  = 2
	testBlocks = 20
)

// view is what every block of the test disks reads as; 0 is a hole or never written.
type view [testDisks][testBlocks]uint64

func (v *view) apply(u unit) {
	switch u.kind {
	case Data:
		v[u.disk-1][u.lba] = u.stamp
	case Unmap:
		for i := range u.blocks {
			v[u.disk-1][u.lba+block.LBA(i)] = 0
		}
	}
}

func viewOf(units []unit) (v view) {
	for _, u := range units {
		v.apply(u)
	}
	return v
}

// history drives one log and knows what it must hold.
type history struct {
	t       testing.TB
	rng     *rand.Rand
	fs      *crashtest.FS
	space   *tier.Space
	log     *Log
	ctx     context.Context
	end     context.CancelFunc
	units   []unit // issued
	acked   int
	stable  int
	horizon Seq // published, as told to the log
	frozen  []*Frozen
	stamp   uint64
	faults  bool // calls fail now and then, and pass when tried again
}

// watch ends ctx soon after the power is cut, since an append may be waiting for a slot then.
func (h *history) watch() {
	ctx, end := context.WithCancel(context.Background())
	h.ctx, h.end = ctx, end
	fsys := h.fs
	go func() {
		for ctx.Err() == nil {
			if fsys.WasCut() {
				end()
			}
			time.Sleep(time.Millisecond)
		}
	}()
}

func (h *history) options() Options {
	return Options{FS: h.fs, Dir: testDir, Space: h.space, Pool: testPool}
}

func newHistory(t testing.TB, seed uint64, fsys *crashtest.FS) (h *history, err error) {
	h = &history{t: t, rng: rand.New(rand.NewPCG(seed, 7)), fs: fsys}
	if err := fsys.MkdirAll(testDir); err != nil {
		return nil, err
	}
	if err := fsys.SyncDir("."); err != nil {
		return nil, err
	}
	if h.space, err = tryOpenSpace(fsys, testDir, testSlots, testSlotBlocks); err != nil {
		return nil, err
	}
	h.watch()
	if h.log, err = Create(h.options()); err == nil {
		h.log.flyFreely()
	}
	return h, err
}

func (h *history) randomUnit() unit {
	h.stamp++
	u := unit{kind: Data, disk: block.DiskID(1 + h.rng.IntN(testDisks)), lba: block.LBA(h.rng.IntN(testBlocks)), stamp: h.stamp}
	switch h.rng.IntN(10) {
	case 0:
		u.kind = Op
	case 1:
		u.kind, u.blocks = Unmap, 1+uint64(h.rng.IntN(testBlocks-int(u.lba)))
	}
	return u
}

func (h *history) step() error {
	if h.faults && h.rng.IntN(5) == 0 {
		h.fs.Inject(randomFault(h.rng))
	}
	switch n := h.rng.IntN(21); {
	case n < 12:
		return h.append(1 + h.rng.IntN(4))
	case n < 15:
		return h.sync()
	case n < 17:
		h.frozen = append(h.frozen, h.log.Freeze())
		return nil
	case n < 19:
		return h.publish()
	}
	if h.rng.IntN(2) == 0 {
		return h.checkpointBetween()
	}
	return h.checkpoint()
}

// checkpointBetween writes a checkpoint that ends no generation, with records appended after its freeze.
func (h *history) checkpointBetween() error {
	err := h.log.Checkpoint(h.ctx, func() ([]byte, error) {
		state := binary.LittleEndian.AppendUint64(nil, uint64(h.horizon))
		if h.log.Pressure().Busy > testSlots-6 {
			return state, nil // append would publish, which may freeze
		}
		return state, h.append(1 + h.rng.IntN(4))
	})
	if h.faults && h.log.Failed() == nil && !h.fs.WasCut() {
		return nil // the checkpoint before holds
	}
	return err
}

func (h *history) append(n int) error {
	if h.log.Pressure().Busy > testSlots-6 {
		for ok := true; ok; ok = len(h.frozen) > 0 {
			if err := h.publish(); err != nil {
				return err
			}
		}
	}
	var recs []Record
	for range n {
		u := h.randomUnit()
		h.units = append(h.units, u)
		recs = append(recs, u.record())
	}
	last, err := h.log.Append(h.ctx, recs)
	if err != nil {
		return err
	}
	if int(last) != len(h.units) {
		h.t.Errorf("appended record %d, told %d", len(h.units), last)
	}
	h.acked = len(h.units)
	return nil
}

func (h *history) sync() error {
	n := h.acked
	if err := h.log.Sync(h.ctx); err != nil {
		return err
	}
	h.stable = n
	return nil
}

func (h *history) publish() error {
	if len(h.frozen) == 0 {
		h.frozen = append(h.frozen, h.log.Freeze())
	}
	f := h.frozen[0]
	if err := h.checkFrozen(f); errors.Is(err, crashtest.ErrPowerLost) {
		return err
	} else if err != nil {
		h.t.Error(err)
	}
	if err := h.sync(); err != nil {
		return err
	}
	if err := h.log.AppendMeta(metaHorizon, binary.LittleEndian.AppendUint64(nil, uint64(f.Seq))); err != nil {
		return err
	}
	h.frozen, h.horizon = h.frozen[1:], f.Seq
	return h.log.Publish(f)
}

// checkFrozen compares a generation's net effect with the records it stands for.
func (h *history) checkFrozen(f *Frozen) error {
	got, want := viewOf(h.units[:h.horizon]), viewOf(h.units[:f.Seq])
	var p [block.Size]byte
	for _, d := range f.Disks() {
		for _, r := range f.Holes(d) {
			got.apply(unit{kind: Unmap, disk: d, lba: r.LBA, blocks: r.Blocks})
		}
		for _, b := range f.Blocks(d) {
			if err := h.log.ReadBlocks(d, b.LBA, []Found{{Present, b.CRC, b.Place}}, p[:]); err != nil {
				return err
			}
			got.apply(unit{kind: Data, disk: d, lba: b.LBA, stamp: binary.LittleEndian.Uint64(p[:])})
		}
	}
	if got != want {
		return fmt.Errorf("net effect of (%d, %d] is\n%v, want\n%v", h.horizon, f.Seq, got, want)
	}
	return nil
}

func (h *history) checkpoint() error {
	c, err := h.log.FreezeAndRotate(h.ctx)
	if err != nil {
		return err
	}
	h.frozen = append(h.frozen, c.Frozen)
	state := binary.LittleEndian.AppendUint64(nil, uint64(h.horizon))
	if h.rng.IntN(2) == 0 { // life goes on meanwhile
		if err := h.append(2); err != nil {
			return err
		}
		if err := h.publish(); err != nil {
			return err
		}
	}
	if err = h.log.WriteCheckpoint(c, state); h.faults && h.log.Failed() == nil && !errors.Is(err, crashtest.ErrPowerLost) {
		return nil // the checkpoint before holds
	}
	return err
}

// read is what the disks read as: the log over what is published.
func (h *history) read(l *Log, published []unit) (v view, err error) {
	v = viewOf(published)
	for d := range block.DiskID(testDisks) {
		var found [testBlocks]Found
		var pins Pins
		l.Lookup(d+1, 0, found[:], &pins)
		buf := make([]byte, testBlocks*block.Size)
		err := l.ReadBlocks(d+1, 0, found[:], buf)
		pins.Release()
		if err != nil {
			return v, err
		}
		for i, f := range found {
			b := buf[i*block.Size:][:block.Size]
			if f.State != None {
				v[d][i] = binary.LittleEndian.Uint64(b)
				if !bytes.Equal(b, stampBlock(v[d][i])) {
					return v, fmt.Errorf("disk %d block %d is torn", d+1, i)
				}
			}
		}
	}
	return v, nil
}

// recover opens the log on fsys and checks that it holds exactly its units through an end that is
// at least `least`; the history goes on from there.
func (h *history) recover(fsys *crashtest.FS, least int) error {
	h.end()
	h.fs = fsys
	h.watch()
	var err error
	if h.space, err = tryOpenSpace(fsys, testDir, testSlots, testSlotBlocks); err != nil {
		return err
	}
	l, rec, err := Open(h.options())
	if err != nil {
		return err
	}
	h.log = l
	horizon := Seq(0)
	if rec.State != nil {
		horizon = Seq(binary.LittleEndian.Uint64(rec.State))
	}
	for _, m := range rec.Meta {
		if m.Kind != metaHorizon {
			return fmt.Errorf("metadata record of kind %d", m.Kind)
		}
		horizon = max(horizon, Seq(binary.LittleEndian.Uint64(m.Payload)))
	}
	if horizon < h.horizon {
		return fmt.Errorf("horizon %d, was %d", horizon, h.horizon)
	}
	if err := l.DropThrough(horizon); err != nil {
		return err
	}
	if int(rec.End) < least || int(rec.End) > len(h.units) {
		return fmt.Errorf("recovered through %d, want %d to %d", rec.End, least, len(h.units))
	}
	h.units = h.units[:rec.End]
	h.horizon, h.frozen = horizon, nil
	h.acked, h.stable = len(h.units), len(h.units)
	got, err := h.read(l, h.units[:horizon])
	if err != nil {
		return err
	}
	if want := viewOf(h.units); got != want {
		return fmt.Errorf("recovered through %d, horizon %d:\n%v, want\n%v", rec.End, horizon, got, want)
	}
	return h.checkOps(rec.Ops)
}

// checkOps wants the operations above the horizon, in order; recovered ones may reach below it.
func (h *history) checkOps(got []OpRecord) error {
	var want []OpRecord
	for i, u := range h.units {
		if u.kind == Op && Seq(i+1) > h.horizon {
			want = append(want, OpRecord{Seq: Seq(i + 1), Disk: u.disk, Payload: u.record().Data})
		}
	}
	for len(got) > 0 && got[0].Seq <= h.horizon {
		got = got[1:]
	}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		return fmt.Errorf("operations %v, want %v", got, want)
	}
	return nil
}

func (h *history) run(steps int) error {
	for range steps {
		if err := h.step(); err != nil {
			return err
		}
	}
	return nil
}

// expectCut fails the test unless err is what a cut of the power explains.
func (h *history) expectCut(err error) {
	h.t.Helper()
	if h.faults && (errors.Is(err, ErrFailed) || errors.Is(h.log.Failed(), ErrFailed)) {
		return // too many of them at once: the log may stop, but lose nothing
	}
	if err != nil && !errors.Is(err, crashtest.ErrPowerLost) && !errors.Is(err, context.Canceled) {
		h.t.Fatalf("unexpected: %v", err)
	}
}

// quit ends the goroutines of a log whose power is gone.
func (h *history) quit() {
	if h.log != nil {
		h.log.Close()
	}
	h.end()
}

// TestPowerCutLeavesAPrefix cuts the power at every call of random histories, several times over
// the same disk, with recovery itself cut short in between, and expects a prefix of the append order
// back that holds everything stable. In every other history calls fail now and then.
func TestPowerCutLeavesAPrefix(t *testing.T) {
	base := *seedFlag
	if base == 0 {
		base = rand.Uint64()
	}
	t.Logf("seed %d", base)
	for s := range *histories {
		seed := base + uint64(s)
		stride := 2 + s%5
		for cut := 1 + s%stride; cut < 400; cut += stride {
			if !powerCutRun(t, seed, cut, s%2 == 1) {
				break
			}
			if t.Failed() {
				t.Fatalf("seed %d, cut %d", seed, cut)
			}
		}
	}
}

// powerCutRun is one history with the power cut at one call; false if it ended before the cut.
func powerCutRun(t *testing.T, seed uint64, cut int, faults bool) bool {
	fsys := crashtest.NewFS(crashtest.Options{Seed: seed, CutAfter: cut})
	h, err := newHistory(t, seed, fsys)
	if h != nil {
		defer func() { h.quit() }()
	}
	if err != nil {
		if h != nil {
			h.expectCut(err)
		}
		return fsys.WasCut()
	}
	h.faults = faults
	for round := range 3 {
		err := h.run(60)
		h.expectCut(err)
		wasCut := h.fs.WasCut()
		least := h.stable
		h.log.Close()
		if !wasCut {
			if round == 0 && err == nil {
				return false
			}
			h.fs.PowerCut()
		}
		after := h.fs.Reboot(seed + uint64(round))
		after.CutAfter(1 + h.rng.IntN(12))
		old := h.log
		if err := h.recover(after, least); err == nil {
			h.log.Close()
			after.PowerCut()
			least = h.stable // all it recovered
		} else if !after.WasCut() {
			t.Fatalf("seed %d, cut %d, round %d: %v", seed, cut, round, err)
		} else if h.log != old {
			h.log.Close()
		}
		again := after.Reboot(seed ^ 5)
		if err := h.recover(again, least); err != nil {
			t.Fatalf("seed %d, cut %d, round %d, second recovery: %v", seed, cut, round, err)
		}
		again.CutAfter(1 + h.rng.IntN(200))
	}
	return true
}

// TestProcessCrashLosesNothing kills the process at every call and expects every acknowledged
// record back, and still after a power cut that follows the recovery.
func TestProcessCrashLosesNothing(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	for cut := 8; cut < 300; cut += 3 {
		fsys := crashtest.NewFS(crashtest.Options{Seed: seed, CutAfter: cut})
		h, err := newHistory(t, seed, fsys)
		if err != nil {
			continue // the cut fell into Create
		}
		h.expectCut(h.run(80))
		acked := h.acked
		h.log.Close()
		if err := h.recover(fsys.ProcessCrash(), acked); err != nil {
			t.Fatalf("seed %d, cut %d: %v", seed, cut, err)
		}
		first := len(h.units)
		h.fs.PowerCut() // what recovery has read must be stable by now
		h.log.Close()
		if err := h.recover(h.fs.Reboot(seed), first); err != nil {
			t.Fatalf("seed %d, cut %d: after a power cut: %v", seed, cut, err)
		}
		h.quit()
	}
}
