package nbd

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"graindisk/frontend/nbd/nbdclient"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// testTimeout is when a test gives up on something that should happen at once.
const testTimeout = 20 * time.Second

// testServer is a server on a unix socket; it is shut down when the test ends, and every
// export must then have been released.
type testServer struct {
	t       *testing.T
	*Server            // for Shutdown
	path    string     // of the socket
	served  chan error // what Serve returned
	exports *memExports
}

func startServer(t *testing.T, o Options, lo ListenOptions) *testServer {
	t.Helper()
	dir, err := os.MkdirTemp("", "nbd") // t.TempDir can be too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	s := &testServer{t: t, path: filepath.Join(dir, "s"), served: make(chan error, 1)}
	s.exports = o.Exports.(*memExports)
	ln, err := Listen("unix://"+s.path, false)
	if err != nil {
		t.Fatal(err)
	}
	if s.Server, err = New(o); err != nil {
		t.Fatal(err)
	}
	go func() { s.served <- s.Serve(context.Background(), ln, lo) }()
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), testTimeout)
		defer cancel()
		if err := s.Shutdown(ctx); err != nil {
			t.Errorf("shutdown: %v", err)
		}
		if err := <-s.served; !errors.Is(err, ErrShutdown) {
			t.Errorf("serve: %v", err)
		}
		if n := s.exports.open.Load(); n != 0 {
			t.Errorf("%d exports were not released", n)
		}
		_ = os.RemoveAll(dir)
	})
	return s
}

// client connects our own client to the default export.
func (s *testServer) client(o nbdclient.Options) *nbdclient.Client {
	s.t.Helper()
	c, err := nbdclient.Dial(context.Background(), "nbd+unix:///?socket="+s.path, o)
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { _ = c.Close() })
	return c
}

// raw is a client that speaks bytes. Hex strings may hold spaces, and "text" in quotes.
type raw struct {
	t *testing.T
	net.Conn
}

func (s *testServer) raw() raw {
	s.t.Helper()
	sock, err := net.Dial("unix", s.path)
	if err != nil {
		s.t.Fatal(err)
	}
	_ = sock.SetDeadline(time.Now().Add(testTimeout))
	s.t.Cleanup(func() { _ = sock.Close() })
	return raw{s.t, sock}
}

// unhex decodes hex with spaces and quoted text.
func unhex(t testing.TB, s string) []byte {
	t.Helper()
	var out []byte
	for i, part := range strings.Split(s, `"`) {
		if i%2 == 1 {
			out = append(out, part...)
			continue
		}
		p, err := hex.DecodeString(strings.Join(strings.Fields(part), ""))
		if err != nil {
			t.Fatalf("%q: %v", part, err)
		}
		out = append(out, p...)
	}
	return out
}

func (r raw) send(hex string) {
	r.t.Helper()
	r.sendBytes(unhex(r.t, hex))
}

func (r raw) sendBytes(p []byte) {
	r.t.Helper()
	if _, err := r.Write(p); err != nil {
		r.t.Fatalf("send: %v", err)
	}
}

func (r raw) expect(hex string) {
	r.t.Helper()
	want := unhex(r.t, hex)
	got := make([]byte, len(want))
	if n, err := io.ReadFull(r, got); err != nil {
		r.t.Fatalf("got %x and %v, want %x", got[:n], err, want)
	}
	if !bytes.Equal(got, want) {
		r.t.Fatalf("got  %x\nwant %x", got, want)
	}
}

// expectEOF expects that the server sends nothing more and closes.
func (r raw) expectEOF() {
	r.t.Helper()
	rest, err := io.ReadAll(r)
	if len(rest) > 0 || err != nil && !strings.Contains(err.Error(), "reset by peer") {
		r.t.Fatalf("got %x and %v, want the end", rest, err)
	}
}

const (
	hexGreeting = `"NBDMAGIC" "IHAVEOPT" 0003`
	hexOptReply = `0003e889045565a9`
	hexRequest  = `25609513`
	hexSimple   = `67446698`
	hexChunk    = `668e33ef`
)

// goDisk goes through the handshake to transmission on export "disk".
func (r raw) goDisk(structured bool) {
	r.t.Helper()
	r.expect(hexGreeting)
	r.send(`00000003`)
	if structured {
		r.send(`"IHAVEOPT" 00000008 00000000`)
		r.expect(hexOptReply + `00000008 00000001 00000000`)
	}
	r.send(`"IHAVEOPT" 00000007 0000000a 00000004 "disk" 0000`)
	info := make([]byte, 20+12+20)
	if _, err := io.ReadFull(r, info); err != nil {
		r.t.Fatal(err)
	}
	if !bytes.HasSuffix(info, unhex(r.t, hexOptReply+`00000007 00000001 00000000`)) {
		r.t.Fatalf("GO was answered %x", info)
	}
}

// within fails the test unless ch delivers in time.
func within[T any](t *testing.T, what string, ch <-chan T) T {
	t.Helper()
	select {
	case v := <-ch:
		return v
	case <-time.After(testTimeout):
		t.Fatalf("%s did not happen", what)
		panic("unreachable")
	}
}
