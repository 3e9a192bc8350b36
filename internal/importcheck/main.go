// Command importcheck fails when a package of this module imports one that lies above or beside it.
// The table below is the picture of the design in words: what each folder may import of the project.
// A folder that is missing from it is an error too, so that the table stays whole.
//
// Imports of tests are free: a test may set up whatever it needs.
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"
)

const module = "graindisk"

// layers says, from the bottom up, what the packages of each folder may import: a package, or with
// "/..." all in a folder. The longest folder that fits a package rules it.
var layers = []struct {
	folder string
	may    []string
}{
	{"block", nil},
	{"internal/vfs", nil},
	{"internal/access", nil},
	{"internal/importcheck", nil},
	{"internal/planted", nil},
	{"internal/turn", nil},
	{"internal/jobs", nil},
	{"config", []string{"block", "internal/access"}},

	{"backend", []string{"block"}}, // the contract
	{"backend/local", []string{"backend", "block"}},
	{"backend/transport", []string{"backend"}},
	{"backend/s3", []string{"backend", "backend/transport", "block"}},
	{"backend/azure", []string{"backend", "backend/transport", "block"}},
	{"backend/probe", []string{"backend"}},
	{"backend/adaptive", []string{"backend", "block"}},

	{"tier", []string{"block", "internal/vfs"}},
	{"writeback", []string{"block", "internal/planted", "internal/turn", "internal/vfs", "tier"}},
	{"grains/segment", []string{"block", "backend"}},
	{"grains/bootprofile", []string{"block"}},
	{"grains/extent", []string{"block", "internal/vfs"}},
	{"grains/cache", []string{"block", "internal/planted", "internal/vfs", "tier"}},
	{"grains/fetch", []string{"block"}},
	{"grains/cleaner", []string{"block", "backend", "grains/segment", "grains/extent", "grains/cache"}},
	{"grains/dedup", []string{"block", "internal/vfs", "backend", "grains/segment", "grains/extent"}},

	{"vdisk/densetree", []string{"block", "internal/planted", "internal/vfs"}},
	{"vdisk", []string{"block", "internal/planted", "internal/turn", "internal/vfs", "tier", "writeback", "grains/...", "vdisk/densetree"}},

	{"pool/root", []string{"block", "internal/planted", "backend"}},
	{"pool", []string{"block", "internal/planted", "internal/turn", "internal/vfs", "backend", "tier", "writeback", "grains/...", "vdisk/...", "pool/root"}},

	{"migration", []string{"block", "internal/vfs", "backend", "vdisk/...", "pool/..."}},
	{"api", []string{"block", "internal/jobs", "vdisk", "pool/...", "migration"}},
	{"frontend/nbd", []string{"block", "vdisk", "internal/access", "frontend/nbd/proto"}},
	{"frontend/nbd/proto", nil},
	{"frontend/nbd/nbdclient", []string{"frontend/nbd/proto"}},
	{"frontend/nbd/nbdkernel", nil},
	{"frontend/vhost", []string{"block", "vdisk"}},

	{"cmd", []string{"..."}},

	// For tests and measurements: see testing.
	{"backend/backendtest", []string{"block", "backend/..."}},
	{"internal/vfs/vfstest", []string{"internal/vfs"}},
	{"internal/crashtest", []string{"..."}},
	{"test", []string{"..."}},
	{"bench", []string{"..."}},
}

// testing are the folders that nothing but tests, measurements and each other may import.
var testing = []string{"backend/backendtest", "internal/vfs/vfstest", "internal/crashtest", "test", "bench"}

func main() {
	pkgs, err := list()
	if err != nil {
		fmt.Fprintln(os.Stderr, "importcheck:", err)
		os.Exit(1)
	}
	bad := check(pkgs)
	for _, b := range bad {
		fmt.Fprintln(os.Stderr, "importcheck:", b)
	}
	if len(bad) > 0 {
		os.Exit(1)
	}
}

// pkg is what "go list" says of a package.
type pkg struct {
	ImportPath string
	Imports    []string // without those of its tests
}

// list returns the packages of the module in the current directory.
func list() ([]pkg, error) {
	out, err := exec.Command("go", "list", "-e", "-json=ImportPath,Imports", "./...").Output()
	if exit := new(exec.ExitError); errors.As(err, &exit) {
		return nil, fmt.Errorf("go list: %w: %s", err, exit.Stderr)
	} else if err != nil {
		return nil, fmt.Errorf("go list: %w", err)
	}
	var pkgs []pkg
	for d := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p pkg
		switch err := d.Decode(&p); {
		case errors.Is(err, io.EOF):
			return pkgs, nil
		case err != nil:
			return nil, fmt.Errorf("go list: %w", err)
		}
		pkgs = append(pkgs, p)
	}
}

// check returns one line for every import that the table does not allow.
func check(pkgs []pkg) (bad []string) {
	for _, p := range pkgs {
		from := strings.TrimPrefix(p.ImportPath, module+"/")
		folder, may, ok := rule(from)
		if !ok {
			bad = append(bad, from+" is in no layer: add its folder to the table in internal/importcheck")
			continue
		}
		for _, imp := range p.Imports {
			to, ours := strings.CutPrefix(imp, module+"/")
			switch {
			case !ours:
			case slices.ContainsFunc(testing, within(to)) && !slices.ContainsFunc(testing, within(from)):
				bad = append(bad, fmt.Sprintf("%s imports %s, which is for tests only", from, to))
			case !slices.ContainsFunc(may, names(to)):
				bad = append(bad, fmt.Sprintf("%s imports %s; %s may import only %s", from, to, folder, allowed(may)))
			}
		}
	}
	return bad
}

// rule is the line of the table for a package.
func rule(path string) (folder string, may []string, ok bool) {
	for _, l := range layers {
		if within(path)(l.folder) && len(l.folder) > len(folder) {
			folder, may, ok = l.folder, l.may, true
		}
	}
	return folder, may, ok
}

// within returns whether path is the folder or lies below it.
func within(path string) func(folder string) bool {
	return func(folder string) bool { return path == folder || strings.HasPrefix(path, folder+"/") }
}

// names returns whether an entry of the table means the package path.
func names(path string) func(entry string) bool {
	return func(entry string) bool {
		folder, all := strings.CutSuffix(entry, "...")
		return path == strings.TrimSuffix(folder, "/") || all && strings.HasPrefix(path, folder)
	}
}

func allowed(may []string) string {
	if len(may) == 0 {
		return "nothing of the project"
	}
	return strings.Join(may, ", ")
}
