package nbd

import (
	"context"
	"fmt"
	"io"
	"strings"
	"testing"

	"graindisk/vdisk"
)

// errChunk is a structured error with the text the code has.
func errChunk(cookie, code, text string) string {
	return fmt.Sprintf(`%s 0001 8001 %s %08x %s %04x "%s"`, hexChunk, cookie, 6+len(text), code, len(text), text)
}

// The export has 8 KiB: 0x2000.
func TestTransmissionBytes(t *testing.T) {
	const (
		cookie  = `0123456789abcdef`
		at0     = `0000000000000000`
		ok      = hexSimple + `00000000` + cookie
		inval   = hexSimple + `00000016` + cookie
		nospc   = hexSimple + `0000001c` + cookie
		write   = hexRequest + `0000 0001` + cookie
		read    = hexRequest + `0000 0000` + cookie
		einval  = "EINVAL: invalid request"
		barrier = hexRequest + `0000 0003 00000000000000ff` + at0 + `00000000`
		passed  = hexSimple + `00000000 00000000000000ff`
	)
	type step struct{ send, expect string }
	tests := []struct {
		name       string
		structured bool
		steps      []step
	}{
		{"write, read", false, []step{
			{write + `0000000000000003 00000005 "hello"`, ok},
			{read + `0000000000000002 00000007`, ok + `00 "hello" 00`},
		}},
		{"structured read of data and of nothing", true, []step{
			{write + at0 + `00000002 "ab"`, ok},
			{read + at0 + `00000002`, hexChunk + `0001 0001` + cookie + `0000000a` + at0 + `"ab"`},
			{hexRequest + `0004 0000` + cookie + `0000000000000001 00000001`, // DF
				hexChunk + `0001 0001` + cookie + `00000009 0000000000000001 "b"`},
			{read + at0 + `00000000`, hexChunk + `0001 0000` + cookie + `00000000`},
		}},
		{"FUA on everything", false, []step{
			{hexRequest + `0001 0001` + cookie + at0 + `00000001 "x"`, ok},
			{hexRequest + `0001 0000` + cookie + at0 + `00000001`, ok + `"x"`},
			{hexRequest + `0001 0004` + cookie + at0 + `00001000`, ok},
			{hexRequest + `0001 0006` + cookie + at0 + `00001000`, ok},
			{hexRequest + `0001 0003` + cookie + at0 + `00000000`, ok},
		}},
		{"trim rounds inward, write zeroes does not", false, []step{
			{write + `0000000000000fff 00000002 "ab"`, ok},
			{hexRequest + `0000 0004` + cookie + at0 + `00001fff`, ok},
			{read + `0000000000000fff 00000002`, ok + `00 "b"`},
			{hexRequest + `0002 0006` + cookie + `0000000000001000 00000001`, ok}, // NO_HOLE
			{read + `0000000000001000 00000001`, ok + `00`},
		}},
		{"zero length", false, []step{
			{write + `0000000000002000 00000000`, ok},
			{read + `0000000000002000 00000000`, ok},
			{hexRequest + `0000 0004` + cookie + at0 + `00000000`, ok},
			{hexRequest + `0000 0006` + cookie + at0 + `00000000`, ok},
		}},
		{"beyond the end", false, []step{
			{read + `0000000000001fff 00000002`, inval},
			{write + `0000000000001fff 00000002 "ab"`, nospc},
			{hexRequest + `0000 0004` + cookie + `0000000000002000 00000001`, inval},
			{hexRequest + `0000 0006` + cookie + `0000000000002000 00000001`, nospc},
			{read + `0000000000001fff 00000001`, ok + `00`},
		}},
		{"offsets that overflow", false, []step{
			{read + `ffffffffffffffff 00000002`, inval},
			{read + `7fffffffffffffff 00000001`, inval},
			{write + `fffffffffffffffe 00000002 "ab"`, inval},
			{hexRequest + `0000 0004` + cookie + `8000000000000000 ffffffff`, inval},
			{hexRequest + `0000 0006` + cookie + `7fffffff00000001 ffffffff`, inval},
		}},
		{"payloads over 32 MiB", true, []step{
			{read + at0 + `02000001`, errChunk(cookie, `00000016`, einval)},
			{read + at0 + `ffffffff`, errChunk(cookie, `00000016`, einval)},
			{read + at0 + `02000000`, errChunk(cookie, `00000016`, einval)}, // the disk is smaller
		}},
		{"unknown requests and those not offered", true, []step{
			{hexRequest + `0000 0005` + cookie + at0 + `00001000`, errChunk(cookie, `00000016`, einval)},
			{hexRequest + `0000 0007` + cookie + at0 + `00001000`, errChunk(cookie, `00000016`, einval)},
			{hexRequest + `0000 beef` + cookie + at0 + `00001000`, errChunk(cookie, `00000016`, einval)},
		}},
		{"flags where they do not belong", false, []step{
			{hexRequest + `0004 0000` + cookie + at0 + `00000001`, inval},            // DF without structured replies
			{hexRequest + `0002 0001` + cookie + at0 + `00000003 "abc"`, inval},      // NO_HOLE on WRITE; data skipped
			{hexRequest + `0020 0001` + cookie + at0 + `00000003 "abc"`, inval},      // PAYLOAD_LEN
			{hexRequest + `0010 0006` + cookie + at0 + `00000001`, inval},            // FAST_ZERO, not offered
			{hexRequest + `8000 0004` + cookie + at0 + `00000001`, inval},            // unknown
			{hexRequest + `0004 0003` + cookie + at0 + `00000000`, inval},            // DF on FLUSH
			{hexRequest + `0000 0003` + cookie + `0000000000000001 00000000`, inval}, // FLUSH with an offset
			{hexRequest + `0000 0003` + cookie + at0 + `00000001`, inval},
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s := startServer(t, Options{Exports: oneExport(newMemDevice(8 << 10))}, ListenOptions{})
			r := s.raw()
			r.goDisk(tt.structured)
			for _, step := range tt.steps {
				r.send(step.send)
				r.expect(step.expect)
				r.send(barrier) // the stream is still in step
				r.expect(passed)
			}
			r.send(hexRequest + `0000 0002` + cookie + at0 + `00000000`) // DISC
			r.expectEOF()
		})
	}
}

