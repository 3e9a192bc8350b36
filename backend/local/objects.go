package local

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"graindisk/backend"
)

// chunkBytes is how much is read or written between two looks at ctx.
const chunkBytes = 4 << 20

var (
	errShort    = errors.New("the file ends first")
	errReadOnly = refuse("the directory was opened for reading only")
)

// Put implements backend.Store.
func (s *Store) Put(ctx context.Context, key string, body []byte, c backend.Cond) (string, error) {
	etag, err := s.put(ctx, key, body, c)
	return etag, s.fail("put", key, err)
}

func (s *Store) put(ctx context.Context, key string, body []byte, c backend.Cond) (string, error) {
	if err := s.begin(ctx, key); err != nil {
		return "", err
	}
	if s.ro {
		return "", errReadOnly
	}
	if c.Absent && c.Match != "" {
		return "", refuse("a put cannot want the key both absent and matching")
	}
	path := s.path(key)
	if _, err := check(path, c); err != nil { // saves writing the body in vain; place decides
		return "", s.beforeTelling(path, err)
	}
	f, err := s.newTemp()
	if err != nil {
		return "", err
	}
	if err := write(ctx, f, body); err != nil {
		discard(f)
		return "", err
	}
	etag, above, err := s.place(ctx, f, path, c)
	if err != nil {
		discard(f)
		return "", s.beforeTelling(path, err)
	}
	return etag, errors.Join(s.syncAll(above), f.Close())
}

// beforeTelling passes err on. One that tells of what is stored waits until that is stable.
func (s *Store) beforeTelling(path string, err error) error {
	var told precondition
	if errors.As(err, &told) {
		if err := s.settle(filepath.Dir(path)); err != nil {
			return err
		}
	}
	return err
}

// check returns the modification time of the object at path, zero if there is none, or why a put
// under condition c cannot be.
func check(path string, c backend.Cond) (time.Time, error) {
	st, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist) && c.Match != "":
		return time.Time{}, precondition("no such object")
	case errors.Is(err, fs.ErrNotExist):
		return time.Time{}, nil
	case errors.Is(err, syscall.ENOTDIR):
		return time.Time{}, refuse("an object has the name of a folder in this key")
	case err != nil:
		return time.Time{}, err
	case st.IsDir():
		return time.Time{}, refuse("the key is the folder of other objects")
	case c.Absent:
		return time.Time{}, precondition("the object exists")
	case c.Match != "" && c.Match != etagOf(st):
		return time.Time{}, precondition("the object is another by now")
	}
	return st.ModTime(), nil
}

// place gives the written temporary file f its name, if condition c holds. It returns the folders
// that must be synced for the name to be stable.
func (s *Store) place(ctx context.Context, f *os.File, path string, c backend.Cond) (string, []*os.File, error) {
	unlock, err := s.lock(ctx)
	if err != nil {
		return "", nil, err
	}
	defer unlock()
	old, err := check(path, c)
	if err != nil {
		return "", nil, err
	}
	modified := time.Now().Truncate(time.Microsecond)
	if next := old.Truncate(time.Microsecond).Add(time.Microsecond); modified.Before(next) {
		modified = next
	}
	if err := setModTime(f, modified); err != nil {
		return "", nil, err
	}
	if err := f.Sync(); err != nil { // the bytes are down already: this is for the time alone
		return "", nil, err
	}
	st, err := f.Stat()
	if err != nil {
		return "", nil, err
	}
	folder := filepath.Dir(path)
	if err := os.MkdirAll(folder, 0o700); err != nil {
		return "", nil, err
	}
	above, err := s.openUp(folder)
	if err != nil {
		return "", nil, err
	}
	if err := os.Rename(f.Name(), path); err != nil {
		closeAll(above)
		return "", nil, err
	}
	return etagOf(st), above, nil
}

// etagOf is explained in the package doc.
func etagOf(st fs.FileInfo) string {
	return fmt.Sprintf("%x-%x-%x", st.ModTime().UnixMicro(), st.Sys().(*syscall.Stat_t).Ino, st.Size())
}

// Get implements backend.Store.
func (s *Store) Get(ctx context.Context, key string, max int64) ([]byte, string, error) {
	body, etag, err := s.get(ctx, key, max)
	return body, etag, s.fail("get", key, err)
}

func (s *Store) get(ctx context.Context, key string, max int64) ([]byte, string, error) {
	f, st, err := s.open(ctx, key)
	if err != nil {
		return nil, "", err
	}
	defer f.Close()
	if st.Size() > max {
		return nil, "", refuse("it has %d bytes, at most %d were expected", st.Size(), max)
	}
	body := make([]byte, st.Size())
	if err := read(ctx, f, body, 0); err != nil {
		return nil, "", err
	}
	return body, etagOf(st), nil
}

