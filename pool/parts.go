package pool

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"

	"graindisk/backend"
	"graindisk/block"
	"graindisk/grains/segment"
	"graindisk/pool/root"
)

// partID names a part of a published checkpoint.
type partID struct {
	epoch, n uint64
	part     int
}

// partCopy is one of the objects that a part is stored as.
type partCopy struct {
	target block.TargetID
	no     int
}

// How long one read of a copy may take before the next copy is asked: so long, and a second for so many bytes. [tune]
const (
	partReadTimeout = 5 * time.Second
	partReadRate    = 128 << 10
)

// readPart fills b from off of a part's body, from the first copy whose bytes check accepts. The part's own
// checksum, over all of it, is not looked at. It fails with segment.ErrDamaged only if every target has
// answered; else asking again may help.
func (p *Pool) readPart(ctx context.Context, id partID, off int64, b []byte, check func() error) error {
	bad := fmt.Errorf("on no target: %w", segment.ErrDamaged)
	var passing error
	down := map[block.TargetID]bool{}
	for _, c := range p.partCopies(id) {
		if down[c.target] {
			continue
		}
		err := p.readCopy(ctx, id, c, off, b)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err == nil {
			if err = check(); err == nil {
				p.far.found(id, c)
				return nil
			}
			err = fmt.Errorf("%w: %w", segment.ErrDamaged, err)
		}
		if errors.Is(err, backend.ErrNotFound) {
			continue
		}
		err = fmt.Errorf("target %s: %w", p.targetName(c.target), err)
		if errors.Is(err, segment.ErrDamaged) || errors.Is(err, backend.ErrShort) {
			bad = fmt.Errorf("%w: %w", segment.ErrDamaged, err)
			continue
		}
		passing, down[c.target] = err, true
	}
	at := fmt.Sprintf("checkpoint %d/%d part %d, %d bytes at %d", id.epoch, id.n, id.part, len(b), off)
	if passing != nil { // and no word of damage, which is final: what is away may be good
		return fmt.Errorf("%s: %w", at, passing)
	}
	return fmt.Errorf("%s: %w", at, bad)
}

func (p *Pool) readCopy(ctx context.Context, id partID, c partCopy, off int64, b []byte) error {
	store, ok := p.store(c.target)
	if !ok {
		return errors.New("not among the configured targets")
	}
	ctx, cancel := context.WithTimeout(ctx, partReadTimeout+time.Duration(len(b))*time.Second/partReadRate)
	defer cancel()
	return store.ReadAt(ctx, partKey(id.epoch, id.n, id.part, c.no), b, partHeaderLen+off)
}

// partCopies is where a part may be, the likeliest first: where it was before, then copy i on the i-th member,
// parts taking turns among the copies, then wherever else targets that failed may have moved it. Targets that failed
// lately come last.
func (p *Pool) partCopies(id partID) []partCopy {
	v := p.value()
	ms := v.Cfg.Members
	copies := min(v.Stripe.Parity+1, len(ms))
	var list []partCopy
	if c, ok := p.far.place(id); ok {
		list = append(list, c)
	}
	for i := range copies {
		i = (i + id.part) % copies
		list = append(list, partCopy{ms[i].ID, i})
	}
	for no := range ms {
		for i := range ms {
			list = append(list, partCopy{ms[(i+no)%len(ms)].ID, no})
		}
	}
	var first, last []partCopy
	for i, c := range list {
		switch {
		case slices.Contains(list[:i], c):
		case p.avoided(c.target):
			last = append(last, c)
		default:
			first = append(first, c)
		}
	}
	return append(first, last...)
}

// tablesAtOnce is how many parts are fetched side by side; each takes some 16 MB meanwhile.
const tablesAtOnce = 4

// readManifest reads a checkpoint's manifest with its tables.
func (p *Pool) readManifest(ctx context.Context, ref root.CheckpointRef) (*snapshot, error) {
	manifest, err := p.getPart(ctx, ref.Epoch, ref.N, 0)
	if err != nil {
		return nil, err
	}
	if block.CRC(manifest) != ref.CRC {
		return nil, fmt.Errorf("checkpoint %d/%d is not the one the root names: %w", ref.Epoch, ref.N, segment.ErrDamaged)
	}
	s, err := decodeSnapshot(manifest)
	if err != nil {
		return nil, err
	}
	bodies := make([][]byte, len(s.Tables))
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(tablesAtOnce)
	for i, t := range s.Tables {
		g.Go(func() (err error) {
			bodies[i], err = p.getPart(gctx, ref.Epoch, ref.N, t.Part)
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	for i, t := range s.Tables {
		if err := s.join(t, bodies[i]); err != nil {
			return nil, fmt.Errorf("checkpoint %d/%d: table in part %d: %w", ref.Epoch, ref.N, t.Part, err)
		}
	}
	return s, nil
}
