// Package vfs is the one file interface that everything which writes to the local tier uses.
// The gateway runs on OS; internal/crashtest supplies a file system that loses power.
//
// The contract is that of a POSIX file system with a volatile cache: bytes written are visible to
// every reader at once, survive the death of the process, and survive a power cut only once Sync
// has returned nil after them. A new name survives a power cut only after SyncDir of its folder.
package vfs

import "io/fs"

// FS opens and names files. Paths are slash-separated. Safe for concurrent use.
type FS interface {
	// Open opens an existing file for reading and writing; fs.ErrNotExist if there is none.
	Open(path string) (File, error)
	// Create makes an empty file, or empties an existing one, for reading and writing.
	Create(path string) (File, error)
	// Remove deletes a file; fs.ErrNotExist if there is none.
	Remove(path string) error
	// Rename moves a file over whatever bears the new name.
	Rename(from, to string) error
	// MkdirAll makes a folder (mode 0700) and its parents.
	MkdirAll(path string) error
	// ReadDir lists the names in a folder, sorted; fs.ErrNotExist if there is none.
	ReadDir(path string) ([]fs.DirEntry, error)
	// SyncDir makes the names in a folder stable.
	SyncDir(path string) error
}

// File is one open file. All methods but Close may be called concurrently; overlapping concurrent
// writes have no defined winner.
type File interface {
	// ReadAt fills p or fails; io.EOF if the file ends first. It never returns short without an error.
	ReadAt(p []byte, off int64) (int, error)
	// WriteAt writes all of p at off, growing the file as needed.
	WriteAt(p []byte, off int64) (int, error)
	// WritevAt writes the buffers back to back at off. The slice of buffers may be modified.
	WritevAt(bufs [][]byte, off int64) error
	// Size is the file's length in bytes.
	Size() (int64, error)
	// Truncate sets the file's length.
	Truncate(size int64) error
	// Sync makes all writes that returned before it was called stable (fdatasync). After an
	// error the unsynced bytes must be taken for lost; it must not be tried again.
	Sync() error
	// Punch gives the space of [off, off+n) back to the file system; it reads as zeroes.
	Punch(off, n int64) error
	Close() error
}
