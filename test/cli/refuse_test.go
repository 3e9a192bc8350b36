package cli

import (
	"bytes"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"

	"graindisk/backend/backendtest/miniotest"
	"graindisk/block"
	"graindisk/test/harness"
)

func TestMain(m *testing.M) {
	code := m.Run()
	harness.Cleanup()
	os.Exit(code)
}

// refusal is a case: what is made ready, the command line, and what the gateway must answer.
type refusal struct {
	name string
	// args makes everything ready in p and returns the command line.
	args func(p *place) []string
	code int
	says []string // parts of the one line; {dir} is the place's directory
}

// withConfig is a command line with the place's configuration.
func withConfig(args ...string) func(*place) []string {
	return func(p *place) []string { return append(args, "--config", p.config) }
}

// serve is the command line that serves what make made ready.
func serve(ready func(p *place), more ...string) func(*place) []string {
	return func(p *place) []string {
		ready(p)
		return append([]string{"serve", "--config", p.config}, more...)
	}
}

// embedded serves the embedded default, which makes nothing before it has refused.
func embedded(more ...string) func(*place) []string {
	return func(p *place) []string { return append([]string{"serve", "--data", p.path("data")}, more...) }
}

var refusals = []refusal{
	{"unknown key in the configuration", serve(func(p *place) { p.configure("listne: {}") }),
		2, []string{"{dir}/gateway.yaml", "line 4", "listne", "did you mean listen?"}},
	{"size with an unknown unit", embedded("--disk", "vm=10GiBs"),
		2, []string{"--disk", `"vm=10GiBs"`, "not one of the units"}},
	{"size below the least", embedded("--disk", "vm=4KiB"),
		2, []string{"--disk", `"vm=4KiB"`, "1MiB to 64TiB"}},
	{"disk without a size", embedded("--disk", "vm:1GiB"),
		2, []string{"--disk", `"vm:1GiB"`, "NAME=SIZE", "vm1=10GiB"}},
	{"disk name that is not allowed", embedded("--disk", "VM=1GiB"),
		2, []string{"--disk", `"VM"`, "a-z or 0-9"}},
	{"tier smaller than the least", serve(func(p *place) { rewrite(p, "size: 512MiB", "size: 100MiB") }),
		2, []string{"tier.size", "100MiB", "512MiB"}},
	{"parity that the targets cannot keep", serve(func(p *place) { p.targets = p.targets[:2]; p.configure("") }),
		2, []string{"pools.main.stripe", "1+1", "2 targets", "3 targets"}},
	{"socket path that is too long", func(p *place) []string {
		return []string{"serve", "--data", p.path(strings.Repeat("x", 107))}
	}, 2, []string{"xxx/admin.sock", "107", "shorter data directory"}},
	{"configuration that is not there", func(p *place) []string { return []string{"serve", "--config", p.path("none.yaml")} },
		1, []string{"{dir}/none.yaml", "no such file"}},

	{"most target directories are not there", serve(func(p *place) {
		p.create()
		p.must(os.RemoveAll(p.path("t1")))
		p.must(os.RemoveAll(p.path("t2")))
	}), 1, []string{"pool main", "target t1", "{dir}/t1", "target t2", "no such file or directory", "check"}},
	{"create on a target directory that is not there", func(p *place) []string {
		p.must(os.RemoveAll(p.path("t1")))
		return []string{"pool", "create", "main", "--config", p.config}
	}, 1, []string{"pool main", "target t1", "{dir}/t1", "no such file or directory"}},
	{"no pool on the targets", serve(func(*place) {}),
		10, []string{"pool main", "no pool", "gateway pool create"}},
	{"create where something is", func(p *place) []string {
		p.write("t1/precious", "x")
		return []string{"pool", "create", "main", "--config", p.config}
	}, 1, []string{"pool main", "target t1", "{dir}/t1", "precious", "empty place"}},
	{"create a pool twice", func(p *place) []string { return withConfig("pool", "create", "main")(p.create()) },
		1, []string{"pool main", "target t0", `"root"`, "empty place"}},
	{"create a pool that is not configured", withConfig("pool", "create", "other"),
		10, []string{"pool other", "{dir}/gateway.yaml"}},

	{"tier of another pool", serve(func(p *place) { p.create().killed().empty("t0", "t1", "t2").create() }),
		11, []string{"{dir}/tier", "belongs to pool", "another tier"}},
	{"all targets emptied under a tier", serve(func(p *place) { p.create().killed().empty("t0", "t1", "t2") }),
		1, []string{"{dir}/tier", "no target holds a root", "restore them"}},
	{"most targets emptied under a tier", serve(func(p *place) { p.create().killed().empty("t0", "t2") }),
		1, []string{"target t0", "target t2", "restore them"}},
	{"most targets emptied, and no tier", serve(func(p *place) { p.create().killed().empty("t0", "t2", "tier") }),
		1, []string{"target t0", "target t2", "quorum", "restore"}},
	{"pool that another host holds", serve(func(p *place) { p.create().killed().empty("tier") }),
		11, []string{"pool main", "held by " + hostName(), "epoch 1", "--takeover"}},
	{"log of a host that was replaced", serve(func(p *place) {
		p.create().killed()
		p.must(os.Rename(p.path("tier"), p.path("old")))
		g := harness.Serve(p.t, "--config", p.config, "--takeover")
		g.Kill()
		p.must(os.RemoveAll(p.path("tier")))
		p.must(os.Rename(p.path("old"), p.path("tier")))
	}), 11, []string{"{dir}/tier", "epoch 2", "--takeover"}},
	{"roots of a newer release", serve(func(p *place) { newerRoots(p.create(), "t0", "t1", "t2") }),
		1, []string{"pool main", "target t0", "format 2", "upgrade"}},
	{"one root of a newer release", serve(func(p *place) { newerRoots(p.create(), "t1") }),
		1, []string{"pool main", "target t1", "format 2", "upgrade"}},
	{"roots of a newer release over a tier", serve(func(p *place) { newerRoots(p.create().killed(), "t0", "t1", "t2") }),
		1, []string{"pool main", "target t0", "format 2", "upgrade"}},
	{"damaged roots", serve(func(p *place) {
		p.create()
		for _, name := range []string{"t0", "t1", "t2"} {
			p.write(name+"/root", `{"magic":"graindisk root","format":1}`)
		}
	}), 3, []string{"pool main", "target t0", "{dir}/t0", "damaged"}},
	{"tier on a full file system", serve(func(p *place) { mountTiny(p.create()) }),
		1, []string{"{dir}/tier", "1MiB free", "free some space"}},

	{"second gateway on a data directory", serve(func(p *place) { harness.Serve(p.t, "--config", p.create().config) }),
		1, []string{"{dir}/data", "in use by another gateway", "stop it"}},
	{"second gateway on a held pool", func(p *place) []string {
		harness.Serve(p.t, "--config", p.create().config)
		other := strings.NewReplacer(p.path("data"), p.path("data2"), p.path("tier"), p.path("tier2"))
		text, err := os.ReadFile(p.config)
		p.must(err)
		p.write("second.yaml", other.Replace(string(text)))
		return []string{"serve", "--config", p.path("second.yaml")}
	}, 11, []string{"pool main", "held by " + hostName(), "--takeover"}},
	{"show a disk that is not there", func(p *place) []string {
		harness.Serve(p.t, "--config", p.create().config)
		return []string{"disk", "show", "vm9", "--config", p.config}
	}, 10, []string{"disk vm9", "no such disk", "gateway disk list"}},
	{"create a disk that is there", func(p *place) []string {
		p.create().served(func(*harness.Gateway) {})
		return []string{"disk", "create", "vm", "1MiB", "--config", p.config}
	}, 1, []string{"disk vm", "exists", "another name"}},
	{"ask a gateway that does not run", withConfig("disk", "list"),
		1, []string{"{dir}/data/admin.sock", "start it with"}},
}

