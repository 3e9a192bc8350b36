// Package nbdclient is a small NBD client in user space: for self-checks, tests and tools, not
// for speed records. A Client is one connection; any number of goroutines may use it at once,
// and their requests are pipelined and matched with replies by cookie.
package nbdclient

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"graindisk/frontend/nbd/proto"
)

// ErrClosed is what requests fail with after Close.
var ErrClosed = errors.New("nbd client is closed")

// Client is a connection to one export. A request that the server refuses fails with an error
// that is a proto.Errno. A request whose context ends fails with the context's error and breaks
// the connection, since its reply could no longer be told from others; every later request
// then fails.
type Client struct {
	sock net.Conn
	info Info

	writers atomic.Int32 // goroutines that want wmu, to flush once for all
	wmu     sync.Mutex
	w       *bufio.Writer

	mu      sync.Mutex
	cookie  uint64
	pending map[uint64]*call
	broken  error // why no further request is possible

	received chan struct{} // closed when the receiver has ended
}

// Info is what the server said of the export.
type Info struct {
	Export      string // as the server calls it, if it says
	Description string
	Size        int64  // bytes
	Flags       uint16 // transmission flags, proto.Flag...
	Structured  bool   // replies come in chunks
	Extended    bool   // with extended headers
	Allocation  bool   // BlockStatus tells base:allocation
	// Block sizes in bytes; 0 if the server did not tell.
	BlockMin, BlockPreferred, PayloadMax uint32
}

// Options of a Client. What the server does not have it does not get; see Info. The zero value asks for
// structured replies.
type Options struct {
	SimpleReplies bool // do not ask for structured replies
	// TLS, if not nil, makes the client insist on TLS before it says anything else; its ServerName
	// defaults to the host in the URI. An nbds URI insists too, with the system's authorities.
	TLS        *tls.Config
	Extended   bool // ask for extended headers, and for structured replies without them
	Allocation bool // ask for base:allocation
}

// Dial connects to "nbd://host[:port]/export" or "nbd+unix:///export?socket=/path", or the same with
// nbds for TLS; an empty export is the server's default.
func Dial(ctx context.Context, uri string, o Options) (*Client, error) {
	network, address, export, secure, err := parseURI(uri)
	if err != nil {
		return nil, err
	}
	if secure && o.TLS == nil {
		o.TLS = &tls.Config{MinVersion: tls.VersionTLS13}
	}
	if host, _, _ := net.SplitHostPort(address); o.TLS != nil && o.TLS.ServerName == "" && network == "tcp" {
		o.TLS = o.TLS.Clone()
		o.TLS.ServerName = host
	}
	var d net.Dialer
	sock, err := d.DialContext(ctx, network, address)
	if err != nil {
		return nil, fmt.Errorf("nbd client: %w", err)
	}
	c, err := New(ctx, sock, export, o)
	if err != nil {
		return nil, fmt.Errorf("nbd client: %s: %w", uri, err)
	}
	return c, nil
}

// New opens export over sock, which the client then owns; it is closed on failure too.
func New(ctx context.Context, sock net.Conn, export string, o Options) (*Client, error) {
	stop := context.AfterFunc(ctx, func() { _ = sock.Close() })
	h := handshake{r: bufio.NewReaderSize(sock, 64<<10), sock: sock}
	err := h.run(ctx, export, o)
	if !stop() {
		err = context.Cause(ctx)
	}
	if err != nil {
		_ = sock.Close()
		return nil, err
	}
	c := &Client{
		sock: sock, info: h.info, w: bufio.NewWriterSize(h.sock, 64<<10),
		pending: map[uint64]*call{}, received: make(chan struct{}),
	}
	go c.receive(h.r)
	return c, nil
}

