package root

import (
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
)

// The places of the first members.
var (
	one   = []int{0}
	two   = []int{0, 1}
	three = []int{0, 1, 2}
)

// replaceAt puts m in the place of the i-th member.
func replaceAt(i int) func(old []Member, m Member) []Member {
	return func(old []Member, m Member) []Member {
		ms := slices.Clone(old)
		ms[i] = m
		return ms
	}
}

// addOne adds m to the members.
func addOne(old []Member, m Member) []Member { return append(slices.Clone(old), m) }

// searched is a scenario and how many of its states are visited, unless there are fewer.
type searched struct {
	scenario
	states int
}

var searches = []searched{
	{scenario{name: "one target", places: 1, first: one, contenders: 2, claims: 2, commits: 2,
		switches: -1, epochMax: 8}, 60_000},
	{scenario{name: "one target that fails, hosts that release and die", places: 1, first: one, contenders: 2, claims: 2, commits: 2,
		release: true, faults: 1, crashes: 1, switches: -1, epochMax: 6}, 60_000},
	{scenario{name: "two targets", places: 2, first: two, contenders: 2, claims: 2, commits: 2,
		switches: -1, epochMax: 6}, 60_000},
	{scenario{name: "two targets, a host and its clone", places: 2, first: two, contenders: 2, claims: 2, commits: 2, oneLog: true,
		switches: 3, inOrder: true, patience: true, epochMax: 6}, 60_000},
	{scenario{name: "three targets", places: 3, first: three, contenders: 2, claims: 2, commits: 2,
		switches: -1, epochMax: 6}, 300_000},
	{scenario{name: "three targets, in turns", places: 3, first: three, contenders: 2, claims: 3, commits: 2,
		switches: 2, inOrder: true, patience: true, epochMax: 7}, 40_000},
	{scenario{name: "three targets in order, one fault, in turns", places: 3, first: three, contenders: 2, claims: 3, commits: 2,
		faults: 1, switches: 2, inOrder: true, patience: true, epochMax: 7}, 100_000},
	{scenario{name: "three targets that fail and are erased, hosts that die", places: 3, first: three, contenders: 2, claims: 2, commits: 2,
		faults: 2, crashes: 1, wipes: 1, switches: -1, epochMax: 6}, 150_000},
	{scenario{name: "three hosts", places: 3, first: three, contenders: 3, claims: 2, commits: 2,
		faults: 1, switches: -1, epochMax: 6}, 100_000},
	{scenario{name: "a target is replaced", places: 3, first: three, contenders: 2, claims: 2, commits: 1,
		wipes: 1, seeds: 1, place: 2, next: replaceAt(2), switches: 2, inOrder: true, patience: true, epochMax: 6}, 150_000},
	{scenario{name: "the only target is replaced", places: 2, first: one, contenders: 2, claims: 2, commits: 1,
		faults: 1, seeds: 1, place: 1, next: replaceAt(0), switches: 3, inOrder: true, patience: true, epochMax: 6}, 100_000},
	{scenario{name: "a target is added", places: 3, first: two, contenders: 2, claims: 2, commits: 1,
		seeds: 1, place: 2, next: addOne, switches: 2, inOrder: true, epochMax: 6}, 100_000},
	{scenario{name: "a change is finished or taken back", places: 3, first: one, joint: three[1:], contenders: 2, claims: 2, commits: 1,
		next: addOne, back: true, switches: 2, inOrder: true, epochMax: 6}, 150_000},
}

// TestEveryScheduleKeepsTheRegister visits the states of each scenario, nearest first: all there are, or
// all within the depth it tells. With GRAINDISK_SOAK set it visits five times as many.
func TestEveryScheduleKeepsTheRegister(t *testing.T) {
	total := 0
	for _, s := range searches {
		t.Run(strings.ReplaceAll(s.name, " ", "_"), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				x := newSearch(s.scenario)
				x.run(s.states * searchPercent() / 100)
				x.tell(t)
				total += len(x.parents)
				if x.bad != "" {
					t.Error(x.trace())
				}
			})
		})
	}
	t.Logf("COUNT %d states in all", total)
}

func searchPercent() int {
	if os.Getenv("GRAINDISK_SOAK") != "" {
		return 5 * searchPercentDefault
	}
	return searchPercentDefault
}

func (x *search) tell(t *testing.T) {
	whole := "all within"
	if x.complete {
		whole = "all there are, to"
	}
	t.Logf("COUNT %d states, %s depth %d; %d events, %d steps of the register, %d copies, %d pasts; %d states where each has 2 claims and 2 commits behind it; %d ends at the highest epoch",
		len(x.parents), whole, x.depth, x.events, x.d.steps, len(x.d.contents), len(x.past.all), x.far, x.pruned)
	if x.dropped > 0 {
		t.Logf("%d late puts dropped for want of room", x.dropped)
	}
}

