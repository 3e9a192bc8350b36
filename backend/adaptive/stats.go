package adaptive

import (
	"maps"
	"slices"
	"sync"
	"time"

	"graindisk/backend"
)

// Prices are what a store charges, in any currency.
type Prices struct {
	Put1000 float64 // 1000 puts, copies and lists
	Get1000 float64 // 1000 gets, ranged ones and stats; deletes cost nothing
	OutGB   float64 // 10^9 bytes read
}

// latencyBounds are the upper bounds by which requests are counted, in seconds.
var latencyBounds = []float64{0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 15}

type stats struct {
	prices Prices
	mu     sync.Mutex
	ops    [ops]backend.OpHealth
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
	if o.Requests == 0 {
		o.Latency = make([]uint64, len(latencyBounds)+1)
	}
	o.Requests++
	o.Took += took.Seconds()
	i, _ := slices.BinarySearch(latencyBounds, took.Seconds())
	o.Latency[i]++
	if class != 0 {
		if o.Errors == nil {
			o.Errors = map[string]uint64{}
		}
		o.Errors[class.String()]++
		bytes = 0
	}
	o.Bytes += bytes
	switch op {
	case Put, List, Copy:
		s.cost += s.prices.Put1000 / 1000
	case Get, Read:
		s.cost += s.prices.Get1000/1000 + s.prices.OutGB*float64(bytes)/1e9
	case Stat:
		s.cost += s.prices.Get1000 / 1000
	}
}

func (s *stats) health() backend.Health {
	s.mu.Lock()
	defer s.mu.Unlock()
	h := backend.Health{Cost: s.cost, Ops: map[string]backend.OpHealth{}}
	for op := range ops {
		if o := s.ops[op]; o.Requests > 0 {
			o.Latency, o.Bounds, o.Errors = slices.Clone(o.Latency), latencyBounds, maps.Clone(o.Errors)
			o.P50, o.P99 = quantile(o.Latency, o.Requests, 0.5), quantile(o.Latency, o.Requests, 0.99)
			h.Ops[op.String()] = o
		}
	}
	return h
}

// quantile is the bound below which a share q of the requests lies, or twice the highest bound.
func quantile(counts []uint64, all uint64, q float64) float64 {
	var sum uint64
	for i, bound := range latencyBounds {
		if sum += counts[i]; float64(sum) >= q*float64(all) {
			return bound
		}
	}
	return 2 * latencyBounds[len(latencyBounds)-1]
}
