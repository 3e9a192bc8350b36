package pool

import (
	"context"
	"errors"
	"fmt"

	"graindisk/backend"
	"graindisk/block"
	"graindisk/grains/segment"
	"graindisk/vdisk"
)

// ReadCached implements vdisk.Extents.
func (p *Pool) ReadCached(id block.ExtentID, off int, dst []byte) bool {
	return p.cache.Read(id, off, len(dst)/block.Size, dst)
}

// Read implements vdisk.Extents. It waits for targets that do not answer, until ctx ends; only
// damage that no shard can mend is an error.
func (p *Pool) Read(ctx context.Context, id block.ExtentID, orig, off int, dst []byte) error {
	data, err := p.cache.Fetch(ctx, id, orig, func(ctx context.Context) ([]byte, error) {
		return p.fetchExtent(ctx, id, orig)
	})
	if err != nil {
		return err
	}
	copy(dst, data[off*block.Size:])
	return nil
}

func (p *Pool) fetchExtent(ctx context.Context, id block.ExtentID, orig int) ([]byte, error) {
	p.mu.Lock()
	info, ok := p.segments[id.Segment()]
	p.mu.Unlock()
	if !ok {
		return nil, fmt.Errorf("segment %d is not in the pool's table: %w", id.Segment(), vdisk.ErrDamaged)
	}
	for wait := backoff(0); ; wait = wait.next() {
		data, e, err := p.reader.Extent(ctx, info, id.Slot())
		switch {
		case err == nil && int(e.Blocks) != orig:
			return nil, fmt.Errorf("extent %s has %d blocks, the map says %d: %w", id, e.Blocks, orig, vdisk.ErrDamaged)
		case err == nil:
			return data, nil
		case errors.Is(err, segment.ErrDamaged), errors.Is(err, backend.ErrNotFound):
			p.o.Log.Error("extent cannot be read", "pool", p.o.Name, "extent", id, "err", err)
			return nil, fmt.Errorf("%w: %w", vdisk.ErrDamaged, err)
		}
		p.o.Log.Warn("targets do not answer, read waits", "pool", p.o.Name, "extent", id, "err", err)
		if err := wait.sleep(ctx); err != nil {
			return nil, err
		}
	}
}
