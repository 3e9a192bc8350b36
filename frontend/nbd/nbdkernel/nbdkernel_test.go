package nbdkernel

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"graindisk/frontend/nbd"
	"graindisk/frontend/nbd/nbdclient"
	"graindisk/frontend/nbd/proto"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func littleEndian(t *testing.T) {
	t.Helper()
	if binary.NativeEndian.Uint16([]byte{1, 0}) != 1 {
		t.Fatal("the byte vectors of this test are those of a little-endian host")
	}
}

func bytesOf(t *testing.T, s string) []byte {
	t.Helper()
	p, err := hex.DecodeString(strings.Join(strings.Fields(s), ""))
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// Written by hand from linux/netlink.h, genetlink.h and nbd-netlink.h.
func TestRequestBytes(t *testing.T) {
	littleEndian(t)
	got := request(0x1c, cmdConnect, 7, u64(attrSize, 0x4000000), u32(attrIndex, 3), sockets(9))
	want := bytesOf(t, `38000000 1c00 0500 07000000 00000000   01 01 0000
		0c00 0200 0000000400000000   0800 0100 03000000
		1000 0780  0c00 0180  0800 0100 09000000`)
	if !bytes.Equal(got, want) {
		t.Errorf("got  %x\nwant %x", got, want)
	}
	got = request(0x10, unix.CTRL_CMD_GETFAMILY, 1, str(unix.CTRL_ATTR_FAMILY_NAME, "nbd"))
	want = bytesOf(t, `1c000000 1000 0500 01000000 00000000   03 01 0000   0800 0200 6e626400`)
	if !bytes.Equal(got, want) {
		t.Errorf("got  %x\nwant %x", got, want)
	}
}

func TestAnswers(t *testing.T) {
	littleEndian(t)
	const ack = `24000000 0200 0001 07000000 01000000   00000000  38000000 1c00 0500 07000000 00000000`
	for name, c := range map[string]struct {
		bytes string
		done  bool
		err   error
		index string // of attribute 1
	}{
		"nothing":          {``, false, nil, ""},
		"done":             {ack, true, nil, ""},
		"an index":         {`1c000000 1c00 0000 07000000 01000000  01 01 0000  0800 0100 03000000`, false, nil, "03000000"},
		"both at once":     {`1c000000 1c00 0000 07000000 01000000  01 01 0000  0800 0100 03000000` + ack, true, nil, "03000000"},
		"refused":          {`24000000 0200 0000 07000000 01000000   f0ffffff  38000000 1c00 0500 07000000 00000000`, true, unix.EBUSY, ""},
		"another's answer": {`24000000 0200 0000 06000000 01000000   f0ffffff  38000000 1c00 0500 06000000 00000000`, false, nil, ""},
		"cut":              {`24000000 0200`, false, errMalformed, ""},
		"too long":         {`25000000 0200 0000 07000000 01000000   f0ffffff  38000000 1c00 0500 07000000 00000000`, false, errMalformed, ""},
		"no code":          {`10000000 0200 0000 07000000 01000000`, false, errMalformed, ""},
		"a code above 0":   {`14000000 0200 0000 07000000 01000000 01000000`, false, errMalformed, ""},
		"a bad attribute":  {`1c000000 1c00 0000 07000000 01000000  01 01 0000  0900 0100 03000000`, false, errMalformed, ""},
	} {
		got := map[uint16][]byte{}
		done, err := answer(bytesOf(t, c.bytes), 7, got)
		if done != c.done || !errors.Is(err, c.err) || hex.EncodeToString(got[1]) != c.index {
			t.Errorf("%s: %v, %v, %x", name, done, err, got)
		}
	}
}

func FuzzAnswer(f *testing.F) {
	f.Add([]byte{0x1c, 0, 0, 0, 0x1c, 0, 0, 0, 7, 0, 0, 0, 1, 0, 0, 0, 1, 1, 0, 0, 8, 0, 1, 0, 3, 0, 0, 0})
	f.Add(request(2, 1, 7, sockets(3)))
	f.Fuzz(func(t *testing.T, p []byte) {
		got := map[uint16][]byte{}
		_, _ = answer(p, 7, got)
		sum := 0
		for _, a := range got {
			sum += len(a)
		}
		if sum > len(p) {
			t.Errorf("%d bytes of attributes in %d", sum, len(p))
		}
	})
}

// A kernel without the module says so, in words that help; one that has it is found.
func TestOpen(t *testing.T) {
	c, err := Open()
	if err == nil {
		err = c.Close()
	} else if errors.Is(err, ErrNoKernel) && strings.Contains(err.Error(), "modprobe nbd") {
		err = nil
	}
	if err != nil {
		t.Error(err)
	}
}

// disk is a device in memory that counts flushes.
type disk struct {
	mu      sync.Mutex
	data    []byte
	flushes int
}

func (d *disk) Size() int64         { return int64(len(d.data)) }
func (d *disk) ReadOnly() bool      { return false }
func (d *disk) Description() string { return "" }
func (d *disk) Flush(context.Context) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.flushes++
	return nil
}
func (d *disk) TryRead(p []byte, off int64) (bool, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	copy(p, d.data[off:])
	return true, nil
}
func (d *disk) Read(_ context.Context, p []byte, off int64) error {
	_, err := d.TryRead(p, off)
	return err
}
func (d *disk) Write(_ context.Context, ops []nbd.WriteOp, _ bool) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, op := range ops {
		copy(d.data[op.Off:], op.Data)
	}
	return nil
}
func (d *disk) List() []string { return []string{"disk"} }
func (d *disk) Open(context.Context, string) (nbd.Device, func(), error) {
	return d, func() {}, nil
}

