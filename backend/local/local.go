// Package local is the driver for a directory: a disk of its own, an NFS mount, or a folder of the
// embedded default. An object is a plain file that any tool can copy away:
//
//	DIR/root               key "root"
//	DIR/seg/0f/15-3.0      key "seg/0f/15-3.0"
//	DIR/.tmp/lock          the lock of all changes, between goroutines and between processes
//	DIR/.tmp/<random>      an object being written; flocked by its writer
//
// A Put writes and syncs its temporary file, then takes the lock, checks the condition, renames
// the file into place, gives the lock back, and syncs the folders above it. So an object appears
// whole or not at all, and is stable once Put has returned nil. What a crash left in between, a
// rename that is visible but not yet stable, is made stable before it is taken for granted: the
// first time a process reads a key in a folder, it syncs that folder and those above. If
// syncing a folder fails, what is stable is no longer known, and the Store refuses everything
// until it is opened again.
//
// .tmp is also the mark of a store. Only Open makes it, so a mount point whose disk is away, or a
// directory that was wiped and made anew, is not taken for an empty store: all calls fail with
// NotFound and say that the directory is not there.
//
// The ETag is the file's modification time in microseconds, its inode and its size. It changes
// with each Put: under the lock, a file that replaces another is given a modification time above
// that of the file it replaces, whatever the clock says. The inode alone would not do, since a
// file system gives a freed one to the next file; time alone is what the kernel's clock tick and
// a clock set back make equal. Once a key was deleted and made again, the two files differ unless
// the clock was set back to the same microsecond and the inode and the size are the same too.
// Open refuses a file system that does not keep microseconds. Copying or touching a file changes
// its ETag, which costs a failed condition and nothing else.
//
// A large object is written past the page cache where its memory is aligned and the file system takes
// that: copying it there cost four times what the rest of a Put costs, for pages that nobody reads soon.
//
// A call ends early when its ctx does, but for a system call that hangs, as on a dead NFS server.
package local

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"graindisk/backend"
)

const (
	tmpName  = ".tmp"
	lockName = ".tmp/lock"

	// settledMax bounds the memory of which folders were synced: 4096 names of about 100 bytes.
	settledMax = 4096
)

// Options say how a directory is opened. The zero value opens one that exists.
type Options struct {
	Create bool // make the directory (mode 0700) and its parents if they are missing
	// ReadOnly opens a directory without writing anything into it, so that one on a file system that is mounted
	// read-only will do. Put and Delete are refused as Permanent. Not with Create.
	ReadOnly bool
}

// Store is one directory. Any number of Stores, in any number of processes, may have the same
// directory open. It holds no open files between calls, and needs no Close.
type Store struct {
	dir    string        // absolute
	ro     bool          // nothing is written or synced
	own    chan struct{} // holds one token while a goroutine of this Store is at the lock
	broken atomic.Pointer[error]

	mu      sync.Mutex
	settled map[string]struct{} // folders whose names, and those above, this process has synced
}

var _ backend.Store = (*Store)(nil)

// Open opens the directory dir, checks that it can be written, and removes the temporary files of
// writers that are dead; with ReadOnly it only looks whether the directory is there.
func Open(dir string, o Options) (*Store, error) {
	abs, err := filepath.Abs(dir)
	if err != nil {
		return nil, fmt.Errorf("local: %w", err)
	}
	s := &Store{dir: abs, ro: o.ReadOnly, own: make(chan struct{}, 1), settled: make(map[string]struct{})}
	if err := s.prepare(o); err != nil {
		return nil, s.fail("open", "directory", err)
	}
	return s, nil
}

