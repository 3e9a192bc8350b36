// Package harness runs the real gateway binary for tests that kill it, starve it and lose its disks.
// Every process it starts is ended by its own process id when the test ends, and dies with the test.
package harness

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

var (
	buildOnce sync.Once
	buildPath string
	buildErr  error
)

// Binary builds cmd/gateway once per test process and returns its path; the build cache makes that
// cheap. GRAINDISK_RACE=1 builds it with the race detector.
func Binary(t testing.TB) string {
	t.Helper()
	buildOnce.Do(func() {
		dir, err := os.MkdirTemp("", "gateway-bin-")
		if err != nil {
			buildErr = err
			return
		}
		buildPath = filepath.Join(dir, "gateway")
		args := []string{"build", "-o", buildPath}
		if os.Getenv("GRAINDISK_RACE") == "1" {
			args = append(args, "-race")
		}
		out, err := exec.Command("go", append(args, "graindisk/cmd/gateway")...).CombinedOutput()
		if err != nil {
			buildErr = fmt.Errorf("build the gateway: %w\n%s", err, out)
		}
	})
	if buildErr != nil {
		t.Fatal(buildErr)
	}
	return buildPath
}

// PlainBinary is Binary without the race detector in any case: for what is measured.
func PlainBinary(t testing.TB) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "gateway")
	if out, err := exec.Command("go", "build", "-o", path, "graindisk/cmd/gateway").CombinedOutput(); err != nil {
		t.Fatalf("build the gateway: %v\n%s", err, out)
	}
	return path
}

// Cleanup removes the binary; call it at the end of TestMain.
func Cleanup() {
	if buildPath != "" {
		os.RemoveAll(filepath.Dir(buildPath))
	}
}

// Gateway is one running `gateway serve`.
type Gateway struct {
	URIs []string // as printed on the ready line
	t    testing.TB
	args []string
	cmd  *exec.Cmd
	log  *syncBuffer

	ready chan string // the first line of stdout
	done  chan struct{}
}

// readyTimeout is generous: the machine may be building something else.
const readyTimeout = 90 * time.Second

// Serve starts `gateway serve args...` and waits until it is ready.
func Serve(t testing.TB, args ...string) *Gateway {
	t.Helper()
	g, err := TryServe(t, args...)
	if err != nil {
		t.Fatal(err)
	}
	return g
}

// TryServe is Serve for a gateway that may refuse; the error holds what it wrote on stderr.
func TryServe(t testing.TB, args ...string) (*Gateway, error) {
	t.Helper()
	g, err := Start(t, args...)
	if err != nil {
		return nil, err
	}
	return g, g.WaitReady()
}

// Start starts `gateway serve args...` and returns at once.
func Start(t testing.TB, args ...string) (*Gateway, error) {
	t.Helper()
	return start(t, nil, exec.Command(Binary(t), append([]string{"serve"}, args...)...), args)
}

// StartActivated is Start as systemd would do it, with a listening socket that is open already.
func StartActivated(t testing.TB, socket *os.File, args ...string) (*Gateway, error) {
	t.Helper()
	// The process must know its own number beforehand, which a shell does.
	sh := append([]string{"-c", `LISTEN_PID=$$ LISTEN_FDS=1 exec "$0" "$@"`, Binary(t), "serve"}, args...)
	return start(t, []*os.File{socket}, exec.Command("sh", sh...), args)
}

func start(t testing.TB, files []*os.File, cmd *exec.Cmd, args []string) (*Gateway, error) {
	t.Helper()
	g := &Gateway{t: t, args: args, log: new(syncBuffer), ready: make(chan string, 1), done: make(chan struct{})}
	g.cmd = cmd
	g.cmd.ExtraFiles = files
	g.cmd.Stderr = g.log
	g.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	out, err := g.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := g.cmd.Start(); err != nil {
		return nil, err
	}
	go func() {
		line, _ := bufio.NewReader(out).ReadString('\n')
		g.ready <- line
		g.cmd.Wait()
		close(g.done)
	}()
	t.Cleanup(g.end)
	return g, nil
}

// WaitReady waits until the gateway is ready and fills in URIs. Call it once, after Start.
func (g *Gateway) WaitReady() error {
	select {
	case line := <-g.ready:
		uris, ok := strings.CutPrefix(strings.TrimSpace(line), "ready ")
		if !ok {
			<-g.done
			return fmt.Errorf("gateway %v: exit %d: %s", g.args, g.ExitCode(), strings.TrimSpace(g.Log()))
		}
		g.URIs = strings.Fields(uris)
		return nil
	case <-time.After(readyTimeout):
		g.Kill()
		return fmt.Errorf("gateway %v: not ready after %v: %s", g.args, readyTimeout, g.Log())
	}
}

func (g *Gateway) end() {
	g.Kill()
	if g.t.Failed() {
		g.t.Logf("gateway %v wrote:\n%s", g.args, tail(g.Log(), 8<<10))
	}
}

// Kill ends the process with SIGKILL and waits for it. It may be called again.
func (g *Gateway) Kill() {
	select {
	case <-g.done:
	default:
		g.cmd.Process.Kill()
		<-g.done
	}
}

