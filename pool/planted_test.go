//go:build planted

package pool

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"graindisk/internal/planted"
)

// A finding is a history of TestCrash that shows a planted bug.
type finding struct {
	Bug  string `json:"bug"`
	Seed uint64 `json:"seed"`
}

const (
	findingsFile = "testdata/planted.json"
	replays      = 3                // of a stored seed: one history in fifty goes another way, see TestCrashRepeats
	findSlice    = 10 * time.Second // of one processor, for one bug before it is the next one's turn
	findBudget   = 5 * time.Minute  // of all processors, for all bugs that their stored seeds do not find
	findEach     = 2 * time.Minute  // of one processor, for one bug whose seed is to be stored
	findPatience = 12 * time.Minute // by the clock on the wall, on a machine that has other work
)

// TestPlanted expects TestCrash, which knows nothing of them, to find every planted bug: by the seed that
// found it before, or, where the code has changed since, by those that follow. All of them together may take
// findBudget, a slice each in turn, so that the time of this test is bounded, however many seeds are stale, and what it
// finds is the same each time.
//
// With GRAINDISK_FIND=stale it looks for fresh seeds of the bugs that their stored ones do not find, and stores
// them; with GRAINDISK_FIND=all of all. With GRAINDISK_PLANTED it is about that bug alone.
func TestPlanted(t *testing.T) {
	f := &finder{t: t, mode: os.Getenv("GRAINDISK_FIND"), stored: map[string]uint64{}, turn: make(chan struct{}, runtime.GOMAXPROCS(0)), start: time.Now()}
	if f.mode != "" && f.mode != "stale" && f.mode != "all" {
		t.Fatalf("GRAINDISK_FIND=%s: it may be stale or all", f.mode)
	}
	var list []finding
	b, err := os.ReadFile(findingsFile)
	if err == nil {
		err = json.Unmarshal(b, &list)
	}
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	for _, x := range list {
		f.stored[x.Bug] = x.Seed
	}
	var all sync.WaitGroup
	bugs := 0
	for _, p := range planted.Catalogue {
		if only := os.Getenv("GRAINDISK_PLANTED"); only == "" || only == p.Name {
			bugs++
			seed, ok := f.stored[p.Name]
			all.Go(func() { f.find(p.Name, seed, ok) })
		}
	}
	all.Wait()
	if bugs == 0 {
		t.Fatal("GRAINDISK_PLANTED names no bug")
	}
	t.Logf("COUNT %d planted bugs, %d found by their stored seed, the others in %v of processors", bugs, f.replayed, f.used.Round(time.Second))
	if f.mode != "" {
		storeFindings(t, f.stored)
	}
}

// finder looks for all bugs at once.
type finder struct {
	t     *testing.T
	mode  string        // GRAINDISK_FIND
	turn  chan struct{} // who waits to send gets it in turn
	start time.Time

	mu       sync.Mutex
	stored   map[string]uint64
	replayed int
	used     time.Duration // of processors, for bugs that their stored seeds do not find
}

// find looks for one bug.
func (f *finder) find(bug string, seed uint64, stored bool) {
	if stored && f.mode != "all" {
		if f.replay(bug, seed) {
			return
		}
		f.t.Logf("%s: the stored GRAINDISK_SEED=%d does not show it any more", bug, seed)
	}
	next := seed + 1
	if f.mode != "" {
		next = uint64(time.Now().UnixNano())
	}
	var took time.Duration
	for histories := 0; f.goesOn(took); {
		f.turn <- struct{}{}
		h, err := hunt(bug, next, findSlice)
		<-f.turn
		if err != nil {
			f.t.Errorf("%s: %v", bug, err)
			return
		}
		took, histories, next = took+h.took, histories+h.histories, h.seed+1
		f.mu.Lock()
		f.used += h.took
		f.mu.Unlock()
		if h.failed && f.proves(bug, &h) && (f.mode == "" || f.again(bug, h.seed) || !f.goesOn(took)) {
			f.t.Logf("%s: found in %d histories, %v, by GRAINDISK_SEED=%d: %s", bug, histories, took.Round(time.Millisecond), h.seed, h.what)
			f.mu.Lock()
			defer f.mu.Unlock()
			f.stored[bug] = h.seed
			return
		}
	}
	f.t.Errorf("%s: not found, in %v of a processor", bug, took.Round(time.Second))
}

