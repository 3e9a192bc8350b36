package pool

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"graindisk/backend"
	"graindisk/backend/backendtest"
	"graindisk/backend/local"
	"graindisk/block"
	"graindisk/grains/segment"
	"graindisk/internal/crashtest"
	"graindisk/vdisk"
	"graindisk/vdisk/densetree"
)

// counting is a store that counts requests that carry bytes to us, and those bytes.
type counting struct {
	backend.Store
	requests, bytes atomic.Int64
}

func (s *counting) Get(ctx context.Context, key string, max int64) ([]byte, string, error) {
	b, etag, err := s.Store.Get(ctx, key, max)
	s.requests.Add(1)
	s.bytes.Add(int64(len(b)))
	return b, etag, err
}

func (s *counting) ReadAt(ctx context.Context, key string, p []byte, off int64) error {
	s.requests.Add(1)
	s.bytes.Add(int64(len(p)))
	return s.Store.ReadAt(ctx, key, p, off)
}

// The synthetic pool: one disk, wholly mapped by extents of a grain each, in an order that no run can join.
// Everything is as the writers of the pool make it, but for the shards of the segments: there are none.
const (
	fakeSlots  = 512 // extents of a segment of 32 MiB
	fakePut    = 8192
	fakeGrain  = grainBlocks
	fakeDisk   = "big"
	fakeShards = fakeSlots * GrainBytes / 2
)

// fakeOrder is a permutation of n: grain i is extent order[i].
func fakeOrder(n int, seed uint64) []uint32 {
	rng := rand.New(rand.NewPCG(seed, 7))
	order := make([]uint32, n)
	for i := range order {
		order[i] = uint32(i)
	}
	rng.Shuffle(n, func(i, j int) { order[i], order[j] = order[j], order[i] })
	return order
}

func fakeExtent(order []uint32, i int) block.ExtentID {
	return block.NewExtentID(block.SegmentID(1+order[i]/fakeSlots), int(order[i]%fakeSlots))
}

// fakeMaps fills an open, new pool and publishes a checkpoint of it.
func fakeMaps(t testing.TB, p *Pool, order []uint32) {
	t.Helper()
	ctx := context.Background()
	d, err := p.CreateDisk(ctx, fakeDisk, int64(len(order))*GrainBytes)
	if err == nil {
		err = p.Publish(ctx)
	}
	if err != nil {
		t.Fatal(err)
	}
	p.mapsMu.Lock()
	var infos []segment.Info
	for id := 1; id <= len(order)/fakeSlots; id++ {
		infos = append(infos, segment.Info{
			ID: block.SegmentID(id) + 1000, Epoch: 1, K: 2, M: 1, Targets: rotate([]block.TargetID{1, 2, 3}, id%3), ShardBytes: fakeShards, IndexBytes: 9000,
			Extents: fakeSlots, PayloadBytes: fakeSlots * GrainBytes,
		})
	}
	p.mu.Lock()
	for _, info := range infos {
		p.segments[info.ID] = info
	}
	p.mu.Unlock()
	p.addUsage(infos, 1)
	es := make([]densetree.Entry, 0, fakePut)
	for i := range order {
		id := fakeExtent(order, i)
		es = append(es, densetree.Entry{
			LBA: block.LBA(i) * fakeGrain, Blocks: fakeGrain, Kind: densetree.Data,
			Extent: block.NewExtentID(id.Segment()+1000, id.Slot()), Orig: fakeGrain,
		})
		if len(es) == cap(es) || i == len(order)-1 {
			d.Tree().Put(es)
			es = es[:0]
		}
	}
	p.mapsMu.Unlock()
	if err := d.Tree().Flush(); err != nil {
		t.Fatal(err)
	}
	if err := p.publishCheckpoint(ctx); err != nil {
		t.Fatal(err)
	}
}

