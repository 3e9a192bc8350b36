package extract

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"graindisk/backend/backendtest/miniotest"
	"graindisk/frontend/nbd/nbdclient"
	"graindisk/grains/segment"
	"graindisk/test/harness"
)

func TestMain(m *testing.M) {
	code := m.Run()
	harness.Cleanup()
	os.Exit(code)
}

const (
	diskBytes = 48 << 20
	dataBytes = 24 << 20 // of it, at most
)

// place is a target that can be taken away.
type place interface {
	entry() string // in the configuration, but for its name
	take(t *testing.T)
	back(t *testing.T)
}

// directory is a local target: with empty set one whose disk was exchanged, else one whose mount is away.
type directory struct {
	dir   string
	empty bool
}

func newDirectory(t *testing.T, empty bool) *directory {
	d := &directory{filepath.Join(t.TempDir(), "target"), empty}
	must(t, os.Mkdir(d.dir, 0o700))
	return d
}

func (d *directory) entry() string { return fmt.Sprintf("local: {dir: %q}", d.dir) }

func (d *directory) take(t *testing.T) {
	t.Helper()
	must(t, os.Rename(d.dir, d.dir+"-gone"))
	if d.empty {
		must(t, os.Mkdir(d.dir, 0o700))
	}
}

func (d *directory) back(t *testing.T) {
	t.Helper()
	if d.empty {
		must(t, os.Remove(d.dir)) // which fails if anything was put into it
	}
	must(t, os.Rename(d.dir+"-gone", d.dir))
}

// server is a bucket of a server of its own.
type server struct {
	*miniotest.Server
	text string
}

func newServer(t *testing.T) server {
	s := miniotest.Start(t)
	return server{s, harness.S3Target(t, s)}
}

func (s server) entry() string     { return s.text }
func (s server) take(t *testing.T) { s.Stop(t) }
func (s server) back(t *testing.T) { s.Start(t) }

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// site is a pool on three places; nothing is published by age.
func site(t *testing.T, places []place, disks string) harness.Site {
	t.Helper()
	var entries []string
	for _, p := range places {
		entries = append(entries, p.entry())
	}
	return harness.NewSiteOn(t, entries, "1GiB", 10*time.Minute, disks)
}

// scribble writes, zeroes and trims here and there.
func scribble(t *testing.T, random *rand.Rand, uri string) {
	t.Helper()
	c, err := nbdclient.Dial(t.Context(), uri, nbdclient.Options{})
	must(t, err)
	defer c.Close()
	for written := 0; written < dataBytes; {
		p := make([]byte, 1+random.IntN(1<<20))
		for i := range p {
			p[i] = byte(random.Uint32())
		}
		off := random.Int64N(diskBytes - int64(len(p)))
		must(t, c.WriteAt(t.Context(), p, off, false))
		written += len(p)
		if random.IntN(4) == 0 {
			n := int64(1+random.IntN(100)) << 12
			must(t, c.Trim(t.Context(), random.Int64N((diskBytes-n)>>12)<<12, n, false))
		}
	}
	must(t, c.Flush(t.Context()))
}

// served is what a client reads.
func served(t *testing.T, uri string) []byte {
	t.Helper()
	return copied(t, "nbdcopy", uri)
}

// copied runs a program with a file as its last argument and returns what that then holds.
func copied(t *testing.T, name string, args ...string) []byte {
	t.Helper()
	to := filepath.Join(t.TempDir(), "image")
	harness.Must(t, name, append(args, to)...)
	b, err := os.ReadFile(to)
	must(t, err)
	return b
}

func extracted(t *testing.T, s harness.Site, disk string) []byte {
	t.Helper()
	return copied(t, harness.Binary(t), "extract", disk, "--config", s.Config)
}

func expectSame(t *testing.T, what string, got, want []byte) {
	t.Helper()
	if len(got) != len(want) {
		t.Fatalf("%s: %d bytes, want %d", what, len(got), len(want))
	}
	for i := range got {
		if got[i] != want[i] {
			t.Fatalf("%s differs from byte %d on", what, i)
		}
	}
}

