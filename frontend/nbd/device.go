package nbd

import (
	"context"
	"errors"

	"graindisk/frontend/nbd/proto"
	"graindisk/vdisk"
)

// ErrNotFound is what Exports.Open returns for a name it does not have.
var ErrNotFound = errors.New("no such export")

// WriteOp is one change of a device. Off and Len lie within the device; Len is not zero.
type WriteOp = vdisk.Op

// The kinds of WriteOp.
const (
	OpWrite = vdisk.OpWrite // stores Data at Off
	OpTrim  = vdisk.OpTrim  // forgets the whole blocks within the range
	OpZero  = vdisk.OpZero  // makes the range read as zeroes, exactly
)

// Device is one disk as this frontend needs it. All methods are called concurrently, from any
// number of connections.
type Device interface {
	Size() int64 // bytes
	ReadOnly() bool
	Description() string // for people; at most 4096 bytes
	// TryRead fills p from memory or the local tier and reports true, or reports false at
	// once when the store must be asked. It may leave p half filled when it reports false.
	TryRead(p []byte, off int64) (bool, error)
	// Read fills p or fails, waiting for the store if it must.
	Read(ctx context.Context, p []byte, off int64) error
	// Write applies ops in order as one batch. When it returns nil all of them are visible
	// and acknowledged-safe, and with stable also on stable storage. On an error any of them
	// may have been applied. It keeps no reference to ops or their Data.
	Write(ctx context.Context, ops []WriteOp, stable bool) error
	// Flush returns when every write completed before the call, by whichever connection, is
	// on stable storage. It does not wait for writes that wait for room.
	Flush(ctx context.Context) error
}

// FastZeroer is a Device that knows whether OpZero of whole blocks is always faster than to write the zeroes;
// only then is FAST_ZERO offered. Any other range is refused with ENOTSUP.
type FastZeroer interface{ FastZero() bool }

// Extent is a range of a device of which the same is known.
type Extent = vdisk.Extent

// Statuser is a Device that knows what is stored; only then are there base:allocation and BLOCK_STATUS.
type Statuser interface {
	// Status tells what [off, off+n) is made of, in order from off on: at least one extent, at most limit,
	// none beyond off+n. It may tell of less, and may wait for the store.
	Status(ctx context.Context, off, n int64, limit int) ([]Extent, error)
}

// Prefetcher is a Device that can bring a range nearer, so that TryRead finds it; only then is CACHE
// offered. Prefetch returns when it has, or has done as much as is good.
type Prefetcher interface {
	Prefetch(ctx context.Context, off, n int64) error
}

// Prompter is a Device that can tell beforehand whether Write would have to wait for room or for a
// store. What need not wait is applied by the reader itself, which saves a hand-over.
type Prompter interface{ Prompt(ops []WriteOp) bool }

// Beginner is a Device that can begin with a Flush that is not asked for yet. BeginFlush is called when the
// client has been told that writes are done; it must not wait.
type Beginner interface{ BeginFlush() }

// Holder is a Device whose replies may have to be held back, or dropped, though what they tell was done: it may have
// been lost to another server meanwhile. Hold is called right before replies leave, by whoever sends them. It
// returns nil when they may, and an error when they never may: then the connection ends. What a client
// that connects after that is told are errors only, for which Hold is not asked.
type Holder interface {
	Hold(ctx context.Context) error
}

// Part is a range of a READ whose outcome is known.
type Part = vdisk.Part

// Piecer is a Device that hands over the parts of a READ as they come, in the caller's goroutine:
// each call of ready has, in order of place, what came together, and all calls cover p exactly. On an
// error ready was not called.
type Piecer interface {
	ReadPieces(ctx context.Context, p []byte, off int64, ready func([]Part)) error
}

// Exports is where the server finds its devices.
type Exports interface {
	// List returns the names of all exports. If there is exactly one, it is also the default
	// export, which clients ask for by the empty name.
	List() []string
	// Open returns the device of that name, or an error that is ErrNotFound. The device is
	// used until release, which is called once.
	Open(ctx context.Context, name string) (d Device, release func(), err error)
}

// errnoOf is the wire code of a device's error; ok is false for an error that must not be
// answered at all because the client should reconnect and ask again.
func errnoOf(cmd proto.Cmd, err error) (code proto.Errno, ok bool) {
	switch {
	case err == nil:
		return proto.OK, true
	case errors.Is(err, vdisk.ErrClosed):
		return 0, false
	case errors.Is(err, vdisk.ErrFenced), errors.Is(err, vdisk.ErrDeleted):
		return proto.ESHUTDOWN, true
	case errors.Is(err, vdisk.ErrRange):
		return rangeErrno(cmd), true
	case errors.Is(err, vdisk.ErrReadOnly):
		return proto.EPERM, true
	case errors.Is(err, vdisk.ErrFull):
		return proto.ENOSPC, true
	}
	return proto.EIO, true
}

// rangeErrno is the code for a request that leaves the device: for requests that store data the
// protocol asks for ENOSPC.
func rangeErrno(cmd proto.Cmd) proto.Errno {
	if cmd == proto.CmdWrite || cmd == proto.CmdWriteZeroes {
		return proto.ENOSPC
	}
	return proto.EINVAL
}
