package pool

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"graindisk/backend"
	"graindisk/backend/backendtest"
	"graindisk/block"
	"graindisk/grains/segment"
	"graindisk/pool/root"
	"graindisk/vdisk"
)

// watchedStore counts what would change a store.
type watchedStore struct {
	backend.Store
	changes *atomic.Int64
}

func (w watchedStore) Put(ctx context.Context, key string, body []byte, c backend.Cond) (string, error) {
	w.changes.Add(1)
	return w.Store.Put(ctx, key, body, c)
}

func (w watchedStore) Delete(ctx context.Context, key string) error {
	w.changes.Add(1)
	return w.Store.Delete(ctx, key)
}

// tryView opens a view of the rig's pool, which ends with the test; none of its requests may be a change.
func (r *rig) tryView(opt ...func(*ViewOptions)) (*View, error) {
	o := ViewOptions{Name: "p", Patience: 50 * time.Millisecond}
	changes := new(atomic.Int64)
	for i, s := range r.stores {
		o.Targets = append(o.Targets, Target{Name: fmt.Sprintf("t%d", i), Store: watchedStore{s, changes}})
	}
	for _, f := range opt {
		f(&o)
	}
	v, err := OpenView(context.Background(), o)
	r.t.Cleanup(func() {
		if v != nil {
			v.Close()
		}
		if n := changes.Load(); n > 0 {
			r.t.Errorf("a view made %d puts or deletes", n)
		}
	})
	return v, err
}

func (r *rig) view(opt ...func(*ViewOptions)) *View {
	r.t.Helper()
	v, err := r.tryView(opt...)
	if err != nil {
		r.t.Fatal(err)
	}
	return v
}

func (r *rig) viewDisk(v *View, name string) *ViewDisk {
	r.t.Helper()
	d, err := v.Disk(context.Background(), name)
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(d.Close)
	return d
}

func minority(o *ViewOptions) { o.Minority = true }

