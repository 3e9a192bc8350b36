package pool

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"

	"golang.org/x/sync/errgroup"

	"graindisk/backend"
	"graindisk/block"
	"graindisk/grains/segment"
	"graindisk/vdisk"
)

// fetchesMax bounds how many segments one read asks at the same time.
const fetchesMax = 8

// ReadCached implements vdisk.Extents.
func (p *Pool) ReadCached(id block.ExtentID, off int, dst []byte) bool {
	return p.cache.Read(id, off, len(dst)/block.Size, dst)
}

// Read implements vdisk.Extents. It waits for targets that do not answer, until ctx ends; only
// damage that no shard can mend is an error.
func (p *Pool) Read(ctx context.Context, ps []vdisk.Piece) error {
	if len(ps) == 1 {
		return p.readPieces(ctx, ps)
	}
	bySegment := map[block.SegmentID][]vdisk.Piece{}
	for _, x := range ps {
		bySegment[x.ID.Segment()] = append(bySegment[x.ID.Segment()], x)
	}
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(fetchesMax)
	for _, seg := range slices.Sorted(maps.Keys(bySegment)) {
		g.Go(func() error { return p.readPieces(ctx, bySegment[seg]) })
	}
	return g.Wait()
}

// readPieces fills pieces of one segment. Whoever comes first for the first extent fetches all of
// them, in as few requests as their places allow; the others take what that left on the tier.
func (p *Pool) readPieces(ctx context.Context, ps []vdisk.Piece) error {
	first := ps[0]
	var got map[block.ExtentID][]byte // if it was us
	data, err := p.cache.Fetch(ctx, first.ID, first.Orig, func(ctx context.Context) (_ []byte, err error) {
		if got, err = p.fetchExtents(ctx, ps); err != nil {
			return nil, err
		}
		for _, x := range ps[1:] { // in one order, whatever order the map has
			if b := got[x.ID]; b != nil && x.ID != first.ID {
				p.cache.Fill(x.ID, b)
			}
		}
		return got[first.ID], nil
	})
	if err != nil {
		return fmt.Errorf("extent %s: %w", first.ID, err)
	}
	copy(first.Dst, data[first.Off*block.Size:])
	for i, x := range ps[1:] {
		switch b := got[x.ID]; {
		case b != nil:
			copy(x.Dst, b[x.Off*block.Size:])
		case x.ID == first.ID:
			copy(x.Dst, data[x.Off*block.Size:])
		case p.ReadCached(x.ID, x.Off, x.Dst):
		default:
			return p.readPieces(ctx, ps[i+1:])
		}
	}
	return nil
}

// fetchExtents gets the pieces' whole extents from their segment.
func (p *Pool) fetchExtents(ctx context.Context, ps []vdisk.Piece) (map[block.ExtentID][]byte, error) {
	seg := ps[0].ID.Segment()
	p.mu.Lock()
	info, ok := p.segments[seg]
	p.mu.Unlock()
	if !ok {
		return nil, fmt.Errorf("segment %d is not in the pool's table: %w", seg, vdisk.ErrDamaged)
	}
	orig := map[int]int{}
	for _, x := range ps {
		orig[x.ID.Slot()] = x.Orig
	}
	got := make(map[block.ExtentID][]byte, len(orig))
	for wait := backoff(0); ; wait = wait.next() {
		var slots []int
		for s := range orig {
			if got[block.NewExtentID(seg, s)] == nil {
				slots = append(slots, s)
			}
		}
		slices.Sort(slots)
		err := p.reader.Extents(ctx, info, slots, func(slot int, data []byte, e segment.Entry) error {
			if int(e.Blocks) != orig[slot] {
				return fmt.Errorf("it has %d blocks, the map says %d: %w", e.Blocks, orig[slot], vdisk.ErrDamaged)
			}
			got[block.NewExtentID(seg, slot)] = data
			return nil
		})
		switch {
		case err == nil:
			return got, nil
		case errors.Is(err, vdisk.ErrDamaged):
			return nil, err
		case errors.Is(err, segment.ErrDamaged), errors.Is(err, backend.ErrNotFound):
			p.o.Log.Error("extents cannot be read", "pool", p.o.Name, "segment", seg, "err", err)
			return nil, fmt.Errorf("%w: %w", vdisk.ErrDamaged, err)
		}
		p.o.Log.Warn("targets do not answer, read waits", "pool", p.o.Name, "segment", seg, "err", err)
		if err := wait.sleep(ctx); err != nil {
			return nil, err
		}
	}
}