// goesOn tells whether there is time left to look for a bug.
func (f *finder) goesOn(took time.Duration) bool {
	if f.mode != "" {
		return took < findEach
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.used < findBudget && time.Since(f.start) < findPatience
}

// replay runs the history of a stored seed, and again if it did not show the bug.
func (f *finder) replay(bug string, seed uint64) bool {
	for range replays {
		f.turn <- struct{}{}
		h, err := hunt(bug, seed, 0)
		<-f.turn
		if err != nil {
			f.t.Errorf("%s: %v", bug, err)
			return true
		}
		if h.failed && f.proves(bug, &h) {
			f.t.Logf("%s: replayed GRAINDISK_SEED=%d in %v: %s", bug, seed, h.took.Round(time.Millisecond), h.what)
			f.mu.Lock()
			defer f.mu.Unlock()
			f.replayed++
			return true
		}
	}
	return false
}

// again tells whether the seed alone shows the bug, three times in a row.
func (f *finder) again(bug string, seed uint64) bool {
	f.turn <- struct{}{}
	defer func() { <-f.turn }()
	for range 3 {
		if h, err := hunt(bug, seed, 0); err != nil || !h.failed {
			return false
		}
	}
	return true
}

// proves tells whether a history failed because of the bug: without it the same seed must do no harm, or there is a
// bug that nobody planted. One that was ended because it ran away says nothing of what went wrong.
func (f *finder) proves(bug string, h *hunted) bool {
	if runAway.MatchString(h.what) {
		f.t.Logf("%s: ran away: %s", bug, h.what)
		return false
	}
	f.turn <- struct{}{}
	defer func() { <-f.turn }()
	sound, err := hunt("", h.seed, 0)
	if err != nil || sound.failed {
		f.t.Errorf("GRAINDISK_SEED=%d fails without a planted bug as well: %v %s", h.seed, err, sound.what)
		return false
	}
	return true
}

func storeFindings(t *testing.T, stored map[string]uint64) {
	var list []finding
	for _, p := range planted.Catalogue {
		if seed, ok := stored[p.Name]; ok {
			list = append(list, finding{p.Name, seed})
		}
	}
	b, err := json.MarshalIndent(list, "", "\t")
	if err == nil {
		err = os.WriteFile(findingsFile, append(b, '\n'), 0o644)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// hunted is what a run of TestCrash with a bug gave.
type hunted struct {
	failed    bool
	seed      uint64 // of the last history
	histories int
	took      time.Duration // of processors
	what      string
}

var (
	historyLine = regexp.MustCompile(`(?m)^history GRAINDISK_SEED=(\d+)$`)
	failureLine = regexp.MustCompile(`(?m)^.*(crash_test.go:\d+: GRAINDISK_SEED=|panic: |fatal error: ).*$`)
	runAway     = regexp.MustCompile(`^panic: GRAINDISK_SEED=\d+ (takes|goes round)`) // see watchHistory
)

// hunt runs TestCrash with a bug, or none, in a process of its own, since it may well panic or hang: one history, or
// as many as it takes and there is time for.
func hunt(bug string, seed uint64, long time.Duration) (h hunted, err error) {
	cmd := exec.Command(os.Args[0], "-test.run=^TestCrash$", "-test.timeout=15m")
	cmd.Env = append(slices.Clone(os.Environ()), "GRAINDISK_PLANTED="+bug, fmt.Sprintf("GRAINDISK_SEED=%d", seed), "GRAINDISK_SOAK=", "GRAINDISK_FRESH=")
	if long > 0 {
		cmd.Env = append(cmd.Env, "GRAINDISK_FRESH="+findPatience.String(), "GRAINDISK_CPU="+long.String())
	}
	out, err := cmd.CombinedOutput()
	lines := historyLine.FindAllSubmatch(out, -1)
	if h.histories = len(lines); h.histories == 0 {
		return h, fmt.Errorf("no history was run: %w\n%s", err, out)
	}
	h.took, h.failed = cmd.ProcessState.UserTime()+cmd.ProcessState.SystemTime(), err != nil
	h.seed, err = strconv.ParseUint(string(lines[len(lines)-1][1]), 10, 64)
	h.what = strings.TrimSpace(string(failureLine.Find(out)))
	if h.what == "" && h.failed {
		h.what = string(bytes.TrimSpace(out[max(0, len(out)-300):]))
	}
	return h, err
}
