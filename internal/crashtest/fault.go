package crashtest

import (
	"path"
	"strings"
	"syscall"
)

// Op is a kind of call on a FS or a file.
type Op int

// The calls. OpWrite stands for WriteAt and WritevAt, OpRead for ReadAt. OpOpen, OpReadDir and
// OpClose never fail by injection.
const (
	OpRead Op = iota
	OpWrite
	OpSync
	OpTruncate
	OpPunch
	OpCreate
	OpRename
	OpRemove
	OpMkdir
	OpSyncDir
	OpOpen
	OpReadDir
	OpClose
)

var opNames = [...]string{"read", "write", "sync", "truncate", "punch", "create", "rename", "remove",
	"mkdir", "syncdir", "open", "readdir", "close"}

// String is the name of the call, as in errors.
func (op Op) String() string { return opNames[op] }

// Fault makes calls fail. A failed Sync leaves what it should have made stable in doubt for good,
// though readable (a later Sync succeeds and does not cover it); a failed write leaves a prefix of
// its sectors; any other call has no effect.
type Fault struct {
	Op    Op
	Path  string // a path.Match pattern against the path without its leading slash; "" is every path
	Skip  int    // matching calls that pass first
	Count int    // matching calls that then fail; 0 is all
	Err   error  // nil is EIO
	// CutAfter counts the mutating calls from the first that fails to that at which the power goes; 0 leaves it on.
	CutAfter int
}

// Inject arms a fault. Of several that match, each counts the call and the first due one answers.
func (f *FS) Inject(fault Fault) {
	if _, err := path.Match(fault.Path, ""); err != nil {
		panic("crashtest: " + err.Error() + ": " + fault.Path)
	}
	fault.Path = strings.TrimPrefix(fault.Path, "/")
	if fault.Err == nil {
		fault.Err = syscall.EIO
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.faults = append(f.faults, &fault)
}

// ClearFaults disarms all faults.
func (f *FS) ClearFaults() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.faults = nil
}

// SetCapacity sets Options.CapacityBytes anew.
func (f *FS) SetCapacity(bytes int64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.d != nil {
		f.d.capacity = bytes
	}
}

// faultLocked returns the error due to this call, if any.
func (f *FS) faultLocked(op Op, p string) error {
	if len(f.faults) == 0 {
		return nil
	}
	p = strings.Join(split(p), "/")
	var due error
	for _, fault := range f.faults {
		if fault.Op == op && fault.matches(p) && fault.fires() && due == nil {
			due = fault.Err
			if fault.CutAfter > 0 {
				f.cutAt, fault.CutAfter = f.calls+fault.CutAfter, 0
			}
		}
	}
	return due
}

func (f *Fault) matches(p string) bool {
	ok, _ := path.Match(f.Path, p) // the pattern was checked by Inject
	return ok || f.Path == ""
}

// fires counts one matching call and tells whether it fails.
func (f *Fault) fires() bool {
	switch {
	case f.Skip > 0:
		f.Skip--
		return false
	case f.Count == 0:
		return true
	case f.Count > 1:
		f.Count--
		return true
	case f.Count == 1:
		f.Count = -1 // spent
		return true
	}
	return false
}

// Corrupt flips the lowest bit of the byte at off of a file, at rest: in every version the sector has.
// It works on a FS without power as well, before Reboot.
func (f *FS) Corrupt(p string, off int64) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.d == nil {
		return pathError(OpWrite, p, f.dead)
	}
	ino, err := f.d.lookup(p)
	switch {
	case err != nil:
	case ino.isDir():
		err = syscall.EISDIR
	case off < 0 || off >= ino.size:
		err = syscall.EINVAL
	default:
		f.d.flip(ino, off)
	}
	return pathError(OpWrite, p, err)
}
