package nbd

import (
	"bufio"
	"encoding/binary"
	"net"
	"sync"

	"golang.org/x/sys/unix"

	"graindisk/frontend/nbd/proto"
)

// outboxMax is how many buffers may wait for the socket before the reader stops reading.
const outboxMax = 128

// socketBytes is what the kernel is asked to hold of replies for a client of a unix socket: a reply of 1 MiB goes
// out in one call and one wake-up. TCP sizes its buffers itself.
const socketBytes = 1 << 20

// widen makes room for n bytes in the socket, or for net.core.wmem_max if that is less and the process may not
// exceed it. What the system refuses costs speed alone.
func widen(sock *net.UnixConn, n int) {
	raw, err := sock.SyscallConn()
	if err != nil {
		return
	}
	_ = raw.Control(func(fd uintptr) {
		if unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, n) != nil {
			_ = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_SNDBUF, n)
		}
	})
}

// outbox sends the replies of one connection. Whoever finds the socket free writes what all
// have queued, in one vectored write after another, so no sender goroutine is needed. Every reply of transmission passes
// write, where hold is asked after what it tells was done.
type outbox struct {
	sock  net.Conn
	reads *budget         // gets back what sent buffers were charged
	fail  func(err error) // ends the connection
	hold  func() error    // waits until replies may leave; nil: they always may. Fixed once transmission starts

	mu      sync.Mutex
	drained sync.Cond // queue was taken, or broken is set
	queue   []*buf
	sending bool
	broken  bool

	joined        *bufio.Writer // over TLS: replies go out in few records, each a system call
	vecs, scratch net.Buffers   // of the one sender
}

func (o *outbox) init(sock net.Conn, reads *budget, fail func(error)) {
	o.sock, o.reads, o.fail, o.drained.L = sock, reads, fail, &o.mu
}

// send queues bufs, which it then owns, and writes unless another goroutine is writing already.
func (o *outbox) send(bufs ...*buf) {
	o.mu.Lock()
	o.queue = append(o.queue, bufs...)
	if o.sending {
		o.mu.Unlock()
		return
	}
	o.sending = true
	var spare []*buf
	for len(o.queue) > 0 {
		now := o.queue
		o.queue = spare[:0]
		broken := o.broken
		o.mu.Unlock()
		o.drained.Signal()
		if !broken {
			if err := o.write(now); err != nil {
				o.fail(err)
			}
		}
		for i, b := range now {
			if n := b.done(); n > 0 {
				o.reads.release(n)
			}
			now[i] = nil
		}
		spare = now
		o.mu.Lock()
	}
	o.queue = spare[:0]
	o.sending = false
	o.mu.Unlock()
}

// secure makes later replies go out over TLS. Nothing has been sent yet.
func (o *outbox) secure(sock net.Conn) {
	o.sock, o.joined = sock, bufio.NewWriterSize(sock, tlsWriteBytes)
}

// tlsWriteBytes is two records of TLS.
const tlsWriteBytes = 32 << 10

func (o *outbox) write(bufs []*buf) error {
	if o.hold != nil {
		if err := o.hold(); err != nil {
			return err
		}
	}
	if o.joined != nil && len(bufs) > 1 {
		for _, b := range bufs {
			if _, err := o.joined.Write(b.b); err != nil {
				return err
			}
		}
		return o.joined.Flush()
	}
	if len(bufs) == 1 {
		_, err := o.sock.Write(bufs[0].b)
		return err
	}
	o.scratch = o.scratch[:0]
	for _, b := range bufs {
		o.scratch = append(o.scratch, b.b)
	}
	o.vecs = o.scratch // WriteTo eats its receiver
	_, err := o.vecs.WriteTo(o.sock)
	return err
}

// waitRoom waits until the queue is short. Only the reader calls it.
func (o *outbox) waitRoom() {
	o.mu.Lock()
	for len(o.queue) > outboxMax && !o.broken {
		o.drained.Wait()
	}
	o.mu.Unlock()
}

// close makes queued and later replies go nowhere.
func (o *outbox) close() {
	o.mu.Lock()
	o.broken = true
	o.mu.Unlock()
	o.drained.Signal()
}

// putSimple encodes a simple reply header into p.
func putSimple(p []byte, cookie uint64, code proto.Errno) {
	binary.BigEndian.PutUint32(p, proto.MagicSimpleReply)
	binary.BigEndian.PutUint32(p[4:], uint32(code))
	binary.BigEndian.PutUint64(p[8:], cookie)
}

// putChunk encodes the header of a reply chunk, chunkHeaderLen bytes, with n bytes of payload to follow. off is
// that of the request.
func (c *conn) putChunk(p []byte, flags, typ uint16, cookie, off uint64, n int) {
	binary.BigEndian.PutUint16(p[4:], flags)
	binary.BigEndian.PutUint16(p[6:], typ)
	binary.BigEndian.PutUint64(p[8:], cookie)
	if c.extended {
		binary.BigEndian.PutUint32(p, proto.MagicExtendedReply)
		binary.BigEndian.PutUint64(p[16:], off)
		binary.BigEndian.PutUint64(p[24:], uint64(n))
		return
	}
	binary.BigEndian.PutUint32(p, proto.MagicStructuredReply)
	binary.BigEndian.PutUint32(p[16:], uint32(n))
}

func (c *conn) chunkHeaderLen() int {
	if c.extended {
		return proto.ExtendedReplyLen
	}
	return proto.StructuredReplyLen
}

// putData encodes the header of a successful READ of n > 0 bytes, readHeaderLen bytes.
func (c *conn) putData(p []byte, cookie uint64, off uint64, n int) {
	if !c.structured {
		putSimple(p, cookie, proto.OK)
		return
	}
	c.putChunk(p, proto.ReplyFlagDone, proto.ReplyTypeOffsetData, cookie, off, 8+n)
	binary.BigEndian.PutUint64(p[c.chunkHeaderLen():], off)
}

// readHeaderLen is how many bytes stand before the data of a READ's reply.
func (c *conn) readHeaderLen() int {
	if c.structured {
		return c.chunkHeaderLen() + 8
	}
	return proto.SimpleReplyLen
}

// putResult appends the reply of a request without data: anything but a successful READ of
// more than nothing.
func (c *conn) putResult(r *replies, q request, code proto.Errno) {
	switch {
	case c.structured && code != proto.OK:
		msg, h := code.Error(), c.chunkHeaderLen()
		p := r.reserve(h + 6 + len(msg))
		c.putChunk(p, proto.ReplyFlagDone, proto.ReplyTypeError, q.cookie, q.offset, 6+len(msg))
		p = p[h:]
		binary.BigEndian.PutUint32(p, uint32(code))
		binary.BigEndian.PutUint16(p[4:], uint16(len(msg)))
		copy(p[6:], msg)
	case c.extended || c.structured && q.cmd == proto.CmdRead:
		c.putChunk(r.reserve(c.chunkHeaderLen()), proto.ReplyFlagDone, proto.ReplyTypeNone, q.cookie, q.offset, 0)
	default:
		putSimple(r.reserve(proto.SimpleReplyLen), q.cookie, code)
	}
	c.done(q, code)
}
