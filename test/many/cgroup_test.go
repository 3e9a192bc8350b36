package many

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

// cage bounds the memory of the processes in it: a control group of version 2 or 1 where the test may make
// one, else nothing but what the test reads from /proc afterwards.
type cage struct {
	kind  string
	procs string // where a process writes its id to be in it; "" if there is none
	ooms  func() (int64, error)
}

// newCage makes a group of limit bytes without swap.
func newCage(t *testing.T, limit int64) cage {
	name := fmt.Sprintf("graindisk-many-%d", os.Getpid())
	for _, c := range []struct {
		kind, root, has string
		set             [][2]string
		ooms            string
	}{
		{"control group, version 2", "/sys/fs/cgroup", "memory.max",
			[][2]string{{"memory.max", strconv.FormatInt(limit, 10)}, {"memory.swap.max", "0"}}, "memory.events"},
		{"control group, version 1", "/sys/fs/cgroup/memory", "memory.limit_in_bytes",
			[][2]string{{"memory.limit_in_bytes", strconv.FormatInt(limit, 10)}, {"memory.swappiness", "0"}}, "memory.oom_control"},
	} {
		dir := filepath.Join(c.root, name)
		if err := os.Mkdir(dir, 0o755); err != nil {
			continue
		}
		t.Cleanup(func() { os.Remove(dir) })
		if _, err := os.Stat(filepath.Join(dir, c.has)); err != nil {
			os.Remove(dir)
			continue
		}
		var err error
		for _, kv := range c.set {
			err = errors.Join(err, os.WriteFile(filepath.Join(dir, kv[0]), []byte(kv[1]), 0o644))
		}
		if err != nil {
			t.Logf("%s: %v", c.kind, err)
			os.Remove(dir)
			continue
		}
		return cage{c.kind, filepath.Join(dir, "cgroup.procs"), func() (int64, error) {
			return field(filepath.Join(dir, c.ooms), "oom_kill")
		}}
	}
	return cage{kind: "no control group: GOMEMLIMIT, and the peak read from /proc"}
}

// field is the number behind a name in a file of such lines.
func field(file, name string) (int64, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) >= 2 && strings.TrimSuffix(f[0], ":") == name {
			return strconv.ParseInt(f[1], 10, 64)
		}
	}
	return 0, fmt.Errorf("%s: no %s", file, name)
}
