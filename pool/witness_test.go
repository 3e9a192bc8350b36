package pool

import (
	"context"
	"errors"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"graindisk/block"
	"graindisk/pool/root"
)

// mirror is 1+1 on two targets, and a witness.
func mirror(o *Options) {
	o.Data, o.Parity, o.CheckpointCuts = 1, 1, 3
	o.Targets[2].Witness = true
}

// holdsRootOnly fails if a store has anything but what every member may have.
func (r *rig) holdsRootOnly(i int) {
	r.t.Helper()
	for _, key := range r.memory[i].Keys() {
		if key != root.Key && key != beatKey {
			r.t.Errorf("the witness holds %s", key)
		}
	}
}

// TestTwoTargetsAndAWitness loses each member of a mirror with a witness, one at a time, while it is written to: cuts and
// checkpoints go on, on what is left, another host opens the pool, and once the lost one is back all is at full strength
// again by itself.
func TestTwoTargetsAndAWitness(t *testing.T) {
	for name, opt := range map[string]func(*Options){"small": mirror, "large": func(o *Options) { mirror(o); large(o) }} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T) {
				r := newRig(t, opt)
				model := make([]byte, testDisk)
				for i := range model {
					model[i] = byte(rand.Uint32())
				}
				d := r.disk("d", testDisk)
				r.write(d, 0, model)
				r.publish()
				for lost := range 3 {
					r.stores[lost].SetOffline(true)
					for range 8 { // checkpoints among them
						d = r.disk("d", testDisk)
						r.scribble(d, model, 10)
						r.publish()
					}
					if s := r.pool.Status(); (s.SegmentsBelowStrength > 0) != (lost < 2) || s.Strength.Unreadable > 0 {
						t.Errorf("without t%d the status says %+v", lost, s.Strength)
					}
					r.freshTakeover()
					r.expect(r.disk("d", testDisk), model)
					r.scribble(r.disk("d", testDisk), model, 10)
					r.publish()
					r.stores[lost].SetOffline(false)
					for begin := time.Now(); ; time.Sleep(time.Minute) {
						r.scribble(r.disk("d", testDisk), model, 1)
						r.publish() // a target is found to be back when it is asked for something
						weak, err := r.pool.checkpointWeak(context.Background())
						if s := r.pool.Status(); s.SegmentsBelowStrength == 0 && !weak && err == nil {
							break
						}
						if time.Since(begin) > 30*time.Minute {
							t.Fatalf("t%d is back: %+v, checkpoint weak %v, %v", lost, r.pool.Status().Strength, weak, err)
						}
					}
					r.whole()
					r.holdsRootOnly(2)
					r.expect(r.disk("d", testDisk), model)
				}
				for _, s := range r.pool.Status().Targets {
					if s.Witness != (s.Name == "t2") || s.Witness && s.Shards > 0 || !s.Witness && s.Shards == 0 {
						t.Errorf("status of a target: %+v", s)
					}
				}
				if rep := r.scrub(ScrubOptions{}); rep.Err() != nil || rep.Damaged+rep.Missing+rep.Unread > 0 {
					t.Errorf("scrub: %+v", rep)
				}
				r.close()
			})
		})
	}
}