// TestRefusals gives the gateway what it must refuse. Beside its log, it writes one line on stderr.
func TestRefusals(t *testing.T) {
	for _, r := range refusals {
		t.Run(r.name, func(t *testing.T) {
			p := newPlace(t)
			args := r.args(p)
			before := p.files()
			r.run(t, p, args)
			changed(t, before, p.files())
		})
	}
}

// TestServesWithOneTargetAway starts with one of three target directories not there, as after a mount
// that failed, and ends cleanly; then again with the directory back.
func TestServesWithOneTargetAway(t *testing.T) {
	p := newPlace(t)
	p.create()
	for _, away := range []bool{true, false} {
		if away {
			p.must(os.Rename(p.path("t1"), p.path("t1.away")))
		}
		g := harness.Serve(t, "--config", p.config)
		if code := g.Stop(); code != 0 {
			t.Errorf("away=%v: ended with %d", away, code)
		}
		if said := strings.Contains(g.Log(), "target is away"); said != away {
			t.Errorf("away=%v: said so: %v\n%s", away, said, g.Log())
		}
		if away {
			p.must(os.Rename(p.path("t1.away"), p.path("t1")))
		}
	}
}

const wrongSecret = "a-secret-of-nobody"

// TestRefusalsOfStores is the same with S3 targets that cannot be used.
func TestRefusalsOfStores(t *testing.T) {
	s := miniotest.Start(t)
	bucket := s.Bucket(t)
	gone := miniotest.Start(t)
	gone.Stop(t)
	for _, c := range []struct {
		name, target string
		says         []string
	}{
		{"endpoint where nobody listens", bucketTarget(gone.Endpoint, bucket, miniotest.SecretKey),
			[]string{bucket, gone.Endpoint, "connection refused", "check the endpoint"}},
		{"wrong credentials", bucketTarget(s.Endpoint, bucket, wrongSecret),
			[]string{bucket, s.Endpoint, "SignatureDoesNotMatch", "Check your key"}},
		{"bucket that does not exist", bucketTarget(s.Endpoint, "no-such-bucket", miniotest.SecretKey),
			[]string{`bucket "no-such-bucket" does not exist`, s.Endpoint, "create it"}},
	} {
		for _, args := range [][]string{{"serve"}, {"pool", "create", "main"}} {
			t.Run(c.name+", "+args[0], func(t *testing.T) {
				p := newPlace(t)
				p.targets = []string{c.target}
				p.configure("")
				before := p.files()
				r := refusal{code: 1, says: append(c.says, "pool main", "target cloud")}
				r.run(t, p, append(args, "--config", p.config))
				changed(t, before, p.files())
				if keys := holds(t, s, bucket); len(keys) > 0 {
					t.Errorf("the bucket holds %q", keys)
				}
			})
		}
	}
}

