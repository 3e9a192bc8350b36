package many

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"graindisk/frontend/nbd/nbdclient"
	"graindisk/test/harness"
)

func TestMain(m *testing.M) {
	code := m.Run()
	harness.Cleanup()
	os.Exit(code)
}

const (
	disks      = 200
	diskBytes  = 64 << 20
	limitBytes = 512 << 20
	dirtyAge   = 2 * time.Second
	think      = 100 * time.Millisecond // between the writes of one slow writer
	blockBytes = 4096
)

const config = `data: %[1]s
tier: {dir: %[1]s/tier, size: 2GiB, ram: 128MiB}
pools:
  main:
    stripe: {data: 2, parity: 1}
    max_dirty_age: %[2]v
    targets:
      - {name: a, local: {dir: %[1]s/targets/a}}
      - {name: b, local: {dir: %[1]s/targets/b}}
      - {name: c, local: {dir: %[1]s/targets/c}}
    disks:
`

// TestManySlowDisks serves 200 disks with a slow writer each in 512 MiB: no more than one segment comes of
// a max_dirty_age. Then a disk is written as fast as it goes beside them, so that banks fill. The gateway
// lives through both, its peak stays below the bound, and every writer finds its last write.
func TestManySlowDisks(t *testing.T) {
	length := 10 * time.Second
	if s := os.Getenv("GRAINDISK_SOAK"); s != "" {
		d, err := time.ParseDuration(s)
		if err != nil {
			t.Fatal("GRAINDISK_SOAK:", err)
		}
		length = max(length, d/2)
	}
	g := serve(t)
	w := newWriters(t, g)
	before, start := g.status(t), time.Now()
	w.run(t, length)
	took := time.Since(start)
	g.settle(t)
	after := g.status(t)
	cuts, segments := after.PublishedCut-before.PublishedCut, after.Segments-before.Segments
	if most := int(took/dirtyAge) + 2; cuts == 0 || int(cuts) > most || segments > int(cuts) {
		t.Errorf("%d segments in %d cuts within %v of writing, want at most %d, one for each max_dirty_age of %v", segments, cuts, took, most, dirtyAge)
	}
	peak := g.peak(t)
	t.Logf("COUNT %d disks, %s: %d writes in %v gave %d partial segments in %d cuts, one in %v; peak resident memory %d MiB",
		disks, g.cage.kind, w.writes, took.Round(time.Millisecond), segments, cuts, (took / time.Duration(max(cuts, 1))).Round(time.Millisecond), peak>>20)

	stop := w.stream(t, g)
	w.run(t, length)
	written := stop()
	g.settle(t)
	w.verify(t)
	peak = g.peak(t)
	t.Logf("COUNT with a stream of %d MiB beside them: peak resident memory %d MiB of %d; %+v", written>>20, peak>>20, limitBytes>>20, g.status(t).Buffers)
	if peak > limitBytes {
		t.Errorf("peak resident memory %d bytes, the bound is %d", peak, limitBytes)
	}
	if g.cage.ooms != nil {
		if n, err := g.cage.ooms(); err != nil || n != 0 {
			t.Errorf("%d processes killed for memory; %v", n, err)
		}
	}
}

// gateway is one `gateway serve` in a cage.
type gateway struct {
	cage cage
	dir  string
	cmd  *exec.Cmd
}

func serve(t *testing.T) *gateway {
	t.Helper()
	g := &gateway{dir: t.TempDir(), cage: newCage(t, limitBytes)}
	var text strings.Builder
	fmt.Fprintf(&text, config, g.dir, dirtyAge)
	for i := range disks {
		fmt.Fprintf(&text, "      - {name: d%d, size: %d}\n", i, diskBytes)
	}
	fmt.Fprintf(&text, "      - {name: stream, size: 1GiB}\n")
	var err error
	for _, n := range []string{"a", "b", "c"} {
		err = errors.Join(err, os.MkdirAll(filepath.Join(g.dir, "targets", n), 0o700))
	}
	err = errors.Join(err, os.WriteFile(g.config(), []byte(text.String()), 0o600))
	if err != nil {
		t.Fatal(err)
	}
	binary := harness.PlainBinary(t) // the race detector takes several times the memory
	harness.Must(t, binary, "pool", "create", "main", "--config", g.config())
	args := []string{binary, "serve", "--config", g.config()}
	if g.cage.procs != "" {
		args = append([]string{"sh", "-c", `echo $$ > "$0" && exec "$@"`, g.cage.procs}, args...)
	}
	g.cmd = exec.Command(args[0], args[1:]...)
	if g.cage.procs == "" {
		g.cmd.Env = append(os.Environ(), fmt.Sprintf("GOMEMLIMIT=%d", limitBytes*7/8))
	}
	log := new(bytes.Buffer)
	g.cmd.Stderr, g.cmd.SysProcAttr = log, &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	out, err := g.cmd.StdoutPipe()
	if err == nil {
		err = g.cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		g.cmd.Process.Kill()
		g.cmd.Wait()
		if t.Failed() {
			t.Log(log.String()[max(0, log.Len()-4000):])
		}
	})
	line, err := bufio.NewReader(out).ReadString('\n')
	if !strings.HasPrefix(line, "ready ") {
		t.Fatalf("the gateway said %q: %v", line, err)
	}
	return g
}

