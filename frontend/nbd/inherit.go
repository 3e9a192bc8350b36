package nbd

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Socket is a listening socket and the address it was configured with, such as tcp://127.0.0.1:0.
type Socket struct {
	Address  string
	Listener net.Listener
	// Unlink says that the file of a unix socket is its owner's to remove when it closes the
	// listener for good. One that systemd opened is not.
	Unlink bool
}

// Inherited are listening sockets that another process opened. Those that nobody takes are closed
// by Close. It is used by one goroutine.
type Inherited struct {
	sockets []Socket
}

// listenFDsStart is the first file descriptor that systemd passes: sd_listen_fds(3).
const listenFDsStart = 3

// Activated returns the sockets that systemd has opened for this process, if LISTEN_PID and
// LISTEN_FDS say that there are some. It takes the variables away, so that no child believes them,
// and can be asked once.
func Activated() (*Inherited, error) {
	pid, fds := os.Getenv("LISTEN_PID"), os.Getenv("LISTEN_FDS")
	for _, name := range []string{"LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"} {
		if err := os.Unsetenv(name); err != nil {
			return nil, fmt.Errorf("nbd: socket activation: %w", err)
		}
	}
	in := new(Inherited)
	if pid != strconv.Itoa(os.Getpid()) {
		return in, nil // meant for another process, or for none
	}
	n, err := strconv.Atoi(fds)
	if err != nil || n < 0 || n > 1024 {
		return nil, fmt.Errorf("nbd: socket activation: LISTEN_FDS is %q", fds)
	}
	for fd := listenFDsStart; fd < listenFDsStart+n; fd++ {
		if err := in.add(fd, "", false); err != nil {
			in.Close()
			return nil, fmt.Errorf("nbd: socket activation: file descriptor %d: %w", fd, err)
		}
		_ = unix.Close(fd)
	}
	return in, nil
}

// add makes a copy of fd, if it is a listening socket, and leaves fd itself alone: it may be anything.
func (in *Inherited) add(fd int, address string, unlink bool) error {
	if on, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ACCEPTCONN); err != nil || on == 0 {
		return errors.New("not a listening socket")
	}
	own, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return err
	}
	f := os.NewFile(uintptr(own), "inherited socket")
	defer func() { _ = f.Close() }() // FileListener makes a copy, too
	ln, err := net.FileListener(f)
	if err != nil {
		return err
	}
	in.sockets = append(in.sockets, Socket{address, ln, unlink})
	return nil
}

// Take returns the socket for an address as Listen takes it, nil if none is there: the one that was
// configured with the same address, else the one that is bound to it. The caller then owns it.
func (in *Inherited) Take(address string) *Socket {
	if in == nil {
		return nil
	}
	for _, fits := range []func(Socket) bool{
		func(s Socket) bool { return s.Address == address },
		func(s Socket) bool { return s.Address == "" && boundTo(s.Listener.Addr(), address) },
	} {
		for i, s := range in.sockets {
			if fits(s) {
				in.sockets = append(in.sockets[:i:i], in.sockets[i+1:]...)
				s.Address = address
				if ln, ok := s.Listener.(*net.UnixListener); ok {
					ln.SetUnlinkOnClose(s.Unlink)
				}
				return &s
			}
		}
	}
	return nil
}

// boundTo says whether a listener's address is the one configured. All unspecified addresses count
// as the same.
func boundTo(have net.Addr, address string) bool {
	network, want, _ := strings.Cut(address, "://")
	if network != have.Network() {
		return false
	}
	if network == "unix" {
		return filepath.Clean(have.String()) == filepath.Clean(want)
	}
	a, err := net.ResolveTCPAddr("tcp", want)
	h, ok := have.(*net.TCPAddr)
	if err != nil || !ok || a.Port != h.Port {
		return false
	}
	x, y := a.AddrPort().Addr(), h.AddrPort().Addr()
	return anyAddr(x) && anyAddr(y) || x.IsValid() && y.IsValid() && x.Unmap() == y.Unmap()
}

func anyAddr(a netip.Addr) bool { return !a.IsValid() || a.Unmap().IsUnspecified() }

// Rest are the addresses of the sockets that nobody has taken.
func (in *Inherited) Rest() []string {
	if in == nil {
		return nil
	}
	var rest []string
	for _, s := range in.sockets {
		if s.Address == "" {
			s.Address = s.Listener.Addr().Network() + "://" + s.Listener.Addr().String()
		}
		rest = append(rest, s.Address)
	}
	return rest
}

