package root

import (
	"flag"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
)

var (
	flagSchedules = flag.Uint64("schedules", 0, "random schedules of the model test; default 8000, fewer with -race")
	flagSeed      = flag.Uint64("seed", 1, "first seed of the model test")
	flagTrace     = flag.Bool("trace", false, "run one schedule, -seed, and print it")
)

// stepsMax bounds one schedule.
const stepsMax = 100

// schedules is how many to run.
func schedules() uint64 {
	if *flagSchedules == 0 {
		return schedulesDefault
	}
	return *flagSchedules
}

// schedule runs one seed and returns what the checker found, and how much went on.
func schedule(seed uint64, p plantedFault, verbose bool) *world {
	w := newWorld(seed, p)
	w.verbose = verbose
	w.run(stepsMax)
	return w
}

// TestSchedulesKeepTheRegister drives 2 or 3 contenders on 1 to 3 targets through random schedules of
// lost, late, repeated and reordered requests, deadlines, crashes and wiped targets.
func TestSchedulesKeepTheRegister(t *testing.T) {
	if *flagTrace {
		synctest.Test(t, func(t *testing.T) {
			w := schedule(*flagSeed, plantedFault{}, true)
			t.Logf("seed %d:\n%sviolation: %q", *flagSeed, w.trace.String(), w.chk.violation)
		})
		return
	}
	const lanes = 2 // each is one thread at heart
	for lane := range uint64(lanes) {
		n := schedules() / lanes
		first := *flagSeed + lane*n
		t.Run(fmt.Sprintf("seeds=%d-%d", first, first+n-1), func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) { runSchedules(t, first, n) })
		})
	}
}

func runSchedules(t *testing.T, first, n uint64) {
	var claims, takeovers, commits uint64
	for seed := first; seed < first+n; seed++ {
		w := schedule(seed, plantedFault{}, false)
		if w.chk.violation != "" {
			t.Fatalf("seed %d: %s", seed, w.chk.violation)
		}
		for _, o := range w.chk.ops[:len(w.chk.ops)-1] { // all but the last claim, which always succeeds
			switch {
			case !o.claim:
				commits++
			case w.chk.ballots[o.ballot] != nil:
				takeovers++
			default:
				claims++
			}
		}
	}
	t.Logf("COUNT %d claims, %d takeovers, %d commits", claims, takeovers, commits)
	if claims < n/2 || takeovers < n/10 || commits < n/2 {
		t.Errorf("the schedules do too little to prove anything")
	}
}

// TestSchedulesRepeat runs a seed twice and expects the same to happen.
func TestSchedulesRepeat(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for seed := range uint64(200) {
			if a, b := schedule(seed, plantedFault{}, true), schedule(seed, plantedFault{}, true); a.trace.String() != b.trace.String() {
				la, lb := strings.Split(a.trace.String(), "\n"), strings.Split(b.trace.String(), "\n")
				i := 0
				for i < min(len(la), len(lb))-1 && la[i] == lb[i] {
					i++
				}
				t.Fatalf("seed %d ran in two ways, from event %d on:\n%s\n%s", seed, i, la[i], lb[i])
			}
		}
	})
}

// TestPlantedFaultsAreFound breaks one rule at a time; the same schedules must notice.
func TestPlantedFaultsAreFound(t *testing.T) {
	const enough = 20000
	for _, p := range []plantedFault{
		{name: "a claim in a single phase", change: func(r *rules) {
			r.promise = func(o Copy, b Ballot) (Copy, verdict) { return o, done }
		}},
		{name: "accept forgets what was promised", change: func(r *rules) {
			r.accept = func(o Copy, b Ballot, ver uint64, val Value) (Copy, verdict) {
				o.Promised = b
				return accept(o, b, ver, val)
			}
		}},
		{name: "promise forgets a higher promise", change: func(r *rules) {
			r.promise = func(o Copy, b Ballot) (Copy, verdict) {
				o.Promised = b
				return o, change
			}
		}},
		{name: "the adopted owner is not checked again", change: func(r *rules) {
			r.recheck = func(func(Copy) error, Copy) error { return nil }
		}},
		{name: "a missing copy has promised nothing", emptyCopies: true},
		{name: "two values under one version", change: func(r *rules) {
			r.version = func(ver uint64, _, _ bool) uint64 { return ver }
		}},
		{name: "no reply means no effect", change: func(r *rules) {
			r.version = func(ver uint64, unknown, _ bool) uint64 {
				if unknown {
					return ver
				}
				return ver + 1
			}
		}},
	} {
		t.Run(p.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				for seed := *flagSeed; seed < *flagSeed+enough; seed++ {
					if w := schedule(seed, p, false); w.chk.violation != "" {
						t.Logf("seed %d, schedule %d: %s", seed, seed-*flagSeed+1, w.chk.violation)
						return
					}
				}
				t.Errorf("not found in %d schedules", enough)
			})
		})
	}
}
