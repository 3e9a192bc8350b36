package local

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"graindisk/backend"
	"graindisk/backend/backendtest"
)

func openTemp(t *testing.T) *Store {
	t.Helper()
	return openAt(t, t.TempDir())
}

func openAt(t *testing.T, dir string) *Store {
	t.Helper()
	s, err := Open(dir, Options{})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func mustPut(t *testing.T, s *Store, key, body string, c backend.Cond) string {
	t.Helper()
	etag, err := s.Put(t.Context(), key, []byte(body), c)
	if err != nil {
		t.Fatal(err)
	}
	return etag
}

func TestLocalConforms(t *testing.T) {
	backendtest.Run(t, func(t *testing.T) backend.Store { return openTemp(t) })
}

func TestOpen(t *testing.T) {
	dir := t.TempDir()
	missing := filepath.Join(dir, "a", "b")
	_, err := Open(missing, Options{})
	if backend.ClassOf(err) != backend.NotFound || !strings.Contains(fmt.Sprint(err), missing) {
		t.Errorf("a missing directory gives %v", err)
	}
	for range 2 {
		if _, err := Open(missing, Options{Create: true}); err != nil {
			t.Fatal(err)
		}
	}
	for _, made := range []string{missing, filepath.Dir(missing)} {
		if st, err := os.Stat(made); err != nil || st.Mode().Perm() != 0o700 {
			t.Errorf("%s: mode %v, %v", made, st.Mode(), err)
		}
	}
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, create := range []bool{false, true} {
		_, err := Open(file, Options{Create: create})
		if backend.ClassOf(err) != backend.Permanent || !strings.Contains(fmt.Sprint(err), "not a directory") {
			t.Errorf("a file gives %v", err)
		}
	}
}

func TestObjectsArePlainFiles(t *testing.T) {
	s := openTemp(t)
	mustPut(t, s, "seg/0f/15-3.0", "body", backend.Cond{})
	got, err := os.ReadFile(filepath.Join(s.String(), "seg/0f/15-3.0"))
	if err != nil || string(got) != "body" {
		t.Errorf("%q, %v", got, err)
	}
}

func TestDirectoryThatIsGoneIsNotEmpty(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "store")
	s, err := Open(dir, Options{Create: true})
	if err != nil {
		t.Fatal(err)
	}
	mustPut(t, s, "a/k", "body", backend.Cond{})
	ctx := t.Context()
	for _, what := range []string{"removed", "made anew, without the mark"} {
		change := os.RemoveAll
		if what != "removed" {
			change = func(dir string) error { return os.Mkdir(dir, 0o700) }
		}
		if err := change(dir); err != nil {
			t.Fatal(err)
		}
		errs := map[string]error{"read": s.ReadAt(ctx, "a/k", make([]byte, 1), 0), "delete": s.Delete(ctx, "a/k")}
		_, errs["put"] = s.Put(ctx, "a/k", nil, backend.Cond{})
		_, errs["put if absent"] = s.Put(ctx, "a/k", nil, backend.Cond{Absent: true})
		_, _, errs["get"] = s.Get(ctx, "a/k", 10)
		_, errs["stat"] = s.Stat(ctx, "a/k")
		_, _, errs["list"] = s.List(ctx, "", "", 10)
		for op, err := range errs {
			if backend.ClassOf(err) != backend.Permanent || !strings.Contains(fmt.Sprint(err), "gone") {
				t.Errorf("%s: %s gives %v", what, op, err)
			}
		}
	}
	openAt(t, dir)
	mustPut(t, s, "a/k", "body", backend.Cond{Absent: true}) // marked again: as good as new
}