// checkFake looks n grains up, waiting for what is not here.
func checkFake(t testing.TB, p *Pool, order []uint32, rng *rand.Rand, n int) {
	t.Helper()
	d, err := p.Disk(fakeDisk)
	if err != nil {
		t.Fatal(err)
	}
	for range n {
		i := rng.IntN(len(order))
		ps := d.Pieces(context.Background(), int64(i)*GrainBytes, int64(i+1)*GrainBytes)
		id := fakeExtent(order, i)
		want := block.NewExtentID(id.Segment()+1000, id.Slot())
		if len(ps) != 1 || ps[0].ID != want || ps[0].Orig != fakeGrain {
			t.Fatalf("grain %d is %+v, want %v", i, ps, want)
		}
	}
}

// fakeSite is targets with a synthetic pool, closed.
type fakeSite struct {
	order    []uint32
	stores   []*counting
	rng      *rand.Rand
	opt      func(*Options)
	tierDirs string
	n        int
}

func (s *fakeSite) options() Options {
	o := Options{
		Name: "p", TierDir: filepath.Join(s.tierDirs, fmt.Sprintf("tier%d", s.n)), TierBytes: 64 << 20, SlotBytes: 4 << 20,
		MaxDirtyAge: time.Hour, CreateEmpty: s.n == 0, Host: "here",
	}
	for i, st := range s.stores {
		o.Targets = append(o.Targets, Target{Name: fmt.Sprintf("t%d", i), Store: st})
	}
	if s.opt != nil {
		s.opt(&o)
	}
	return o
}

func (s *fakeSite) counts() (requests, bytes int64) {
	for _, st := range s.stores {
		requests, bytes = requests+st.requests.Load(), bytes+st.bytes.Load()
	}
	return requests, bytes
}

// build makes the pool and closes it, released.
func (s *fakeSite) build(t testing.TB, n int) {
	t.Helper()
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	s.rng = rand.New(rand.NewPCG(seed, 8))
	s.order = fakeOrder(n, seed)
	p, err := Open(context.Background(), s.options())
	if err != nil {
		t.Fatal(err)
	}
	fakeMaps(t, p, s.order)
	if err := p.Close(context.Background()); err != nil {
		t.Fatal(err)
	}
}

