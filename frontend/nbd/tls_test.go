package nbd

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"graindisk/frontend/nbd/nbdclient"
	"graindisk/frontend/nbd/proto"
	"graindisk/internal/access"
	"graindisk/test/pki"
)

const (
	hexStartTLS = `"IHAVEOPT" 00000005 00000000`
	tlsReqdText = "this listener requires TLS; send STARTTLS first"
)

func tlsReqd(opt string) string {
	return fmt.Sprintf(`%s %s 80000005 %08x "%s"`, hexOptReply, opt, len(tlsReqdText), tlsReqdText)
}

// tlsOf makes the server's side with the CA's certificate in dir; clientCA asks clients for theirs.
func tlsOf(t *testing.T, ca *pki.CA, dir string, clientCA bool, log *slog.Logger) *TLS {
	t.Helper()
	ca.Dir(t, dir, "server", ca.Server(t, "gateway"))
	files := TLSFiles{Certificate: filepath.Join(dir, "server-cert.pem"), Key: filepath.Join(dir, "server-key.pem")}
	if clientCA {
		files.ClientCA = filepath.Join(dir, "ca-cert.pem")
	}
	x, err := NewTLS(files, log)
	if err != nil {
		t.Fatal(err)
	}
	return x
}

func (s *testServer) dial(o nbdclient.Options, export string) (*nbdclient.Client, error) {
	c, err := nbdclient.Dial(context.Background(), "nbd+unix:///"+export+"?socket="+s.path, o)
	if err == nil {
		s.t.Cleanup(func() { _ = c.Close() })
	}
	return c, err
}

func TestWithoutTLSNothingIsServedWhereItIsRequired(t *testing.T) {
	ca := pki.NewCA(t, "ca")
	s := startServer(t, Options{Exports: oneExport(newMemDevice(1 << 20))},
		ListenOptions{TLS: tlsOf(t, ca, t.TempDir(), false, nil), TLSRequired: true})
	r := s.raw()
	r.expect(hexGreeting)
	r.send(`00000003`)
	for _, o := range []struct{ opt, data string }{
		{`00000003`, `00000000`},                                                     // LIST
		{`00000006`, `0000000a 00000004 "disk" 0000`},                                // INFO
		{`00000007`, `0000000a 00000004 "disk" 0000`},                                // GO
		{`00000008`, `00000000`},                                                     // STRUCTURED_REPLY
		{`00000009`, `0000000c 00000004 "disk" 00000000`},                            // LIST_META_CONTEXT
		{`0000000a`, `0000001f 00000004 "disk" 00000001 0000000f "base:allocation"`}, // SET_META_CONTEXT
		{`0000000b`, `00000000`},                                                     // EXTENDED_HEADERS
		{`deadbeef`, `00000000`},
	} {
		r.send(`"IHAVEOPT" ` + o.opt + o.data)
		r.expect(tlsReqd(o.opt))
	}
	r.send(`"IHAVEOPT" 00000002 00000000`) // ABORT
	r.expect(hexOptReply + `00000002 00000001 00000000`)
	r.expectEOF()

	r = s.raw() // EXPORT_NAME has no refusal
	r.expect(hexGreeting)
	r.send(`00000003 "IHAVEOPT" 00000001 00000004 "disk"`)
	r.expectEOF()

	if _, err := s.dial(nbdclient.Options{}, "disk"); err == nil || !strings.Contains(err.Error(), "requires TLS") {
		t.Errorf("a client without TLS: %v", err)
	}
}

