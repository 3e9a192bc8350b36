package nbdclient

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"strings"
	"testing"

	"go.uber.org/goleak"

	"graindisk/frontend/nbd/proto"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var bg = context.Background()

func TestParseURI(t *testing.T) {
	tests := []struct{ uri, network, address, export string }{
		{"nbd://host:99/name", "tcp", "host:99", "name"},
		{"nbd://host", "tcp", "host:10809", ""},
		{"nbd://[::1]/a@b", "tcp", "[::1]:10809", "a@b"},
		{"nbd+unix:///demo?socket=/srv/d/nbd.sock", "unix", "/srv/d/nbd.sock", "demo"},
		{"nbd+unix:///?socket=/a%20b", "unix", "/a b", ""},
		{"nbd+unix:///demo", "", "", ""},
		{"nbds://host/name", "tcp", "host:10809", "name"},
		{"nbds+unix:///demo?socket=/s", "unix", "/s", "demo"},
		{"nbdx://host/name", "", "", ""},
		{"http://host", "", "", ""},
		{"%", "", "", ""},
	}
	for _, tt := range tests {
		network, address, export, secure, err := parseURI(tt.uri)
		if network != tt.network || address != tt.address || export != tt.export || (err != nil) != (tt.network == "") ||
			secure != strings.HasPrefix(tt.uri, "nbds") {
			t.Errorf("%s: %s %s %q %v", tt.uri, network, address, export, err)
		}
	}
}

func TestTheKernelGetsNoTLS(t *testing.T) {
	if _, _, err := Negotiate(bg, "nbds://127.0.0.1:1/x"); err == nil || !strings.Contains(err.Error(), "no TLS") {
		t.Error(err)
	}
}

// peer plays a server by hand over a pipe.
type peer struct {
	t *testing.T
	net.Conn
}

// be is the big-endian encoding of its parts: unsigned integers, and strings as they are.
func be(parts ...any) []byte {
	var b bytes.Buffer
	for _, p := range parts {
		if s, ok := p.(string); ok {
			b.WriteString(s)
		} else if err := binary.Write(&b, binary.BigEndian, p); err != nil {
			panic(err)
		}
	}
	return b.Bytes()
}

func (p peer) send(parts ...any) {
	if _, err := p.Write(be(parts...)); err != nil {
		p.t.Errorf("send: %v", err)
	}
}

func (p peer) expect(parts ...any) {
	want := be(parts...)
	got := make([]byte, len(want))
	if n, err := io.ReadFull(p, got); err != nil || !bytes.Equal(got, want) {
		p.t.Errorf("got %x and %v, want %x", got[:n], err, want)
	}
}

func (p peer) greet() {
	p.send("NBDMAGIC", "IHAVEOPT", uint16(3))
	p.expect(uint32(3))
}

const optReply = uint64(0x0003e889045565a9)

// serveGo answers STRUCTURED_REPLY and GO of a disk of 1 MiB.
func (p peer) serveGo() {
	p.greet()
	p.expect("IHAVEOPT", uint32(8), uint32(0))
	p.send(optReply, uint32(8), uint32(1), uint32(0))
	p.expect("IHAVEOPT", uint32(7), uint32(16), uint32(4), "disk", uint16(3), uint16(1), uint16(2), uint16(3))
	p.send(optReply, uint32(7), uint32(3), uint32(12), uint16(0), uint64(1<<20), uint16(0x1ed))
	p.send(optReply, uint32(7), uint32(3), uint32(4), uint16(77), "??") // unknown information
	p.send(optReply, uint32(7), uint32(3), uint32(14), uint16(3), uint32(1), uint32(4096), uint32(1<<25))
	p.send(optReply, uint32(7), uint32(1), uint32(0))
}

// withServer runs serve against a new client and returns the client.
func withServer(t *testing.T, serve func(p peer)) (*Client, error) {
	return withServerFor(t, Options{}, serve)
}

func withServerFor(t *testing.T, o Options, serve func(p peer)) (*Client, error) {
	a, b := net.Pipe()
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer func() { _ = b.Close() }()
		serve(peer{t, b})
	}()
	c, err := New(bg, a, "disk", o)
	t.Cleanup(func() {
		if c != nil {
			_ = c.Close()
		}
		<-done
	})
	return c, err
}

