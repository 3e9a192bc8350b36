package faults

import (
	"context"
	"errors"
	"fmt"
	"net/http/httptest"
	"os"
	"strconv"
	"sync"
	"testing"
	"time"

	"graindisk/backend/backendtest/azuritetest"
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
	shortRun  = time.Minute      // GRAINDISK_SOAK, if longer, up to an hour
	racingRun = 30 * time.Second // under the race detector
	stallMax  = 5 * time.Second  // no write waits longer: the log is far from full
	ampMax    = 1.1
	ampRacing = 1.3 // half a minute puts little, and what a blackhole interrupts is a good part of it
)

// TestGuestsNoticeNothing puts between gateway and store a handler that refuses, forgets to answer, answers twice
// and cuts short, and a network that is slow, resets connections and for a third of each minute swallows
// everything. Beside the load that fio verifies, a client times small durable writes. Then what was written is
// read by a gateway that has to fetch all of it through the same faults.
func TestGuestsNoticeNothing(t *testing.T) {
	seed := newSeed(t)
	store := miniotest.Start(t)
	f := newFront(t, "MinIO", store.Endpoint, seed)
	store.Endpoint = f.endpoint
	guestsNoticeNothing(t, seed, []*front{f}, []string{harness.S3Target(t, store), harness.S3Target(t, store), harness.S3Target(t, store)})
}

// TestGuestsNoticeNothingOnTwoKinds is the same on stores of two kinds, each behind a handler and a network of its
// own: now one fails and now the other.
func TestGuestsNoticeNothingOnTwoKinds(t *testing.T) {
	seed := newSeed(t)
	m, a := miniotest.Start(t), azuritetest.Start(t)
	fm, fa := newFront(t, "MinIO", m.Endpoint, seed), newFront(t, "Azurite", a.Endpoint, seed+1)
	m.Endpoint, a.Endpoint = fm.endpoint, fa.endpoint+"/"+azuritetest.Account
	fa.n.lag = fm.n.lag + fm.n.holeFor/2 // for half of each hole both are away
	guestsNoticeNothing(t, seed, []*front{fm, fa}, []string{
		harness.S3Target(t, m), harness.AzureTarget(t, a), harness.S3Target(t, m), harness.AzureTarget(t, a),
	})
}

func newSeed(t *testing.T) uint64 {
	t.Helper()
	seed := uint64(time.Now().UnixNano())
	if s := os.Getenv("GRAINDISK_SEED"); s != "" {
		var err error
		if seed, err = strconv.ParseUint(s, 10, 64); err != nil {
			t.Fatal("GRAINDISK_SEED:", err)
		}
	}
	t.Logf("seed %d", seed)
	return seed
}

// length is how long the load lasts.
func length(t *testing.T) time.Duration {
	t.Helper()
	run := shortRun
	if racing() {
		run = racingRun
	}
	if s := os.Getenv("GRAINDISK_SOAK"); s != "" {
		d, err := time.ParseDuration(s)
		if err != nil {
			t.Fatal("GRAINDISK_SOAK:", err)
		}
		run = max(run, min(d, time.Hour))
	}
	return run
}

func racing() bool { return os.Getenv("GRAINDISK_RACE") == "1" }

// front is what stands before one store.
type front struct {
	name     string
	endpoint string // of the network, which leads to the handler
	h        *handler
	n        *network
}

func newFront(t *testing.T, name, store string, seed uint64) *front {
	t.Helper()
	h := newHandler(t, store, seed)
	web := httptest.NewServer(h)
	t.Cleanup(web.Close)
	n := newNetwork(t, web.Listener.Addr().String())
	return &front{name, "http://" + n.proxy.Listen, h, n}
}

func (f *front) String() string { return fmt.Sprintf("%s: %v; %v", f.name, f.h, f.n) }

func guestsNoticeNothing(t *testing.T, seed uint64, fronts []*front, targets []string) {
	harness.Need(t, "fio")
	s := harness.NewSiteOn(t, targets, "1GiB", 2*time.Second, "{name: fio, size: 64MiB}, {name: small, size: 16MiB}")
	g := harness.Serve(t, "--config", s.Config)
	ctx, cancel := context.WithTimeout(t.Context(), length(t))
	defer cancel()
	var wg sync.WaitGroup
	defer wg.Wait()
	for _, f := range fronts {
		f.h.setCalm(false)
		wg.Go(func() { f.n.misbehave(ctx) })
	}
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
	for reads := 0; reads < 5 && (reads == 0 || !allMet(fronts)); reads++ {
		if code := g.Stop(); code != 0 {
			t.Fatalf("exit %d", code)
		}
		if err := os.RemoveAll(s.Tier); err != nil {
			t.Fatal(err)
		}
		g = serveAgain(t, s.Config)
		fio(t, g.URIs[0], seed+uint64(passes), "--verify_only")
	}
	var sent, stored int64
	for _, f := range fronts {
		fs, fst := f.h.volume()
		sent, stored = sent+fs, stored+fst
		t.Logf("COUNT %v", f)
		f.h.setCalm(true)
	}
	amp := float64(sent) / float64(max(stored, 1))
	t.Logf("COUNT %d passes of fio, %d small writes, the slowest %v; upload amplification %.3f", passes, writes, worst, amp)
	if !allMet(fronts) || passes == 0 || writes == 0 {
		t.Error("not every fault was met, or nothing was done meanwhile")
	}
	limit := ampMax
	if racing() {
		limit = ampRacing
	}
	if amp > limit {
		t.Errorf("%.3f bytes were put for each byte stored, at most %.2f are allowed", amp, limit)
	}
}

// allMet tells whether every fault of every front was met.
func allMet(fronts []*front) bool {
	for _, f := range fronts {
		if !f.h.all() || f.n.holes == 0 || f.n.resets == 0 {
			return false
		}
	}
	return true
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
