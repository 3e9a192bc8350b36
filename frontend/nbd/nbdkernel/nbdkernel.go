// Package nbdkernel hands NBD connections to the Linux kernel's client, which makes /dev/nbdN of them.
// It speaks generic netlink (linux/nbd-netlink.h), so that no process has to lend the kernel a thread, and
// a connection that has died can be replaced under a device that is in use.
//
// All integers are in the host's byte order, every part is padded to 4 bytes:
//
//	0      4      6     8     12    16    17    18   20
//	+------+------+-----+-----+-----+-----+-----+----+---------------+
//	| len  | type | flg | seq | pid | cmd | ver | 0  | attributes …  |  request and answer
//	+------+------+-----+-----+-----+-----+-----+----+---------------+
//	0     2      4
//	+-----+------+----------+
//	| len | type | data …   |  attribute; data may be attributes again
//	+-----+------+----------+
package nbdkernel

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"net"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// ErrNoKernel means that the kernel has no NBD client now.
var ErrNoKernel = errors.New("this kernel has no NBD client: load it with \"modprobe nbd\" as root, or use a kernel with CONFIG_BLK_DEV_NBD")

// ErrDetached means that the device has no connection that could be replaced: somebody has detached it.
var ErrDetached = errors.New("the device is detached")

// AnyDevice lets the kernel choose a free device.
const AnyDevice = -1

// Device is what the kernel is told of an export.
type Device struct {
	Index     int    // N of /dev/nbdN, or AnyDevice
	Size      int64  // bytes
	BlockSize int    // bytes, a power of two from 512 to 4096
	Flags     uint16 // transmission flags, as the server sent them
	// ReconnectDelay is how long requests wait for Reconnect once the connection is dead, before
	// they fail; whole seconds.
	ReconnectDelay time.Duration
}

const (
	familyName = "nbd"

	cmdConnect     = 1
	cmdDisconnect  = 2
	cmdReconfigure = 3

	attrIndex           = 1
	attrSize            = 2
	attrBlockSize       = 3
	attrServerFlags     = 5
	attrSockets         = 7
	attrDeadConnTimeout = 8

	attrSockItem = 1
	attrSockFD   = 1
)

// Conn talks to the kernel's NBD client. It is used by one goroutine.
type Conn struct {
	fd     int
	family uint16
	seq    uint32
}

// Open finds the kernel's NBD client; ErrNoKernel if there is none.
func Open() (*Conn, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_GENERIC)
	if err != nil {
		return nil, fmt.Errorf("nbd: %w: %w", ErrNoKernel, err)
	}
	c := &Conn{fd: fd}
	tv := unix.NsecToTimeval(int64(10 * time.Second)) // the kernel answers at once
	err = errors.Join(
		unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}),
		unix.Connect(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}), // to the kernel, and to nobody else
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv))
	if err == nil {
		err = c.findFamily()
	}
	if err != nil {
		_ = unix.Close(fd)
		return nil, fmt.Errorf("nbd: %w", err)
	}
	return c, nil
}

// Close leaves devices as they are.
func (c *Conn) Close() error { return unix.Close(c.fd) }

func (c *Conn) findFamily() error {
	attrs, err := c.ask(unix.GENL_ID_CTRL, unix.CTRL_CMD_GETFAMILY, str(unix.CTRL_ATTR_FAMILY_NAME, familyName))
	if errors.Is(err, unix.ENOENT) {
		return ErrNoKernel
	}
	if err != nil {
		return fmt.Errorf("ask for the kernel's NBD client: %w", err)
	}
	id, ok := attrs[unix.CTRL_ATTR_FAMILY_ID]
	if !ok || len(id) != 2 {
		return fmt.Errorf("the kernel names no NBD client: %x", id)
	}
	c.family = binary.NativeEndian.Uint16(id)
	return nil
}

