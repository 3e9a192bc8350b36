package local

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"sync"

	"graindisk/backend"
)

// Late is the store of a directory that may not be there yet, such as a mount that failed. Until Open
// succeeds, every call fails with Open's error; each call tries again. A directory that was opened and is taken away, or
// wiped, is not opened again until Reopen is called. Safe for concurrent use.
type Late struct {
	dir string

	mu    sync.Mutex
	store *Store // nil until it could be opened
}

var (
	_ backend.Store    = (*Late)(nil)
	_ backend.Reopener = (*Late)(nil)
)

// OpenLate returns the store of dir, whether or not it can be opened now; err says why it could not.
func OpenLate(dir string) (l *Late, err error) {
	l = &Late{dir: dir}
	_, err = l.open()
	return l, err
}

func (l *Late) open() (*Store, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.store == nil {
		s, err := Open(l.dir, Options{})
		if err != nil {
			// Not NotFound, whatever the cause: that would say that the store is there and empty.
			return nil, &backend.Error{Op: "open", Key: "directory", Store: l.dir, Class: backend.Permanent, Err: errors.New(err.Error())}
		}
		l.store = s
	}
	return l.store, nil
}

// Reopen implements backend.Reopener. It fails if the directory is not there; then nothing has changed.
func (l *Late) Reopen(context.Context) error {
	s, err := Open(l.dir, Options{})
	if errors.Is(err, fs.ErrNotExist) {
		err = fmt.Errorf("%w: mount its file system, or make the directory if that is lost", err)
	}
	if err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.store = s
	return nil
}

// Put implements backend.Store.
func (l *Late) Put(ctx context.Context, key string, body []byte, c backend.Cond) (string, error) {
	s, err := l.open()
	if err != nil {
		return "", err
	}
	return s.Put(ctx, key, body, c)
}

// Get implements backend.Store.
func (l *Late) Get(ctx context.Context, key string, max int64) ([]byte, string, error) {
	s, err := l.open()
	if err != nil {
		return nil, "", err
	}
	return s.Get(ctx, key, max)
}

// ReadAt implements backend.Store.
func (l *Late) ReadAt(ctx context.Context, key string, p []byte, off int64) error {
	s, err := l.open()
	if err != nil {
		return err
	}
	return s.ReadAt(ctx, key, p, off)
}

// Stat implements backend.Store.
func (l *Late) Stat(ctx context.Context, key string) (backend.Info, error) {
	s, err := l.open()
	if err != nil {
		return backend.Info{}, err
	}
	return s.Stat(ctx, key)
}

// Delete implements backend.Store.
func (l *Late) Delete(ctx context.Context, key string) error {
	s, err := l.open()
	if err != nil {
		return err
	}
	return s.Delete(ctx, key)
}

// List implements backend.Store.
func (l *Late) List(ctx context.Context, prefix, after string, max int) ([]backend.Info, bool, error) {
	s, err := l.open()
	if err != nil {
		return nil, false, err
	}
	return s.List(ctx, prefix, after, max)
}

// String is the directory.
func (l *Late) String() string { return l.dir }
