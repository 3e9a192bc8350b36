package segment

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"slices"
	"sync"

	"github.com/hashicorp/golang-lru/v2/simplelru"
	"golang.org/x/sync/errgroup"

	"graindisk/backend"
	"graindisk/block"
)

// How Extents turns slots into requests. [tune]
const (
	mergeGapMax   = 128 << 10 // bytes read in vain rather than asked for separately
	mergeBytesMax = 4 << 20   // of one ranged read, unless a single extent is larger
	getsMax       = 4         // ranged reads of one call at a time
)

// Getter finds the store of a target; false means the target is not configured here.
type Getter func(block.TargetID) (Store, bool)

// ReaderOptions configure a Reader.
type ReaderOptions struct {
	Targets Getter
	Pool    [16]byte // segments of another pool are refused; all zero = any
	// IndexCacheBytes is the memory for decoded indexes: 48 bytes per extent; default 64 MiB. The
	// index used last is always kept.
	IndexCacheBytes int64
	Log             *slog.Logger // default: discards
	// Indexes keeps encoded indexes where a restart finds them; nil = nowhere.
	Indexes IndexStore
	// Avoid tells of a target that failed others lately: it is not waited for until a read of it
	// succeeds. It must not block. Default: none.
	Avoid func(block.TargetID) bool
	// OnDegraded is told of every shard that could not be read, or whose bytes failed their checksum.
	// It is called from the reading goroutine and must not block.
	OnDegraded func(seg block.SegmentID, shard int, err error)
}

// IndexStore keeps encoded indexes nearer than the targets. What it returns is checked. Safe for
// concurrent use.
type IndexStore interface {
	LoadIndex(id block.SegmentID, bytes int) []byte // nil if it has none
	SaveIndex(id block.SegmentID, b []byte)         // may forget it; b is not kept
}

// Reader reads extents. It is safe for concurrent use. Requests that lost a race go on for a moment
// after the call that made them; Close waits for them.
type Reader struct {
	o       ReaderOptions
	targets targetTable
	hedges  hedgeBudget
	wg      sync.WaitGroup // requests under way
	counts  readCounts

	mu         sync.Mutex
	indexes    *simplelru.LRU[block.SegmentID, *heldIndex]
	indexBytes int64
	loading    map[block.SegmentID]*indexLoad
}

// heldIndex is an index in memory.
type heldIndex struct {
	*Index
	saved bool // handed to the IndexStore
}

// indexLoad is one fetch of an index that others wait for.
type indexLoad struct {
	done   chan struct{} // closed when the rest is set
	x      *Index
	err    error
	gaveUp bool // err is only that the context of the one that fetched ended
}

// NewReader returns a Reader over the given targets.
func NewReader(o ReaderOptions) *Reader {
	if o.IndexCacheBytes == 0 {
		o.IndexCacheBytes = 64 << 20
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.OnDegraded == nil {
		o.OnDegraded = func(block.SegmentID, int, error) {}
	}
	if o.Avoid == nil {
		o.Avoid = func(block.TargetID) bool { return false }
	}
	r := &Reader{o: o, loading: make(map[block.SegmentID]*indexLoad)}
	// The error is for sizes below 1; bytes are counted here.
	r.indexes, _ = simplelru.NewLRU(math.MaxInt, func(_ block.SegmentID, x *heldIndex) { r.indexBytes -= x.memBytes() })
	return r
}

// Close waits for requests that nobody waits for any more. No read may be under way or follow.
func (r *Reader) Close() { r.wg.Wait() }

// Remember puts the index of a segment just written into the cache. x is read-only from now on.
func (r *Reader) Remember(info Info, x *Index) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.rememberLocked(info.ID, x, r.o.Indexes == nil)
}

func (r *Reader) rememberLocked(id block.SegmentID, x *Index, saved bool) {
	r.indexes.Remove(id)
	r.indexes.Add(id, &heldIndex{x, saved})
	for r.indexBytes += x.memBytes(); r.indexBytes > r.o.IndexCacheBytes && r.indexes.Len() > 1; {
		r.indexes.RemoveOldest()
	}
}

