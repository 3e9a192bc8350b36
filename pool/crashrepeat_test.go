package pool

import (
	"strings"
	"testing"
	"time"
)

// TestCrashRepeats runs histories twice each, and expects the same calls in the same order, and the same to be
// durable after every life: a seed that found something finds it again. See crashtest.Sched for what code must
// not do, like asking files in the order of a map.
func TestCrashRepeats(t *testing.T) {
	seed, given := crashSeed(t)
	if !given {
		seed = uint64(time.Now().UnixNano())
	}
	t.Logf("seeds from %d", seed)
	var stats crashStats
	run := func(seed uint64) []string {
		tr, err := runHistory(t, seed, &stats)
		if err != nil {
			t.Error(err)
		}
		return tr.scheduled()
	}
	same, calls := 0, 0
	for i := range uint64(crashRepeats) {
		a, b := run(seed+i), run(seed+i)
		calls += len(a)
		at := 0
		for at < len(a) && at < len(b) && a[at] == b[at] {
			at++
		}
		if at == len(a) && at == len(b) {
			same++
			continue
		}
		t.Logf("GRAINDISK_SEED=%d: %d calls, then %d, which differ from call %d on:", seed+i, len(a), len(b), at)
		for at := max(0, at-10); at < min(len(a), len(b), at+3); at++ {
			t.Logf("  %-50s %s", a[at], b[at])
		}
	}
	t.Logf("COUNT %d of %d histories repeated exactly, of %d calls in all", same, crashRepeats, calls)
	if same < crashRepeatsLeast {
		t.Errorf("only %d of %d histories repeated, want at least %d", same, crashRepeats, crashRepeatsLeast)
	}
	if calls < crashRepeats*1000 {
		t.Errorf("only %d calls in %d histories", calls, crashRepeats)
	}
}

// scheduled is what the scheduler let go on, and what was durable after each life. What the process says is
// left out: when it is dead already, some of that comes in any order.
func (t *trace) scheduled() (list []string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, line := range t.lines {
		if call, ok := strings.CutPrefix(line, tracedCall); ok {
			list = append(list, call)
		} else if strings.HasPrefix(line, tracedState) {
			list = append(list, line)
		}
	}
	return list
}
