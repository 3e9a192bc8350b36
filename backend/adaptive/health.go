package adaptive

import (
	"fmt"
	"sync"
	"time"
)

// State is how a store is doing.
type State uint8

// The states.
const (
	OK State = iota
	Degraded
	Offline
)

// String is the state in messages and metrics.
func (s State) String() string {
	switch s {
	case OK:
		return "ok"
	case Degraded:
		return "degraded"
	case Offline:
		return "offline"
	}
	return fmt.Sprintf("state %d", uint8(s))
}

const (
	failWeight    = 1.0 / 32 // of one call in the average of failures
	failDegraded  = 0.10
	failOK        = 0.02
	goodForOK     = 3 // in a row
	badForOffline = 8 // in a row
	silentOffline = 5 * time.Second
	probeMin      = time.Second
	probeMax      = 15 * time.Second
)

// health judges a store by the outcomes of its calls.
type health struct {
	onChange func(from, to State, why error)

	mu       sync.Mutex
	state    State
	changed  time.Time
	failing  float64 // moving average of outcomes: 1 is failed or throttled
	goods    int     // in a row
	bads     int     // in a row
	lastGood time.Time
	probing  bool // offline: a probe is under way
	next     time.Time
	wait     time.Duration
}

func newHealth(onChange func(from, to State, why error)) *health {
	now := time.Now()
	return &health{onChange: onChange, changed: now, lastGood: now}
}

func (h *health) current() State {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.state
}

func (h *health) since() (State, time.Time) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.state, h.changed
}

// admit lets a call pass, as a probe if the store is offline, or says why not.
func (h *health) admit(now time.Time) (probe bool, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.state != Offline {
		return false, nil
	}
	if h.probing || now.Before(h.next) {
		return false, fmt.Errorf("%w since %s", ErrOffline, h.changed.Format(time.TimeOnly))
	}
	h.probing = true
	return true, nil
}

// note learns from a call that admit let pass.
func (h *health) note(now time.Time, v verdict, probe bool, why error) {
	h.mu.Lock()
	from := h.state
	if probe {
		h.probing = false
	}
	switch v {
	case good:
		h.goods, h.bads, h.lastGood = h.goods+1, 0, now
		h.failing *= 1 - failWeight
	case slow:
		h.goods, h.bads, h.lastGood = 0, 0, now
		h.failing += (1 - h.failing) * failWeight
	case bad:
		h.goods, h.bads = 0, h.bads+1
		h.failing += (1 - h.failing) * failWeight
	}
	h.moveLocked(now, v, probe)
	to := h.state
	h.mu.Unlock()
	if to != from {
		h.onChange(from, to, why)
	}
}

func (h *health) moveLocked(now time.Time, v verdict, probe bool) {
	switch h.state {
	case OK:
		if v == slow || h.failing > failDegraded {
			h.setLocked(Degraded, now)
		}
	case Degraded:
		if v == good && h.goods >= goodForOK && h.failing < failOK {
			h.setLocked(OK, now)
		}
	case Offline:
		switch {
		case v == good || v == slow:
			h.failing = failDegraded // what was, was: a few good calls decide
			h.setLocked(Degraded, now)
		case probe && v == bad:
			h.wait = min(2*h.wait, probeMax)
			h.next = now.Add(h.wait)
		}
		return
	}
	if v == bad && h.bads >= badForOffline && now.Sub(h.lastGood) >= silentOffline {
		h.setLocked(Offline, now)
		h.wait = probeMin
		h.next = now.Add(h.wait)
	}
}

func (h *health) setLocked(s State, now time.Time) { h.state, h.changed = s, now }
