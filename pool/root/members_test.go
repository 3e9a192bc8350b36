package root

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"graindisk/backend/backendtest"
	"graindisk/block"
)

// newMember is one that no pool of these tests has yet.
func newMember(i int) Member {
	return Member{ID: block.TargetID(i + 1), UUID: fmt.Sprintf("m%d", i), Name: fmt.Sprintf("t%d", i)}
}

func (b *bench) seed(r *Register, target int, m Member) {
	b.t.Helper()
	if err := r.Seed(b.t.Context(), b.targets[target].Name, m); err != nil {
		b.t.Fatalf("seed of %s at target %d: %v", m.UUID, target, err)
	}
}

// change makes ms the members, and returns the value after it.
func (b *bench) change(r *Register, v Value, ms []Member) Value {
	b.t.Helper()
	v.Cfg = v.Cfg.Change(ms)
	b.commit(r, v)
	v.Cfg = v.Cfg.Finish()
	b.commit(r, v)
	return v
}

// brief is a context for what cannot succeed.
func (b *bench) brief() context.Context {
	ctx, cancel := context.WithTimeout(b.t.Context(), time.Minute)
	b.t.Cleanup(cancel)
	return ctx
}

// TestReplacedTarget empties one target of three, puts a new member there, and loses another one.
func TestReplacedTarget(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, 3)
		r := b.open()
		v := b.claim(r, "A", nil)
		v.Cut = 1
		b.commit(r, v)
		b.mem[2].Wipe()
		v.Cut = 2
		b.commit(r, v)
		b.seed(r, 2, newMember(3))
		b.seed(r, 2, newMember(3)) // once more does no harm
		v = b.change(r, v, append(slices.Clone(v.Cfg.Members[:2]), newMember(3)))
		b.stores[0].SetOffline(true)
		v.Cut = 3
		b.commit(r, v)
		view, err := b.open().Read(t.Context())
		if err != nil || !view.Committed || view.Best.Val.Cut != 3 || view.Best.Val.Cfg.No != v.Cfg.No {
			t.Fatalf("read: %+v, %v", view, err)
		}
		if got := b.claim(b.open(), "A", nil); got.Cut != 3 || !slices.Equal(got.Cfg.Members, v.Cfg.Members) || got.Cfg.Next != nil {
			t.Errorf("claimed %+v", got)
		}
	})
}

// TestSeedRefuses seeds where it may not; nothing is written.
func TestSeedRefuses(t *testing.T) {
	other := emptyBench(t, 1)
	if err := Create(t.Context(), other.targets, "other pool", firstValue(1)); err != nil {
		t.Fatal(err)
	}
	foreign := other.mem[0].Objects()[Key]
	for _, c := range []struct {
		name   string
		do     func(b *bench)
		target string
		m      Member
		want   error
	}{
		{"a target that holds its member's copy", func(*bench) {}, "t2", newMember(3), ErrExists},
		{"a target that holds another pool's root", func(b *bench) {
			b.mem[2].Damage(Key, func([]byte) []byte { return foreign })
		}, "t2", newMember(3), ErrExists},
		{"a target that holds a damaged root", func(b *bench) {
			b.mem[2].Damage(Key, func(p []byte) []byte { return p[:9] })
		}, "t2", newMember(3), ErrExists},
		{"a target that does not answer", func(b *bench) { b.mem[2].Wipe(); b.stores[2].SetOffline(true) }, "t2", newMember(3), nil},
		{"no such target", func(*bench) {}, "t9", newMember(3), nil},
		{"the member that was wiped", func(b *bench) { b.mem[2].Wipe() }, "t2", newMember(2), ErrMember},
		{"another member's uuid", func(b *bench) { b.mem[2].Wipe() }, "t2", newMember(0), ErrMember},
		{"a member without an id", func(b *bench) { b.mem[2].Wipe() }, "t2", Member{UUID: "m3"}, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := newBench(t, 3)
			r := b.open()
			if err := r.Seed(t.Context(), c.target, c.m); !errors.Is(err, ErrNotClaimed) {
				t.Errorf("seed before the claim: %v", err)
			}
			b.claim(r, "A", nil)
			c.do(b)
			puts := b.count("put")
			if err := r.Seed(t.Context(), c.target, c.m); err == nil || c.want != nil && !errors.Is(err, c.want) {
				t.Errorf("seed: %v, want %v", err, c.want)
			}
			if n := b.count("put") - puts; n != 0 {
				t.Errorf("%d puts", n)
			}
		})
	}
}