func (s *Store) prepare(o Options) error {
	if o.Create {
		if err := makeDirs(s.dir); err != nil {
			return err
		}
	}
	if st, err := os.Stat(s.dir); err != nil {
		return err
	} else if !st.IsDir() {
		return refuse("it is not a directory")
	}
	if s.ro {
		return nil
	}
	if err := os.Mkdir(s.path(tmpName), 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	lock, err := os.OpenFile(s.path(lockName), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	if err := lock.Close(); err != nil {
		return err
	}
	if err := s.removeStale(); err != nil {
		return err
	}
	return s.probe()
}

// makeDirs is os.MkdirAll with mode 0700 that makes the new names stable.
func makeDirs(dir string) error {
	err := os.Mkdir(dir, 0o700)
	if errors.Is(err, fs.ErrExist) {
		return nil
	}
	if errors.Is(err, fs.ErrNotExist) && filepath.Dir(dir) != dir {
		if err = makeDirs(filepath.Dir(dir)); err == nil {
			err = os.Mkdir(dir, 0o700)
		}
	}
	if err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return syncDir(filepath.Dir(dir))
}

// probe checks that the file system keeps what the ETag is made of.
func (s *Store) probe() error {
	f, err := s.newTemp()
	if err != nil {
		return err
	}
	defer discard(f)
	want := time.Now().Truncate(time.Second).Add(123456 * time.Microsecond)
	if err := setModTime(f, want); err != nil {
		return err
	}
	st, err := f.Stat()
	if err != nil {
		return err
	}
	if !st.ModTime().Equal(want) {
		return refuse("its file system does not keep modification times to the microsecond")
	}
	return nil
}

// String is the directory.
func (s *Store) String() string { return s.dir }

// path is the file of a key.
func (s *Store) path(key string) string { return filepath.Join(s.dir, filepath.FromSlash(key)) }

// begin is the start of every call on a key.
func (s *Store) begin(ctx context.Context, key string) error {
	if err := backend.CheckKey(key); err != nil {
		return refusal{err}
	}
	return s.ready(ctx)
}

func (s *Store) ready(ctx context.Context) error {
	if err := s.broken.Load(); err != nil {
		return *err
	}
	return ctx.Err()
}

// lock takes the store's lock. The caller gives it back by calling unlock, once.
func (s *Store) lock(ctx context.Context) (unlock func(), err error) {
	select {
	case s.own <- struct{}{}:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	f, err := os.OpenFile(s.path(lockName), os.O_RDWR, 0)
	if err == nil {
		if err = flock(ctx, f); err == nil {
			return func() { f.Close(); <-s.own }, nil // closing gives the flock back
		}
		f.Close()
	}
	<-s.own
	return nil, err
}

// flock waits for f's lock. The kernel's own waiting cannot be ended by ctx, so it asks again and
// again, at most every 20 ms.
func flock(ctx context.Context, f *os.File) error {
	for pause := 250 * time.Microsecond; ; pause = min(2*pause, 20*time.Millisecond) {
		err := tryFlock(f)
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return err
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return fmt.Errorf("wait for the lock: %w", ctx.Err())
		}
	}
}

func tryFlock(f *os.File) error {
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// settle makes the names of folder dir and of all folders above it, down to the store's own,
// stable, unless this process has done so before: see the package doc.
func (s *Store) settle(dir string) error {
	if s.ro { // whoever writes sees to that
		return nil
	}
	s.mu.Lock()
	_, done := s.settled[dir]
	s.mu.Unlock()
	if done {
		return nil
	}
	if err := s.syncUp(dir); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.settled) >= settledMax {
		clear(s.settled)
	}
	s.settled[dir] = struct{}{}
	return nil
}

// syncUp syncs dir and the folders above it. A missing folder holds no names to sync.
func (s *Store) syncUp(dir string) error {
	above, err := s.openUp(dir)
	if isNoObject(err) && len(dir) > len(s.dir) {
		return s.syncUp(filepath.Dir(dir))
	}
	if err != nil {
		return err
	}
	return s.syncAll(above)
}

// openUp opens dir and the folders above it, down to the store's own. Whoever is about to make a
// name visible has them open before, so that nothing but the sync itself can fail afterwards.
func (s *Store) openUp(dir string) ([]*os.File, error) {
	var above []*os.File
	for {
		f, err := os.Open(dir)
		if err != nil {
			closeAll(above)
			return nil, err
		}
		above = append(above, f)
		if len(dir) <= len(s.dir) {
			return above, nil
		}
		dir = filepath.Dir(dir)
	}
}

// syncAll syncs folders, deepest first, and closes them. If that fails the store is broken.
func (s *Store) syncAll(above []*os.File) error {
	defer closeAll(above)
	for _, f := range above {
		if err := f.Sync(); err != nil {
			err = fmt.Errorf("the store is given up until it is opened again: %w", err)
			s.broken.CompareAndSwap(nil, &err)
			return err
		}
	}
	return nil
}

func closeAll(files []*os.File) {
	for _, f := range files {
		f.Close() // only read from
	}
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// refusal marks what no further try can change.
type refusal struct{ error }

func (r refusal) Unwrap() error { return r.error }

func refuse(format string, args ...any) error { return refusal{fmt.Errorf(format, args...)} }

// precondition marks a condition that did not hold.
type precondition string

func (p precondition) Error() string { return string(p) }

// fail gives err its class and its place. It returns nil for nil.
func (s *Store) fail(op, key string, err error) error {
	if err == nil {
		return nil
	}
	e := &backend.Error{Op: op, Store: s.dir, Key: key, Class: classOf(err), Err: err}
	if e.Class == backend.NotFound && op != "open" {
		e.Err = nil // the class says it all
		if _, err := os.Lstat(s.path(lockName)); errors.Is(err, fs.ErrNotExist) {
			e.Class, e.Err = backend.Permanent, errors.New("the directory is gone, not mounted, or was wiped")
		}
	}
	return e
}

func classOf(err error) backend.Class {
	var refused refusal
	var pre precondition
	switch {
	case errors.As(err, &refused):
		return backend.Permanent
	case errors.As(err, &pre):
		return backend.Precondition
	case errors.Is(err, errShort):
		return backend.Short
	case isNoObject(err):
		return backend.NotFound
	case errors.Is(err, fs.ErrPermission), errors.Is(err, syscall.EROFS):
		return backend.Auth
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		return backend.Full
	case errors.Is(err, syscall.ENAMETOOLONG), errors.Is(err, syscall.EFBIG):
		return backend.Permanent
	}
	return backend.Transient
}

// isNoObject says whether err, from opening or removing a file, means that there is none of that name.
func isNoObject(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR)
}