// TestACheckpointOnFewTargetsIsMadeWhole stores a checkpoint while one of two targets is away, for longer than it takes to
// give it up. Once that is back the checkpoint gets its copies there, whether the process goes on, another opens the
// pool meanwhile, or after it.
func TestACheckpointOnFewTargetsIsMadeWhole(t *testing.T) {
	for name, then := range map[string]func(*rig, func(bool)){
		"goes on": func(r *rig, away func(bool)) { away(false) },
		"opened while so": func(r *rig, away func(bool)) {
			r.abandon()
			r.open(false)
			r.publish()
			time.Sleep(time.Hour) // it has been looked at
			away(false)
		},
		"opened later": func(r *rig, away func(bool)) { away(false); r.abandon(); r.open(false); r.publish() },
	} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T) {
				r := newRig(t, func(o *Options) {
					mirror(o)
					smallMaps(o)
					o.CheckpointCuts = 20
				})
				weak := func() bool {
					w, err := r.pool.checkpointWeak(context.Background())
					if err != nil {
						t.Fatal(err)
					}
					return w
				}
				model := make([]byte, testDisk)
				r.stores[1].SetOffline(true)
				for range 30 {
					r.scribble(r.disk("d", testDisk), model, 10)
					r.publish()
				}
				before := r.pool.value().Checkpoints[0]
				then(r, r.stores[1].SetOffline)
				if r.pool.value().Checkpoints[0].N != before.N || !weak() {
					t.Fatalf("checkpoint %+v was made whole too soon to tell by what", r.pool.value().Checkpoints[0])
				}
				for range 8 { // no checkpoint is due
					time.Sleep(5 * time.Minute)
					r.scribble(r.disk("d", testDisk), model, 1)
					r.publish()
				}
				if weak() {
					t.Errorf("the checkpoint lacks copies: %+v", r.pool.value().Checkpoints[0])
				}
				r.whole()
				r.expect(r.disk("d", testDisk), model)
				r.close()
			})
		})
	}
}

// TestAHiccupMakesNothingWeaker takes one of two targets away for less than lostAfter: what is published meanwhile waits
// for it.
func TestAHiccupMakesNothingWeaker(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		r := newRig(t, mirror)
		model := make([]byte, testDisk)
		d := r.disk("d", testDisk)
		r.publish()
		r.stores[1].SetOffline(true)
		begin := time.Now()
		time.AfterFunc(lostAfter/2, func() { r.stores[1].SetOffline(false) })
		r.scribble(d, model, 10)
		r.publish()
		if took := time.Since(begin); took < lostAfter/2 {
			t.Errorf("published after %v", took)
		}
		r.whole()
		r.close()
	})
}

// TestAWitnessIsReplacedAddedAndTurned changes the parts of targets in a pool.
func TestAWitnessIsReplacedAddedAndTurned(t *testing.T) {
	var turn func(*Options)
	r, model := filled(t, func(o *Options) {
		mirror(o)
		if turn != nil {
			turn(o)
		}
	})
	ctx := context.Background()
	again := func(f func(*Options)) {
		t.Helper()
		turn = f
		r.abandon()
		r.open(false)
		r.publish() // claims
	}
	witnesses := func(want ...string) {
		t.Helper()
		var got []string
		for _, m := range r.pool.value().Cfg.Members {
			if m.Witness {
				got = append(got, m.Name)
			}
		}
		if !slices.Equal(got, want) {
			t.Errorf("witnesses are %v, want %v", got, want)
		}
	}
	r.empty(2)
	if c := r.replace(2); !c.Witness || c.New != 4 {
		t.Errorf("changed %+v", c)
	}
	if rep := r.repair(); rep.Restored != 0 {
		t.Errorf("nothing was lost with a witness, and repaired was %+v", rep)
	}
	witnesses("t2")

	// One of the two that hold data may not become a witness. Configured as one it stays what it is.
	again(func(o *Options) { o.Targets[1].Witness = true })
	witnesses("t2")
	r.empty(1)
	if c, err := r.pool.ReplaceTarget(ctx, "t1"); !errors.Is(err, ErrTooFew) || !strings.Contains(err.Error(), "1 would be left for stripes of 1+1") {
		t.Errorf("a mirror of one target: %+v, %v", c, err)
	}
	again(nil)
	if c := r.replace(1); c.Witness {
		t.Errorf("changed %+v", c)
	}
	if rep := r.repair(); rep.Restored == 0 || rep.Failed+rep.Waiting > 0 {
		t.Errorf("repaired %+v", rep)
	}
	r.whole()

	// The witness becomes a target with data when it was emptied.
	again(func(o *Options) { o.Targets[2].Witness = false })
	r.empty(2)
	if c := r.replace(2); c.Witness {
		t.Errorf("changed %+v", c)
	}
	witnesses()
	d := r.disk("d", testDisk)
	for range 4 {
		r.scribble(d, model, 10)
		r.publish()
	}
	on := map[block.TargetID]bool{}
	for _, i := range r.sorted() {
		for _, t := range i.Targets {
			on[t] = true
		}
	}
	if len(on) != 3 {
		t.Errorf("segments are on %v", on)
	}

	// And a fourth is added as a witness.
	more, stores := sixTargets(func(o *Options) {
		o.Data, o.Parity = 1, 1
		o.Targets = o.Targets[:4]
		o.Targets[2].Witness, o.Targets[3].Witness = false, true
	})
	again(more)
	c, err := r.pool.AddTarget(ctx, "t3")
	if err != nil || !c.Witness {
		t.Errorf("added %+v, %v", c, err)
	}
	witnesses("t3")
	r.scribble(r.disk("d", testDisk), model, 10)
	r.publish()
	for _, key := range []string{"seg/", "ckpt/"} {
		if objs, _, err := stores[0].List(ctx, key, "", 1); len(objs) > 0 || err != nil {
			t.Errorf("the new witness holds %v, %v", objs, err)
		}
	}
	r.stores[0].SetOffline(true)
	r.freshTakeover()
	r.expect(r.disk("d", testDisk), model)
}