func TestHandshakeFailures(t *testing.T) {
	tests := []struct {
		name  string
		serve func(p peer)
		want  string
	}{
		{"not a server", func(p peer) { p.send("HTTP/1.1 400 Bad Request\r\n") }, "not a fixed newstyle"},
		{"old style", func(p peer) { p.send("NBDMAGIC", uint64(0x00420281861253), uint16(0)) }, "not a fixed newstyle"},
		{"hangs up", func(p peer) { p.send("NBDM") }, "unexpected EOF"},
		{"no such export", func(p peer) {
			p.greet()
			p.expect("IHAVEOPT", uint32(8), uint32(0))
			p.send(optReply, uint32(8), uint32(0x80000001), uint32(0))
			p.expect("IHAVEOPT", uint32(7), uint32(16), uint32(4), "disk", uint16(3), uint16(1), uint16(2), uint16(3))
			p.send(optReply, uint32(7), uint32(0x80000006), uint32(2), "no")
		}, "no such export"},
		{"policy", func(p peer) {
			p.greet()
			p.expect("IHAVEOPT", uint32(8), uint32(0))
			p.send(optReply, uint32(8), uint32(0x80000002), uint32(8), "not you!")
		}, "not you!"},
		{"an endless reply", func(p peer) {
			p.greet()
			p.expect("IHAVEOPT", uint32(8), uint32(0))
			p.send(optReply, uint32(8), uint32(1), uint32(1<<31))
		}, "malformed reply"},
		{"an answer to something else", func(p peer) {
			p.greet()
			p.expect("IHAVEOPT", uint32(8), uint32(0))
			p.send(optReply, uint32(3), uint32(1), uint32(0))
		}, "malformed reply"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if _, err := withServer(t, tt.serve); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %v, want %s", err, tt.want)
			}
		})
	}
}

// expectRequest takes a request header and returns its cookie.
func (p peer) expectRequest(cmd, flags uint16, off uint64, n uint32) (cookie uint64) {
	h := make([]byte, 28)
	if _, err := io.ReadFull(p, h); err != nil {
		p.t.Errorf("request: %v", err)
	}
	cookie = binary.BigEndian.Uint64(h[8:])
	if want := be(uint32(0x25609513), flags, cmd, cookie, off, n); !bytes.Equal(h, want) {
		p.t.Errorf("request %x, want %x", h, want)
	}
	return cookie
}

const (
	simple = uint32(0x67446698)
	chunk  = uint32(0x668e33ef)
)

func TestReadFromPieces(t *testing.T) {
	c, err := withServer(t, func(p peer) {
		p.serveGo()
		k := p.expectRequest(0, 0, 100, 10)
		p.send(chunk, uint16(0), uint16(1), k, uint32(8+3), uint64(107), "xyz")
		p.send(chunk, uint16(0), uint16(2), k, uint32(12), uint64(103), uint32(4)) // hole
		p.send(chunk, uint16(0), uint16(1), k, uint32(8+3), uint64(100), "abc")
		p.send(chunk, uint16(1), uint16(0), k, uint32(0))
		k = p.expectRequest(0, 0, 0, 4)
		p.send(chunk, uint16(0), uint16(1), k, uint32(8+2), uint64(0), "ab")
		p.send(chunk, uint16(1), uint16(0x8002), k, uint32(14), uint32(5), uint16(0), uint64(2))
		k = p.expectRequest(4, 1, 4096, 8192)
		p.send(simple, uint32(28), k)
		p.expectRequest(2, 0, 0, 0)
	})
	if err != nil {
		t.Fatal(err)
	}
	if i := c.Info(); i.Size != 1<<20 || !i.Structured || i.BlockPreferred != 4096 || i.PayloadMax != 1<<25 || i.Flags != 0x1ed {
		t.Errorf("info %+v", i)
	}
	got := bytes.Repeat([]byte{'?'}, 10)
	if err := c.ReadAt(bg, got, 100); err != nil || string(got) != "abc\x00\x00\x00\x00xyz" {
		t.Errorf("read %q, %v", got, err)
	}
	if err := c.ReadAt(bg, got[:4], 0); !errors.Is(err, proto.EIO) {
		t.Errorf("damaged read: %v", err)
	}
	if err := c.Trim(bg, 4096, 8192, true); !errors.Is(err, proto.ENOSPC) {
		t.Errorf("trim: %v", err)
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	if err := c.Flush(bg); !errors.Is(err, ErrClosed) {
		t.Errorf("flush after close: %v", err)
	}
}

func TestBrokenReplies(t *testing.T) {
	tests := []struct {
		name  string
		reply func(p peer, k uint64)
		want  string
	}{
		{"unknown cookie", func(p peer, k uint64) { p.send(simple, uint32(0), k+1) }, "unknown cookie"},
		{"bad magic", func(p peer, k uint64) { p.send(uint32(1), uint32(0), k) }, "bad reply magic"},
		{"too little data", func(p peer, k uint64) {
			p.send(chunk, uint16(1), uint16(1), k, uint32(8+3), uint64(100), "abc")
		}, "3 bytes of 10"},
		{"data before the request", func(p peer, k uint64) {
			p.send(chunk, uint16(1), uint16(1), k, uint32(8+3), uint64(99))
		}, "outside"},
		{"data after the request", func(p peer, k uint64) {
			p.send(chunk, uint16(1), uint16(1), k, uint32(8+3), uint64(108))
		}, "outside"},
		{"a huge chunk", func(p peer, k uint64) {
			p.send(chunk, uint16(1), uint16(1), k, ^uint32(0), uint64(100))
		}, "outside"},
		{"a huge hole", func(p peer, k uint64) {
			p.send(chunk, uint16(1), uint16(2), k, uint32(12), uint64(100), ^uint32(0))
		}, "outside"},
		{"a huge error", func(p peer, k uint64) { p.send(chunk, uint16(1), uint16(0x8001), k, ^uint32(0)) }, "unexpected reply chunk"},
		{"unknown chunk", func(p peer, k uint64) { p.send(chunk, uint16(1), uint16(5), k, uint32(12)) }, "unexpected reply chunk"},
		{"end of stream", func(peer, uint64) {}, "server closed the connection"},
		{"end within a reply", func(p peer, k uint64) { p.send(simple, uint32(0), k, "abc") }, "unexpected EOF"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			c, err := withServer(t, func(p peer) {
				p.serveGo()
				tt.reply(p, p.expectRequest(0, 0, 100, 10))
			})
			if err != nil {
				t.Fatal(err)
			}
			if err := c.ReadAt(bg, make([]byte, 10), 100); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %v, want %s", err, tt.want)
			}
			if err := c.Flush(bg); err == nil {
				t.Error("the connection still works")
			}
		})
	}
}

