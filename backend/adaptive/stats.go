package adaptive

import (
	"sync"
	"time"

	"graindisk/backend"
)

// Prices are what a store charges, in any currency.
type Prices struct {
	Put1000 float64 // 1000 puts and lists
	Get1000 float64 // 1000 gets, ranged ones and stats; deletes cost nothing
	OutGB   float64 // 10^9 bytes read
}

// OpStats count one kind of call.
type OpStats struct {
	Calls   uint64 // attempts that reached the store
	Retries uint64 // of them, not the first of their call
	Bytes   int64  // carried by those that succeeded
	Errors  map[backend.Class]uint64
	// Latency counts attempts by how long they took: LatencyBounds[i] is the upper bound of Latency[i], the
	// last one has none.
	Latency [len(latencyBounds) + 1]uint64
	Took    time.Duration // in all
}

var latencyBounds = [...]time.Duration{
	time.Millisecond, 2 * time.Millisecond, 5 * time.Millisecond, 10 * time.Millisecond, 20 * time.Millisecond, 50 * time.Millisecond,
	100 * time.Millisecond, 200 * time.Millisecond, 500 * time.Millisecond, time.Second, 2 * time.Second, 5 * time.Second, 15 * time.Second,
}

// LatencyBounds are the upper bounds of OpStats.Latency.
func LatencyBounds() []time.Duration { return latencyBounds[:] }

// Stats are counts since New, and the present state.
type Stats struct {
	Ops         map[Op]OpStats
	Cost        float64 // by the prices given
	State       State
	Since       time.Time // of the state
	Concurrency int       // present limit on calls under way
}

type stats struct {
	prices Prices
	mu     sync.Mutex
	ops    [ops]OpStats
	cost   float64
}

func newStats(p Prices) *stats { return &stats{prices: p} }

func (s *stats) retried(op Op) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ops[op].Retries++
}

func (s *stats) note(op Op, class backend.Class, bytes int64, took time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	o := &s.ops[op]
	o.Calls++
	o.Took += took
	i := 0
	for i < len(latencyBounds) && took > latencyBounds[i] {
		i++
	}
	o.Latency[i]++
	if class != 0 {
		if o.Errors == nil {
			o.Errors = map[backend.Class]uint64{}
		}
		o.Errors[class]++
		bytes = 0
	}
	o.Bytes += bytes
	switch op {
	case Put, List:
		s.cost += s.prices.Put1000 / 1000
	case Get, Read:
		s.cost += s.prices.Get1000/1000 + s.prices.OutGB*float64(bytes)/1e9
	case Stat:
		s.cost += s.prices.Get1000 / 1000
	}
}

func (s *stats) snapshot() Stats {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := Stats{Ops: map[Op]OpStats{}, Cost: s.cost}
	for op := range ops {
		o := s.ops[op]
		errors := make(map[backend.Class]uint64, len(o.Errors))
		for c, n := range o.Errors {
			errors[c] = n
		}
		o.Errors = errors
		st.Ops[op] = o
	}
	return st
}
