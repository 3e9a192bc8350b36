package nbd

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"time"

	"graindisk/block"
	"graindisk/frontend/nbd/proto"
	"graindisk/internal/access"
)

const (
	blockSizePreferred = block.Size
	// payloadMax bounds READ and WRITE, in bytes; other requests may be as long as the disk.
	payloadMax = proto.PayloadMax
)

// Options of a Server. A zero field means its default.
type Options struct {
	Exports Exports      // required
	Log     *slog.Logger // default: discard
	Metrics Metrics
	// Access is what a client may do with an export of that name, which need not exist; nil = everything.
	// It is called from many goroutines and must not wait for anything. Call Recheck when its
	// answers change.
	Access func(p access.Peer, export string) access.Level
	// HandshakeTimeout is how long a client may take to choose an export; default 10 s.
	HandshakeTimeout time.Duration
	// ConnsMax is how many clients may be connected at once, at least 1; default 256. Further
	// ones are hung up on.
	ConnsMax int
	// InFlightBytes is how much memory the writes of one connection may hold, and the replies
	// to its reads as much again; at least 1 MiB, default 64 MiB. A single request may exceed it.
	InFlightBytes int64
	// SlowReads is how many READs, CACHEs and BLOCK_STATUSes of one connection may wait for the store,
	// at least 1; default 128. One more stops the connection from reading further requests.
	SlowReads int
}

// Metrics are called, if set, from many goroutines at once and must not block.
type Metrics struct {
	Opened   func(export string) // a client has chosen an export
	Closed   func(export string) // it has gone
	Rejected func()              // a client was hung up on because of ConnsMax
	// Done is called once per answered request; code 0 is success.
	Done func(cmd proto.Cmd, bytes int64, took time.Duration, code proto.Errno)
}

func (o Options) withDefaults() Options {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Metrics.Opened == nil {
		o.Metrics.Opened = func(string) {}
	}
	if o.Metrics.Closed == nil {
		o.Metrics.Closed = func(string) {}
	}
	if o.Metrics.Rejected == nil {
		o.Metrics.Rejected = func() {}
	}
	if o.HandshakeTimeout == 0 {
		o.HandshakeTimeout = 10 * time.Second
	}
	if o.ConnsMax == 0 {
		o.ConnsMax = 256
	}
	if o.InFlightBytes == 0 {
		o.InFlightBytes = 64 << 20
	}
	if o.SlowReads == 0 {
		o.SlowReads = 128
	}
	return o
}

func (o Options) validate() error {
	var errs []error
	if o.Exports == nil {
		errs = append(errs, errors.New("Exports is missing"))
	}
	if o.HandshakeTimeout < 0 {
		errs = append(errs, fmt.Errorf("HandshakeTimeout %v is negative", o.HandshakeTimeout))
	}
	if o.ConnsMax < 1 {
		errs = append(errs, fmt.Errorf("ConnsMax %d is below 1", o.ConnsMax))
	}
	if o.InFlightBytes < 1<<20 {
		errs = append(errs, fmt.Errorf("InFlightBytes %d is below 1 MiB", o.InFlightBytes))
	}
	if o.SlowReads < 1 {
		errs = append(errs, fmt.Errorf("SlowReads %d is below 1", o.SlowReads))
	}
	return errors.Join(errs...)
}

// ListenOptions are what differs from listener to listener.
type ListenOptions struct {
	// AckStable acknowledges a write only once it is on stable storage, for clients that may
	// outlive this host.
	AckStable bool
	// TLS offers STARTTLS; nil does not. TLSRequired refuses whoever goes on without.
	TLS         *TLS
	TLSRequired bool
	// Allow are the clients that may use the listener; empty = all.
	Allow access.Rules
}

// ErrShutdown is what Serve returns after Shutdown.
var ErrShutdown = errors.New("nbd server was shut down")

// Server serves the exports to any number of clients on any number of listeners.
type Server struct {
	opt           Options
	goodbyeChecks int
	grace         time.Duration // handshakeGrace, but in tests

	mu        sync.Mutex
	draining  bool
	listeners map[net.Listener]struct{}
	conns     map[*conn]struct{}
	empty     chan struct{} // closed when draining and no connection is left and none can come
	emptied   bool
}

// New returns a server of o.Exports.
func New(o Options) (*Server, error) {
	o = o.withDefaults()
	if err := o.validate(); err != nil {
		return nil, fmt.Errorf("nbd: invalid options: %w", err)
	}
	return &Server{
		opt:           o,
		goodbyeChecks: goodbyeChecks,
		grace:         handshakeGrace,
		listeners:     map[net.Listener]struct{}{},
		conns:         map[*conn]struct{}{},
		empty:         make(chan struct{}),
	}, nil
}

