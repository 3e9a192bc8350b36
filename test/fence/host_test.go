package fence

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"graindisk/block"
	"graindisk/frontend/nbd/nbdclient"
	"graindisk/test/harness"
)

func TestMain(m *testing.M) {
	code := m.Run()
	harness.Cleanup()
	os.Exit(code)
}

const (
	diskBytes = 16 << 20
	beat      = 500 * time.Millisecond
	watch     = 6 * time.Second
	dirtyAge  = 20 * time.Second // long enough that what is written before a pause is not published
	soon      = 90 * time.Second // what must happen; the machine may be busy
)

// host is a gateway's configuration with a data directory and a tier of its own.
type host struct {
	t                 *testing.T
	dir, config, tier string
}

// newHost configures pool main on the targets, lines of the configuration but for their names.
func newHost(t *testing.T, targets []string, dirty time.Duration) *host {
	t.Helper()
	dir := t.TempDir()
	h := &host{t: t, dir: dir, config: filepath.Join(dir, "gateway.yaml"), tier: filepath.Join(dir, "tier")}
	var list strings.Builder
	for i, target := range targets {
		fmt.Fprintf(&list, "      - {name: t%d, %s}\n", i, target)
	}
	text := fmt.Sprintf(`data: %q
tier: {dir: %q, size: 1GiB, ram: 32MiB}
pools:
  main:
    stripe: {data: 2, parity: 1}
    max_dirty_age: %v
    beat: %v
    watch: %v
    targets:
%s`, filepath.Join(dir, "data"), h.tier, dirty, beat, watch, list.String())
	h.must(os.WriteFile(h.config, []byte(text), 0o600))
	return h
}

// directories are three targets.
func directories(t *testing.T) (targets []string) {
	t.Helper()
	for range 3 {
		targets = append(targets, fmt.Sprintf("local: {dir: %q}", t.TempDir()))
	}
	return targets
}

func (h *host) must(err error) {
	h.t.Helper()
	if err != nil {
		h.t.Fatal(err)
	}
}

func (h *host) create() {
	h.t.Helper()
	harness.Must(h.t, harness.Binary(h.t), "pool", "create", "main", "--config", h.config)
}

func (h *host) serve(more ...string) *harness.Gateway {
	h.t.Helper()
	return harness.Serve(h.t, append([]string{"--config", h.config}, more...)...)
}

// refused expects that a gateway does not start, with exit code 11 and a line that says all the words.
func (h *host) refused(args []string, words ...string) {
	h.t.Helper()
	r := harness.Run(h.t, append([]string{"serve", "--config", h.config}, args...)...)
	if r.Code != 11 {
		h.t.Fatalf("exit %d: %s", r.Code, r.Stderr)
	}
	mustSay(h.t, r.Stderr, words...)
}

func mustSay(t *testing.T, text string, words ...string) {
	t.Helper()
	for _, w := range words {
		if !strings.Contains(text, w) {
			t.Errorf("%q is not said in:\n%s", w, text)
		}
	}
}

// status is what these tests want of `pool status --json`.
type status struct {
	State       string `json:"state"`
	Epoch       uint64 `json:"epoch"`
	Cut         uint64 `json:"published_cut"`
	Unpublished int64  `json:"unpublished_bytes"`
	Owner       struct {
		Log      string    `json:"log"`
		Host     string    `json:"host"`
		LastBeat time.Time `json:"last_beat"`
	} `json:"owner"`
	Fenced      *struct{ Lost lost } `json:"fenced"`
	Quarantines []struct {
		Dir  string
		Lost *lost
	} `json:"quarantines"`
}

// lost is a LOST.json.
type lost struct {
	ByLog      string `json:"by_log"`
	ByHost     string `json:"by_host"`
	ByEpoch    uint64 `json:"by_epoch"`
	Epoch      uint64 `json:"epoch"`
	ThroughCut uint64 `json:"through_cut"`
	Sure       bool   `json:"sure"`
	Bytes      int64  `json:"bytes"`
	Disks      []struct {
		Name    string      `json:"name"`
		Written [][2]uint64 `json:"written"`
	} `json:"disks"`
}

func (h *host) status() (s status) {
	h.t.Helper()
	harness.JSON(h.t, &s, "pool", "status", "main", "--config", h.config)
	return s
}

// until waits for a condition of the pool's status.
func (h *host) until(what string, ok func(status) bool) status {
	h.t.Helper()
	for deadline := time.Now().Add(soon); ; time.Sleep(50 * time.Millisecond) {
		s := h.status()
		if ok(s) {
			return s
		}
		if time.Now().After(deadline) {
			h.t.Fatalf("not %s within %v: %+v", what, soon, s)
		}
	}
}

