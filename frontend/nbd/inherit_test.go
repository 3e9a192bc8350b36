package nbd

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"graindisk/frontend/nbd/nbdclient"
)

// shortDir is a folder for sockets, whose paths must be short.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "nbd")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

// unixPair is a connection between two ends of one process.
func unixPair(t *testing.T) (a, b *net.UnixConn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var ends []*net.UnixConn
	for _, fd := range fds {
		f := os.NewFile(uintptr(fd), "pair")
		c, err := net.FileConn(f)
		_ = f.Close()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Close() })
		ends = append(ends, c.(*net.UnixConn))
	}
	return ends[0], ends[1]
}

func mustListen(t *testing.T, address string) Socket {
	t.Helper()
	ln, err := Listen(address, true)
	if err != nil {
		t.Fatal(err)
	}
	return Socket{Address: address, Listener: ln, Unlink: true}
}

// One server passes its sockets on, finishes, and another serves them: nobody is refused in between,
// and whoever connects meanwhile waits in the queue.
func TestSocketsArePassedOn(t *testing.T) {
	path := filepath.Join(shortDir(t), "s")
	d := newMemDevice(4096)
	serve := func(socks ...*Socket) (s *Server, served chan error) {
		s, err := New(Options{Exports: oneExport(d)})
		if err != nil {
			t.Fatal(err)
		}
		served = make(chan error, len(socks))
		for _, x := range socks {
			go func() { served <- s.Serve(context.Background(), x.Listener, ListenOptions{}) }()
		}
		return s, served
	}
	stop := func(s *Server, served chan error, n int) {
		t.Helper()
		if err := s.Shutdown(context.Background()); err != nil {
			t.Error(err)
		}
		for range n {
			if err := within(t, "the end of Serve", served); !errors.Is(err, ErrShutdown) {
				t.Errorf("serve: %v", err)
			}
		}
	}
	u, tcp := mustListen(t, "unix://"+path), mustListen(t, "tcp://127.0.0.1:0")
	uris := []string{URI(u.Listener.Addr(), "disk"), URI(tcp.Listener.Addr(), "disk")}
	socks := []Socket{u, tcp}
	for round := range 3 {
		server, served := serve(&socks[0], &socks[1])
		for _, uri := range uris {
			c, err := nbdclient.Dial(context.Background(), uri, nbdclient.Options{})
			if err != nil {
				t.Fatalf("round %d: %v", round, err)
			}
			if err := c.WriteAt(context.Background(), []byte{byte(round)}, 0, false); err != nil {
				t.Error(err)
			}
			_ = c.Close()
		}
		a, b := unixPair(t)
		if err := Pass(a, socks); err != nil {
			t.Fatal(err)
		}
		in, err := Receive(b)
		if err != nil {
			t.Fatal(err)
		}
		socks[0].Listener.(*net.UnixListener).SetUnlinkOnClose(false)
		stop(server, served, 2)
		// Now nobody accepts; a client waits all the same.
		waiting := make(chan error, 1)
		go func() {
			c, err := nbdclient.Dial(context.Background(), uris[0], nbdclient.Options{})
			if err == nil {
				err = c.Close()
			}
			waiting <- err
		}()
		if rest := in.Rest(); !slices.Equal(rest, []string{"unix://" + path, "tcp://127.0.0.1:0"}) {
			t.Errorf("received %q", rest)
		}
		if in.Take("tcp://127.0.0.1:1") != nil || in.Take("unix://"+path+"x") != nil {
			t.Error("took a socket of another address")
		}
		for i, s := range socks {
			x := in.Take(s.Address)
			if x == nil {
				t.Fatalf("%s did not come", s.Address)
			}
			socks[i] = *x
		}
		if in.Take("unix://"+path) != nil || len(in.Rest()) > 0 {
			t.Error("a socket was taken twice")
		}
		in.Close()
		server, served = serve(&socks[0], &socks[1])
		if err := within(t, "the waiting client", waiting); err != nil {
			t.Errorf("a client that connected in between: %v", err)
		}
		if round == 2 {
			stop(server, served, 2)
			break
		}
		a, b = unixPair(t)
		if err := Pass(a, socks); err != nil {
			t.Fatal(err)
		}
		if in, err = Receive(b); err != nil {
			t.Fatal(err)
		}
		socks[0].Listener.(*net.UnixListener).SetUnlinkOnClose(false)
		stop(server, served, 2)
		socks = []Socket{*in.Take(socks[0].Address), *in.Take(socks[1].Address)}
	}
	if _, err := os.Stat(path); !os.IsNotExist(err) {
		t.Errorf("the last owner left the socket's file: %v", err)
	}
	if d.contents()[0] != 2 {
		t.Errorf("the last write is %d", d.contents()[0])
	}
}