func TestTemporaryFilesOfTheDeadAreRemoved(t *testing.T) {
	s := openTemp(t)
	temps := func() int {
		found, err := filepath.Glob(s.path(".tmp/put-*"))
		if err != nil {
			t.Fatal(err)
		}
		return len(found)
	}
	if err := os.WriteFile(s.path(".tmp/put-dead"), []byte("half"), 0o600); err != nil {
		t.Fatal(err)
	}
	living, err := s.newTemp()
	if err != nil {
		t.Fatal(err)
	}
	openAt(t, s.dir)
	if n := temps(); n != 1 {
		t.Errorf("%d temporary files, want the one of the living writer", n)
	}
	living.Close() // as the end of its process would
	openAt(t, s.dir)
	if n := temps(); n != 0 {
		t.Errorf("%d temporary files after their writers' end", n)
	}
	mustPut(t, s, "k", "body", backend.Cond{})
	if _, err := s.Put(t.Context(), "k", nil, backend.Cond{Absent: true}); !errors.Is(err, backend.ErrPrecondition) {
		t.Error(err)
	}
	if n := temps(); n != 0 {
		t.Errorf("%d temporary files after puts", n)
	}
}

// TestETagChangesWhateverTheClockSays replaces an object whose time lies in the future by others of the same size.
func TestETagChangesWhateverTheClockSays(t *testing.T) {
	s := openTemp(t)
	mustPut(t, s, "k", "0", backend.Cond{})
	future := time.Now().Add(time.Hour)
	if err := os.Chtimes(s.path("k"), future, future); err != nil {
		t.Fatal(err)
	}
	last := future
	for i := range 50 {
		mustPut(t, s, "k", fmt.Sprint(i%10), backend.Cond{})
		info, err := s.Stat(t.Context(), "k")
		if err != nil {
			t.Fatal(err)
		}
		if now := info.Modified; now.UnixMicro() <= last.UnixMicro() {
			t.Fatalf("put %d: time %v is not above %v", i, now, last)
		} else {
			last = now
		}
	}
}

func TestETagOutlivesReopening(t *testing.T) {
	s := openTemp(t)
	etag := mustPut(t, s, "k", "1", backend.Cond{})
	mustPut(t, openAt(t, s.dir), "k", "2", backend.Cond{Match: etag})
}

func TestKeyCannotBeTheFolderOfAnother(t *testing.T) {
	s := openTemp(t)
	mustPut(t, s, "a", "object", backend.Cond{})
	mustPut(t, s, "b/c/d", "object", backend.Cond{})
	for _, key := range []string{"a/b", "a/b/c", "b", "b/c"} {
		for _, c := range []backend.Cond{{}, {Absent: true}} {
			if _, err := s.Put(t.Context(), key, nil, c); backend.ClassOf(err) != backend.Permanent {
				t.Errorf("put %s gives %v", key, err)
			}
		}
	}
}

func TestListLeavesOutWhatIsNoObject(t *testing.T) {
	s := openTemp(t)
	mustPut(t, s, "a/k", "object", backend.Cond{})
	if err := errors.Join(
		os.WriteFile(s.path("a/with space"), nil, 0o600),
		os.WriteFile(s.path("lost+found"), nil, 0o600),
		os.Symlink("k", s.path("a/link")),
		os.Mkdir(s.path("a/empty"), 0o700),
		syscall.Mkfifo(s.path("a/pipe"), 0o600),
	); err != nil {
		t.Fatal(err)
	}
	found, more, err := s.List(t.Context(), "", "", 10)
	if err != nil || more || len(found) != 1 || found[0].Key != "a/k" {
		t.Errorf("%v, %v, %v", found, more, err)
	}
}

func TestEmptyFoldersGo(t *testing.T) {
	s := openTemp(t)
	mustPut(t, s, "ckpt/1/2/3.0", "x", backend.Cond{})
	mustPut(t, s, "ckpt/2/1/1.0", "x", backend.Cond{})
	if err := s.Delete(t.Context(), "ckpt/1/2/3.0"); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(s.path("ckpt/1")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the empty folder: %v", err)
	}
	if _, err := os.Stat(s.path("ckpt/2/1")); err != nil {
		t.Error(err)
	}
}

