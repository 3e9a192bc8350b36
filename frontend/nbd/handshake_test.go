package nbd

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"graindisk/vdisk"
)

// 1 MiB: 0x100000. Flags of a writable export: HAS_FLAGS 1, FLUSH 4, FUA 8, TRIM 20,
// WRITE_ZEROES 40, MULTI_CONN 100 = 016d; DF adds 80, FAST_ZERO 800; read-only: 0107.
func TestHandshakeBytes(t *testing.T) {
	info := func(opt, size, flags string) string {
		return hexOptReply + opt + `00000003 0000000c 0000` + size + flags
	}
	ack := func(opt string) string { return hexOptReply + opt + `00000001 00000000` }
	const size = `0000000000100000`
	refused := func(opt, code, text string) string {
		return fmt.Sprintf(`%s %s %s %08x "%s"`, hexOptReply, opt, code, len(text), text)
	}
	var (
		malformed = refused(`00000007`, `80000003`, "malformed request for information")
		unsup     = func(opt string) string { return refused(opt, `80000001`, "option not supported") }
	)
	type step struct{ send, expect string }
	tests := []struct {
		name  string
		steps []step // after the greeting; the client flags come first
		eof   bool
	}{
		{"EXPORT_NAME with zeroes", []step{
			{`00000001`, ``},
			{`"IHAVEOPT" 00000001 00000004 "disk"`, size + `016d` + strings.Repeat(`00`, 124)},
			{hexRequest + `0000 0003 00000000000000aa 0000000000000000 00000000`, hexSimple + `00000000 00000000000000aa`},
		}, false},
		{"EXPORT_NAME without zeroes", []step{
			{`00000003 "IHAVEOPT" 00000001 00000004 "disk"`, size + `016d`},
			{hexRequest + `0000 0003 00000000000000aa 0000000000000000 00000000`, hexSimple + `00000000 00000000000000aa`},
		}, false},
		{"EXPORT_NAME from a client that is not fixed", []step{
			{`00000000 "IHAVEOPT" 00000001 00000004 "disk"`, size + `016d` + strings.Repeat(`00`, 124)},
		}, false},
		{"EXPORT_NAME of the default export", []step{{`00000003 "IHAVEOPT" 00000001 00000000`, size + `016d`}}, false},
		{"EXPORT_NAME of an unknown export ends it", []step{{`00000003 "IHAVEOPT" 00000001 00000003 "dis"`, ``}}, true},
		{"GO, all information, after STRUCTURED_REPLY", []step{
			{`00000003 "IHAVEOPT" 00000008 00000000`, ack(`00000008`)},
			{`"IHAVEOPT" 00000007 00000012 00000004 "disk" 0004 0001 0002 0003 0009`,
				info(`00000007`, size, `01ed`) +
					hexOptReply + `00000007 00000003 00000006 0001 "disk"` +
					hexOptReply + `00000007 00000003 00000012 0002 "a disk in memory"` +
					hexOptReply + `00000007 00000003 0000000e 0003 00000001 00001000 02000000` +
					ack(`00000007`)},
		}, false},
		{"GO by the empty name tells the name", []step{
			{`00000003 "IHAVEOPT" 00000007 00000008 00000000 0001 0001`,
				info(`00000007`, size, `016d`) + hexOptReply + `00000007 00000003 00000006 0001 "disk"` + ack(`00000007`)},
		}, false},
		{"INFO, then ABORT", []step{
			{`00000003 "IHAVEOPT" 00000006 0000000a 00000004 "disk" 0000`, info(`00000006`, size, `016d`) + ack(`00000006`)},
			{`"IHAVEOPT" 00000002 00000000`, ack(`00000002`)},
		}, true},
		{"INFO on an unknown export, then on a known one", []step{
			{`00000003 "IHAVEOPT" 00000006 00000008 00000002 "no" 0000`, refused(`00000006`, `80000006`, "no such export")},
			{`"IHAVEOPT" 00000006 0000000a 00000004 "disk" 0000`, info(`00000006`, size, `016d`) + ack(`00000006`)},
		}, false},
		{"LIST", []step{
			{`00000003 "IHAVEOPT" 00000003 00000000`, hexOptReply + `00000003 00000002 00000008 00000004 "disk"` + ack(`00000003`)},
		}, false},
		{"LIST with data", []step{{`00000003 "IHAVEOPT" 00000003 00000001 00`, refused(`00000003`, `80000003`, "LIST takes no data")}}, false},
		{"STRUCTURED_REPLY with data", []step{
			{`00000003 "IHAVEOPT" 00000008 00000002 0000`, refused(`00000008`, `80000003`, "STRUCTURED_REPLY takes no data")},
		}, false},
		{"what is not offered is refused, and haggling goes on", []step{
			{`00000003 "IHAVEOPT" 00000005 00000000`, unsup(`00000005`)},
			{`"IHAVEOPT" 00000004 00000004 00000000`, unsup(`00000004`)}, // PEEK_EXPORT, withdrawn
			{`"IHAVEOPT" 0000000c 00000000`, unsup(`0000000c`)},
			{`"IHAVEOPT" 00000000 00000000`, unsup(`00000000`)},
			{`"IHAVEOPT" deadbeef 00000003 010203`, unsup(`deadbeef`)},
			{`"IHAVEOPT" 00000002 00000000`, ack(`00000002`)},
		}, true},
		{"a device without more has no contexts to choose from", []step{
			{`00000003 "IHAVEOPT" 00000008 00000000`, ack(`00000008`)},
			{`"IHAVEOPT" 00000009 0000000c 00000004 "disk" 00000000`, ack(`00000009`)},
			{`"IHAVEOPT" 0000000a 0000001f 00000004 "disk" 00000001 0000000f "base:allocation"`, ack(`0000000a`)},
			{`"IHAVEOPT" 00000006 0000000a 00000004 "disk" 0000`, info(`00000006`, size, `01ed`) + ack(`00000006`)},
		}, false},
		{"GO too short", []step{{`00000003 "IHAVEOPT" 00000007 00000005 0000000000`, malformed}}, false},
		{"GO with a name longer than its data", []step{{`00000003 "IHAVEOPT" 00000007 0000000a 00000005 "disk" 0000`, malformed}}, false},
		{"GO with a name of 4 GiB", []step{{`00000003 "IHAVEOPT" 00000007 0000000a ffffffff "disk" 0000`, malformed}}, false},
		{"GO with fewer wishes than it says", []step{{`00000003 "IHAVEOPT" 00000007 0000000c 00000004 "disk" 0002 0001`, malformed}}, false},
		{"GO with more data than it says", []step{{`00000003 "IHAVEOPT" 00000007 0000000b 00000004 "disk" 0000 00`, malformed}}, false},
		{"unknown client flags end it", []step{{`00000004`, ``}}, true},
		{"bad option magic ends it", []step{{`00000003 "IHAVEOPX" 00000003 00000000`, ``}}, true},
		{"an option of 64 KiB and one byte ends it", []step{{`00000003 "IHAVEOPT" 00000003 00010001`, ``}}, true},
	}
	s := startServer(t, Options{Exports: oneExport(newMemDevice(1 << 20))}, ListenOptions{})
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			r := s.raw()
			r.t = t
			r.expect(hexGreeting)
			for _, step := range tt.steps {
				r.send(step.send)
				r.expect(step.expect)
			}
			if tt.eof {
				r.expectEOF()
			}
			_ = r.Close()
		})
	}
}

