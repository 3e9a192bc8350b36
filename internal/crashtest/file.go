package crashtest

import (
	"io"
	iofs "io/fs"
	"runtime"
	"slices"
	"syscall"
)

// file is one handle. It stays with its inode when names change; fs.mu guards it.
type file struct {
	fs     *FS
	ino    *inode
	path   string // as it was opened
	closed bool
}

// readyLocked tells whether the handle can serve at all.
func (h *file) readyLocked(op Op) error {
	if err := h.fs.aliveLocked(op, h.path); err != nil {
		return err
	}
	if h.closed {
		return pathError(op, h.path, iofs.ErrClosed)
	}
	return nil
}

func (h *file) beginLocked(op Op) error {
	if err := h.readyLocked(op); err != nil {
		return err
	}
	return h.fs.beginLocked(op, h.path)
}

// ReadAt implements vfs.File.
func (h *file) ReadAt(p []byte, off int64) (int, error) {
	h.fs.park("read", h.path, off)
	h.fs.mu.Lock()
	defer h.fs.mu.Unlock()
	if err := h.readyLocked(OpRead); err != nil {
		return 0, err
	}
	err := h.fs.faultLocked(OpRead, h.path)
	if err == nil && off < 0 {
		err = syscall.EINVAL
	}
	if err != nil {
		return 0, pathError(OpRead, h.path, err)
	}
	n := h.ino.read(p, off)
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// WriteAt implements vfs.File. A write that fails by an injected fault leaves a prefix of whole
// sectors behind, drawn by seed.
func (h *file) WriteAt(p []byte, off int64) (int, error) {
	h.fs.park("write", h.path, off)
	h.fs.mu.Lock()
	defer h.fs.mu.Unlock()
	return h.writeLocked(p, off)
}

// WritevAt implements vfs.File. It is one call, and empties bufs so that nobody relies on it.
func (h *file) WritevAt(bufs [][]byte, off int64) error {
	p := slices.Concat(bufs...)
	clear(bufs)
	h.fs.park("write", h.path, off)
	h.fs.mu.Lock()
	defer h.fs.mu.Unlock()
	_, err := h.writeLocked(p, off)
	return err
}

func (h *file) writeLocked(p []byte, off int64) (int, error) {
	f := h.fs
	if err := h.beginLocked(OpWrite); err != nil {
		return 0, err
	}
	if len(p) == 0 {
		return 0, f.endLocked(OpWrite, h.path, nil)
	}
	fault := f.faultLocked(OpWrite, h.path)
	if fault != nil {
		p = p[:f.failedWriteLocked(off, len(p))]
	}
	before := h.ino.size
	n, err := f.d.write(h.ino, p, off)
	if fault != nil {
		err = fault
	}
	if f.cut {
		if n > 0 {
			first := off / SectorSize
			f.torn = tornWrite{h.ino, first, (off+int64(n)-1)/SectorSize - first + 1, before}
		}
		n = 0
	}
	return n, f.endLocked(OpWrite, h.path, err)
}

// failedWriteLocked draws how much a failing write of n bytes leaves: up to the end of a sector.
func (f *FS) failedWriteLocked(off int64, n int) int64 {
	if off < 0 {
		return 0
	}
	in := off % SectorSize
	sectors := mix(f.seed, uint64(f.calls)) % uint64((in+int64(n))/SectorSize+1)
	return max(0, int64(sectors)*SectorSize-in)
}

// Size implements vfs.File.
func (h *file) Size() (int64, error) {
	h.fs.mu.Lock()
	defer h.fs.mu.Unlock()
	if err := h.readyLocked(OpRead); err != nil {
		return 0, err
	}
	return h.ino.size, nil
}

// Truncate implements vfs.File.
func (h *file) Truncate(size int64) error {
	return h.change(OpTruncate, func(d *disk) error { return d.truncate(h.ino, size) })
}

// Punch implements vfs.File.
func (h *file) Punch(off, n int64) error {
	return h.change(OpPunch, func(d *disk) error {
		if off < 0 || n <= 0 || off+n < 0 {
			return syscall.EINVAL
		}
		d.punch(h.ino, off, off+n)
		return nil
	})
}

// change runs one mutating call on the file.
func (h *file) change(op Op, do func(*disk) error) error {
	h.fs.park(op.String(), h.path, 0)
	h.fs.mu.Lock()
	defer h.fs.mu.Unlock()
	if err := h.beginLocked(op); err != nil {
		return err
	}
	err := h.fs.faultLocked(op, h.path)
	if err == nil {
		err = do(h.fs.d)
	}
	return h.fs.endLocked(op, h.path, err)
}

// Sync implements vfs.File. It covers what was written before it began and then lets other goroutines
// run before it returns, so that callers who count later writes as stable are found out.
func (h *file) Sync() error {
	h.fs.park("sync", h.path, 0)
	defer func() { // after the unlock below
		runtime.Gosched()
		h.fs.park("synced", h.path, 0)
	}()
	h.fs.mu.Lock()
	defer h.fs.mu.Unlock()
	if err := h.beginLocked(OpSync); err != nil {
		return err
	}
	if h.fs.cut { // the data stays in doubt
		return h.fs.endLocked(OpSync, h.path, nil)
	}
	err := h.fs.faultLocked(OpSync, h.path)
	h.ino.sync(err != nil)
	return h.fs.endLocked(OpSync, h.path, err)
}

// Close implements vfs.File. It works without power too.
func (h *file) Close() error {
	h.fs.mu.Lock()
	defer h.fs.mu.Unlock()
	if h.closed {
		return pathError(OpClose, h.path, iofs.ErrClosed)
	}
	h.closed = true
	if h.fs.dead == nil {
		h.ino.opens--
		h.fs.d.freeIfUnused(h.ino)
	}
	return nil
}
