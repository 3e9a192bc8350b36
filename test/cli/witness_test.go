package cli

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"graindisk/test/harness"
)

// TestTwoTargetsAndAWitness takes a pool of two targets and a witness through the commands that name it, with each of the
// three away once, and the witness replaced.
func TestTwoTargetsAndAWitness(t *testing.T) {
	p := newPlace(t)
	p.targets[2] = strings.Replace(p.targets[2], "{", "{witness: true, ", 1)
	p.configure("")
	says := func(want string, args ...string) {
		t.Helper()
		if out := harness.Must(t, harness.Binary(t), append(args, "--config", p.config)...); !strings.Contains(out, want) {
			t.Errorf("%v says %q, not %q", args, out, want)
		}
	}
	says("1+1, targets: 3, may be lost without loss of data or service: 1", "config", "check")
	says("pool main: created on 2 targets and 1 witness, stripe 1+1", "pool", "create", "main")
	g := harness.Serve(t, "--config", p.config)
	says("a witness: no shards", "pool", "status", "main")
	says(`"witness": true`, "pool", "status", "main", "--json")
	harness.Must(t, harness.Binary(t), "disk", "create", "vm", "1MiB", "--config", p.config)
	if code := g.Stop(); code != 0 {
		t.Fatalf("ended with %d", code)
	}
	for _, away := range []string{"t0", "t1", "t2"} {
		p.must(os.Rename(p.path(away), p.path("away")))
		g := harness.Serve(t, "--config", p.config)
		says("vm", "disk", "list")
		g.Kill()
		p.must(os.Rename(p.path("away"), p.path(away)))
	}
	p.empty("t2")
	g = harness.Serve(t, "--config", p.config)
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(100 * time.Millisecond) {
		r := harness.Run(t, "pool", "replace-target", "main", "t2", "--config", p.config)
		if strings.Contains(r.Stderr, "is not claimed yet") && time.Now().Before(deadline) {
			continue // it is, in a moment
		}
		if !strings.Contains(r.Stdout, "target t2 is number 4 now, a witness") {
			t.Fatalf("replace-target: exit %d: %s%s", r.Code, r.Stdout, r.Stderr)
		}
		break
	}
	says("0 shards of 0 segments restored", "pool", "repair", "main")
	says("a witness: no shards", "pool", "status", "main")
	if code := g.Stop(); code != 0 {
		t.Errorf("ended with %d", code)
	}
	for _, below := range []string{"seg", "ckpt"} {
		if found, err := filepath.Glob(p.path("t2/" + below + "/*")); len(found) > 0 || err != nil {
			t.Errorf("the witness holds %v, %v", found, err)
		}
	}
}
