package writeback

import (
	"context"
	"math"
	"sync"
	"sync/atomic"
	"time"
)

// The pace of data appends as the tier fills. [tune]
const (
	// paceMark is the share of the log's space in use where appends begin to be delayed.
	paceMark = 0.6
	// paceRateMin is the rate at which space is taken to come free when none does, bytes/s.
	paceRateMin = 8 << 20
	// paceMemory is how fast a rate of space coming free is forgotten: a cut frees many slots at once.
	paceMemory = time.Minute
	// paceDelayMax bounds what pacing alone may delay one append: guests wait 30 s and more.
	paceDelayMax = time.Second
	// paceGrain is the shortest sleep: smaller delays add up until they are worth one.
	paceGrain = time.Millisecond
	// paceSample is how long a look at the tier is good for, if no more than gate.sample bytes come meanwhile.
	paceSample = 5 * time.Millisecond
)

// paceSpeed is how fast data may come in, in bytes/s, when the zone between the mark and a full tier is
// in use to the share x, and space comes free at rate. It falls without a step from any speed at the mark
// through rate, at a third of the zone, to nothing where the tier is full:
//
//	speed │·
//	      │ ·
//	 rate │─ ─·─ ─
//	      │    ' · .
//	      └────┬───────'─ x
//	      0   1/3      1
func paceSpeed(x, rate float64) float64 {
	switch {
	case x <= 0:
		return math.Inf(1)
	case x >= 1:
		return 0
	}
	return max(rate, paceRateMin) * (1 - x) / (2 * x)
}

// gate lets data appends in, in the order they come: at once while there is room, at the pace of
// paceSpeed as the tier fills, and not at all while it is closed.
type gate struct {
	now    func() time.Time
	sleep  func(context.Context, time.Duration) error
	sample int64          // bytes
	fill   func() float64 // x of paceSpeed
	closed func() (closed bool, err error)

	turn    chan struct{} // capacity 1: held by the append that is next; blocked senders queue in order
	waiting atomic.Int64  // appends at the gate

	mu     sync.Mutex
	debt   float64   // bytes let in that the pace has not caught up with
	at     time.Time // of debt
	rate   float64   // of space coming free, bytes/s
	rateAt time.Time
	x      float64 // as of looked
	looked time.Time
	since  int64 // bytes let in since
}

func newGate(now func() time.Time, sample int64, fill func() float64, closed func() (bool, error)) *gate {
	return &gate{now: now, sample: sample, sleep: sleepFor, fill: fill, closed: closed, turn: make(chan struct{}, 1)}
}

func sleepFor(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// enter waits until bytes of data may be appended, or fails with ctx's or the log's error.
func (g *gate) enter(ctx context.Context, bytes int) error {
	closed, err := g.closed()
	if err != nil {
		return err
	}
	if !closed && g.waiting.Load() == 0 && g.let(bytes, 0) == 0 {
		return nil
	}
	g.waiting.Add(1)
	defer g.waiting.Add(-1)
	arrived := g.now()
	select {
	case g.turn <- struct{}{}:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	defer func() { <-g.turn }()
	for {
		d := slotPoll
		closed, err := g.closed()
		if err != nil {
			return err
		}
		if !closed {
			if d = g.let(bytes, g.now().Sub(arrived)); d == 0 {
				return nil
			}
		}
		if err := g.sleep(ctx, min(d, slotPoll)); err != nil {
			return err
		}
	}
}

// let lets bytes in and returns 0, or returns how long they have to wait yet; waited is how long they
// did so far.
func (g *gate) let(bytes int, waited time.Duration) time.Duration {
	now := g.look()
	g.mu.Lock()
	defer g.mu.Unlock()
	d := g.delayLocked(now)
	if g.x < 1 && waited >= paceDelayMax {
		d = 0
	}
	if d > 0 {
		return d
	}
	g.since += int64(bytes)
	if g.x > 0 {
		g.debt += float64(bytes)
	}
	return 0
}

// look sees to it that x is of now, which it returns. mu is not held over fill, which takes locks of the
// log, under which freed is called.
func (g *gate) look() time.Time {
	now := g.now()
	g.mu.Lock()
	fresh := now.Sub(g.looked) < paceSample && !now.Before(g.looked) && g.since < g.sample
	g.mu.Unlock()
	if !fresh {
		x := g.fill()
		g.mu.Lock()
		g.x, g.looked, g.since = x, now, 0
		g.mu.Unlock()
	}
	return now
}

// delayLocked is how long an append would wait now for the pace.
func (g *gate) delayLocked(now time.Time) time.Duration {
	speed := paceSpeed(g.x, g.rateLocked(now))
	if past := now.Sub(g.at).Seconds(); past > 0 && g.debt > 0 {
		g.debt = max(0, g.debt-speed*past)
	}
	g.at = now
	switch {
	case g.x <= 0:
		g.debt = 0
		return 0
	case g.x >= 1:
		return slotPoll
	}
	d := time.Duration(min(g.debt/speed, paceDelayMax.Seconds()) * float64(time.Second))
	if d < paceGrain {
		return 0
	}
	return d
}

// freed notes that so many bytes of space came free.
func (g *gate) freed(bytes int64) {
	g.mu.Lock()
	defer g.mu.Unlock()
	now := g.now()
	g.rate = g.rateLocked(now) + float64(bytes)/paceMemory.Seconds()
	g.rateAt, g.looked = now, time.Time{}
}

// rateLocked is the rate at which space came free lately.
func (g *gate) rateLocked(now time.Time) float64 {
	return g.rate * math.Exp(-max(0, now.Sub(g.rateAt)).Seconds()/paceMemory.Seconds())
}

// delay is how long an append would wait now for the pace, and open whether it would not wait at all.
func (g *gate) delay() (d time.Duration, open bool) {
	now := g.look()
	g.mu.Lock()
	d = g.delayLocked(now)
	full := g.x >= 1
	g.mu.Unlock()
	return d, d == 0 && !full && g.waiting.Load() == 0
}