// TestSeedSettlesItsLostReply loses the reply of the one put it makes, then the put itself.
func TestSeedSettlesItsLostReply(t *testing.T) {
	b := newBench(t, 3)
	r := b.open()
	b.claim(r, "A", nil)
	b.mem[2].Wipe()
	b.stores[2].Inject("put", 1, backendtest.LostReply)
	b.seed(r, 2, newMember(3))
	if b.stores[2].Injected()[backendtest.LostReply] != 1 {
		t.Error("no reply was lost")
	}
	b.mem[2].Wipe()
	b.stores[2].Inject("put", 1, backendtest.Refused)
	puts := b.count("put")
	if err := r.Seed(t.Context(), "t2", newMember(4)); err == nil || b.count("put") != puts+1 {
		t.Errorf("seed whose put was refused: %v, %d puts", err, b.count("put")-puts)
	}
}

// TestSeedTakesAnUnnamedPlace seeds again where a change came to nothing, and where a member was dropped:
// a copy that no configuration names gives way, unless it knows of a tenure that this one does not.
func TestSeedTakesAnUnnamedPlace(t *testing.T) {
	b := newBench(t, 3)
	r := b.open()
	v := b.claim(r, "A", nil)
	b.mem[2].Wipe()
	b.seed(r, 2, newMember(3))
	r = b.open()
	v = b.claim(r, "A", nil) // all targets listed hear of it; that makes the seed no member
	b.seed(r, 2, newMember(4))
	v.Cfg = v.Cfg.Change(append(slices.Clone(v.Cfg.Members[:2]), newMember(4)))
	b.commit(r, v)
	if err := r.Seed(t.Context(), "t2", newMember(5)); !errors.Is(err, ErrExists) {
		t.Errorf("seed over a member of next: %v", err)
	}
	v.Cfg = v.Cfg.Finish()
	b.commit(r, v)
	view, err := r.Read(t.Context())
	if err != nil || !view.Committed || view.Targets[2].Copy.Member != "m4" {
		t.Errorf("read: %+v, %v", view, err)
	}

	v = b.change(r, v, v.Cfg.Members[:2])
	later := b.open()
	b.claim(later, "A", nil)
	if err := r.Seed(t.Context(), "t2", newMember(6)); !errors.Is(err, ErrExists) {
		t.Errorf("seed by an owner that is fenced: %v", err)
	}
	b.seed(later, 2, newMember(6))
}

// TestSeedsAreNobodysVotes loses two members of three and seeds both places: the pool stays where it is,
// since new members cannot say what the old ones promised.
func TestSeedsAreNobodysVotes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, 3)
		r := b.open()
		v := b.claim(r, "A", nil)
		b.mem[1].Wipe()
		b.mem[2].Wipe()
		b.seed(r, 1, newMember(3))
		b.seed(r, 2, newMember(4))
		v.Cut = 1
		if err := r.Commit(b.brief(), v); !errors.Is(err, ErrUnknown) {
			t.Errorf("commit with one member of three: %v", err)
		}
		if _, err := b.open().Claim(b.brief(), ClaimOptions{Owner: "A"}); !errors.Is(err, ErrNoQuorum) {
			t.Errorf("claim with one member of three: %v", err)
		}
		view, err := r.Read(t.Context())
		if err != nil || view.Quorum || view.Committed || view.Best.Member != "m0" {
			t.Errorf("read: %+v, %v", view, err)
		}
		if len(view.quorumError().Absent) != 2 {
			t.Errorf("absent: %+v", view.quorumError())
		}

		if n := count([]answer{{verdict: done, copy: sampleSeed()}}); n.best != nil || !n.done("m3") || n.done("m2") {
			t.Errorf("a seed's promise counts as %+v", n)
		}

		// With the last member gone no value is left, and a pool was here all the same.
		b.mem[0].Wipe()
		b.mem[1].Wipe()
		b.mem[2].Wipe()
		b.seed(r, 2, newMember(5))
		only := b.open()
		if view, err = only.Read(t.Context()); err == nil || view.Best != nil || errors.Is(err, ErrNotCreated) || !errors.Is(err, ErrNoQuorum) {
			t.Errorf("read of a seed alone: %+v, %v", view, err)
		}
		if _, err := only.Claim(b.brief(), ClaimOptions{Owner: "A"}); !errors.Is(err, ErrNoQuorum) {
			t.Errorf("claim of a seed alone: %v", err)
		}
	})
}