// TestAPoolWithAWitnessIsRebuilt loses every root and checkpoint.
func TestAPoolWithAWitnessIsRebuilt(t *testing.T) {
	r, model := filled(t, mirror)
	r.close()
	r.loseRoot()
	rep := r.rebuild(RebuildOptions{Scratch: "/host/scratch"})
	for _, tg := range rep.Targets {
		if tg.Witness != (tg.Name == "t2") {
			t.Errorf("rebuilt %+v", tg)
		}
	}
	r.expect(r.disk("d", testDisk), model)
	r.scribble(r.disk("d", testDisk), model, 10)
	r.publish()
	r.holdsRootOnly(2)
	r.whole()

	// A target on which there are shards is none, whatever the configuration says.
	r.close()
	r.loseRoot()
	opt := r.opt
	r.opt = func(o *Options) { opt(o); o.Targets[1].Witness, o.Targets[2].Witness = true, false }
	for _, tg := range r.rebuild(RebuildOptions{Scratch: "/host/scratch"}).Targets {
		if tg.Witness {
			t.Errorf("rebuilt %+v", tg)
		}
	}
	r.expect(r.disk("d", testDisk), model)
}

func TestWitnessesAloneAreNoPool(t *testing.T) {
	o := Options{Name: "p", Targets: []Target{{Name: "a", Witness: true}, {Name: "b", Witness: true}}}
	if err := Create(context.Background(), o); err == nil || !strings.Contains(err.Error(), "all targets are witnesses") {
		t.Errorf("created: %v", err)
	}
	if p, err := Open(context.Background(), o); err == nil || !strings.Contains(err.Error(), "all targets are witnesses") {
		t.Errorf("opened %v: %v", p, err)
	}
}

// TestTwoShardsOnEachTarget keeps 4+2 on three targets, and loses one of them.
func TestTwoShardsOnEachTarget(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		r, model := filled(t, func(o *Options) { o.Data, o.Parity, o.SegmentBytes, o.CheckpointCuts = 4, 2, 2<<20, 3 })
		r.stores[1].SetOffline(true)
		d := r.disk("d", testDisk)
		for i := range 8 {
			r.scribble(d, model, 10)
			clear(model[i%2<<21:][:2<<20])
			r.write(d, int64(i%2)<<21, model[i%2<<21:][:2<<20])
			r.publish()
		}
		if s := r.pool.Status(); s.Strength.Unreadable > 0 {
			t.Errorf("status: %+v", s.Strength)
		}
		for _, i := range r.sorted() {
			if !strong(i) {
				t.Errorf("segment %d, %d+%d, is on %v", i.ID, i.K, i.M, i.Targets)
			}
		}
		r.freshTakeover()
		r.expect(r.disk("d", testDisk), model)
		r.close()
	})
}

