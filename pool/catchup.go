package pool

import (
	"context"
	"fmt"
	"sync"

	"golang.org/x/sync/errgroup"

	"graindisk/grains/segment"
	"graindisk/internal/planted"
	"graindisk/pool/root"
)

// Cuts are read from the targets some at a time, and applied one after the other. [tune]
const (
	cutsAtOnce    = 16
	indexesAtOnce = 4 // of each
)

// cutRead is a cut's record and the indexes of its segments, as they were read back.
type cutRead struct {
	rec *segment.CutRecord
	idx []*segment.Index
	err error
}

// catchUp applies the cuts that the root names and the maps do not have yet; with record, each is put on
// record on the tier first.
func (p *Pool) catchUp(ctx context.Context, v root.Value, record bool) error {
	refs, err := cutsAfter(v, p.pub.cut)
	if err != nil {
		return err
	}
	ctx, stop := context.WithCancel(ctx)
	var reading sync.WaitGroup
	defer reading.Wait()
	defer stop()
	reads := make([]chan cutRead, len(refs))
	next := 0
	for i, ref := range refs {
		for ; next < min(len(refs), i+cutsAtOnce); next++ {
			c, ref := make(chan cutRead, 1), refs[next]
			reads[next] = c
			reading.Go(func() { c <- p.readCut(ctx, ref) })
		}
		if err := p.takeCut(<-reads[i], ref, record); err != nil {
			return fmt.Errorf("cut %d: %w", ref.Cut, err)
		}
		reads[i] = nil
	}
	return nil
}

// cutsAfter are those that the root names, from the one after cut on.
func cutsAfter(v root.Value, cut uint64) ([]root.CutRef, error) {
	if v.Cut == cut {
		return nil, nil
	}
	if n := len(v.Cuts); n == 0 || v.Cuts[n-1].Cut != v.Cut || v.Cuts[0].Cut > cut+1 {
		// A log that knows the root's epoch is at most the one cut behind that it was publishing.
		return nil, fmt.Errorf("the root is at cut %d and does not name the cuts from %d on: %w", v.Cut, cut+1, segment.ErrDamaged)
	}
	var refs []root.CutRef
	for _, ref := range v.Cuts {
		if ref.Cut <= cut {
			continue
		}
		if prev := cut + uint64(len(refs)); ref.Cut != prev+1 {
			return nil, fmt.Errorf("root names cut %d after cut %d: %w", ref.Cut, prev, segment.ErrDamaged)
		}
		refs = append(refs, ref)
	}
	return refs, nil
}

// fitsRoot checks that rec is the record that the root names, and follows the cut before.
func fitsRoot(rec *segment.CutRecord, ref root.CutRef, cut uint64, crc uint32) error {
	if rec.Cut != ref.Cut || rec.PrevCut != cut || rec.PrevCRC != crc || rec.CRC() != ref.Segment.CRC {
		return fmt.Errorf("record of cut %d after cut %d does not fit the root: %w", rec.Cut, rec.PrevCut, segment.ErrDamaged)
	}
	return nil
}

// readCut reads one cut's record and the indexes of its segments.
func (p *Pool) readCut(ctx context.Context, ref root.CutRef) cutRead {
	rec, x, err := segment.ReadCut(ctx, p.segmentStore, refInfo(ref))
	if err != nil {
		return cutRead{err: err}
	}
	idx := make([]*segment.Index, len(rec.Segments)+1)
	idx[len(rec.Segments)] = x
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(indexesAtOnce)
	for i, info := range rec.Segments {
		g.Go(func() (err error) {
			idx[i], err = p.reader.Index(ctx, info)
			return err
		})
	}
	return cutRead{rec, idx, g.Wait()}
}

// takeCut applies a cut that was read back.
func (p *Pool) takeCut(c cutRead, ref root.CutRef, record bool) error {
	if c.err != nil {
		return c.err
	}
	rec, last := c.rec, refInfo(ref)
	if err := fitsRoot(rec, ref, p.pub.cut, p.pub.cutCRC); err != nil {
		return err
	}
	// The maps on the tier must not miss a cut that later ones build on.
	p.mapsMu.Lock()
	defer p.mapsMu.Unlock()
	if record && !planted.Bug("recovery: caught-up cut not on record") {
		if err := p.recordPublication(rec, rec.AllSegments(last), c.idx); err != nil {
			return err
		}
	}
	p.applyCut(rec, rec.AllSegments(last), c.idx)
	return nil
}
