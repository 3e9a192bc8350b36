package access

import (
	"crypto/x509"
	"crypto/x509/pkix"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestRules(t *testing.T) {
	id, err := url.Parse("spiffe://x/vm")
	if err != nil {
		t.Fatal(err)
	}
	cert := Peer{Addr: netip.MustParseAddr("10.1.2.3"), Cert: &x509.Certificate{
		Subject: pkix.Name{CommonName: "vm-host-1"}, DNSNames: []string{"a.example", "b.example"}, URIs: []*url.URL{id},
	}}
	tcp6 := Peer{Addr: netip.MustParseAddr("2001:db8::5")}
	local := Peer{Unix: true, UID: 1000, GID: 7}
	root := Peer{Unix: true}
	peers := map[string]Peer{"cert": cert, "tcp6": tcp6, "local": local, "root": root, "nobody": {}}
	for rule, want := range map[string]string{
		"any":                "cert tcp6 local root nobody",
		"CN=vm-host-1":       "cert",
		"CN=VM-host-1":       "",
		"CN=vm-host-":        "",
		"CN=a.example":       "", // a DNS name is no common name
		"DNS=B.Example":      "cert",
		"DNS=example":        "",
		"DNS=vm-host-1":      "",
		"URI=spiffe://x/vm":  "cert",
		"URI=spiffe://x/vm2": "",
		"uid=1000":           "local",
		"uid=0":              "root", // and not those of whom no uid is known
		"gid=7":              "local",
		"gid=0":              "root",
		"addr=10.1.2.3":      "cert",
		"addr=10.1.0.0/16":   "cert",
		"addr=10.2.0.0/16":   "",
		"addr=0.0.0.0/0":     "cert",
		"addr=2001:db8::/32": "tcp6",
		"addr=::/0":          "tcp6",
	} {
		r, err := Parse(rule)
		if err != nil {
			t.Errorf("%s: %v", rule, err)
			continue
		}
		for name, p := range peers {
			if got := r.Match(p); got != strings.Contains(" "+want+" ", " "+name+" ") {
				t.Errorf("%s matches %s: %v", rule, name, got)
			}
		}
	}
	if (Rule{}).Match(cert) || (Rules{}).Match(cert) {
		t.Error("no rule matches somebody")
	}
}

func TestBadRulesAreRefusedInOneLine(t *testing.T) {
	for rule, want := range map[string]string{
		"":                       "none of CN",
		"vm1":                    "none of CN",
		"cn=x":                   `no rule is called "cn"`,
		"CN=":                    "empty",
		"CN= x":                  "space",
		"DNS=*.example":          "without wildcards",
		"URI=x":                  "scheme",
		"uid=root":               "names are not looked up",
		"uid=-1":                 "not a number",
		"uid=4294967295":         "not a number",
		"gid=4294967296":         "not a number",
		"addr=10.1.2.3/8":        "the network is addr=10.0.0.0/8",
		"addr=host":              "neither an address",
		"addr=10.0.0.0/33":       "neither an address",
		"addr=::ffff:10.0.0.0/8": "", // whatever it says, it is refused
		"addr=fe80::1%eth0":      "neither an address",
	} {
		_, err := Parse(rule)
		if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%q: %v; want %q", rule, err, want)
		}
	}
	if rs, err := ParseAll([]string{"any", "nonsense"}); err == nil {
		t.Errorf("a bad one among good ones: %v", rs)
	}
}

func TestGrants(t *testing.T) {
	rules := func(list ...string) Rules {
		rs, err := ParseAll(list)
		if err != nil {
			t.Fatal(err)
		}
		return rs
	}
	one, two := Peer{Unix: true, UID: 1}, Peer{Unix: true, UID: 2}
	for name, c := range map[string]struct {
		g        Grants
		one, two Level
	}{
		"no rules":               {Grants{}, Write, Write},
		"one writes":             {Grants{Write: rules("uid=1")}, Write, None},
		"one reads":              {Grants{Read: rules("uid=1")}, Read, None},
		"one writes, all read":   {Grants{Write: rules("uid=1"), Read: rules("any")}, Write, Read},
		"the better grant rules": {Grants{Write: rules("uid=2", "uid=1"), Read: rules("uid=1")}, Write, Write},
	} {
		if a, b := c.g.Level(one), c.g.Level(two); a != c.one || b != c.two {
			t.Errorf("%s: levels %d and %d, want %d and %d", name, a, b, c.one, c.two)
		}
	}
	if rs := rules("uid=1", "addr=::/0"); !rs.Has(Cred) || !rs.Has(Addr) || rs.Has(Cert) || rs.Has(Any) {
		t.Errorf("kinds of %v", rs)
	}
}

// The kernel says who connects: here this very process.
func TestPeerOf(t *testing.T) {
	dir, err := os.MkdirTemp("", "access")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	for _, at := range [][2]string{{"unix", filepath.Join(dir, "s")}, {"tcp", "127.0.0.1:0"}} {
		ln, err := net.Listen(at[0], at[1])
		if err != nil {
			t.Fatal(err)
		}
		defer ln.Close()
		client, err := net.Dial(at[0], ln.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer client.Close()
		server, err := ln.Accept()
		if err != nil {
			t.Fatal(err)
		}
		defer server.Close()
		want := Peer{Unix: true, UID: uint32(os.Getuid()), GID: uint32(os.Getgid())}
		if at[0] == "tcp" {
			want = Peer{Addr: netip.MustParseAddr("127.0.0.1")}
		}
		if got := PeerOf(server); got != want {
			t.Errorf("%s: %+v, want %+v", at[0], got, want)
		}
	}
	a, b := net.Pipe()
	defer a.Close()
	defer b.Close()
	if got := PeerOf(a); got != (Peer{}) {
		t.Errorf("a pipe proves %+v", got)
	}
}
