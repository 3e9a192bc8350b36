package local

import (
	"context"
	"errors"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	// directMin is the shortest body that goes past the page cache. Nobody reads a shard soon, so its pages
	// would only push out others, and copying it into them cost more than all else a Put does; below that
	// the wait for the device costs more than the copy. [tune]
	directMin = 256 << 10
	// directAlign is what every device takes: of the memory, of the length, and of the offset.
	directAlign = 4096
	// directChunk is one write: large enough for a device, small enough to let the writes of others between.
	directChunk = 1 << 20
)

// directHead is how many bytes at the head of body can be written past the page cache.
func directHead(body []byte) int {
	if len(body) < directMin || uintptr(unsafe.Pointer(unsafe.SliceData(body)))%directAlign != 0 {
		return 0
	}
	return len(body) / directAlign * directAlign
}

// writeDirect writes head past the page cache and returns how much of it was written: less, and no error,
// if the file system or the device does not take it. What follows goes through the page cache again.
func writeDirect(ctx context.Context, f *os.File, head []byte) (done int, err error) {
	if len(head) == 0 {
		return 0, nil
	}
	if err := setDirect(f, true); err != nil {
		return 0, nil // nothing has changed: the page cache will do
	}
	done, err = writeChunks(ctx, f, head, directChunk)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EOPNOTSUPP) {
		err = nil
	}
	return done, errors.Join(err, setDirect(f, false))
}

// setDirect has writes of f go past the page cache, or through it again.
func setDirect(f *os.File, on bool) error {
	c, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var ferr error
	err = c.Control(func(fd uintptr) {
		var flags int
		if flags, ferr = unix.FcntlInt(fd, unix.F_GETFL, 0); ferr != nil {
			return
		}
		flags &^= unix.O_DIRECT
		if on {
			flags |= unix.O_DIRECT
		}
		_, ferr = unix.FcntlInt(fd, unix.F_SETFL, flags)
	})
	if err == nil && ferr != nil {
		err = os.NewSyscallError("fcntl", ferr)
	}
	return err
}