// Signal sends sig.
func (g *Gateway) Signal(sig os.Signal) { g.cmd.Process.Signal(sig) }

// Stop asks the gateway to end (SIGTERM) and returns its exit code.
func (g *Gateway) Stop() int {
	g.t.Helper()
	g.Signal(syscall.SIGTERM)
	select {
	case <-g.done:
	case <-time.After(2 * time.Minute):
		g.Kill()
		g.t.Errorf("gateway did not end within two minutes of SIGTERM")
	}
	return g.ExitCode()
}

// Ended says whether the process has ended.
func (g *Gateway) Ended() bool {
	select {
	case <-g.done:
		return true
	default:
		return false
	}
}

// ExitCode is the ended process's; -1 if a signal ended it.
func (g *Gateway) ExitCode() int { return g.cmd.ProcessState.ExitCode() }

// PID is the process id.
func (g *Gateway) PID() int { return g.cmd.Process.Pid }

// WrittenBytes is how much the process has written to disks, page cache included, as the kernel counts.
func (g *Gateway) WrittenBytes() int64 { return g.io("write_bytes") }

// io is a figure of /proc/PID/io.
func (g *Gateway) io(name string) int64 {
	g.t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/io", g.cmd.Process.Pid))
	if err != nil {
		g.t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		if n, ok := strings.CutPrefix(line, name+": "); ok {
			bytes, err := strconv.ParseInt(strings.TrimSpace(n), 10, 64)
			if err != nil {
				g.t.Fatal(err)
			}
			return bytes
		}
	}
	g.t.Fatalf("no %s in %q", name, text)
	return 0
}

// Asked is how many bytes the process has read and written by system calls, whatever cache they came from
// or went to, as the kernel counts.
func (g *Gateway) Asked() (read, written int64) { return g.io("rchar"), g.io("wchar") }

// Log is what the gateway wrote on stderr so far.
func (g *Gateway) Log() string { return g.log.String() }

// Result is what one short command did.
type Result struct {
	Code           int
	Stdout, Stderr string
}

// Run runs `gateway args...` to its end.
func Run(t testing.TB, args ...string) Result {
	t.Helper()
	return Command(t, Binary(t), args...)
}

// Command runs any program to its end, for at most five minutes.
func Command(t testing.TB, name string, args ...string) Result {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	if exit := new(exec.ExitError); err != nil && !errors.As(err, &exit) {
		t.Fatalf("%s %v: %v\n%s", name, args, err, errs.String())
	}
	return Result{cmd.ProcessState.ExitCode(), out.String(), errs.String()}
}

// Must runs any program and fails the test unless it exits with 0.
func Must(t testing.TB, name string, args ...string) string {
	t.Helper()
	r := Command(t, name, args...)
	if r.Code != 0 {
		t.Fatalf("%s %s: exit %d\n%s%s", name, strings.Join(args, " "), r.Code, r.Stdout, r.Stderr)
	}
	return r.Stdout
}

// JSON runs `gateway args... --json` and decodes what it prints into out.
func JSON(t testing.TB, out any, args ...string) {
	t.Helper()
	r := Run(t, append(args, "--json")...)
	if r.Code != 0 {
		t.Fatalf("gateway %v: exit %d: %s%s", args, r.Code, r.Stdout, r.Stderr)
	}
	if err := json.Unmarshal([]byte(r.Stdout), out); err != nil {
		t.Fatalf("gateway %v printed %q: %v", args, r.Stdout, err)
	}
}

// Disk is what the tests want of `disk show --json`.
type Disk struct {
	Name             string `json:"name"`
	UnpublishedBytes int64  `json:"unpublished_bytes"`
	PublishedCut     uint64 `json:"published_cut"`
	Epoch            uint64 `json:"epoch"`
}

// Show is `disk show`. where selects the gateway: "--data", DIR or "--config", FILE.
func Show(t testing.TB, disk string, where ...string) (d Disk) {
	t.Helper()
	JSON(t, &d, append([]string{"disk", "show", disk}, where...)...)
	return d
}

// WaitPublished waits until `disk show` reports nothing unpublished.
func WaitPublished(t testing.TB, disk string, where ...string) Disk {
	t.Helper()
	deadline := time.Now().Add(3 * time.Minute)
	for {
		d := Show(t, disk, where...)
		if d.UnpublishedBytes == 0 {
			return d
		}
		if time.Now().After(deadline) {
			t.Fatalf("disk %s still has %d unpublished bytes after three minutes", disk, d.UnpublishedBytes)
		}
		time.Sleep(100 * time.Millisecond)
	}
}

// Need fails the test if a program is missing: a required suite is never skipped silently.
func Need(t testing.TB, programs ...string) {
	t.Helper()
	for _, p := range programs {
		if _, err := exec.LookPath(p); err != nil {
			t.Fatalf("%s is not installed: run \"make test-tools\"", p)
		}
	}
}

func tail(s string, n int) string { return s[max(0, len(s)-n):] }

type syncBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *syncBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *syncBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}
