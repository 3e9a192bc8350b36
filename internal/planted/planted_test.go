package planted

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

const root = "../.."

var plant = regexp.MustCompile(`planted\.Bug\("([^"]+)"\)`)

// TestCatalogue finds every plant where the catalogue says, and no other.
func TestCatalogue(t *testing.T) {
	where := map[string]string{}
	err := filepath.WalkDir(root, func(p string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(p, ".go") || strings.HasPrefix(p, filepath.Join(root, "internal/planted")) {
			return err
		}
		b, err := os.ReadFile(p)
		for _, m := range plant.FindAllSubmatch(b, -1) {
			name := string(m[1])
			if where[name] != "" {
				t.Errorf("%q is planted twice: in %s and in %s", name, where[name], p)
			}
			where[name], err = filepath.Rel(root, p)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range Catalogue {
		if where[p.Name] != p.File {
			t.Errorf("%q should be in %s, and is in %q", p.Name, p.File, where[p.Name])
		}
		if p.What == "" {
			t.Errorf("%q: nobody knows what goes wrong", p.Name)
		}
		delete(where, p.Name)
	}
	for name, file := range where {
		t.Errorf("%q in %s is not in the catalogue", name, file)
	}
	if len(Catalogue) < 14 {
		t.Errorf("only %d bugs are planted", len(Catalogue))
	}
}
