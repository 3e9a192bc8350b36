package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"syscall"
	"time"

	"graindisk/frontend/nbd"
	"graindisk/internal/access"
)

// How "serve --replace" takes over from the gateway that runs:
//
//	next ── hello ──► running     over DATA/next.sock
//	next ◄─ sockets ─ running     listening sockets, SCM_RIGHTS: from here on nobody is refused
//	next ─── ok ────► running     it stops accepting, answers what it has read, lets go of its pools
//	next waits for the lock of the data directory, which goes with the running process, opens the
//	pools from their log, and serves
//
// Until "ok" the running gateway goes on as if nothing had been. It does not publish before it ends,
// unlike at a clean stop: the log holds everything, the next process opens the same log, and guests
// would wait meanwhile.
const (
	handoverHello = "graindisk handover 1\n"
	handoverOK    = "ok\n"

	// handoverStep bounds one side's wait for the other's next word.
	handoverStep = 10 * time.Second
	// handoverDrain bounds the wait for answers to requests that were read: one that still waits
	// for a store then is asked again by its client.
	handoverDrain = 5 * time.Second
)

// requestHandover asks the gateway that runs on the data directory for its sockets; nil if none does.
func requestHandover(ctx context.Context, path string) (*nbd.Inherited, error) {
	d := net.Dialer{Timeout: handoverStep}
	c, err := d.DialContext(ctx, "unix", path)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED) {
		return nil, nil
	}
	var in *nbd.Inherited
	if err == nil {
		defer c.Close()
		c.SetDeadline(time.Now().Add(handoverStep))
		if _, err = io.WriteString(c, handoverHello); err == nil {
			in, err = nbd.Receive(c.(*net.UnixConn))
		}
		if err == nil {
			_, err = io.WriteString(c, handoverOK)
		}
	}
	if err != nil {
		in.Close()
		return nil, fmt.Errorf("take over from the running gateway: %w; it goes on, and its log may say why", err)
	}
	return in, nil
}

// serveHandover gives socks to the first process that asks on ln, and calls handed once it has them.
// It returns when that or ctx has ended it, and closes ln.
func serveHandover(ctx context.Context, ln net.Listener, socks []nbd.Socket, log *slog.Logger, handed func()) error {
	stop := context.AfterFunc(ctx, func() { ln.Close() })
	defer stop()
	defer ln.Close()
	for {
		c, err := ln.Accept()
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return fmt.Errorf("hand-over socket: %w", err)
		}
		err = handOver(c.(*net.UnixConn), socks)
		c.Close()
		if err != nil {
			log.Warn("the sockets were not handed over; this gateway goes on", "error", err)
			continue
		}
		for _, s := range socks {
			if u, ok := s.Listener.(*net.UnixListener); ok {
				u.SetUnlinkOnClose(false) // its file is the next process's
			}
		}
		log.Info("sockets handed over to the next process")
		handed()
		return nil
	}
}

func handOver(c *net.UnixConn, socks []nbd.Socket) error {
	if p := access.PeerOf(c); !p.Unix || p.UID != 0 && int(p.UID) != os.Geteuid() {
		return fmt.Errorf("asked by user %d", p.UID)
	}
	c.SetDeadline(time.Now().Add(handoverStep))
	hello := make([]byte, len(handoverHello))
	if n, err := io.ReadFull(c, hello); err != nil || string(hello) != handoverHello {
		return fmt.Errorf("asked with %q, which this version does not know", hello[:n])
	}
	if err := nbd.Pass(c, socks); err != nil {
		return err
	}
	ok := make([]byte, len(handoverOK))
	if n, err := io.ReadFull(c, ok); err != nil || string(ok) != handoverOK {
		return fmt.Errorf("the next process did not take them: it answered %q", ok[:n])
	}
	return nil
}