// TestExtractEqualsWhatAClientReads extracts disks after a clean stop, with each target gone in turn; and, beside a
// gateway that has more in its log, as of the cut that was published.
func TestExtractEqualsWhatAClientReads(t *testing.T) {
	harness.Need(t, "nbdcopy", "qemu-img")
	for name, places := range map[string]func() []place{
		"directories":         func() []place { return []place{newDirectory(t, false), newDirectory(t, false), newDirectory(t, false)} },
		"emptied directories": func() []place { return []place{newDirectory(t, true), newDirectory(t, true), newDirectory(t, true)} },
		"MinIO":               func() []place { return []place{newServer(t), newServer(t), newServer(t)} },
	} {
		t.Run(name, func(t *testing.T) {
			seed := rand.Uint64()
			t.Logf("seed %d", seed)
			random := rand.New(rand.NewPCG(seed, 0))
			ps := places()
			s := site(t, ps, "{name: a, size: 48MiB}, {name: b, size: 48MiB}")
			g := harness.Serve(t, "--config", s.Config)
			var want [2][]byte
			for i, uri := range g.URIs {
				scribble(t, random, uri)
				want[i] = served(t, uri)
			}
			if code := g.Stop(); code != 0 {
				t.Fatalf("the gateway ended with %d", code)
			}
			before := tree(t, ps)
			for gone := range 4 { // 3: none
				if gone < 3 {
					ps[gone].take(t)
				}
				for i, disk := range []string{"a", "main/b"} {
					expectSame(t, fmt.Sprintf("disk %s without target %d", disk, gone), extracted(t, s, disk), want[i])
				}
				if gone < 3 {
					ps[gone].back(t)
				}
			}
			to := filepath.Join(t.TempDir(), "sparse")
			harness.Must(t, harness.Binary(t), "extract", "a", to, "--config", s.Config)
			if st, err := os.Stat(to); err != nil || st.Size() != diskBytes || st.Sys().(*syscall.Stat_t).Blocks*512 > dataBytes+2<<20 || st.Mode().Perm() != 0o600 {
				t.Errorf("the image: %+v, %v", st, err)
			}
			harness.Must(t, "sh", "-c", `"$0" extract a - --config "$1" | cmp - "$2"`, harness.Binary(t), s.Config, to)

			g = harness.Serve(t, "--config", s.Config)
			cut := harness.Show(t, "a", "--config", s.Config).PublishedCut
			scribble(t, random, g.URIs[0])
			now := served(t, g.URIs[0])
			var r result
			harness.JSON(t, &r, "extract", "a", filepath.Join(t.TempDir(), "image"), "--config", s.Config)
			if r.Cut != cut || r.State != "held" || !r.Committed || r.SizeBytes != diskBytes || r.DataBytes == 0 || r.DataBytes > dataBytes || len(r.Bad) != 0 {
				t.Errorf("result %+v, the gateway published cut %d", r, cut)
			}
			expectSame(t, "disk a beside its gateway", extracted(t, s, "a"), want[0])
			if bytes.Equal(now, want[0]) {
				t.Error("nothing was written beyond the cut")
			}
			if code := g.Stop(); code != 0 {
				t.Fatalf("the gateway ended with %d", code)
			}
			after := tree(t, ps)
			expectSame(t, "disk a after all of it was published", extracted(t, s, "a"), now)
			harness.Must(t, "qemu-img", "check", qcow2(t, s))
			if got := tree(t, ps); got != after {
				t.Errorf("the targets changed from\n%s\nto\n%s", after, got)
			}
			if name != "MinIO" && before == after {
				t.Error("the gateway left no trace in the targets: nothing was compared")
			}
		})
	}
}