// open opens the pool on another host.
func (s *fakeSite) open(t testing.TB) *Pool {
	t.Helper()
	s.n++
	p, err := Open(context.Background(), s.options())
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// TestAFreshOpenFetchesHeadsOnly opens a pool with a large map on a fresh host and counts what it takes, what one
// lookup takes, and what all of it takes then.
func TestAFreshOpenFetchesHeadsOnly(t *testing.T) {
	s := &fakeSite{tierDirs: t.TempDir(), opt: func(o *Options) { o.mapLevel0, o.mapRun, o.mapRate = 4096, 32<<10, -1 }}
	for i := range 3 {
		s.stores = append(s.stores, &counting{Store: backendtest.NewMemory(fmt.Sprintf("mem%d", i))})
	}
	s.build(t, 256<<10)
	r0, b0 := s.counts()
	p := s.open(t)
	r1, b1 := s.counts()
	defer func() {
		if err := p.Close(context.Background()); err != nil {
			t.Error(err)
		}
	}()
	var runs, pageBytes int64
	for _, r := range p.runs.Partial() {
		runs++
		_, n := r.PageRange(0, r.Pages())
		pageBytes += n
	}
	t.Logf("open: %d requests, %d bytes; %d partial runs with %d bytes of pages", r1-r0, b1-b0, runs, pageBytes)
	if runs < 10 || pageBytes < 1<<20 {
		t.Fatalf("%d partial runs with %d bytes of pages: nothing is proved", runs, pageBytes)
	}
	if got, bound := r1-r0, runs+60; got > bound {
		t.Errorf("the open made %d requests, at most %d are expected", got, bound)
	}
	// A head is a page; the tables have some 150 bytes per segment and 100 per run; level 0 is small here.
	if got, bound := b1-b0, runs*(4096+200)+int64(len(s.order)/fakeSlots*250)+512<<10; got > bound || got > pageBytes {
		t.Errorf("the open fetched %d bytes, at most %d are expected of %d", got, bound, pageBytes)
	}
	if got := p.Status().Tier.MapsAwayBytes; got <= pageBytes {
		t.Errorf("status says that %d bytes are away, of pages there are %d", got, pageBytes)
	}
	checkFake(t, p, s.order, s.rng, 1)
	r2, b2 := s.counts()
	if r2 == r1 || r2-r1 > 6 || b2-b1 > 6*farPages*4096 {
		t.Errorf("a lookup made %d requests for %d bytes", r2-r1, b2-b1)
	}
	checkFake(t, p, s.order, s.rng, 300)
	if err := p.needRuns(context.Background(), p.runs.Partial()); err != nil {
		t.Fatal(err)
	}
	r3, b3 := s.counts()
	if b3-b1 > 2*pageBytes || len(p.runs.Partial()) != 0 || p.Status().Tier.MapsAwayBytes != 0 {
		t.Errorf("all of the maps took %d bytes for %d; %d runs are partial", b3-b1, pageBytes, len(p.runs.Partial()))
	}
	checkFake(t, p, s.order, s.rng, 300)
	if rep, err := p.CheckUsage(t.Context()); err != nil || len(rep.Leaks)+len(rep.Low) > 0 {
		t.Errorf("recount: %d leaks, %d low, %v", len(rep.Leaks), len(rep.Low), err)
	}
	if r4, _ := s.counts(); r4 != r3 {
		t.Errorf("%d requests after all of the maps were here", r4-r3)
	}
}

// absentRig is a rig whose disk has a map of many runs, all of them in a published checkpoint, just opened on
// another host: of the runs only the heads are here, and nothing is fetched in the background.
func absentRig(t *testing.T, opt func(*Options)) (*rig, *vdisk.Disk, []byte) {
	t.Helper()
	r := newRig(t, func(o *Options) {
		smallMaps(o)
		o.mapWhole, o.mapRate = -1, -1
		if opt != nil {
			opt(o)
		}
	})
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
	r.newHost()
	r.open(false)
	if n := r.partial(); n < 5 {
		t.Fatalf("only %d partial runs", n)
	}
	return r, r.disk("d", testDisk), model
}

func (r *rig) partial() int { return len(r.pool.runs.Partial()) }

func (r *rig) offline(off bool) {
	for _, s := range r.stores {
		s.SetOffline(off)
	}
}

// TestFarMapsAreRead reads through maps that are not here, with each target away in turn, with a copy of every
// part damaged, and with all of them.
func TestFarMapsAreRead(t *testing.T) {
	r, d, model := absentRig(t, nil)
	r.expect(d, model)
	r.write(d, 12345, []byte("part of a block"))
	copy(model[12345:], "part of a block")
	r.expect(d, model)
	if r.partial() == 0 {
		t.Error("a read made all runs complete")
	}
	r.publish()
	r.close()
	for i := range r.stores {
		r.newHost()
		r.open(false)
		r.stores[i].SetOffline(true)
		r.expect(r.disk("d", testDisk), model)
		r.stores[i].SetOffline(false)
		r.close()
	}
	flip := func(copyNo string) (n int) {
		for _, m := range r.memory {
			for key := range m.Objects() {
				if strings.HasPrefix(key, "ckpt/") && strings.HasSuffix(key, copyNo) && !strings.Contains(key, "/0.") {
					n++
					m.Damage(key, func(b []byte) []byte {
						for i := partHeaderLen; i < len(b); i += 4096 {
							b[i+100] ^= 0x40
						}
						return b
					})
				}
			}
		}
		return n
	}
	r.newHost()
	r.open(false)
	if flip(".1") == 0 {
		t.Fatal("nothing damaged")
	}
	r.expect(r.disk("d", testDisk), model)
	r.close()
	r.newHost()
	r.open(false)
	flip(".0")
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if err := r.disk("d", testDisk).Read(ctx, make([]byte, testDisk), 0); !errors.Is(err, vdisk.ErrDamaged) {
		t.Errorf("a map that is damaged in all copies reads with %v", err)
	}
	r.abandon()
}

// mute is a store that never answers reads of checkpoints while on.
type mute struct {
	backend.Store
	on   atomic.Bool
	hung atomic.Int64
}

func (s *mute) ReadAt(ctx context.Context, key string, p []byte, off int64) error {
	if s.on.Load() && strings.HasPrefix(key, "ckpt/") {
		s.hung.Add(1)
		<-ctx.Done()
		return &backend.Error{Op: "read", Store: s.String(), Key: key, Class: backend.Transient, Err: ctx.Err()}
	}
	return s.Store.ReadAt(ctx, key, p, off)
}

// TestFarMapsPassATargetThatHangs opens and reads with a target that takes requests for maps and never answers: the copies
// on the others are asked after a while, and nothing waits for time-outs.
func TestFarMapsPassATargetThatHangs(t *testing.T) {
	var hanging mute
	r, _, model := absentRig(t, func(o *Options) {
		hanging.Store = o.Targets[0].Store
		o.Targets[0].Store = &hanging
	})
	r.close()
	r.newHost()
	hanging.on.Store(true)
	ctx, cancel := context.WithTimeout(context.Background(), partReadTimeout) // one time-out alone is more
	defer cancel()
	var err error
	if r.pool, err = Open(ctx, r.options(false)); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, testDisk)
	if err := r.disk("d", testDisk).Read(ctx, got, 0); err != nil || !bytes.Equal(got, model) {
		t.Errorf("read beside a target that hangs: %v", err)
	}
	if hanging.hung.Load() == 0 {
		t.Error("the target that hangs was not asked")
	}
}