// Negotiate connects like Dial and leaves the connection at the beginning of transmission, with simple
// replies, for somebody who speaks that part: the kernel.
func Negotiate(ctx context.Context, uri string) (net.Conn, Info, error) {
	network, address, export, secure, err := parseURI(uri)
	if err == nil && secure {
		err = fmt.Errorf("nbd client: %s: the kernel's client speaks no TLS; use a plain unix socket", uri)
	}
	if err != nil {
		return nil, Info{}, err
	}
	var d net.Dialer
	sock, err := d.DialContext(ctx, network, address)
	if err != nil {
		return nil, Info{}, fmt.Errorf("nbd client: %w", err)
	}
	stop := context.AfterFunc(ctx, func() { _ = sock.Close() })
	h := handshake{r: bufio.NewReader(sock), sock: sock}
	err = h.run(ctx, export, Options{SimpleReplies: true})
	if !stop() {
		err = context.Cause(ctx)
	}
	if n := h.r.Buffered(); err == nil && n > 0 {
		err = fmt.Errorf("%d bytes after the handshake", n)
	}
	if err != nil {
		_ = sock.Close()
		return nil, Info{}, fmt.Errorf("nbd client: %s: %w", uri, err)
	}
	return sock, h.info, nil
}

func parseURI(uri string) (network, address, export string, secure bool, err error) {
	u, err := url.Parse(uri)
	if err != nil {
		return "", "", "", false, fmt.Errorf("nbd client: %w", err)
	}
	export = strings.TrimPrefix(u.Path, "/")
	scheme := u.Scheme
	if rest, ok := strings.CutPrefix(scheme, "nbds"); ok {
		scheme, secure = "nbd"+rest, true
	}
	switch scheme {
	case "nbd":
		port := u.Port()
		if port == "" {
			port = "10809"
		}
		return "tcp", net.JoinHostPort(u.Hostname(), port), export, secure, nil
	case "nbd+unix":
		if path := u.Query().Get("socket"); path != "" {
			return "unix", path, export, secure, nil
		}
	}
	return "", "", "", false, fmt.Errorf("nbd client: %q is neither nbd://host/export nor nbd+unix:///export?socket=path", uri)
}

// Info returns what the server said of the export.
func (c *Client) Info() Info { return c.info }

// Size is the size of the export in bytes, as it was when the client connected.
func (c *Client) Size() int64 { return c.info.Size }

// ReadAt fills p from off, at most 32 MiB.
func (c *Client) ReadAt(ctx context.Context, p []byte, off int64) error {
	return c.do(ctx, proto.CmdRead, 0, off, int64(len(p)), p, nil)
}

// Chunk is a part of a READ as the server sent it.
type Chunk struct {
	From, To int         // bytes of the READ; of an error only From is known and To equals it
	Hole     bool        // zeroes that the server does not store
	Err      proto.Errno // 0 = these bytes have arrived
}

// ReadChunks is ReadAt that calls got for every chunk as it arrives, in any order; with simple replies or
// df (do not fragment) there is one. got is called by the connection's receiver, which it holds up.
// After an error the chunks told of before are good nevertheless.
func (c *Client) ReadChunks(ctx context.Context, p []byte, off int64, df bool, got func(Chunk)) error {
	var flags uint16
	if df && c.info.Structured {
		flags = proto.CmdFlagDF
	}
	return c.do(ctx, proto.CmdRead, flags, off, int64(len(p)), p, got)
}

// WriteAt writes p, at most 32 MiB, at off; with fua it returns once p is on stable storage.
func (c *Client) WriteAt(ctx context.Context, p []byte, off int64, fua bool) error {
	return c.do(ctx, proto.CmdWrite, fuaFlag(fua), off, int64(len(p)), p, nil)
}

// Flush returns when all writes that were complete before it are on stable storage.
func (c *Client) Flush(ctx context.Context) error {
	return c.do(ctx, proto.CmdFlush, 0, 0, 0, nil, nil)
}

// Trim tells the server that n bytes, less than 4 GiB without extended headers, are of no use any more.
func (c *Client) Trim(ctx context.Context, off, n int64, fua bool) error {
	return c.do(ctx, proto.CmdTrim, fuaFlag(fua), off, n, nil, nil)
}

