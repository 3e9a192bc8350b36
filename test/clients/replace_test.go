package clients

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"graindisk/frontend/nbd/nbdclient"
	"graindisk/frontend/nbd/proto"
	"graindisk/test/harness"
)

// hangup sends SIGHUP and waits until the log has said so once more.
func (s *secured) hangup(says string) {
	s.t.Helper()
	before := strings.Count(s.Log(), says)
	s.Signal(syscall.SIGHUP)
	waitFor(s.t, says, func() bool { return strings.Count(s.Log(), says) > before })
}

func waitFor(t *testing.T, what string, done func() bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); !done(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s did not happen within a minute", what)
		}
	}
}

// replace starts a gateway that takes over from the running one, and waits for the end of that.
func (s *secured) replace() {
	s.t.Helper()
	old := s.Gateway
	s.start("--replace")
	waitFor(s.t, "the end of the replaced gateway", func() bool { return old.Ended() })
	if code := old.ExitCode(); code != 0 {
		s.t.Errorf("the replaced gateway: exit %d\n%s", code, old.Log())
	}
}

// A Go client that connects anew when its connection ends never finds the door shut, and every write it
// was told of is there; clients that come all the time are never refused.
func TestReplaceRefusesNobody(t *testing.T) {
	s := serveSecured(t)
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	knocked := make(chan error, 1)
	go func() { // a new connection every few milliseconds
		for ctx.Err() == nil {
			for _, at := range [][2]string{{"unix", s.dir + "/plain.sock"}, {"tcp", s.tcp}} {
				c, err := net.Dial(at[0], at[1])
				if err != nil {
					knocked <- err
					return
				}
				c.Close()
			}
			time.Sleep(2 * time.Millisecond)
		}
		knocked <- nil
	}()

	var written atomic.Uint64 // the last number acknowledged
	var connects atomic.Int64
	wrote := make(chan error, 1)
	go func() { wrote <- writeNumbers(ctx, s.plain("open"), &written, &connects) }()
	for range 3 {
		was, times := written.Load(), connects.Load()
		waitFor(t, "some writes", func() bool { return written.Load() > was+50 })
		s.replace()
		waitFor(t, "the client's return", func() bool { return connects.Load() > times })
	}
	was := written.Load()
	waitFor(t, "some writes", func() bool { return written.Load() > was+50 })
	stop()
	if err := <-knocked; err != nil {
		t.Errorf("a client was refused: %v", err)
	}
	if err := <-wrote; err != nil {
		t.Errorf("the writing client: %v", err)
	}
	last := written.Load()
	s.Kill() // and all of it is in the log
	s.start()
	c, err := nbdclient.Dial(context.Background(), s.plain("open"), nbdclient.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for n := last; n > 0 && n+slots > last; n-- {
		p := make([]byte, 512)
		if err := c.ReadAt(context.Background(), p, slotOf(n)); err != nil {
			t.Fatal(err)
		}
		if got := binary.LittleEndian.Uint64(p); got != n && got != n+slots { // one more may be on its way
			t.Errorf("slot of %d holds %d", n, got)
		}
	}
}

const slots = 1000

func slotOf(n uint64) int64 { return int64(n%slots) * 4096 }

// writeNumbers writes 1, 2, … each to its slot, and connects again whenever the connection ends, as QEMU
// does: what was not answered is asked again.
func writeNumbers(ctx context.Context, uri string, written *atomic.Uint64, connects *atomic.Int64) error {
	for ctx.Err() == nil {
		c, err := nbdclient.Dial(ctx, uri, nbdclient.Options{})
		if errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, io.ErrUnexpectedEOF) {
			continue // it came while the sockets changed hands
		}
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return err
		}
		connects.Add(1)
		for err == nil && ctx.Err() == nil {
			p := make([]byte, 4096)
			n := written.Load() + 1
			binary.LittleEndian.PutUint64(p, n)
			if err = c.WriteAt(context.Background(), p, slotOf(n), n%64 == 0); err == nil {
				written.Store(n)
			}
		}
		c.Close()
		if code := proto.OK; errors.As(err, &code) { // which a guest would be handed
			return fmt.Errorf("an error of the server: %w", err)
		}
	}
	return nil
}

