package writeback

import (
	"errors"
	"fmt"
	"io/fs"
	"path"
	"strings"

	"graindisk/internal/vfs"
)

// LostName is a file beside a log that its owner may write, and that moves with it: a list of what the log holds and
// nobody will read from it any more.
const LostName = "LOST.json"

// Identity says whose log a directory holds.
type Identity struct {
	Log  UUID
	Pool UUID
	// SlotBytes is the length of the slots that the log is in; 0 if it was not noted.
	SlotBytes int64
}

// ReadIdentity tells whose log dir holds; ErrNoLog if it holds none.
func ReadIdentity(fsys vfs.FS, dir string) (Identity, error) {
	id, err := readIdentity(fsys, dir)
	return Identity{Log: id.log, Pool: id.pool, SlotBytes: id.slotBytes}, err
}

// SetAside moves every file of a log and of its tier from dir to the new folder to below it: from then on
// dir holds no log. Neither the log nor its space may be open. If a crash cuts it short, FinishAside
// completes it; the identity goes first, so that what is left is never taken for a log.
func SetAside(fsys vfs.FS, dir, to string) error {
	if err := errors.Join(fsys.MkdirAll(to), fsys.SyncDir(dir)); err != nil {
		return fmt.Errorf("set log aside: %w", err)
	}
	if err := fsys.Rename(path.Join(dir, identityName), path.Join(to, identityName)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("set log aside: %w", err)
	}
	if err := errors.Join(fsys.SyncDir(to), fsys.SyncDir(dir)); err != nil {
		return fmt.Errorf("set log aside: %w", err)
	}
	names, err := logFiles(fsys, dir)
	for _, name := range names {
		err = errors.Join(err, fsys.Rename(path.Join(dir, name), path.Join(to, name)))
	}
	if err == nil {
		err = errors.Join(fsys.SyncDir(to), fsys.SyncDir(dir))
	}
	var done vfs.File
	if err == nil {
		done, err = fsys.Create(path.Join(to, asideDone))
	}
	if err == nil {
		err = errors.Join(done.Close(), fsys.SyncDir(to))
	}
	if err != nil {
		return fmt.Errorf("set log aside: %w", err)
	}
	return nil
}

// asideDone is an empty file that says that all of a log is in the folder.
const asideDone = "complete"

// FinishAside completes a SetAside in dir that a crash cut short. folder tells which of the folders in
// dir SetAside was given.
func FinishAside(fsys vfs.FS, dir string, folder func(name string) bool) error {
	entries, err := fsys.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("set log aside: %w", err)
	}
	for _, e := range entries {
		to := path.Join(dir, e.Name())
		if !e.IsDir() || !folder(e.Name()) {
			continue
		}
		f, err := fsys.Open(path.Join(to, asideDone))
		if err == nil {
			err = f.Close()
		} else if errors.Is(err, fs.ErrNotExist) {
			err = SetAside(fsys, dir, to)
		}
		if err != nil {
			return fmt.Errorf("set log aside: %w", err)
		}
	}
	return nil
}

// logFiles lists the files of a log and of its tier in dir, but for the identity.
func logFiles(fsys vfs.FS, dir string) (names []string, err error) {
	entries, err := fsys.ReadDir(dir)
	for _, e := range entries {
		for _, prefix := range []string{"meta-", "ckpt-", "slot-", "run-", LostName} {
			if strings.HasPrefix(e.Name(), prefix) {
				names = append(names, e.Name())
			}
		}
	}
	return names, err
}
