package fetch

import (
	"context"
	"time"

	"graindisk/block"
)

// pumpLocked starts the rounds that may start, those that wait longest first.
func (f *Fetcher) pumpLocked() {
	if f.closed {
		return
	}
	for i := 0; i < len(f.waiting); {
		q := f.waiting[i]
		if q.rounds >= f.o.RoundsMax {
			i++ // its own rounds hold it, not the budget
			continue
		}
		n := 0
		for ; n < len(q.flights); n++ {
			cost := q.flights[n].bytes() + GapMax
			if f.used > 0 && f.used+cost > f.o.BytesMax {
				break
			}
			f.used += cost
		}
		if n == 0 {
			return // the rest of the budget is kept for this one
		}
		batch := q.flights[:n:n]
		if q.flights = q.flights[n:]; len(q.flights) == 0 {
			f.waiting = append(f.waiting[:i], f.waiting[i+1:]...)
		}
		q.rounds++
		f.startLocked(q.seg, batch, false)
	}
	f.pumpAheadLocked()
}

// startLocked begins a round. Its context has no values: it serves whoever comes.
func (f *Fetcher) startLocked(seg block.SegmentID, batch []*flight, ahead bool) {
	ctx, cancel := context.WithCancel(context.Background())
	r := &round{cancel: cancel, ahead: ahead, all: batch}
	for _, fl := range batch {
		fl.round = r
		r.open++
		if len(fl.subs) > 0 {
			r.live++
		}
	}
	f.rounds[r] = r
	f.wg.Go(func() {
		defer cancel()
		f.run(ctx, seg, r)
	})
}

// run fetches what the cache has not got by now, hands it out, and fills the cache.
func (f *Fetcher) run(ctx context.Context, seg block.SegmentID, r *round) {
	var rest []*flight
	for _, fl := range r.all {
		// Its extent may have been filled after the caller looked and before the flight began.
		if f.o.Cache.Has(fl.ID, fl.Blocks) {
			if p := make([]byte, fl.bytes()); f.o.Cache.Read(fl.ID, 0, fl.Blocks, p) {
				f.settle(fl, p, nil)
				continue
			}
		}
		rest = append(rest, fl)
	}
	if len(rest) > 0 {
		f.fetch(ctx, seg, rest)
	}
	for _, fl := range rest {
		if fl.err == nil { // settled: err and data are constant
			f.o.Cache.Fill(fl.Disk, fl.ID, fl.data)
		}
	}
	f.finish(seg, r)
}

// fetch asks Source and settles every flight.
func (f *Fetcher) fetch(ctx context.Context, seg block.SegmentID, rest []*flight) {
	wants := make([]Want, len(rest))
	for i, fl := range rest {
		wants[i] = fl.Want
	}
	f.mu.Lock()
	f.stats.Rounds++
	f.stats.Fetched += uint64(len(rest))
	f.mu.Unlock()
	start, first := time.Now(), true
	f.o.Source(ctx, seg, wants, func(i int, data []byte, err error) {
		if err == nil {
			now := time.Now()
			if first {
				f.meter.answered(now.Sub(start))
				first = false
			}
			f.meter.arrived(now, len(data))
			if rest[i].ahead && len(data) < aheadCopyMax {
				data = append(make([]byte, 0, len(data)), data...) // it would hold its neighbours in memory
			}
		}
		f.settle(rest[i], data, err)
	})
	for _, fl := range rest {
		f.settle(fl, nil, errUnanswered) // unless it is
	}
}

// settle sets a flight's outcome, once, and tells those who wait.
func (f *Fetcher) settle(fl *flight, data []byte, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.settleLocked(fl, data, err)
}

func (f *Fetcher) settleLocked(fl *flight, data []byte, err error) {
	if fl.settled {
		return
	}
	if f.closed && err != nil {
		err = ErrClosed
	}
	fl.settled, fl.data, fl.err = true, data, err
	if r := fl.round; r != nil {
		if r.open--; len(fl.subs) > 0 {
			r.live--
		}
		f.abandonLocked(r)
	}
	if mine := f.flights[fl.ID] == fl; mine && err != nil {
		delete(f.flights, fl.ID) // who comes later tries again
	} else if mine {
		f.landed.Add(1) // before anybody is told: Landed does not take the lock to find that there is nothing
	}
	for _, s := range fl.subs {
		s.out <- Result{s.i, data, err}
	}
	fl.subs = nil
}

// finish ends a round: its flights are over, but for those read ahead.
func (f *Fetcher) finish(seg block.SegmentID, r *round) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.rounds, r)
	for _, fl := range r.all {
		mine := f.flights[fl.ID] == fl
		switch {
		case !r.ahead:
			f.used -= fl.bytes() + GapMax
			if mine {
				delete(f.flights, fl.ID)
				f.landed.Add(-1)
			}
		case mine:
			f.keepLocked(fl)
		case fl.ahead: // it failed
			fl.ahead = false
			f.ahead.used -= fl.bytes()
		}
	}
	if r.ahead {
		f.ahead.rounds--
	} else if q := f.queues[seg]; q != nil {
		q.rounds--
		f.dropQueueLocked(q)
	}
	f.pumpLocked()
}