func TestFlagsAreTrue(t *testing.T) {
	ro, fast := newMemDevice(4096), newMemDevice(4096)
	ro.readOnly, fast.fastZero = true, true
	s := startServer(t, Options{Exports: &memExports{
		names:   []string{"fast", "ro"},
		devices: map[string]Device{"ro": ro, "fast": fast},
	}}, ListenOptions{})
	for name, flags := range map[string]string{`ro" 0000`: `0107`, `fast" 0000`: `096d`} {
		r := s.raw()
		r.expect(hexGreeting)
		data := unhex(t, `"`+name)
		r.send(fmt.Sprintf(`00000003 "IHAVEOPT" 00000006 %08x %08x "%s`, 4+len(data), len(data)-2, name))
		r.expect(hexOptReply + `00000006 00000003 0000000c 0000 0000000000001000` + flags)
		_ = r.Close()
	}
	r := s.raw() // two exports: there is no default one
	r.expect(hexGreeting)
	r.send(`00000003 "IHAVEOPT" 00000006 00000006 00000000 0000`)
	r.expect(hexOptReply + `00000006 80000006 0000000e "no such export"`)
}

func TestOpenFailures(t *testing.T) {
	for _, tt := range []struct {
		err          error
		expect, text string
	}{
		{vdisk.ErrClosed, `80000007`, "export is being closed"},
		{fmt.Errorf("%w: by epoch 2", vdisk.ErrFenced), `80000007`, "another gateway owns the pool of this export now"},
		{errors.New("secret inside"), `80000002`, "export cannot be opened; see the server's log"},
		{fmt.Errorf("open it: %w", ErrNotFound), `80000006`, "no such export"},
	} {
		exports := oneExport(newMemDevice(4096))
		exports.openErr = tt.err
		s := startServer(t, Options{Exports: exports}, ListenOptions{})
		r := s.raw()
		r.expect(hexGreeting)
		r.send(`00000003 "IHAVEOPT" 00000007 0000000a 00000004 "disk" 0000`)
		r.expect(fmt.Sprintf(`%s 00000007 %s %08x "%s"`, hexOptReply, tt.expect, len(tt.text), tt.text))
	}
}

