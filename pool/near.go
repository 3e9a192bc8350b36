package pool

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"

	"golang.org/x/sync/errgroup"

	"graindisk/grains/extent"
	"graindisk/grains/segment"
	"graindisk/vdisk/densetree"
)

// farWant is a range of a part that an open needs: a whole run or blob, or the head of a run.
type farWant struct {
	ref  runRef
	len  int64
	kind farKind
}

type farKind uint8

const (
	farRun farKind = iota
	farHead
	farBlob
)

// nearMaps is what was fetched of a checkpoint.
type nearMaps struct {
	mu    sync.Mutex
	runs  map[uint64]*densetree.Run // those of lower levels in files
	blobs map[runRef][]byte
	again []farWant // runs whose heads say that all of them is needed
}

// fetchMaps reads of the runs and blobs that a snapshot names what is needed to serve.
func (p *Pool) fetchMaps(ctx context.Context, s *snapshot) (*nearMaps, error) {
	var wants []farWant
	for _, d := range s.Disks {
		for _, r := range d.Runs {
			w := farWant{r, r.Len, farRun}
			if n := densetree.HeadLen(r.Len); n > 0 && r.Len > p.o.mapWhole {
				w.kind, w.len = farHead, int64(n)
			}
			wants = append(wants, w)
		}
	}
	for _, r := range s.Usage {
		wants = append(wants, farWant{r, r.Len, farBlob})
	}
	near := &nearMaps{runs: map[uint64]*densetree.Run{}, blobs: map[runRef][]byte{}}
	err := p.fetchWants(ctx, wants, near)
	if err == nil {
		err = p.fetchWants(ctx, near.again, near)
	}
	if err == nil {
		err = p.runs.Sync()
	}
	if err != nil {
		p.runs.Discard(slices.Collect(maps.Values(near.runs)))
		return nil, err
	}
	return near, nil
}

// fetchWants fetches ranges, neighbours together.
func (p *Pool) fetchWants(ctx context.Context, wants []farWant, near *nearMaps) error {
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(farAtOnce)
	for _, group := range groupWants(wants) {
		g.Go(func() error { return p.fetchGroup(ctx, group, near) })
	}
	return g.Wait()
}

func (r runRef) partID() partID { return partID{r.Epoch, r.N, r.Part} }

// groupWants puts together what is fetched with one request each.
func groupWants(wants []farWant) (groups [][]farWant) {
	wants = slices.Clone(wants)
	slices.SortStableFunc(wants, func(a, b farWant) int {
		x, y := a.ref, b.ref
		return cmp.Or(cmp.Compare(x.Epoch, y.Epoch), cmp.Compare(x.N, y.N), cmp.Compare(x.Part, y.Part), cmp.Compare(x.Off, y.Off))
	})
	for _, w := range wants {
		if n := len(groups); n > 0 {
			g := groups[n-1]
			first, last := g[0], g[len(g)-1]
			end := w.ref.Off + w.len
			if w.ref.partID() == first.ref.partID() && w.ref.Off >= last.ref.Off+last.len && w.ref.Off-last.ref.Off-last.len <= farGap && end-first.ref.Off <= farRange {
				groups[n-1] = append(g, w)
				continue
			}
		}
		groups = append(groups, []farWant{w})
	}
	return groups
}

// fetchGroup fetches what lies close together in one part.
func (p *Pool) fetchGroup(ctx context.Context, group []farWant, near *nearMaps) (err error) {
	first, last := group[0], group[len(group)-1]
	from, to := first.ref.Off, last.ref.Off+last.len
	if from < 0 || first.len < 0 || last.len < 0 || to < from || to > partBytesMax {
		return fmt.Errorf("run %d outside its part: %w", first.ref.ID, segment.ErrDamaged)
	}
	b := make([]byte, to-from)
	var got []farGot
	check := func() error {
		got = got[:0]
		for _, w := range group {
			x, err := w.decode(b[w.ref.Off-from:][:w.len])
			if err != nil {
				return err
			}
			got = append(got, x)
		}
		return nil
	}
	for i, wait := 0, backoff(0); ; i, wait = i+1, wait.next() {
		err = p.readPart(ctx, first.ref.partID(), from, b, check)
		if err == nil {
			break
		}
		if final(err) || i == farTries-1 || wait.sleep(ctx) != nil {
			return err
		}
	}
	for _, x := range got {
		if err := p.keepNear(x, near); err != nil {
			return err
		}
	}
	return nil
}

// farGot is what came of a want.
type farGot struct {
	farWant
	run  *densetree.Run // of a head: good for AddPartial only
	blob []byte
}

func (w farWant) decode(b []byte) (farGot, error) {
	x := farGot{farWant: w}
	var err error
	switch w.kind {
	case farRun:
		x.run, err = densetree.DecodeRun(b)
	case farHead:
		if x.run, err = densetree.DecodeHead(b); err == nil && x.run.EncodedLen() != w.ref.Len {
			err = fmt.Errorf("run of %d bytes where %d should be: %w", x.run.EncodedLen(), w.ref.Len, segment.ErrDamaged)
		}
	case farBlob:
		x.blob = b
		if err := extent.NewUsage().Load(b); err != nil && !errors.Is(err, extent.ErrNewer) { // of which decodeUsage tells
			return x, err
		}
	}
	if err == nil && x.run != nil && x.run.ID != w.ref.ID {
		err = fmt.Errorf("run %d where %d should be: %w", x.run.ID, w.ref.ID, segment.ErrDamaged)
	}
	return x, err
}

// keepNear puts what came where it belongs: runs of lower levels into files.
func (p *Pool) keepNear(x farGot, near *nearMaps) (err error) {
	r := x.run
	switch {
	case x.kind == farBlob:
		near.mu.Lock()
		defer near.mu.Unlock()
		near.blobs[x.ref] = x.blob
		return nil
	case x.kind == farHead && r.Level == 0:
		near.mu.Lock()
		defer near.mu.Unlock()
		near.again = append(near.again, farWant{x.ref, x.ref.Len, farRun})
		return nil
	case x.kind == farHead:
		p.far.setRef(x.ref)
		r, err = p.runs.AddPartial(r)
	default:
		r, err = p.runs.Adopt(r)
	}
	if err != nil {
		return err
	}
	near.mu.Lock()
	defer near.mu.Unlock()
	near.runs[x.ref.ID] = r
	return nil
}
