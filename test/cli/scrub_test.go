package cli

import (
	"bytes"
	"encoding/json"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"graindisk/frontend/nbd/nbdclient"
	"graindisk/test/harness"
)

// TestScrubRepairsWhatItCanAndNamesTheRest damages shards of a pool on directories below a running gateway.
func TestScrubRepairsWhatItCanAndNamesTheRest(t *testing.T) {
	p := newPlace(t)
	text, err := os.ReadFile(p.config)
	p.must(err)
	p.write("gateway.yaml", strings.Replace(string(text), "  main:\n", "  main:\n    max_dirty_age: 1s\n    scrub_period: 0\n", 1))
	harness.Serve(t, "--config", p.create().config)
	harness.Must(t, harness.Binary(t), "disk", "create", "vm", "8MiB", "--config", p.config)
	c, err := nbdclient.Dial(t.Context(), "nbd+unix:///vm?socket="+p.path("data/nbd.sock"), nbdclient.Options{})
	p.must(err)
	defer c.Close()
	data := make([]byte, 2<<20)
	for i := range data {
		data[i] = byte(rand.Uint32())
	}
	p.must(c.WriteAt(t.Context(), data, 0, true))
	var d struct {
		Unpublished int64 `json:"unpublished_bytes"`
	}
	for d.Unpublished = 1; d.Unpublished > 0; time.Sleep(50 * time.Millisecond) {
		p.must(json.Unmarshal([]byte(harness.Must(t, harness.Binary(t), "disk", "show", "vm", "--json", "--config", p.config)), &d))
	}

	scrub := func(code int, args ...string) string {
		t.Helper()
		r := harness.Run(t, append([]string{"pool", "scrub", "--config", p.config}, args...)...)
		if r.Code != code {
			t.Fatalf("pool scrub %v: exit %d, want %d:\n%s%s", args, r.Code, code, r.Stdout, r.Stderr)
		}
		return r.Stdout
	}
	// spoil flips a bit in the middle of the largest shard of a target and returns its name and what it was.
	spoil := func(target string) (name string, was []byte) {
		t.Helper()
		names, err := filepath.Glob(p.path(target + "/seg/*/*"))
		p.must(err)
		for _, n := range names {
			if b, err := os.ReadFile(n); err == nil && len(b) > len(was) {
				name, was = n, b
			}
		}
		bad := bytes.Clone(was)
		bad[8192] ^= 1
		p.must(os.WriteFile(name, bad, 0o600))
		return name, was
	}
	if out := scrub(0, "main"); !strings.Contains(out, "damaged 0, missing 0") {
		t.Errorf("nothing is damaged: %s", out)
	}
	name, was := spoil("t1")
	if out := scrub(3, "main", "--dry-run"); !strings.Contains(out, "damaged 1") || !strings.Contains(out, "dry run") {
		t.Errorf("dry run: %s", out)
	}
	out := scrub(0)
	if !strings.Contains(out, "damaged 1, missing 0, repaired 1") || !strings.Contains(out, "target t1: seg/") {
		t.Errorf("one shard damaged: %s", out)
	}
	if now, err := os.ReadFile(name); err != nil || !bytes.Equal(now, was) {
		t.Errorf("%s is not mended: %v", name, err)
	}
	spoil("t0")
	spoil("t1")
	spoil("t2")
	var reports []struct {
		Pool         string
		Unrepairable int
		Lost         []struct {
			Disk   string
			LBA    int64
			Blocks int64
		}
	}
	p.must(json.Unmarshal([]byte(scrub(3, "--json")), &reports))
	if len(reports) != 1 || reports[0].Pool != "main" || reports[0].Unrepairable != 3 || len(reports[0].Lost) == 0 || reports[0].Lost[0].Disk != "vm" {
		t.Errorf("all shards damaged: %+v", reports)
	}
	if out := scrub(3, "main"); !strings.Contains(out, "LOST: disk vm, bytes ") {
		t.Errorf("all shards damaged: %s", out)
	}
	if out := harness.Must(t, harness.Binary(t), "pool", "status", "--config", p.config); !strings.Contains(out, "error: damage found") {
		t.Errorf("status: %s", out)
	}
	scrub(10, "nobody")
	scrub(2, "--rate", "fast")
}