func TestFastZeroIsAcceptedWhereOffered(t *testing.T) {
	d := newMemDevice(8 << 10)
	d.fastZero = true
	s := startServer(t, Options{Exports: oneExport(d)}, ListenOptions{})
	r := s.raw()
	r.goDisk(false)
	r.send(hexRequest + `0012 0006 00000000000000aa 0000000000000000 00001000`)
	r.expect(hexSimple + `00000000 00000000000000aa`)
}

func TestReadOnlyRefusesChanges(t *testing.T) {
	d := newMemDevice(8 << 10)
	d.readOnly = true
	s := startServer(t, Options{Exports: oneExport(d)}, ListenOptions{})
	r := s.raw()
	r.goDisk(false)
	const eperm = hexSimple + `00000001 00000000000000aa`
	r.send(hexRequest + `0000 0001 00000000000000aa 0000000000000000 00000003 "abc"`)
	r.expect(eperm)
	r.send(hexRequest + `0000 0004 00000000000000aa 0000000000000000 00001000`)
	r.expect(eperm)
	r.send(hexRequest + `0000 0006 00000000000000aa 0000000000000000 00001000`)
	r.expect(eperm)
	r.send(hexRequest + `0000 0003 00000000000000aa 0000000000000000 00000000`)
	r.expect(hexSimple + `00000000 00000000000000aa`)
	if n := d.writes.Load(); n != 0 {
		t.Errorf("%d writes reached the device", n)
	}
}

func TestBrokenStreamsAreCut(t *testing.T) {
	tests := []struct{ name, send string }{
		{"bad request magic", `25609514 0000 0000 0000000000000001 0000000000000000 00000001`},
		{"a write over 64 MiB", hexRequest + `0000 0001 0000000000000001 0000000000000000 04000001`},
		{"a write of 4 GiB - 1", hexRequest + `0000 0001 0000000000000001 0000000000000000 ffffffff`},
		{"a reply instead of a request", hexSimple + `00000000 0000000000000001 000000000000000000000000`},
		{"text", `"GET / HTTP/1.1\r\nHost: example\r\n\r\n"`},
	}
	s := startServer(t, Options{Exports: oneExport(newMemDevice(1 << 20))}, ListenOptions{})
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			r := s.raw()
			r.t = t
			r.goDisk(false)
			r.send(tt.send)
			r.expectEOF()
		})
	}
}

