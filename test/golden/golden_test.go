package golden

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"graindisk/pool"
	"graindisk/pool/root"
	"graindisk/test/harness"
)

var update = flag.Bool("update", false, "make the golden pool anew")

const (
	archive = "testdata/pool-v1.tar.gz"
	playEnv = "GRAINDISK_GOLDEN_DIR" // set in the process that makes the pool and kills itself
)

func TestMain(m *testing.M) {
	if dir := os.Getenv(playEnv); dir != "" {
		fmt.Fprintln(os.Stderr, play(context.Background(), dir))
		os.Exit(1)
	}
	flag.Parse()
	code := m.Run()
	harness.Cleanup()
	os.Exit(code)
}

// goldenDir is a fresh copy of the golden pool.
func goldenDir(t *testing.T) string {
	t.Helper()
	if *update {
		dir := t.TempDir()
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), playEnv+"="+dir)
		out, err := cmd.CombinedOutput()
		if status, ok := cmd.ProcessState.Sys().(syscall.WaitStatus); !ok || status.Signal() != syscall.SIGKILL {
			t.Fatalf("the pool was not made: %v\n%s", err, out)
		}
		pack(t, dir, archive)
		*update = false
	}
	return unpack(t, archive)
}

// openPool opens the pool in dir; it is closed, clean, when the test ends.
func openPool(t *testing.T, dir string, takeover bool) *pool.Pool {
	t.Helper()
	o, err := options(dir)
	if err != nil {
		t.Fatal(err)
	}
	o.Takeover = takeover
	p, err := pool.Open(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	checkUsage(t, p)
	t.Cleanup(func() {
		if err := p.Close(context.Background()); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	return p
}

// checkUsage expects a usage table that equals a recount, though the pool's checkpoints have none.
func checkUsage(t *testing.T, p *pool.Pool) {
	t.Helper()
	rep, err := p.CheckUsage(t.Context())
	if s := p.Status().Space; err != nil || len(rep.Leaks)+len(rep.Low) > 0 || s.Error != "" || s.LiveBytes == 0 {
		t.Errorf("usage table %+v differs from a recount: %+v, %v", s, rep, err)
	}
}

func remove(t *testing.T, path string) {
	t.Helper()
	if err := os.RemoveAll(path); err != nil {
		t.Fatal(err)
	}
}

func TestTierOfAKilledGatewayHoldsEverything(t *testing.T) {
	dir := goldenDir(t)
	p := openPool(t, dir, false)
	check(t, p, expected(false))
	if err := p.Publish(t.Context()); err != nil {
		t.Fatal(err)
	}
	check(t, p, expected(false))
}

func TestWhatWasRecoveredIsPublishedNext(t *testing.T) {
	dir := goldenDir(t)
	o, err := options(dir)
	if err != nil {
		t.Fatal(err)
	}
	p, err := pool.Open(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	remove(t, o.TierDir)
	check(t, openPool(t, dir, false), expected(false)) // it was released
}

func TestTargetsAloneHoldTheLastCut(t *testing.T) {
	for _, lost := range []string{"none", "a", "b", "c"} {
		t.Run("and target "+lost+" is lost", func(t *testing.T) {
			dir := goldenDir(t)
			remove(t, filepath.Join(dir, "tier"))
			remove(t, filepath.Join(dir, "targets", lost))
			check(t, openPool(t, dir, true), expected(true))
		})
	}
}

// TestArchiveHoldsWhatItShould keeps a careless -update from weakening the tests above.
func TestArchiveHoldsWhatItShould(t *testing.T) {
	dir := goldenDir(t)
	body, err := os.ReadFile(filepath.Join(dir, "targets", "a", root.Key))
	if err != nil {
		t.Fatal(err)
	}
	c, err := root.Decode(body)
	if err != nil {
		t.Fatal(err)
	}
	wide := false
	for _, cut := range c.Val.Cuts {
		wide = wide || cut.Segment.K == 2 && cut.Segment.M == 1
	}
	if c.Val.State != root.Held || len(c.Val.Checkpoints) == 0 || len(c.Val.Cuts) != 2 || !wide {
		t.Errorf("the root is %s with %d checkpoints and %d cuts since, one of them 2+1: %v", c.Val.State, len(c.Val.Checkpoints), len(c.Val.Cuts), wide)
	}
	if st, err := os.Stat(archive); err != nil || st.Size() > 256<<10 {
		t.Errorf("the archive has %d bytes (%v), want at most 256 KiB", st.Size(), err)
	}
}

// TestInspectReadsEveryFormat runs gateway inspect over every file of the pool.
func TestInspectReadsEveryFormat(t *testing.T) {
	dir := goldenDir(t)
	if r := harness.Run(t, "inspect", "log", filepath.Join(dir, "tier")); r.Code != 0 || r.Stdout == "" {
		t.Errorf("inspect log: exit %d: %s%s", r.Code, r.Stdout, r.Stderr)
	}
	roots, shards := 0, 0
	err := filepath.WalkDir(filepath.Join(dir, "targets"), func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		what := ""
		switch {
		case e.Name() == root.Key:
			what, roots = "root", roots+1
		case strings.Contains(path, "/seg/"):
			what, shards = "shard", shards+1
		default:
			return nil // checkpoints have no inspector
		}
		if r := harness.Run(t, "inspect", what, path); r.Code != 0 || r.Stdout == "" {
			return errors.New(what + " " + path + ": " + r.Stderr)
		}
		return nil
	})
	if err != nil || roots != 3 || shards < 40 {
		t.Errorf("%d roots and %d shards inspected: %v", roots, shards, err)
	}
}