// TestPutsAndDeletesInOneFolder makes and removes the same folders from many goroutines.
func TestPutsAndDeletesInOneFolder(t *testing.T) {
	s := openTemp(t)
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			for n := range 20 {
				key := fmt.Sprintf("a/b/%d-%d", i, n)
				if _, err := s.Put(t.Context(), key, []byte(key), backend.Cond{Absent: true}); err != nil {
					t.Error(err)
				}
				if body, _, err := s.Get(t.Context(), key, 100); err != nil || string(body) != key {
					t.Errorf("%q, %v", body, err)
				}
				if err := s.Delete(t.Context(), key); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
}

func TestWaitingForTheLockEndsWithTheContext(t *testing.T) {
	s := openTemp(t)
	mustPut(t, s, "k", "body", backend.Cond{})
	other := openAt(t, s.dir) // as another process would
	unlock, err := other.lock(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for range 2 { // the second finds the first gone from the queue within the process
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
		_, err := s.Put(ctx, "k", nil, backend.Cond{})
		if backend.ClassOf(err) != backend.Transient || !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("put gives %v", err)
		}
		cancel()
	}
	if body, _, err := s.Get(t.Context(), "k", 10); err != nil || string(body) != "body" {
		t.Errorf("readers need no lock: %q, %v", body, err)
	}
	unlock()
	mustPut(t, s, "k", "after", backend.Cond{})
}

func TestBrokenStoreRefusesEverything(t *testing.T) {
	s := openTemp(t)
	mustPut(t, s, "k", "body", backend.Cond{})
	closed, err := os.Open(s.dir)
	if err != nil {
		t.Fatal(err)
	}
	closed.Close()
	if err := s.syncAll([]*os.File{closed}); err == nil { // a sync that fails
		t.Fatal("syncing a closed folder worked")
	}
	for op, err := range map[string]error{
		"delete": s.Delete(t.Context(), "k"),
		"read":   s.ReadAt(t.Context(), "k", make([]byte, 1), 0),
	} {
		if err == nil || backend.ClassOf(err) != backend.Transient || !strings.Contains(err.Error(), "opened again") {
			t.Errorf("%s gives %v", op, err)
		}
	}
	if _, _, err := openAt(t, s.dir).Get(t.Context(), "k", 10); err != nil {
		t.Error(err)
	}
}

func TestNoFilesStayOpen(t *testing.T) {
	s := openTemp(t)
	open := func() int {
		fds, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(fds)
	}
	before := open()
	ctx := t.Context()
	for i := range 20 {
		key := fmt.Sprintf("a/%d", i)
		etag := mustPut(t, s, key, "x", backend.Cond{Absent: true})
		mustPut(t, s, key, "y", backend.Cond{Match: etag})
		_, _ = s.Put(ctx, key, nil, backend.Cond{Match: etag})
		_, _ = s.Put(ctx, "a", nil, backend.Cond{})
		_, _ = s.Put(ctx, key+"/b", nil, backend.Cond{})
		_, _, _ = s.Get(ctx, key, 0)
		_ = s.ReadAt(ctx, key, make([]byte, 2), 0)
		_, _ = s.Stat(ctx, "a")
		_ = s.Delete(ctx, key)
		openAt(t, s.dir)
	}
	if after := open(); after != before {
		t.Errorf("%d open files before, %d after", before, after)
	}
}

func TestErrorsAreClassified(t *testing.T) {
	s := openTemp(t)
	for errno, want := range map[syscall.Errno]backend.Class{
		syscall.ENOSPC: backend.Full, syscall.EDQUOT: backend.Full,
		syscall.EACCES: backend.Auth, syscall.EPERM: backend.Auth, syscall.EROFS: backend.Auth,
		syscall.ENOENT: backend.NotFound, syscall.EIO: backend.Transient, syscall.ESTALE: backend.Transient,
		syscall.EMFILE: backend.Transient, syscall.ENAMETOOLONG: backend.Permanent,
	} {
		err := s.fail("put", "k", &fs.PathError{Op: "write", Path: "k", Err: errno})
		if got := backend.ClassOf(err); got != want {
			t.Errorf("%v: class %v, want %v", errno, got, want)
		}
	}
}
