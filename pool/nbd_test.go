package pool

import (
	"bytes"
	"context"
	"errors"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"graindisk/backend"
	"graindisk/block"
	"graindisk/frontend/nbd"
	"graindisk/frontend/nbd/nbdclient"
	"graindisk/vdisk"
)

// only is the one export of a test.
type only struct{ nbd.Device }

func (only) List() []string { return []string{"d"} }
func (o only) Open(context.Context, string) (nbd.Device, func(), error) {
	return o.Device, func() {}, nil
}

// serveNBD serves a disk on a unix socket and returns a client.
func serveNBD(t testing.TB, d *vdisk.Disk) *nbdclient.Client {
	t.Helper()
	s, err := nbd.New(nbd.Options{Exports: only{d}})
	if err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- s.Serve(ctx, ln, nbd.ListenOptions{}) }()
	t.Cleanup(func() { stop(); <-served })
	c, err := nbdclient.Dial(ctx, nbd.URI(ln.Addr(), "d"), nbdclient.Options{Extended: true, Allocation: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// shutStore is a target whose segments cannot be read while it is shut.
type shutStore struct {
	backend.Store
	shut *atomic.Bool
	open chan struct{}
}

func (s shutStore) ReadAt(ctx context.Context, key string, p []byte, off int64) error {
	if strings.HasPrefix(key, "seg/") && s.shut.Load() {
		select {
		case <-s.open:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return s.Store.ReadAt(ctx, key, p, off)
}

// TestCachedChunksDoNotWaitForTheStore reads 16 grains of which 15 are on the tier: those are with the client
// before the store has answered, which it does only then.
func TestCachedChunksDoNotWaitForTheStore(t *testing.T) {
	const most, all = 15 * GrainBytes, 16 * GrainBytes
	s := shutStore{shut: new(atomic.Bool), open: make(chan struct{})}
	_, d, model := storedRig(t, func(b backend.Store) backend.Store { return shutStore{b, s.shut, s.open} }, 4<<20)
	ctx := context.Background()
	p := make([]byte, all)
	if err := d.Read(ctx, p[:most], 0); err != nil {
		t.Fatal(err)
	}
	s.shut.Store(true)
	if ok, err := d.TryRead(p, 0); ok || err != nil {
		t.Fatalf("all of it is there already: %v, %v", ok, err)
	}
	c := serveNBD(t, d)
	clear(p)
	got := 0
	err := c.ReadChunks(ctx, p, 0, false, func(a nbdclient.Chunk) {
		if got += a.To - a.From; got == most {
			if !bytes.Equal(p[:most], model[:most]) {
				t.Error("wrong bytes before the store answered")
			}
			close(s.open)
		}
	})
	if err != nil || got != all || !bytes.Equal(p, model[:all]) {
		t.Errorf("%d bytes: %v", got, err)
	}
}

// TestCacheCommandFillsTheTier asks over NBD for a range to be cached, shuts the store, and reads it; a block
// status of all tells no hole, and to cache a large empty disk costs nothing.
func TestCacheCommandFillsTheTier(t *testing.T) {
	const size = 3 << 20 // fits a slot: a fill that finds the next one not made yet is skipped
	s := shutStore{shut: new(atomic.Bool), open: make(chan struct{})}
	r, d, model := storedRig(t, func(b backend.Store) backend.Store { return shutStore{b, s.shut, s.open} }, size)
	ctx := context.Background()
	c := serveNBD(t, d)
	if err := c.Cache(ctx, 5000, size-6000); err != nil {
		t.Fatal(err)
	}
	s.shut.Store(true)
	p := make([]byte, size)
	if err := c.ReadAt(ctx, p, 0); err != nil || !bytes.Equal(p, model) {
		t.Errorf("read: %v", err)
	}
	if got, err := c.BlockStatus(ctx, 0, size, false); err != nil || len(got) != 1 || got[0] != (nbdclient.Status{Len: size}) {
		t.Errorf("status %v: %v", got, err)
	}
	close(s.open)
	empty := serveNBD(t, r.disk("empty", 1<<40))
	got, err := empty.BlockStatus(ctx, 0, 1<<40, false)
	if err := errors.Join(err, empty.Cache(ctx, 0, 1<<40)); err != nil || len(got) != 1 || got[0] != (nbdclient.Status{Len: 1 << 40, State: 3}) {
		t.Errorf("status of an empty disk %v: %v", got, err)
	}
}

// BenchmarkEarlyReturn reads 1 MiB of which 15 grains of 16 are on the tier and the last is 80 ms away; the
// figure to see is when the 15 are with the client.
func BenchmarkEarlyReturn(b *testing.B) {
	const size = 64 << 20
	ctx := context.Background()
	p := make([]byte, 1<<20)
	var early time.Duration
	var c *nbdclient.Client
	i := 0
	for b.Loop() {
		at := int64(i % 64 * 7 % 64 << 20) // far from the one before: no stream
		if i++; i%64 == 1 {
			b.StopTimer()
			w := newWire(80*time.Millisecond, 1e9)
			_, d, _ := farRig(b, w, size)
			w.latency = 0
			for m := range int64(64) {
				if err := d.Read(ctx, p[:15*GrainBytes], m*11%64<<20); err != nil {
					b.Fatal(err)
				}
			}
			w.latency = 80 * time.Millisecond
			c = serveNBD(b, d)
			b.StartTimer()
		}
		start, got := time.Now(), 0
		err := c.ReadChunks(ctx, p, at, false, func(a nbdclient.Chunk) {
			if got += a.To - a.From; got == 15*GrainBytes {
				early += time.Since(start)
			}
		})
		if err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(early.Microseconds())/1000/float64(b.N), "ms-to-94%")
}

// TestStatusHasADamagedMapMended damages every run of a map between two looks at what the disk is made of,
// which agree; where the map cannot be had again, the status is an error, and never a hole.
func TestStatusHasADamagedMapMended(t *testing.T) {
	r, d, model := mappedRig(t)
	ctx := context.Background()
	want, err := d.Status(ctx, 0, testDisk, testDisk)
	if err != nil || len(want) < 5 {
		t.Fatalf("status %v: %v", want, err)
	}
	r.close()
	r.open(false) // with no page in memory
	d = r.disk("d", testDisk)
	for _, f := range r.runFiles() {
		r.corrupt(f, block.Size+30)
	}
	for _, s := range r.stores {
		s.SetOffline(true)
	}
	short, cancel := context.WithTimeout(ctx, 50*time.Millisecond)
	defer cancel()
	at := 0
	got, err := d.Status(short, 0, testDisk, testDisk)
	for i, e := range got { // what is told without the targets is right
		if e.Hole != want[i].Hole || e.Len > want[i].Len || e.Len < want[i].Len && i < len(got)-1 {
			t.Errorf("without the targets: extent %d of %v", i, got)
		}
		at += int(e.Len)
	}
	if at == testDisk || err != nil && len(got) > 0 {
		t.Errorf("without the targets: %d of %d bytes, %v", at, testDisk, err)
	}
	for _, s := range r.stores {
		s.SetOffline(false)
	}
	if got, err = d.Status(ctx, 0, testDisk, testDisk); err != nil || !slices.Equal(got, want) {
		t.Errorf("status %v, %v\nwant %v", got, err, want)
	}
	r.expect(d, model)
}
