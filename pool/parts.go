package pool

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
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

// How long one read of a copy may take: so long, and a second for so many bytes; and after how long without an answer
// the next copy is asked beside it. [tune]
const (
	partReadTimeout = 30 * time.Second
	partReadRate    = 128 << 10
	partReadHedge   = 500 * time.Millisecond
)

// partRead is one read of a part, from whichever copy is good.
type partRead struct {
	p       *Pool
	id      partID
	off     int64
	bytes   int
	left    []partCopy              // not asked yet
	asked   map[block.TargetID]bool // and not heard of
	answers chan partAnswer
	reading sync.WaitGroup
}

type partAnswer struct {
	copy partCopy
	b    []byte
	err  error
}

// next asks the next copy on a target that is not being asked; false if there is none.
func (r *partRead) next(ctx context.Context) bool {
	i := slices.IndexFunc(r.left, func(c partCopy) bool { return !r.asked[c.target] })
	if i < 0 {
		return false
	}
	c := r.left[i]
	r.left = slices.Delete(r.left, i, i+1)
	r.asked[c.target] = true
	r.reading.Go(func() {
		b := make([]byte, r.bytes)
		r.answers <- partAnswer{c, b, r.p.readCopy(ctx, r.id, c, r.off, b)}
	})
	return true
}

// wait is the next answer; late says that there was none for a while. Of what is ready at once the end comes first.
func (r *partRead) wait(ctx context.Context) (a partAnswer, late bool, err error) {
	if ctx.Err() != nil {
		return a, false, ctx.Err()
	}
	t := time.NewTimer(partReadHedge)
	defer t.Stop()
	select {
	case a = <-r.answers:
	case <-t.C:
		late = true
	case <-ctx.Done():
		err = ctx.Err()
	}
	return a, late, err
}

// readPart fills b from off of a part's body, from the first copy whose bytes check accepts; -partHeaderLen is where the
// part itself begins. The part's own checksum, over all of it, is not looked at. A copy that does not come for a
// while has the next one asked beside it. A copy that check does not accept is asked once more when all others were: it may
// have been hurt on its way. It fails with segment.ErrDamaged only if every target has answered; else asking again may help.
func (p *Pool) readPart(ctx context.Context, id partID, off int64, b []byte, check func() error) error {
	rctx, stop := context.WithCancel(ctx)
	r := &partRead{p: p, id: id, off: off, bytes: len(b), left: p.partCopies(id), asked: map[block.TargetID]bool{}}
	r.answers = make(chan partAnswer, len(r.left))
	defer r.reading.Wait()
	defer stop()
	bad := fmt.Errorf("on no target: %w", segment.ErrDamaged)
	var passing, newer error
	var hurt []partCopy
	for r.next(rctx); len(r.asked) > 0; {
		a, late, err := r.wait(ctx)
		if err != nil {
			return err
		}
		if late {
			r.next(rctx)
			continue
		}
		if err = a.err; err == nil {
			copy(b, a.b)
			if err = check(); err == nil {
				p.far.found(id, a.copy)
				return nil
			}
			if isNewer(err) && newer == nil { // or a flipped bit says so: then another copy does not
				newer = err
			}
			err = fmt.Errorf("%w: %w", segment.ErrDamaged, err)
		}
		if errors.Is(err, backend.ErrShort) {
			err = fmt.Errorf("%w: %w", segment.ErrDamaged, err)
		}
		named := fmt.Errorf("target %s: %w", p.targetName(a.copy.target), err)
		switch {
		case errors.Is(err, backend.ErrNotFound):
		case errors.Is(err, segment.ErrDamaged):
			bad = named
			if !slices.Contains(hurt, a.copy) {
				hurt, r.left = append(hurt, a.copy), append(r.left, a.copy)
			}
		default:
			passing = named
			r.left = slices.DeleteFunc(r.left, func(c partCopy) bool { return c.target == a.copy.target })
		}
		delete(r.asked, a.copy.target)
		r.next(rctx)
	}
	at := fmt.Sprintf("checkpoint %d/%d part %d, %d bytes at %d", id.epoch, id.n, id.part, len(b), off)
	if newer != nil { // no copy is good, and this one may be
		return fmt.Errorf("%s: %w", at, newer)
	}
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

// partCopies is where a part may be, the likeliest first: where it was before, then copy i on the i-th member that is no witness,
// parts taking turns among the copies, then wherever else targets that failed may have moved it. Targets that failed
// lately come last.
func (p *Pool) partCopies(id partID) []partCopy {
	v := p.value()
	ms := dataMembers(v.Cfg)
	copies := min(v.Stripe.Parity+1, len(ms))
	var list []partCopy
	if c, ok := p.far.place(id); ok {
		list = append(list, c)
	}
	for i := range copies {
		i = (i + id.part) % copies
		list = append(list, partCopy{ms[i], i})
	}
	for no := range ms {
		for i := range ms {
			list = append(list, partCopy{ms[(i+no)%len(ms)], no})
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

// tablesAtOnce is how many tables are fetched side by side; each takes some 16 MB meanwhile.
const tablesAtOnce = 4

// readWhole reads a part whose length and checksum are known, and returns its body.
func (p *Pool) readWhole(ctx context.Context, id partID, bytes int64, crc uint32) ([]byte, error) {
	if bytes < 0 || bytes > partBytesMax {
		return nil, fmt.Errorf("checkpoint %d/%d part %d of %d bytes: %w", id.epoch, id.n, id.part, bytes, segment.ErrDamaged)
	}
	var body []byte
	b := make([]byte, partHeaderLen+bytes)
	err := p.readPart(ctx, id, -partHeaderLen, b, func() (err error) {
		body, err = decodePart(b, id.epoch, uint32(id.n), id.part)
		if err == nil && block.CRC(body) != crc {
			err = fmt.Errorf("not the one that is named: %w", segment.ErrDamaged)
		}
		return err
	})
	return body, err
}

// readManifest reads a checkpoint's manifest with its tables.
func (p *Pool) readManifest(ctx context.Context, ref root.CheckpointRef) (*snapshot, error) {
	manifest, err := p.readWhole(ctx, partID{ref.Epoch, ref.N, 0}, ref.Bytes, ref.CRC)
	if err != nil {
		return nil, err
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
			bodies[i], err = p.readWhole(gctx, partID{ref.Epoch, ref.N, t.Part}, t.Bytes, t.CRC)
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