func TestHandshakeEndsByItself(t *testing.T) {
	s := startServer(t, Options{Exports: oneExport(newMemDevice(4096)), HandshakeTimeout: time.Second}, ListenOptions{})
	idle := s.raw()
	idle.goDisk(false)
	r := s.raw()
	r.expect(hexGreeting)
	r.send(`00000003 "IHAVE`) // and never the rest
	r.expectEOF()
	// By now the handshake's time has passed for idle as well, which is in transmission.
	idle.send(hexRequest + `0000 0003 00000000000000aa 0000000000000000 00000000`)
	idle.expect(hexSimple + `00000000 00000000000000aa`)
}

func TestTooManyOptions(t *testing.T) {
	s := startServer(t, Options{Exports: oneExport(newMemDevice(4096))}, ListenOptions{})
	r := s.raw()
	r.expect(hexGreeting)
	r.send(`00000003`)
	for range optionsMax {
		r.send(`"IHAVEOPT" 00000008 00000000`)
		r.expect(hexOptReply + `00000008 00000001 00000000`)
	}
	r.expectEOF()
}

func TestTooManyConnections(t *testing.T) {
	rejected := make(chan struct{}, 1)
	s := startServer(t, Options{
		Exports: oneExport(newMemDevice(4096)), ConnsMax: 1,
		Metrics: Metrics{Rejected: func() { rejected <- struct{}{} }},
	}, ListenOptions{})
	first := s.raw()
	first.goDisk(false)
	s.raw().expectEOF()
	within(t, "rejection", rejected)
}

func TestOptionsAreValidated(t *testing.T) {
	_, err := New(Options{ConnsMax: -1, InFlightBytes: 5, SlowReads: -2, HandshakeTimeout: -1})
	for _, want := range []string{"Exports", "ConnsMax -1", "InFlightBytes 5", "SlowReads -2", "HandshakeTimeout"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error %v does not name %s", err, want)
		}
	}
}

func TestListen(t *testing.T) {
	dir, err := os.MkdirTemp("", "nbd")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = os.RemoveAll(dir) }()
	path := dir + "/a b.sock"
	ln, err := Listen("unix://"+path, false)
	if err != nil {
		t.Fatal(err)
	}
	if fi, err := os.Stat(path); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("socket has mode %v, %v", fi.Mode(), err)
	}
	if got, want := URI(ln.Addr(), "demo"), "nbd+unix:///demo?socket="+dir+"/a%20b.sock"; got != want {
		t.Errorf("URI %s, want %s", got, want)
	}
	if _, err := Listen("unix://"+path, false); err == nil {
		t.Error("a socket was replaced without leave")
	}
	again, err := Listen("unix://"+path, true)
	if err != nil {
		t.Fatal(err)
	}
	_, _ = ln.Close(), again.Close()

	tcp, err := Listen("tcp://127.0.0.1:0", false)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = tcp.Close() }()
	if got, want := URI(tcp.Addr(), "demo"), "nbd://"+tcp.Addr().String()+"/demo"; got != want {
		t.Errorf("URI %s, want %s", got, want)
	}
	for _, bad := range []string{"unix://relative", "/just/path", "http://x", ""} {
		if _, err := Listen(bad, false); err == nil {
			t.Errorf("%q was accepted", bad)
		}
	}
	plain := dir + "/file"
	if err := os.WriteFile(plain, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Listen("unix://"+plain, true); err == nil {
		t.Error("a plain file was replaced by a socket")
	}
}
