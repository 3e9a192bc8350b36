package pool

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"graindisk/backend"
	"graindisk/backend/backendtest"
	"graindisk/block"
	"graindisk/grains/segment"
	"graindisk/internal/vfs"
	"graindisk/pool/root"
	"graindisk/vdisk"
)

// sixTargets gives a rig six stores, which it keeps over its lives, and profile 4+2.
func sixTargets(opt func(*Options)) (func(*Options), []*backendtest.Faulty) {
	more := make([]*backendtest.Faulty, 3)
	for i := range more {
		more[i] = backendtest.NewFaulty(backendtest.NewMemory(fmt.Sprintf("more%d", i)), uint64(i))
	}
	return func(o *Options) {
		for i, s := range more {
			o.Targets = append(o.Targets, Target{Name: fmt.Sprintf("t%d", 3+i), Store: s})
		}
		o.Data, o.Parity = 4, 2
		if opt != nil {
			opt(o)
		}
	}, more
}

// infos are the segments of the pool, by number.
func (r *rig) infos() map[block.SegmentID]segment.Info {
	r.pool.mu.Lock()
	defer r.pool.mu.Unlock()
	all := map[block.SegmentID]segment.Info{}
	for id, i := range r.pool.segments {
		all[id] = i
	}
	return all
}

func (r *rig) requests() (sum Requests) {
	for _, q := range r.pool.Requests() {
		sum = sum.plus(q)
	}
	return sum
}

// noLoan expects that no segment's memory is out.
func (r *rig) noLoan() {
	r.t.Helper()
	if st := r.pool.buffers.Stats(); st.Lent != 0 {
		r.t.Errorf("memory of segments: %+v", st)
	}
}

// TestASequentialGiBCostsFewRequests writes a stream to a pool of 4+2, scaled down by 16, and counts what
// the targets are asked, everything included, until it is published. The cuts come by themselves.
func TestASequentialGiBCostsFewRequests(t *testing.T) {
	const scale = 16
	const stream = (1 << 30) / scale
	six, _ := sixTargets(func(o *Options) {
		o.TierBytes, o.SlotBytes, o.SegmentBytes, o.CutBytes = 4*stream, 4<<20, 32<<20/scale, 512<<20/scale
	})
	r := newRig(t, six)
	d := r.disk("d", stream)
	r.publish() // the disk's creation
	before, byTarget := r.requests(), r.pool.Requests()
	puts := 0
	for _, s := range r.stores {
		puts += s.Counts()["put"]
	}
	p := make([]byte, 256<<10)
	for off := int64(0); off < stream; off += int64(len(p)) {
		for i := 0; i < len(p); i += 8 {
			p[i] = byte(rand.Uint32())
		}
		r.write(d, off, p)
	}
	r.publish()
	after := r.requests()
	if got := after.Total() - before.Total(); got > 210 {
		t.Errorf("%d requests for a GiB: %+v, before %+v", got, after, before)
	}
	// 32 segments of six shards; a cut that ends in a piece of one costs 1+2 more.
	if got := after.ShardPuts - before.ShardPuts; got < 32*6 || got > 32*6+2*3 || after.Root == before.Root {
		t.Errorf("%d shards stored for 32 segments of 6; %+v, before %+v", got, after, before)
	}
	var counted int64
	for i, q := range r.pool.Requests()[:len(r.stores)] {
		counted += q.ShardPuts - byTarget[i].ShardPuts + q.Root - byTarget[i].Root
	}
	for _, s := range r.stores {
		puts -= s.Counts()["put"]
	}
	if int64(-puts) != counted {
		t.Errorf("%d puts counted, the stores saw %d", counted, -puts)
	}
	r.noLoan()
}

// TestManyDisksShareOneSegment writes a little to 200 disks, several times over while cuts come by age:
// however many disks there are, a cut has one segment, and there is one cut in max_dirty_age.
func TestManyDisksShareOneSegment(t *testing.T) {
	const age = 300 * time.Millisecond
	r := newRig(t, func(o *Options) { o.SegmentBytes, o.TierBytes = 4<<20, 64<<20 })
	var disks []*vdisk.Disk
	for i := range 200 {
		disks = append(disks, r.disk(fmt.Sprintf("d%d", i), testDisk))
	}
	r.publish()
	r.pool.Close(t.Context())
	r.pool = nil
	r.opt = func(o *Options) { o.MaxDirtyAge, o.TierBytes = age, 64<<20 }
	r.open(false)
	for i := range disks {
		disks[i] = r.disk(fmt.Sprintf("d%d", i), testDisk)
	}
	cut, segments, start := r.pool.value().Cut, len(r.infos()), time.Now()
	for n := range uint64(4) {
		for _, d := range disks {
			r.write(d, int64(rand.IntN(testDisk/block.Size))*block.Size, bytes.Repeat([]byte{byte(n)}, block.Size))
		}
		for r.pool.value().Cut <= cut+n {
			time.Sleep(time.Millisecond)
		}
	}
	r.publish()
	cuts, partial := r.pool.value().Cut-cut, len(r.infos())-segments
	if most := uint64(time.Since(start)/age) + 2; cuts > most { // one by request
		t.Errorf("%d cuts in %v, want at most %d", cuts, time.Since(start), most)
	}
	if uint64(partial) > cuts {
		t.Errorf("%d segments in %d cuts of 200 disks that write little", partial, cuts)
	}
	r.noLoan()
}