// What nobody takes is closed, and its file goes with it if it was the process's own.
func TestUntakenSocketsAreClosed(t *testing.T) {
	dir := shortDir(t)
	own, systemds := mustListen(t, "unix://"+dir+"/own"), mustListen(t, "unix://"+dir+"/systemd")
	systemds.Unlink = false
	a, b := unixPair(t)
	if err := Pass(a, []Socket{own, systemds}); err != nil {
		t.Fatal(err)
	}
	in, err := Receive(b)
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range []Socket{own, systemds} {
		s.Listener.(*net.UnixListener).SetUnlinkOnClose(false)
		_ = s.Listener.Close()
	}
	in.Close()
	if _, err := net.Dial("unix", dir+"/systemd"); err == nil {
		t.Error("somebody still listens")
	}
	for name, want := range map[string]bool{"own": false, "systemd": true} {
		if _, err := os.Stat(filepath.Join(dir, name)); (err == nil) != want {
			t.Errorf("%s is there: %v, want %v", name, err == nil, want)
		}
	}
}

func TestBadMessagesAreRefused(t *testing.T) {
	ln := mustListen(t, "tcp://127.0.0.1:0")
	defer func() { _ = ln.Listener.Close() }()
	f, err := ln.Listener.(*net.TCPListener).File()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	plain, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = plain.Close() }()
	text := func(version, n int) string {
		m := passed{Version: version, Sockets: make([]passedSocket, n)}
		p, err := json.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		return string(p)
	}
	before := openFiles(t)
	for name, c := range map[string]struct {
		text string
		fds  []int
	}{
		"no sockets":               {text(1, 0), nil},
		"an address too many":      {text(1, 2), []int{int(f.Fd())}},
		"a socket too many":        {text(1, 1), []int{int(f.Fd()), int(f.Fd())}},
		"no text":                  {"x", []int{int(f.Fd())}},
		"another version":          {text(2, 1), []int{int(f.Fd())}},
		"a file that is no socket": {text(1, 2), []int{int(f.Fd()), int(plain.Fd())}},
	} {
		a, b := unixPair(t)
		if _, _, err := a.WriteMsgUnix([]byte(c.text), unix.UnixRights(c.fds...), nil); err != nil {
			t.Fatal(err)
		}
		if in, err := Receive(b); err == nil {
			t.Errorf("%s: %q was taken", name, in.Rest())
		}
		_, _ = a.Close(), b.Close()
	}
	a, b := unixPair(t)
	_ = a.Close()
	if _, err := Receive(b); err == nil {
		t.Error("the end of the connection was taken for sockets")
	}
	_ = b.Close()
	if after := openFiles(t); after > before {
		t.Errorf("%d files are open, %d were before", after, before)
	}
	if err := Pass(a, nil); err == nil {
		t.Error("nothing was passed")
	}
}

func openFiles(t *testing.T) int {
	t.Helper()
	names, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(names)
}

func TestBoundTo(t *testing.T) {
	for _, c := range []struct {
		have    net.Addr
		address string
		want    bool
	}{
		{&net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 9}, "tcp://127.0.0.1:9", true},
		{&net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 9}, "tcp://127.0.0.1:8", false},
		{&net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 9}, "tcp://:9", false},
		{&net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 9}, "unix:///127.0.0.1:9", false},
		{&net.TCPAddr{IP: net.IPv6unspecified, Port: 9}, "tcp://0.0.0.0:9", true},
		{&net.TCPAddr{IP: net.IPv6unspecified, Port: 9}, "tcp://:9", true},
		{&net.TCPAddr{IP: net.IPv6loopback, Port: 9}, "tcp://[::1]:9", true},
		{&net.UnixAddr{Name: "/run/x", Net: "unix"}, "unix:///run/./x", true},
		{&net.UnixAddr{Name: "/run/x", Net: "unix"}, "unix:///run/y", false},
	} {
		if got := boundTo(c.have, c.address); got != c.want {
			t.Errorf("%s is %s: %v", c.have, c.address, got)
		}
	}
}