// TestFarMapsWaitForTheirTargets opens a tier whose maps are not all here, with the targets away: reads of what is
// not here wait, everything else goes on.
func TestFarMapsWaitForTheirTargets(t *testing.T) {
	r, d, model := absentRig(t, func(o *Options) { o.RootTimeout = 100 * time.Millisecond })
	few := make([]byte, block.Size)
	if err := d.Read(context.Background(), few, 0); err != nil || !bytes.Equal(few, model[:block.Size]) {
		t.Fatalf("first block: %v", err)
	}
	r.abandon()
	r.fs = r.fs.ProcessCrash()
	r.offline(true)
	r.open(false)
	d = r.disk("d", testDisk)
	if r.partial() < 5 {
		t.Fatalf("only %d partial runs", r.partial())
	}
	if ok, err := d.TryRead(make([]byte, testDisk), 0); ok || err != nil {
		t.Errorf("read without the targets: %v, %v", ok, err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 300*time.Millisecond)
	err := d.Read(ctx, make([]byte, testDisk), 0)
	cancel()
	if !errors.Is(err, context.DeadlineExceeded) || errors.Is(err, vdisk.ErrDamaged) {
		t.Errorf("read without the targets: %v, it should have waited", err)
	}
	got := make(chan error, 1)
	buf := make([]byte, testDisk)
	go func() { got <- d.Read(context.Background(), buf, 0) }()
	was := bytes.Clone(model) // what the read below may see of the write is in model
	block3 := bytes.Repeat([]byte("z"), block.Size)
	r.write(d, testDisk-block.Size, block3)
	copy(model[testDisk-block.Size:], block3)
	if err := d.Flush(context.Background()); err != nil {
		t.Errorf("flush while a read waits for the map: %v", err)
	}
	select {
	case err := <-got:
		t.Fatalf("read done with the targets away: %v", err)
	case <-time.After(50 * time.Millisecond):
	}
	r.offline(false)
	if err := <-got; err != nil || !bytes.Equal(buf[:testDisk-block.Size], was[:testDisk-block.Size]) {
		t.Errorf("read once the targets were back: %v", err)
	}
	r.expect(d, model)
	r.publish()
	r.abandon()
	r.newHost()
	r.open(true)
	r.expect(r.disk("d", testDisk), model)
}

// TestMergesWaitForFarMaps has cuts enter maps that are not here, and published checkpoints follow: what is
// not here is not merged and not stored again, until it is brought.
func TestMergesWaitForFarMaps(t *testing.T) {
	r, d, model := absentRig(t, nil)
	was := r.partial()
	for range 3 {
		r.scribble(d, model, 12)
		r.publish()
	}
	if r.partial() != was {
		t.Errorf("%d runs are partial, %d were", r.partial(), was)
	}
	if err := r.pool.publishCheckpoint(context.Background()); err != nil {
		t.Fatal(err)
	}
	if r.partial() != was {
		t.Errorf("a published checkpoint made runs complete: %d are partial, %d were", r.partial(), was)
	}
	r.expect(d, model)
	r.abandon()
	r.newHost()
	r.open(true)
	d = r.disk("d", testDisk)
	r.expect(d, model)
	r.scribble(d, model, 12)
	r.publish()
	if err := r.pool.needRuns(context.Background(), r.pool.runs.Partial()); err != nil {
		t.Fatal(err)
	}
	r.pool.retryMerges()
	if err := d.Tree().Compact(); err != nil {
		t.Fatal(err)
	}
	r.expect(d, model)
	if rep, err := r.pool.CheckUsage(t.Context()); err != nil || len(rep.Leaks)+len(rep.Low) > 0 {
		t.Errorf("recount: %+v, %v", rep, err)
	}
	r.close()
	r.open(false)
	if r.partial() != 0 {
		t.Errorf("%d runs are partial after a clean close of a pool that had all", r.partial())
	}
	r.expect(r.disk("d", testDisk), model)
}

// TestFarMapsAreStoredAgain publishes a checkpoint after a restart with partial runs, when the newest one on the
// targets does not name them: it must hold them itself.
func TestFarMapsAreStoredAgain(t *testing.T) {
	r, _, model := absentRig(t, nil)
	r.abandon()
	r.fs = r.fs.ProcessCrash()
	r.open(false)
	r.write(r.disk("d", testDisk), 0, model[:1])
	r.publish() // has claimed the pool
	p := r.pool
	p.mu.Lock()
	p.val.Checkpoints = nil
	p.mu.Unlock()
	if !p.pub.ckpt.old {
		t.Error("what a local checkpoint knew of the published one counts as certain")
	}
	was := p.epoch.Load()
	if err := p.publishCheckpoint(context.Background()); err != nil {
		t.Fatal(err)
	}
	s, err := p.readManifest(context.Background(), p.value().Checkpoints[0])
	if err != nil {
		t.Fatal(err)
	}
	for _, ref := range s.Disks[0].Runs {
		if ref.Epoch != was || ref.Partial || ref.File != 0 {
			t.Errorf("the checkpoint names %+v", ref)
		}
	}
	r.expect(r.disk("d", testDisk), model)
	r.abandon()
	r.newHost()
	r.open(true)
	r.expect(r.disk("d", testDisk), model)
}

// TestMapsGivenUpAreNotFetched has a tier with partial runs, one of them damaged, read all maps from the targets
// instead: what it had opened before is not waited for any more.
func TestMapsGivenUpAreNotFetched(t *testing.T) {
	r, _, model := absentRig(t, nil)
	r.abandon()
	files := r.runFiles()
	r.corrupt(files[len(files)-1], 40)
	r.open(false)
	p := r.pool
	mapped := map[*densetree.Run]bool{}
	p.mapsMu.Lock()
	v := p.mapsNow()
	p.mapsMu.Unlock()
	for _, run := range v.runs() {
		mapped[run] = true
	}
	v.release()
	for _, run := range p.runs.Partial() {
		if !mapped[run] {
			t.Errorf("run %d in file %d is to be fetched, and in no map", run.ID, run.File())
		}
	}
	r.expect(r.disk("d", testDisk), model)
}

// TestAPartThatIsAwayIsNotDamaged damages one copy of a part while another does not answer.
func TestAPartThatIsAwayIsNotDamaged(t *testing.T) {
	r, _, _ := absentRig(t, nil)
	ref := r.pool.value().Checkpoints[0]
	get := func() error {
		_, err := r.pool.getPart(context.Background(), ref.Epoch, ref.N, 0)
		return err
	}
	if err := get(); err != nil {
		t.Fatal(err)
	}
	hurt := -1
	for i, m := range r.memory {
		key := partKey(ref.Epoch, ref.N, 0, 0)
		if _, ok := m.Objects()[key]; ok {
			m.Damage(key, func(b []byte) []byte { b[partHeaderLen+1] ^= 1; return b })
			hurt = i
		}
	}
	for i := range r.stores {
		r.stores[i].SetOffline(i != hurt)
	}
	if err := get(); hurt < 0 || err == nil || final(err) {
		t.Errorf("one copy is damaged, the other away: %v", err)
	}
	r.offline(false)
	if err := get(); err != nil {
		t.Errorf("one copy is damaged, the other back: %v", err)
	}
}

// TestAGarbledPartIsNoDamage has the first answer hurt that each object gives, of the copies of parts, too, and expects all
// maps to be read nevertheless.
func TestAGarbledPartIsNoDamage(t *testing.T) {
	r, d, model := absentRig(t, nil)
	ref := r.pool.value().Checkpoints[0]
	for i, fault := range []backendtest.Fault{backendtest.Flipped, backendtest.Truncated, backendtest.Flipped} {
		r.stores[i].HurtOnce()
		r.stores[i].SetRates(backendtest.Rates{fault: 1})
	}
	if _, err := r.pool.getPart(t.Context(), ref.Epoch, ref.N, 0); err != nil {
		t.Error(err)
	}
	r.expect(d, model)
	for i, s := range r.stores {
		if n := s.Injected(); n[backendtest.Flipped]+n[backendtest.Truncated] == 0 {
			t.Errorf("target %d gave nothing that was hurt", i)
		}
		s.SetRates(nil)
	}
}

// TestFarMapsSurviveCrashes cuts the power, kills the process or loses the host at drawn calls while maps are
// fetched, in the background and by reads, and expects all that was written.
func TestFarMapsSurviveCrashes(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 9))
	r, d, model := absentRig(t, func(o *Options) {
		if rng.IntN(2) == 0 {
			o.mapRate = 1 << 30
		}
	})
	const crashes = 24
	partly := 0
	for round := range crashes {
		ctx, cancel := context.WithCancel(context.Background())
		r.fs.OnPowerCut(cancel)
		r.fs.CutAfter(1 + rng.IntN(80))
		part := make([]byte, testDisk/8)
		for range rng.IntN(6) {
			at := rng.IntN(testDisk - len(part))
			if err := d.Read(ctx, part, int64(at)); err == nil && !bytes.Equal(part, model[at:][:len(part)]) {
				t.Fatalf("round %d: wrong bytes at %d", round, at)
			}
		}
		if n := r.partial(); n > 0 {
			partly++
			go func() { _ = r.pool.needRuns(ctx, r.pool.runs.Partial()) }()
			if rng.IntN(2) == 0 {
				_ = r.pool.checkpointHere(ctx)
			}
		}
		r.fs.PowerCut()
		cancel()
		r.abandon()
		switch n := rng.IntN(8); {
		case n < 2:
			r.fs = r.fs.ProcessCrash()
		case n < 5:
			r.fs = r.fs.RebootKeep(rng.Uint64(), [...]crashtest.Keep{crashtest.KeepRandom, crashtest.KeepNone, crashtest.KeepSectors}[rng.IntN(3)])
		default:
			r.newHost()
		}
		r.open(true)
		d = r.disk("d", testDisk)
		if rng.IntN(3) == 0 {
			r.expect(d, model)
			r.scribble(d, model, 3)
			r.publish()
		}
	}
	r.expect(d, model)
	if err := r.pool.needRuns(context.Background(), r.pool.runs.Partial()); err != nil {
		t.Fatal(err)
	}
	r.pool.retryMerges()
	if err := d.Tree().Compact(); err != nil {
		t.Fatal(err)
	}
	r.expect(d, model)
	if partly < crashes/8 {
		t.Errorf("only %d of %d crashes with maps on their way", partly, crashes)
	}
}

