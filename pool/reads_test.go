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
	"testing/synctest"
	"time"

	"graindisk/backend"
	"graindisk/vdisk"
)

// wire is what the targets of a pool have in common: one line of a certain bandwidth, and a latency for
// every request. It counts the reads of segments.
type wire struct {
	latency time.Duration
	rate    float64       // bytes per second
	line    chan struct{} // held while bytes pass
	owed    atomic.Int64  // nanoseconds of the line not slept yet

	reads, bytes, now, most atomic.Int64
}

func newWire(latency time.Duration, rate float64) *wire {
	return &wire{latency: latency, rate: rate, line: make(chan struct{}, 1)}
}

func (w *wire) reset() { w.reads.Store(0); w.bytes.Store(0); w.most.Store(0) }

// farStore is a target at the end of a wire.
type farStore struct {
	backend.Store
	w *wire
}

func (s farStore) ReadAt(ctx context.Context, key string, p []byte, off int64) error {
	w := s.w
	if !strings.HasPrefix(key, "seg/") || w.latency == 0 {
		return s.Store.ReadAt(ctx, key, p, off)
	}
	w.reads.Add(1)
	w.bytes.Add(int64(len(p)))
	now := w.now.Add(1)
	defer w.now.Add(-1)
	for most := w.most.Load(); now > most && !w.most.CompareAndSwap(most, now); most = w.most.Load() {
	}
	time.Sleep(w.latency)
	w.line <- struct{}{}
	// A timer is far coarser than one request; what it oversleeps is taken off the next.
	if owed := w.owed.Add(int64(float64(len(p)) / w.rate * 1e9)); owed > int64(2*time.Millisecond) {
		start := time.Now()
		time.Sleep(time.Duration(owed))
		w.owed.Add(-int64(time.Since(start)))
	}
	<-w.line
	return s.Store.ReadAt(ctx, key, p, off)
}

// farRig is a pool whose disk d of size bytes lies on targets behind a wire, and nothing of it on the tier.
func farRig(t testing.TB, w *wire, size int) (*rig, *vdisk.Disk, []byte) {
	t.Helper()
	latency := w.latency
	w.latency = 0
	r, d, model := storedRig(t, func(s backend.Store) backend.Store { return farStore{s, w} }, size)
	w.latency = latency
	return r, d, model
}

// storedRig is a pool whose disk d of size bytes lies on targets that wrap made, and nothing of it on the tier.
func storedRig(t testing.TB, wrap func(backend.Store) backend.Store, size int) (*rig, *vdisk.Disk, []byte) {
	t.Helper()
	r := newRigFor(t, func(o *Options) {
		o.TierBytes, o.SlotBytes, o.SegmentBytes = 256<<20, 4<<20, 32<<20
		for i := range o.Targets {
			o.Targets[i].Store = wrap(o.Targets[i].Store)
		}
	})
	d := r.disk("d", int64(size))
	model := make([]byte, size)
	rng := rand.New(rand.NewPCG(1, 2))
	for i := 0; i < size; i += 8 {
		model[i] = byte(rng.Uint32())
	}
	for off := 0; off < size; off += 1 << 20 {
		r.write(d, int64(off), model[off:][:1<<20])
	}
	r.publish()
	r.abandon()
	r.newHost()
	r.open(true)
	return r, r.disk("d", int64(size)), model
}

// stream reads the disk in order, size bytes at a time, and compares.
func stream(d *vdisk.Disk, model []byte, size int) error {
	p := make([]byte, size)
	for off := 0; off < len(model); off += size {
		ok, err := d.TryRead(p, int64(off))
		if err == nil && !ok {
			err = d.Read(context.Background(), p, int64(off))
		}
		if err != nil {
			return err
		}
		if !bytes.Equal(p, model[off:][:size]) {
			return fmt.Errorf("wrong bytes at %d", off)
		}
	}
	return nil
}

