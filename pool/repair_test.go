package pool

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"graindisk/backend"
	"graindisk/backend/backendtest"
	"graindisk/block"
	"graindisk/pool/root"
)

// empty takes all that a target holds, and what is on its way to it.
func (r *rig) empty(i int) {
	r.stores[i].Settle()
	r.memory[i].Wipe()
}

func (r *rig) replace(i int) TargetChange {
	r.t.Helper()
	c, err := r.pool.ReplaceTarget(context.Background(), fmt.Sprintf("t%d", i))
	if err != nil {
		r.t.Fatal(err)
	}
	return c
}

func (r *rig) repair() RepairReport {
	r.t.Helper()
	rep, err := r.pool.Repair(context.Background(), RepairOptions{})
	if err != nil {
		r.t.Fatal(err)
	}
	return rep
}

// whole fails unless every segment and the checkpoint are at full strength, by the tables and by the objects.
func (r *rig) whole() {
	r.t.Helper()
	if s := r.pool.Status(); s.SegmentsBelowStrength != 0 || s.Strength.Whole != s.Segments || s.Strength.LackingBytes != 0 {
		r.t.Errorf("the status says %+v of %d segments", s.Strength, s.Segments)
	}
	for _, i := range r.sorted() {
		on := map[string]bool{}
		for s, t := range i.Targets {
			store, ok := r.pool.store(t)
			if !ok {
				r.t.Errorf("segment %d is on %v", i.ID, i.Targets)
				continue
			}
			if _, err := store.Stat(context.Background(), i.Key(s)); err != nil {
				r.t.Errorf("shard %d of segment %d: %v", s, i.ID, err)
			}
			on[store.String()] = true
		}
		if len(on) != i.Shards() {
			r.t.Errorf("segment %d lies on %d places: %v", i.ID, len(on), i.Targets)
		}
	}
	if weak, err := r.pool.checkpointWeak(context.Background()); weak || err != nil {
		r.t.Errorf("the checkpoint lacks copies: %v, %v", weak, err)
	}
}

// TestALostTargetIsReplacedAndRefilled loses one target after another, whole, with and without published
// checkpoints, and the host in between.
func TestALostTargetIsReplacedAndRefilled(t *testing.T) {
	for name, opt := range map[string]func(*Options){
		"small segments":  func(o *Options) { o.CheckpointCuts = 2 },
		"stripes":         large,
		"few checkpoints": func(o *Options) { o.CheckpointCuts = 200 },
	} {
		t.Run(name, func(t *testing.T) {
			r, model := filled(t, opt)
			for round := range 4 {
				gone := round % 3
				d := r.disk("d", testDisk)
				r.scribble(d, model, 10)
				r.publish()
				r.empty(gone)
				r.scribble(d, model, 10)
				r.publish()
				r.expect(d, model)
				before := r.pool.value().Cfg
				c := r.replace(gone)
				if c.New != block.TargetID(4+round) || c.Old == c.New || c.Target != fmt.Sprintf("t%d", gone) {
					t.Errorf("changed %+v", c)
				}
				v := r.pool.value()
				if v.Cfg.No != before.No+2 || len(v.Cfg.Next) != 0 || len(v.Cfg.Members) != 3 {
					t.Errorf("members are %+v", v.Cfg)
				}
				if s := r.pool.Status(); s.Strength.LostShards == 0 || s.SegmentsBelowStrength == 0 || s.Strength.LackingBytes == 0 {
					t.Errorf("the status says %+v", s.Strength)
				}
				r.scribble(d, model, 10)
				r.publish() // new stripes use the new member
				newest := r.sorted()
				if last := newest[len(newest)-1]; last.Shards() == 3 && !slices.Contains(last.Targets, c.New) {
					t.Errorf("a new segment is on %v", last.Targets)
				}
				rep := r.repair()
				if rep.Restored == 0 || rep.Failed+rep.Waiting+rep.Unreadable > 0 || !rep.Checkpoint {
					t.Errorf("repaired %+v", rep)
				}
				r.whole()
				if again := r.repair(); again.Restored != 0 || again.Checkpoint {
					t.Errorf("the second repair found %+v", again)
				}
				r.expect(d, model)
				other := (gone + 1 + round%2) % 3
				r.stores[other].SetOffline(true)
				r.freshTakeover()
				r.expect(r.disk("d", testDisk), model)
				r.stores[other].SetOffline(false)
			}
			if r.pool.usageErr.Load() != nil {
				t.Error(r.pool.usageErr.Load().err)
			}
		})
	}
}