// kernel plays the other end of the netlink socket. Being the same process, it knows the descriptors.
type kernel struct {
	t     *testing.T
	fd    int
	attrs map[uint16][]byte // of the last command
	sock  net.Conn          // that came with it
}

// serve answers one command: with code if it is not 0, else with attributes and an acknowledgement.
func (k *kernel) serve(cmd uint8, code unix.Errno, attrs ...[]byte) {
	buf := make([]byte, 4096)
	n, err := unix.Read(k.fd, buf)
	if err != nil || n < 20 || buf[16] != cmd {
		k.t.Errorf("the kernel was asked %x, %v", buf[:max(n, 0)], err)
		return
	}
	k.attrs = map[uint16][]byte{}
	if err := attributes(buf[20:n], k.attrs); err != nil {
		k.t.Error(err)
	}
	if list := k.attrs[attrSockets]; list != nil {
		fd, err := unix.FcntlInt(uintptr(binary.NativeEndian.Uint32(list[8:])), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			k.t.Error(err)
		}
		f := os.NewFile(uintptr(fd), "nbd")
		if k.sock, err = net.FileConn(f); err != nil {
			k.t.Error(err)
		}
		_ = f.Close()
	}
	var out []byte
	if code == 0 && len(attrs) > 0 {
		out = request(binary.NativeEndian.Uint16(buf[4:]), cmd, binary.NativeEndian.Uint32(buf[8:]), attrs...)
		if _, err := unix.Write(k.fd, out); err != nil {
			k.t.Error(err)
		}
	}
	out = make([]byte, 36)
	binary.NativeEndian.PutUint32(out, 36)
	binary.NativeEndian.PutUint16(out[4:], unix.NLMSG_ERROR)
	copy(out[8:12], buf[8:12])
	binary.NativeEndian.PutUint32(out[16:], uint32(-int32(code)))
	if _, err := unix.Write(k.fd, out); err != nil {
		k.t.Error(err)
	}
}

// during serves one command while f runs.
func (k *kernel) during(f func(), cmd uint8, code unix.Errno, attrs ...[]byte) {
	k.t.Helper()
	done := make(chan struct{})
	go func() {
		defer close(done)
		k.serve(cmd, code, attrs...)
	}()
	f()
	<-done
}

// do sends one request as the kernel does and returns the data of a READ of n bytes.
func (k *kernel) do(cmd proto.Cmd, data []byte, n int) []byte {
	k.t.Helper()
	p := binary.BigEndian.AppendUint32(nil, proto.MagicRequest)
	p = binary.BigEndian.AppendUint32(p, uint32(cmd))
	p = binary.BigEndian.AppendUint64(p, 77)
	p = binary.BigEndian.AppendUint64(p, 0)
	p = binary.BigEndian.AppendUint32(p, uint32(max(n, len(data))))
	_ = k.sock.SetDeadline(time.Now().Add(20 * time.Second))
	if _, err := k.sock.Write(append(p, data...)); err != nil {
		k.t.Fatal(err)
	}
	got := make([]byte, 16+n)
	if _, err := io.ReadFull(k.sock, got); err != nil {
		k.t.Fatal(err)
	}
	want := append(binary.BigEndian.AppendUint32(nil, proto.MagicSimpleReply), 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 77)
	if !bytes.Equal(got[:16], want) {
		k.t.Fatalf("reply %x", got[:16])
	}
	return got[16:]
}