// BenchmarkFreshOpen is claim and open, on a fresh host, of a pool with 1 TiB mapped, over directories with 30 ms
// per request; GRAINDISK_GRAINS maps fewer. Building it takes most of the time.
func BenchmarkFreshOpen(b *testing.B) {
	grains := 16 << 20
	if s := os.Getenv("GRAINDISK_GRAINS"); s != "" {
		if _, err := fmt.Sscan(s, &grains); err != nil {
			b.Fatal(err)
		}
	}
	line := backendtest.NewLine(0, 0)
	s := &fakeSite{tierDirs: b.TempDir(), opt: func(o *Options) { o.TierBytes, o.SlotBytes = 1<<30, 0 }}
	for i := range 3 {
		st, err := local.Open(filepath.Join(b.TempDir(), fmt.Sprint(i)), local.Options{Create: true})
		if err != nil {
			b.Fatal(err)
		}
		s.stores = append(s.stores, &counting{Store: backendtest.NewSlow(st, line)})
	}
	s.build(b, grains)
	line.Set(30*time.Millisecond, 0)
	all := map[string][]float64{}
	for b.Loop() {
		for unit, v := range s.measure(b, line) {
			all[unit] = append(all[unit], v)
		}
	}
	b.Logf("%v", all)
	for unit, vs := range all { // the median
		slices.Sort(vs)
		b.ReportMetric((vs[(len(vs)-1)/2]+vs[len(vs)/2])/2, unit)
	}
}

