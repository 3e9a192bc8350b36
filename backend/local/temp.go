package local

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const tempPrefix = "put-"

// newTemp makes a temporary file and flocks it, which tells others that its writer is alive.
func (s *Store) newTemp() (*os.File, error) {
	for {
		f, err := os.CreateTemp(s.path(tmpName), tempPrefix)
		if err != nil {
			return nil, err
		}
		alive, err := claim(f)
		if err == nil && alive {
			return f, nil
		}
		f.Close()
		if err != nil {
			return nil, err
		}
		// Another process's removeStale was at the file before it was flocked: make another.
	}
}

// claim flocks f and says whether f still has a name then.
func claim(f *os.File) (bool, error) {
	err := tryFlock(f)
	if errors.Is(err, unix.EWOULDBLOCK) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	st, err := f.Stat()
	if err != nil {
		return false, err
	}
	return st.Sys().(*syscall.Stat_t).Nlink > 0, nil
}

// discard closes and removes a temporary file. One that stays is removed by a later Open.
func discard(f *os.File) {
	os.Remove(f.Name())
	f.Close()
}

// removeStale removes the temporary files that no living writer holds.
func (s *Store) removeStale() error {
	entries, err := os.ReadDir(s.path(tmpName))
	if err != nil {
		return err
	}
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), tempPrefix) {
			continue
		}
		name := filepath.Join(s.path(tmpName), e.Name())
		f, err := os.OpenFile(name, os.O_RDWR, 0)
		if errors.Is(err, fs.ErrNotExist) {
			continue // its writer, or another Open, was faster
		}
		if err != nil {
			return err
		}
		if tryFlock(f) == nil {
			err = os.Remove(name)
		}
		f.Close()
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

func setModTime(f *os.File, t time.Time) error { return os.Chtimes(f.Name(), t, t) }