// WriteZeroes makes n bytes, less than 4 GiB without extended headers, read as zeroes. flags are
// proto.CmdFlag... bits.
func (c *Client) WriteZeroes(ctx context.Context, off, n int64, flags uint16) error {
	return c.do(ctx, proto.CmdWriteZeroes, flags, off, n, nil, nil)
}

// Cache asks the server to bring n bytes, less than 4 GiB without extended headers, nearer.
func (c *Client) Cache(ctx context.Context, off, n int64) error {
	return c.do(ctx, proto.CmdCache, 0, off, n, nil, nil)
}

// Status is what base:allocation says of a range.
type Status struct {
	Len   int64  // bytes
	State uint32 // proto.State... bits
}

// BlockStatus tells what [off, off+n) is made of, from off on: at least one range, less than n bytes where
// the server wants to be asked again. With one it tells of the first range only. n is less than 4 GiB
// without extended headers.
func (c *Client) BlockStatus(ctx context.Context, off, n int64, one bool) ([]Status, error) {
	k := &call{cmd: proto.CmdBlockStatus, off: off}
	var flags uint16
	if one {
		flags = proto.CmdFlagReqOne
	}
	err := c.send(ctx, k, flags, n)
	return k.status, err
}

func fuaFlag(fua bool) uint16 {
	if fua {
		return proto.CmdFlagFUA
	}
	return 0
}

// Close says goodbye to the server and closes the connection. Requests under way fail with
// ErrClosed; wait for them first.
func (c *Client) Close() error {
	if c.fail(ErrClosed) {
		_ = c.sock.SetWriteDeadline(time.Now().Add(time.Second)) // a server that does not read
		c.wmu.Lock()
		_, _ = c.w.Write(c.request(proto.CmdDisc, 0, 0, 0, 0))
		_ = c.w.Flush() // a server that has gone needs no goodbye
		c.wmu.Unlock()
	}
	err := c.sock.Close()
	<-c.received
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

// call is one request under way.
type call struct {
	cmd  proto.Cmd
	p    []byte // where READ data go
	off  int64
	got  int // bytes of READ data received
	err  error
	told func(Chunk) // nil = nobody wants to know
	done chan struct{}

	status []Status // of BLOCK_STATUS
}

func (k *call) tell(a Chunk) {
	if k.told != nil && k.cmd == proto.CmdRead {
		k.told(a)
	}
}

// do sends one request and waits for its reply; p is the payload of a WRITE or the place for
// that of a READ.
func (c *Client) do(ctx context.Context, cmd proto.Cmd, flags uint16, off, n int64, p []byte, told func(Chunk)) error {
	return c.send(ctx, &call{cmd: cmd, p: p, off: off, told: told}, flags, n)
}

// send sends k and waits for its reply.
func (c *Client) send(ctx context.Context, k *call, flags uint16, n int64) error {
	if n < 0 || n > 1<<32-1 && !c.info.Extended || k.off < 0 {
		return fmt.Errorf("nbd client: %s of %d bytes at %d: %w", k.cmd, n, k.off, proto.EINVAL)
	}
	k.done = make(chan struct{})
	cookie, err := c.register(k)
	if err != nil {
		return err
	}
	if c.info.Extended && k.cmd == proto.CmdWrite {
		flags |= proto.CmdFlagPayloadLen
	}
	stop := context.AfterFunc(ctx, func() { c.abort(context.Cause(ctx)) })
	defer stop()
	if err := c.write(c.request(k.cmd, flags, cookie, uint64(k.off), uint64(n)), k.cmd, k.p); err != nil {
		c.abort(fmt.Errorf("nbd client: %w", err))
	}
	<-k.done
	if k.err != nil {
		return fmt.Errorf("nbd client: %s of %d bytes at %d: %w", k.cmd, n, k.off, k.err)
	}
	return nil
}

func (c *Client) register(k *call) (cookie uint64, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.broken != nil {
		return 0, c.broken
	}
	c.cookie++
	c.pending[c.cookie] = k
	return c.cookie, nil
}

// write sends one request; the last of several waiting goroutines flushes for all.
func (c *Client) write(h []byte, cmd proto.Cmd, p []byte) error {
	c.writers.Add(1)
	c.wmu.Lock()
	defer c.wmu.Unlock()
	last := c.writers.Add(-1) == 0
	if _, err := c.w.Write(h); err != nil {
		return err
	}
	if cmd == proto.CmdWrite {
		if _, err := c.w.Write(p); err != nil {
			return err
		}
	}
	if last {
		return c.w.Flush()
	}
	return nil
}

// request encodes the header of a request.
func (c *Client) request(cmd proto.Cmd, flags uint16, cookie, off, n uint64) []byte {
	h := make([]byte, proto.ExtendedRequestLen)
	binary.BigEndian.PutUint32(h, proto.MagicRequest)
	binary.BigEndian.PutUint16(h[4:], flags)
	binary.BigEndian.PutUint16(h[6:], uint16(cmd))
	binary.BigEndian.PutUint64(h[8:], cookie)
	binary.BigEndian.PutUint64(h[16:], off)
	if !c.info.Extended {
		binary.BigEndian.PutUint32(h[24:], uint32(n))
		return h[:proto.RequestLen]
	}
	binary.BigEndian.PutUint32(h, proto.MagicExtendedRequest)
	binary.BigEndian.PutUint64(h[24:], n)
	return h
}

// fail keeps the first reason why the connection is over and reports whether it is err.
func (c *Client) fail(err error) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.broken != nil {
		return false
	}
	c.broken = err
	return true
}

