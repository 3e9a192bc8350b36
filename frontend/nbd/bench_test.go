package nbd

import (
	"bytes"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"

	"graindisk/frontend/nbd/nbdclient"
	"graindisk/frontend/nbd/proto"
)

// BenchmarkDepth moves blocks between our client and a disk in memory over a unix socket, with
// depth requests under way on one connection.
func BenchmarkDepth(b *testing.B) {
	for _, size := range []int{4 << 10, 1 << 20} {
		for _, depth := range []int{1, 32} {
			for _, op := range []string{"read", "write"} {
				b.Run(fmt.Sprintf("%s/io=%dKiB/depth=%d", op, size>>10, depth), func(b *testing.B) {
					benchDepth(b, op, size, depth)
				})
			}
		}
	}
}

func benchDepth(b *testing.B, op string, size, depth int) {
	d := newMemDevice(64 << 20)
	dir, err := os.MkdirTemp("", "nbd")
	if err != nil {
		b.Fatal(err)
	}
	defer func() { _ = os.RemoveAll(dir) }()
	ln, err := net.Listen("unix", filepath.Join(dir, "s"))
	if err != nil {
		b.Fatal(err)
	}
	s, err := New(Options{Exports: oneExport(d)})
	if err != nil {
		b.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- s.Serve(bg, ln, ListenOptions{}) }()
	c, err := nbdclient.Dial(bg, URI(ln.Addr(), ""), nbdclient.Options{})
	if err != nil {
		b.Fatal(err)
	}
	b.SetBytes(int64(size))
	b.ResetTimer()
	var wg sync.WaitGroup
	var next atomic.Int64
	for range depth {
		wg.Go(func() {
			p := make([]byte, size)
			for {
				i := next.Add(1)
				if i > int64(b.N) {
					return
				}
				off := i * 7919 * 4096 % int64(64<<20-size)
				var err error
				if op == "read" {
					err = c.ReadAt(bg, p, off)
				} else {
					err = c.WriteAt(bg, p, off, false)
				}
				if err != nil {
					b.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	b.StopTimer()
	if op == "write" {
		b.ReportMetric(float64(d.ops.Load())/float64(d.writes.Load()), "ops/batch")
	}
	_ = c.Close()
	if err := s.Shutdown(bg); err != nil {
		b.Error(err)
	}
	<-served
}

// BenchmarkCachedReads is what the server alone costs per cached READ, without a socket.
func BenchmarkCachedReads(b *testing.B) {
	for style, name := range []string{"simple", "structured", "extended"} {
		b.Run(name, func(b *testing.B) {
			s, err := New(Options{Exports: oneExport(newMemDevice(64 << 10))})
			if err != nil {
				b.Fatal(err)
			}
			request := request28(proto.CmdRead, 0, 1, 4096, 512)
			if style == styleExtended {
				request = request32(proto.CmdRead, 0, 1, 4096, 512)
			}
			ask := []string{``, option(b, `00000008`, ``), option(b, `0000000b`, ``)}[style]
			l := &loopConn{request: request, n: b.N}
			l.in = bytes.NewReader(unhex(b, `00000003`+ask+`"IHAVEOPT" 00000007 0000000a 00000004 "disk" 0000`))
			b.ReportAllocs()
			newConn(bg, s, l, ListenOptions{}).serve()
		})
	}
}
