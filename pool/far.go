package pool

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"graindisk/block"
	"graindisk/grains/segment"
	"graindisk/vdisk/densetree"
)

// A pool that opens on a fresh host fetches of its maps what it needs to serve, and the rest while it serves:
//
//	published checkpoint      fetched at once                      fetched later
//	---------------------------------------------------------------------------------------------
//	manifest, tables          all                                  —
//	usage table, levels 0     all                                  —
//	runs of lower levels      small ones, and the heads of others  pages: when a lookup asks, and one
//	                                                               run after the other in the background
//
// A run of which only the head is here is partial (densetree.Store.AddPartial): its file has pages or not, and
// each tells by its checksum. The local checkpoint says of such a run that it is partial and where the published
// checkpoint has it. What holds it together over crashes:
//
//   - A local checkpoint names the heads' files, which are stable before; so what was said of serving only maps
//     that a stable local checkpoint holds stays true: those need nothing of the targets to be opened.
//   - What a file lacks, or lost in a crash, is on the targets: a partial run is named by the newest published
//     checkpoint for as long as it is in a tree, since runs are immutable and later checkpoints name them where
//     they lie.
//   - A run is complete only after all of its pages were written, synced and read back, and only complete runs
//     are merged. So one that left its tree by a merge, and that the published checkpoint names no more, is
//     whole in its file, for as long as a local checkpoint names that.
//
// Whoever needs a page that is away waits for the targets, as for any block that is not cached; the log, the
// cuts and the local checkpoints do not. A merge that needs a partial run is put off; level 0 grows meanwhile.

// farMaps is what the pool knows of maps that are not all here. The zero value knows nothing.
type farMaps struct {
	mu      sync.Mutex
	refs    map[uint64]runRef // where the targets have the runs that are partial, or were when they were opened
	places  map[partID]partCopy
	flights map[farPage]chan struct{}

	hurry   atomic.Bool // a merge waits
	fetched atomic.Int64
}

// farPage is a page of a run that is on its way, with those that come with it.
type farPage struct {
	run uint64
	no  int
}

func (f *farMaps) clear() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.refs, f.places, f.flights = nil, nil, nil
}

func (f *farMaps) ref(run uint64) (runRef, bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	r, ok := f.refs[run]
	return r, ok
}

func (f *farMaps) setRef(r runRef) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.refs == nil {
		f.refs = map[uint64]runRef{}
	}
	f.refs[r.ID] = r
}

func (f *farMaps) place(id partID) (partCopy, bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	c, ok := f.places[id]
	return c, ok
}

func (f *farMaps) found(id partID, c partCopy) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.places == nil {
		f.places = map[partID]partCopy{}
	}
	f.places[id] = c
}

// begin makes the caller the one who fetches a page; else it returns what is closed when that is done.
func (f *farMaps) begin(p farPage) (wait <-chan struct{}, end func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if c, ok := f.flights[p]; ok {
		return c, nil
	}
	if f.flights == nil {
		f.flights = map[farPage]chan struct{}{}
	}
	c := make(chan struct{})
	f.flights[p] = c
	return nil, func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		delete(f.flights, p)
		close(c)
	}
}

// [tune]
const (
	farWhole   = 64 << 10        // bytes of a run that is fetched whole
	farGap     = 64 << 10        // between two ranges that are fetched as one
	farRange   = 1 << 20         // at most in one request, but for what is longer itself
	farAtOnce  = 32              // requests at an open
	farTries   = 4               // of each, before all begins anew
	farPages   = 16              // that a lookup brings
	farRate    = 128 << 20       // bytes per second in the background
	farRecount = 5 * time.Minute // that a recount waits
)

// farRead reads n pages of a partial run from page no on.
func (p *Pool) farRead(ctx context.Context, r *densetree.Run, no, n int) ([]byte, error) {
	ref, ok := p.far.ref(r.ID)
	if !ok {
		return nil, fmt.Errorf("run %d is on no target: %w", r.ID, segment.ErrDamaged)
	}
	off, length := r.PageRange(no, n)
	if off+length > ref.Len {
		return nil, fmt.Errorf("run %d ends before its page %d: %w", r.ID, no+n-1, segment.ErrDamaged)
	}
	b := make([]byte, length)
	err := p.readPart(ctx, ref.partID(), ref.Off+off, b, func() error { return r.CheckPages(no, b) })
	if err == nil {
		p.far.fetched.Add(length)
	}
	return b, err
}

