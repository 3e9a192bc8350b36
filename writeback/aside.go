package writeback

import (
	"errors"
	"fmt"
	"io/fs"
	"path"
	"strings"

	"graindisk/internal/vfs"
)

// Identity says whose log a directory holds.
type Identity struct {
	Log  UUID
	Pool UUID
}

// ReadIdentity tells whose log dir holds; ErrNoLog if it holds none.
func ReadIdentity(fsys vfs.FS, dir string) (Identity, error) {
	id, err := readIdentity(fsys, dir)
	return Identity{Log: id.log, Pool: id.pool}, err
}

// SetAside moves every file of a log and of its tier from dir to the new folder to, the identity
// first: from then on dir holds no log. Neither the log nor its space may be open.
func SetAside(fsys vfs.FS, dir, to string) error {
	if err := fsys.MkdirAll(to); err != nil {
		return fmt.Errorf("set log aside: %w", err)
	}
	return eachFile(fsys, dir, func(name string) error {
		return fsys.Rename(path.Join(dir, name), path.Join(to, name))
	}, to)
}

// Discard removes a log that never acknowledged anything, the identity first. It may not be open.
func Discard(fsys vfs.FS, dir string) error {
	return eachFile(fsys, dir, func(name string) error { return fsys.Remove(path.Join(dir, name)) })
}

// eachFile calls f for the files of the log in dir, and makes the names stable in dir and in others.
func eachFile(fsys vfs.FS, dir string, f func(name string) error, others ...string) error {
	names := []string{identityName}
	entries, err := fsys.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("clear log: %w", err)
	}
	for _, e := range entries {
		for _, prefix := range []string{"meta-", "ckpt-", "slot-"} {
			if strings.HasPrefix(e.Name(), prefix) {
				names = append(names, e.Name())
			}
		}
	}
	for _, name := range names {
		if err := f(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("clear log: %w", err)
		}
	}
	for _, d := range append(others, dir) {
		if err := fsys.SyncDir(d); err != nil {
			return fmt.Errorf("clear log: %w", err)
		}
	}
	return nil
}
