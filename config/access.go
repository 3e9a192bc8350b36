package config

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"maps"
	"os"
	"slices"

	"graindisk/internal/access"
)

// checkTLS checks what a listener says of TLS, and that the files are there and whole.
func checkTLS(col *collector, at string, l Listener) {
	if l.Mode != "" {
		if _, err := parseMode(l.Mode); err != nil {
			col.add(Problem{Key: at + ".mode", Value: l.Mode, Msg: err.Error()})
		} else if l.Network() == "tcp" {
			col.add(Problem{Key: at + ".mode", Value: l.Mode, Msg: "only a unix socket has a mode"})
		}
	}
	for _, f := range []struct{ key, path string }{{"certificate", l.Certificate}, {"key", l.Key}, {"client_ca", l.ClientCA}} {
		switch {
		case l.TLS != "" && l.TLS != TLSOff:
			if f.key != "client_ca" || f.path != "" {
				checkAbs(col, at+"."+f.key, f.path)
			}
		case f.path != "" && !col.bad(at+".tls"):
			col.add(Problem{Key: at + "." + f.key, Value: f.path, Msg: "is of no use without TLS", Hint: "set tls: require"})
		}
	}
	if l.TLS == "" || l.TLS == TLSOff {
		return
	}
	if col.bad(at+".certificate") || col.bad(at+".key") || col.bad(at+".client_ca") {
		return
	}
	if _, err := tls.LoadX509KeyPair(l.Certificate, l.Key); err != nil {
		col.add(Problem{Key: at + ".certificate", Value: l.Certificate, Msg: fmt.Sprintf("with key %s: %v", l.Key, err)})
	}
	if l.ClientCA == "" {
		return
	}
	if text, err := os.ReadFile(l.ClientCA); err != nil {
		col.add(Problem{Key: at + ".client_ca", Value: l.ClientCA, Msg: err.Error()})
	} else if !x509.NewCertPool().AppendCertsFromPEM(text) {
		col.add(Problem{Key: at + ".client_ca", Value: l.ClientCA, Msg: fmt.Sprintf("%s holds no certificate", l.ClientCA)})
	}
}

// proves says whether clients of the listener can be what rules of that kind look at.
func (l Listener) proves(k access.Kind) bool {
	switch k {
	case access.Cert:
		return l.TLS != "" && l.TLS != TLSOff && l.ClientCA != ""
	case access.Cred:
		return l.Network() == "unix"
	case access.Addr:
		return l.Network() == "tcp"
	}
	return true
}

// proofs says what a listener needs so that rules of a kind can match.
var proofs = map[access.Kind]string{
	access.Cert: "needs a listener with tls and client_ca",
	access.Cred: "needs a unix socket",
	access.Addr: "needs a tcp listener",
}

// checkRules refuses rules that can never match: a listener's own by the listener, a disk's by all of
// them. Whoever wrote one believes that it lets somebody in.
func (c *Config) checkRules(col *collector) {
	if col.bad("listen") {
		return // what is wrong there is the cause
	}
	check := func(key string, rules []Rule, on []Listener) {
		for i, text := range rules {
			at := fmt.Sprintf("%s[%d]", key, i)
			r, err := access.Parse(string(text))
			if err != nil || col.bad(at) {
				continue // reported by the walker
			}
			if !slices.ContainsFunc(on, func(l Listener) bool { return l.proves(r.Kind()) }) {
				col.add(Problem{Key: at, Value: string(text), Msg: fmt.Sprintf("%q can match nobody: it %s", text, proofs[r.Kind()])})
			}
		}
	}
	for i, l := range c.Listen.NBD {
		check(fmt.Sprintf("listen.nbd[%d].allow", i), l.Allow, []Listener{l})
	}
	for _, name := range slices.Sorted(maps.Keys(c.Pools)) {
		for i, d := range c.Pools[name].Disks {
			at := fmt.Sprintf("pools.%s.disks[%d]", name, i)
			check(at+".allow", d.Allow, c.Listen.NBD)
			check(at+".allow_read", d.AllowRead, c.Listen.NBD)
		}
	}
}