// Connect makes a device of sock, on which the handshake is done, and returns its index. The kernel
// has its own hold on the socket: the caller may close it, or keep it to see the connection die.
func (c *Conn) Connect(d Device, sock net.Conn) (index int, err error) {
	err = withFD(sock, func(fd int) error {
		attrs := [][]byte{
			u64(attrSize, uint64(d.Size)), u64(attrBlockSize, uint64(d.BlockSize)), u64(attrServerFlags, uint64(d.Flags)),
			u64(attrDeadConnTimeout, uint64(d.ReconnectDelay/time.Second)), sockets(fd),
		}
		if d.Index != AnyDevice {
			attrs = append(attrs, u32(attrIndex, uint32(d.Index)))
		}
		got, err := c.ask(c.family, cmdConnect, attrs...)
		if err != nil {
			return err
		}
		p, ok := got[attrIndex]
		if !ok || len(p) != 4 {
			return fmt.Errorf("the kernel did not name the device: %x", p)
		}
		index = int(binary.NativeEndian.Uint32(p))
		return nil
	})
	switch {
	case errors.Is(err, unix.EPERM):
		err = fmt.Errorf("only root may attach devices: %w", err)
	case errors.Is(err, unix.EBUSY):
		err = fmt.Errorf("/dev/nbd%d is in use: %w", d.Index, err)
	}
	if err != nil {
		return 0, fmt.Errorf("nbd: attach: %w", err)
	}
	return index, nil
}

// Reconnect puts sock in the place of a dead connection of the device. ErrDetached if the device has
// none any more; while the kernel has not yet seen the death of the old one, an error that is ENOSPC.
func (c *Conn) Reconnect(index int, sock net.Conn) error {
	err := withFD(sock, func(fd int) error {
		_, err := c.ask(c.family, cmdReconfigure, u32(attrIndex, uint32(index)), sockets(fd))
		return err
	})
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENODEV) {
		return ErrDetached
	}
	if err != nil {
		return fmt.Errorf("nbd: reconnect /dev/nbd%d: %w", index, err)
	}
	return nil
}

// Disconnect ends a device's connections and waits for what is under way. ErrDetached if it has none.
func (c *Conn) Disconnect(index int) error {
	_, err := c.ask(c.family, cmdDisconnect, u32(attrIndex, uint32(index)))
	switch {
	case errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENODEV):
		return ErrDetached
	case errors.Is(err, unix.EPERM):
		return fmt.Errorf("nbd: only root may detach devices: %w", err)
	case err != nil:
		return fmt.Errorf("nbd: detach /dev/nbd%d: %w", index, err)
	}
	return nil
}

// withFD calls f with the number of sock's descriptor, which stays open meanwhile.
func withFD(sock net.Conn, f func(fd int) error) error {
	sc, ok := sock.(syscall.Conn)
	if !ok {
		return fmt.Errorf("%T is not a socket of the system", sock)
	}
	rc, err := sc.SyscallConn()
	if err != nil {
		return err
	}
	var inner error
	err = rc.Control(func(fd uintptr) { inner = f(int(fd)) })
	return errors.Join(err, inner)
}

// ask sends one command and returns the attributes of the answer, if there is one, once the kernel has
// said that it is done.
func (c *Conn) ask(family uint16, cmd uint8, attrs ...[]byte) (map[uint16][]byte, error) {
	c.seq++
	if _, err := unix.Write(c.fd, request(family, cmd, c.seq, attrs...)); err != nil {
		return nil, err
	}
	got := map[uint16][]byte{}
	buf := make([]byte, 64<<10)
	for {
		n, err := unix.Read(c.fd, buf)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return nil, err
		}
		done, err := answer(buf[:n], c.seq, got)
		if done || err != nil {
			return got, err
		}
	}
}

func request(family uint16, cmd uint8, seq uint32, attrs ...[]byte) []byte {
	p := make([]byte, unix.NLMSG_HDRLEN, 256)
	p = append(p, cmd, 1, 0, 0)
	for _, a := range attrs {
		p = append(p, a...)
	}
	binary.NativeEndian.PutUint32(p, uint32(len(p)))
	binary.NativeEndian.PutUint16(p[4:], family)
	binary.NativeEndian.PutUint16(p[6:], unix.NLM_F_REQUEST|unix.NLM_F_ACK)
	binary.NativeEndian.PutUint32(p[8:], seq)
	return p
}

