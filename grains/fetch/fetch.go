// Package fetch asks the targets for extents on behalf of all who miss them: one fetch per extent
// however the requests overlap, as few requests as the places allow, and readahead through the same door.
//
//	Get ─┬─ flight of the extent under way or landed? ── share it
//	     └─ queue of its segment ─► round: all that waits for the segment, one call of Source
//	Ahead ─► queue of its own ───► round of up to 2 MiB ─► landed: kept; what has been read to its end goes first
//	                                   │
//	                                   ├─► whoever waits, piece by piece as they arrive
//	                                   └─► the cache
//
// What comes while a segment has RoundsMax rounds under way, or while the budget of bytes is spent,
// waits together and goes out together: batches form by themselves when targets are slow.
//
// Invariants:
//   - an extent is in at most one round, unless that round was given up by all who waited for it;
//   - whoever misses the cache finds the extent's flight or, once that is over, the cache filled, if
//     there was room: the flight ends after the fill;
//   - memory: rounds hold at most BytesMax, each extent counted with GapMax for the bytes that merging
//     reads in vain, or one extent; readahead queued, under way and landed is at most AheadMax.
//
// Nothing is checked here: Source returns only what it has checked.
package fetch

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"

	"graindisk/block"
)

// ErrClosed means a Get from a Fetcher that has been closed.
var ErrClosed = errors.New("fetcher is closed")

// errUnanswered is a fault of Source: it came back without an outcome.
var errUnanswered = errors.New("fetch: extent was not answered")

// Want names an extent and its whole length.
type Want struct {
	Disk   block.DiskID // that reads it, for the cache
	ID     block.ExtentID
	Blocks int
}

// Result is the outcome of one Want. Data is the whole extent, shared: it must not be changed.
type Result struct {
	I    int // which of the wants
	Data []byte
	Err  error
}

// Source reads extents of one segment and calls got once for each, with its checked data or an error,
// by one goroutine at a time and as soon as it is there. It ends early when ctx does. It keeps
// trying while targets do not answer, if that is the policy; got's data is kept.
type Source func(ctx context.Context, seg block.SegmentID, wants []Want, got func(i int, data []byte, err error))

// Cache is where extents go and are looked for. Safe for concurrent use.
type Cache interface {
	Has(id block.ExtentID, blocks int) bool
	Read(id block.ExtentID, off, blocks int, p []byte) bool
	Fill(disk block.DiskID, id block.ExtentID, data []byte) // may forget it; data is not kept
}

// Options of a Fetcher; a zero field means its default.
type Options struct {
	Source    Source // required
	Cache     Cache  // required
	RoundsMax int    // rounds of one segment at a time; default 4
	BytesMax  int64  // of extents being fetched for somebody; default 64 MiB
	AheadMax  int64  // of readahead; default 32 MiB
}

// GapMax is what one more extent may cost in bytes read in vain.
const GapMax = 128 << 10

// Fetcher is safe for concurrent use.
type Fetcher struct {
	o      Options
	wg     sync.WaitGroup // rounds
	meter  meter
	landed atomic.Int64 // extents that can be read from flights: a hint for Landed

	mu      sync.Mutex
	closed  bool
	flights map[block.ExtentID]*flight
	queues  map[block.SegmentID]*queue
	waiting []*queue // those with something queued, the longest waiting first
	rounds  map[*round]*round
	used    int64 // of BytesMax
	ahead   aheadState
	stats   Stats
}

// Stats are counts since New.
type Stats struct {
	Fetched     uint64 // extents that Source was asked for, readahead included
	Rounds      uint64 // calls of Source
	Shared      uint64 // wants that found a flight under way or landed
	Ahead       uint64 // extents read ahead
	AheadUsed   uint64 // of them, wanted by somebody since
	Landed      uint64 // reads answered by what had arrived a moment ago, most of it read ahead
	AheadUnread uint64 // of them, given up before anybody wanted them
	AheadBytes  int64  // queued, under way and landed now
}

// flight is one extent on its way to all who want it. All fields are guarded by Fetcher.mu; data
// does not change once set.
type flight struct {
	Want
	subs    []sub
	round   *round // nil while it is queued
	ahead   bool   // counted in aheadState.used
	wanted  bool   // somebody asked for it, not readahead alone
	passed  bool   // it was read ahead and has been read to its end
	settled bool   // data and err are set
	data    []byte
	err     error
}

func (fl *flight) bytes() int64 { return int64(fl.Blocks) * block.Size }

// sub is one want that waits for a flight.
type sub struct {
	out chan Result // has room for all its wants
	i   int
}

// queue is what waits for one segment.
type queue struct {
	seg     block.SegmentID
	flights []*flight
	rounds  int // under way
}

// round is one call of Source.
type round struct {
	cancel context.CancelFunc
	live   int // flights that somebody waits for; at 0 the open ones are given up, unless read ahead
	open   int // flights not settled
	ahead  bool
	all    []*flight
}

// New returns a Fetcher. Close must be called.
func New(o Options) *Fetcher {
	if o.RoundsMax == 0 {
		o.RoundsMax = 4
	}
	if o.BytesMax == 0 {
		o.BytesMax = 64 << 20
	}
	if o.AheadMax == 0 {
		o.AheadMax = 32 << 20
	}
	return &Fetcher{
		o: o, flights: make(map[block.ExtentID]*flight), queues: make(map[block.SegmentID]*queue),
		rounds: make(map[*round]*round),
	}
}

