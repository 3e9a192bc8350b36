package kill

import (
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"graindisk/test/harness"
)

func TestMain(m *testing.M) {
	code := m.Run()
	harness.Cleanup()
	os.Exit(code)
}

const (
	killsMin   = 20      // of one world, which goes on until it has had every kind of them
	sectorsMin = 100_000 // checked after each of the last kills
	stampBytes = 256 << 20
	imageBytes = 64 << 20
)

// TestEverySectorAfterKill kills the gateway in the middle of everything it does, and finds every
// sector with its last acknowledged write, or one in flight. With GRAINDISK_SOAK it does so in one
// world after the other for that long.
func TestEverySectorAfterKill(t *testing.T) {
	harness.Need(t, "nbdcopy", "fio", "mkfs.ext4", "e2fsck")
	seed := uint64(time.Now().UnixNano())
	if s := os.Getenv("GRAINDISK_SEED"); s != "" {
		var err error
		if seed, err = strconv.ParseUint(s, 10, 64); err != nil {
			t.Fatal("GRAINDISK_SEED:", err)
		}
	}
	var soak time.Duration
	if s := os.Getenv("GRAINDISK_SOAK"); s != "" {
		var err error
		if soak, err = time.ParseDuration(s); err != nil {
			t.Fatal("GRAINDISK_SOAK:", err)
		}
	}
	for began := time.Now(); ; seed++ {
		if !t.Run(fmt.Sprintf("seed=%d", seed), func(t *testing.T) { killMany(t, seed) }) || time.Since(began) >= soak {
			return
		}
	}
}

// killMany is one world: one pool on three directories, its gateway killed again and again.
func killMany(t *testing.T, seed uint64) {
	w := newWorld(t, seed)
	w.serve()
	w.copyImageIn()
	var kinds []func(*load)
	for range 5 {
		kinds = append(kinds, w.killInLoad, w.killInUpload, w.killInShutdown, w.killInStart)
	}
	w.rng.Shuffle(len(kinds), func(i, j int) { kinds[i], kinds[j] = kinds[j], kinds[i] })
	checked := 0
	for round := 0; round < len(kinds) || w.kills < killsMin || len(w.killed) < 4; round++ {
		l := w.c.start(uint64(round))
		if round%4 == 0 {
			w.fioPass(uint64(round))
		}
		kinds[round%len(kinds)](l)
		w.serve()
		n := w.c.verify()
		checked += n
		if round%4 == 0 {
			w.fioVerify(uint64(round))
		}
		if round >= len(kinds)/2 && n < sectorsMin {
			t.Fatalf("seed %d: only %d sectors were there to check after %d kills, want %d", seed, n, w.kills, sectorsMin)
		}
	}
	w.compareImage()
	if code := w.g.Stop(); code != 0 {
		t.Errorf("seed %d: the last clean shutdown: exit %d", seed, code)
	}
	t.Logf("COUNT seed %d: %d kills (%v); %d sectors checked; %v", seed, w.kills, w.killed, checked, w.c)
}

// world is a pool, its gateway, and the three disks it serves: stamps for the client, image with a
// file system that nobody writes, and fio for fio.
type world struct {
	t      *testing.T
	rng    *rand.Rand
	dir    string
	g      *harness.Gateway
	c      *client
	start  time.Duration // what the last start took
	kills  int
	killed map[string]int
}

const configYAML = `data: %[1]s/data
tier: {size: 1GiB, ram: 64MiB}
pools:
  main:
    stripe: {data: 2, parity: 1}
    max_dirty_age: 1s
    targets:
      - {name: a, local: {dir: %[1]s/a}}
      - {name: b, local: {dir: %[1]s/b}}
      - {name: c, local: {dir: %[1]s/c}}
    disks:
      - {name: stamps, size: %[2]d}
      - {name: image, size: %[3]d}
      - {name: fio, size: 64MiB}
`

