package nbd

import (
	"context"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"time"
)

// halfClose ends the sending side.
func (r raw) halfClose() {
	r.t.Helper()
	if err := r.Conn.(*net.UnixConn).CloseWrite(); err != nil {
		r.t.Fatal(err)
	}
}

// TestHalfClosed ends the sending side in every phase; the server closes and leaves nothing behind.
func TestHalfClosed(t *testing.T) {
	const disc = hexRequest + `0000 0002 00000000000000dd 0000000000000000 00000000`
	for _, tt := range []struct{ name, send, expect string }{
		{"at once", ``, hexGreeting},
		{"within the client's flags", `0000`, hexGreeting},
		{"within an option", `00000003 "IHAVEOPT" 00000007 0000000a 0000`, hexGreeting},
		{"after an option", `00000003 "IHAVEOPT" 00000008 00000000`, hexGreeting + hexOptReply + `00000008 00000001 00000000`},
		{"after EXPORT_NAME", `00000003 "IHAVEOPT" 00000001 00000004 "disk"`, hexGreeting + `0000000000002000 0d6d`},
		{"after EXPORT_NAME and DISC", `00000003 "IHAVEOPT" 00000001 00000004 "disk"` + disc, hexGreeting + `0000000000002000 0d6d`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := startServer(t, Options{Exports: oneExport(newFullDevice(8 << 10))}, ListenOptions{}).raw()
			r.send(tt.send)
			r.halfClose()
			r.expect(tt.expect)
			r.expectEOF()
		})
	}
	for _, part := range []string{hexRequest, hexRequest + `0000 0001 00000000000000aa 0000000000000000 00000100 "and no more"`} {
		t.Run(fmt.Sprintf("within a request, after %d bytes", len(unhex(t, part))), func(t *testing.T) {
			d := newFullDevice(8 << 10)
			r := startServer(t, Options{Exports: oneExport(d)}, ListenOptions{}).raw()
			r.goDisk(false)
			r.send(part)
			r.halfClose()
			r.expectEOF()
			if n := d.writes.Load(); n != 0 {
				t.Errorf("%d writes from half a request", n)
			}
		})
	}
}

// TestDiscAnswersWhatWasRead says goodbye behind a blocked write, a slow read and a flush.
func TestDiscAnswersWhatWasRead(t *testing.T) {
	g := newGate()
	d := newFullDevice(1 << 16)
	d.onTry = func(int64, int) bool { return false }
	d.onRead = func(ctx context.Context, _ int64, _ int) error { return g.pass(ctx) }
	d.onWrite = func(ctx context.Context, _ []WriteOp, _ bool) error { return g.pass(ctx) }
	d.onFlush = g.pass
	d.onStatus = g.pass
	d.onPrefetch = func(ctx context.Context, _, _ int64) error { return g.pass(ctx) }
	r := startServer(t, Options{Exports: oneExport(d)}, ListenOptions{}).raw()
	r.goFull(true)
	const at0 = `0000000000000000`
	r.send(hexExtRequest + `0020 0001 0000000000000001` + at0 + `0000000000000001 00` +
		hexExtRequest + `0000 0000 0000000000000002` + at0 + `0000000000000000` +
		hexExtRequest + `0000 0004 0000000000000003` + at0 + `0000000000001000` +
		hexExtRequest + `0000 0003 0000000000000004` + at0 + at0 +
		hexExtRequest + `0000 0005 0000000000000005` + at0 + `0000000000001000` +
		hexExtRequest + `0000 0002 0000000000000009` + at0 + at0)
	r.halfClose()
	for range 4 {
		within(t, "a request", g.entered)
	}
	close(g.open)
	all, err := io.ReadAll(r)
	if err != nil || len(all) != 5*32 {
		t.Fatalf("%d bytes of replies to five requests: %v", len(all), err)
	}
}

// TestTricklingHandshakeIsCut sends one byte after the other, never late and never done.
func TestTricklingHandshakeIsCut(t *testing.T) {
	s := startServer(t, Options{Exports: oneExport(newMemDevice(4096)), HandshakeTimeout: time.Second}, ListenOptions{})
	r := s.raw()
	r.expect(hexGreeting)
	start := time.Now()
	for i, bytes := 0, unhex(t, `00000003`+strings.Repeat(`"IHAVEOPT" 00000008 00000100`+strings.Repeat(`00`, 256), 200)); ; i++ {
		if _, err := r.Write(bytes[i : i+1]); err != nil {
			return
		}
		if time.Since(start) > testTimeout || i == len(bytes)-1 {
			t.Fatalf("still connected after %d bytes and %v", i, time.Since(start))
		}
		time.Sleep(5 * time.Millisecond) // the pace of the attack; nothing is right by it
	}
}

// TestHandshakeNobodyListensToIsCut asks for lists and takes no answer.
func TestHandshakeNobodyListensToIsCut(t *testing.T) {
	e := &memExports{devices: map[string]Device{}}
	for i := range 1000 {
		e.names = append(e.names, fmt.Sprintf("a name of some length, number %d", i))
	}
	s := startServer(t, Options{Exports: e, HandshakeTimeout: time.Second}, ListenOptions{})
	r := s.raw()
	r.send(`00000003` + strings.Repeat(`"IHAVEOPT" 00000003 00000000`, optionsMax))
	for deadline := time.Now().Add(testTimeout); ; time.Sleep(time.Millisecond) {
		s.Server.mu.Lock()
		n := len(s.Server.conns)
		s.Server.mu.Unlock()
		if _, err := r.Write([]byte{0}); n == 0 && err != nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d connections left", n)
		}
	}
}

// TestGoodbyeThenGone says goodbye behind requests that wait, and closes: they are done all the same, but not
// waited for without end.
func TestGoodbyeThenGone(t *testing.T) {
	for _, patient := range []bool{true, false} {
		t.Run(fmt.Sprintf("patient: %v", patient), func(t *testing.T) {
			g := newGate()
			cancelled := make(chan error, 10)
			d := newFullDevice(1 << 16)
			d.onWrite = func(ctx context.Context, _ []WriteOp, _ bool) error {
				err := g.pass(ctx)
				if err != nil {
					cancelled <- err
				}
				return err
			}
			closed := make(chan string, 1)
			s := startServer(t, Options{Exports: oneExport(d), Metrics: Metrics{Closed: func(e string) { closed <- e }}}, ListenOptions{})
			if !patient {
				s.goodbyeChecks = 0
			}
			r := s.raw()
			r.goDisk(false)
			r.send(hexRequest + `0000 0001 0000000000000001 0000000000000003 00000001 "x"` +
				hexRequest + `0000 0002 0000000000000002 0000000000000000 00000000`)
			within(t, "the write", g.entered)
			_ = r.Close()
			if !patient {
				within(t, "the end of patience", cancelled)
			}
			close(g.open)
			within(t, "the end of the connection", closed)
			if got := d.contents()[3]; patient != (got == 'x') {
				t.Errorf("the byte is %q", got)
			}
		})
	}
}
