package vfs_test

import (
	"bytes"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"graindisk/internal/vfs"
)

func TestWriteZeroesOverwritesAndGrows(t *testing.T) {
	name := filepath.Join(t.TempDir(), "f")
	f, err := vfs.OS{}.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	old := bytes.Repeat([]byte{7}, 16<<10)
	if _, err := f.WriteAt(old, 0); err != nil {
		t.Fatal(err)
	}
	const end = 3<<20 + 8<<10 // more than one step, and part of one
	if err := f.(vfs.Zeroer).WriteZeroes(4<<10, end-4<<10); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, end)
	if _, err := f.ReadAt(got, 0); err != nil { // through the page cache, which held the old bytes
		t.Fatal(err)
	}
	if want := append(bytes.Clone(old[:4<<10]), make([]byte, end-4<<10)...); !bytes.Equal(got, want) {
		t.Error("reads other bytes than were written")
	}
	if size, err := f.Size(); err != nil || size != end {
		t.Errorf("size %d (%v), want %d", size, err, end)
	}
	st, err := os.Stat(name)
	if err != nil {
		t.Fatal(err)
	}
	if used := st.Sys().(*syscall.Stat_t).Blocks * 512; used < end {
		t.Errorf("%d bytes allocated, want %d: a hole", used, end)
	}
}

// TestStartIsAHint starts writing back what is there, what is not, and a file that is closed.
func TestStartIsAHint(t *testing.T) {
	f, err := vfs.OS{}.Create(filepath.Join(t.TempDir(), "f"))
	if err != nil {
		t.Fatal(err)
	}
	want := bytes.Repeat([]byte{7}, 64<<10)
	if _, err := f.WriteAt(want, 0); err != nil {
		t.Fatal(err)
	}
	s := f.(vfs.Starter)
	s.Start(0, 64<<10)
	s.Start(1<<20, 4<<10)
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(want))
	if _, err := f.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
		t.Errorf("other bytes after Start and Sync (%v)", err)
	}
	if size, err := f.Size(); err != nil || size != int64(len(want)) {
		t.Errorf("size %d (%v), want %d", size, err, len(want))
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	s.Start(0, 64<<10)
}
