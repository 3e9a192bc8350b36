package outage

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"graindisk/backend/backendtest/miniotest"
	"graindisk/block"
	"graindisk/frontend/nbd/nbdclient"
	"graindisk/test/harness"
)

func TestMain(m *testing.M) {
	code := m.Run()
	harness.Cleanup()
	os.Exit(code)
}

// The disk: a part that is read before the outage, one that is not, one for small durable writes, and one
// for as much as the log takes.
const (
	cachedAt, cachedBytes = 0, 8 << 20
	coldAt, coldBytes     = 16 << 20, 8 << 20
	smallAt, smallBytes   = 32 << 20, 32 << 20
	bulkAt, bulkBytes     = 64 << 20, 128 << 20
	diskBytes             = bulkAt + bulkBytes
)

const (
	outageTime = 30 * time.Second // GRAINDISK_SOAK, if longer than that, sets another
	beforeTime = 5 * time.Second
	fullAfter  = 10 * time.Second // a write that waits as long has met the log's mark
	bulkWrite  = 16 << 20
	fullLimit  = 6 * time.Minute
	healLimit  = 2 * time.Minute
	opLimit    = time.Minute // of what must not wait for a store
)

// TestStoreAwayUnderLoad takes all targets away while durable small writes, reads of what is cached and a
// read of what is not are under way; then, with the targets still away, fills the log to its mark. The
// latencies of small writes, before and during, are printed, not judged: that is for the benchmark.
func TestStoreAwayUnderLoad(t *testing.T) {
	outage := outageTime
	if s := os.Getenv("GRAINDISK_SOAK"); s != "" {
		d, err := time.ParseDuration(s)
		if err != nil {
			t.Fatal("GRAINDISK_SOAK:", err)
		}
		outage = max(outage, min(d, 10*time.Minute))
	}
	store := miniotest.Start(t)
	s := harness.NewSite(t, store, "2GiB", 2*time.Second, fmt.Sprintf("{name: d, size: %d}", diskBytes))
	g := harness.Serve(t, "--config", s.Config)
	prepare(t, g)
	harness.WaitPublished(t, "d", "--config", s.Config)
	if code := g.Stop(); code != 0 {
		t.Fatalf("exit %d", code)
	}
	if err := os.RemoveAll(s.Tier); err != nil { // so that nothing is cached
		t.Fatal(err)
	}
	g = harness.Serve(t, "--config", s.Config)
	c := newClients(t, g)
	c.check(cachedAt, cachedBytes, 1)

	before := c.writeFor(beforeTime)
	store.Pause(t)
	cold := c.coldRead()
	stop := make(chan struct{})
	var reads atomic.Int64
	var readers sync.WaitGroup
	readers.Go(func() { c.rereadUntil(stop, &reads) })
	during := c.writeFor(outage)
	close(stop)
	readers.Wait()
	t.Logf("COUNT %d durable writes before, %d in %v without stores, %d MiB of cached reads", len(before), len(during), outage, reads.Load())
	t.Logf("durable 4 KiB writes: before p50 %v p99 %v, without stores p50 %v p99 %v",
		quantile(before, 0.5), quantile(before, 0.99), quantile(during, 0.5), quantile(during, 0.99))
	if len(during) < 100 || reads.Load() == 0 {
		t.Errorf("%d writes and %d reads in %v without stores", len(during), reads.Load(), outage)
	}
	select {
	case <-cold:
		t.Error("a read of what is not cached ended without stores")
	default:
	}

	written, stuck := c.fillLog()
	t.Logf("COUNT %d MiB acknowledged until the log's mark", written>>20)
	c.within("a flush at the log's mark", func(ctx context.Context) error { return c.small.Flush(ctx) })
	c.within("a trim at the log's mark", func(ctx context.Context) error { return c.small.Trim(ctx, smallAt+smallBytes/2, 1<<20, false) })
	c.check(cachedAt, cachedBytes, 1)

	store.Resume(t)
	healed := time.After(healLimit)
	for what, ch := range map[string]<-chan struct{}{"the cold read": cold, "the write at the mark": stuck} {
		select {
		case <-ch:
		case <-healed:
			t.Fatalf("%s did not end %v after the stores came back", what, healLimit)
		}
	}
	harness.WaitPublished(t, "d", "--config", s.Config)
	c.check(coldAt, coldBytes, 1)
	c.checkSmall()
	if code := g.Stop(); code != 0 {
		t.Errorf("exit %d", code)
	}
}

// pattern is what round writes at off, a whole number of blocks.
func pattern(off int64, n int, round uint64) []byte {
	p := make([]byte, n)
	for i := 0; i < n; i += 8 {
		at := uint64(off) + uint64(i)
		binary.LittleEndian.PutUint64(p[i:], (at^round<<48)*0x9e3779b97f4a7c15)
	}
	return p
}