// Close closes what nobody has taken, and removes the files that are then nobody's.
func (in *Inherited) Close() {
	if in == nil {
		return
	}
	for _, s := range in.sockets {
		if ln, ok := s.Listener.(*net.UnixListener); ok {
			ln.SetUnlinkOnClose(s.Unlink)
		}
		_ = s.Listener.Close()
	}
	in.sockets = nil
}

const (
	passVersion  = 1
	passBytesMax = 64 << 10
	passMax      = 64 // sockets in one message; the kernel takes 253
)

// passed is the one message between two gateways, JSON with the sockets beside it (SCM_RIGHTS) in
// the same order.
type passed struct {
	Version int            `json:"version"`
	Sockets []passedSocket `json:"sockets"`
}

type passedSocket struct {
	Address string `json:"address"`
	Unlink  bool   `json:"unlink,omitempty"`
}

// Pass sends copies of the sockets over conn. They stay open here: both processes may accept until
// one closes its own.
func Pass(conn *net.UnixConn, sockets []Socket) error {
	if len(sockets) == 0 || len(sockets) > passMax {
		return fmt.Errorf("nbd: pass %d sockets: 1 to %d can be passed", len(sockets), passMax)
	}
	m := passed{Version: passVersion}
	var fds []int
	for _, s := range sockets {
		sock, ok := s.Listener.(interface{ File() (*os.File, error) })
		if !ok {
			return fmt.Errorf("nbd: pass %s: not a socket of the system", s.Address)
		}
		f, err := sock.File()
		if err != nil {
			return fmt.Errorf("nbd: pass %s: %w", s.Address, err)
		}
		defer func() { _ = f.Close() }() // after it was sent
		// Not f.Fd: that puts the socket, which both processes share, in blocking mode.
		rc, err := f.SyscallConn()
		if err == nil {
			err = rc.Control(func(fd uintptr) { fds = append(fds, int(fd)) })
		}
		if err != nil {
			return fmt.Errorf("nbd: pass %s: %w", s.Address, err)
		}
		m.Sockets = append(m.Sockets, passedSocket{s.Address, s.Unlink})
	}
	text, err := json.Marshal(m)
	if err == nil && len(text) > passBytesMax {
		err = errors.New("the addresses are too long")
	}
	if err == nil {
		_, _, err = conn.WriteMsgUnix(text, unix.UnixRights(fds...), nil)
	}
	if err != nil {
		return fmt.Errorf("nbd: pass sockets: %w", err)
	}
	return nil
}

// Receive takes the sockets that Pass sends.
func Receive(conn *net.UnixConn) (*Inherited, error) {
	text, oob := make([]byte, passBytesMax), make([]byte, unix.CmsgSpace(4*passMax))
	n, oobn, flags, _, err := conn.ReadMsgUnix(text, oob)
	if err != nil {
		return nil, fmt.Errorf("nbd: receive sockets: %w", err)
	}
	fds, err := rights(oob[:oobn])
	in := new(Inherited)
	defer func() {
		for _, fd := range fds {
			_ = unix.Close(fd)
		}
	}()
	fail := func(err error) (*Inherited, error) {
		in.Close()
		return nil, fmt.Errorf("nbd: receive sockets: %w", err)
	}
	var m passed
	switch {
	case err != nil:
		return fail(err)
	case flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0:
		return fail(errors.New("the message is too long"))
	}
	if err := json.Unmarshal(text[:n], &m); err != nil {
		return fail(err)
	}
	if m.Version != passVersion || len(m.Sockets) != len(fds) || len(fds) == 0 {
		return fail(fmt.Errorf("version %d, %d addresses, %d sockets", m.Version, len(m.Sockets), len(fds)))
	}
	for i, s := range m.Sockets {
		if err := in.add(fds[i], s.Address, s.Unlink); err != nil {
			return fail(fmt.Errorf("%s: %w", s.Address, err))
		}
	}
	return in, nil
}

// rights are the descriptors in a control message; the caller closes them.
func rights(oob []byte) ([]int, error) {
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, err
	}
	var fds []int
	for _, m := range messages {
		got, err := unix.ParseUnixRights(&m)
		if err != nil {
			return fds, err
		}
		fds = append(fds, got...)
	}
	return fds, nil
}
