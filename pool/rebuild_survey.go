package pool

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"graindisk/backend"
	"graindisk/block"
	"graindisk/grains/segment"
	"graindisk/pool/root"
)

// survey is what the targets hold, as told by a listing, a trailer of each segment and the cut records.
type survey struct {
	stores     []backend.Store // by target, in the order of the configuration
	names      []string
	witness    []bool // as configured
	segs       map[segKey]*foundSegment
	pool       [16]byte
	epoch      uint64          // the highest in any name
	number     block.SegmentID // likewise
	unreadable int             // shards that were to be read and are damaged
}

// segKey names a segment. Numbers are never used twice, but who relies on nothing else can tell.
type segKey struct {
	id    block.SegmentID
	epoch uint64
}

type foundShard struct {
	target int // in survey.stores
	shard  uint8
	size   int64
}

type foundSegment struct {
	segKey
	shards  []foundShard    // in order of shard; one may be found at several targets
	known   bool            // trailer is set: at least one shard gave it
	trailer segment.Trailer // its targets are those planned
	info    segment.Info    // with the targets of this rebuild, where shards were found; set by place
	cut     *rebuildCut     // the head of the record it holds; nil = none, or unreadable
}

// rebuildCut is the head of a cut record, without the unmaps.
type rebuildCut struct {
	epoch, cut, prev uint64
	crc, prevCRC     uint32
	horizon          uint64
	time             int64
	segs             []segKey       // without the holder
	disks            []block.DiskID // that it has a row of
	rows             []segment.DiskMeta
	gone             *segment.Gone
	holder           *foundSegment
}

// has counts the shards that are there in the length that the trailer says.
func (f *foundSegment) has() int {
	n, last := 0, -1
	for _, s := range f.shards {
		if int(s.shard) != last && s.size == f.trailer.Info.ObjectBytes() && int(s.shard) < f.trailer.Info.Shards() {
			n, last = n+1, int(s.shard)
		}
	}
	return n
}

// complete tells whether the segment can be read; if not, why.
func (f *foundSegment) complete() (why string, ok bool) {
	switch {
	case f == nil:
		return "is on no target", false
	case !f.known:
		return fmt.Sprintf("has %d shards, none with a readable trailer", len(f.shards)), false
	case f.has() < int(f.trailer.Info.K):
		return fmt.Sprintf("has %d shards of %d+%d, too few to read it", f.has(), f.trailer.Info.K, f.trailer.Info.M), false
	}
	return "", true
}

// How a rebuild reads. [tune]
const (
	surveyAtOnce = 32 // trailers
	listMax      = 1000
	rebuildTries = 6 // of one request, with growing pauses
	rebuildAhead = 16
)

// patiently tries again what may work the next time, for some 10 s.
func patiently(ctx context.Context, f func(context.Context) error) error {
	wait := backoff(0)
	for try := 1; ; try++ {
		actx, cancel := context.WithTimeout(ctx, putTimeout)
		err := f(actx)
		cancel()
		if err == nil || ctx.Err() != nil {
			return cmp.Or(ctx.Err(), err)
		}
		if c := backend.ClassOf(err); try == rebuildTries || final(err) || errors.Is(err, root.ErrExists) || c != backend.Transient && c != backend.Throttled {
			return err
		}
		if err := wait.sleep(ctx); err != nil {
			return err
		}
		wait = wait.next()
	}
}

// surveyShards looks at all targets. It fails if one of them does not answer, or holds something of a newer release.
func surveyShards(ctx context.Context, o Options, progress func(RebuildProgress)) (*survey, error) {
	s := &survey{segs: map[segKey]*foundSegment{}}
	for _, t := range o.Targets {
		s.stores, s.names, s.witness = append(s.stores, t.Store), append(s.names, t.Name), append(s.witness, t.Witness)
	}
	if err := s.list(ctx, progress); err != nil {
		return nil, err
	}
	if len(s.segs) == 0 {
		return nil, fmt.Errorf("%w: no shard lies below seg/ on any target", ErrNoPool)
	}
	return s, s.readAll(ctx, progress)
}

// list finds all shards, and the epochs of checkpoints, which the new one must stay above.
func (s *survey) list(ctx context.Context, progress func(RebuildProgress)) error {
	var mu sync.Mutex
	g, ctx := errgroup.WithContext(ctx)
	for t := range s.stores {
		g.Go(func() error {
			return s.eachKey(ctx, t, "seg/", func(objs []backend.Info) {
				mu.Lock()
				defer mu.Unlock()
				for _, obj := range objs {
					s.note(t, obj)
				}
				progress(RebuildProgress{Phase: "list", Done: len(s.segs)})
			})
		})
		g.Go(func() error {
			return s.eachKey(ctx, t, "ckpt/", func(objs []backend.Info) {
				mu.Lock()
				defer mu.Unlock()
				for _, obj := range objs {
					if e, err := strconv.ParseUint(strings.Split(obj.Key, "/")[1], 10, 64); err == nil {
						s.epoch = max(s.epoch, e)
					}
				}
			})
		})
	}
	err := g.Wait()
	for _, f := range s.segs {
		slices.SortFunc(f.shards, func(a, b foundShard) int {
			return cmp.Or(cmp.Compare(a.shard, b.shard), cmp.Compare(a.target, b.target))
		})
	}
	return err
}

