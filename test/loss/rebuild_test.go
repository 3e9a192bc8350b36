package loss

import (
	"bytes"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"graindisk/frontend/nbd/nbdclient"
	"graindisk/pool"
	"graindisk/test/harness"
)

// TestRebuildFromShardsAlone loses the host, all copies of the root, all checkpoints and one target of three,
// rebuilds the pool on the two that are left and an empty one, and expects two disks to be what they were,
// trims included.
func TestRebuildFromShardsAlone(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	random := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8), byte(seed >> 16)})
	dirs := []*directory{newDirectory(t), newDirectory(t), newDirectory(t)}
	s := newSite(t, []target{dirs[0], dirs[1], dirs[2]}, "{name: a, size: 8MiB}, {name: b, size: 24MiB}")
	g := s.serve(t)
	sizes := []int{8 << 20, 24 << 20}
	var want [][]byte
	for i, uri := range g.URIs {
		c := dial(t, uri)
		model := make([]byte, sizes[i])
		random.Read(model[:sizes[i]/2])
		if err := c.WriteAt(t.Context(), model[:sizes[i]/2], 0, false); err != nil {
			t.Fatal(err)
		}
		if err := c.Trim(t.Context(), 1<<20, 2<<20, false); err != nil {
			t.Fatal(err)
		}
		clear(model[1<<20 : 3<<20])
		want = append(want, model)
	}
	published := harness.WaitPublished(t, "a", "--config", s.config)
	harness.WaitPublished(t, "b", "--config", s.config)
	s.loseHost(t, g)
	dirs[1].empty(t)

	args := []string{"pool", "rebuild", "main", "--config", s.config}
	if r := harness.Run(t, append(args, "--yes")...); r.Code != 1 || !strings.Contains(r.Stderr, "a root exists") || !strings.Contains(r.Stderr, "--takeover") {
		t.Fatalf("with roots there: exit %d: %s", r.Code, r.Stderr)
	}
	if r := harness.Run(t, args...); r.Code != 2 || !strings.Contains(r.Stderr, "--dry-run") {
		t.Fatalf("without a word: exit %d: %s", r.Code, r.Stderr)
	}
	for _, d := range dirs {
		for _, name := range []string{"root", "beat", "ckpt"} {
			if err := os.RemoveAll(filepath.Join(d.dir, name)); err != nil {
				t.Fatal(err)
			}
		}
	}
	had := dirs[0].objects(t)
	var rep pool.RebuildReport
	harness.JSON(t, &rep, append(args, "--dry-run")...)
	if rep.Restored || rep.Cut < published.PublishedCut || len(rep.Disks) != 2 || dirs[0].objects(t) != had {
		t.Fatalf("dry run: %+v", rep)
	}
	harness.JSON(t, &rep, append(args, "--yes")...)
	if !rep.Restored || rep.BelowStrength != rep.Segments || !rep.Targets[1].New {
		t.Fatalf("rebuilt: %+v", rep)
	}
	if left, err := filepath.Glob(filepath.Join(s.tier, "*.rebuild")); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
	g = s.serve(t)
	for i, uri := range g.URIs {
		c := dial(t, uri)
		got := make([]byte, sizes[i])
		if err := c.ReadAt(t.Context(), got, 0); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, want[i]) {
			t.Errorf("disk %d is not what it was", i)
		}
	}
	if code := g.Stop(); code != 0 {
		t.Errorf("the gateway ended with %d", code)
	}
}

func dial(t *testing.T, uri string) *nbdclient.Client {
	t.Helper()
	c, err := nbdclient.Dial(t.Context(), uri, nbdclient.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}
