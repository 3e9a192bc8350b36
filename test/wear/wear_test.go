package wear

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
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

const (
	diskBytes = 256 << 20
	tierBytes = 512 << 20 // eight slots, the least there is
	fillBytes = tierBytes + tierBytes/4
	bigBytes  = 256 << 20
	smalls    = 16 << 10 // 64 MiB
)

// TestBytesWrittenPerByte fills the tier once, so that no slot is new, and then counts what the gateway
// writes for large writes, and for small ones with a flush after each. The targets are in another
// process. Everything counts: headers, metadata, checkpoints and whatever the cache admits.
func TestBytesWrittenPerByte(t *testing.T) {
	store := miniotest.Start(t)
	s := harness.NewSite(t, store, fmt.Sprint(tierBytes), time.Second, fmt.Sprintf("{name: d, size: %d}", diskBytes))
	g := harness.Serve(t, "--config", s.Config)
	c, err := nbdclient.Dial(t.Context(), g.URIs[0], nbdclient.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	w := writer{t: t, c: c, rng: rand.NewChaCha8([32]byte{1}), buf: make([]byte, 1<<20)}
	w.write(fillBytes, 1<<20)
	harness.WaitPublished(t, "d", "--config", s.Config)

	for _, x := range []struct {
		name  string
		most  float64
		bytes int64
		run   func()
	}{
		{"64 KiB writes", 1.15, bigBytes, func() { w.write(bigBytes, 64<<10) }},
		{"4 KiB writes, each flushed", 2.2, smalls * block.Size, w.writeFlushed},
	} {
		before := g.WrittenBytes()
		x.run()
		harness.WaitPublished(t, "d", "--config", s.Config)
		ratio := float64(g.WrittenBytes()-before) / float64(x.bytes)
		t.Logf("COUNT %s: %.3f bytes written per byte", x.name, ratio)
		if ratio > x.most {
			t.Errorf("%s: %.3f bytes written per byte, at most %.2f are allowed", x.name, ratio, x.most)
		}
	}
}

type writer struct {
	t   *testing.T
	c   *nbdclient.Client
	rng *rand.ChaCha8
	buf []byte
	at  int64
}

// write sends n bytes in writes of size, one after the other over the disk.
func (w *writer) write(n int64, size int) {
	w.t.Helper()
	for range n / int64(size) {
		p := w.buf[:size]
		_, _ = w.rng.Read(p) // never fails
		if err := w.c.WriteAt(context.Background(), p, w.at, false); err != nil {
			w.t.Fatal(err)
		}
		w.at = (w.at + int64(size)) % diskBytes
	}
}

// writeFlushed sends blocks at random, each with a flush.
func (w *writer) writeFlushed() {
	w.t.Helper()
	for range smalls {
		p := w.buf[:block.Size]
		_, _ = w.rng.Read(p) // never fails
		off := int64(w.rng.Uint64()%(diskBytes/block.Size)) * block.Size
		if err := w.c.WriteAt(context.Background(), p, off, false); err != nil {
			w.t.Fatal(err)
		}
		if err := w.c.Flush(context.Background()); err != nil {
			w.t.Fatal(err)
		}
	}
}