func (s *survey) eachKey(ctx context.Context, t int, prefix string, page func([]backend.Info)) error {
	for after, more := "", true; more; {
		var objs []backend.Info
		err := patiently(ctx, func(ctx context.Context) (err error) {
			objs, more, err = s.stores[t].List(ctx, prefix, after, listMax)
			return err
		})
		if err != nil {
			return fmt.Errorf("target %s: %w; take it out of the configuration if it is gone for good", s.names[t], err)
		}
		if len(objs) > 0 {
			after = objs[len(objs)-1].Key
		}
		page(objs)
	}
	return nil
}

// note takes in a listed object; what is no shard is passed over.
func (s *survey) note(t int, obj backend.Info) {
	id, epoch, shard, ok := segment.ParseKey(obj.Key)
	if !ok {
		return
	}
	k := segKey{id, epoch}
	f := s.segs[k]
	if f == nil {
		f = &foundSegment{segKey: k}
		s.segs[k] = f
	}
	f.shards = append(f.shards, foundShard{t, uint8(shard), obj.Size})
	s.epoch, s.number = max(s.epoch, epoch), max(s.number, id)
}

// readAll reads a trailer of each segment, and the records.
func (s *survey) readAll(ctx context.Context, progress func(RebuildProgress)) error {
	var mu sync.Mutex
	done := 0
	pools := map[[16]byte]int{}
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(surveyAtOnce)
	for _, f := range s.segs {
		g.Go(func() error {
			bad, err := s.read(gctx, f)
			mu.Lock()
			defer mu.Unlock()
			s.unreadable += bad
			if f.known {
				pools[f.trailer.Pool]++
				s.pool = f.trailer.Pool
			}
			if done++; done%64 == 0 || done == len(s.segs) {
				progress(RebuildProgress{Phase: "read", Done: done, Total: len(s.segs)})
			}
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	if len(pools) > 1 {
		return fmt.Errorf("the targets hold shards of %d pools (%d segments): give each pool targets or prefixes of its own", len(pools), len(s.segs))
	}
	return nil
}

// read gets a segment's trailer and the head of its record from whichever shard has them, and counts those that
// were damaged. A segment that is damaged everywhere is no error: what needs it says so.
func (s *survey) read(ctx context.Context, f *foundSegment) (bad int, err error) {
	var newer error // a flipped bit may look so: it counts if nothing else can be read
	for _, sh := range f.shards {
		key := segment.Info{ID: f.id, Epoch: f.epoch}.Key(int(sh.shard))
		var t segment.Trailer
		var rec *segment.CutRecord
		err := patiently(ctx, func(ctx context.Context) (err error) {
			if t, err = segment.ReadTrailer(ctx, s.stores[sh.target], key, sh.size); err == nil && t.Info.CutBytes > 0 {
				_, rec, err = segment.ReadTail(ctx, s.stores[sh.target], key, t)
			}
			return err
		})
		switch {
		case errors.Is(err, segment.ErrNewer):
			newer = fmt.Errorf("target %s: %w", s.names[sh.target], err)
			bad++
			continue
		case isLost(err):
			bad++
			continue
		case err != nil:
			return bad, fmt.Errorf("target %s: %w", s.names[sh.target], err)
		}
		f.known, f.trailer = true, t
		if rec != nil {
			f.cut = headOf(rec, t.CutCRC, f)
		}
		return bad, nil
	}
	return bad, newer
}

// isLost tells errors that mean that this shard does not help, now or later, and another may.
func isLost(err error) bool {
	return errors.Is(err, segment.ErrDamaged) || errors.Is(err, backend.ErrNotFound) || errors.Is(err, backend.ErrShort)
}

func headOf(rec *segment.CutRecord, crc uint32, holder *foundSegment) *rebuildCut {
	c := &rebuildCut{
		epoch: rec.Epoch, cut: rec.Cut, prev: rec.PrevCut, crc: crc, prevCRC: rec.PrevCRC, horizon: rec.Horizon, time: rec.Time,
		gone: rec.Gone, holder: holder,
	}
	for _, i := range rec.Segments {
		c.segs = append(c.segs, segKey{i.ID, i.Epoch})
	}
	for _, d := range rec.Disks {
		if d.Meta != nil {
			c.disks, c.rows = append(c.disks, d.Disk), append(c.rows, *d.Meta)
		}
	}
	return c
}

// tail reads a segment's index, and its record if it has one, from whichever of its shards has them intact.
func (s *survey) tail(ctx context.Context, f *foundSegment) (x *segment.Index, rec *segment.CutRecord, err error) {
	var errs []error
	n := len(f.shards)
	for i := range n {
		sh := f.shards[(i+int(f.id))%n] // all targets take their turn
		if sh.size != f.trailer.Info.ObjectBytes() {
			continue
		}
		err := patiently(ctx, func(ctx context.Context) (err error) {
			x, rec, err = segment.ReadTail(ctx, s.stores[sh.target], f.trailer.Info.Key(int(sh.shard)), f.trailer)
			return err
		})
		if err == nil || ctx.Err() != nil {
			return x, rec, err
		}
		errs = append(errs, fmt.Errorf("target %s: %w", s.names[sh.target], err))
	}
	return nil, nil, fmt.Errorf("segment %d: %w", f.id, errors.Join(errs...))
}

// age of a cut for people.
func (c *rebuildCut) String() string {
	return fmt.Sprintf("cut %d of epoch %d (%s)", c.cut, c.epoch, time.Unix(c.time, 0).UTC().Format(time.DateTime))
}
