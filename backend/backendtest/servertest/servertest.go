// Package servertest runs a store's real server for a test: on 127.0.0.1, as a process of its own that
// dies with the test, ended by its process id.
package servertest

import (
	"bytes"
	"net"
	"net/http"
	"os/exec"
	"runtime"
	"sync"
	"syscall"
	"testing"
	"time"
)

const (
	startTimeout = 60 * time.Second // usually 1 to 3 s
	stopTimeout  = 20 * time.Second // then it is killed
	portTries    = 5                // a port found free may be taken before the server has it
)

// Process is one server. Its methods must be called by one goroutine at a time.
type Process struct {
	Name    string
	Address string // host:port; the same for the server's whole life
	// Command makes the command that serves on Address.
	Command func(address string) *exec.Cmd
	// Ready is the path that answers a GET once the server serves, with status Want.
	Ready string
	Want  int

	cmd    *exec.Cmd
	exited chan struct{} // closed once cmd has ended
	log    logBuffer
}

// Run starts the server on a port of its own choice; it stops when the test ends. If the test fails, the
// end of the server's log is in the test's.
func (p *Process) Run(t testing.TB) {
	t.Helper()
	t.Cleanup(func() {
		p.Stop(t)
		if t.Failed() {
			t.Logf("end of the %s log:\n%s", p.Name, p.log.String())
		}
	})
	for range portTries {
		p.Address = FreeAddress(t)
		if p.launch(t) {
			return
		}
	}
	t.Fatalf("%s did not start:\n%s", p.Name, p.log.String())
}

// FreeAddress is a host:port of 127.0.0.1 where nobody listens at this moment.
func FreeAddress(t testing.TB) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// launch starts the process and waits until it is ready. It returns false if the process has ended instead.
func (p *Process) launch(t testing.TB) bool {
	t.Helper()
	p.cmd = p.Command(p.Address)
	p.cmd.Stdout, p.cmd.Stderr = &p.log, &p.log
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL} // should the test die without its clean-up
	p.exited = make(chan struct{})
	started := make(chan error)
	go func(cmd *exec.Cmd, exited chan struct{}) {
		// Pdeathsig means the death of the thread that started it, so this one stays.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		defer close(exited)
		err := cmd.Start()
		started <- err
		if err == nil {
			_ = cmd.Wait() // why it ended is in its log
		}
	}(p.cmd, p.exited)
	if err := <-started; err != nil {
		t.Fatalf("start %s: %v", p.Name, err)
	}
	return p.awaitReady(t)
}

func (p *Process) awaitReady(t testing.TB) bool {
	t.Helper()
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: time.Second}
	deadline := time.After(startTimeout)
	for {
		if resp, err := client.Get("http://" + p.Address + p.Ready); err == nil {
			resp.Body.Close()
			if resp.StatusCode == p.Want {
				return true
			}
		}
		select {
		case <-p.exited:
			return false
		case <-deadline:
			t.Fatalf("%s was not ready after %v:\n%s", p.Name, startTimeout, p.log.String())
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// Stop ends the server, as an outage would: what it stored stays. It may be started again.
func (p *Process) Stop(t testing.TB) {
	t.Helper()
	if p.cmd == nil || p.cmd.Process == nil {
		return
	}
	_ = p.cmd.Process.Signal(syscall.SIGTERM) // fails only if it has ended
	_ = p.cmd.Process.Signal(syscall.SIGCONT) // it may be paused
	select {
	case <-p.exited:
	case <-time.After(stopTimeout):
		t.Logf("%s did not stop within %v, killing it", p.Name, stopTimeout)
		_ = p.cmd.Process.Kill()
		<-p.exited
	}
	p.cmd = nil
}

// Kill is Stop without a chance to finish anything.
func (p *Process) Kill(t testing.TB) {
	t.Helper()
	if p.cmd == nil || p.cmd.Process == nil {
		return
	}
	_ = p.cmd.Process.Kill() // fails only if it has ended
	<-p.exited
	p.cmd = nil
}

// Start starts a stopped server again, with the same address and data.
func (p *Process) Start(t testing.TB) {
	t.Helper()
	if p.cmd != nil {
		t.Fatalf("%s is running", p.Name)
	}
	if !p.launch(t) {
		t.Fatalf("%s did not start again at %s:\n%s", p.Name, p.Address, p.log.String())
	}
}

// Pause stops the server from answering, as a network that swallows packets would.
func (p *Process) Pause(t testing.TB) { p.signal(t, syscall.SIGSTOP) }

// Resume undoes Pause.
func (p *Process) Resume(t testing.TB) { p.signal(t, syscall.SIGCONT) }

func (p *Process) signal(t testing.TB, sig syscall.Signal) {
	t.Helper()
	if err := p.cmd.Process.Signal(sig); err != nil {
		t.Fatal(err)
	}
}

// logBuffer keeps the last 64 KiB or so of what the server says.
type logBuffer struct {
	mu  sync.Mutex
	buf []byte
}

const logBytesMax = 64 << 10

// Write implements io.Writer.
func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.buf = append(l.buf, p...)
	if len(l.buf) > 2*logBytesMax {
		l.buf = bytes.Clone(l.buf[len(l.buf)-logBytesMax:])
	}
	return len(p), nil
}

// String is what is kept.
func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return string(l.buf)
}