// TestSituationsAreTheSame takes situations that were reached in two ways and held to be one, and has the
// register show after the second way what was found after the first.
func TestSituationsAreTheSame(t *testing.T) {
	const registerFields, targetFields, tenureFields = 13, 4, 6 // that session copies
	for typ, want := range map[reflect.Type]int{
		reflect.TypeFor[Register](): registerFields, reflect.TypeFor[target](): targetFields, reflect.TypeFor[tenure](): tenureFields,
	} {
		if typ.NumField() != want {
			t.Errorf("%v has %d fields; does stepper.session copy them, and stepper.node tell them apart?", typ, typ.NumField())
		}
	}
	for _, s := range searches {
		t.Run(strings.ReplaceAll(s.name, " ", "_"), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				x := newSearch(s.scenario)
				x.run(twinStates)
				compared := 0
				for i, n := range x.d.nodes[:len(x.d.nodes):len(x.d.nodes)] {
					if n.twin == nil {
						continue
					}
					for e, want := range n.steps {
						compared++
						if got := x.d.run(n.twin.base, n.twin.path, e); got != want {
							t.Fatalf("situation %d: after %+v it goes on to %+v by %+v, and after %+v to %+v", i, n.path, want, e, n.twin.path, got)
						}
					}
				}
				t.Logf("COUNT %d steps compared, of %d situations", compared, len(x.d.nodes))
				if compared == 0 {
					t.Error("nothing was compared")
				}
			})
		})
	}
}

// TestPlantedFaultsAreFoundBySearch breaks one rule at a time.
func TestPlantedFaultsAreFoundBySearch(t *testing.T) {
	erased := scenario{places: 3, first: three, contenders: 2, claims: 1, commits: 1, switches: 1, inOrder: true, epochMax: 5, wipes: 1}
	small := scenario{places: 1, first: one, contenders: 2, claims: 2, commits: 2, switches: -1, epochMax: 5, faults: 2, crashes: 1}
	seeded := erased
	seeded.seeds, seeded.place, seeded.next, seeded.oldSeed = 1, 1, replaceAt(1), true
	moved := scenario{places: 2, first: one, contenders: 2, claims: 2, commits: 1, faults: 2,
		seeds: 1, place: 1, next: replaceAt(0), switches: -1, epochMax: 5}
	jump := moved
	jump.jump, jump.switches, jump.faults = true, 1, 0
	for _, c := range []struct {
		name string
		scenario
		change      func(*rules)
		emptyCopies bool
	}{
		{"a claim in a single phase", small, func(r *rules) {
			r.promise = func(o Copy, b Ballot) (Copy, verdict) { return o, done }
		}, false},
		{"accept forgets what was promised", small, func(r *rules) {
			r.accept = func(o Copy, b Ballot, ver uint64, val Value) (Copy, verdict) {
				o.Promised = b
				return accept(o, b, ver, val)
			}
		}, false},
		{"promise forgets a higher promise", small, func(r *rules) {
			r.promise = func(o Copy, b Ballot) (Copy, verdict) {
				o.Promised = b
				return o, change
			}
		}, false},
		{"the adopted owner is not checked again", small, func(r *rules) {
			r.recheck = func(func(Copy) error, Copy) error { return nil }
		}, false},
		{"an erased copy has promised nothing", erased, nil, true},
		{"two values under one version", small, func(r *rules) {
			r.version = func(ver uint64, _, _ bool) uint64 { return ver }
		}, false},
		{"a lost reply means no effect", small, func(r *rules) {
			r.version = func(ver uint64, unknown, _ bool) uint64 {
				if unknown {
					return ver
				}
				return ver + 1
			}
		}, false},
		{"a seed counts as the member it replaces", seeded, nil, false},
		{"members change in one step", jump, func(r *rules) {
			r.follows = func(Config, Config) error { return nil }
		}, false},
		{"the old members alone decide in a change", moved, func(r *rules) {
			r.quorum = func(_, c Config, has func(string) bool) bool { return Config{Members: c.Members}.Quorum(has) }
		}, false},
	} {
		t.Run(strings.ReplaceAll(c.name, " ", "_"), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c.scenario.planted = plantedFault{change: c.change, emptyCopies: c.emptyCopies}
				x := newSearch(c.scenario)
				x.run(1_000_000)
				x.tell(t)
				if x.bad == "" {
					t.Fatal("not found")
				}
				t.Logf("found at depth %d:\n%s", x.depth+1, x.trace())
			})
		})
	}
}