// Get fetches the wants and calls ready in the caller's goroutine: first with nothing, once all have been
// asked for, then with the outcomes as they come, each call with all that came together, and every
// want told once. It returns early, with ctx's cause,
// when ctx ends: what was not told by then is not fetched on this caller's account any more.
func (f *Fetcher) Get(ctx context.Context, wants []Want, ready func([]Result)) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	out := make(chan Result, len(wants))
	f.mu.Lock()
	if f.closed {
		f.mu.Unlock()
		return ErrClosed
	}
	for i, w := range wants {
		f.joinLocked(w, sub{out, i})
	}
	f.pumpLocked()
	f.mu.Unlock()
	ready(nil)
	batch := make([]Result, 0, len(wants))
	for told := 0; told < len(wants); told += len(batch) {
		batch = batch[:0]
		select {
		case r := <-out:
			batch = append(batch, r)
		case <-ctx.Done():
			f.leave(wants, out)
			return context.Cause(ctx)
		}
		for more := true; more; {
			select {
			case r := <-out:
				batch = append(batch, r)
			default:
				more = false
			}
		}
		ready(batch)
	}
	return nil
}

// joinLocked makes s wait for w's flight, which it queues if there is none.
func (f *Fetcher) joinLocked(w Want, s sub) {
	fl := f.flights[w.ID]
	if fl == nil {
		fl = &flight{Want: w, wanted: true, subs: []sub{s}}
		f.flights[w.ID] = fl
		f.enqueueLocked(fl)
		return
	}
	f.stats.Shared++
	f.wantLocked(fl)
	switch {
	case fl.settled:
		s.out <- Result{s.i, fl.data, fl.err}
		return
	case fl.round == nil && fl.ahead:
		f.promoteLocked(fl)
	case fl.round != nil && len(fl.subs) == 0:
		fl.round.live++
	}
	fl.subs = append(fl.subs, s)
}

// wantLocked notes that somebody asks for a flight.
func (f *Fetcher) wantLocked(fl *flight) {
	if fl.ahead && !fl.wanted {
		f.stats.AheadUsed++
	}
	fl.wanted = true
}

func (f *Fetcher) enqueueLocked(fl *flight) {
	seg := fl.ID.Segment()
	q := f.queues[seg]
	if q == nil {
		q = &queue{seg: seg}
		f.queues[seg] = q
	}
	if len(q.flights) == 0 {
		f.waiting = append(f.waiting, q)
	}
	q.flights = append(q.flights, fl)
}

// leave takes the wants of a caller who gives up out of their flights. A flight that nobody waits for
// any more leaves the queue; a round without any is cancelled, and its flights can no longer be joined.
func (f *Fetcher) leave(wants []Want, out chan Result) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, w := range wants {
		fl := f.flights[w.ID]
		if fl == nil || len(fl.subs) == 0 {
			continue
		}
		kept := fl.subs[:0]
		for _, s := range fl.subs {
			if s.out != out {
				kept = append(kept, s)
			}
		}
		fl.subs = kept
		if len(kept) > 0 {
			continue
		}
		if fl.round == nil {
			f.unqueueLocked(fl)
			continue
		}
		fl.round.live--
		f.abandonLocked(fl.round)
	}
	f.pumpLocked()
}

// unqueueLocked forgets a flight that has not started.
func (f *Fetcher) unqueueLocked(fl *flight) {
	q := f.queues[fl.ID.Segment()]
	q.flights = remove(q.flights, fl)
	if len(q.flights) == 0 {
		f.waiting = remove(f.waiting, q)
		f.dropQueueLocked(q)
	}
	delete(f.flights, fl.ID)
}

func (f *Fetcher) dropQueueLocked(q *queue) {
	if len(q.flights) == 0 && q.rounds == 0 {
		delete(f.queues, q.seg)
	}
}

// abandonLocked cancels a round if nobody waits for what it has not got yet, and makes room for new
// flights of those extents.
func (f *Fetcher) abandonLocked(r *round) {
	if r.ahead || r.live > 0 || r.open == 0 {
		return
	}
	r.cancel()
	for _, fl := range r.all {
		if !fl.settled && f.flights[fl.ID] == fl {
			delete(f.flights, fl.ID)
		}
	}
}

func remove[T comparable](list []T, x T) []T {
	for i, y := range list {
		if y == x {
			return append(list[:i], list[i+1:]...)
		}
	}
	return list
}

// Landed fills dst, whole blocks from off on, from an extent that has arrived a moment ago, by itself or
// ahead, and reports whether there is one. It never waits for a target.
func (f *Fetcher) Landed(id block.ExtentID, off int, dst []byte) bool {
	if f.landed.Load() == 0 {
		return false
	}
	f.mu.Lock()
	fl := f.flights[id]
	if fl == nil || !fl.settled || fl.err != nil {
		f.mu.Unlock()
		return false
	}
	data := fl.data
	f.wantLocked(fl)
	f.stats.Landed++
	f.passLocked(fl, off+len(dst)/block.Size)
	f.mu.Unlock()
	copy(dst, data[off*block.Size:])
	return true
}

// Passed says that a caller of Get has read an extent up to its block end.
func (f *Fetcher) Passed(id block.ExtentID, end int) {
	if f.landed.Load() == 0 {
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if fl := f.flights[id]; fl != nil {
		f.passLocked(fl, end)
	}
}

// Stats counts.
func (f *Fetcher) Stats() Stats {
	f.mu.Lock()
	defer f.mu.Unlock()
	s := f.stats
	s.AheadBytes = f.ahead.used
	return s
}

// Close gives up what is under way and waits for it. Callers that wait are told ErrClosed.
func (f *Fetcher) Close() {
	f.mu.Lock()
	f.closed = true
	for r := range f.rounds {
		r.cancel()
	}
	for _, q := range f.waiting {
		for _, fl := range q.flights {
			f.settleLocked(fl, nil, ErrClosed)
		}
		q.flights = nil
	}
	f.waiting = nil
	f.ahead.queued = nil
	f.mu.Unlock()
	f.wg.Wait()
}