// measure opens the pool on a fresh host, looks grains up until all of the maps are here, and closes it.
func (s *fakeSite) measure(b *testing.B, line *backendtest.Line) map[string]float64 {
	line.Set(30*time.Millisecond, 0)
	got := map[string]float64{}
	var m0, m1 runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&m0)
	r0, b0 := s.counts()
	start := time.Now()
	p := s.open(b)
	got["open-s"] = time.Since(start).Seconds()
	r1, b1 := s.counts()
	got["requests"], got["MB"] = float64(r1-r0), float64(b1-b0)/1e6
	runtime.ReadMemStats(&m1)
	got["alloc-MB"], got["heap-MB"] = float64(m1.TotalAlloc-m0.TotalAlloc)/1e6, float64(int64(m1.HeapAlloc)-int64(m0.HeapAlloc))/1e6
	const lookups = 20
	begun := time.Now()
	checkFake(b, p, s.order, s.rng, lookups)
	got["lookup-ms"] = time.Since(begun).Seconds() * 1e3 / lookups
	for len(p.runs.Partial()) > 0 {
		time.Sleep(10 * time.Millisecond)
	}
	got["all-here-s"] = time.Since(start).Seconds()
	checkFake(b, p, s.order, s.rng, 1000)
	line.Set(0, 0)
	if err := p.Close(context.Background()); err != nil {
		b.Fatal(err)
	}
	return got
}