// TestAMissingShardIsRecorded lets one target of six refuse one shard: the segment is stored without it,
// says so everywhere, and is read back by another host with a further target away.
func TestAMissingShardIsRecorded(t *testing.T) {
	six, more := sixTargets(func(o *Options) { o.SegmentBytes = 2 << 20 })
	r := newRig(t, six)
	model := make([]byte, 8<<20)
	d := r.disk("d", int64(len(model)))
	r.publish()
	const away = 1
	r.stores[away].Before = func(op, key string) error {
		if op == "put" && strings.HasPrefix(key, "seg/") {
			return &backend.Error{Op: op, Store: "t1", Key: key, Class: backend.Full}
		}
		return nil
	}
	for i := range model {
		model[i] = byte(rand.Uint32())
	}
	r.write(d, 0, model)
	r.publish()
	missing := 0
	for _, i := range r.infos() {
		for _, target := range i.Targets {
			if target == 0 {
				missing++
			}
		}
	}
	if s := r.pool.Status(); missing == 0 || s.SegmentsBelowStrength != missing {
		t.Fatalf("%d shards are missing, the status tells of %d weak segments of %d", missing, s.SegmentsBelowStrength, s.Segments)
	}
	// Every number from which a segment was packed is in use: nothing was packed twice.
	if got, want := len(r.infos()), int(r.pool.pub.nextSeg)-1; got != want {
		t.Errorf("%d segments, %d numbers used", got, want)
	}
	r.noLoan()
	for _, reopen := range []func(){func() { r.abandon(); r.open(false) }, func() { r.abandon(); r.newHost(); r.open(true) }} {
		reopen()
		if s := r.pool.Status(); s.SegmentsBelowStrength != missing {
			t.Errorf("%d weak segments after opening, want %d", s.SegmentsBelowStrength, missing)
		}
		more[0].SetOffline(true)
		r.expect(r.disk("d", int64(len(model))), model)
		more[0].SetOffline(false)
	}
}

// TestTooFewShardsAreNotEnough lets two targets of six refuse: then the segment is packed again for the
// four that live, with two to lose.
func TestTooFewShardsAreNotEnough(t *testing.T) {
	six, _ := sixTargets(func(o *Options) { o.SegmentBytes = 2 << 20 })
	r := newRig(t, six)
	d := r.disk("d", testDisk)
	r.publish()
	for _, i := range []int{0, 2} {
		r.stores[i].Before = func(op, key string) error {
			if op == "put" && strings.HasPrefix(key, "seg/") {
				return &backend.Error{Op: op, Key: key, Class: backend.Full}
			}
			return nil
		}
	}
	model := make([]byte, testDisk)
	for i := range model {
		model[i] = byte(rand.Uint32())
	}
	r.write(d, 0, model)
	r.publish()
	weak := 0 // made when only one of the two was known to be full
	for id, i := range r.infos() {
		if !strong(i) {
			t.Errorf("segment %d is stored on %v", id, i.Targets)
		}
		if belowStrength(i, 2) {
			weak++
		}
	}
	if s := r.pool.Status(); s.SegmentsBelowStrength != weak || weak == s.Segments {
		t.Errorf("the status tells of %d weak segments, they are %d of %d", s.SegmentsBelowStrength, weak, s.Segments)
	}
	r.noLoan()
	r.abandon()
	r.newHost()
	r.open(true)
	r.expect(r.disk("d", testDisk), model)
}

// TestStrong is the arithmetic of a segment that may stay as it was stored.
func TestStrong(t *testing.T) {
	for _, c := range []struct {
		k, m    uint8
		targets []block.TargetID
		want    bool
	}{
		{4, 2, []block.TargetID{1, 2, 3, 4, 5, 0}, true},
		{4, 2, []block.TargetID{1, 2, 3, 4, 0, 0}, false},
		{4, 2, []block.TargetID{1, 1, 2, 2, 3, 3}, true},
		{4, 2, []block.TargetID{1, 1, 2, 2, 3, 0}, false},
		{2, 1, []block.TargetID{1, 2, 0}, false},
		{1, 2, []block.TargetID{0, 2, 3}, true},
		{1, 0, []block.TargetID{1}, false},
	} {
		if got := strong(segment.Info{K: c.k, M: c.m, Targets: c.targets}); got != c.want {
			t.Errorf("%d+%d on %v: %v", c.k, c.m, c.targets, got)
		}
	}
}