// abort breaks the connection; the receiver then fails every request under way.
func (c *Client) abort(err error) {
	c.fail(err)
	_ = c.sock.Close()
}

// receive takes replies until the connection is over, and fails what is then still pending.
func (c *Client) receive(r *bufio.Reader) {
	defer close(c.received)
	for {
		if err := c.receiveOne(r); err != nil {
			if err == io.EOF {
				err = fmt.Errorf("server closed the connection: %w", err)
			}
			c.abort(err)
			break
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for cookie, k := range c.pending {
		k.err = c.broken
		delete(c.pending, cookie)
		close(k.done)
	}
}

// receiveOne takes one simple reply or one reply chunk.
func (c *Client) receiveOne(r *bufio.Reader) error {
	var h [proto.ExtendedReplyLen]byte
	if _, err := io.ReadFull(r, h[:proto.SimpleReplyLen]); err != nil {
		return err
	}
	cookie := binary.BigEndian.Uint64(h[8:])
	c.mu.Lock()
	k := c.pending[cookie]
	c.mu.Unlock()
	if k == nil {
		return fmt.Errorf("reply to unknown cookie %d", cookie)
	}
	switch magic := binary.BigEndian.Uint32(h[:]); {
	case magic == proto.MagicSimpleReply && !c.info.Extended:
		code := proto.Errno(binary.BigEndian.Uint32(h[4:]))
		if code != proto.OK {
			k.err = code
		} else if k.cmd == proto.CmdRead {
			if _, err := io.ReadFull(r, k.p); err != nil {
				return cut(err)
			}
			k.got = len(k.p)
			k.tell(Chunk{To: len(k.p)})
		}
	case magic == proto.MagicStructuredReply && !c.info.Extended, magic == proto.MagicExtendedReply && c.info.Extended:
		size := proto.StructuredReplyLen
		if c.info.Extended {
			size = proto.ExtendedReplyLen
		}
		if _, err := io.ReadFull(r, h[proto.SimpleReplyLen:size]); err != nil {
			return cut(err)
		}
		n := uint64(binary.BigEndian.Uint32(h[16:]))
		if c.info.Extended {
			if off := binary.BigEndian.Uint64(h[16:]); off != uint64(k.off) {
				return fmt.Errorf("reply for offset %d to %s at %d", off, k.cmd, k.off)
			}
			if n = binary.BigEndian.Uint64(h[24:]); n > 1<<32-1 {
				return fmt.Errorf("reply chunk of %d bytes", n)
			}
		}
		if err := k.chunk(r, binary.BigEndian.Uint16(h[6:]), uint32(n)); err != nil {
			return err
		}
		if binary.BigEndian.Uint16(h[4:])&proto.ReplyFlagDone == 0 {
			return nil
		}
	default:
		return fmt.Errorf("bad reply magic %#08x", magic)
	}
	switch {
	case k.err != nil:
	case k.cmd == proto.CmdRead && k.got != len(k.p):
		return fmt.Errorf("reply to read holds %d bytes of %d", k.got, len(k.p))
	case k.cmd == proto.CmdBlockStatus && len(k.status) == 0:
		return fmt.Errorf("reply to block_status without a range")
	}
	c.mu.Lock()
	delete(c.pending, cookie)
	c.mu.Unlock()
	close(k.done)
	return nil
}

// errorTextMax bounds the payload of an error chunk.
const errorTextMax = 64 << 10

// chunk takes the payload of one structured reply chunk. The server is trusted not to send
// chunks that overlap; only how much it sent is counted.
func (k *call) chunk(r *bufio.Reader, typ uint16, n uint32) error {
	switch {
	case typ == proto.ReplyTypeNone && n == 0:
		return nil
	case typ == proto.ReplyTypeOffsetData && n > 8, typ == proto.ReplyTypeOffsetHole && n == 12:
		var p [12]byte
		if _, err := io.ReadFull(r, p[:8]); err != nil {
			return cut(err)
		}
		at := int64(binary.BigEndian.Uint64(p[:])) - k.off
		size := int64(n) - 8
		if typ == proto.ReplyTypeOffsetHole {
			if _, err := io.ReadFull(r, p[8:]); err != nil {
				return cut(err)
			}
			size = int64(binary.BigEndian.Uint32(p[8:]))
		}
		if k.cmd != proto.CmdRead || at < 0 || at > int64(len(k.p)) || size > int64(len(k.p))-at {
			return fmt.Errorf("chunk of %d bytes outside its %s", size, k.cmd)
		}
		k.got += int(size)
		if typ == proto.ReplyTypeOffsetHole {
			clear(k.p[at : at+size])
		} else if _, err := io.ReadFull(r, k.p[at:at+size]); err != nil {
			return cut(err)
		}
		k.tell(Chunk{From: int(at), To: int(at + size), Hole: typ == proto.ReplyTypeOffsetHole})
		return nil
	case k.cmd == proto.CmdBlockStatus && len(k.status) == 0 && n <= statusBytesMax && statusShape(typ, n):
		p := make([]byte, n)
		if _, err := io.ReadFull(r, p); err != nil {
			return cut(err)
		}
		return k.takeStatus(typ, p)
	case typ&proto.ReplyTypeErr != 0 && n >= 6 && n <= errorTextMax:
		p := make([]byte, n)
		if _, err := io.ReadFull(r, p); err != nil {
			return cut(err)
		}
		code, at := proto.Errno(binary.BigEndian.Uint32(p)), int64(0)
		if text := int(binary.BigEndian.Uint16(p[4:])); typ == proto.ReplyTypeErrorOffset {
			if len(p) != 6+text+8 {
				return fmt.Errorf("error chunk of %d bytes with a text of %d", n, text)
			}
			at = int64(binary.BigEndian.Uint64(p[6+text:])) - k.off
			if at < 0 || at >= int64(len(k.p)) {
				return fmt.Errorf("error at %d outside its %s", at, k.cmd)
			}
		}
		if k.err == nil {
			k.err = code
		}
		k.tell(Chunk{From: int(at), To: int(at), Err: code})
		return nil
	}
	return fmt.Errorf("unexpected reply chunk of type %d, %d bytes", typ, n)
}

// cut turns an end of stream within a message into an unexpected one.
func cut(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}
