package crashtest

import (
	"errors"
	iofs "io/fs"
	"sync"
	"syscall"

	"graindisk/internal/vfs"
)

var (
	// ErrPowerLost is what every call returns once the power is cut.
	ErrPowerLost = errors.New("power lost")
	// ErrCrashed is what every call through a FS returns after its ProcessCrash.
	ErrCrashed = errors.New("process crashed")
)

// Options of a FS. The zero value never cuts and never fills up.
type Options struct {
	Seed          uint64 // draws what a torn or failing write leaves behind
	CutAfter      int    // the power goes at this mutating call, from 1; 0 is never
	CapacityBytes int64  // of sectors holding data, over all files; 0 is no limit
}

// FS is a file system in memory that can lose power. All paths are taken from its root, which
// always exists: "a/b" and "/a/b" are one. Folders cannot be renamed. Safe for concurrent use;
// the same seeds and the same order of calls give the same result.
type FS struct {
	mu     sync.Mutex
	seed   uint64
	d      *disk // nil once ProcessCrash has handed it on
	dead   error // ErrPowerLost or ErrCrashed, once it is over
	cut    bool
	calls  int // mutating calls begun
	cutAt  int // the call that cuts the power; 0 is none
	torn   tornWrite
	faults []*Fault
	gate   *Sched // nil: calls go on at once
	onCut  func()
	cutIn  string // the call that the power went at; "" is between two
}

// tornWrite is the write the power cut interrupted. Reboot with KeepAll and ProcessCrash keep a
// prefix of its sectors, drawn by seed.
type tornWrite struct {
	ino    *inode // nil if the cut met no write
	first  int64  // first sector written
	count  int64  // sectors written
	before int64  // file's length before
}

var _ vfs.FS = (*FS)(nil)

// NewFS returns an empty file system.
func NewFS(o Options) *FS {
	return &FS{seed: o.Seed, cutAt: o.CutAfter, d: newDisk(o.CapacityBytes)}
}

// CutAfter arms the cut anew: the power goes at the n-th mutating call from now; 0 disarms. With it
// recovery itself can be crashed, on the FS that Reboot returned.
func (f *FS) CutAfter(n int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.cutAt = 0
	if n > 0 {
		f.cutAt = f.calls + n
	}
}

// PowerCut cuts the power between two calls.
func (f *FS) PowerCut() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.powerCutLocked()
}

func (f *FS) powerCutLocked() {
	if f.dead == nil {
		f.dead, f.cut = ErrPowerLost, true
		if f.onCut != nil {
			f.onCut()
		}
	}
}

// WasCut tells whether the power is gone.
func (f *FS) WasCut() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.cut
}

// CutIn is the call that the power went at, as "op:kind of file", where the kind is the file's name
// without the digits at its end; "" if it went between two calls or is still on.
func (f *FS) CutIn() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.cutIn
}

// Calls is the number of mutating calls begun: Create, Remove, Rename, MkdirAll, SyncDir, WriteAt,
// WritevAt, Truncate, Punch and Sync, whether they succeeded or not.
func (f *FS) Calls() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.calls
}

// UsedBytes is the space of all sectors that hold data, in files that have a name or are open.
func (f *FS) UsedBytes() int64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.d == nil {
		return 0
	}
	return f.d.usedBytes
}

// ProcessCrash ends the process but not the host: the FS it returns shows every byte written,
// with what was not synced still volatile. If a write was under way (the FS was cut at it), a
// prefix of its sectors is there. The old FS and its files fail with ErrCrashed.
// It may be called once, and Reboot of the old FS not after it.
func (f *FS) ProcessCrash() *FS {
	f.mu.Lock()
	defer f.mu.Unlock()
	d := f.takeLocked()
	if f.torn.ino != nil {
		f.torn.undoTail(d, f.seed)
	}
	d.forgetOpenFiles()
	f.d, f.dead = nil, ErrCrashed
	return &FS{seed: mix(f.seed, uint64(f.calls)), d: d}
}

// takeLocked returns the disk to build the next FS from.
func (f *FS) takeLocked() *disk {
	if f.d == nil {
		panic("crashtest: the FS was already handed on by ProcessCrash")
	}
	return f.d
}