// TestLongWriteIsSkipped sends a WRITE just over the limit, which is refused without losing step.
func TestLongWriteIsSkipped(t *testing.T) {
	d := newMemDevice(64 << 20)
	s := startServer(t, Options{Exports: oneExport(d)}, ListenOptions{})
	r := s.raw()
	r.goDisk(false)
	r.send(hexRequest + `0000 0001 00000000000000aa 0000000000000000 02000001`)
	r.sendBytes(make([]byte, 32<<20+1))
	r.expect(hexSimple + `00000016 00000000000000aa`)
	r.send(hexRequest + `0000 0001 00000000000000ab 0000000000000000 02000000`) // at the limit
	r.sendBytes([]byte(strings.Repeat("z", 32<<20)))
	r.expect(hexSimple + `00000000 00000000000000ab`)
	r.send(hexRequest + `0000 0000 00000000000000ac 0000000000000000 02000000`)
	r.expect(hexSimple + `00000000 00000000000000ac`)
	got := make([]byte, 32<<20)
	if _, err := io.ReadFull(r, got); err != nil {
		t.Fatal(err)
	}
	if i := strings.IndexFunc(string(got), func(r rune) bool { return r != 'z' }); i >= 0 {
		t.Fatalf("byte %d differs", i)
	}
}

// TestOneByteAtATime feeds a whole session in single bytes.
func TestOneByteAtATime(t *testing.T) {
	s := startServer(t, Options{Exports: oneExport(newMemDevice(8 << 10))}, ListenOptions{})
	r := s.raw()
	r.expect(hexGreeting)
	for _, step := range []struct{ send, expect string }{
		{`00000003 "IHAVEOPT" 00000001 00000004 "disk"`, `0000000000002000 016d`},
		{hexRequest + `0000 0001 0000000000000001 0000000000000001 00000003 "abc"`, hexSimple + `00000000 0000000000000001`},
		{hexRequest + `0000 0003 0000000000000002 0000000000000000 00000000`, hexSimple + `00000000 0000000000000002`},
	} {
		for _, b := range unhex(t, step.send) {
			r.sendBytes([]byte{b})
		}
		r.expect(step.expect)
	}
}

func TestErrnoOfDeviceErrors(t *testing.T) {
	tests := []struct {
		err         error
		read, write string // codes; "" ends the connection
	}{
		{vdisk.ErrFenced, `0000006c`, `0000006c`},
		{vdisk.ErrRange, `00000016`, `0000001c`},
		{vdisk.ErrReadOnly, `00000001`, `00000001`},
		{vdisk.ErrFull, `0000001c`, `0000001c`},
		{vdisk.ErrDamaged, `00000005`, `00000005`},
		{io.ErrUnexpectedEOF, `00000005`, `00000005`},
		{vdisk.ErrClosed, ``, ``},
	}
	for _, tt := range tests {
		t.Run(tt.err.Error(), func(t *testing.T) {
			for _, cmd := range []string{`0000`, `0001`, `0003`} {
				d := newMemDevice(8 << 10)
				wrapped := fmt.Errorf("deep inside: %w", tt.err)
				d.onTry = func(int64, int) bool { return false }
				d.onRead = func(context.Context, int64, int) error { return wrapped }
				d.onWrite = func(context.Context, []WriteOp, bool) error { return wrapped }
				d.onFlush = func(context.Context) error { return wrapped }
				s := startServer(t, Options{Exports: oneExport(d)}, ListenOptions{})
				r := s.raw()
				r.goDisk(false)
				want, size, data := tt.read, `00000001`, ``
				switch cmd {
				case `0001`:
					want, data = tt.write, `00`
				case `0003`:
					size = `00000000`
				}
				r.send(hexRequest + `0000` + cmd + `00000000000000aa 0000000000000000` + size + data)
				if want == "" {
					r.expectEOF()
					continue
				}
				r.expect(hexSimple + want + `00000000000000aa`)
			}
		})
	}
}
