package local

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
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

// TestLateIsReopenedOnlyWhenAsked takes a directory away and makes it anew, whole or but for the mark of a store.
func TestLateIsReopenedOnlyWhenAsked(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "target")
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(os.Mkdir(dir, 0o700))
	l, err := OpenLate(dir)
	must(err)
	ctx := t.Context()
	for range 2 {
		_, err = l.Put(ctx, "seg/00/1.0", []byte("x"), backend.Cond{Absent: true})
		must(err)
		must(os.RemoveAll(dir))
		if err := backend.Reopen(ctx, l); !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), "make the directory") {
			t.Errorf("reopened what is not there: %v", err)
		}
		must(os.Mkdir(dir, 0o700))
		for range 2 { // however often it is asked
			if _, _, err := l.Get(ctx, "seg/00/1.0", 100); backend.ClassOf(err) != backend.Permanent {
				t.Errorf("the wiped directory answers: %v", err)
			}
			if _, err := l.Put(ctx, "seg/00/1.0", []byte("x"), backend.Cond{}); backend.ClassOf(err) != backend.Permanent {
				t.Errorf("the wiped directory takes objects: %v", err)
			}
		}
		must(backend.Reopen(ctx, backendtest.NewFaulty(l, 1)))
		if _, _, err := l.Get(ctx, "seg/00/1.0", 100); !errors.Is(err, backend.ErrNotFound) {
			t.Errorf("the reopened directory answers: %v", err)
		}
	}
	must(backend.Reopen(ctx, backendtest.NewMemory("m"))) // knows nothing of it
}
