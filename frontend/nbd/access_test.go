package nbd

import (
	"context"
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"

	"graindisk/frontend/nbd/nbdclient"
	"graindisk/frontend/nbd/proto"
	"graindisk/internal/access"
	"graindisk/test/pki"
)

func rulesOf(t *testing.T, list ...string) access.Rules {
	t.Helper()
	rs, err := access.ParseAll(list)
	if err != nil {
		t.Fatal(err)
	}
	return rs
}

func TestPeerCredentialsDecide(t *testing.T) {
	me, others := "uid="+strconv.Itoa(os.Getuid()), "uid="+strconv.Itoa(os.Getuid()+1)
	grants := map[string]access.Grants{
		"hidden": {Write: rulesOf(t, others)}, "mine": {Write: rulesOf(t, others, me)}, "ro": {Write: rulesOf(t, others), Read: rulesOf(t, me)},
	}
	exports := &memExports{names: []string{"hidden", "mine", "ro"}, devices: map[string]Device{
		"hidden": newMemDevice(4096), "mine": newMemDevice(4096), "ro": newMemDevice(4096),
	}}
	s := startServer(t, Options{Exports: exports, Access: func(p access.Peer, name string) access.Level { return grants[name].Level(p) }}, ListenOptions{})
	r := s.raw()
	r.expect(hexGreeting)
	r.send(`00000003 "IHAVEOPT" 00000003 00000000`)
	r.expect(hexOptReply + `00000003 00000002 00000008 00000004 "mine"` + hexOptReply + `00000003 00000002 00000006 00000002 "ro"` +
		hexOptReply + `00000003 00000001 00000000`)
	for _, opt := range []string{`00000006`, `00000007`} { // as if it did not exist
		r.send(`"IHAVEOPT" ` + opt + ` 0000000c 00000006 "hidden" 0000`)
		r.expect(hexOptReply + opt + ` 80000006 0000000e "no such export"`)
		r.send(`"IHAVEOPT" ` + opt + ` 0000000a 00000004 "none" 0000`)
		r.expect(hexOptReply + opt + ` 80000006 0000000e "no such export"`)
	}
	r.send(`"IHAVEOPT" 00000007 00000008 00000002 "ro" 0000`)
	r.expect(hexOptReply + `00000007 00000003 0000000c 0000 0000000000001000 0107` + hexOptReply + `00000007 00000001 00000000`)
	for _, cmd := range []string{`0004`, `0006`} { // TRIM, WRITE_ZEROES: not permitted, whatever the client thinks
		r.send(hexRequest + `0000 ` + cmd + ` 00000000000000aa 0000000000000000 00001000`)
		r.expect(hexSimple + `00000001 00000000000000aa`)
	}
	r.send(hexRequest + `0000 0001 00000000000000aa 0000000000000000 00000002 "hi"`)
	r.expect(hexSimple + `00000001 00000000000000aa`)
	r = s.raw()
	r.expect(hexGreeting)
	r.send(`00000003 "IHAVEOPT" 00000001 00000006 "hidden"`)
	r.expectEOF()

	if c, err := s.dial(nbdclient.Options{}, "mine"); err != nil || c.Info().Flags&proto.FlagReadOnly != 0 {
		t.Errorf("a disk of one's own: %v", err)
	}
	if _, err := s.dial(nbdclient.Options{}, ""); err == nil {
		t.Error("there is a default export among two")
	}
}

// The only disk that a client may open is its default export; how many others there are is not told.
func TestTheDefaultExportIsTheOnlyVisibleOne(t *testing.T) {
	exports := &memExports{names: []string{"a", "b"}, devices: map[string]Device{"a": newMemDevice(4096), "b": newMemDevice(8192)}}
	s := startServer(t, Options{Exports: exports, Access: func(_ access.Peer, name string) access.Level {
		if name == "b" {
			return access.Write
		}
		return access.None
	}}, ListenOptions{})
	if c, err := s.dial(nbdclient.Options{}, ""); err != nil || c.Size() != 8192 {
		t.Error(err)
	}
}