// TestActivation runs this test again as systemd would run a service. The child is the same binary
// with activationEnv set.
func TestActivation(t *testing.T) {
	if os.Getenv(activationEnv) != "" {
		activated(t)
		return
	}
	dir := shortDir(t)
	u, tcp := mustListen(t, "unix://"+dir+"/s"), mustListen(t, "tcp://127.0.0.1:0")
	var files []*os.File
	for _, s := range []Socket{u, tcp} {
		f, err := s.Listener.(interface{ File() (*os.File, error) }).File()
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = f.Close() }()
		files = append(files, f)
	}
	var wg sync.WaitGroup
	for _, env := range []string{"", "LISTEN_PID=1 LISTEN_FDS=2", "LISTEN_PID=$$ LISTEN_FDS=2", "LISTEN_PID=$$ LISTEN_FDS=3", "LISTEN_PID=$$ LISTEN_FDS=x"} {
		wg.Go(func() {
			cmd := exec.Command("sh", "-c", env+` exec "$0" -test.run '^TestActivation$' -test.v`, os.Args[0])
			cmd.Env = append(os.Environ(), activationEnv+"="+dir+" tcp://"+tcp.Listener.Addr().String()+" "+env)
			cmd.ExtraFiles = files
			if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), "the child has looked") {
				t.Errorf("%q: %v\n%s", env, err, out)
			}
		})
	}
	wg.Wait()
	_ = tcp.Listener.Close()
	_ = u.Listener.Close()
}

const activationEnv = "GRAINDISK_TEST_ACTIVATION"

func activated(t *testing.T) {
	dir, rest, _ := strings.Cut(os.Getenv(activationEnv), " ")
	tcp, env, _ := strings.Cut(rest, " ")
	in, err := Activated()
	if strings.HasSuffix(env, "=3") || strings.HasSuffix(env, "=x") {
		if err == nil {
			t.Errorf("%s gave %q", env, in.Rest())
		}
	} else if err != nil {
		t.Fatal(err)
	} else if strings.Contains(env, "$$") {
		u, v := in.Take("unix://"+dir+"/s"), in.Take(tcp)
		if u == nil || v == nil {
			t.Fatalf("took %v and %v, left %q", u, v, in.Rest())
		}
		if u.Unlink {
			t.Error("the file of systemd's socket would be removed")
		}
		_ = v.Listener.Close()
		_ = u.Listener.Close()
		if _, err := os.Stat(dir + "/s"); err != nil {
			t.Error(err)
		}
	} else if len(in.Rest()) > 0 {
		t.Errorf("%q gave %q", env, in.Rest())
	}
	for _, name := range []string{"LISTEN_PID", "LISTEN_FDS"} {
		if v, ok := os.LookupEnv(name); ok {
			t.Errorf("%s is still %q", name, v)
		}
	}
	again, err := Activated()
	if err != nil || len(again.Rest()) > 0 {
		t.Errorf("asked again: %v, %v", again, err)
	}
	fmt.Println("the child has looked")
}

// A client that shakes hands when the server begins to shut down gets to the end of that, and then sees
// its connection close, as all others do.
func TestShutdownLetsHandshakesFinish(t *testing.T) {
	s := startServer(t, Options{Exports: oneExport(newMemDevice(1 << 20))}, ListenOptions{})
	s.grace = testTimeout
	r := s.raw()
	r.expect(hexGreeting)
	down := make(chan error, 1)
	go func() { down <- s.Shutdown(context.Background()) }()
	for !s.isDraining() {
		time.Sleep(time.Millisecond)
	}
	r.send(`00000003 "IHAVEOPT" 00000007 0000000a 00000004 "disk" 0000`)
	r.expect(hexOptReply + `00000007 00000003 0000000c 0000 0000000000100000 016d` + hexOptReply + `00000007 00000001 00000000`)
	r.expectEOF()
	_ = r.Close()
	if err := within(t, "shutdown", down); err != nil {
		t.Error(err)
	}

	// One that was accepted just then has said nothing yet.
	a, b := unixPair(t)
	_ = b.SetDeadline(time.Now().Add(testTimeout))
	late := newConn(context.Background(), s.Server, a, ListenOptions{})
	late.drain()
	served := make(chan struct{})
	go func() {
		defer close(served)
		late.serve()
	}()
	raw{t, b}.goDisk(false)
	raw{t, b}.expectEOF()
	_ = b.Close()
	<-served

	s = startServer(t, Options{Exports: oneExport(newMemDevice(1 << 20))}, ListenOptions{})
	s.grace = time.Millisecond
	silent := s.raw()
	silent.expect(hexGreeting)
	if err := s.Shutdown(context.Background()); err != nil { // does not wait for it
		t.Error(err)
	}
	silent.expectEOF()
}