// qemu-io with reconnect-delay goes on over a replaced gateway and sees no error.
func TestQemuSurvivesReplace(t *testing.T) {
	harness.Need(t, "qemu-io")
	s := serveSecured(t)
	args := s.qemu("vm1", "vm1")
	args[len(args)-1] += ",reconnect-delay=60"
	cmd := exec.Command("qemu-io", args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	var errs bytes.Buffer
	cmd.Stderr = &errs
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		in.Close()
		cmd.Wait()
	}()
	answers := bufio.NewScanner(out)
	say := func(command, want string) {
		t.Helper()
		if _, err := io.WriteString(in, command+"\n"); err != nil {
			t.Fatalf("%s: %v, %s", command, err, errs.String())
		}
		for answers.Scan() {
			line := answers.Text()
			if strings.Contains(line, "failed") || strings.Contains(line, "rror") {
				t.Fatalf("%s: %s", command, line)
			}
			if strings.Contains(line, want) {
				return
			}
		}
		t.Fatalf("%s: qemu-io has ended: %s", command, errs.String())
	}
	for round := range 3 {
		say(fmt.Sprintf("write -P %d %dM 1M", 0x10+round, round), "wrote 1048576/1048576")
		say(fmt.Sprintf("write -P %d %dM 64k", 0x20+round, 8+round), "wrote 65536/65536")
		s.replace()
		for i := range round + 1 {
			say(fmt.Sprintf("read -P %d %dM 1M", 0x10+i, i), "read 1048576/1048576")
			say(fmt.Sprintf("read -P %d %dM 64k", 0x20+i, 8+i), "read 65536/65536")
		}
		say("write -P 1 32M 4k", "wrote 4096/4096")
	}
}

// With nobody to replace, --replace just serves; a broken configuration takes nothing away from the
// gateway that runs.
func TestReplaceNeedsNobodyAndBreaksNothing(t *testing.T) {
	s := serveSecured(t)
	good, err := os.ReadFile(s.config)
	if err != nil {
		t.Fatal(err)
	}
	s.configure("allow: [nonsense]")
	if _, err := harness.TryServe(t, "--config", s.config, "--replace"); err == nil {
		t.Error("served with a broken configuration")
	}
	if err := os.WriteFile(s.config, good, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(s.dir+"/server/server-key.pem", s.dir+"/key"); err != nil {
		t.Fatal(err)
	}
	if _, err := harness.TryServe(t, "--config", s.config, "--replace"); err == nil {
		t.Error("served without its key")
	}
	if err := os.Rename(s.dir+"/key", s.dir+"/server/server-key.pem"); err != nil {
		t.Fatal(err)
	}
	// One that asks for the sockets and goes away without taking them.
	c, err := net.Dial("unix", s.dir+"/data/next.sock")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(c, "graindisk handover 1\n"); err != nil {
		t.Fatal(err)
	}
	c.Read(make([]byte, 1))
	c.Close()
	waitFor(t, "the gateway's word about it", func() bool { return strings.Contains(s.Log(), "this gateway goes on") })
	if s.Ended() {
		t.Fatal("the running gateway ended")
	}
	harness.Must(t, "nbdinfo", s.plain("open"))
	if code := s.Stop(); code != 0 {
		t.Errorf("exit %d", code)
	}
	for _, name := range []string{"plain.sock", "tls.sock", "data/next.sock", "data/admin.sock"} {
		if _, err := os.Stat(s.dir + "/" + name); !os.IsNotExist(err) {
			t.Errorf("%s was left behind: %v", name, err)
		}
	}
	s.start("--replace")
	harness.Must(t, "nbdinfo", s.plain("open"))
}

// A gateway started as systemd starts one, with a socket that is open already: clients that came before
// it are served, and the socket outlives it.
func TestSystemdSocketActivation(t *testing.T) {
	harness.Need(t, "nbdinfo")
	s := serveSecured(t)
	if code := s.Stop(); code != 0 {
		t.Fatalf("exit %d", code)
	}
	ln, err := net.Listen("unix", s.dir+"/plain.sock")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	f, err := ln.(*net.UnixListener).File()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for range 2 {
		early := make(chan error, 1)
		go func() {
			c, err := nbdclient.Dial(context.Background(), s.plain("open"), nbdclient.Options{})
			if err == nil {
				err = c.Close()
			}
			early <- err
		}()
		s.Gateway, err = harness.StartActivated(t, f, "--config", s.config)
		if err != nil {
			t.Fatal(err)
		}
		if err := s.WaitReady(); err != nil {
			t.Fatal(err)
		}
		if err := <-early; err != nil {
			t.Errorf("a client that came before the gateway: %v", err)
		}
		harness.Must(t, "nbdinfo", s.plain("open"))
		if code := s.Stop(); code != 0 {
			t.Errorf("exit %d\n%s", code, s.Log())
		}
		if _, err := os.Stat(s.dir + "/plain.sock"); err != nil {
			t.Errorf("systemd's socket is gone: %v", err)
		}
	}
	other, err := net.Listen("unix", s.dir+"/other.sock")
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	g, err := other.(*net.UnixListener).File()
	if err != nil {
		t.Fatal(err)
	}
	defer g.Close()
	ln.Close()
	f.Close()
	x, err := harness.StartActivated(t, g, "--config", s.config)
	if err == nil {
		err = x.WaitReady()
	}
	if err == nil || !strings.Contains(err.Error(), "other.sock, which the configuration does not name") {
		t.Errorf("a socket that nobody configured: %v", err)
	}
	s.start()
}
