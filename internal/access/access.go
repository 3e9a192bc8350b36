// Package access decides what a client may do, by what its connection proves of it. It knows no
// protocol and opens nothing.
//
// A rule names clients in one way; a list of rules matches a client that any of them matches:
//
//	CN=vm-host-1         the common name in the client's verified certificate
//	DNS=host.example     a DNS name among its subject alternative names, letters of either case
//	URI=spiffe://x/vm    a URI among them
//	uid=64055            the user of the process behind a unix socket, as the kernel tells it
//	gid=64055            the primary group of that process
//	addr=10.1.0.0/16     the address of a TCP client, or a network it lies in
//	any                  every client
//
// Names are compared whole: there are no wildcards. A rule about something that the connection does
// not prove (a certificate on a plain connection, a uid over TCP) matches nobody.
package access

import (
	"crypto/x509"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Peer is who a client is, as far as its connection proves it. The zero Peer proves nothing.
type Peer struct {
	Addr netip.Addr // of a TCP client; invalid if it is none
	Unix bool       // UID and GID are known
	UID  uint32
	GID  uint32
	Cert *x509.Certificate // verified; nil without one
}

// PeerOf asks the kernel who is behind sock. A certificate is for the caller to add.
func PeerOf(sock net.Conn) Peer {
	switch s := sock.(type) {
	case *net.TCPConn:
		if a, ok := s.RemoteAddr().(*net.TCPAddr); ok {
			return Peer{Addr: a.AddrPort().Addr().Unmap().WithZone("")}
		}
	case *net.UnixConn:
		rc, err := s.SyscallConn()
		if err != nil {
			return Peer{}
		}
		var cred *unix.Ucred
		var cerr error
		if err := rc.Control(func(fd uintptr) {
			cred, cerr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
		}); err != nil || cerr != nil {
			return Peer{}
		}
		return Peer{Unix: true, UID: cred.Uid, GID: cred.Gid}
	}
	return Peer{}
}

// LogValue tells what is known, for logs.
func (p Peer) LogValue() slog.Value {
	var as []slog.Attr
	if p.Addr.IsValid() {
		as = append(as, slog.String("addr", p.Addr.String()))
	}
	if p.Unix {
		as = append(as, slog.Uint64("uid", uint64(p.UID)), slog.Uint64("gid", uint64(p.GID)))
	}
	if p.Cert != nil {
		as = append(as, slog.String("cn", p.Cert.Subject.CommonName))
	}
	return slog.GroupValue(as...)
}

// Kind is what a rule looks at.
type Kind uint8

// The kinds of rules.
const (
	Any  Kind = iota + 1
	Cert      // the client's certificate
	Cred      // the process behind a unix socket
	Addr      // the address of a TCP client
)

// Rule names clients. Get one from Parse; the zero Rule matches nobody.
type Rule struct {
	key, value string
	id         uint32
	net        netip.Prefix
}

// Parse reads one rule as the package comment has it. Its errors are one line and say what would do.
func Parse(s string) (Rule, error) {
	key, value, ok := strings.Cut(s, "=")
	r := Rule{key: key, value: value}
	if s == "any" {
		return r, nil
	}
	if !ok {
		return Rule{}, fmt.Errorf("%q is none of CN=…, DNS=…, URI=…, uid=…, gid=…, addr=… and any", s)
	}
	if value == "" || strings.TrimSpace(value) != value {
		return Rule{}, fmt.Errorf("%q: the value is empty or has space around it", s)
	}
	switch key {
	case "CN":
		return r, nil
	case "DNS":
		if strings.Contains(value, "*") {
			return Rule{}, fmt.Errorf("%q: names are compared whole, without wildcards", s)
		}
		return r, nil
	case "URI":
		if u, err := url.Parse(value); err != nil || u.Scheme == "" {
			return Rule{}, fmt.Errorf("%q: not a URI with a scheme", s)
		}
		return r, nil
	case "uid", "gid":
		n, err := strconv.ParseUint(value, 10, 32)
		if err != nil || n == 1<<32-1 { // which stands for "none" in the kernel
			return Rule{}, fmt.Errorf("%q: not a number from 0 to %d; names are not looked up", s, uint32(1<<32-2))
		}
		r.id = uint32(n)
		return r, nil
	case "addr":
		p, err := netip.ParsePrefix(value)
		if err != nil {
			a, aerr := netip.ParseAddr(value)
			if aerr != nil || a.Zone() != "" {
				return Rule{}, fmt.Errorf("%q: neither an address such as 10.1.2.3 nor a network such as 10.1.0.0/16", s)
			}
			p = netip.PrefixFrom(a.Unmap(), a.Unmap().BitLen())
		}
		if p.Addr().Is4In6() {
			return Rule{}, fmt.Errorf("%q: write an IPv4 network as such", s)
		}
		if p != p.Masked() {
			return Rule{}, fmt.Errorf("%q: has bits beyond its length; the network is addr=%v", s, p.Masked())
		}
		r.net = p
		return r, nil
	}
	return Rule{}, fmt.Errorf("%q: no rule is called %q; there are CN, DNS, URI, uid, gid, addr and any", s, key)
}

// Kind tells what the rule looks at.
func (r Rule) Kind() Kind {
	switch r.key {
	case "any":
		return Any
	case "uid", "gid":
		return Cred
	case "addr":
		return Addr
	}
	return Cert
}

// Match says whether the rule names p.
func (r Rule) Match(p Peer) bool {
	switch r.key {
	case "any":
		return true
	case "CN":
		return p.Cert != nil && p.Cert.Subject.CommonName == r.value
	case "DNS":
		return p.Cert != nil && slices.ContainsFunc(p.Cert.DNSNames, func(n string) bool { return strings.EqualFold(n, r.value) })
	case "URI":
		return p.Cert != nil && slices.ContainsFunc(p.Cert.URIs, func(u *url.URL) bool { return u.String() == r.value })
	case "uid":
		return p.Unix && p.UID == r.id
	case "gid":
		return p.Unix && p.GID == r.id
	case "addr":
		return p.Addr.IsValid() && r.net.Contains(p.Addr)
	}
	return false
}

// Rules match a client that any of them matches; an empty list matches nobody.
type Rules []Rule

// ParseAll reads a list of rules.
func ParseAll[S ~string](list []S) (Rules, error) {
	var rs Rules
	for _, s := range list {
		r, err := Parse(string(s))
		if err != nil {
			return nil, err
		}
		rs = append(rs, r)
	}
	return rs, nil
}

// Match says whether any rule names p.
func (rs Rules) Match(p Peer) bool {
	return slices.ContainsFunc(rs, func(r Rule) bool { return r.Match(p) })
}

// Has says whether a rule of that kind is among them.
func (rs Rules) Has(k Kind) bool {
	return slices.ContainsFunc(rs, func(r Rule) bool { return r.Kind() == k })
}

// Level is what a client may do with a disk.
type Level uint8

// The levels, each including those before it.
const (
	None Level = iota
	Read
	Write
)

// Grants are the rules of one disk. Without any rule every client may write.
type Grants struct {
	Write, Read Rules
}

// Level is what p may do.
func (g Grants) Level(p Peer) Level {
	switch {
	case len(g.Write) == 0 && len(g.Read) == 0, g.Write.Match(p):
		return Write
	case g.Read.Match(p):
		return Read
	}
	return None
}
