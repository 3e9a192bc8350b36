package local

import (
	"os"
	"path/filepath"
	"testing"

	"graindisk/backend"
	"graindisk/backend/backendtest"
)

func TestLateConformance(t *testing.T) {
	backendtest.Run(t, func(t *testing.T) backend.Store {
		l, err := OpenLate(t.TempDir())
		if err != nil {
			t.Fatal(err)
		}
		return l
	})
}

func TestLateComesWithItsDirectory(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "mount")
	l, err := OpenLate(dir)
	if err == nil {
		t.Fatal("a directory that is not there was opened")
	}
	if _, _, err := l.Get(t.Context(), "root", 100); backend.ClassOf(err) != backend.Permanent {
		t.Fatalf("without its directory: %v", err) // not NotFound: it is not an empty store
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := l.Put(t.Context(), "root", []byte("x"), backend.Cond{Absent: true}); err != nil {
		t.Fatal(err)
	}
	if b, _, err := l.Get(t.Context(), "root", 100); err != nil || string(b) != "x" {
		t.Fatalf("%q %v", b, err)
	}
}
