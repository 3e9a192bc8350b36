package cli

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"graindisk/frontend/nbd/nbdclient"
	"graindisk/test/harness"
)

// TestAWipedDirectoryIsToldAndReplaced takes the directory of a target from a running gateway: removed and made anew, and
// emptied by hand. Status and repair say so and what to do, and that helps.
func TestAWipedDirectoryIsToldAndReplaced(t *testing.T) {
	p := newPlace(t)
	text, err := os.ReadFile(p.config)
	p.must(err)
	p.write("gateway.yaml", strings.Replace(string(text), "  main:\n", "  main:\n    max_dirty_age: 1s\n", 1))
	harness.Serve(t, "--config", p.create().config)
	harness.Must(t, harness.Binary(t), "disk", "create", "vm", "4MiB", "--config", p.config)
	c, err := nbdclient.Dial(t.Context(), "nbd+unix:///vm?socket="+p.path("data/nbd.sock"), nbdclient.Options{})
	p.must(err)
	defer c.Close()
	p.must(c.WriteAt(t.Context(), []byte(strings.Repeat("graindisk", 400<<10)), 0, true))
	harness.WaitPublished(t, "vm", "--config", p.config)

	run := func(code int, says string, args ...string) string {
		t.Helper()
		r := harness.Run(t, append(args, "--config", p.config)...)
		if out := r.Stdout + r.Stderr; r.Code != code || !strings.Contains(out, says) || strings.Count(r.Stderr, "\n") > 1 {
			t.Errorf("%v: exit %d, want %d and %q:\n%s", args, r.Code, code, says, out)
		}
		return r.Stdout
	}
	run(0, "target t1: ok", "pool", "status")
	run(0, "", "pool", "status", "--check")
	next := `"gateway pool replace-target main t1"`
	for name, wipe := range map[string]func(){
		"removed and made anew": func() {
			p.must(os.RemoveAll(p.path("t1")))
			run(1, "mount its file system, or make the directory", "pool", "replace-target", "main", "t1")
			p.must(os.Mkdir(p.path("t1"), 0o700))
			run(0, "target t1: gone", "pool", "status")
		},
		"emptied": func() {
			names, err := filepath.Glob(p.path("t1/*")) // as a shell does it, which leaves the hidden mark of a store
			p.must(err)
			for _, n := range names {
				if filepath.Base(n) != ".tmp" {
					p.must(os.RemoveAll(n))
				}
			}
			run(0, "target t1: emptied", "pool", "status")
		},
	} {
		wipe()
		run(0, next, "pool", "status")
		run(1, next, "pool", "status", "--check")
		run(1, next, "pool", "repair")
		run(0, "what was on number", "pool", "replace-target", "main", "t1")
		run(0, "pool main: ", "pool", "repair")
		if out := run(0, "target t1: ok", "pool", "status"); strings.Contains(out, "strength") {
			t.Errorf("%s: after the repair:\n%s", name, out)
		}
		run(0, "", "pool", "status", "--check")
	}
}

// TestLongWorkIsAJob starts scrubs and repairs that nobody waits for, and asks for what makes no sense.
func TestLongWorkIsAJob(t *testing.T) {
	p := newPlace(t).create()
	harness.Serve(t, "--config", p.config)
	for _, kind := range []string{"scrub", "repair"} {
		var started []struct {
			Pool, Job string
			Objects   *int
		}
		harness.JSON(t, &started, "pool", kind, "--detach", "--config", p.config)
		if len(started) != 1 || started[0].Pool != "main" || !strings.HasPrefix(started[0].Job, kind+"-") || started[0].Objects != nil {
			t.Errorf("%s --detach printed %+v", kind, started)
			continue
		}
		for { // until it has ended; the harness bounds the test
			var js []struct {
				ID, State string
				Report    json.RawMessage
			}
			harness.JSON(t, &js, "job", "list", "--config", p.config)
			last := js[len(js)-1]
			if last.ID != started[0].Job {
				t.Fatalf("jobs %+v", js)
			}
			if last.State != "running" {
				if last.State != "done" || !strings.Contains(string(last.Report), `"segments"`) {
					t.Errorf("job %+v", last)
				}
				break
			}
		}
		for rate, says := range map[string]string{"1": "1 bytes per second", "64000": "at least 64KiB", "fast": "50MiB", "0": "at least 64KiB"} {
			if r := harness.Run(t, "pool", kind, "--rate", rate, "--config", p.config); r.Code != 2 || !strings.Contains(r.Stderr, says) {
				t.Errorf("%s --rate %s: exit %d, %s", kind, rate, r.Code, r.Stderr)
			}
		}
	}
}
