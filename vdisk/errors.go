package vdisk

import "errors"

// What callers of a Disk branch on; frontends alone turn them into wire codes.
var (
	// ErrFenced means a newer epoch owns the pool; this gateway must stop serving (ESHUTDOWN).
	ErrFenced = errors.New("fenced by a newer owner of the pool")
	// ErrClosed means the disk is being closed; the client should reconnect.
	ErrClosed = errors.New("disk is closed")
	// ErrRange means the request leaves the disk (EINVAL; ENOSPC for writes over NBD).
	ErrRange = errors.New("request beyond the end of the disk")
	// ErrReadOnly means a write to a read-only disk (EPERM).
	ErrReadOnly = errors.New("disk is read-only")
	// ErrFull means a quota is exhausted (ENOSPC).
	ErrFull = errors.New("quota exhausted")
	// ErrDeleted means that the disk was deleted while it was in use (ESHUTDOWN).
	ErrDeleted = errors.New("disk is deleted")
	// ErrMoved means that what the map named is not stored any more: nothing maps it now, unless it is damage.
	ErrMoved = errors.New("extent is no longer stored")
	// ErrDamaged means stored bytes failed their checksum and cannot be rebuilt (EIO).
	ErrDamaged = errors.New("stored data is damaged")
)