func TestStartTLSBytes(t *testing.T) {
	ca := pki.NewCA(t, "ca")
	s := startServer(t, Options{Exports: oneExport(newMemDevice(1 << 20))},
		ListenOptions{TLS: tlsOf(t, ca, t.TempDir(), false, nil)})
	refused := func(text string) string {
		return fmt.Sprintf(`%s 00000005 80000003 %08x "%s"`, hexOptReply, len(text), text)
	}
	// Offered and not required: plain clients are served, and a refused STARTTLS changes nothing.
	r := s.raw()
	r.goDisk(true)
	r = s.raw()
	r.expect(hexGreeting)
	r.send(`00000003 "IHAVEOPT" 00000005 00000001 00`)
	r.expect(refused("STARTTLS takes no data"))
	r.send(`"IHAVEOPT" 00000003 00000000`)
	r.expect(hexOptReply + `00000003 00000002 00000008 00000004 "disk"` + hexOptReply + `00000003 00000001 00000000`)

	// What was agreed in plain text is forgotten: a READ is answered simply.
	r.send(`"IHAVEOPT" 00000008 00000000`)
	r.expect(hexOptReply + `00000008 00000001 00000000`)
	r.send(`"IHAVEOPT" 0000000b 00000000`)
	r.expect(hexOptReply + `0000000b 00000001 00000000`)
	r.send(hexStartTLS)
	r.expect(hexOptReply + `00000005 00000001 00000000`)
	over := tls.Client(r.Conn, ca.ClientConfig(t, pki.Pair{}))
	if err := over.Handshake(); err != nil {
		t.Fatal(err)
	}
	if v := over.ConnectionState().Version; v != tls.VersionTLS13 {
		t.Errorf("TLS version %#x", v)
	}
	x := raw{t, over}
	x.send(hexStartTLS)
	x.expect(refused("TLS is on already"))
	x.send(`"IHAVEOPT" 00000007 0000000a 00000004 "disk" 0000`)
	x.expect(hexOptReply + `00000007 00000003 0000000c 0000 0000000000100000 016d` + hexOptReply + `00000007 00000001 00000000`)
	x.send(hexRequest + `0000 0000 00000000000000aa 0000000000000000 00000004`)
	x.expect(hexSimple + `00000000 00000000000000aa 00000000`)
}

// Whatever follows STARTTLS in plain text is nobody's option, neither before TLS nor after.
func TestPlainTextIsNotInjected(t *testing.T) {
	ca := pki.NewCA(t, "ca")
	d := newMemDevice(1 << 20)
	s := startServer(t, Options{Exports: oneExport(d)},
		ListenOptions{TLS: tlsOf(t, ca, t.TempDir(), false, nil), TLSRequired: true})
	for _, extra := range []string{
		`"IHAVEOPT" 00000008 00000000`,
		`"IHAVEOPT" 00000007 0000000a 00000004 "disk" 0000` + hexRequest + `0000 0004 00000000000000aa 0000000000000000 00010000`,
		hexStartTLS, `00`,
	} {
		r := s.raw()
		r.expect(hexGreeting)
		r.send(`00000003` + hexStartTLS + extra) // in one write, so that the server reads it at once
		r.expectEOF()

		r = s.raw() // after the answer, where TLS belongs
		r.expect(hexGreeting)
		r.send(`00000003` + hexStartTLS)
		r.expect(hexOptReply + `00000005 00000001 00000000`)
		r.send(extra + strings.Repeat(`00`, 16))
		rest, _ := io.ReadAll(r)
		if bytes.Contains(rest, unhex(t, hexOptReply)) {
			t.Errorf("%s was answered %x", extra, rest)
		}
	}
	if n := d.ops.Load(); n != 0 {
		t.Errorf("%d operations reached the device", n)
	}
}

func TestOurClientRefusesInjectedPlainText(t *testing.T) {
	a, b := net.Pipe()
	defer func() { _ = a.Close() }()
	go func() {
		p := unhex(t, hexGreeting)
		_, _ = a.Write(p)
		_, _ = io.ReadFull(a, make([]byte, 4+16))
		_, _ = a.Write(unhex(t, hexOptReply+`00000005 00000001 00000000`+hexOptReply+`00000008 00000001 00000000`))
		_, _ = io.Copy(io.Discard, a)
	}()
	_, err := nbdclient.New(context.Background(), b, "disk", nbdclient.Options{TLS: &tls.Config{ServerName: "localhost"}})
	if err == nil || !strings.Contains(err.Error(), "plain text") {
		t.Errorf("got %v", err)
	}
}