// TestAColdStreamKeepsTheStoreBusy reads 96 MiB over a store with 30 ms per request and 100 MB/s.
func TestAColdStreamKeepsTheStoreBusy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const size, rate = 96 << 20, 100e6
		w := newWire(30*time.Millisecond, rate)
		r, d, model := farRig(t, w, size)
		start := time.Now()
		if err := stream(d, model, 1<<20); err != nil {
			t.Fatal(err)
		}
		got := size / time.Since(start).Seconds() / rate
		st := r.pool.fetcher.Stats()
		t.Logf("%.0f %% of the store's bandwidth; %d requests of %.1f MiB, at most %d at a time; window %d KiB; %+v", 100*got,
			w.reads.Load(), float64(w.bytes.Load())/float64(w.reads.Load())/(1<<20), w.most.Load(), r.pool.AheadMax()>>10, st)
		if got < 0.8 {
			t.Errorf("%.0f %% of the store's bandwidth", 100*got)
		}
		if w.most.Load() < 4 || r.pool.AheadMax() < int64(rate*0.03) {
			t.Errorf("%d requests at a time, window %d", w.most.Load(), r.pool.AheadMax())
		}
		// Hedges alone may cost bytes twice.
		if extra := float64(w.bytes.Load())/size - 1; st.Fetched > size/GrainBytes*101/100 || extra > 0.06 || w.reads.Load() > 120 {
			t.Errorf("%.1f %% of the bytes were read twice, %d requests", 100*extra, w.reads.Load())
		}
	})
}

// TestRandomReadsReadNothingAhead counts the bytes that random reads of whole grains cost.
func TestRandomReadsReadNothingAhead(t *testing.T) {
	const size = 64 << 20
	w := newWire(time.Nanosecond, 1e12)
	r, d, model := farRig(t, w, size)
	p := make([]byte, GrainBytes)
	for _, g := range rand.New(rand.NewPCG(3, 4)).Perm(size / GrainBytes)[:300] {
		off := g * GrainBytes
		if err := d.Read(context.Background(), p, int64(off)); err != nil || !bytes.Equal(p, model[off:][:len(p)]) {
			t.Fatalf("grain %d: %v", g, err)
		}
	}
	r.pool.ahead.Wait()
	if st := r.pool.fetcher.Stats(); st.Ahead > 3 || st.Fetched > 303 {
		t.Errorf("300 grains read at random: %+v", st)
	}
}

// TestOneRequestPerRun reads 1 MiB that lies in one shard, with one grain of it cached, at once and by
// sixteen readers who come while the segment is being asked.
func TestOneRequestPerRun(t *testing.T) {
	w := newWire(time.Nanosecond, 1e12)
	_, d, model := farRig(t, w, 32<<20)
	p := make([]byte, 1<<20)
	read := func(off, n int) {
		t.Helper()
		if err := d.Read(context.Background(), p[:n], int64(off)); err != nil || !bytes.Equal(p[:n], model[off:][:n]) {
			t.Fatal(err)
		}
	}
	read(0, 4096)
	if n := w.reads.Load(); n != 2 { // the index, the grain
		t.Errorf("the first read of a segment made %d requests", n)
	}
	w.reset()
	read(4<<20+5*GrainBytes, 4096)
	read(4<<20, 1<<20) // the cached grain is read over: a gap of 64 KiB
	if n, b := w.reads.Load(), w.bytes.Load(); n != 2 || b != 1<<20+GrainBytes {
		t.Errorf("a grain, then the MiB around it: %d requests, %d bytes", n, b)
	}
	read(4<<20, 1<<20)
	if n := w.reads.Load(); n != 2 {
		t.Errorf("what was fetched was not kept: %d requests", n)
	}
}