// TestChangeIsFinishedByTheNextOwner ends the owner between the two commits of a change.
func TestChangeIsFinishedByTheNextOwner(t *testing.T) {
	for n := 1; n <= 3; n++ {
		t.Run(fmt.Sprintf("members=%d", n), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := emptyBench(t, n+1)
				if err := Create(t.Context(), b.targets[:n], "pool", firstValue(n)); err != nil {
					t.Fatal(err)
				}
				r := b.open()
				v := b.claim(r, "A", nil)
				b.seed(r, n, newMember(n))
				v.Cfg = v.Cfg.Change(append(slices.Clone(v.Cfg.Members[1:]), newMember(n)))
				b.commit(r, v)

				r = b.open()
				v = b.claim(r, "B", &Consent{1, "A"})
				if len(v.Cfg.Next) != n {
					t.Fatalf("the next owner finds %+v", v.Cfg)
				}
				v.Cfg = v.Cfg.Finish()
				b.commit(r, v)
				if v.Cfg = v.Cfg.Finish(); v.Cfg.Next != nil {
					t.Errorf("finished twice: %+v", v.Cfg)
				}
				b.stores[0].SetOffline(true) // of no account any more
				v.Cut = 1
				b.commit(r, v)
				if got := b.claim(b.open(), "B", nil); got.Cut != 1 || len(got.Cfg.Members) != n {
					t.Errorf("claimed %+v", got)
				}
			})
		})
	}
}

// TestChangesAreTakenOneAtATime refuses to go elsewhere from the middle of a change, then takes it back,
// makes it again and finishes it.
func TestChangesAreTakenOneAtATime(t *testing.T) {
	b := emptyBench(t, 4)
	if err := Create(t.Context(), b.targets[:3], "pool", firstValue(3)); err != nil {
		t.Fatal(err)
	}
	r := b.open()
	v := b.claim(r, "A", nil)
	old := v.Cfg.Members
	b.seed(r, 3, newMember(3))
	next := append(slices.Clone(old[1:]), newMember(3))
	v.Cfg = v.Cfg.Change(next)
	b.commit(r, v)
	puts := b.count("put")
	for name, cfg := range map[string]Config{
		"elsewhere":  {No: 2, Members: old[1:]},
		"next again": {No: 2, Members: old, Next: old[1:]},
		"two at one": {No: 3, Members: next},
	} {
		w := v
		w.Cfg = cfg
		if err := r.Commit(t.Context(), w); err == nil {
			t.Errorf("%s: went through", name)
		}
	}
	if n := b.count("put") - puts; n != 0 {
		t.Errorf("%d puts", n)
	}
	v.Cfg = Config{No: 2, Members: old}
	b.commit(r, v)
	v = b.change(r, v, next)
	for name, m := range map[string]Member{
		"an id in use":           {ID: next[0].ID, UUID: "m9", Name: "t9"},
		"a member with a new id": {ID: 9, UUID: next[0].UUID, Name: "t9"},
	} {
		w := v
		w.Cfg = v.Cfg.Change([]Member{m})
		if err := r.Commit(t.Context(), w); err == nil {
			t.Errorf("%s: went through", name)
		}
	}
}