func TestClientsAreKnownByTheirCertificates(t *testing.T) {
	ca, other := pki.NewCA(t, "ca"), pki.NewCA(t, "ca") // another authority of the same name
	vm1 := ca.Client(t, "vm1", "vm1.example")
	grants := map[string]access.Grants{
		"a": {Write: rulesOf(t, "CN=vm1")}, "b": {Write: rulesOf(t, "CN=vm2"), Read: rulesOf(t, "DNS=vm1.example")}, "c": {Write: rulesOf(t, "CN=vm2")},
	}
	exports := &memExports{names: []string{"a", "b", "c"}, devices: map[string]Device{
		"a": newMemDevice(8192), "b": newMemDevice(8192), "c": newMemDevice(8192),
	}}
	s := startServer(t, Options{Exports: exports, Access: func(p access.Peer, name string) access.Level { return grants[name].Level(p) }},
		ListenOptions{TLS: tlsOf(t, ca, t.TempDir(), true, nil), TLSRequired: true})

	for what, pair := range map[string]pki.Pair{
		"no certificate": {}, "another authority's": other.Client(t, "vm1", "vm1.example"),
		"an expired one": ca.Expired(t, "vm1"), "a server's": ca.Server(t, "vm1"),
	} {
		if _, err := s.dial(nbdclient.Options{TLS: ca.ClientConfig(t, pair)}, "a"); err == nil {
			t.Errorf("%s opened a disk", what)
		}
	}
	if _, err := s.dial(nbdclient.Options{TLS: other.ClientConfig(t, vm1)}, "a"); err == nil || !strings.Contains(err.Error(), "certificate") {
		t.Errorf("a client took a server of another authority: %v", err)
	}

	ours := nbdclient.Options{TLS: ca.ClientConfig(t, vm1)}
	a, err := s.dial(ours, "a")
	if err != nil {
		t.Fatal(err)
	}
	if err := a.WriteAt(context.Background(), []byte("hello"), 5, true); err != nil {
		t.Error(err)
	}
	b, err := s.dial(ours, "b")
	if err != nil {
		t.Fatal(err)
	}
	if b.Info().Flags&proto.FlagReadOnly == 0 {
		t.Errorf("flags %#x of a disk to be read only", b.Info().Flags)
	}
	if err := b.WriteAt(context.Background(), []byte("x"), 0, false); err == nil || !strings.Contains(err.Error(), "EPERM") {
		t.Errorf("write with a grant to read: %v", err)
	}
	if err := b.ReadAt(context.Background(), make([]byte, 5), 0); err != nil {
		t.Error(err)
	}
	for _, name := range []string{"c", "d"} { // forbidden and missing: no difference
		if _, err := s.dial(ours, name); err == nil || !strings.HasSuffix(err.Error(), "server has no such export") {
			t.Errorf("export %s: %v", name, err)
		}
	}
	x := s.secureRaw(ca.ClientConfig(t, vm1))
	x.send(`"IHAVEOPT" 00000003 00000000`)
	x.expect(hexOptReply + `00000003 00000002 00000005 00000001 "a"` + hexOptReply + `00000003 00000002 00000005 00000001 "b"` +
		hexOptReply + `00000003 00000001 00000000`)
	x.send(`"IHAVEOPT" 00000007 00000006 00000000 0000`) // two are visible: none is the default
	x.expect(hexOptReply + `00000007 80000006 0000000e "no such export"`)
	x = s.secureRaw(ca.ClientConfig(t, ca.Client(t, "vm3")))
	x.send(`"IHAVEOPT" 00000003 00000000`)
	x.expect(hexOptReply + `00000003 00000001 00000000`)
	x.send(`"IHAVEOPT" 00000001 00000001 "a"`)
	x.expectEOF()
}

