package nbd

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"sync"
	"time"

	"graindisk/frontend/nbd/proto"
	"graindisk/internal/access"
)

var (
	// errBye ends a connection the way the client asked for: ABORT or DISC.
	errBye     = errors.New("client said goodbye")
	errHungUp  = errors.New("client hung up")
	errDrained = errors.New("server is shutting down")
)

// conn is one client. Its reader (serve) alone reads the socket and owns pending and ready.
type conn struct {
	srv    *Server
	listen ListenOptions
	sock   net.Conn // the socket itself: deadlines and closing are its own
	stream net.Conn // what is read and written: sock, or TLS over it
	log    *slog.Logger
	gone   chan struct{}   // closed when the server has forgotten it
	ctx    context.Context // ends when the connection fails or is over; given to the device
	cancel context.CancelCauseFunc

	mu          sync.Mutex
	draining    bool // no further read of the socket
	handshaking bool
	peer        access.Peer  // who the client is; only the reader writes it
	secured     bool         // TLS is on; only the reader writes it
	granted     access.Level // what the client may do with grantedOn; only the reader writes it
	grantedOn   string

	// Fixed once transmission starts.
	dev        Device
	prompter   Prompter // dev, if it is one
	piecer     Piecer   // the same
	beginner   Beginner // the same
	release    func()
	export     string
	structured bool // replies are chunks
	extended   bool // with extended headers; structured is set too
	fastZero   bool
	statuser   Statuser   // dev, if it is one
	prefetcher Prefetcher // the same
	contexts   contexts   // of metadata that the client has chosen
	noZeroes   bool       // of the handshake only

	in      inbuf
	pending [laneCount]*batch // gathered by the reader, not yet handed to a lane
	ready   replies           // gathered by the reader, not yet sent

	lanes  [laneCount]lane
	flush  flusher
	box    outbox
	wg     sync.WaitGroup // lanes, flusher, slow reads
	writes budget         // bytes of changes between socket and device
	reads  budget         // bytes of READ replies not yet on the socket
	slow   budget         // READs that wait for the store, CACHE and BLOCK_STATUS
	caches chan struct{}  // a token for each CACHE under way
}

// The lanes of a connection: operations without data must not wait for room.
const (
	laneData = iota
	laneUnmap
	laneCount
)

func newConn(ctx context.Context, s *Server, sock net.Conn, lo ListenOptions) *conn {
	c := &conn{srv: s, listen: lo, sock: sock, stream: sock, handshaking: true, peer: access.PeerOf(sock), gone: make(chan struct{})}
	c.log = s.opt.Log.With("client", sock.RemoteAddr().String())
	c.ctx, c.cancel = context.WithCancelCause(ctx)
	if u, ok := sock.(*net.UnixConn); ok {
		widen(u, socketBytes)
	}
	c.in = inbuf{sock: sock, settle: func() {}}
	c.writes.init(s.opt.InFlightBytes)
	c.reads.init(s.opt.InFlightBytes)
	c.slow.init(int64(s.opt.SlowReads))
	c.caches = make(chan struct{}, cachesMax)
	c.box.init(sock, &c.reads, c.fail)
	c.ready.unit = inbufBytes
	for i := range c.lanes {
		c.lanes[i].c = c
	}
	c.flush.c = c
	return c
}

// fail ends the connection at once; the first reason is kept. Anyone may call it.
func (c *conn) fail(why error) {
	c.cancel(why)
	c.box.close()
	c.writes.close()
	c.reads.close()
	c.slow.close()
	_ = c.sock.Close()
}

// drain lets the connection answer what it has read and then end.
func (c *conn) drain() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.draining = true
	if c.handshaking {
		_ = c.sock.SetDeadline(time.Now().Add(c.srv.grace))
	} else {
		_ = c.sock.SetReadDeadline(longAgo)
	}
}

var longAgo = time.Unix(1, 0)

// handshakeGrace is how long a handshake may go on when the server shuts down.
const handshakeGrace = time.Second

