package vdisk

import (
	"context"
	"sync"

	"graindisk/block"
	"graindisk/vdisk/densetree"
	"graindisk/writeback"
)

// How streams are found and read ahead. [tune]
const (
	streamCount  = 16        // remembered per disk
	streamHits   = 2         // reads that continue it, before a stream is believed
	streamLarge  = 256 << 10 // or one read, from this size on
	streamSlack  = 4         // a read may skip so many times its length: requests overtake each other
	streamSkip   = 256 << 10 // and at most so many bytes
	streamStale  = 4096      // the same, after which one may be forgotten
	streamRecent = 64        // reads that missed or continued a stream, within which one is active
	windowFirst  = 256 << 10 // bytes
	aheadStep    = 4         // parts of a window that are fetched at a time
	aheadAlign   = 64 << 10  // readahead begins and ends on grains
	aheadLookups = 1024      // blocks resolved at a time
)

// streams finds sequential readers of one disk and says how far to read ahead of each:
//
//	        next           ahead               a stream is read up to next, and fetched up to ahead.
//	─────────┼───────────────┼──────────►      Once a quarter of the window is read, as much again
//	 read    │◄── window ───►│                 is fetched; the window doubles each time, up to AheadMax.
//
// Nothing is read ahead while all reads are local; it begins with a miss and ends when all that lies
// ahead proves to be on the tier. Reads that continue nothing cost one look at the table.
type streams struct {
	mu    sync.Mutex
	clock uint64
	hand  int
	next  [streamCount]int64 // where the reader of each stream goes on
	table [streamCount]stream
}

// stream is one sequential reader; all fields are byte offsets in the disk or counts.
type stream struct {
	i      int   // in the table
	last   int64 // where its last read began
	ahead  int64 // fetched up to here; below next while nothing is
	window int64
	hits   int
	used   uint64 // clock of its last read
}

// observe takes note of a read of n bytes at off and starts readahead if that is due. missed says that
// not all was local.
func (d *Disk) observe(off, n int64, missed bool) {
	if d.o.Reads != nil {
		d.o.Reads(off, n)
	}
	s := &d.ahead
	if n == 0 || !s.mu.TryLock() { // a hint may be lost
		return
	}
	x, from, to := s.advance(off, n, missed, d.size.Load(), d.o.Extents.AheadMax)
	s.mu.Unlock()
	if from >= to {
		return
	}
	started := d.o.Extents.Ahead(
		func() []Piece { return d.aheadPieces(context.Background(), from, to, nil) },
		func(fetched int) {
			if fetched == 0 {
				s.rest(x, to) // all of it was local: until the next miss
			}
		})
	if !started {
		s.rest(x, to)
	}
}

// advance moves the stream that a read continues, or makes the read a stream of its own, and returns
// which it is and the range to fetch, empty if there is none.
func (s *streams) advance(off, n int64, missed bool, size int64, bound func() int64) (x *stream, from, to int64) {
	if x = s.find(off, n); x == nil {
		if missed { // what is local needs no stream
			s.clock++
			s.start(off, n)
		}
		return nil, 0, 0
	}
	s.clock++
	if s.clock-x.used > streamRecent { // one that fell asleep must prove itself again
		x.hits = 0
	}
	x.used = s.clock
	next := &s.next[x.i]
	if off+n > *next {
		if off == *next || x.hits >= streamHits { // a gap may be chance
			x.hits++
		}
		*next, x.last = off+n, off
	} else if off != x.last { // not the same read once more: it only came late
		return x, 0, 0
	}
	if x.hits < streamHits && (x.hits == 0 || n < streamLarge) || x.ahead < *next && !missed {
		return x, 0, 0
	}
	from = max(x.ahead, *next/aheadAlign*aheadAlign)
	if from-*next > x.window-x.window/aheadStep {
		return x, 0, 0
	}
	if x.ahead > 0 {
		x.window *= 2
	}
	x.window = min(max(x.window, 2*n), max(bound()/s.active(), windowFirst))
	to = min((*next+x.window+aheadAlign-1)/aheadAlign*aheadAlign, size)
	x.ahead = max(x.ahead, to)
	return x, from, to
}

// active is how many streams share what may be read ahead.
func (s *streams) active() int64 {
	n := int64(0)
	for i := range s.table {
		if x := &s.table[i]; x.hits >= streamHits && s.clock-x.used < streamRecent {
			n++
		}
	}
	return max(1, n)
}

// find returns the stream that a read belongs to, or nil. It is all that most reads pay.
func (s *streams) find(off, n int64) *stream {
	slack := min(streamSlack*n, streamSkip)
	reach := uint64(2*slack + n)
	for i, next := range s.next {
		if uint64(off-next+slack+n) <= reach && s.table[i].used > 0 && (off >= next || off+n <= next) {
			return &s.table[i]
		}
	}
	return nil
}

// start makes a read a stream of its own, in the place of one that has not lasted, else of any.
func (s *streams) start(off, n int64) {
	i := s.hand
	for range streamCount {
		x := &s.table[i]
		if x.used == 0 || x.hits < streamHits || s.clock-x.used >= streamStale {
			break
		}
		i = (i + 1) % streamCount
	}
	s.hand = (i + 1) % streamCount
	s.table[i] = stream{i: i, last: off, window: windowFirst, used: s.clock}
	s.next[i] = off + n
}

// rest stops a stream that has been read ahead up to to, unless it has moved on.
func (s *streams) rest(x *stream, to int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if x.ahead == to {
		x.ahead = 0
	}
}

// Pieces names the extents that [from, to), whole blocks, is made of, where the log has nothing newer. Of what
// lies beyond the disk's end there are none. It waits for pages of the map that are not on the tier.
func (d *Disk) Pieces(ctx context.Context, from, to int64) []Piece {
	return d.aheadPieces(ctx, from, min(to, d.size.Load()), d.o.MendMap)
}

// aheadPieces names the extents that [from, to) is made of, where the log has nothing newer. Where the map cannot be
// read, and mend does not help or is nil, it leaves some out.
func (d *Disk) aheadPieces(ctx context.Context, from, to int64, mend func(context.Context, *densetree.PageError) error) []Piece {
	var ps []Piece
	var pins writeback.Pins
	if from >= to {
		return nil
	}
	found := make([]writeback.Found, min(aheadLookups, (to-from)/block.Size))
	for lba, end := block.LBA(from/block.Size), block.LBA(to/block.Size); lba < end; {
		part := found[:min(uint64(len(found)), uint64(end-lba))]
		d.o.Log.Lookup(d.o.ID, lba, part, &pins)
		pins.Release()
		for i := 0; i < len(part); {
			if part[i].State != writeback.None {
				i++
				continue
			}
			j := i + 1
			for j < len(part) && part[j].State == writeback.None {
				j++
			}
			for at, end := lba+block.LBA(i), lba+block.LBA(j); at < end; {
				err := d.o.Tree.Lookup(at, uint64(end-at), func(e densetree.Entry) bool {
					at = e.End()
					if e.Kind == densetree.Data && (len(ps) == 0 || ps[len(ps)-1].ID != e.Extent) {
						ps = append(ps, Piece{Disk: d.o.ID, ID: e.Extent, Orig: int(e.Orig), Off: int(e.Off)})
					}
					return true
				})
				if pe := d.mendable(err); pe == nil || mend == nil || mend(ctx, pe) != nil {
					break
				}
			}
			i = j
		}
		lba += block.LBA(len(part))
	}
	return ps
}