// beginLocked counts a mutating call and cuts the power if it is the one. That call goes on, so
// that its effect is among what may survive, and ends in endLocked.
func (f *FS) beginLocked(op Op, path string) error {
	if err := f.aliveLocked(op, path); err != nil {
		return err
	}
	f.calls++
	if f.cutAt > 0 && f.calls >= f.cutAt {
		f.cutIn = op.String() + ":" + kindOf(path)
		f.powerCutLocked()
	}
	return nil
}

// endLocked is the result of a mutating call whose own result is err.
func (f *FS) endLocked(op Op, path string, err error) error {
	if f.cut {
		err = ErrPowerLost
	}
	return pathError(op, path, err)
}

func (f *FS) aliveLocked(op Op, path string) error { return pathError(op, path, f.dead) }

func pathError(op Op, path string, err error) error {
	if err == nil {
		return nil
	}
	return &iofs.PathError{Op: op.String(), Path: path, Err: err}
}

// Open implements vfs.FS.
func (f *FS) Open(path string) (vfs.File, error) {
	f.park("open", path, 0)
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.aliveLocked(OpOpen, path); err != nil {
		return nil, err
	}
	ino, err := f.d.lookup(path)
	if err == nil && ino.isDir() {
		err = syscall.EISDIR
	}
	if err != nil {
		return nil, pathError(OpOpen, path, err)
	}
	return f.handleLocked(ino, path), nil
}

// Create implements vfs.FS.
func (f *FS) Create(path string) (vfs.File, error) {
	f.park("create", path, 0)
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.beginLocked(OpCreate, path); err != nil {
		return nil, err
	}
	err := f.faultLocked(OpCreate, path)
	var ino *inode
	if err == nil {
		ino, err = f.d.create(path)
	}
	if err = f.endLocked(OpCreate, path, err); err != nil {
		return nil, err
	}
	return f.handleLocked(ino, path), nil
}

func (f *FS) handleLocked(ino *inode, path string) *file {
	ino.opens++
	return &file{fs: f, ino: ino, path: path}
}

// Remove implements vfs.FS. Files that are open stay usable; a folder must be empty.
func (f *FS) Remove(path string) error {
	return f.change(OpRemove, path, func(d *disk) error { return d.remove(path) })
}

// Rename implements vfs.FS.
func (f *FS) Rename(from, to string) error {
	return f.change(OpRename, from, func(d *disk) error { return d.rename(from, to) })
}

// MkdirAll implements vfs.FS.
func (f *FS) MkdirAll(path string) error {
	return f.change(OpMkdir, path, func(d *disk) error { return d.mkdirAll(path) })
}

// SyncDir implements vfs.FS. Operations that touch the folder become stable, others do not.
func (f *FS) SyncDir(path string) error {
	return f.change(OpSyncDir, path, func(d *disk) error {
		if f.cut {
			return ErrPowerLost // the names stay in doubt
		}
		return d.syncDir(path)
	})
}

// change runs one mutating call on names.
func (f *FS) change(op Op, path string, do func(*disk) error) error {
	f.park(op.String(), path, 0)
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.beginLocked(op, path); err != nil {
		return err
	}
	err := f.faultLocked(op, path)
	if err == nil {
		err = do(f.d)
	}
	return f.endLocked(op, path, err)
}

// ReadDir implements vfs.FS.
func (f *FS) ReadDir(path string) ([]iofs.DirEntry, error) {
	f.park("readdir", path, 0)
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.aliveLocked(OpReadDir, path); err != nil {
		return nil, err
	}
	list, err := f.d.readDir(path)
	return list, pathError(OpReadDir, path, err)
}

// mix hashes its arguments into one number (the finisher of SplitMix64 over each in turn). All
// randomness of the package is a hash of a seed and a place, so no order of iteration matters.
func mix(v ...uint64) uint64 {
	h := uint64(0x9e3779b97f4a7c15)
	for _, x := range v {
		h = (h ^ x) + 0x9e3779b97f4a7c15
		h = (h ^ h>>30) * 0xbf58476d1ce4e5b9
		h = (h ^ h>>27) * 0x94d049bb133111eb
		h ^= h >> 31
	}
	return h
}