// Serve accepts clients on ln, which it closes, until Shutdown, which makes it return
// ErrShutdown, or until ctx ends or ln fails, which both break the clients of this listener off
// at once. It returns after the last connection of this listener.
func (s *Server) Serve(ctx context.Context, ln net.Listener, lo ListenOptions) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stopped := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(stopped)
		_ = ln.Close()
	})
	defer func() {
		if !stop() {
			<-stopped
		}
		_ = ln.Close()
	}()
	if !s.addListener(ln) {
		return ErrShutdown
	}
	defer s.removeListener(ln)
	for {
		sock, err := accept(ctx, ln)
		if err != nil {
			switch {
			case s.isDraining():
				s.removeListener(ln)
				wg.Wait()
				return ErrShutdown
			case ctx.Err() != nil:
				return context.Cause(ctx)
			}
			return fmt.Errorf("accept nbd clients on %s: %w", ln.Addr(), err)
		}
		c := newConn(ctx, s, sock, lo)
		if !c.mayStay() {
			c.log.Warn("client rejected: no rule of the listener allows it", "peer", c.peer)
			c.fail(errNotAllowed)
			continue
		}
		if !s.addConn(c) {
			c.fail(errBye)
			continue
		}
		wg.Go(func() {
			defer s.removeConn(c)
			broken := make(chan struct{})
			stop := context.AfterFunc(ctx, func() {
				defer close(broken)
				c.fail(context.Cause(ctx))
			})
			c.serve()
			if !stop() {
				<-broken
			}
		})
	}
}

// accept waits for a client, and again after errors that pass, such as too many open files.
func accept(ctx context.Context, ln net.Listener) (net.Conn, error) {
	for delay := 5 * time.Millisecond; ; delay = min(2*delay, time.Second) {
		sock, err := ln.Accept()
		var ne net.Error
		//lint:ignore SA1019 net/http judges accept errors by it too
		if err == nil || !errors.As(err, &ne) || !ne.Temporary() {
			return sock, err
		}
		select {
		case <-time.After(delay):
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// Shutdown stops accepting, lets every connection answer the requests it has read, and closes
// it. A client that is still shaking hands is given a second to finish, so that it sees an open
// export close, which it may know how to survive, and not a server that fails. If ctx ends first, the connections left are broken off and ctx's error is returned.
func (s *Server) Shutdown(ctx context.Context) error {
	s.mu.Lock()
	if !s.draining {
		s.draining = true
		for ln := range s.listeners {
			_ = ln.Close()
		}
		for c := range s.conns {
			c.drain()
		}
		s.checkEmptyLocked()
	}
	s.mu.Unlock()
	select {
	case <-s.empty:
		return nil
	case <-ctx.Done():
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for c := range s.conns {
		c.fail(errDrained)
	}
	return ctx.Err()
}

// Drop closes the connections to the exports that leaving names, as Shutdown does it: what they have read is answered.
// Exports.Open must not give those exports any more. If ctx ends first, the connections left are broken off and ctx's
// error is returned.
func (s *Server) Drop(ctx context.Context, leaving func(export string) bool) error {
	var conns []*conn
	s.mu.Lock()
	for c := range s.conns {
		c.mu.Lock()
		on := c.grantedOn // set before the export is opened
		c.mu.Unlock()
		if on != "" && leaving(on) {
			conns = append(conns, c)
		}
	}
	s.mu.Unlock()
	for _, c := range conns {
		c.drain()
	}
	for _, c := range conns {
		select {
		case <-c.gone:
			continue
		case <-ctx.Done():
		}
		for _, c := range conns {
			c.fail(errDrained)
		}
		return ctx.Err()
	}
	return nil
}

func (s *Server) isDraining() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.draining
}

func (s *Server) addListener(ln net.Listener) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.draining {
		s.listeners[ln] = struct{}{}
	}
	return !s.draining
}

func (s *Server) removeListener(ln net.Listener) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.listeners, ln)
	s.checkEmptyLocked()
}

// checkEmptyLocked tells Shutdown when nothing is left to wait for.
func (s *Server) checkEmptyLocked() {
	if s.draining && !s.emptied && len(s.conns) == 0 && len(s.listeners) == 0 {
		s.emptied = true
		close(s.empty)
	}
}

// addConn admits c unless the server is full or closed. One that was accepted while the server began
// to close is served as far as the others are.
func (s *Server) addConn(c *conn) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.emptied {
		return false
	}
	if len(s.conns) >= s.opt.ConnsMax {
		s.opt.Metrics.Rejected()
		c.log.Warn("client rejected: too many connections", "limit", s.opt.ConnsMax)
		return false
	}
	s.conns[c] = struct{}{}
	if s.draining {
		c.drain()
	}
	return true
}

func (s *Server) removeConn(c *conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.conns, c)
	close(c.gone)
	s.checkEmptyLocked()
}
