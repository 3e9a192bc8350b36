package local

import (
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"graindisk/backend"
)

// TestReadOnlyLeavesNoTrace reads a directory that no Store has prepared, as a copy of one may be, and one that has.
func TestReadOnlyLeavesNoTrace(t *testing.T) {
	for _, prepared := range []bool{true, false} {
		dir := t.TempDir()
		w, err := Open(dir, Options{})
		if err != nil {
			t.Fatal(err)
		}
		for _, k := range []string{"root", "seg/00/1", "seg/00/2"} {
			if _, err := w.Put(t.Context(), k, []byte("body of "+k), backend.Cond{}); err != nil {
				t.Fatal(err)
			}
		}
		if err := os.WriteFile(filepath.Join(dir, tmpName, tempPrefix+"stale"), nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if !prepared {
			if err := os.RemoveAll(filepath.Join(dir, tmpName)); err != nil {
				t.Fatal(err)
			}
		}
		was := listing(t, dir)
		s, err := Open(dir, Options{ReadOnly: true})
		if err != nil {
			t.Fatal(err)
		}
		if b, _, err := s.Get(t.Context(), "root", 100); err != nil || string(b) != "body of root" {
			t.Errorf("get: %q, %v", b, err)
		}
		p := make([]byte, 4)
		if err := s.ReadAt(t.Context(), "seg/00/1", p, 5); err != nil || string(p) != "of s" {
			t.Errorf("read: %q, %v", p, err)
		}
		if i, err := s.Stat(t.Context(), "seg/00/2"); err != nil || i.Size != 16 {
			t.Errorf("stat: %+v, %v", i, err)
		}
		// Without the mark of a store it may be an empty mount point: nothing is known to be absent.
		want := backend.NotFound
		if !prepared {
			want = backend.Permanent
		}
		if _, _, err := s.Get(t.Context(), "seg/00/3", 100); backend.ClassOf(err) != want {
			t.Errorf("what is not there, prepared %v: %v", prepared, err)
		}
		for _, c := range []backend.Cond{{}, {Absent: true}, {Match: "x"}} {
			if _, err := s.Put(t.Context(), "new", nil, c); backend.ClassOf(err) != backend.Permanent || !strings.Contains(err.Error(), "reading only") {
				t.Errorf("put: %v", err)
			}
		}
		if err := s.Delete(t.Context(), "root"); backend.ClassOf(err) != backend.Permanent {
			t.Errorf("delete: %v", err)
		}
		if is := listing(t, dir); is != was {
			t.Errorf("was\n%s\nis\n%s", was, is)
		}
	}
	if _, err := Open(filepath.Join(t.TempDir(), "none"), Options{ReadOnly: true}); err == nil {
		t.Error("a directory that is not there was opened")
	}
}

// listing is all names below dir, with what would change if they were touched.
func listing(t *testing.T, dir string) string {
	t.Helper()
	var b strings.Builder
	err := filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		st, err := os.Stat(path)
		if err == nil {
			b.WriteString(path + " " + st.Mode().String() + " " + st.ModTime().Format(time.RFC3339Nano) + "\n")
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return b.String()
}