// TestCompressedPools writes what packs well and what does not, with each codec in turn into one pool, and
// reads it all back on another host.
func TestCompressedPools(t *testing.T) {
	r := newRig(t, nil)
	model := make([]byte, testDisk)
	for round, c := range []segment.Codec{segment.CodecS2, segment.CodecZstd, segment.CodecNone} {
		r.abandon()
		r.opt = func(o *Options) { o.Compression = c }
		r.open(false)
		d := r.disk("d", testDisk)
		r.scribble(d, model, 10)
		text := []byte(strings.Repeat(fmt.Sprintf("round %d of text that packs well; ", round), 40000))[:1<<20]
		copy(model[round<<20:], text)
		before := len(r.infos())
		r.write(d, int64(round)<<20, text)
		r.publish()
		if n := len(r.infos()) - before; (n > 3) != (c == segment.CodecNone) { // segments of 256 KiB
			t.Errorf("%v: a cut of 1.2 MiB takes %d segments", c, n)
		}
		r.noLoan()
	}
	r.abandon()
	r.newHost()
	r.open(true)
	r.expect(r.disk("d", testDisk), model)
}

// TestTheNextCutIsStoredWhileTheRootWaits holds the root's commit back and expects the banks of the next
// cut at the targets, then the cuts in order, and never more than the bound in memory.
func TestTheNextCutIsStoredWhileTheRootWaits(t *testing.T) {
	r := newRig(t, nil)
	model := make([]byte, testDisk)
	d := r.disk("d", testDisk)
	r.publish()
	var hold atomic.Bool
	release := make(chan struct{})
	var mu sync.Mutex
	shards := 0
	stored := make(chan struct{}, 1)
	for _, s := range r.stores {
		s.Before = func(op, key string) error {
			if op == "put" && key == root.Key && hold.Load() {
				<-release
			}
			if op == "put" && strings.HasPrefix(key, "seg/") {
				mu.Lock()
				defer mu.Unlock()
				if shards++; shards == 3 { // the first cut's last segment is small: two shards
					stored <- struct{}{}
				}
			}
			return nil
		}
	}
	hold.Store(true)
	cut := r.pool.value().Cut
	r.write(d, 0, bytes.Repeat([]byte{1}, block.Size))
	copy(model, bytes.Repeat([]byte{1}, block.Size))
	first, second := make(chan error, 1), make(chan error, 1)
	go func() { first <- r.pool.Publish(context.Background()) }()
	for r.pool.log.Unfrozen().Bytes > 0 {
		time.Sleep(time.Millisecond)
	}
	fill := bytes.Repeat([]byte{2}, 3<<20)
	copy(model[1<<20:], fill)
	r.write(d, 1<<20, fill)
	go func() { second <- r.pool.Publish(context.Background()) }()
	<-stored // banks of the second cut, while the first waits for its root
	if got := r.pool.value().Cut; got != cut {
		t.Errorf("cut %d is committed though the root was held back", got)
	}
	close(release)
	hold.Store(false)
	if err := errors.Join(<-first, <-second); err != nil {
		t.Fatal(err)
	}
	if got := r.pool.value().Cut; got != cut+2 {
		t.Errorf("cut %d, want %d", got, cut+2)
	}
	seg := int64(256<<10) * 3 / 2
	if st := r.pool.buffers.Stats(); st.Lent != 0 || st.Peak > (banksMax+1)*(seg+3*(GrainBytes+64<<10+64<<10)) {
		t.Errorf("memory of segments: %+v", st)
	}
	r.abandon()
	r.newHost()
	r.open(true)
	r.expect(r.disk("d", testDisk), model)
}

// TestUploadsMakeWayForReads holds an upload while a read waits for its target, and lets it go when the
// read is done, or has waited for too long.
func TestUploadsMakeWayForReads(t *testing.T) {
	var f foreground
	f.yield(t.Context(), time.Hour) // nobody waits
	leave, leaveToo := f.enter(), f.enter()
	done := make(chan struct{})
	go func() { f.yield(context.Background(), time.Hour); close(done) }()
	leave()
	select {
	case <-done:
		t.Fatal("an upload goes on though a read waits")
	case <-time.After(20 * time.Millisecond):
	}
	leaveToo()
	<-done
	defer f.enter()()
	f.yield(t.Context(), time.Millisecond) // not for ever
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	f.yield(ended, time.Hour)
}