// qcow2 pipes an extracted image into a converter, as people would.
func qcow2(t *testing.T, s harness.Site) string {
	t.Helper()
	dir := t.TempDir()
	harness.Must(t, "sh", "-c", `"$0" extract a - --config "$1" > "$2/raw" && qemu-img convert -f raw -O qcow2 "$2/raw" "$2/qcow2"`, harness.Binary(t), s.Config, dir)
	return filepath.Join(dir, "qcow2")
}

// tree lists all files of the directories among the places, with their lengths and times.
func tree(t *testing.T, ps []place) string {
	t.Helper()
	var b strings.Builder
	for _, p := range ps {
		d, ok := p.(*directory)
		if !ok {
			continue
		}
		must(t, filepath.WalkDir(d.dir, func(path string, e fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			st, err := e.Info()
			if err != nil {
				return err
			}
			fmt.Fprintln(&b, path, st.Mode(), st.Size(), st.ModTime().UnixNano())
			return nil
		}))
	}
	return b.String()
}

// result is what extract --json prints.
type result struct {
	Cut       uint64 `json:"cut"`
	State     string `json:"state"`
	Committed bool   `json:"committed"`
	SizeBytes int64  `json:"size_bytes"`
	DataBytes int64  `json:"data_bytes"`
	Degraded  int    `json:"degraded_shards"`
	Bad       []struct {
		Offset, Length int64
		Error          string
	} `json:"bad"`
}

// TestDamageIsFoundAndNamed damages one of a stripe's shards, then more of it than parity mends.
func TestDamageIsFoundAndNamed(t *testing.T) {
	harness.Need(t, "nbdcopy")
	ps := []place{newDirectory(t, false), newDirectory(t, false), newDirectory(t, false)}
	s := site(t, ps, "{name: a, size: 48MiB}")
	g := harness.Serve(t, "--config", s.Config)
	scribble(t, rand.New(rand.NewPCG(1, 1)), g.URIs[0])
	want := served(t, g.URIs[0])
	if code := g.Stop(); code != 0 {
		t.Fatalf("the gateway ended with %d", code)
	}
	var shards []string
	for _, p := range ps {
		must(t, filepath.WalkDir(p.(*directory).dir, func(path string, e fs.DirEntry, err error) error {
			if err == nil && strings.Contains(path, "/seg/") && !e.IsDir() {
				shards = append(shards, path)
			}
			return err
		}))
	}
	verify := func() (r result, code int) {
		t.Helper()
		got := harness.Run(t, "extract", "a", "--verify", "--json", "--config", s.Config)
		must(t, json.Unmarshal([]byte(got.Stdout), &r))
		return r, got.Code
	}
	if r, code := verify(); code != 0 || len(r.Bad) != 0 || r.Degraded != 0 || r.DataBytes == 0 {
		t.Errorf("nothing is damaged: exit %d, %+v", code, r)
	}
	const at = segment.HeaderBytes + 5000
	flip := func(path string, bits byte) {
		b, err := os.ReadFile(path)
		must(t, err)
		b[at] ^= bits
		must(t, os.WriteFile(path, b, 0o600))
	}
	// All shards of the segment that the first of the list belongs to.
	name := shards[0][strings.LastIndexByte(shards[0], '/')+1 : strings.LastIndexByte(shards[0], '.')]
	var stripe []string
	for _, p := range shards {
		if strings.Contains(p, "/"+name+".") {
			stripe = append(stripe, p)
		}
	}
	flip(stripe[0], 1)
	if r, code := verify(); code != 0 || len(r.Bad) != 0 {
		t.Errorf("one shard of %d is damaged: exit %d, %+v", len(stripe), code, r)
	}
	for i, p := range stripe[1:] {
		flip(p, []byte{8, 0x80}[i])
	}
	r, code := verify()
	if code != 3 || len(r.Bad) == 0 || r.Degraded == 0 {
		t.Fatalf("all shards are damaged: exit %d, %+v", code, r)
	}
	dir := t.TempDir()
	to := filepath.Join(dir, "image")
	if got := harness.Run(t, "extract", "a", to, "--config", s.Config); got.Code != 3 || !strings.Contains(got.Stderr, fmt.Sprintf("bytes %d to", r.Bad[0].Offset)) || !strings.Contains(got.Stderr, "--keep-going") {
		t.Errorf("extract: exit %d: %s", got.Code, got.Stderr)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("extract left %v, %v", left, err)
	}
	got := harness.Run(t, "extract", "a", to, "--keep-going", "--config", s.Config)
	if got.Code != 3 || strings.Count(got.Stdout, "cannot be read") != len(r.Bad) {
		t.Errorf("extract --keep-going: exit %d: %s%s", got.Code, got.Stdout, got.Stderr)
	}
	image, err := os.ReadFile(to)
	must(t, err)
	for _, b := range r.Bad {
		clear(want[b.Offset:][:b.Length])
	}
	expectSame(t, "what could be read", image, want)
}