// ReadAt implements backend.Store.
func (s *Store) ReadAt(ctx context.Context, key string, p []byte, off int64) error {
	return s.fail("read", key, s.readAt(ctx, key, p, off))
}

func (s *Store) readAt(ctx context.Context, key string, p []byte, off int64) error {
	if err := s.begin(ctx, key); err != nil {
		return err
	}
	if off < 0 || off > math.MaxInt64-int64(len(p)) {
		return refuse("offset %d", off)
	}
	if len(p) == 0 {
		return nil
	}
	f, _, err := s.open(ctx, key)
	if err != nil {
		return err
	}
	defer f.Close()
	return read(ctx, f, p, off)
}

// Stat implements backend.Store.
func (s *Store) Stat(ctx context.Context, key string) (backend.Info, error) {
	f, st, err := s.open(ctx, key)
	if err != nil {
		return backend.Info{}, s.fail("stat", key, err)
	}
	f.Close() // only read from
	return infoOf(key, st), nil
}

func infoOf(key string, st fs.FileInfo) backend.Info {
	return backend.Info{Key: key, Size: st.Size(), ETag: etagOf(st), Modified: st.ModTime()}
}

// open opens the file of an object whose name is stable.
func (s *Store) open(ctx context.Context, key string) (*os.File, fs.FileInfo, error) {
	if err := s.begin(ctx, key); err != nil {
		return nil, nil, err
	}
	path := s.path(key)
	if err := s.settle(filepath.Dir(path)); err != nil {
		return nil, nil, err
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, nil, err
	}
	st, err := f.Stat()
	if err == nil && st.IsDir() {
		err = fs.ErrNotExist
	}
	if err != nil {
		f.Close()
		return nil, nil, err
	}
	return f, st, nil
}

// Delete implements backend.Store. It removes the folders that have become empty, too.
func (s *Store) Delete(ctx context.Context, key string) error {
	return s.fail("delete", key, s.delete(ctx, key))
}

func (s *Store) delete(ctx context.Context, key string) error {
	if err := s.begin(ctx, key); err != nil {
		return err
	}
	if s.ro {
		return errReadOnly
	}
	folder, err := s.remove(ctx, s.path(key))
	if err != nil || folder == "" {
		return err
	}
	for {
		err := syncDir(folder)
		// Another delete may have taken the folder away meanwhile: then that is what must be stable.
		if !errors.Is(err, fs.ErrNotExist) || len(folder) <= len(s.dir) {
			return err
		}
		folder = filepath.Dir(folder)
	}
}

// remove removes a file and the folders it leaves empty, and returns the folder to sync, if any.
func (s *Store) remove(ctx context.Context, path string) (string, error) {
	unlock, err := s.lock(ctx)
	if err != nil {
		return "", err
	}
	defer unlock()
	switch err := syscall.Unlink(path); {
	case isNoObject(err), errors.Is(err, syscall.EISDIR):
		return "", nil
	case err != nil:
		return "", &fs.PathError{Op: "unlink", Path: path, Err: err}
	}
	folder := filepath.Dir(path)
	for len(folder) > len(s.dir) && syscall.Rmdir(folder) == nil {
		folder = filepath.Dir(folder)
	}
	return folder, nil
}

// read fills p from off.
func read(ctx context.Context, f *os.File, p []byte, off int64) error {
	for len(p) > 0 {
		if err := ctx.Err(); err != nil {
			return err
		}
		n, err := f.ReadAt(p[:min(len(p), chunkBytes)], off)
		if errors.Is(err, io.EOF) && n < len(p) {
			return errShort
		}
		if err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		p, off = p[n:], off+int64(n)
	}
	return nil
}

// write writes body to f, which is empty, and makes it stable.
func write(ctx context.Context, f *os.File, body []byte) error {
	done, err := writeDirect(ctx, f, body[:directHead(body)])
	if err == nil {
		_, err = writeChunks(ctx, f, body[done:], chunkBytes)
	}
	if err != nil {
		return err
	}
	return f.Sync()
}

// writeChunks writes body where f stands and returns how much of it was written.
func writeChunks(ctx context.Context, f *os.File, body []byte, chunk int) (done int, err error) {
	for done < len(body) {
		if err := ctx.Err(); err != nil {
			return done, err
		}
		n, err := f.Write(body[done:min(len(body), done+chunk)])
		done += n
		if err != nil {
			return done, err
		}
	}
	return done, nil
}