// secureRaw is a raw client after STARTTLS.
func (s *testServer) secureRaw(conf *tls.Config) raw {
	s.t.Helper()
	r := s.raw()
	r.expect(hexGreeting)
	r.send(`00000003` + hexStartTLS)
	r.expect(hexOptReply + `00000005 00000001 00000000`)
	over := tls.Client(r.Conn, conf)
	if err := over.Handshake(); err != nil {
		s.t.Fatal(err)
	}
	return raw{s.t, over}
}

// lines collects what is logged.
type lines struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lines) count(what string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Count(l.b.String(), what)
}

func TestCertificatesAreReloaded(t *testing.T) {
	first, second := pki.NewCA(t, "first"), pki.NewCA(t, "second")
	dir, log := t.TempDir(), &lines{}
	x := tlsOf(t, first, dir, true, slog.New(slog.NewTextHandler(log, nil)))
	s := startServer(t, Options{Exports: oneExport(newMemDevice(8192))}, ListenOptions{TLS: x, TLSRequired: true})
	old := nbdclient.Options{TLS: first.ClientConfig(t, first.Client(t, "vm"))}
	now := nbdclient.Options{TLS: second.ClientConfig(t, second.Client(t, "vm"))}
	works := func(when string, good, bad nbdclient.Options) {
		t.Helper()
		if _, err := s.dial(good, "disk"); err != nil {
			t.Errorf("%s: %v", when, err)
		}
		if _, err := s.dial(bad, "disk"); err == nil {
			t.Errorf("%s: the other authority is taken", when)
		}
	}
	works("at first", old, now)
	works("without a certificate, though no rule asks for one", old, nbdclient.Options{TLS: first.ClientConfig(t, pki.Pair{})})
	stays, err := s.dial(old, "disk")
	if err != nil {
		t.Fatal(err)
	}

	// Replaced file by file: until all fit, the old ones serve. Each state is complained about once.
	pair := second.Server(t, "new")
	write := func(name string, text []byte) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, name), text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	const kept = "the old ones stay in use"
	write("server-cert.pem", pair.Cert)
	works("a certificate without its key", old, now)
	works("still", old, now)
	if n := log.count(kept); n != 1 {
		t.Errorf("complained %d times", n)
	}
	write("server-key.pem", []byte("garbage"))
	works("a broken key", old, now)
	if err := os.Remove(filepath.Join(dir, "server-key.pem")); err != nil {
		t.Fatal(err)
	}
	works("no key", old, now)
	works("still no key", old, now)
	if n := log.count(kept); n != 3 {
		t.Errorf("complained %d times", n)
	}
	second.Dir(t, dir, "server", pair) // all three
	works("all replaced", now, old)
	if log.count("are in use") != 1 {
		t.Error("the change was not told of")
	}
	write("ca-cert.pem", nil)
	works("no authority in the file", now, old)
	if err := stays.Flush(context.Background()); err != nil {
		t.Errorf("a connection from before: %v", err)
	}
}

func TestBadTLSFilesAreRefusedAtStart(t *testing.T) {
	ca, dir := pki.NewCA(t, "ca"), t.TempDir()
	ca.Dir(t, dir, "server", ca.Server(t, "x"))
	ca.Dir(t, dir, "client", ca.Client(t, "y"))
	in := func(name string) string { return filepath.Join(dir, name) }
	if err := os.WriteFile(in("large"), make([]byte, tlsFileMax+1), 0o600); err != nil {
		t.Fatal(err)
	}
	for want, f := range map[string]TLSFiles{
		"no such file":       {Certificate: in("none"), Key: in("server-key.pem")},
		"private key does":   {Certificate: in("server-cert.pem"), Key: in("client-key.pem")},
		"no certificate in":  {Certificate: in("server-cert.pem"), Key: in("server-key.pem"), ClientCA: in("server-key.pem")},
		"are no certificate": {Certificate: in("large"), Key: in("server-key.pem")},
	} {
		if _, err := NewTLS(f, nil); err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%+v: %v, want %q", f, err, want)
		}
	}
}