// Index returns the index of a segment, from memory, from the IndexStore or with one ranged read;
// concurrent callers share one fetch, and the first use leaves it in the IndexStore. If all shards say that they do not exist the error matches backend.ErrNotFound.
func (r *Reader) Index(ctx context.Context, info Info) (*Index, error) {
	for {
		r.mu.Lock()
		if x, ok := r.indexes.Get(info.ID); ok && x.describes(info) == nil {
			save := !x.saved
			x.saved = true
			r.mu.Unlock()
			if save {
				r.o.Indexes.SaveIndex(info.ID, x.Append(nil))
			}
			return x.Index, nil
		}
		load, follow := r.loading[info.ID]
		if !follow {
			load = &indexLoad{done: make(chan struct{})}
			r.loading[info.ID] = load
		}
		r.mu.Unlock()
		if !follow {
			return r.lead(ctx, info, load)
		}
		select {
		case <-load.done:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
		if load.err == nil && load.x.describes(info) == nil {
			return load.x, nil
		}
		if load.err != nil && !load.gaveUp {
			return nil, load.err
		}
		// The one that fetched was cancelled, or had another segment in mind: fetch here.
	}
}

// lead fetches an index for this caller and all that wait for load.
func (r *Reader) lead(ctx context.Context, info Info, load *indexLoad) (*Index, error) {
	load.err = errors.New("index fetch panicked")
	defer func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		if load.err == nil {
			r.rememberLocked(info.ID, load.x, true)
		}
		delete(r.loading, info.ID)
		close(load.done)
	}()
	load.x, load.err = r.fetchIndex(ctx, info)
	load.gaveUp = load.err != nil && ctx.Err() != nil
	return load.x, load.err
}

func (r *Reader) decodeIndex(b []byte, info Info) (*Index, error) {
	x, err := DecodeIndex(b)
	if err != nil {
		return nil, err
	}
	if r.o.Pool != [16]byte{} && x.Pool != r.o.Pool {
		return nil, fmt.Errorf("index of segment %d of pool %x: %w", x.Info.ID, x.Pool, ErrDamaged)
	}
	return x, x.describes(info)
}

// Extent returns the data of one slot: healthy, one ranged read once the index is cached; else the
// same range of k other shards. Errors: backend.ErrNotFound if the shards are gone (look the map up
// again), ErrDamaged if no choice of shards gives bytes that pass their checksum, ErrNewer for a codec
// of a later version, else what the stores said (try again). The data is the caller's.
func (r *Reader) Extent(ctx context.Context, info Info, slot int) (data []byte, e Entry, err error) {
	err = r.Extents(ctx, info, []int{slot}, func(_ int, p []byte, entry Entry) error {
		data, e = p, entry
		return nil
	})
	return data, e, err
}

// Extents reads several slots. Neighbours in one shard are read together across small gaps, a few
// requests at a time, and fn is called for each slot as its data arrives, in any order, by one
// goroutine at a time; data is fn's, but slices of one request share memory. A part that cannot be
// read does not stop the others: the error joins what failed, as for Extent, and exactly the slots fn
// was not called for are missing. An error of fn stops everything and is returned alone.
func (r *Reader) Extents(ctx context.Context, info Info, slots []int, fn func(slot int, data []byte, e Entry) error) error {
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	var failed []error
	r.Each(ctx, info, slots, func(slot int, data []byte, e Entry, err error) {
		switch {
		case ctx.Err() != nil:
		case err == nil:
			if err := fn(slot, data, e); err != nil {
				stop(err)
			}
		case len(failed) == 0 || failed[len(failed)-1] != err: // several slots may share one failure
			failed = append(failed, err)
		}
	})
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return errors.Join(failed...)
}

