package pool

import (
	"fmt"
	"hash/fnv"
	"io"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
)

// crashStats counts what the histories went through.
type crashStats struct {
	histories, opens, checks, twice            atomic.Int64
	crashes                                    [lostHost + 1]atomic.Int64
	inRecovery, atStore, published, ops, exact atomic.Int64
	mapRuns                                    atomic.Int64 // runs in files that opens found
	recounts, compacted, trapped               atomic.Int64

	mu     sync.Mutex
	counts map[string]int64
	states map[uint64]bool // hashes of what was durable when a life had ended
}

// inc counts something by its name.
func (s *crashStats) inc(what string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.counts == nil {
		s.counts = map[string]int64{}
	}
	s.counts[what]++
}

// add counts n of something.
func (s *crashStats) add(what string, n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.counts == nil {
		s.counts = map[string]int64{}
	}
	s.counts[what] += int64(n)
}

func (s *crashStats) count(what string) int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.counts[what]
}

// state notes what is durable now, on the tier and at the targets.
func (s *crashStats) state(w *world) uint64 {
	h := fnv.New64a()
	fmt.Fprint(h, w.fs.Hash())
	for _, g := range w.stores {
		for _, key := range g.Keys() {
			io.WriteString(h, key)
		}
		h.Write(g.root())
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.states == nil {
		s.states = map[uint64]bool{}
	}
	s.states[h.Sum64()] = true
	return h.Sum64()
}

// lines are all counts by name, a few to a line.
func (s *crashStats) lines() (out []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	out = []string{fmt.Sprintf("%d distinct durable states", len(s.states))}
	group := ""
	for _, what := range slices.Sorted(maps.Keys(s.counts)) {
		if g := strings.Fields(what)[0]; g != group {
			group, out = g, append(out, "")
		}
		last := &out[len(out)-1]
		if *last != "" {
			*last += ", "
		}
		*last += fmt.Sprintf("%s: %d", what, s.counts[what])
	}
	return out
}

func (s *crashStats) String() string {
	return fmt.Sprintf("%d histories, %d opens, %d process crashes, %d power cuts, %d lost hosts, %d clean closes; "+
		"%d cut at a request to a target, %d inside recovery; %d states checked, %d of them as exact cuts, %d recovered twice; %d operations, %d publications; "+
		"%d map runs opened; %d usage tables recounted, %d of them after compaction, with %d trapped blocks",
		s.histories.Load(), s.opens.Load(), s.crashes[lostProcess].Load(), s.crashes[lostPower].Load(), s.crashes[lostHost].Load(),
		s.crashes[lostNothing].Load(), s.atStore.Load(), s.inRecovery.Load(), s.checks.Load(), s.exact.Load(), s.twice.Load(),
		s.ops.Load(), s.published.Load(), s.mapRuns.Load(), s.recounts.Load(), s.compacted.Load(), s.trapped.Load())
}

// trace keeps what the world and the pools say, for the day a check fails.
type trace struct {
	mu    sync.Mutex
	lines []string
}

// How lines of a trace begin that TestCrashRepeats compares.
const (
	tracedCall  = "     > "
	tracedState = "---- durable state "
)

// choice notes what the scheduler let go on.
func (t *trace) choice(label string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.lines = append(t.lines, tracedCall+label)
}

// show prints the end of it.
func (t *trace) show(tb testing.TB) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, line := range t.lines[max(0, len(t.lines)-250):] {
		tb.Log(line)
	}
}

func (t *trace) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.lines = append(t.lines, strings.TrimSuffix(string(p), "\n"))
	return len(p), nil
}
