// Package vdisk is one virtual disk: reads, writes, unmaps and flushes of any byte range, on top of
// the log that holds what is not yet published, the dense tree that maps what is, and the extents
// that the tree names.
//
//	Write ──► writeback.Log ──(cut published)──► densetree.Tree ──► Extents: tier cache, segments
//	Read  ◄── 1. log index ◄───────────────────  2. tree      ◄───  3. tier, then target
//	  └─ sequential? ─► what comes next, in the background ──────────►  3.
//
// A reader asks the log index first and the tree second. A publisher changes the tree first and
// forgets the log's generation second, so a reader between the two finds every block in one or both.
//
// Invariants:
//   - a write smaller than a block is a read-modify-write of that block under the block's lock, which
//     every other write to the block takes too, so neighbouring sectors are never lost;
//   - no lock is held while a target is asked: what a partial write needs is fetched first, and the
//     block is resolved again under the lock; nor, but for those already past Admit, while the tier
//     is full.
package vdisk

import (
	"context"
	"fmt"
	"sync/atomic"

	"graindisk/block"
	"graindisk/internal/turn"
	"graindisk/vdisk/densetree"
	"graindisk/writeback"
)

// Extents reads stored extents by name: from the tier if they are there, else from their segment.
type Extents interface {
	// ReadCached fills p, whole blocks, from block off of the extent and reports true, or false
	// when the bytes are not all on the tier. It never asks a target.
	ReadCached(id block.ExtentID, off int, p []byte) bool
	// Read fills the pieces, asking targets, several at a time and neighbours together. All is done in
	// the caller's goroutine: ready, if not nil, is called first with nothing, once the targets have been
	// asked, and then with the outcomes that came together, each piece once; then Read fails only if ctx
	// ended before all were told. Without ready it fails with the first error of a piece.
	Read(ctx context.Context, ps []Piece, ready func([]Done)) error
	// Ahead has resolve name extents and fetches what of them is not on the tier, in the background, then
	// tells done how many that were. It reports false, having done nothing, if too much is going on.
	Ahead(resolve func() []Piece, done func(fetched int)) bool
	// AheadMax is how many bytes ahead of its reader one stream is worth going, for now.
	AheadMax() int64
}

// Piece is a part of one extent that a reader wants.
type Piece struct {
	Disk block.DiskID
	ID   block.ExtentID
	Orig int    // blocks of the whole extent
	Off  int    // first block wanted
	Dst  []byte // whole blocks
	at   int    // where Dst begins in what is read, in bytes
}

// Done is the outcome of one piece.
type Done struct {
	Piece int // which
	Err   error
}

// Options describe a disk to New.
type Options struct {
	ID      block.DiskID
	Name    string
	Size    int64 // bytes, a multiple of block.Size
	Log     *writeback.Log
	Tree    *densetree.Tree
	Extents Extents
	// MendMap is asked, if it is given, to make good a page of the map that cannot be read; nil means that
	// it has, and that a lookup may be tried again. It may wait for targets.
	MendMap func(ctx context.Context, pe *densetree.PageError) error
	// Reads is told of every read, if it is given; it must be quick.
	Reads func(off, n int64)
	// Gate is asked before every request; a non-nil error is returned to the client.
	Gate func() error
	// Hold is asked before a reply leaves, if it is given; see Disk.Hold.
	Hold func(ctx context.Context) error
}

// Disk is one open disk. All methods are safe for concurrent use.
type Disk struct {
	o     Options
	name  atomic.Pointer[string]
	size  atomic.Int64 // changes with all locks held
	gone  atomic.Pointer[error]
	users atomic.Int64
	ahead streams
	locks [lockStripes]turn.RWLock // see lockSet
}

// New returns the disk that o describes.
func New(o Options) *Disk {
	d := &Disk{o: o}
	d.name.Store(&o.Name)
	d.size.Store(o.Size)
	return d
}

// ID is the disk's number in its pool.
func (d *Disk) ID() block.DiskID { return d.o.ID }

// Name is the disk's name, unique in the gateway.
func (d *Disk) Name() string { return *d.name.Load() }

// Size is the disk's length in bytes.
func (d *Disk) Size() int64 { return d.size.Load() }

// ReadOnly tells whether writes are refused.
func (d *Disk) ReadOnly() bool { return false }

// Description is a line for clients that ask what an export is.
func (d *Disk) Description() string { return "disk " + d.Name() }

// Tree is the disk's map of published blocks.
func (d *Disk) Tree() *densetree.Tree { return d.o.Tree }

// Flush makes every write that returned before it was called, on any connection, stable on the
// local tier.
func (d *Disk) Flush(ctx context.Context) error {
	if err := d.open(); err != nil {
		return err
	}
	if err := d.o.Log.Sync(ctx); err != nil {
		return fmt.Errorf("flush disk %s: %w", d.Name(), err)
	}
	return nil
}

// Hold returns nil when what the disk has done may be answered now. It waits while replies are held back: this
// process may have lost the disk while it stood still, and finds out. On an error the reply must never
// leave. Whatever serves a disk to others asks it for every reply, right before that leaves; it costs next to nothing.
func (d *Disk) Hold(ctx context.Context) error {
	if d.o.Hold == nil {
		return nil
	}
	return d.o.Hold(ctx)
}

// BeginFlush has the SSD begin with what was written last, if a Flush is likely to come soon. It does not wait,
// and is a hint: for the moment after a client was told that its writes are done.
func (d *Disk) BeginFlush() { d.o.Log.BeginSync() }

// check refuses ranges that leave the disk.
func (d *Disk) check(off, length int64) error {
	if err := d.open(); err != nil {
		return err
	}
	return d.within(off, length)
}

// open fails if the disk takes no requests any more.
func (d *Disk) open() error {
	if err := d.gone.Load(); err != nil {
		return *err
	}
	return d.o.Gate()
}

// within refuses ranges that leave the disk as it is now.
func (d *Disk) within(off, length int64) error {
	if size := d.size.Load(); off < 0 || length < 0 || off > size || length > size-off {
		return fmt.Errorf("disk %s: %d bytes at %d of %d: %w", d.Name(), length, off, size, ErrRange)
	}
	return nil
}