func TestTheListenersRules(t *testing.T) {
	ca := pki.NewCA(t, "ca")
	me := "uid=" + strconv.Itoa(os.Getuid())
	vm1, vm2 := ca.ClientConfig(t, ca.Client(t, "vm1")), ca.ClientConfig(t, ca.Client(t, "vm2"))
	for name, c := range map[string]struct {
		allow           []string
		tls             bool
		hangUp          bool // before a word
		plain, vm1, vm2 bool // may open the disk
	}{
		"all by default":             {nil, true, false, true, true, true},
		"this user":                  {[]string{me}, true, false, true, true, true},
		"another user":               {[]string{"uid=4000000000"}, true, true, false, false, false},
		"TCP clients":                {[]string{"addr=0.0.0.0/0", "addr=::/0"}, true, true, false, false, false},
		"one certificate":            {[]string{"CN=vm1"}, true, false, false, true, false},
		"a certificate without TLS":  {[]string{"CN=vm1"}, false, true, false, false, false},
		"another user, or a name":    {[]string{"uid=4000000000", "CN=vm2"}, true, false, false, false, true},
		"everybody, by a rule of it": {[]string{"any"}, true, false, true, true, true},
	} {
		t.Run(name, func(t *testing.T) {
			lo := ListenOptions{Allow: rulesOf(t, c.allow...)}
			if c.tls {
				lo.TLS = tlsOf(t, ca, t.TempDir(), true, nil)
			}
			s := startServer(t, Options{Exports: oneExport(newMemDevice(4096))}, lo)
			if c.hangUp {
				s.raw().expectEOF()
				return
			}
			for _, x := range []struct {
				o    nbdclient.Options
				want bool
			}{{nbdclient.Options{}, c.plain}, {nbdclient.Options{TLS: vm1}, c.vm1}, {nbdclient.Options{TLS: vm2}, c.vm2}} {
				if _, err := s.dial(x.o, "disk"); (err == nil) != x.want || err != nil && !strings.Contains(err.Error(), "no such export") {
					t.Errorf("opened with TLS %v: %v; want %v", x.o.TLS != nil, err, x.want)
				}
			}
		})
	}
}

// When the rules change, who may do less than before is cut off, and the others stay.
func TestRecheckCutsOffWhoMayDoLess(t *testing.T) {
	var levels [3]atomic.Uint32 // of a, b, c
	exports := &memExports{names: []string{"a", "b", "c"}, devices: map[string]Device{
		"a": newMemDevice(4096), "b": newMemDevice(4096), "c": newMemDevice(4096),
	}}
	s := startServer(t, Options{Exports: exports, Access: func(_ access.Peer, name string) access.Level {
		return access.Level(levels[name[0]-'a'].Load())
	}}, ListenOptions{})
	levels[0].Store(uint32(access.Write))
	levels[1].Store(uint32(access.Write))
	levels[2].Store(uint32(access.Read))
	clients := map[string]*nbdclient.Client{}
	for _, name := range exports.names {
		c, err := s.dial(nbdclient.Options{}, name)
		if err != nil {
			t.Fatal(err)
		}
		clients[name] = c
	}
	haggling := s.raw()
	haggling.expect(hexGreeting)
	ctx := context.Background()
	s.Recheck() // nothing has changed
	for name, c := range clients {
		if err := c.Flush(ctx); err != nil {
			t.Errorf("%s, before the change: %v", name, err)
		}
	}
	levels[0].Store(uint32(access.Read))
	levels[1].Store(uint32(access.Write))
	levels[2].Store(uint32(access.Write))
	s.Recheck()
	if err := clients["a"].Flush(ctx); err == nil {
		t.Error("a client that may no longer write goes on")
	}
	if err := clients["b"].Flush(ctx); err != nil {
		t.Errorf("a client whose rules are the same: %v", err)
	}
	if err := clients["c"].WriteAt(ctx, []byte("x"), 0, false); err == nil || !strings.Contains(err.Error(), "EPERM") {
		t.Errorf("a client that connected to read writes: %v", err)
	}
	haggling.send(`00000003 "IHAVEOPT" 00000003 00000000`)
	haggling.expect(hexOptReply + `00000003 00000002`)
}