// Each is Extents with an outcome for every slot: fn is called once for each, with its data or with
// the error that befell it. A slot named twice is told twice. When ctx ends, what is missing fails
// with its cause.
func (r *Reader) Each(ctx context.Context, info Info, slots []int, fn func(slot int, data []byte, e Entry, err error)) {
	x, err := r.Index(ctx, info)
	var runs []run
	if err == nil {
		runs, err = plan(x, slots)
	}
	if err != nil {
		for _, s := range slots {
			fn(s, nil, Entry{}, err)
		}
		return
	}
	var mu sync.Mutex // serialises fn
	deliver := func(slot int, data []byte, err error) {
		if err == nil {
			data, err = x.unpack(slot, data)
		}
		mu.Lock()
		defer mu.Unlock()
		fn(slot, data, x.Entries[slot], err)
	}
	if len(runs) == 1 {
		r.readRun(ctx, x, info, runs[0], deliver)
		return
	}
	var g errgroup.Group
	g.SetLimit(getsMax)
	for _, run := range runs {
		g.Go(func() error { r.readRun(ctx, x, info, run, deliver); return nil })
	}
	_ = g.Wait() // the functions above return nil
}

// run is a byte range of one shard's area and the slots to take from it.
type run struct {
	shard int
	off   uint32
	n     uint32
	slots []int
}

// plan sorts slots by place and merges neighbours into runs.
func plan(x *Index, slots []int) ([]run, error) {
	for _, s := range slots {
		if s < 0 || s >= len(x.Entries) {
			return nil, fmt.Errorf("segment %d has no slot %d, only %d: %w", x.Info.ID, s, len(x.Entries), ErrDamaged)
		}
		if c := Codec(x.Entries[s].Codec); c >= codecs {
			return nil, fmt.Errorf("segment %d slot %d is packed by %v: %w", x.Info.ID, s, c, ErrNewer)
		}
	}
	if !slices.IsSorted(slots) {
		slots = slices.Clone(slots)
		slices.Sort(slots) // slots are in order of place
	}
	var runs []run
	for _, s := range slots {
		e := x.Entries[s]
		if len(runs) > 0 {
			last := &runs[len(runs)-1]
			end := last.off + last.n
			if last.shard == int(e.Shard) && e.Offset < end { // the same slot again
				last.slots = append(last.slots, s)
				continue
			}
			if last.shard == int(e.Shard) && e.Offset-end <= mergeGapMax && e.Offset+e.Stored-last.off <= mergeBytesMax {
				last.n = e.Offset + e.Stored - last.off
				last.slots = append(last.slots, s)
				continue
			}
		}
		runs = append(runs, run{shard: int(e.Shard), off: e.Offset, n: e.Stored, slots: []int{s}})
	}
	return runs, nil
}

// of is the part of a run's bytes that slot takes.
func (n run) of(x *Index, slot int, buf []byte) []byte {
	e := x.Entries[slot]
	at := e.Offset - n.off
	return buf[at : at+e.Stored : at+e.Stored]
}

// readRun reads one run and delivers the outcome of each of its slots; what the shard does not give
// intact, or not in time, is rebuilt.
func (r *Reader) readRun(ctx context.Context, x *Index, info Info, n run, deliver func(int, []byte, error)) {
	buf, rebuilt, err := r.readRange(ctx, info, n.shard, int64(n.off), int(n.n), func(p []byte) bool {
		return !slices.ContainsFunc(n.slots, func(s int) bool { return !x.Verify(s, n.of(x, s, p)) })
	})
	if err != nil {
		if ctx.Err() == nil && errors.Is(err, ErrDamaged) {
			r.rebuildSlots(ctx, x, info, n.slots, err, deliver) // damage may differ from slot to slot, and be of one transfer
			return
		}
		err = fmt.Errorf("segment %d slots %v: %w", info.ID, n.slots, err)
		for _, s := range n.slots {
			deliver(s, nil, err)
		}
		return
	}
	var bad []int
	for _, s := range n.slots {
		if p := n.of(x, s, buf); rebuilt || x.Verify(s, p) {
			deliver(s, p, nil)
		} else {
			bad = append(bad, s)
		}
	}
	if len(bad) == 0 {
		return
	}
	err = fmt.Errorf("segment %d shard %d slots %v: checksum: %w", info.ID, n.shard, bad, ErrDamaged)
	r.o.Log.Warn("shard is damaged", "segment", uint64(info.ID), "shard", n.shard, "target", info.Targets[n.shard], "slots", bad)
	r.degraded(info, n.shard, err)
	r.rebuildSlots(ctx, x, info, bad, err, deliver)
}