// TestWitnessCounts keeps a pool of two members and a witness going while any one of them is away.
func TestWitnessCounts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := emptyBench(t, 3)
		v := firstValue(3)
		v.Cfg.Members[2].Witness = true
		if err := Create(t.Context(), b.targets, "pool", v); err != nil {
			t.Fatal(err)
		}
		r := b.open()
		v = b.claim(r, "A", nil)
		for i := range 3 {
			b.stores[i].SetOffline(true)
			v.Cut++
			b.commit(r, v)
			if i < 2 { // a witness and a member decide, and one that was away yields to them
				v = b.claim(r, "A", nil)
			}
			b.stores[i].SetOffline(false)
		}
		if !v.Cfg.Members[2].Witness {
			t.Errorf("the witness became %+v", v.Cfg.Members[2])
		}
		b.stores[0].SetOffline(true)
		b.stores[1].SetOffline(true)
		v.Cut++
		if err := r.Commit(b.brief(), v); !errors.Is(err, ErrUnknown) {
			t.Errorf("commit by the witness alone: %v", err)
		}
		if _, err := b.open().Claim(b.brief(), ClaimOptions{Owner: "A"}); !errors.Is(err, ErrNoQuorum) {
			t.Errorf("claim by the witness alone: %v", err)
		}
	})
}

// TestWitnessJoinsTwo turns a pool of two, which needs both, into one that can lose either.
func TestWitnessJoinsTwo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := emptyBench(t, 3)
		if err := Create(t.Context(), b.targets[:2], "pool", firstValue(2)); err != nil {
			t.Fatal(err)
		}
		r := b.open()
		v := b.claim(r, "A", nil)
		w := newMember(2)
		w.Witness = true
		b.seed(r, 2, w)
		v = b.change(r, v, append(slices.Clone(v.Cfg.Members), w))
		b.stores[0].SetOffline(true)
		v.Cut = 1
		b.commit(r, v)
		if got := b.claim(b.open(), "A", nil); got.Cut != 1 {
			t.Errorf("claimed cut %d", got.Cut)
		}
	})
}

// TestStaleTargetList opens a pool with the targets it had before a change, all or a majority of them. In
// each majority it meets the new configuration, and whatever it then does is decided by that one.
func TestStaleTargetList(t *testing.T) {
	for _, step := range []string{"joint", "finished", "finished, and a commit more", "changed twice"} {
		for _, down := range []int{-1, 0, 1, 2} {
			t.Run(fmt.Sprintf("%s, target %d of the old ones away", step, down), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					b := emptyBench(t, 5)
					if err := Create(t.Context(), b.targets[:3], "pool", firstValue(3)); err != nil {
						t.Fatal(err)
					}
					r := b.open()
					v := b.claim(r, "A", nil)
					if down >= 0 { // away during the change, back after it
						b.stores[down].SetOffline(true)
					}
					b.seed(r, 3, newMember(3))
					b.seed(r, 4, newMember(4))
					next := []Member{v.Cfg.Members[0], newMember(3), newMember(4)}
					v.Cfg = v.Cfg.Change(next)
					b.commit(r, v)
					if step != "joint" {
						v.Cfg = v.Cfg.Finish()
						b.commit(r, v)
					}
					if step == "finished, and a commit more" {
						v.Cut = 1
						b.commit(r, v)
					}
					if step == "changed twice" {
						v = b.change(r, v, next[1:])
					}
					v.State = Released
					b.commit(r, v)
					for i := range b.stores {
						b.stores[i].SetOffline(i == down)
					}

					puts := b.count("put")
					stale, err := Open(Options{Pool: "pool", Targets: b.targets[:3]})
					if err != nil {
						t.Fatal(err)
					}
					view, err := stale.Read(t.Context())
					if err != nil || view.Best.Val.Cfg.No < 1 || view.Quorum {
						t.Errorf("the old targets show %+v, %v", view, err)
					}
					if _, err := stale.Claim(b.brief(), ClaimOptions{Owner: "B"}); !errors.Is(err, ErrNoQuorum) {
						t.Errorf("claim by the old targets: %v", err)
					}
					if n := b.count("put") - puts; n != 0 {
						t.Errorf("%d puts", n)
					}
					if got := b.claim(b.open(), "B", nil); got.Cut != v.Cut {
						t.Errorf("claimed at cut %d with all targets, want %d", got.Cut, v.Cut)
					}
				})
			})
		}
	}
}
