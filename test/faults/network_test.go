package faults

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/Shopify/toxiproxy/v2"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/rs/zerolog"
)

// network is a proxy with faults of its own. Its toxics stay the same from before the first connection: adding or
// removing one waits, with the proxy's lock held, for every link to let go of what it is writing, and for ever if
// its destination has gone (Shopify/toxiproxy#558). So one toxic asks the weather what to do.
type network struct {
	proxy *toxiproxy.Proxy
	*weather
	schedule
	holes, resets int
}

// schedule says when a network swallows everything and resets connections.
type schedule struct {
	lag               time.Duration // everything is later by that
	every             time.Duration
	holeFrom, holeFor time.Duration // within each such time
	resetEvery        time.Duration
}

func newSchedule() schedule {
	s := schedule{every: time.Minute, holeFrom: 20 * time.Second, holeFor: 20 * time.Second, resetEvery: 15 * time.Second}
	if racing() {
		s.every, s.holeFrom, s.holeFor, s.resetEvery = s.every/2, s.holeFrom/4, s.holeFor/2, s.resetEvery/2
	}
	return s
}

func newNetwork(t *testing.T, upstream string) *network {
	t.Helper()
	srv := toxiproxy.NewServer(toxiproxy.NewMetricsContainer(prometheus.NewRegistry()), zerolog.Nop())
	n := &network{weather: newWeather(t), schedule: newSchedule(), proxy: toxiproxy.NewProxy(srv, "store", "127.0.0.1:0", upstream)}
	if err := srv.Collection.Add(n.proxy, true); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(n.proxy.Stop)
	for _, toxic := range []string{
		`{"type": "latency", "stream": "downstream", "attributes": {"latency": 300, "jitter": 200}}`,
		`{"type": "weather", "stream": "downstream", "attributes": {"place": "` + n.place + `"}}`,
		`{"type": "weather", "stream": "upstream", "attributes": {"place": "` + n.place + `"}}`,
	} {
		if _, err := n.proxy.Toxics.AddToxicJson(strings.NewReader(toxic)); err != nil {
			t.Fatal(toxic, err)
		}
	}
	return n
}

func (n *network) String() string {
	return fmt.Sprintf("%d blackholes, %d times all connections reset", n.holes, n.resets)
}

// misbehave swallows everything for some time of each minute and resets all connections now and then.
func (n *network) misbehave(ctx context.Context) {
	start := time.Now().Add(n.lag)
	nextReset := n.resetEvery
	for step := time.NewTicker(200 * time.Millisecond); ; {
		select {
		case <-ctx.Done():
			step.Stop()
			return
		case <-step.C:
		}
		at := time.Since(start)
		if in := at % n.every; in >= n.holeFrom && in < n.holeFrom+n.holeFor && int(at/n.every) >= n.holes {
			n.holes++
			n.hole.Store(true)
			select {
			case <-ctx.Done():
			case <-time.After(n.holeFor):
			}
			n.hole.Store(false)
			n.reset() // what was swallowed would be missing
			continue
		}
		if at >= nextReset {
			nextReset = at + n.resetEvery
			n.resets++
			n.reset()
		}
	}
}