func (g *gateway) config() string { return filepath.Join(g.dir, "gateway.yaml") }

func (g *gateway) dial(t *testing.T, disk string) *nbdclient.Client {
	t.Helper()
	c, err := nbdclient.Dial(t.Context(), "nbd+unix:///"+disk+"?socket="+filepath.Join(g.dir, "nbd.sock"), nbdclient.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

type status struct {
	PublishedCut     uint64         `json:"published_cut"`
	UnpublishedBytes int64          `json:"unpublished_bytes"`
	Segments         int            `json:"segments"`
	Buffers          map[string]any `json:"buffers"`
}

func (g *gateway) status(t *testing.T) (s status) {
	t.Helper()
	harness.JSON(t, &s, "pool", "status", "main", "--config", g.config())
	return s
}

// settle waits until everything is published.
func (g *gateway) settle(t *testing.T) {
	t.Helper()
	for deadline := time.Now().Add(2 * time.Minute); g.status(t).UnpublishedBytes > 0; time.Sleep(100 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not published after two minutes: %+v", g.status(t))
		}
	}
}

// peak is the most memory the gateway has had.
func (g *gateway) peak(t *testing.T) int64 {
	t.Helper()
	kib, err := field(fmt.Sprintf("/proc/%d/status", g.cmd.Process.Pid), "VmHWM")
	if err != nil {
		t.Fatalf("the gateway is gone: %v", err)
	}
	return kib << 10
}

// writers are the guests: one connection to each disk, one 4 KiB write at a time.
type writers struct {
	clients []*nbdclient.Client
	last    []map[int64]uint64 // by disk and block, what was written there last

	mu     sync.Mutex
	writes uint64
}

func newWriters(t *testing.T, g *gateway) *writers {
	w := &writers{}
	for i := range disks {
		w.clients = append(w.clients, g.dial(t, fmt.Sprint("d", i)))
		w.last = append(w.last, map[int64]uint64{})
	}
	return w
}

func (w *writers) run(t *testing.T, length time.Duration) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), length)
	defer cancel()
	var g errgroup.Group
	for i, c := range w.clients {
		g.Go(func() error {
			time.Sleep(rand.N(think)) // the guests do not act in step
			p := make([]byte, blockBytes)
			for ; ctx.Err() == nil; time.Sleep(think) {
				w.mu.Lock()
				w.writes++
				n := w.writes
				w.mu.Unlock()
				blk := rand.Int64N(diskBytes / blockBytes)
				for at := 0; at < len(p); at += 16 {
					binary.LittleEndian.PutUint64(p[at:], n)
					binary.LittleEndian.PutUint64(p[at+8:], rand.Uint64())
				}
				if err := c.WriteAt(t.Context(), p, blk*blockBytes, false); err != nil {
					return fmt.Errorf("disk %d: %w", i, err)
				}
				w.last[i][blk] = n
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}
}

// verify reads every block back that was written.
func (w *writers) verify(t *testing.T) {
	t.Helper()
	var g errgroup.Group
	g.SetLimit(8)
	for i, c := range w.clients {
		g.Go(func() error {
			p := make([]byte, blockBytes)
			for blk, n := range w.last[i] {
				if err := c.ReadAt(t.Context(), p, blk*blockBytes); err != nil {
					return fmt.Errorf("disk %d: %w", i, err)
				}
				for at := 0; at < len(p); at += 16 {
					if got := binary.LittleEndian.Uint64(p[at:]); got != n {
						return fmt.Errorf("disk %d block %d holds write %d, want %d", i, blk, got, n)
					}
				}
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		t.Error(err)
	}
}

// stream writes one disk from end to end, again and again, until stop, which tells how much it was.
func (w *writers) stream(t *testing.T, g *gateway) (stop func() int64) {
	t.Helper()
	c := g.dial(t, "stream")
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan int64, 1)
	go func() {
		p := make([]byte, 1<<20)
		n := int64(0)
		for ctx.Err() == nil {
			for at := 0; at < len(p); at += 8 {
				binary.LittleEndian.PutUint64(p[at:], rand.Uint64())
			}
			if err := c.WriteAt(t.Context(), p, n%(1<<30), false); err != nil {
				t.Errorf("stream: %v", err)
				break
			}
			n += int64(len(p))
		}
		done <- n
	}()
	return func() int64 { cancel(); return <-done }
}