// setHandshaking sets the deadline of the handshake (on) or lifts it.
func (c *conn) setHandshaking(on bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.handshaking = on
	deadline := time.Time{}
	switch {
	case on && c.draining:
		deadline = time.Now().Add(min(c.srv.grace, c.srv.opt.HandshakeTimeout))
	case on:
		deadline = time.Now().Add(c.srv.opt.HandshakeTimeout)
	}
	_ = c.sock.SetDeadline(deadline)
	if c.draining && !on {
		_ = c.sock.SetReadDeadline(longAgo)
	}
}

// serve answers the client until it leaves, breaks the protocol, or is drained. It returns after
// the last goroutine of the connection.
func (c *conn) serve() {
	defer c.fail(errBye)
	c.in.b = make([]byte, inbufBytes)
	c.setHandshaking(true)
	if err := c.handshake(); err != nil {
		c.log.Debug("handshake ended", "reason", err)
		return
	}
	defer c.release()
	c.setHandshaking(false)
	c.log = c.log.With("export", c.export)
	c.log.Info("client connected")
	c.srv.opt.Metrics.Opened(c.export)

	why := c.transmit()
	drained := c.isDraining() && errors.Is(why, os.ErrDeadlineExceeded)
	if why == io.EOF {
		why = errHungUp
	}
	if !drained && why != errBye {
		c.fail(why)
	}
	c.settle()
	c.waitOut(why)
	if drained && c.ctx.Err() == nil {
		why = errDrained
		c.linger()
	}
	if first := context.Cause(c.ctx); first != nil {
		why = first
	}
	c.srv.opt.Metrics.Closed(c.export)
	c.log.Info("client disconnected", "reason", why)
}

// waitOut waits for the requests that were read. A client that has said goodbye may have closed its end, as it
// needs no answer or only listens: what it asked for before is done nevertheless, unless that takes too long.
func (c *conn) waitOut(why error) {
	if why == errBye {
		defer c.watchHangup(c.srv.goodbyeChecks)()
	}
	c.wg.Wait()
}

func (c *conn) isDraining() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.draining
}

// linger ends the sending side and reads until the client has seen it, or a second passes:
// closing a socket with unread requests could cost the client replies that are on their way.
func (c *conn) linger() {
	half, ok := c.stream.(interface{ CloseWrite() error })
	if !ok || half.CloseWrite() != nil {
		return
	}
	_ = c.sock.SetReadDeadline(time.Now().Add(lingerTimeout))
	_, _ = io.Copy(io.Discard, c.stream)
}

const lingerTimeout = time.Second

// settle hands over what the reader has gathered: batches to their lanes, replies to the
// socket. It runs before the reader waits for anything.
func (c *conn) settle() {
	c.settleWrites()
	if c.ready.bytes > 0 {
		c.send(&c.ready)
	}
	c.box.waitRoom()
}

func (c *conn) settleWrites() {
	for i, b := range c.pending {
		if b != nil {
			c.pending[i] = nil
			if !c.lanes[i].inline(b) {
				c.lanes[i].put(b)
			}
		}
	}
}

func (c *conn) lanesIdle() bool {
	for i := range c.lanes {
		if c.lanes[i].tail() != nil {
			return false
		}
	}
	return true
}

// send queues the gathered replies for the socket.
func (c *conn) send(r *replies) {
	c.box.send(r.bufs...)
	clear(r.bufs)
	r.bufs, r.bytes = r.bufs[:0], 0
}

// acquire takes n of g, settling first if that means waiting.
func (c *conn) acquire(g *budget, n int64) error {
	if g.tryAcquire(n) {
		return nil
	}
	c.settle()
	defer c.watchHangup(0)()
	if g.acquire(n) {
		return nil
	}
	return context.Cause(c.ctx)
}

// done feeds the metrics once a request has its outcome.
func (c *conn) done(q request, code proto.Errno) {
	if done := c.srv.opt.Metrics.Done; done != nil {
		done(q.cmd, int64(q.length), time.Since(q.start), code)
	}
}