// bringPage fetches the page that a lookup waits for, and its neighbours, however long the targets take. Only damage
// of all copies is an error, and the end of ctx. If somebody else has it fetched meanwhile, or failed to, it
// returns nil: the lookup tells.
func (p *Pool) bringPage(ctx context.Context, pe *densetree.PageError) error {
	defer p.foreground.enter()()
	r := pe.Partial()
	no := pe.Page / farPages * farPages
	for wait := backoff(0); r.Partial(); wait = wait.next() {
		busy, end := p.far.begin(farPage{r.ID, no})
		if end == nil {
			select {
			case <-busy:
				return nil
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		b, err := p.farRead(ctx, r, no, min(farPages, r.Pages()-no))
		if err == nil {
			err = r.Put(no, b)
		}
		end()
		switch {
		case err == nil:
			return nil
		case final(err):
			p.o.Log.Error("map cannot be read", "pool", p.o.Name, "err", err)
			return err
		case ctx.Err() == nil:
			p.o.Log.Warn("targets do not answer, read waits for the map", "pool", p.o.Name, "err", err)
		}
		if err := wait.sleep(ctx); err != nil {
			return err
		}
	}
	return nil
}

// bringRun makes a partial run complete, or fails as the targets or the tier do.
func (p *Pool) bringRun(ctx context.Context, r *densetree.Run) error {
	return r.Bring(func(no, n int) ([]byte, error) { return p.farRead(ctx, r, no, n) })
}

// lookup is Tree.Lookup that waits for pages which are not here, until ctx ends.
func (p *Pool) lookup(ctx context.Context, t *densetree.Tree, lba block.LBA, blocks uint64, fn func(densetree.Entry) bool) error {
	for end := lba + block.LBA(blocks); ; {
		err := t.Lookup(lba, uint64(end-lba), func(e densetree.Entry) bool {
			lba = e.End()
			return fn(e)
		})
		pe := new(densetree.PageError)
		if !errors.As(err, &pe) || pe.Partial() == nil {
			return err
		}
		if err := p.bringPage(ctx, pe); err != nil {
			return err
		}
	}
}

// needRuns returns once all of runs are complete. It waits for the targets, until ctx ends.
func (p *Pool) needRuns(ctx context.Context, runs []*densetree.Run) error {
	for _, r := range runs {
		if r.Partial() && !p.knowsStores() {
			return fmt.Errorf("run %d is on the targets: %w", r.ID, errRootNeeded)
		}
		for wait := backoff(0); r.Partial(); wait = wait.next() {
			err := p.bringRun(ctx, r)
			if err == nil {
				break
			}
			if final(err) {
				return err
			}
			if wait.sleep(ctx) != nil {
				return errors.Join(ctx.Err(), err)
			}
		}
	}
	return nil
}

// knowsStores tells whether it is known yet which target is which member: not while a tier is read without the root.
func (p *Pool) knowsStores() bool {
	p.storesMu.RLock()
	defer p.storesMu.RUnlock()
	return len(p.stores) > 0
}

// bringMaps makes all partial runs complete, one after the other, making way for guests, until ctx ends. Then
// nothing of the maps is needed of the targets any more, and a local checkpoint says so.
func (p *Pool) bringMaps(ctx context.Context) {
	runs := p.runs.Partial()
	if len(runs) == 0 || p.o.mapRate < 0 {
		return
	}
	start, failing := time.Now(), false
	for wait := backoff(0); len(runs) > 0; runs = p.runs.Partial() {
		var err error
		for _, r := range runs {
			if !p.far.hurry.Load() {
				p.foreground.yield(ctx, warmYield)
			}
			began := time.Now()
			one := p.bringRun(ctx, r)
			if ctx.Err() != nil {
				return
			}
			if one != nil {
				err = cmp.Or(err, one)
				continue
			}
			if !p.far.hurry.Load() && !pause(ctx, time.Duration(r.EncodedLen())*time.Second/time.Duration(p.o.mapRate)-time.Since(began)) {
				return
			}
		}
		if err == nil {
			continue
		}
		if !failing && final(err) {
			p.o.Log.Error("map cannot be read, in no copy", "pool", p.o.Name, "err", err)
		} else if !failing {
			p.o.Log.Warn("maps not fetched, trying again", "pool", p.o.Name, "err", err)
		}
		failing = true
		if wait = wait.next(); wait.sleep(ctx) != nil {
			return
		}
	}
	p.o.Log.Info("maps are here", "pool", p.o.Name, "bytes", p.far.fetched.Load(), "took", time.Since(start))
	p.retryMerges()
	if err := p.checkpointHere(ctx); err != nil && ctx.Err() == nil && p.log.Failed() == nil {
		p.o.Log.Warn("local checkpoint not written; the one before holds", "pool", p.o.Name, "err", err)
	}
}

// mapsAway is the bytes of the runs that are partial.
func (p *Pool) mapsAway() (n int64) {
	for _, r := range p.runs.Partial() {
		n += r.EncodedLen()
	}
	return n
}

// retryMerges has merges go on that waited for partial runs.
func (p *Pool) retryMerges() {
	p.mu.Lock()
	trees := maps.Clone(p.trees)
	p.mu.Unlock()
	for _, id := range slices.Sorted(maps.Keys(trees)) {
		trees[id].Retry()
	}
}