var errMalformed = errors.New("malformed netlink message")

// answer reads one datagram and adds the attributes of answers to seq to got. done is the kernel's
// word that nothing follows; its refusal comes as a unix.Errno.
func answer(p []byte, seq uint32, got map[uint16][]byte) (done bool, err error) {
	for len(p) > 0 {
		if len(p) < unix.NLMSG_HDRLEN {
			return false, errMalformed
		}
		n := int64(binary.NativeEndian.Uint32(p))
		typ, its := binary.NativeEndian.Uint16(p[4:]), binary.NativeEndian.Uint32(p[8:])
		if n < unix.NLMSG_HDRLEN || n > int64(len(p)) {
			return false, errMalformed
		}
		body := p[unix.NLMSG_HDRLEN:n]
		p = p[min(align(int(n)), len(p)):]
		switch {
		case its != seq: // of an earlier command that was given up
		case typ == unix.NLMSG_ERROR:
			if len(body) < 4 {
				return false, errMalformed
			}
			if code := int32(binary.NativeEndian.Uint32(body)); code != 0 {
				if code == math.MinInt32 || code > 0 {
					return false, errMalformed
				}
				return true, unix.Errno(-code)
			}
			return true, nil
		case len(body) < unix.GENL_HDRLEN:
			return false, errMalformed
		default:
			if err := attributes(body[unix.GENL_HDRLEN:], got); err != nil {
				return false, err
			}
		}
	}
	return false, nil
}

func attributes(p []byte, got map[uint16][]byte) error {
	for len(p) > 0 {
		if len(p) < 4 {
			return errMalformed
		}
		n := int(binary.NativeEndian.Uint16(p))
		if n < 4 || n > len(p) {
			return errMalformed
		}
		got[binary.NativeEndian.Uint16(p[2:])&^(unix.NLA_F_NESTED|unix.NLA_F_NET_BYTEORDER)] = append([]byte(nil), p[4:n]...)
		p = p[min(align(n), len(p)):]
	}
	return nil
}

func align(n int) int { return (n + 3) &^ 3 }

func attr(typ uint16, data []byte) []byte {
	p := make([]byte, align(4+len(data)))
	binary.NativeEndian.PutUint16(p, uint16(4+len(data)))
	binary.NativeEndian.PutUint16(p[2:], typ)
	copy(p[4:], data)
	return p
}

func u32(typ uint16, v uint32) []byte { return attr(typ, binary.NativeEndian.AppendUint32(nil, v)) }
func u64(typ uint16, v uint64) []byte { return attr(typ, binary.NativeEndian.AppendUint64(nil, v)) }
func str(typ uint16, s string) []byte { return attr(typ, append([]byte(s), 0)) }

// sockets is the list of one socket.
func sockets(fd int) []byte {
	item := attr(attrSockItem|unix.NLA_F_NESTED, u32(attrSockFD, uint32(fd)))
	return attr(attrSockets|unix.NLA_F_NESTED, item)
}

// WaitHangup returns when the peer of sock has closed the connection, or interrupt is closed, which
// makes it return false. It reads nothing: the kernel does.
func WaitHangup(sock net.Conn, interrupt <-chan struct{}) (bool, error) {
	r, w, err := os.Pipe()
	if err != nil {
		return false, err
	}
	defer func() { _ = r.Close() }()
	stop := make(chan struct{})
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		select {
		case <-interrupt:
		case <-stop:
		}
		_ = w.Close()
	}()
	defer func() {
		close(stop)
		<-stopped
	}()
	var gone bool
	err = withFD(sock, func(fd int) error {
		rc, err := r.SyscallConn()
		if err != nil {
			return err
		}
		var perr error
		err = rc.Control(func(pipe uintptr) {
			fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLRDHUP}, {Fd: int32(pipe)}}
			for {
				_, perr = unix.Poll(fds, -1)
				if !errors.Is(perr, unix.EINTR) {
					break
				}
			}
			gone = fds[0].Revents != 0
		})
		return errors.Join(err, perr)
	})
	return gone, err
}
