package faults

import (
	"strconv"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/Shopify/toxiproxy/v2/toxics"
)

// weather is what befalls every connection of one network at once. Safe for concurrent use.
type weather struct {
	place string
	hole  atomic.Bool // everything is swallowed

	mu   sync.Mutex
	gust chan struct{} // closed when all connections of now shall end
}

var weathers sync.Map // of *weather, by place

func newWeather(t *testing.T) *weather {
	places++
	w := &weather{place: strconv.Itoa(places), gust: make(chan struct{})}
	weathers.Store(w.place, w)
	t.Cleanup(w.reset)
	return w
}

var places int // how many were made; tests do not run in parallel

// reset ends all connections.
func (w *weather) reset() {
	w.mu.Lock()
	defer w.mu.Unlock()
	close(w.gust)
	w.gust = make(chan struct{})
}

func (w *weather) nextGust() <-chan struct{} {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.gust
}

// inWeather is the toxic that obeys the weather of its place.
type inWeather struct {
	Place string `json:"place"`
}

func init() { toxics.Register("weather", new(inWeather)) }

// Pipe implements toxics.Toxic. It stays until the connection ends: toxics of a network never change. It takes what
// still comes after a reset, lest the links before it wait for ever.
func (in *inWeather) Pipe(stub *toxics.ToxicStub) {
	in.carry(stub)
	stub.Close()
	for range stub.Input {
	}
}

// carry passes chunks on until the source or the weather ends the connection.
func (in *inWeather) carry(stub *toxics.ToxicStub) {
	at, _ := weathers.Load(in.Place)
	w := at.(*weather)
	gust := w.nextGust()
	for {
		select {
		case <-gust:
			return
		case c := <-stub.Input:
			if c == nil {
				return
			}
			if w.hole.Load() {
				continue
			}
			select {
			case <-gust:
				return
			case stub.Output <- c:
			}
		}
	}
}
