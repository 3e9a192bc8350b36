package fetch

import (
	"sync"
	"time"
)

// How far readahead goes. [tune]
const (
	aheadRoundBytes = 2 << 20  // of one round
	aheadRoundsMax  = 16       // at a time: with the above, all of AheadMax
	aheadCopyMax    = 64 << 10 // extents below it are copied out of the buffer they arrived in
	windowMin       = 4 << 20  // what Window gives at least
)

// aheadState is the readahead of a Fetcher, guarded by its mu.
type aheadState struct {
	used   int64     // bytes queued, under way and landed; at most AheadMax
	queued []*flight // not yet under way
	rounds int
	landed []*flight // arrived, the oldest first; those passed since are to be ignored
	passed []*flight // arrived and read to the end
}

// Ahead fetches wants that nobody waits for yet, as far as there is room, and keeps them until they
// are read to their end or newer ones need the room. It returns how many of them it is worth going on
// after: those that were not in the cache already. It does not wait.
func (f *Fetcher) Ahead(wants []Want) int {
	missing := wants[:0:0]
	for _, w := range wants {
		if !f.o.Cache.Has(w.ID, w.Blocks) {
			missing = append(missing, w)
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		return 0
	}
	for _, w := range missing {
		if f.flights[w.ID] != nil {
			continue
		}
		fl := &flight{Want: w, ahead: true}
		if !f.roomLocked(fl.bytes()) {
			break
		}
		f.ahead.used += fl.bytes()
		f.stats.Ahead++
		f.flights[w.ID] = fl
		f.ahead.queued = append(f.ahead.queued, fl)
	}
	f.pumpLocked()
	return len(missing)
}

// roomLocked drops what has been read to its end, then what landed first, until n bytes more fit.
func (f *Fetcher) roomLocked(n int64) bool {
	a := &f.ahead
	for a.used+n > f.o.AheadMax {
		list := &a.passed
		if len(*list) == 0 {
			list = &a.landed
		}
		if len(*list) == 0 {
			return false
		}
		fl := (*list)[0]
		*list = (*list)[1:]
		if list == &a.landed && fl.passed {
			continue // it is, or was, in the other list
		}
		if !fl.wanted {
			f.stats.AheadUnread++
		}
		fl.ahead = false
		a.used -= fl.bytes()
		delete(f.flights, fl.ID)
		f.landed.Add(-1)
	}
	return true
}

// keepLocked keeps a flight that was read ahead and whose round is over.
func (f *Fetcher) keepLocked(fl *flight) {
	a := &f.ahead
	if fl.passed {
		a.passed = append(a.passed, fl)
		return
	}
	a.landed = append(a.landed, fl)
	for len(a.landed) > 0 && a.landed[0].passed {
		a.landed = a.landed[1:] // so that the list stays as short as what it holds
	}
}

// passLocked notes that a flight has been read up to a block. It may be read once more: the one who
// did may have missed what comes next, and come back for all.
func (f *Fetcher) passLocked(fl *flight, end int) {
	if !fl.ahead || fl.passed || end < fl.Blocks {
		return
	}
	fl.passed = true
	if fl.settled && f.rounds[fl.round] == nil { // else its round will
		f.keepLocked(fl)
	}
}

// promoteLocked makes queued readahead a flight that somebody waits for.
func (f *Fetcher) promoteLocked(fl *flight) {
	f.ahead.queued = remove(f.ahead.queued, fl)
	fl.ahead = false
	f.ahead.used -= fl.bytes()
	f.enqueueLocked(fl)
}

// pumpAheadLocked starts rounds of readahead.
func (f *Fetcher) pumpAheadLocked() {
	a := &f.ahead
	for len(a.queued) > 0 && a.rounds < aheadRoundsMax {
		seg, n, bytes := a.queued[0].ID.Segment(), 0, int64(0)
		for n < len(a.queued) && a.queued[n].ID.Segment() == seg && (n == 0 || bytes+a.queued[n].bytes() <= aheadRoundBytes) {
			bytes += a.queued[n].bytes()
			n++
		}
		batch := append([]*flight(nil), a.queued[:n]...)
		a.queued = a.queued[n:]
		a.rounds++
		f.startLocked(seg, batch, true)
	}
}

// Window is how many bytes a single stream needs under way to have all the bandwidth that was seen:
// the highest rate times two latencies, since a new segment's index comes before its data, and as much
// again for what is late; at least 4 MiB, at most three quarters of AheadMax.
func (f *Fetcher) Window() int64 {
	return min(max(4*f.meter.product(), windowMin), f.o.AheadMax*3/4)
}

// meter watches rates and latencies of what arrives.
type meter struct {
	mu    sync.Mutex
	since time.Time // start of the sample
	last  time.Time
	bytes int64 // of the sample
	rates [8]float64
	rate  int // samples taken
	rtts  [32]time.Duration
	rtt   int
}

const (
	sampleTime = 50 * time.Millisecond
	sampleIdle = 200 * time.Millisecond // after which a sample starts anew
)

func (m *meter) answered(d time.Duration) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.rtts[m.rtt%len(m.rtts)] = d
	m.rtt++
}

func (m *meter) arrived(now time.Time, n int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if now.Sub(m.last) > sampleIdle {
		m.since, m.bytes = now, -int64(n) // the first only starts the clock
	}
	m.last = now
	m.bytes += int64(n)
	if d := now.Sub(m.since); d >= sampleTime {
		m.rates[m.rate%len(m.rates)] = float64(m.bytes) / d.Seconds()
		m.rate++
		m.since, m.bytes = now, 0
	}
}

// product is bandwidth times delay, in bytes; 0 while nothing is known.
func (m *meter) product() int64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	n := min(m.rtt, len(m.rtts))
	if n == 0 {
		return 0
	}
	lowest, highest := m.rtts[0], 0.0
	for _, d := range m.rtts[:n] {
		lowest = min(lowest, d)
	}
	for _, r := range m.rates {
		highest = max(highest, r)
	}
	return int64(highest * lowest.Seconds())
}
