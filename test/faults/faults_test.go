package faults

import (
	"context"
	"encoding/json"
	"errors"
	"net/http/httptest"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/Shopify/toxiproxy/v2"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/rs/zerolog"

	"graindisk/backend/backendtest/miniotest"
	"graindisk/frontend/nbd/nbdclient"
	"graindisk/test/harness"
)

func TestMain(m *testing.M) {
	code := m.Run()
	harness.Cleanup()
	os.Exit(code)
}

const (
	shortRun      = time.Minute // GRAINDISK_SOAK, if longer, up to an hour
	blackholeFrom = 20 * time.Second
	blackholeFor  = 20 * time.Second
	resetEvery    = 15 * time.Second
	stallMax      = 5 * time.Second // no write waits longer: the log is far from full
	ampMax        = 1.1
)

// TestGuestsNoticeNothing puts between gateway and store a handler that refuses, forgets to answer and cuts
// short, and a network that is slow, resets connections and for a third of each minute swallows everything.
// Beside the load that fio verifies, a client times small durable writes. Then what was written is read by
// a gateway that has to fetch all of it through the same faults.
func TestGuestsNoticeNothing(t *testing.T) {
	harness.Need(t, "fio")
	run := shortRun
	if s := os.Getenv("GRAINDISK_SOAK"); s != "" {
		d, err := time.ParseDuration(s)
		if err != nil {
			t.Fatal("GRAINDISK_SOAK:", err)
		}
		run = max(run, min(d, time.Hour))
	}
	seed := uint64(time.Now().UnixNano())
	if s := os.Getenv("GRAINDISK_SEED"); s != "" {
		var err error
		if seed, err = strconv.ParseUint(s, 10, 64); err != nil {
			t.Fatal("GRAINDISK_SEED:", err)
		}
	}
	t.Logf("seed %d", seed)
	store := miniotest.Start(t)
	h := newHandler(t, store.Endpoint, seed)
	web := httptest.NewServer(h)
	t.Cleanup(web.Close)
	n := newNetwork(t, web.Listener.Addr().String())
	store.Endpoint = "http://" + n.proxy.Listen
	s := harness.NewSite(t, store, "1GiB", 2*time.Second, "{name: fio, size: 64MiB}, {name: small, size: 16MiB}")
	g := harness.Serve(t, "--config", s.Config)

	h.setCalm(false)
	n.toxic(`{"name": "slow", "type": "latency", "stream": "downstream", "attributes": {"latency": 300, "jitter": 200}}`)
	ctx, cancel := context.WithTimeout(t.Context(), run)
	defer cancel()
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() { n.misbehave(ctx) })
	var worst time.Duration
	writes := 0
	wg.Go(func() { writes, worst = smallWrites(ctx, t, g.URIs[1]) })
	passes := 0
	for ctx.Err() == nil && !t.Failed() {
		passes++
		fio(t, g.URIs[0], seed+uint64(passes))
	}
	wg.Wait()
	if worst > stallMax {
		t.Errorf("a small write took %v", worst)
	}
	harness.WaitPublished(t, "fio", "--config", s.Config)
	if code := g.Stop(); code != 0 {
		t.Errorf("exit %d", code)
	}
	if err := os.RemoveAll(s.Tier); err != nil {
		t.Fatal(err)
	}
	g = serveAgain(t, s.Config)
	fio(t, g.URIs[0], seed+uint64(passes), "--verify_only")

	t.Logf("COUNT %v; %d blackholes, %d times all connections reset; %d passes of fio, %d small writes, the slowest %v; upload amplification %.3f",
		h, n.blackholes, n.resets, passes, writes, worst, h.amplification())
	if h.all() == 0 || n.blackholes == 0 || n.resets == 0 || passes == 0 || writes == 0 {
		t.Error("not every fault was met, or nothing was done meanwhile")
	}
	if amp := h.amplification(); amp > ampMax {
		t.Errorf("%.3f bytes were put for each byte stored, at most %.2f are allowed", amp, ampMax)
	}
	h.setCalm(true)
	n.clear()
}

