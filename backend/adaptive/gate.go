package adaptive

import (
	"context"
	"sync"
	"time"
)

const (
	growth    = 0.25 // of the limit, in calls, in the time that a limit full of calls takes
	writeTurn = 8    // every so many grants the first waiting write goes before reads
)

// gate bounds how many calls are under way, by AIMD.
type gate struct {
	mu      sync.Mutex
	limit   float64 // in [1, max]
	max     int
	inside  int
	grants  int
	waiting [2][]chan struct{} // reads, writes; oldest first
	cut     time.Time          // when the limit was lowered last
}

func newGate(max int) *gate { return &gate{limit: float64(max), max: max} }

func (g *gate) size() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return int(g.limit)
}

// enter waits for a turn.
func (g *gate) enter(ctx context.Context, write bool) error {
	if err := ctx.Err(); err != nil {
		return context.Cause(ctx)
	}
	class := 0
	if write {
		class = 1
	}
	g.mu.Lock()
	if g.inside < int(g.limit) && len(g.waiting[0]) == 0 && len(g.waiting[1]) == 0 {
		g.inside++
		g.mu.Unlock()
		return nil
	}
	turn := make(chan struct{})
	g.waiting[class] = append(g.waiting[class], turn)
	g.mu.Unlock()
	select {
	case <-turn:
		return nil
	case <-ctx.Done():
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	for i, w := range g.waiting[class] {
		if w == turn {
			g.waiting[class] = append(g.waiting[class][:i], g.waiting[class][i+1:]...)
			return context.Cause(ctx)
		}
	}
	g.inside-- // the turn came at the same moment: pass it on
	g.wakeLocked()
	return context.Cause(ctx)
}

// leave ends the turn of a call that began at start and learns from its outcome. Calls that began before
// the limit was lowered do not lower it again: they failed of the same cause.
func (g *gate) leave(start time.Time, v verdict) {
	g.mu.Lock()
	defer g.mu.Unlock()
	switch v {
	case good:
		if g.inside >= int(g.limit) {
			g.limit = min(g.limit+growth/g.limit, float64(g.max))
		}
	case slow:
		g.cutLocked(start, 0.5)
	case bad:
		g.cutLocked(start, 0.8)
	}
	g.inside--
	g.wakeLocked()
}

func (g *gate) cutLocked(start time.Time, by float64) {
	if !start.Before(g.cut) {
		g.limit, g.cut = max(1, g.limit*by), time.Now()
	}
}

// wakeLocked lets in whom the limit lets.
func (g *gate) wakeLocked() {
	for g.inside < int(g.limit) {
		class := 0
		if g.grants%writeTurn == writeTurn-1 || len(g.waiting[0]) == 0 {
			class = 1
		}
		if len(g.waiting[class]) == 0 {
			class = 1 - class
		}
		if len(g.waiting[class]) == 0 {
			return
		}
		close(g.waiting[class][0])
		g.waiting[class] = g.waiting[class][1:]
		g.inside++
		g.grants++
	}
}
