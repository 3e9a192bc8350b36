package backend

import "time"

// Watched is a Store that knows how it is doing.
type Watched interface {
	Store
	Health() Health
}

// Health is how a store is doing, and what it was asked since the process began.
type Health struct {
	State       string              `json:"state"` // ok | degraded | offline
	Since       time.Time           `json:"since"` // of the state
	Concurrency int                 `json:"concurrency"`
	Cost        float64             `json:"cost"` // by the configured prices
	Ops         map[string]OpHealth `json:"ops"`  // by Error.Op; those that were never asked are left out
}

// OpHealth counts one kind of request.
type OpHealth struct {
	Requests uint64            `json:"requests"` // that reached the store, retries included
	Retries  uint64            `json:"retries"`
	Bytes    int64             `json:"bytes"` // carried by those that succeeded
	Errors   map[string]uint64 `json:"errors,omitempty"`
	P50      float64           `json:"p50_seconds"` // upper bounds of the latency's quantiles
	P99      float64           `json:"p99_seconds"`
	// Latency counts requests by Bounds, in seconds, of how long they took; the last has no bound.
	Latency []uint64  `json:"-"`
	Bounds  []float64 `json:"-"`
	Took    float64   `json:"-"` // seconds, in all
}
