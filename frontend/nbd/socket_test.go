package nbd

import (
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// TestUnixSocketHoldsALargeReply expects a connection on a unix socket to have room for 1 MiB of replies as far
// as the system allows it, and one over TCP to be left to TCP.
func TestUnixSocketHoldsALargeReply(t *testing.T) {
	s, err := New(Options{Exports: oneExport(newMemDevice(4096))})
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "nbd")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = os.RemoveAll(dir) }()
	room := func(network, address string) (before, after int) {
		ln, err := net.Listen(network, address)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = ln.Close() }()
		client, err := net.Dial(network, ln.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = client.Close() }()
		sock, err := ln.Accept()
		if err != nil {
			t.Fatal(err)
		}
		before = sendRoom(t, sock)
		c := newConn(bg, s, sock, ListenOptions{})
		after = sendRoom(t, sock)
		c.fail(errBye)
		return before, after
	}
	if before, after := room("tcp", "127.0.0.1:0"); after != before {
		t.Errorf("a TCP socket's room went from %d to %d bytes", before, after)
	}
	text, err := os.ReadFile("/proc/sys/net/core/wmem_max")
	if err != nil {
		t.Fatal(err)
	}
	most, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil {
		t.Fatal(err)
	}
	// The kernel counts its own memory too, and doubles what it is asked for.
	if _, after := room("unix", filepath.Join(dir, "s")); after < 2*min(most, 1<<20) {
		t.Errorf("a unix socket has room for %d bytes, want %d", after, 2*min(most, 1<<20))
	}
}

// sendRoom is the size of a socket's send buffer as the kernel counts it.
func sendRoom(t *testing.T, sock net.Conn) (n int) {
	t.Helper()
	raw, err := sock.(syscall.Conn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	if cerr := raw.Control(func(fd uintptr) {
		n, err = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_SNDBUF)
	}); cerr != nil || err != nil {
		t.Fatal(cerr, err)
	}
	return n
}