// TestReadersOfOneMomentShareRequests has 16 readers ask for every other grain while the index of
// their segment is on its way.
func TestReadersOfOneMomentShareRequests(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWire(30*time.Millisecond, 1e12)
		_, d, model := farRig(t, w, 32<<20)
		var wg sync.WaitGroup
		for i := range 64 {
			wg.Go(func() {
				p := make([]byte, GrainBytes)
				off := (i%16)*2*GrainBytes + 1<<20
				if err := d.Read(context.Background(), p, int64(off)); err != nil || !bytes.Equal(p, model[off:][:len(p)]) {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		// One index; the first readers make up to four rounds, all others go together, read over what the first four have.
		if n, b := w.reads.Load(), w.bytes.Load(); n > 8 || b > 35*GrainBytes {
			t.Errorf("64 readers of 16 near grains made %d requests of %d bytes", n, b)
		}
	})
}

// TestAfterARestartAColdReadIsOneRequest reads one grain, restarts on the same tier, and reads another of
// the same segment.
func TestAfterARestartAColdReadIsOneRequest(t *testing.T) {
	w := newWire(time.Nanosecond, 1e12)
	r, d, model := farRig(t, w, 32<<20)
	p := make([]byte, 4096)
	read := func(off int) {
		t.Helper()
		if err := d.Read(context.Background(), p, int64(off)); err != nil || !bytes.Equal(p, model[off:][:len(p)]) {
			t.Fatal(err)
		}
	}
	read(0)
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if err := r.pool.Close(ctx); err != nil {
		t.Fatal(err)
	}
	r.open(false)
	r.pool.cache.WaitLoaded()
	d = r.disk("d", 32<<20)
	w.reset()
	read(8 << 20)
	if n := w.reads.Load(); n != 1 {
		t.Errorf("%d requests", n)
	}
	read(0)
	if n := w.reads.Load(); n != 1 {
		t.Errorf("what was cached before the restart cost %d requests", n-1)
	}
}

// TestADamagedExtentFailsAlone damages one place of every shard of a segment beyond repair and reads all.
func TestADamagedExtentFailsAlone(t *testing.T) {
	const size = 4 << 20
	w := newWire(time.Nanosecond, 1e12)
	r, d, model := farRig(t, w, size)
	for _, m := range r.memory {
		for key := range m.Objects() {
			if strings.HasPrefix(key, "seg/") {
				m.Damage(key, func(b []byte) []byte { b[4096+3*GrainBytes+99] ^= 1; return b })
			}
		}
	}
	p := make([]byte, size)
	good, bad := 0, 0
	err := d.ReadPieces(context.Background(), p, 0, func(parts []vdisk.Part) {
		for _, a := range parts {
			switch {
			case errors.Is(a.Err, vdisk.ErrDamaged):
				bad += a.To - a.From
			case a.Err != nil || !bytes.Equal(p[a.From:a.To], model[a.From:a.To]):
				t.Errorf("%d to %d: wrong bytes, or %v", a.From, a.To, a.Err)
			default:
				good += a.To - a.From
			}
		}
	})
	if err != nil || bad != 2*GrainBytes || good != size-bad { // one grain of each data shard
		t.Errorf("%d bytes good, %d damaged, of %d: %v", good, bad, size, err)
	}
	if err := d.Read(context.Background(), p, 0); !errors.Is(err, vdisk.ErrDamaged) {
		t.Errorf("a read of it all: %v", err)
	}
}

// BenchmarkColdStream reads 1 MiB at a time over a store with 30 ms per request and 200 MB/s; the figure
// to see is the share of that bandwidth.
func BenchmarkColdStream(b *testing.B) {
	const size, rate = 128 << 20, 200e6
	for b.Loop() {
		b.StopTimer()
		w := newWire(30*time.Millisecond, rate)
		r, d, model := farRig(b, w, size)
		b.StartTimer()
		start := time.Now()
		if err := stream(d, model, 1<<20); err != nil {
			b.Fatal(err)
		}
		b.ReportMetric(100*size/time.Since(start).Seconds()/rate, "%bandwidth")
		b.ReportMetric(float64(w.reads.Load())/(size>>20), "requests/MiB")
		b.ReportMetric(float64(w.most.Load()), "requests-at-a-time")
		b.StopTimer()
		r.abandon()
		b.StartTimer()
	}
	b.SetBytes(size)
}
