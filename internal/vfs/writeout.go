package vfs

import "golang.org/x/sys/unix"

// Starter is a File whose bytes can begin their way to the device before Sync.
type Starter interface {
	// Start asks the kernel to begin writing [off, off+n) to the device, and does not wait for it. It is a
	// hint: only Sync makes anything stable and tells of errors. It may be called while the file is closed.
	Start(off, n int64)
}

// Start implements Starter. The flag alone neither waits nor takes an error away from the next fdatasync.
func (f osFile) Start(off, n int64) {
	c, err := f.SyscallConn()
	if err != nil {
		return
	}
	_ = c.Control(func(fd uintptr) { _ = unix.SyncFileRange(int(fd), off, n, unix.SYNC_FILE_RANGE_WRITE) })
}