// TestContextEndsRequest cancels a request the server never answers.
func TestContextEndsRequest(t *testing.T) {
	ctx, cancel := context.WithCancel(bg)
	c, err := withServer(t, func(p peer) {
		p.serveGo()
		p.expectRequest(3, 0, 0, 0)
		cancel()
		_, _ = p.Read(make([]byte, 1)) // until the client breaks off
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Flush(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("flush: %v", err)
	}
	if err := c.ReadAt(bg, make([]byte, 1), -1); !errors.Is(err, proto.EINVAL) {
		t.Errorf("negative offset: %v", err)
	}
}

// TestDialContext cancels a dial whose server says nothing.
func TestDialContext(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = ln.Close() }()
	ctx, cancel := context.WithCancel(bg)
	go func() {
		sock, err := ln.Accept()
		cancel()
		if err == nil {
			_, _ = sock.Read(make([]byte, 1))
			_ = sock.Close()
		}
	}()
	if _, err := Dial(ctx, "nbd://"+ln.Addr().String()+"/x", Options{}); !errors.Is(err, context.Canceled) {
		t.Errorf("dial: %v", err)
	}
}

// FuzzReplies feeds arbitrary bytes to a client that waits for a read.
func FuzzReplies(f *testing.F) {
	f.Add(be(simple, uint32(0), uint64(1), "0123456789"))
	f.Add(be(chunk, uint16(0), uint16(1), uint64(1), uint32(8+3), uint64(107), "xyz", chunk, uint16(1), uint16(0), uint64(1), uint32(0)))
	f.Add(be(chunk, uint16(0), uint16(2), uint64(1), uint32(12), uint64(100), uint32(10), chunk, uint16(1), uint16(0), uint64(1), uint32(0)))
	f.Add(be(chunk, uint16(1), uint16(0x8001), uint64(1), uint32(8), uint32(5), uint16(2), "no"))
	f.Fuzz(func(t *testing.T, replies []byte) {
		c, err := withServer(t, func(p peer) {
			p.serveGo()
			p.expectRequest(0, 0, 100, 10)
			_, _ = p.Write(replies)
		})
		if err != nil {
			t.Fatal(err)
		}
		p := make([]byte, 12)
		err = c.ReadAt(bg, p[:10], 100)
		if p[10] != 0 || p[11] != 0 {
			t.Errorf("data beyond the request: %x", p)
		}
		if err == nil && len(replies) < 16 {
			t.Errorf("success from %x", replies)
		}
	})
}