// run runs the command, for at most half a minute, and checks its answer.
func (r refusal) run(t *testing.T, p *place, args []string) {
	t.Helper()
	got := harness.Command(t, "timeout", append([]string{"30", harness.Binary(t)}, args...)...)
	var told []string
	for line := range strings.Lines(got.Stderr) {
		if !strings.HasPrefix(line, "time=") { // the log
			told = append(told, strings.TrimSpace(line))
		}
	}
	if got.Code != r.code || got.Stdout != "" || len(told) != 1 || !strings.HasSuffix(got.Stderr, told[0]+"\n") || !strings.HasPrefix(told[0], "gateway: ") {
		t.Fatalf("gateway %s: exit %d, want %d and one line at the end\nstdout: %s\nstderr: %s", strings.Join(args, " "), got.Code, r.code, got.Stdout, got.Stderr)
	}
	if strings.Contains(got.Stderr, wrongSecret) {
		t.Errorf("shows a secret:\n%s", got.Stderr)
	}
	for _, part := range r.says {
		if part = strings.ReplaceAll(part, "{dir}", p.dir); !strings.Contains(told[0], part) {
			t.Errorf("does not say %q:\n%s", part, told[0])
		}
	}
}

// changed expects the same files with the same bytes.
func changed(t *testing.T, before, after map[string]string) {
	t.Helper()
	for _, name := range slices.Sorted(maps.Keys(after)) {
		if old, was := before[name]; !was {
			t.Errorf("made %s of %d bytes", name, len(after[name]))
		} else if old != after[name] {
			t.Errorf("changed %s", name)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(before)) {
		if _, is := after[name]; !is {
			t.Errorf("removed %s", name)
		}
	}
}

func hostName() string {
	name, _ := os.Hostname()
	return name
}

// rewrite replaces a part of the configuration.
func rewrite(p *place, old, new string) {
	text, err := os.ReadFile(p.config)
	p.must(err)
	if !bytes.Contains(text, []byte(old)) {
		p.t.Fatalf("no %q in the configuration", old)
	}
	p.write("gateway.yaml", strings.Replace(string(text), old, new, 1))
}

// newerRoots turns copies of the root into what a release with another format may write.
func newerRoots(p *place, targets ...string) {
	p.t.Helper()
	for _, name := range targets {
		text, err := os.ReadFile(p.path(name + "/root"))
		p.must(err)
		body := strings.Replace(string(text), `"format":1,`, `"format":2,`, 1)
		body, _, ok := strings.Cut(body, `"crc":"`)
		if !ok {
			p.t.Fatalf("the root has no checksum: %s", text)
		}
		p.write(name+"/root", body+fmt.Sprintf("\"crc\":\"%08x\"}\n", block.CRC([]byte(body))))
	}
}

// mountTiny puts the tier on a file system of 1 MiB.
func mountTiny(p *place) { mountTier(p, 1<<20) }

// mountTier puts the tier on a file system in memory of that many bytes.
func mountTier(p *place, bytes int64) {
	p.t.Helper()
	p.must(os.Mkdir(p.path("tier"), 0o700))
	if err := syscall.Mount("tmpfs", p.path("tier"), "tmpfs", 0, fmt.Sprintf("size=%d", bytes)); err != nil {
		p.t.Fatalf("mount a small file system: %v: run the tests as root, or in \"unshare -rm\"", err)
	}
	p.t.Cleanup(func() {
		if err := syscall.Unmount(p.path("tier"), 0); err != nil {
			p.t.Errorf("unmount: %v", err)
		}
	})
}