func newWorld(t *testing.T, seed uint64) *world {
	t.Helper()
	dir, err := os.MkdirTemp("", "kill-") // shorter than t.TempDir: sockets have short paths
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	w := &world{t: t, dir: dir, rng: rand.New(rand.NewPCG(seed, 1)), killed: map[string]int{}}
	for _, name := range []string{"data", "a", "b", "c"} {
		if err := os.Mkdir(filepath.Join(dir, name), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(w.path("gateway.yaml"), fmt.Appendf(nil, configYAML, dir, stampBytes, imageBytes), 0o600); err != nil {
		t.Fatal(err)
	}
	harness.Must(t, harness.Binary(t), "pool", "create", "main", "--config", w.path("gateway.yaml"))
	w.c = newClient(t, w.uri("stamps"), stampBytes, seed)
	return w
}

func (w *world) path(name string) string { return filepath.Join(w.dir, name) }

func (w *world) uri(disk string) string {
	return "nbd+unix:///" + disk + "?socket=" + w.path("data/nbd.sock")
}

func (w *world) serve() {
	w.t.Helper()
	began := time.Now()
	w.g = harness.Serve(w.t, "--config", w.path("gateway.yaml"))
	w.start = time.Since(began)
}

// upTo is a random part of d.
func (w *world) upTo(d time.Duration) time.Duration { return time.Duration(w.rng.Int64N(int64(d) + 1)) }

// kill kills the gateway, and counts it unless the gateway had ended by itself, well.
func (w *world) kill(while string) {
	w.t.Helper()
	w.g.Kill()
	switch code := w.g.ExitCode(); code {
	case -1:
		w.kills++
		w.killed[while]++
	case 0:
	default:
		w.t.Errorf("seed %d: the gateway ended with exit %d %s", w.c.seed, code, while)
	}
}

// killInLoad kills at any moment of plain service.
func (w *world) killInLoad(l *load) {
	time.Sleep(w.upTo(1500 * time.Millisecond))
	w.kill("in load")
	l.wait()
}

// killInUpload kills just after a shard of a new segment appeared in a target, so that the rest of
// the stripe, or its commit, is under way.
func (w *world) killInUpload(l *load) {
	w.t.Helper()
	have := w.shards()
	deadline := time.Now().Add(30 * time.Second)
	for w.shards() == have {
		if time.Now().After(deadline) {
			w.t.Fatal("nothing was uploaded in 30 seconds, but max_dirty_age is 1 s")
		}
		time.Sleep(time.Millisecond)
	}
	time.Sleep(w.upTo(20 * time.Millisecond))
	w.kill("in upload")
	l.wait()
}

// shards counts the files of all targets' segments.
func (w *world) shards() (n int) {
	w.t.Helper()
	for _, target := range []string{"a", "b", "c"} {
		err := filepath.WalkDir(w.path(target), func(path string, d fs.DirEntry, err error) error {
			if err == nil && !d.IsDir() && strings.Contains(path, "/seg/") {
				n++
			}
			return nil // what vanishes meanwhile is not ours to judge
		})
		if err != nil {
			w.t.Fatal(err)
		}
	}
	return n
}

// killInShutdown kills a gateway that was asked to end while it is busy.
func (w *world) killInShutdown(l *load) {
	time.Sleep(w.upTo(1500 * time.Millisecond))
	w.g.Signal(os.Interrupt)
	time.Sleep(w.upTo(60 * time.Millisecond))
	w.kill("in shutdown")
	l.wait()
}

// killInStart kills a busy gateway, and then the next ones before they are ready.
func (w *world) killInStart(l *load) {
	w.t.Helper()
	w.killInLoad(l)
	for range 1 + w.rng.IntN(2) {
		var err error
		if w.g, err = harness.Start(w.t, "--config", w.path("gateway.yaml")); err != nil {
			w.t.Fatal(err)
		}
		time.Sleep(w.upTo(w.start))
		w.kill("in start")
	}
}
