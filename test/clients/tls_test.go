package clients

import (
	"fmt"
	"net"
	"os"
	"slices"
	"strings"
	"testing"

	"graindisk/test/harness"
	"graindisk/test/pki"
)

// secured is a gateway with three listeners: TLS by client certificate on TCP, the same to be had on a
// unix socket, and a plain unix socket. The disk vm1 belongs to the certificate of that name, which
// may read ro; open is everybody's.
type secured struct {
	*harness.Gateway
	t           *testing.T
	dir, config string
	tcp         string // host:port
	ca          *pki.CA
}

func serveSecured(t *testing.T) *secured {
	t.Helper()
	dir, err := os.MkdirTemp("", "clients-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	s := &secured{t: t, dir: dir, config: dir + "/gateway.yaml", ca: pki.NewCA(t, "test authority")}
	s.ca.Dir(t, dir+"/server", "server", s.ca.Server(t, "gateway"))
	for _, name := range []string{"vm1", "vm2"} {
		s.ca.Dir(t, dir+"/"+name, "client", s.ca.Client(t, name))
	}
	pki.NewCA(t, "other").Dir(t, dir+"/stranger", "client", pki.NewCA(t, "third").Client(t, "vm1"))
	if text, err := os.ReadFile(dir + "/vm1/ca-cert.pem"); err != nil {
		t.Fatal(err)
	} else if err := os.WriteFile(dir+"/stranger/ca-cert.pem", text, 0o600); err != nil { // trusts us, is not trusted
		t.Fatal(err)
	}
	s.ca.Dir(t, dir+"/none", "client", pki.Pair{}) // no certificate at all
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s.tcp = ln.Addr().String()
	ln.Close()
	for _, target := range []string{"a", "b", "c"} {
		if err := os.MkdirAll(dir+"/targets/"+target, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	s.configure(`allow: ["CN=vm1"]`)
	harness.Must(t, harness.Binary(t), "pool", "create", "main", "--config", s.config)
	s.start()
	return s
}

// configure writes the configuration; rules are those of the disk vm1.
func (s *secured) configure(rules string) {
	s.t.Helper()
	tls := fmt.Sprintf("certificate: %[1]s/server/server-cert.pem, key: %[1]s/server/server-key.pem, client_ca: %[1]s/server/ca-cert.pem", s.dir)
	text := fmt.Sprintf(`data: %[1]s/data
tier: {size: 512MiB}
listen:
  nbd:
    - {address: "tcp://%[2]s", tls: require, %[3]s}
    - {address: "unix://%[1]s/tls.sock", tls: offer, %[3]s}
    - {address: "unix://%[1]s/plain.sock", mode: 0660}
pools:
  main:
    targets: [{name: a, local: {dir: %[1]s/targets/a}}, {name: b, local: {dir: %[1]s/targets/b}}, {name: c, local: {dir: %[1]s/targets/c}}]
    disks:
      - {name: open, size: 64MiB}
      - {name: ro, size: 64MiB, allow: [uid=%[5]d], allow_read: ["CN=vm1"]}
      - {name: vm1, size: 64MiB, %[4]s}
`, s.dir, s.tcp, tls, rules, os.Getuid())
	if err := os.WriteFile(s.config, []byte(text), 0o600); err != nil {
		s.t.Fatal(err)
	}
}

func (s *secured) start(args ...string) {
	s.t.Helper()
	s.Gateway = harness.Serve(s.t, append([]string{"--config", s.config}, args...)...)
	g := s.Gateway
	s.t.Cleanup(func() {
		if s.Gateway == g {
			if code := g.Stop(); code != 0 {
				s.t.Errorf("clean shutdown: exit %d", code)
			}
		}
	})
}

// uri is that of a disk over TCP and TLS, with the certificate of a client.
func (s *secured) uri(disk, client string) string {
	return "nbds://" + s.tcp + "/" + disk + "?tls-certificates=" + s.dir + "/" + client
}

func (s *secured) plain(disk string) string {
	return "nbd+unix:///" + disk + "?socket=" + s.dir + "/plain.sock"
}

// qemu are the arguments of qemu-img or qemu-io for a disk over TLS.
func (s *secured) qemu(disk, client string) []string {
	host, port, err := net.SplitHostPort(s.tcp)
	if err != nil {
		s.t.Fatal(err)
	}
	return []string{
		"--object", "tls-creds-x509,id=tls0,endpoint=client,dir=" + s.dir + "/" + client, "--image-opts",
		"driver=nbd,server.type=inet,server.host=" + host + ",server.port=" + port + ",export=" + disk + ",tls-creds=tls0",
	}
}

// refused fails the test unless the command fails.
func (s *secured) refused(why, name string, args ...string) {
	s.t.Helper()
	if r := harness.Command(s.t, name, args...); r.Code == 0 {
		s.t.Errorf("%s: %s %q was let in: %s", why, name, args, r.Stdout)
	}
}

func exportNames(t *testing.T, list string) []string {
	t.Helper()
	var names []string
	for line := range strings.Lines(list) {
		if name, ok := strings.CutPrefix(strings.TrimSpace(line), `export="`); ok {
			names = append(names, strings.TrimSuffix(name, `":`))
		}
	}
	return names
}

func TestLibnbdOverTLS(t *testing.T) {
	harness.Need(t, "nbdinfo", "nbdcopy")
	s := serveSecured(t)
	if !strings.HasPrefix(s.URIs[0], "nbds://"+s.tcp+"/") {
		t.Errorf("ready line says %q", s.URIs)
	}
	if out := harness.Must(t, "nbdinfo", s.uri("vm1", "vm1")); !strings.Contains(out, "newstyle-fixed with TLS") {
		t.Errorf("nbdinfo tells %s", out)
	}
	overUnix := "nbds+unix://localhost/vm1?socket=" + s.dir + "/tls.sock&tls-certificates=" + s.dir + "/vm1&tls-hostname=localhost"
	if out := harness.Must(t, "nbdinfo", overUnix); !strings.Contains(out, "with TLS") {
		t.Errorf("nbdinfo over a unix socket tells %s", out)
	}
	for client, want := range map[string][]string{"vm1": {"open", "ro", "vm1"}, "vm2": {"open"}} {
		out := harness.Must(t, "nbdinfo", "--list", s.uri("", client))
		if got := exportNames(t, out); !slices.Equal(got, want) {
			t.Errorf("%s sees %q, want %q", client, got, want)
		}
	}
	s.refused("another's disk", "nbdinfo", s.uri("vm1", "vm2"))
	s.refused("another authority", "nbdinfo", s.uri("open", "stranger"))
	s.refused("no certificate", "nbdinfo", s.uri("open", "none"))
	s.refused("no TLS", "nbdinfo", "nbd://"+s.tcp+"/open")
	s.refused("a certificate's disk over the plain socket", "nbdinfo", s.plain("vm1"))
	harness.Must(t, "nbdinfo", s.plain("open"))

	image := s.image()
	for _, connections := range []string{"1", "4"} {
		harness.Must(t, "nbdcopy", "--flush", "--connections="+connections, image, s.uri("vm1", "vm1"))
		harness.Must(t, "nbdcopy", "--connections="+connections, s.uri("vm1", "vm1"), s.dir+"/out")
		s.same(image, s.dir+"/out")
	}
	harness.Must(t, "nbdcopy", "--flush", image, s.plain("ro"))
	harness.Must(t, "nbdcopy", s.uri("ro", "vm1"), s.dir+"/out")
	s.same(image, s.dir+"/out")
	s.refused("a disk to be read", "nbdcopy", image, s.uri("ro", "vm1"))
	if out := harness.Must(t, "nbdinfo", s.uri("ro", "vm1")); !strings.Contains(out, "is_read_only: true") {
		t.Errorf("nbdinfo tells %s", out)
	}
	if strings.Contains(s.Log(), "panic") {
		t.Error(s.Log())
	}
}

func (s *secured) image() string {
	h := server{t: s.t, dir: s.dir}
	return h.image("image", 7)
}

func (s *secured) same(a, b string) {
	s.t.Helper()
	h := server{t: s.t, dir: s.dir}
	h.same(a, b)
}

func TestQemuOverTLS(t *testing.T) {
	harness.Need(t, "qemu-img", "qemu-io")
	s := serveSecured(t)
	io := func(disk, client string, commands ...string) harness.Result {
		args := s.qemu(disk, client)
		for _, c := range commands {
			args = append(args, "-c", c)
		}
		return harness.Command(t, "qemu-io", args...)
	}
	good := func(r harness.Result) {
		t.Helper()
		if out := r.Stdout + r.Stderr; r.Code != 0 || strings.Contains(out, "failed") {
			t.Errorf("qemu-io: exit %d\n%s", r.Code, out)
		}
	}
	if out := harness.Must(t, "qemu-img", append([]string{"info"}, s.qemu("vm1", "vm1")...)...); !strings.Contains(out, "64 MiB") {
		t.Errorf("qemu-img info tells %s", out)
	}
	good(io("vm1", "vm1", "write -P 0x11 0 64k", "write -f -P 0x22 1M 3M", "discard 2M 1M", "flush", "read -P 0x22 1M 1M", "read -P 0 2M 1M"))
	good(io("vm1", "vm1", "read -P 0x11 0 64k", "aio_read -P 0x22 3M 1M", "aio_flush"))
	s.refused("another's disk", "qemu-img", append([]string{"info"}, s.qemu("vm1", "vm2")...)...)
	s.refused("another authority", "qemu-img", append([]string{"info"}, s.qemu("open", "stranger")...)...)
	s.refused("no TLS", "qemu-img", "info", "nbd://"+s.tcp+"/open")
	if r := io("ro", "vm1", "write 0 4k"); r.Code == 0 {
		t.Errorf("qemu-io writes to what it may read: %s%s", r.Stdout, r.Stderr)
	}
}

// New certificates serve without a restart, and new rules after SIGHUP; broken ones change nothing.
func TestCertificatesAndRulesAreReloaded(t *testing.T) {
	harness.Need(t, "nbdinfo")
	s := serveSecured(t)
	next := pki.NewCA(t, "next")
	old := s.uri("vm1", "vm1")
	next.Dir(t, s.dir+"/vm1new", "client", next.Client(t, "vm1"))
	harness.Must(t, "nbdinfo", old)
	if err := os.WriteFile(s.dir+"/server/server-cert.pem", []byte("half a certif"), 0o600); err != nil {
		t.Fatal(err)
	}
	harness.Must(t, "nbdinfo", old)
	if !strings.Contains(s.Log(), "the old ones stay in use") {
		t.Errorf("nothing is said of the broken file:\n%s", s.Log())
	}
	next.Dir(t, s.dir+"/server", "server", next.Server(t, "gateway"))
	harness.Must(t, "nbdinfo", s.uri("vm1", "vm1new"))
	s.refused("the old authority", "nbdinfo", old)

	s.configure(`allow: ["CN=vm1"], allow_read: ["CN=vm1", nonsense]`)
	s.hangup("access rules not reloaded")
	harness.Must(t, "nbdinfo", s.uri("vm1", "vm1new"))
	s.configure(`allow: ["CN=vm7"]`)
	s.hangup("access rules of the disks reloaded")
	s.refused("a name that was taken out", "nbdinfo", s.uri("vm1", "vm1new"))
}
