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
	findTimeout  = 2 * time.Minute // of one processor, in which the generator must find every bug
	replays      = 3               // of a stored seed: one history in fifty goes another way, see TestCrashRepeats
	findPatience = 8 * time.Minute // by the clock on the wall, on a machine that has other work
)

// TestPlanted expects TestCrash, which knows nothing of them, to find every planted bug: by the seed that
// found it before, or, where the code has changed since, by fresh ones within findTimeout. With
// GRAINDISK_FIND=1 it looks for fresh seeds only and stores them.
func TestPlanted(t *testing.T) {
	stored := map[string]uint64{}
	var list []finding
	b, err := os.ReadFile(findingsFile)
	if err == nil {
		err = json.Unmarshal(b, &list)
	}
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	for _, f := range list {
		stored[f.Bug] = f.Seed
	}
	anew := os.Getenv("GRAINDISK_FIND") != ""
	var mu sync.Mutex
	replayed := 0
	limit := make(chan struct{}, runtime.GOMAXPROCS(0))
	t.Run("bugs", func(t *testing.T) {
		for _, p := range planted.Catalogue {
			t.Run(p.Name, func(t *testing.T) {
				t.Parallel()
				limit <- struct{}{}
				defer func() { <-limit }()
				seed, ok := stored[p.Name]
				if ok && !anew {
					for range replays {
						if h := hunt(t, p.Name, seed, 0); h.found {
							mu.Lock()
							defer mu.Unlock()
							replayed++
							t.Logf("%s: replayed GRAINDISK_SEED=%d in %v: %s", p.Name, seed, h.took.Round(time.Millisecond), h.what)
							return
						}
					}
					t.Logf("the stored GRAINDISK_SEED=%d does not show it any more", seed)
				}
				h := hunt(t, p.Name, uint64(time.Now().UnixNano()), findTimeout)
				if !h.found {
					t.Fatalf("%s: not found in %d histories, %v", p.Name, h.histories, h.took.Round(time.Second))
				}
				if anew {
					keep(t, p.Name, &h)
				}
				t.Logf("%s: found in %d histories, %v, by GRAINDISK_SEED=%d: %s", p.Name, h.histories, h.took.Round(time.Millisecond), h.seed, h.what)
				mu.Lock()
				defer mu.Unlock()
				stored[p.Name] = h.seed
			})
		}
	})
	t.Logf("COUNT %d planted bugs, %d found by their stored seed", len(planted.Catalogue), replayed)
	if anew {
		storeFindings(t, stored)
	}
}

// keep goes on from a finding until one is found again from its seed alone, three times in a row; if there is
// no time for that the last one has to do.
func keep(t *testing.T, bug string, h *hunted) {
	for h.took < findTimeout {
		again := true
		for range 3 {
			again = again && hunt(t, bug, h.seed, 0).found
		}
		if again {
			return
		}
		next := hunt(t, bug, h.seed+1, findTimeout-h.took)
		if !next.found {
			return
		}
		next.took, next.histories = next.took+h.took, next.histories+h.histories
		*h = next
	}
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
	found     bool
	seed      uint64
	histories int
	took      time.Duration // of processors
	what      string
}

var (
	historyLine = regexp.MustCompile(`(?m)^history GRAINDISK_SEED=(\d+)$`)
	failureLine = regexp.MustCompile(`(?m)^.*(crash_test.go:\d+: GRAINDISK_SEED=|panic: |fatal error: ).*$`)
)

// hunt runs TestCrash with a bug in a process of its own, since it may well panic or hang: one history, or
// as many as it takes and there is time for.
func hunt(t *testing.T, bug string, seed uint64, long time.Duration) (h hunted) {
	cmd := exec.Command(os.Args[0], "-test.run=^TestCrash$", "-test.timeout=15m")
	cmd.Env = append(slices.Clone(os.Environ()), "GRAINDISK_PLANTED="+bug, fmt.Sprintf("GRAINDISK_SEED=%d", seed), "GRAINDISK_SOAK=")
	if long > 0 {
		cmd.Env = append(cmd.Env, "GRAINDISK_SOAK="+findPatience.String(), "GRAINDISK_CPU="+long.String())
	}
	out, err := cmd.CombinedOutput()
	h.took, h.found = cmd.ProcessState.UserTime()+cmd.ProcessState.SystemTime(), err != nil
	lines := historyLine.FindAllSubmatch(out, -1)
	h.histories = len(lines)
	if h.histories == 0 {
		t.Fatalf("no history was run: %v\n%s", err, out)
	}
	h.seed, _ = strconv.ParseUint(string(lines[len(lines)-1][1]), 10, 64)
	h.what = strings.TrimSpace(string(failureLine.Find(out)))
	if h.what == "" && h.found {
		h.what = string(bytes.TrimSpace(out[max(0, len(out)-300):]))
	}
	return h
}