// A client that stops in the middle of the TLS handshake is hung up on like any other.
func TestTLSHandshakeEndsByItself(t *testing.T) {
	ca := pki.NewCA(t, "ca")
	s := startServer(t, Options{Exports: oneExport(newMemDevice(4096)), HandshakeTimeout: time.Second},
		ListenOptions{TLS: tlsOf(t, ca, t.TempDir(), false, nil), TLSRequired: true})
	x := s.secureRaw(ca.ClientConfig(t, pki.Pair{})) // TLS done, and then no export chosen
	var stuck []raw
	for _, hello := range []string{``, `16 0301 0200 01`} { // nothing, and the beginning of a ClientHello
		r := s.raw()
		r.expect(hexGreeting)
		r.send(`00000003` + hexStartTLS)
		r.expect(hexOptReply + `00000005 00000001 00000000`)
		r.send(hello)
		stuck = append(stuck, r)
	}
	for _, r := range stuck {
		r.expectEOF()
	}
	x.expectEnd()
}

// expectEnd expects that the server ends the connection, however TLS words it.
func (r raw) expectEnd() {
	r.t.Helper()
	if n, err := r.Read(make([]byte, 1)); err == nil || n > 0 || os.IsTimeout(err) {
		r.t.Errorf("read %d bytes, %v; want the end", n, err)
	}
}

func TestOldTLSVersionsAreRefused(t *testing.T) {
	ca := pki.NewCA(t, "ca")
	s := startServer(t, Options{Exports: oneExport(newMemDevice(4096))},
		ListenOptions{TLS: tlsOf(t, ca, t.TempDir(), false, nil), TLSRequired: true})
	conf := ca.ClientConfig(t, pki.Pair{})
	conf.MaxVersion = tls.VersionTLS12
	if _, err := s.dial(nbdclient.Options{TLS: conf}, "disk"); err == nil || !strings.Contains(err.Error(), "version") {
		t.Errorf("TLS 1.2: %v", err)
	}
}

// Many writers and readers over TLS: data of all sizes arrive whole, and at shutdown what was read is answered.
func TestDataOverTLS(t *testing.T) {
	ca := pki.NewCA(t, "ca")
	d := newMemDevice(4 << 20)
	d.onTry = func(off int64, _ int) bool { return off%8192 < 4096 }
	s := startServer(t, Options{Exports: oneExport(d)}, ListenOptions{TLS: tlsOf(t, ca, t.TempDir(), false, nil), TLSRequired: true})
	for _, simple := range []bool{false, true} {
		c, err := s.dial(nbdclient.Options{SimpleReplies: simple, TLS: ca.ClientConfig(t, pki.Pair{})}, "disk")
		if err != nil {
			t.Fatal(err)
		}
		var wg sync.WaitGroup
		for w := range 8 {
			wg.Go(func() {
				r := rand.New(rand.NewPCG(uint64(w), 1))
				base, room := int64(w)<<19, 1<<19
				for range 12 {
					n := 1 + r.IntN(1+room/(1<<r.IntN(12)))
					off := base + int64(r.IntN(room-min(n, room-1)))
					n = min(n, int(base)+room-int(off))
					p, back := make([]byte, n), make([]byte, n)
					for i := range p {
						p[i] = byte(r.Uint32())
					}
					if err := c.WriteAt(context.Background(), p, off, false); err != nil {
						t.Error(err)
						return
					}
					if err := c.ReadAt(context.Background(), back, off); err != nil || !bytes.Equal(p, back) {
						t.Errorf("writer %d: %d bytes at %d: %v", w, n, off, err)
						return
					}
				}
			})
		}
		wg.Wait()
	}
}

