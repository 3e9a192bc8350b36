package nbd

import (
	"net"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// hangupCheck is how often a reader that waits looks whether its client is still there.
	hangupCheck = time.Second
	// goodbyeChecks is how often it may find it gone while it answers what came before a DISC.
	goodbyeChecks = 30
)

// watchHangup ends the connection if the client hangs up before stop is called and is found gone more than
// patience times: a reader that waits for a budget does not read the socket, and would not see the end of it.
func (c *conn) watchHangup(patience int) (stop func()) {
	var over atomic.Bool
	var timer *time.Timer
	ready := make(chan struct{}) // timer is set
	timer = time.AfterFunc(hangupCheck, func() {
		<-ready
		switch {
		case over.Load():
		case hungUp(c.sock) && patience == 0:
			c.fail(errHungUp)
		default:
			if hungUp(c.sock) {
				patience--
			}
			timer.Reset(hangupCheck)
		}
	})
	close(ready)
	return func() {
		over.Store(true)
		timer.Stop()
	}
}

// hungUp reports whether the peer has closed its end, read or not. It does not wait.
func hungUp(sock net.Conn) bool {
	sc, ok := sock.(syscall.Conn)
	if !ok {
		return false
	}
	rc, err := sc.SyscallConn()
	if err != nil {
		return false
	}
	gone := false
	err = rc.Control(func(fd uintptr) {
		fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLRDHUP}}
		n, err := unix.Poll(fds, 0)
		gone = err == nil && n > 0 // POLLRDHUP, or POLLHUP and POLLERR, which need not be asked for
	})
	return err == nil && gone
}