// blocks are those that a list in dir has of disk vm.
func readLost(t *testing.T, dir string) (l lost, blocks map[uint64]bool) {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(dir, "LOST.json"))
	if err == nil {
		err = json.Unmarshal(b, &l)
	}
	if err != nil {
		t.Fatal(err)
	}
	blocks = map[uint64]bool{}
	for _, d := range l.Disks {
		if d.Name != "vm" {
			t.Errorf("disk %q in the list", d.Name)
		}
		for _, r := range d.Written {
			for i := range r[1] {
				blocks[r[0]+i] = true
			}
		}
	}
	return l, blocks
}

func dial(t *testing.T, g *harness.Gateway) *nbdclient.Client {
	t.Helper()
	c, err := nbdclient.Dial(t.Context(), g.URIs[0], nbdclient.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// newDisk makes disk vm on a gateway that has none, so its URI is not on the ready line, and returns what it holds after
// some writes.
func (h *host) newDisk(g *harness.Gateway) (model []byte) {
	h.t.Helper()
	harness.Must(h.t, harness.Binary(h.t), "disk", "create", "vm", fmt.Sprint(diskBytes), "--config", h.config)
	model = make([]byte, diskBytes)
	c := dial(h.t, g)
	for range 40 {
		p := make([]byte, 1+rand.IntN(200<<10))
		for i := range p {
			p[i] = byte(rand.Uint32())
		}
		off := rand.IntN(diskBytes - len(p))
		copy(model[off:], p)
		h.must(c.WriteAt(h.t.Context(), p, int64(off), false))
	}
	h.must(c.Flush(h.t.Context()))
	return model
}

// holds compares the whole disk.
func holds(t *testing.T, g *harness.Gateway, model []byte) {
	t.Helper()
	got := make([]byte, diskBytes)
	c := dial(t, g)
	for off := 0; off < diskBytes; off += 1 << 20 {
		if err := c.ReadAt(t.Context(), got[off:off+1<<20], int64(off)); err != nil {
			t.Fatal(err)
		}
	}
	if !bytes.Equal(got, model) {
		for lba := range diskBytes / block.Size {
			if a, b := got[lba*block.Size:][:block.Size], model[lba*block.Size:][:block.Size]; !bytes.Equal(a, b) {
				t.Fatalf("block %d differs: %x…, want %x…", lba, a[:8], b[:8])
			}
		}
	}
}

// writer writes block after block and notes which were acknowledged, until its connection ends.
type writer struct {
	done chan struct{} // closed when the connection has ended, or stop was called
	quit chan struct{}
	err  error // then

	mu     sync.Mutex
	acks   int // of writes
	asked  map[uint64]bool
	acked  map[uint64]bool
	change time.Time // of acked
}

func startWriter(t *testing.T, g *harness.Gateway) *writer {
	w := &writer{done: make(chan struct{}), quit: make(chan struct{}), asked: map[uint64]bool{}, acked: map[uint64]bool{}, change: time.Now()}
	c := dial(t, g)
	go func() {
		defer close(w.done)
		p := bytes.Repeat([]byte{0xee}, block.Size)
		for lba := uint64(0); ; lba = (lba + 2) % (diskBytes / block.Size) { // every other block: no range is longer than one
			select {
			case <-w.quit:
				return
			default:
			}
			w.mu.Lock()
			w.asked[lba] = true
			w.mu.Unlock()
			if w.err = c.WriteAt(context.Background(), p, int64(lba*block.Size), false); w.err != nil {
				return
			}
			w.mu.Lock()
			w.acked[lba], w.change = true, time.Now()
			w.acks++
			w.mu.Unlock()
			time.Sleep(5 * time.Millisecond) // half of the blocks take ten seconds
		}
	}()
	t.Cleanup(func() { c.Close(); <-w.done })
	return w
}

// count is how many writes were acknowledged, and for how long there was no more.
func (w *writer) count() (int, time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.acks, time.Since(w.change)
}

// reach waits for so many more acknowledged writes.
func (w *writer) reach(t *testing.T, more int) {
	t.Helper()
	n, _ := w.count()
	for deadline := time.Now().Add(soon); ; time.Sleep(10 * time.Millisecond) {
		if now, _ := w.count(); now >= n+more {
			return
		}
		select {
		case <-w.done:
			t.Fatalf("the connection ended: %v", w.err)
		default:
		}
		if time.Now().After(deadline) {
			t.Fatalf("not %d more acknowledged within %v", more, soon)
		}
	}
}

// compare expects of a list that it has every acknowledged block and none that was not even asked for.
func (w *writer) compare(t *testing.T, blocks map[uint64]bool) {
	t.Helper()
	w.mu.Lock()
	defer w.mu.Unlock()
	for b := range w.acked {
		if !blocks[b] {
			t.Fatalf("block %d was acknowledged, is lost, and is not in the list of %d", b, len(blocks))
		}
	}
	for b := range blocks {
		if !w.asked[b] {
			t.Fatalf("block %d is in the list and was never written", b)
		}
	}
}

var errStill = errors.New("still connected")

// ended is the error that the writer's connection ended with.
func (w *writer) ended() error {
	select {
	case <-w.done:
		return w.err
	case <-time.After(soon):
		return errStill
	}
}