// scribbler is a target that changes the first shard it is given, in the giver's memory.
type scribbler struct {
	backend.Store
	done *atomic.Bool
}

func (s scribbler) Put(ctx context.Context, key string, body []byte, c backend.Cond) (string, error) {
	etag, err := s.Store.Put(ctx, key, body, c)
	if strings.HasPrefix(key, "seg/") && len(body) > 2*segment.HeaderBytes && !s.done.Swap(true) {
		body[segment.HeaderBytes+100] ^= 1
	}
	return etag, err
}

// TestWhatChangedInMemoryIsPackedAgain damages a sealed segment while it is stored: it is never announced.
func TestWhatChangedInMemoryIsPackedAgain(t *testing.T) {
	var done atomic.Bool
	r := newRig(t, func(o *Options) {
		for i := range o.Targets {
			o.Targets[i].Store = scribbler{o.Targets[i].Store, &done}
		}
	})
	model := make([]byte, testDisk)
	d := r.disk("d", testDisk)
	r.publish()
	done.Store(false)
	before, next := len(r.infos()), r.pool.pub.nextSeg
	r.write(d, 0, bytes.Repeat([]byte{7}, 64<<10))
	copy(model, bytes.Repeat([]byte{7}, 64<<10))
	r.publish()
	if stored, drawn := len(r.infos())-before, int(r.pool.pub.nextSeg-next); !done.Load() || stored != 1 || drawn != 2 {
		t.Errorf("%d segments announced of %d packed, want 1 of 2", stored, drawn)
	}
	r.noLoan()
	r.abandon()
	r.newHost()
	r.open(true)
	r.expect(r.disk("d", testDisk), model)
}

// slowFS holds back the making of slots.
type slowFS struct {
	vfs.FS
	hold    *atomic.Bool
	release chan struct{}
}

func (s slowFS) Create(name string) (vfs.File, error) {
	if s.hold.Load() && strings.Contains(name, "slot-") {
		<-s.release
	}
	return s.FS.Create(name)
}

// TestASlotBeingMadeIsNoReasonForASmallCut lets writers wait for a slot of a tier that has room.
func TestASlotBeingMadeIsNoReasonForASmallCut(t *testing.T) {
	slow := slowFS{hold: new(atomic.Bool), release: make(chan struct{})}
	r := newRig(t, func(o *Options) {
		slow.FS = o.FS
		o.FS, o.TierBytes = slow, 64<<20
	})
	d := r.disk("d", 16<<20)
	r.publish()
	slow.hold.Store(true)
	done := make(chan error, 1)
	go func() {
		done <- d.Write(context.Background(), []vdisk.Op{{Kind: vdisk.OpWrite, Len: 8 << 20, Data: make([]byte, 8<<20)}}, false)
	}()
	for !r.pool.log.Pressure().Waiting {
		time.Sleep(time.Millisecond)
	}
	for _, underWay := range []bool{false, true} {
		if r.pool.cutDue(underWay) {
			t.Errorf("a cut is due (under way %v) though the tier has room: %+v", underWay, r.pool.log.Pressure())
		}
	}
	slow.hold.Store(false)
	close(slow.release)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

// TestALocalCheckpointWaitsForTheCommitter holds a root back while the next cut is due with a local
// checkpoint: the maps would be those of neither cut.
func TestALocalCheckpointWaitsForTheCommitter(t *testing.T) {
	r := newRig(t, func(o *Options) { o.CheckpointBytes = 1 })
	d := r.disk("d", testDisk)
	r.publish()
	var hold atomic.Bool
	held, release := make(chan struct{}, 3), make(chan struct{})
	for _, s := range r.stores {
		s.Before = func(op, key string) error {
			if op == "put" && key == root.Key && hold.Load() {
				held <- struct{}{}
				<-release
			}
			return nil
		}
	}
	hold.Store(true)
	model := bytes.Repeat([]byte{1}, 2*block.Size)
	r.write(d, 0, model[:block.Size])
	errs := make(chan error, 2)
	go func() { errs <- r.pool.Publish(context.Background()) }()
	<-held
	r.write(d, block.Size, model[block.Size:])
	go func() { errs <- r.pool.Publish(context.Background()) }()
	for range 50 { // ample for the mistake, and no harm if it is too short
		if time.Sleep(time.Millisecond); r.pool.log.Unfrozen().Bytes == 0 {
			t.Error("frozen for a local checkpoint while a cut is being committed")
			break
		}
	}
	hold.Store(false)
	close(release)
	if err := errors.Join(<-errs, <-errs); err != nil {
		t.Fatal(err)
	}
	r.abandon()
	r.open(false)
	r.expect(r.disk("d", testDisk), model)
}
