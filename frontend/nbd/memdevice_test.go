package nbd

import (
	"bytes"
	"context"
	"sync"
	"sync/atomic"
)

// memDevice is a disk in memory that counts calls and can be told to miss, wait and fail.
type memDevice struct {
	readOnly bool
	fastZero bool
	mu       sync.RWMutex
	data     []byte
	// stable is what would survive a power cut; Flush and stable writes bring it up to date.
	stable []byte

	// Hooks, set before the server starts; nil does nothing.
	onTry   func(off int64, n int) bool // false: TryRead misses
	onRead  func(ctx context.Context, off int64, n int) error
	onWrite func(ctx context.Context, ops []WriteOp, stable bool) error
	onFlush func(ctx context.Context) error

	writes, ops, flushes, reads atomic.Int64
}

func newMemDevice(size int) *memDevice { return &memDevice{data: make([]byte, size)} }

func (d *memDevice) Size() int64         { return int64(len(d.data)) }
func (d *memDevice) ReadOnly() bool      { return d.readOnly }
func (d *memDevice) FastZero() bool      { return d.fastZero }
func (d *memDevice) Description() string { return "a disk in memory" }

func (d *memDevice) TryRead(p []byte, off int64) (bool, error) {
	if d.onTry != nil && !d.onTry(off, len(p)) {
		return false, nil
	}
	d.mu.RLock()
	defer d.mu.RUnlock()
	copy(p, d.data[off:])
	return true, nil
}

func (d *memDevice) Read(ctx context.Context, p []byte, off int64) error {
	d.reads.Add(1)
	if d.onRead != nil {
		if err := d.onRead(ctx, off, len(p)); err != nil {
			return err
		}
	}
	d.mu.RLock()
	defer d.mu.RUnlock()
	copy(p, d.data[off:])
	return nil
}

func (d *memDevice) Write(ctx context.Context, ops []WriteOp, stable bool) error {
	d.writes.Add(1)
	d.ops.Add(int64(len(ops)))
	if d.onWrite != nil {
		if err := d.onWrite(ctx, ops, stable); err != nil {
			return err
		}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, op := range ops {
		off, n := op.Off, op.Len
		switch op.Kind {
		case OpWrite:
			copy(d.data[off:off+n], op.Data)
		case OpTrim:
			from, to := (off+4095)&^4095, (off+n)&^4095
			if from < to {
				clear(d.data[from:to])
			}
		case OpZero:
			clear(d.data[off : off+n])
		}
		if stable && d.stable != nil {
			copy(d.stable[off:off+n], d.data[off:off+n])
		}
	}
	return nil
}

func (d *memDevice) Flush(ctx context.Context) error {
	d.flushes.Add(1)
	if d.onFlush != nil {
		if err := d.onFlush(ctx); err != nil {
			return err
		}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.stable != nil {
		copy(d.stable, d.data)
	}
	return nil
}

// contents returns a copy of what the disk holds.
func (d *memDevice) contents() []byte {
	d.mu.RLock()
	defer d.mu.RUnlock()
	return bytes.Clone(d.data)
}

// fullDevice is a memDevice that can do all that a device may. Every range of 4096 bytes that holds
// nothing but zeroes is a hole.
type fullDevice struct {
	*memDevice
	onStatus   func(ctx context.Context) error
	onPrefetch func(ctx context.Context, off, n int64) error
}

func newFullDevice(size int) *fullDevice {
	d := &fullDevice{memDevice: newMemDevice(size)}
	d.fastZero = true
	return d
}

func (d *fullDevice) Status(ctx context.Context, off, n int64, limit int) ([]Extent, error) {
	if d.onStatus != nil {
		if err := d.onStatus(ctx); err != nil {
			return nil, err
		}
	}
	d.mu.RLock()
	defer d.mu.RUnlock()
	var es []Extent
	for end := off + n; off < end; {
		to := min(end, (off+4096)&^4095)
		hole := len(bytes.Trim(d.data[off&^4095:min(int64(len(d.data)), off&^4095+4096)], "\x00")) == 0
		if k := len(es); k > 0 && es[k-1].Hole == hole {
			es[k-1].Len += to - off
		} else if k == limit {
			break
		} else {
			es = append(es, Extent{Len: to - off, Hole: hole})
		}
		off = to
	}
	return es, nil
}

func (d *fullDevice) Prefetch(ctx context.Context, off, n int64) error {
	if d.onPrefetch != nil {
		return d.onPrefetch(ctx, off, n)
	}
	return nil
}

// memExports are named devices; open counts how many are in use.
type memExports struct {
	names   []string
	devices map[string]Device
	openErr error
	open    atomic.Int64
}

func (e *memExports) List() []string { return e.names }

func (e *memExports) Open(_ context.Context, name string) (Device, func(), error) {
	if e.openErr != nil {
		return nil, nil, e.openErr
	}
	d, ok := e.devices[name]
	if !ok {
		return nil, nil, ErrNotFound
	}
	e.open.Add(1)
	return d, func() { e.open.Add(-1) }, nil
}

func oneExport(d Device) *memExports {
	return &memExports{names: []string{"disk"}, devices: map[string]Device{"disk": d}}
}