// streamed is the disk by Stream, and what of it cannot be read, by block; it checks that parts follow each other.
func streamed(t testing.TB, d *ViewDisk) (image []byte, bad map[block.LBA]error) {
	t.Helper()
	bad = map[block.LBA]error{}
	err := d.Stream(context.Background(), func(p ViewPart) error {
		if p.Off != int64(len(image)) || p.Len <= 0 || p.Data != nil && int64(len(p.Data)) != p.Len || p.Data != nil && p.Err != nil {
			t.Fatalf("part of %d bytes (%d of data, %v) at %d after %d bytes", p.Len, len(p.Data), p.Err, p.Off, len(image))
		}
		if p.Data == nil {
			p.Data = make([]byte, p.Len)
		}
		if p.Err != nil {
			for at := p.Off; at < p.Off+p.Len; at += block.Size {
				bad[block.LBA(at/block.Size)] = p.Err
			}
		}
		image = append(image, p.Data...)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if int64(len(image)) != d.Info().SizeBytes {
		t.Fatalf("%d bytes of %d", len(image), d.Info().SizeBytes)
	}
	return image, bad
}

// expectView expects a disk of a view to hold want, by Stream and by reads here and there.
func expectView(t testing.TB, d *ViewDisk, want []byte) {
	t.Helper()
	got, bad := streamed(t, d)
	if len(bad) > 0 {
		t.Fatalf("%d blocks cannot be read: %v", len(bad), bad)
	}
	if !bytes.Equal(got, want) {
		for i := range got {
			if got[i] != want[i] {
				t.Fatalf("disk %s differs from byte %d on", d.Info().Name, i)
			}
		}
	}
	for range 10 {
		off := rand.IntN(len(want))
		p := bytes.Repeat([]byte{0xee}, 1+rand.IntN(min(100_000, len(want)-off)))
		if err := d.ReadAt(context.Background(), p, int64(off)); err != nil || !bytes.Equal(p, want[off:][:len(p)]) {
			t.Fatalf("disk %s: %d bytes at %d differ: %v", d.Info().Name, len(p), off, err)
		}
	}
}

// trim unmaps a random range of disk and model.
func (r *rig) trim(d *vdisk.Disk, model []byte) {
	r.t.Helper()
	off := rand.IntN(len(model)/block.Size) * block.Size
	n := min(1+rand.IntN(64), (len(model)-off)/block.Size) * block.Size
	if err := d.Write(context.Background(), []vdisk.Op{{Kind: vdisk.OpTrim, Off: int64(off), Len: int64(n)}}, false); err != nil {
		r.t.Fatal(err)
	}
	clear(model[off:][:n])
}

// TestViewShowsThePublishedCut writes and unmaps on two disks and expects a view, with each target away in turn, to
// show what was published, not what the log has beyond it.
func TestViewShowsThePublishedCut(t *testing.T) {
	r := newRig(t, func(o *Options) {
		o.CheckpointCuts, o.CheckpointBytes, o.tableRows, o.mapLevel0, o.mapRun = 5, 20<<10, 6, 60, 20
	})
	a, b := r.disk("a", testDisk), r.disk("b", testDisk/2)
	models := [][]byte{make([]byte, testDisk), make([]byte, testDisk/2)}
	work := func() {
		for range 3 {
			r.scribble(a, models[0], 4)
			r.trim(a, models[0])
			r.scribble(b, models[1], 2)
		}
	}
	degraded := 0
	for round := range 14 {
		work()
		r.publish()
		want := [][]byte{bytes.Clone(models[0]), bytes.Clone(models[1])}
		work()
		away := round % 4 // 3: none
		if away < 3 {
			r.stores[away].SetOffline(true)
		}
		v := r.view()
		if away < 3 {
			defer r.stores[away].SetOffline(false)
		}
		i := v.Info()
		if i.Cut != r.pool.value().Cut || i.Epoch != r.pool.epoch.Load() || !i.Quorum || !i.Committed || i.State != root.Held || i.OwnerName != "here" {
			t.Errorf("round %d: %+v, the pool is at cut %d", round, i, r.pool.value().Cut)
		}
		if age := time.Since(i.Time); len(v.cuts) > 0 && (age < -time.Minute || age > time.Minute) {
			t.Errorf("round %d: the cut is %v old", round, age)
		}
		if ds := v.Disks(); len(ds) != 2 || ds[0] != (ViewedDisk{"a", 1, testDisk}) || ds[1] != (ViewedDisk{"b", 2, testDisk / 2}) {
			t.Errorf("round %d: disks %v", round, ds)
		}
		da, db := r.viewDisk(v, "a"), r.viewDisk(v, "b")
		expectView(t, da, want[0])
		expectView(t, db, want[1])
		if n, err := db.Stored(); err != nil || n == 0 || n > testDisk/2 {
			t.Errorf("round %d: %d bytes stored, %v", round, n, err)
		}
		if away < 3 {
			r.stores[away].SetOffline(false)
			degraded += v.DegradedShards()
		} else if n := v.DegradedShards(); n > 0 {
			t.Errorf("round %d: %d shards count as degraded", round, n)
		}
		if _, err := v.Disk(t.Context(), "c"); !errors.Is(err, ErrNoDisk) {
			t.Errorf("no such disk: %v", err)
		}
		for _, at := range []int64{-1, testDisk - 1, testDisk} {
			if err := da.ReadAt(t.Context(), make([]byte, 2), at); !errors.Is(err, vdisk.ErrRange) {
				t.Errorf("read at %d: %v", at, err)
			}
		}
	}
	if degraded == 0 {
		t.Error("no shard ever counted as degraded though targets were away")
	}
	if len(r.pool.value().Checkpoints) != 2 {
		t.Errorf("%d checkpoints were published, want 2 at the end", len(r.pool.value().Checkpoints))
	}
}

// TestViewBesideAnOwner opens views while a pool goes on publishing: each shows one of its cuts, whole.
func TestViewBesideAnOwner(t *testing.T) {
	r := newRig(t, func(o *Options) { o.CheckpointCuts, o.CheckpointBytes = 2, 20<<10 })
	d, model := r.disk("d", testDisk), make([]byte, testDisk)
	r.scribble(d, model, 4)
	r.publish()
	was := map[uint64][]byte{r.pool.value().Cut: bytes.Clone(model)}
	var done atomic.Bool
	var wg sync.WaitGroup
	type sight struct {
		cut  uint64
		data []byte
	}
	var seen []sight
	wg.Go(func() {
		for first := true; first || !done.Load(); first = false {
			v, err := r.tryView()
			if err != nil {
				t.Error(err)
				return
			}
			vd, err := v.Disk(t.Context(), "d")
			if err != nil {
				t.Error(err)
				return
			}
			image, bad := streamed(t, vd)
			vd.Close()
			if len(bad) > 0 {
				t.Errorf("cut %d: %v", v.Info().Cut, bad)
			}
			seen = append(seen, sight{v.Info().Cut, image})
		}
	})
	for range 20 {
		r.scribble(d, model, 4)
		r.trim(d, model)
		r.publish()
		was[r.pool.value().Cut] = bytes.Clone(model)
	}
	done.Store(true)
	wg.Wait()
	for _, s := range seen {
		if want, ok := was[s.cut]; !ok || !bytes.Equal(s.data, want) {
			t.Errorf("a view of cut %d (known: %v) shows something else", s.cut, ok)
		}
	}
	if len(seen) == 0 {
		t.Error("no view was opened")
	}
}

// TestViewOfTooFewRoots leaves one of three targets, each of which holds everything.
func TestViewOfTooFewRoots(t *testing.T) {
	r := newRig(t, func(o *Options) { o.Data, o.Parity = 1, 2 })
	d, model := r.disk("d", testDisk), make([]byte, testDisk)
	r.scribble(d, model, 20)
	r.publish()
	r.abandon()
	for left := range r.stores {
		for i, s := range r.stores {
			s.SetOffline(i != left)
		}
		_, err := r.tryView()
		if !errors.Is(err, root.ErrNoQuorum) || !strings.Contains(err.Error(), "1 of 3 copies") || !strings.Contains(err.Error(), "--force-minority") {
			t.Errorf("target t%d alone: %v", left, err)
		}
		v := r.view(minority)
		if i := v.Info(); i.Quorum || i.Committed || i.Copies != 1 || i.Members != 3 || i.Cut == 0 {
			t.Errorf("target t%d alone: %+v", left, i)
		}
		expectView(t, r.viewDisk(v, "d"), model)
	}
	for _, s := range r.stores {
		s.SetOffline(true)
	}
	if _, err := r.tryView(minority); !errors.Is(err, root.ErrNoQuorum) {
		t.Errorf("no target at all: %v", err)
	}
	for _, s := range r.stores {
		s.SetOffline(false)
	}

	other := newRig(t, nil)
	mixed := func(o *ViewOptions) {
		o.Targets[1].Store, o.Targets[2].Store = other.stores[1], backendtest.NewMemory("empty")
	}
	for _, opt := range [][]func(*ViewOptions){{mixed}, {mixed, minority}} {
		if _, err := r.tryView(opt...); !errors.Is(err, root.ErrNoQuorum) || !strings.Contains(err.Error(), "2 pools") {
			t.Errorf("targets of two pools: %v", err)
		}
	}
	nothing := func(o *ViewOptions) {
		for i := range o.Targets {
			o.Targets[i].Store = backendtest.NewMemory("empty")
		}
	}
	if _, err := r.tryView(nothing); !errors.Is(err, ErrNoPool) {
		t.Errorf("empty targets: %v", err)
	}
}

// TestViewOfACommitUnderWay shows the newest value that any copy has, and says that it may not be committed.
func TestViewOfACommitUnderWay(t *testing.T) {
	r := newRig(t, nil)
	d, model := r.disk("d", testDisk), make([]byte, testDisk)
	r.scribble(d, model, 4)
	r.publish()
	old := map[int][]byte{}
	for i := 1; i < 3; i++ {
		old[i] = r.memory[i].Objects()[root.Key]
	}
	r.scribble(d, model, 4)
	r.publish()
	cut := r.pool.value().Cut
	r.abandon()
	for i, body := range old { // as if that commit had reached one target only
		c, err := root.Decode(body)
		if err != nil || c.Val.Cut >= cut {
			t.Fatalf("%+v, %v", c, err)
		}
		r.memory[i].Damage(root.Key, func([]byte) []byte { return body })
	}
	v := r.view()
	if i := v.Info(); i.Committed || !i.Quorum || i.Cut != cut {
		t.Errorf("%+v, want cut %d", i, cut)
	}
	expectView(t, r.viewDisk(v, "d"), model)
}

// lossOf damages every shard of a segment at one place and returns the blocks of disk that are lost by that.
func (r *rig) lossOf(disk block.DiskID, seg segment.Info) map[block.LBA]bool {
	r.t.Helper()
	x, err := r.pool.reader.Index(context.Background(), seg)
	if err != nil {
		r.t.Fatal(err)
	}
	e := x.Entries[rand.IntN(len(x.Entries))]
	at := segment.HeaderBytes + int(e.Offset) + rand.IntN(int(e.Stored))
	for i, t := range seg.Targets {
		if t != 0 {
			r.memory[t-1].Damage(seg.Key(i), func(b []byte) []byte { b[at] ^= []byte{1, 8, 0x80}[i]; return b }) // parity does not mend it
		}
	}
	hit := map[block.LBA]bool{}
	for _, e := range x.Entries { // the same place in every shard
		if from := segment.HeaderBytes + int(e.Offset); at >= from && at < from+int(e.Stored) && e.Disk == disk {
			for b := range e.Blocks {
				hit[e.LBA+block.LBA(b)] = true
			}
		}
	}
	return hit
}

// TestViewNamesWhatIsLost damages more than parity mends: exactly those ranges fail, the rest is right.
func TestViewNamesWhatIsLost(t *testing.T) {
	r := newRig(t, func(o *Options) { o.SegmentBytes = 2 << 20 })
	d, model := r.disk("d", testDisk), make([]byte, testDisk)
	for range 3 {
		r.scribble(d, model, 30)
		r.publish()
	}
	// Lay the disk down once more, in large segments.
	for off := 0; off < testDisk; off += 64 << 10 {
		p := model[off:][:64<<10]
		for i := range p {
			p[i] = byte(rand.Uint32())
		}
		r.write(d, int64(off), p)
	}
	r.publish()
	r.pool.mu.Lock()
	var all []segment.Info
	for _, info := range r.pool.segments {
		if info.K == 2 {
			all = append(all, info)
		}
	}
	r.pool.mu.Unlock()
	newest := slices.MaxFunc(all, func(a, b segment.Info) int { return int(a.ID) - int(b.ID) })
	lost := r.lossOf(1, newest)
	v := r.view()
	vd := r.viewDisk(v, "d")
	image, bad := streamed(t, vd)
	if len(lost) == 0 || len(bad) != len(lost) {
		t.Errorf("%d blocks are damaged, %d cannot be read", len(lost), len(bad))
	}
	for lba := range block.LBA(testDisk / block.Size) {
		want, got := model[lba*block.Size:][:block.Size], image[lba*block.Size:][:block.Size]
		switch err := bad[lba]; {
		case lost[lba] != (err != nil):
			t.Errorf("block %d: damaged %v, read %v", lba, lost[lba], err)
		case err != nil && (!errors.Is(err, vdisk.ErrDamaged) || errors.Is(err, ErrViewExpired)):
			t.Errorf("block %d: %v", lba, err)
		case err == nil && !bytes.Equal(got, want):
			t.Errorf("block %d differs", lba)
		}
	}
	for lba := range lost {
		if err := vd.ReadAt(t.Context(), make([]byte, 1), int64(lba)*block.Size); !errors.Is(err, vdisk.ErrDamaged) {
			t.Errorf("read of block %d: %v", lba, err)
		}
	}
}

// TestViewPastItsTime deletes a segment that a view needs: while the root is what it was, that is damage; once it went
// on, the view has expired. Never are there other bytes.
func TestViewPastItsTime(t *testing.T) {
	r := newRig(t, nil)
	d, model := r.disk("d", testDisk), make([]byte, testDisk)
	r.write(d, 0, bytes.Repeat([]byte("old"), 50_000))
	copy(model, bytes.Repeat([]byte("old"), 50_000))
	r.publish()
	v := r.view()
	vd := r.viewDisk(v, "d")
	expectView(t, vd, model)
	for _, m := range r.memory {
		for _, k := range m.Keys() {
			if strings.HasPrefix(k, "seg/") {
				if err := m.Delete(t.Context(), k); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	_, bad := streamed(t, vd)
	if len(bad) == 0 {
		t.Fatal("deleted segments are read")
	}
	for _, err := range bad {
		if !errors.Is(err, vdisk.ErrDamaged) || errors.Is(err, ErrViewExpired) {
			t.Fatalf("the root is the same: %v", err)
		}
	}
	r.write(d, 0, bytes.Repeat([]byte("new"), 50_000))
	r.publish()
	_, bad = streamed(t, vd)
	if len(bad) != (150_000+block.Size-1)/block.Size {
		t.Errorf("%d blocks cannot be read", len(bad))
	}
	for _, err := range bad {
		if !errors.Is(err, ErrViewExpired) || errors.Is(err, vdisk.ErrDamaged) || !strings.Contains(err.Error(), "start again") {
			t.Fatalf("the root went on: %v", err)
		}
	}
}

// TestViewTakesNoOtherCut has the root name another record than the one that is stored.
func TestViewTakesNoOtherCut(t *testing.T) {
	r := newRig(t, nil)
	d, model := r.disk("d", testDisk), make([]byte, testDisk)
	for range 3 {
		r.scribble(d, model, 2)
		r.publish()
	}
	crc := r.pool.value().Cuts[1].Segment.CRC
	r.edit(func(key string, _ []byte) bool { return key == root.Key }, func(b []byte) []byte {
		return resealRoot(bytes.Replace(b, fmt.Appendf(nil, `"crc":%d}`, crc), []byte(`"crc":1}`), 1))
	})
	if _, err := r.tryView(); !errors.Is(err, vdisk.ErrDamaged) || !strings.Contains(err.Error(), "does not fit the root") {
		t.Errorf("view: %v", err)
	}
}

func TestReadOnlyStoreRefusesChanges(t *testing.T) {
	m := backendtest.NewMemory("m")
	if _, err := m.Put(t.Context(), "a", []byte("x"), backend.Cond{}); err != nil {
		t.Fatal(err)
	}
	s := readOnlyStore{m}
	_, err := s.Put(t.Context(), "b", nil, backend.Cond{Absent: true})
	if derr := s.Delete(t.Context(), "a"); backend.ClassOf(err) != backend.Permanent || backend.ClassOf(derr) != backend.Permanent || len(m.Keys()) != 1 {
		t.Errorf("put: %v, delete: %v, left %v", err, derr, m.Keys())
	}
}

// TestViewWaitsNoLongerThanItsPatience takes all targets away from a view: that is no damage.
func TestViewWaitsNoLongerThanItsPatience(t *testing.T) {
	r := newRig(t, nil)
	d, model := r.disk("d", testDisk), make([]byte, testDisk)
	r.scribble(d, model, 4)
	r.write(d, 0, []byte("something"))
	r.publish()
	vd := r.viewDisk(r.view(), "d")
	for _, s := range r.stores {
		s.SetOffline(true)
	}
	err := vd.ReadAt(t.Context(), make([]byte, 1), 0)
	if err == nil || errors.Is(err, vdisk.ErrDamaged) || errors.Is(err, ErrViewExpired) {
		t.Errorf("without targets: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := vd.Stream(ctx, func(ViewPart) error { return nil }); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	stop := errors.New("enough")
	if err := vd.Stream(t.Context(), func(ViewPart) error { return stop }); !errors.Is(err, stop) {
		t.Errorf("stopped: %v", err)
	}
}

// TestInOrder expects results in order, no more of them than asked for at a time, and an end at the first error.
func TestInOrder(t *testing.T) {
	const n, atOnce = 200, 7
	var out, most atomic.Int64
	numbers := func(yield func(int) bool) {
		for i := range n {
			if !yield(i) {
				return
			}
		}
	}
	bad := errors.New("bad")
	for _, failAt := range []int{n, 50, 0} {
		for _, inUse := range []bool{false, true} {
			next := 0
			err := inOrder(t.Context(), numbers, atOnce, func(_ context.Context, i int) (int, error) {
				most.Store(max(most.Load(), out.Add(1)))
				time.Sleep(time.Duration(rand.IntN(200)) * time.Microsecond) // finish in another order
				if i == failAt && !inUse {
					return 0, bad
				}
				return i * i, nil
			}, func(i, sq int) error {
				if i != next || sq != i*i {
					t.Fatalf("%d² = %d came as number %d", i, sq, next)
				}
				next++
				if i == failAt && inUse {
					return bad
				}
				out.Add(-1)
				return nil
			})
			if (failAt < n) != errors.Is(err, bad) || failAt == n && next != n {
				t.Errorf("failing at %d: %v after %d", failAt, err, next)
			}
			out.Store(0)
		}
	}
	if most.Load() > atOnce {
		t.Errorf("%d results at a time, at most %d were asked for", most.Load(), atOnce)
	}
}