// prepare fills the parts that are read.
func prepare(t *testing.T, g *harness.Gateway) {
	t.Helper()
	c, err := nbdclient.Dial(t.Context(), g.URIs[0], nbdclient.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for off := int64(0); off < coldAt+coldBytes; off += 1 << 20 {
		if err := c.WriteAt(t.Context(), pattern(off, 1<<20, 1), off, false); err != nil {
			t.Fatal(err)
		}
	}
	if err := c.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// clients are connections of their own for what must not wait for each other.
type clients struct {
	t                       *testing.T
	small, cached, cold, it *nbdclient.Client
	rounds                  [smallBytes / block.Size]uint64 // last round written to each block of the small part
	round                   uint64
}

func newClients(t *testing.T, g *harness.Gateway) *clients {
	t.Helper()
	c := &clients{t: t}
	for _, p := range []**nbdclient.Client{&c.small, &c.cached, &c.cold, &c.it} {
		var err error
		if *p, err = nbdclient.Dial(t.Context(), g.URIs[0], nbdclient.Options{}); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = (*p).Close() })
	}
	return c
}

// check reads a part and compares it.
func (c *clients) check(at, n int64, round uint64) {
	c.t.Helper()
	p := make([]byte, 1<<20)
	for off := at; off < at+n; off += int64(len(p)) {
		c.within("a read", func(ctx context.Context) error { return c.cached.ReadAt(ctx, p, off) })
		if !bytes.Equal(p, pattern(off, len(p), round)) {
			c.t.Fatalf("other bytes at %d", off)
		}
	}
}

// writeFor sends durable 4 KiB writes, one at a time, and returns how long each took.
func (c *clients) writeFor(d time.Duration) []time.Duration {
	c.t.Helper()
	var took []time.Duration
	for began := time.Now(); time.Since(began) < d; {
		c.round++
		n := c.round * 7919 % (smallBytes / 2 / block.Size) // the other half is trimmed
		off := int64(smallAt + n*block.Size)
		start := time.Now()
		c.within("a durable write", func(ctx context.Context) error {
			return errors.Join(c.small.WriteAt(ctx, pattern(off, block.Size, c.round), off, false), c.small.Flush(ctx))
		})
		took = append(took, time.Since(start))
		c.rounds[n] = c.round
	}
	return took
}

func (c *clients) checkSmall() {
	c.t.Helper()
	p := make([]byte, block.Size)
	for n, round := range c.rounds {
		if round == 0 {
			continue
		}
		off := int64(smallAt + n*block.Size)
		if err := c.small.ReadAt(c.t.Context(), p, off); err != nil {
			c.t.Fatal(err)
		}
		if !bytes.Equal(p, pattern(off, len(p), round)) {
			c.t.Fatalf("other bytes at %d, round %d", off, round)
		}
	}
}

// coldRead starts a read of what no cache holds; the channel is closed when it has ended well.
func (c *clients) coldRead() <-chan struct{} {
	done := make(chan struct{})
	ctx := c.t.Context()
	go func() {
		defer close(done)
		p := make([]byte, 1<<20)
		if err := c.cold.ReadAt(ctx, p, coldAt); err != nil {
			c.t.Errorf("cold read: %v", err)
		} else if !bytes.Equal(p, pattern(coldAt, len(p), 1)) {
			c.t.Error("cold read: other bytes")
		}
	}()
	return done
}

// rereadUntil reads the cached part over and over, counting MiB.
func (c *clients) rereadUntil(stop <-chan struct{}, count *atomic.Int64) {
	ctx := c.t.Context()
	p := make([]byte, 1<<20)
	for off := int64(cachedAt); ; off = cachedAt + (off+1<<20-cachedAt)%cachedBytes {
		select {
		case <-stop:
			return
		case <-time.After(20 * time.Millisecond): // leave the processor to the writer
		}
		if err := c.cached.ReadAt(ctx, p, off); err != nil {
			c.t.Errorf("cached read: %v", err)
			return
		}
		if !bytes.Equal(p, pattern(off, len(p), 1)) {
			c.t.Errorf("cached read: other bytes at %d", off)
			return
		}
		count.Add(1)
	}
}

// fillLog writes until a write waits, and returns how much was acknowledged and what tells that the
// waiting write has ended well. The log slows writers down before it is full, so these are as large as can be.
func (c *clients) fillLog() (written int64, stuck <-chan struct{}) {
	c.t.Helper()
	ctx := c.t.Context()
	began := time.Now()
	for off := int64(0); ; off = (off + bulkWrite) % bulkBytes {
		done := make(chan struct{})
		go func() {
			defer close(done)
			if err := c.it.WriteAt(ctx, pattern(bulkAt+off, bulkWrite, 2), bulkAt+off, false); err != nil {
				c.t.Errorf("write while the log fills: %v", err)
			}
		}()
		select {
		case <-done:
			written += bulkWrite
		case <-time.After(fullAfter):
			return written, done
		}
		if c.t.Failed() || time.Since(began) > fullLimit {
			c.t.Fatalf("%d MiB written without stores, and no write waits", written>>20)
		}
	}
}

// within runs what must not wait for a store.
func (c *clients) within(what string, do func(context.Context) error) {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(c.t.Context(), opLimit)
	defer cancel()
	if err := do(ctx); err != nil {
		c.t.Fatalf("%s: %v", what, err)
	}
}

func quantile(d []time.Duration, q float64) time.Duration {
	if len(d) == 0 {
		return 0
	}
	d = slices.Sorted(slices.Values(d))
	return d[min(len(d)-1, int(q*float64(len(d))))]
}
