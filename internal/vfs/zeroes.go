package vfs

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// Zeroer is a File that writes zeroes with less work than WriteAt.
type Zeroer interface {
	// WriteZeroes writes zeroes over [off, off+n), growing the file as needed: written bytes, not a
	// hole. Both are multiples of 4 KiB. Sync makes them stable, as with WriteAt.
	WriteZeroes(off, n int64) error
}

// Forgetter is a File whose content can leave the page cache.
type Forgetter interface {
	// Forget asks the kernel to forget what it has cached of the file. Bytes not yet stable stay. It is a
	// hint: nothing depends on it.
	Forget()
}

// Forget implements Forgetter.
func (f osFile) Forget() { _ = unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED) }

const zeroesLen = 1 << 20

// zeroes is memory that may be written directly: aligned to a page.
var zeroes = sync.OnceValues(func() ([]byte, error) {
	return unix.Mmap(-1, 0, zeroesLen, unix.PROT_READ, unix.MAP_ANON|unix.MAP_PRIVATE)
})

// WriteZeroes implements Zeroer. It goes around the page cache where the file system lets it: zeroes
// written ahead are not read, and half the work was copying them.
func (f osFile) WriteZeroes(off, n int64) error {
	zero, err := zeroes()
	if err != nil {
		return fmt.Errorf("memory for zeroes: %w", err)
	}
	to := f.File
	direct, err := os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", f.Fd()), os.O_WRONLY|unix.O_DIRECT, 0)
	if err == nil {
		defer direct.Close()
		to = direct
	}
	for end := off + n; off < end; {
		p := zero[:min(zeroesLen, end-off)]
		done, err := to.WriteAt(p, off)
		off += int64(done)
		if errors.Is(err, unix.EINVAL) && to != f.File { // the device wants more than page alignment
			to, err = f.File, nil
		}
		if err != nil {
			return &fs.PathError{Op: "write zeroes", Path: f.Name(), Err: err}
		}
	}
	return nil
}