// rebuildSlots rebuilds each slot by itself; why is what happened to the shard they lie in. If that cannot be done
// for damage, the shard is asked once more: all but one of the answers may be good, and that one hurt on its way.
func (r *Reader) rebuildSlots(ctx context.Context, x *Index, info Info, slots []int, why error, deliver func(int, []byte, error)) {
	for _, s := range slots {
		e := x.Entries[s]
		p, err := r.rebuildRange(ctx, info, int(e.Shard), why, int64(e.Offset), int(e.Stored), func(p []byte) bool { return x.Verify(s, p) })
		if errors.Is(err, ErrDamaged) && ctx.Err() == nil {
			p, err = r.readAgain(ctx, x, info, s, err)
		}
		if err != nil {
			err = fmt.Errorf("segment %d slot %d: %w", info.ID, s, err)
		}
		deliver(s, p, err)
	}
}

// readAgain reads one slot from its shard, for the last time; damage is what is known so far.
func (r *Reader) readAgain(ctx context.Context, x *Index, info Info, slot int, damage error) ([]byte, error) {
	e := x.Entries[slot]
	p := make([]byte, e.Stored)
	err := r.readShard(ctx, info, int(e.Shard), p, HeaderBytes+int64(e.Offset))
	switch {
	case err == nil && x.Verify(slot, p):
		return p, nil
	case err == nil:
		return nil, damage
	}
	return nil, verdict(ctx, []error{damage, err})
}

// degraded reports a shard that could not serve. A shard known not to be stored is no news.
func (r *Reader) degraded(info Info, shard int, err error) {
	if errors.Is(err, errNotStored) {
		return
	}
	r.o.Log.Debug("shard read failed", "segment", uint64(info.ID), "shard", shard, "target", info.Targets[shard], "err", err)
	r.o.OnDegraded(info.ID, shard, err)
}

// errNotStored stands for a shard that info says has no target.
var errNotStored = errors.New("shard was not stored")

// readShard fills p from off of one shard's object.
func readShard(ctx context.Context, targets Getter, info Info, shard int, p []byte, off int64) error {
	t := info.Targets[shard]
	if t == 0 {
		return errNotStored
	}
	s, ok := targets(t)
	if !ok {
		return fmt.Errorf("shard %d: target %d is not configured", shard, t)
	}
	err := s.ReadAt(ctx, info.Key(shard), p, off)
	if errors.Is(err, backend.ErrShort) {
		return fmt.Errorf("shard %d: %w: %w", shard, ErrDamaged, err)
	}
	if err != nil {
		return fmt.Errorf("shard %d: %w", shard, err)
	}
	return nil
}

// verdict makes one error of what the shards said when together they did not suffice. If any failed
// for a reason that may pass, that reason alone is the error: neither damage nor absence is proven.
// Else it joins them all: it matches backend.ErrNotFound if any shard is
// gone, and ErrDamaged or ErrNewer if any was met.
func verdict(ctx context.Context, errs []error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	var proven []error
	for _, err := range errs {
		switch {
		case errors.Is(err, errNotStored):
		case isProof(err):
			proven = append(proven, err)
		default:
			return fmt.Errorf("%d of its shards failed, this one perhaps for now: %w", len(errs), err)
		}
	}
	return errors.Join(proven...)
}

// isProof tells errors that asking again will not change.
func isProof(err error) bool {
	return errors.Is(err, backend.ErrNotFound) || errors.Is(err, ErrDamaged) || errors.Is(err, ErrNewer)
}

// wrongBytes tells errors that asking again does change if the bytes were hurt on their way: a flipped bit may also make
// them those of a later version.
func wrongBytes(err error) bool { return errors.Is(err, ErrDamaged) || errors.Is(err, ErrNewer) }