func TestShutdownOverTLSAnswersWhatWasRead(t *testing.T) {
	ca := pki.NewCA(t, "ca")
	d := newMemDevice(4096)
	entered, leave := make(chan struct{}), make(chan struct{})
	d.onFlush = func(context.Context) error {
		close(entered)
		<-leave
		return nil
	}
	s := startServer(t, Options{Exports: oneExport(d)}, ListenOptions{TLS: tlsOf(t, ca, t.TempDir(), false, nil), TLSRequired: true})
	x := s.secureRaw(ca.ClientConfig(t, pki.Pair{}))
	x.goOn()
	x.send(hexRequest + `0000 0003 00000000000000aa 0000000000000000 00000000`)
	within(t, "the flush", entered)
	down := make(chan error, 1)
	go func() { down <- s.Shutdown(context.Background()) }()
	for !s.isDraining() {
		time.Sleep(time.Millisecond)
	}
	close(leave)
	x.expect(hexSimple + `00000000 00000000000000aa`)
	if n, err := x.Read(make([]byte, 1)); n != 0 || err != io.EOF { // TLS was ended, not cut
		t.Errorf("after the answer: %d bytes, %v", n, err)
	}
	_ = x.Close()
	if err := within(t, "shutdown", down); err != nil {
		t.Error(err)
	}
}

// goOn chooses "disk" after TLS.
func (r raw) goOn() {
	r.t.Helper()
	r.send(`"IHAVEOPT" 00000007 0000000a 00000004 "disk" 0000`)
	p := make([]byte, 20+12+20)
	if _, err := io.ReadFull(r, p); err != nil || binary.BigEndian.Uint32(p[44:]) != proto.RepAck {
		r.t.Fatalf("GO was answered %x, %v", p, err)
	}
}

// closedExports fails the test when somebody opens or lists anything.
type closedExports struct{ t *testing.T }

func (e closedExports) List() []string {
	e.t.Error("exports were listed")
	return nil
}

func (e closedExports) Open(context.Context, string) (Device, func(), error) {
	e.t.Error("an export was opened")
	return nil, nil, ErrNotFound
}

// FuzzPlainWhereTLSIsRequired feeds arbitrary bytes to a listener that requires TLS: whatever they
// are, they never get as far as the exports.
func FuzzPlainWhereTLSIsRequired(f *testing.F) {
	for _, seed := range []string{
		`00000003` + hexStartTLS, `00000003` + hexStartTLS + hexStartTLS, `00000003 "IHAVEOPT" 00000005 00000001 00` + hexStartTLS,
		`00000001 "IHAVEOPT" 00000001 00000004 "disk"`, `00000003 "IHAVEOPT" 00000007 0000000a 00000004 "disk" 0000`,
		`00000003 "IHAVEOPT" 00000008 00000000 "IHAVEOPT" 00000003 00000000 "IHAVEOPT" 00000006 00000006 00000000 0000`,
		`00000003 "IHAVEOPT" 0000000a 0000001f 00000004 "disk" 00000001 0000000f "base:allocation" "IHAVEOPT" 00000002 00000000`,
	} {
		f.Add(unhex(f, seed))
	}
	ca, dir := pki.NewCA(f, "ca"), f.TempDir()
	ca.Dir(f, dir, "server", ca.Server(f, "gateway"))
	x, err := NewTLS(TLSFiles{Certificate: dir + "/server-cert.pem", Key: dir + "/server-key.pem"}, nil)
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, script []byte) {
		s, err := New(Options{Exports: closedExports{t}, InFlightBytes: 1 << 20})
		if err != nil {
			t.Fatal(err)
		}
		sock := &scriptConn{in: bytes.NewReader(script)}
		newConn(context.Background(), s, sock, ListenOptions{TLS: x, TLSRequired: true}).serve()
	})
}