// serveAgain starts a gateway on targets that fail at random: opening asks for some things only once, and an
// operator would try again.
func serveAgain(t *testing.T, config string) *harness.Gateway {
	t.Helper()
	var errs []error
	for range 5 {
		g, err := harness.TryServe(t, "--config", config)
		if err == nil {
			return g
		}
		errs = append(errs, err)
	}
	t.Fatal(errors.Join(errs...))
	return nil
}

// fio writes all of the disk at random, at 18 MB/s so that the log stays far from full, and verifies it, or verifies what that seed wrote.
func fio(t *testing.T, uri string, seed uint64, more ...string) {
	t.Helper()
	harness.Must(t, "fio", append([]string{
		"--name=verify", "--ioengine=nbd", "--uri=" + uri, "--rw=randwrite", "--bs=12k", "--size=24m",
		"--iodepth=8", "--rate_iops=1500", "--verify=crc32c", "--verify_fatal=1", "--do_verify=1", "--verify_state_save=0",
		"--randseed=" + strconv.FormatUint(seed%1e9+1, 10),
	}, more...)...)
}

// smallWrites sends small durable writes, one at a time, until ctx ends, and times the slowest.
func smallWrites(ctx context.Context, t *testing.T, uri string) (n int, worst time.Duration) {
	c, err := nbdclient.Dial(t.Context(), uri, nbdclient.Options{})
	if err != nil {
		t.Error(err)
		return 0, 0
	}
	defer c.Close()
	p := make([]byte, 4096)
	for ctx.Err() == nil {
		start := time.Now()
		off := int64(n*7919%4096) * 4096
		if err := errors.Join(c.WriteAt(t.Context(), p, off, false), c.Flush(t.Context())); err != nil {
			t.Error(err)
			return n, worst
		}
		worst = max(worst, time.Since(start))
		n++
		select { // it is there to be timed, not to fill the log
		case <-time.After(5 * time.Millisecond):
		case <-ctx.Done():
		}
	}
	return n, worst
}

// network is a proxy with faults of its own.
type network struct {
	t                  *testing.T
	proxy              *toxiproxy.Proxy
	blackholes, resets int
}

func newNetwork(t *testing.T, upstream string) *network {
	t.Helper()
	srv := toxiproxy.NewServer(toxiproxy.NewMetricsContainer(prometheus.NewRegistry()), zerolog.Nop())
	n := &network{t: t, proxy: toxiproxy.NewProxy(srv, "store", "127.0.0.1:0", upstream)}
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

func (n *network) clear() { n.proxy.Toxics.ResetToxics(context.Background()) }

// misbehave swallows everything for 20 s of each minute and resets all connections now and then.
func (n *network) misbehave(ctx context.Context) {
	start := time.Now()
	nextReset := resetEvery
	for step := time.NewTicker(200 * time.Millisecond); ; {
		select {
		case <-ctx.Done():
			step.Stop()
			return
		case <-step.C:
		}
		at := time.Since(start)
		if in := at % time.Minute; in >= blackholeFrom && in < blackholeFrom+blackholeFor && int(at/time.Minute) >= n.blackholes {
			n.blackholes++
			n.toxic(`{"name": "hole-up", "type": "timeout", "stream": "upstream", "attributes": {"timeout": 0}}`)
			n.toxic(`{"name": "hole-down", "type": "timeout", "stream": "downstream", "attributes": {"timeout": 0}}`)
			select {
			case <-ctx.Done():
			case <-time.After(blackholeFor):
			}
			n.remove("hole-up")
			n.remove("hole-down")
			continue
		}
		if at >= nextReset {
			nextReset = at + resetEvery
			n.resets++
			n.toxic(`{"name": "reset", "type": "reset_peer", "stream": "downstream", "attributes": {"timeout": 0}}`)
			n.remove("reset")
		}
	}
}