// TestPlacement is the arithmetic of where a segment goes.
func TestPlacement(t *testing.T) {
	for _, c := range []struct {
		name                     string
		k, m, targets, witnesses int
		failing, lost            []block.TargetID // failed a moment ago; for long
		wantK                    uint8
		want                     []block.TargetID // of k+m, not turned; nil: it waits
	}{
		{"all live", 2, 1, 3, 0, nil, nil, 2, []block.TargetID{1, 2, 3}},
		{"one failing of three", 2, 1, 3, 0, []block.TargetID{2}, nil, 1, []block.TargetID{1, 3}},
		{"two failing of three are asked", 2, 1, 3, 0, []block.TargetID{2, 3}, nil, 2, []block.TargetID{1, 2, 3}},
		{"two lost of three are more than it survives", 2, 1, 3, 0, nil, []block.TargetID{2, 3}, 2, []block.TargetID{1, 2, 3}},
		{"witnesses get nothing", 2, 1, 3, 2, nil, nil, 2, []block.TargetID{1, 2, 3}},
		{"a mirror", 1, 1, 2, 1, nil, nil, 1, []block.TargetID{1, 2}},
		{"half a mirror failing is asked", 1, 1, 2, 1, []block.TargetID{1}, nil, 1, []block.TargetID{1, 2}},
		{"half a mirror lost", 1, 1, 2, 1, nil, []block.TargetID{1}, 1, []block.TargetID{2, 0}},
		{"a mirror lost", 1, 1, 2, 1, nil, []block.TargetID{1, 2}, 1, []block.TargetID{1, 2}},
		{"2+2 on four, two lost", 2, 2, 4, 1, nil, []block.TargetID{1, 4}, 1, []block.TargetID{2, 3, 0}},
		{"2+2 on four, one lost", 2, 2, 4, 1, nil, []block.TargetID{1}, 1, []block.TargetID{2, 3, 4}},
		{"4+2 on three, one failing", 4, 2, 3, 0, []block.TargetID{1}, nil, 2, []block.TargetID{2, 3, 2, 3}},
		{"4+2 on three, one lost", 4, 2, 3, 0, nil, []block.TargetID{1}, 2, []block.TargetID{2, 3, 2, 3}},
		{"4+2 on six, two lost", 4, 2, 6, 0, nil, []block.TargetID{1, 2}, 2, []block.TargetID{3, 4, 5, 6}},
		{"no parity", 2, 0, 2, 0, nil, []block.TargetID{1}, 1, []block.TargetID{2}},
	} {
		p := newMaps(Options{lostAfter: lostAfter})
		p.val.Stripe = root.Stripe{Data: c.k, Parity: c.m}
		p.setMembers(nil, nil)
		for id := range block.TargetID(c.targets + c.witnesses) {
			p.val.Cfg.Members = append(p.val.Cfg.Members, root.Member{ID: id + 1, Witness: int(id) >= c.targets})
			p.setStore(root.Member{ID: id + 1}, nil)
		}
		soon := time.Now().Add(time.Hour)
		for _, id := range c.failing {
			p.sick[id] = sickness{until: soon, since: time.Now()}
		}
		for _, id := range c.lost {
			p.sick[id] = sickness{until: soon, since: time.Now().Add(-2 * lostAfter)}
		}
		k, m, targets := p.placement(64 << 20)
		if len(targets) > int(k+m) {
			targets = targets[:k+m]
		}
		if k != c.wantK || int(m) != c.m || !slices.Equal(targets, c.want) {
			t.Errorf("%s: %d+%d on %v, want %d+%d on %v", c.name, k, m, targets, c.wantK, c.m, c.want)
		}
		if got := rotate(c.want, 3); slices.Contains(got, 0) != slices.Contains(c.want, 0) || slices.Contains(got, 0) && got[len(got)-1] != 0 {
			t.Errorf("%s: turned to %v", c.name, got)
		}
	}
}