// TestATargetIsNotReplacedByAnything asks for what must be refused, and expects nothing to change.
func TestATargetIsNotReplacedByAnything(t *testing.T) {
	r, model := filled(t, func(o *Options) { o.repairPoll = 50 * time.Millisecond })
	other, _ := filled(t, nil)
	ctx := context.Background()
	key := r.sorted()[0].Key(0)
	rootOf := func(m *backendtest.Memory) []byte { return m.Objects()[root.Key] }
	put := func(key string, body []byte) {
		if _, err := r.memory[1].Put(ctx, key, body, backend.Cond{}); err != nil {
			t.Fatal(err)
		}
	}
	was := r.pool.value().Cfg
	for _, c := range []struct {
		name    string
		prepare func()
		ask     func() (TargetChange, error)
		want    error
		word    string
	}{
		{"the place has all its data", func() {}, nil, ErrTargetInUse, "pool repair"},
		{"no such target", func() {}, func() (TargetChange, error) { return r.pool.ReplaceTarget(ctx, "t9") }, ErrNoTarget, ""},
		{"a target is added twice", func() {}, func() (TargetChange, error) { return r.pool.AddTarget(ctx, "t1") }, ErrIsTarget, ""},
		{"another pool's root", func() { r.empty(1); put(root.Key, rootOf(other.memory[1])) }, nil, ErrNotEmpty, "prefix"},
		{"another member's copy", func() { r.empty(1); put(root.Key, rootOf(r.memory[0])) }, nil, ErrTargetInUse, ""},
		{"another pool's shards", func() {
			r.empty(1)
			i := other.sorted()[0]
			put(key, other.shardAt(i, 0))
		}, nil, nil, "seg/"},
		{"what nobody can read", func() { r.empty(1); put(root.Key, []byte("{}")) }, nil, root.ErrDamaged, "delete it there"},
		{"no answer", func() { r.empty(1); r.stores[1].SetOffline(true) }, nil, nil, "must answer"},
	} {
		c.prepare()
		if c.ask == nil {
			c.ask = func() (TargetChange, error) { return r.pool.ReplaceTarget(ctx, "t1") }
		}
		_, err := c.ask()
		if err == nil || c.want != nil && !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.word) {
			t.Errorf("%s: %v", c.name, err)
		}
		r.stores[1].SetOffline(false)
	}
	if now := r.pool.value().Cfg; now.No != was.No || len(now.Next) > 0 {
		t.Errorf("the configuration became %+v", now)
	}
	r.empty(1)
	r.replace(1)
	r.repair()
	r.whole()
	r.expect(r.disk("d", testDisk), model)
}

// TestARepairThatDiesGoesOn kills the process, or loses the host, at every so many requests of a change of members
// and a repair, and repairs again.
func TestARepairThatDiesGoesOn(t *testing.T) {
	ctx := context.Background()
	step := 7
	if testing.Short() {
		step = 23
	}
	for at, ended := 1, false; !ended; at += step {
		r, model := filled(t, func(o *Options) { large(o); o.CheckpointCuts = 2 })
		r.empty(2)
		var calls atomic.Int64
		dead, die := context.WithCancel(ctx)
		for _, s := range r.stores {
			s.Before = func(op, key string) error {
				if calls.Add(1) < int64(at) {
					return nil
				}
				die()
				return &backend.Error{Op: op, Key: key, Class: backend.Transient, Err: errDead}
			}
		}
		_, err := r.pool.ReplaceTarget(dead, "t2")
		if err == nil {
			_, err = r.pool.Repair(dead, RepairOptions{})
		}
		ended = err == nil && dead.Err() == nil
		die()
		r.abandon()
		for _, s := range r.stores {
			s.Before = nil
		}
		if at%2 == 0 {
			r.fs = r.fs.ProcessCrash()
			r.open(false)
		} else {
			r.newHost()
			r.open(true)
		}
		r.expect(r.disk("d", testDisk), model)
		r.publish() // it has claimed the pool then
		if err := r.pool.finishMembers(ctx); err != nil {
			t.Fatal(err)
		}
		if m := r.pool.memberAt("t2"); m == nil || m.ID == 3 { // it died before the first commit
			r.replace(2)
		}
		rep := r.repair()
		if rep.Failed+rep.Waiting+rep.Unreadable > 0 {
			t.Errorf("dead at %d: %+v", at, rep)
		}
		r.whole()
		gone := rand.IntN(2)
		r.empty(gone)
		r.freshTakeover()
		r.expect(r.disk("d", testDisk), model)
		if t.Failed() {
			t.Fatalf("dead at request %d", at)
		}
	}
}

// TestAShardIsReadBackBesideTheNext holds back every answer to a reading back until twice as many shards are stored as are
// restored at a time: half of them wait to be read back, and the others have begun meanwhile.
func TestAShardIsReadBackBesideTheNext(t *testing.T) {
	r, model := filled(t, nil)
	r.empty(1)
	r.replace(1)
	var puts atomic.Int32
	enough := make(chan struct{})
	r.stores[1].Before = func(op, key string) error {
		switch {
		case !strings.HasPrefix(key, "seg/"):
		case op == "put" && puts.Add(1) == 2*restoresMax:
			close(enough)
		case op == "get":
			select {
			case <-enough:
			case <-time.After(time.Minute):
				return &backend.Error{Op: op, Key: key, Class: backend.Permanent, Err: errors.New("nothing was stored beside")}
			}
		}
		return nil
	}
	if rep := r.repair(); rep.Restored < 2*restoresMax || rep.Failed > 0 {
		t.Errorf("repaired %+v", rep)
	}
	r.whole()
	r.expect(r.disk("d", testDisk), model)
}
