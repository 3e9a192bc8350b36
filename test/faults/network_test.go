package faults

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/Shopify/toxiproxy/v2"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/rs/zerolog"
)

// network is a proxy with faults of its own.
type network struct {
	t     *testing.T
	proxy *toxiproxy.Proxy
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
	n := &network{t: t, schedule: newSchedule(), proxy: toxiproxy.NewProxy(srv, "store", "127.0.0.1:0", upstream)}
	if err := srv.Collection.Add(n.proxy, true); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(n.proxy.Stop)
	return n
}

func (n *network) toxic(text string) {
	if !json.Valid([]byte(text)) {
		n.t.Errorf("bad toxic %s", text)
	}
	if _, err := n.proxy.Toxics.AddToxicJson(strings.NewReader(text)); err != nil {
		n.t.Error(err)
	}
}

func (n *network) remove(name string) {
	if err := n.proxy.Toxics.RemoveToxic(context.Background(), name); err != nil {
		n.t.Error(err)
	}
}

func (n *network) String() string {
	return fmt.Sprintf("%d blackholes, %d times all connections reset", n.holes, n.resets)
}

func (n *network) clear() { n.proxy.Toxics.ResetToxics(context.Background()) }

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
			n.toxic(`{"name": "hole-up", "type": "timeout", "stream": "upstream", "attributes": {"timeout": 0}}`)
			n.toxic(`{"name": "hole-down", "type": "timeout", "stream": "downstream", "attributes": {"timeout": 0}}`)
			select {
			case <-ctx.Done():
			case <-time.After(n.holeFor):
			}
			n.remove("hole-up")
			n.remove("hole-down")
			continue
		}
		if at >= nextReset {
			nextReset = at + n.resetEvery
			n.resets++
			n.toxic(`{"name": "reset", "type": "reset_peer", "stream": "downstream", "attributes": {"timeout": 0}}`)
			n.remove("reset")
		}
	}
}