// TestExtractKeepsOffWhatExists expects files to be left alone, and nothing to stay of an extract that was interrupted.
func TestExtractKeepsOffWhatExists(t *testing.T) {
	ps := []place{newDirectory(t, false), newDirectory(t, false), newDirectory(t, false)}
	s := site(t, ps, "{name: a, size: 48MiB}")
	g := harness.Serve(t, "--config", s.Config)
	scribble(t, rand.New(rand.NewPCG(2, 2)), g.URIs[0])
	if code := g.Stop(); code != 0 {
		t.Fatalf("the gateway ended with %d", code)
	}
	dir := t.TempDir()
	to := filepath.Join(dir, "image")
	must(t, os.WriteFile(to, []byte("mine"), 0o600))
	for _, c := range []struct {
		args []string
		code int
		says string
	}{
		{[]string{"a", to}, 1, "exists"},
		{[]string{"a", dir}, 1, "no regular file"},
		{[]string{"a", dir, "--force"}, 1, "no regular file"},
		{[]string{"a", filepath.Join(dir, "no", "where")}, 1, "no such file"},
		{[]string{"b", to}, 10, "no such disk"},
		{[]string{"other/a", to}, 10, "no such pool"},
		{[]string{"a@monday", to}, 2, "no snapshots"},
		{[]string{"a"}, 2, "FILE"},
		{[]string{"a", to, "--verify"}, 2, "--verify"},
		{[]string{"a", "-", "--json"}, 2, "stdout"},
	} {
		r := harness.Run(t, append(append([]string{"extract"}, c.args...), "--config", s.Config)...)
		if r.Code != c.code || !strings.Contains(r.Stderr+r.Stdout, c.says) {
			t.Errorf("extract %v: exit %d: %s%s", c.args, r.Code, r.Stdout, r.Stderr)
		}
	}
	if b, err := os.ReadFile(to); err != nil || string(b) != "mine" {
		t.Errorf("the file holds %q now, %v", b, err)
	}
	harness.Must(t, harness.Binary(t), "extract", "a", to, "--force", "--config", s.Config)
	if st, err := os.Stat(to); err != nil || st.Size() != diskBytes {
		t.Errorf("after --force: %v, %v", st, err)
	}

	// Slowly, so that it can be interrupted.
	text, err := os.ReadFile(s.Config)
	must(t, err)
	slow := filepath.Join(dir, "slow.yaml")
	must(t, os.WriteFile(slow, bytes.ReplaceAll(text, []byte("}}\n"), []byte("}, limits: {download: 1MB}}\n")), 0o600))
	must(t, os.Remove(to))
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, harness.Binary(t), "extract", "a", to, "--config", slow)
	must(t, cmd.Start())
	for ctx.Err() == nil {
		if _, err := os.Stat(to + ".partial"); err == nil {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	must(t, cmd.Process.Signal(os.Interrupt))
	_ = cmd.Wait() // its code is looked at
	if code := cmd.ProcessState.ExitCode(); code != 130 {
		t.Errorf("interrupted: exit %d", code)
	}
	if left, err := filepath.Glob(to + "*"); err != nil || len(left) > 0 {
		t.Errorf("interrupted: left %v, %v", left, err)
	}
}