// The kernel is told what the server said, and gets a socket on which transmission begins; after the
// server is another, it gets that one's.
func TestAttachAndReconnect(t *testing.T) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	c, k := &Conn{fd: fds[0], family: 0x1c}, &kernel{t: t, fd: fds[1]}
	defer func() { _, _ = c.Close(), unix.Close(k.fd) }()
	dir, err := os.MkdirTemp("", "nbdkernel")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = os.RemoveAll(dir) }()
	path := filepath.Join(dir, "s")
	d := &disk{data: make([]byte, 1<<20)}
	start := func() (stop func()) {
		ln, err := nbd.Listen("unix://"+path, true)
		if err != nil {
			t.Fatal(err)
		}
		s, err := nbd.New(nbd.Options{Exports: d})
		if err != nil {
			t.Fatal(err)
		}
		served := make(chan error, 1)
		go func() { served <- s.Serve(context.Background(), ln, nbd.ListenOptions{}) }()
		return func() {
			if err := s.Shutdown(context.Background()); err != nil {
				t.Error(err)
			}
			<-served
		}
	}
	negotiate := func() (net.Conn, nbdclient.Info) {
		sock, info, err := nbdclient.Negotiate(context.Background(), "nbd+unix:///disk?socket="+path)
		if err != nil {
			t.Fatal(err)
		}
		return sock, info
	}

	stop := start()
	sock, info := negotiate()
	dev := Device{Index: AnyDevice, Size: info.Size, BlockSize: 512, Flags: info.Flags, ReconnectDelay: 5 * time.Minute}
	k.during(func() {
		index, err := c.Connect(dev, sock)
		if err != nil || index != 3 {
			t.Errorf("device %d, %v", index, err)
		}
	}, cmdConnect, 0, u32(attrIndex, 3))
	for a, want := range map[uint16]uint64{attrSize: 1 << 20, attrBlockSize: 512, attrDeadConnTimeout: 300, attrServerFlags: uint64(info.Flags)} {
		if got := k.attrs[a]; len(got) != 8 || binary.NativeEndian.Uint64(got) != want {
			t.Errorf("attribute %d is %x, want %d", a, got, want)
		}
	}
	if info.Flags&proto.FlagSendFlush == 0 {
		t.Error("the kernel would send no FLUSH")
	}
	if _, there := k.attrs[attrIndex]; there {
		t.Error("a device was named")
	}
	k.do(proto.CmdWrite, []byte("hello"), 0)
	k.do(proto.CmdFlush, nil, 0)
	if got := k.do(proto.CmdRead, nil, 5); string(got) != "hello" || d.flushes != 1 {
		t.Errorf("read %q, %d flushes", got, d.flushes)
	}

	never, now := make(chan struct{}), make(chan struct{})
	close(now)
	if gone, err := WaitHangup(sock, now); gone || err != nil {
		t.Errorf("interrupted: %v, %v", gone, err)
	}
	_ = k.sock.Close() // the kernel's own hold; otherwise the server lingers for a second
	stop()
	if gone, err := WaitHangup(sock, never); !gone || err != nil {
		t.Errorf("the server has gone: %v, %v", gone, err)
	}
	_ = sock.Close()

	stop = start()
	sock, _ = negotiate()
	k.during(func() {
		if err := c.Reconnect(3, sock); !errors.Is(err, unix.ENOSPC) {
			t.Errorf("before the kernel has seen the end: %v", err)
		}
	}, cmdReconfigure, unix.ENOSPC)
	_ = k.sock.Close()
	k.during(func() {
		if err := c.Reconnect(3, sock); err != nil {
			t.Error(err)
		}
	}, cmdReconfigure, 0)
	if got := k.attrs[attrIndex]; len(got) != 4 || binary.NativeEndian.Uint32(got) != 3 {
		t.Errorf("device %x", got)
	}
	if got := k.do(proto.CmdRead, nil, 5); string(got) != "hello" {
		t.Errorf("read %q", got)
	}
	_ = k.sock.Close()
	_ = sock.Close()
	k.during(func() {
		if err := c.Disconnect(3); err != nil {
			t.Error(err)
		}
	}, cmdDisconnect, 0)
	k.during(func() {
		if err := c.Disconnect(3); err != ErrDetached {
			t.Errorf("detached twice: %v", err)
		}
	}, cmdDisconnect, unix.EINVAL)
	stop()
}

func TestRefusalsOfTheKernel(t *testing.T) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	c, k := &Conn{fd: fds[0], family: 0x1c}, &kernel{t: t, fd: fds[1]}
	defer func() { _, _ = c.Close(), unix.Close(k.fd) }()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = ln.Close() }()
	sock, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = sock.Close() }()
	for code, want := range map[unix.Errno]string{
		unix.EPERM: "only root", unix.EBUSY: "/dev/nbd2 is in use", unix.ENOMEM: "cannot allocate memory", 0: "did not name the device",
	} {
		k.during(func() {
			if _, err := c.Connect(Device{Index: 2, Size: 4096, BlockSize: 512}, sock); err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("%v: %v, want %q", code, err, want)
			}
		}, cmdConnect, code)
		_ = k.sock.Close()
	}
	a, b := net.Pipe()
	defer func() { _, _ = a.Close(), b.Close() }()
	if _, err := c.Connect(Device{}, a); err == nil {
		t.Error("a pipe within the process was given to the kernel")
	}
}
