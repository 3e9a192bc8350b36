package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"graindisk/block"
)

// image takes a disk's bytes, in order and without a gap.
type image interface {
	write(off int64, p []byte) error // p is used only during the call
	skip(off, n int64) error         // zeroes
	finish() error                   // once, when all is there
	abort()                          // instead, or after finish has failed
}

// nothing is the image of --verify.
type nothing struct{}

func (nothing) write(int64, []byte) error { return nil }
func (nothing) skip(int64, int64) error   { return nil }
func (nothing) finish() error             { return nil }
func (nothing) abort()                    {}

// stream is an image that cannot have holes.
type stream struct{ w io.Writer }

var zeroes = make([]byte, 1<<20)

func (s *stream) write(_ int64, p []byte) error {
	if _, err := s.w.Write(p); err != nil {
		return fmt.Errorf("write the image: %w", err)
	}
	return nil
}

func (s *stream) skip(off, n int64) error {
	for n > 0 {
		c := min(n, int64(len(zeroes)))
		if err := s.write(off, zeroes[:c]); err != nil {
			return err
		}
		n -= c
	}
	return nil
}

func (*stream) finish() error { return nil }
func (*stream) abort()        {}

// imageFile is a sparse file: zeroes, stored ones too, are holes. It gets its name when it is whole and stable.
type imageFile struct {
	f     *os.File // PATH.partial
	path  string
	force bool
	size  int64
}

// createImageFile begins an image of size bytes at path. What exists there is left alone unless force is set, and
// what is no regular file is in any case.
func createImageFile(path string, size int64, force bool) (*imageFile, error) {
	switch st, err := os.Lstat(path); {
	case err == nil && !st.Mode().IsRegular():
		return nil, fmt.Errorf("%s is no regular file; write to - and pipe that into it", path)
	case err == nil && !force:
		return nil, fmt.Errorf("%s exists; give another name, or --force to replace it", path)
	case err != nil && !errors.Is(err, fs.ErrNotExist):
		return nil, err
	}
	flags := os.O_RDWR | os.O_CREATE | os.O_EXCL
	if force {
		flags = os.O_RDWR | os.O_CREATE
	}
	f, err := os.OpenFile(path+".partial", flags, 0o600)
	if errors.Is(err, fs.ErrExist) {
		return nil, fmt.Errorf("%s.partial exists: another extract is writing it, or one was killed; remove it, or give --force", path)
	}
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return nil, errors.Join(fmt.Errorf("%s.partial is being written by another extract", path), f.Close())
	}
	if err := f.Truncate(0); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return &imageFile{f, path, force, size}, nil
}

func (i *imageFile) write(off int64, p []byte) error {
	for len(p) > 0 {
		n := zeroBlocks(p)
		p, off = p[n:], off+int64(n)
		n = 0
		for n < len(p) && zeroBlocks(p[n:]) == 0 {
			n += min(block.Size, len(p)-n)
		}
		if n > 0 {
			if _, err := i.f.WriteAt(p[:n], off); err != nil {
				return err
			}
		}
		p, off = p[n:], off+int64(n)
	}
	return nil
}

// zeroBlocks is how many bytes at the head of p are blocks of zeroes.
func zeroBlocks(p []byte) (n int) {
	for n < len(p) {
		b := p[n:min(n+block.Size, len(p))]
		if !bytes.Equal(b, zeroes[:len(b)]) {
			break
		}
		n += len(b)
	}
	return n
}

func (i *imageFile) skip(int64, int64) error { return nil } // the file began empty

func (i *imageFile) finish() error {
	if err := errors.Join(i.f.Truncate(i.size), i.f.Sync()); err != nil {
		return err
	}
	if err := i.rename(); err != nil {
		return err
	}
	d, err := os.Open(filepath.Dir(i.path))
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close(), i.f.Close())
}

// rename gives the file its name, unless that was taken meanwhile.
func (i *imageFile) rename() error {
	if i.force {
		return os.Rename(i.f.Name(), i.path)
	}
	err := unix.Renameat2(unix.AT_FDCWD, i.f.Name(), unix.AT_FDCWD, i.path, unix.RENAME_NOREPLACE)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS) { // not every file system has it
		if _, err := os.Lstat(i.path); err == nil {
			return fmt.Errorf("%s exists by now", i.path)
		}
		return os.Rename(i.f.Name(), i.path)
	}
	if errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("%s exists by now", i.path)
	}
	if err != nil {
		return fmt.Errorf("rename %s: %w", i.f.Name(), err)
	}
	return nil
}

func (i *imageFile) abort() {
	os.Remove(i.f.Name()) // not there any more if it was renamed
	i.f.Close()
}
