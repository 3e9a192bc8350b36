package pool

import (
	"context"
	"strings"
	"testing"

	"graindisk/backend"
	"graindisk/pool/root"
)

// TestAnEmptiedTargetIsSeen empties a target of a pool that rests, puts another pool's root there, and lets one be away:
// the status tells which is which, and counts what an emptied one held as lost.
func TestAnEmptiedTargetIsSeen(t *testing.T) {
	r, model := filled(t, large)
	r.publish()
	ctx := context.Background()
	look := func() (Status, TargetStatus) {
		r.pool.LookAtTargets(ctx)
		s := r.pool.Status()
		return s, s.Targets[1]
	}
	s, was := look()
	if was.Root != "ok" || was.Trouble("p") != "" || was.Shards == 0 || s.SegmentsBelowStrength != 0 || r.pool.AwayTargets(ctx) != nil {
		t.Fatalf("at first: %+v, %+v", was, s.Strength)
	}

	r.stores[1].SetOffline(true)
	s, now := look()
	if now.Root != string(root.Unreachable) || now.Emptied() || !strings.Contains(now.Trouble("p"), "used again when it does") || s.Strength.EmptiedShards != 0 {
		t.Errorf("away: %+v, %+v", now, s.Strength)
	}
	if away := r.pool.AwayTargets(ctx); len(away) != 1 || away[0].Target != "t1" || away[0].Shards != was.Shards {
		t.Errorf("away are %+v", away)
	}
	r.stores[1].SetOffline(false)
	if _, now = look(); now.Root != "ok" {
		t.Errorf("back: %+v", now)
	}

	body := r.memory[1].Objects()[root.Key]
	r.empty(1)
	s, now = look()
	if now.Root != string(root.Missing) || !now.Emptied() || !strings.Contains(now.Trouble("p"), `"gateway pool replace-target p t1"`) {
		t.Errorf("emptied: %+v", now)
	}
	if s.Strength.EmptiedShards != was.Shards || now.Shards != was.Shards || s.Strength.Whole+s.SegmentsBelowStrength != s.Segments || s.SegmentsBelowStrength == 0 || s.Strength.LackingBytes == 0 {
		t.Errorf("emptied: %+v, %d shards before", s.Strength, was.Shards)
	}
	if rep := r.repair(); rep.Restored != 0 { // nothing is stored there before it is replaced
		t.Errorf("repaired %+v", rep)
	}
	for name, c := range map[string]struct {
		body []byte
		want root.State
	}{
		"another target's": {r.memory[0].Objects()[root.Key], root.Foreign},
		"nonsense":         {body[:len(body)/2], root.Damaged},
	} {
		if _, err := r.memory[1].Put(ctx, root.Key, c.body, backend.Cond{}); err != nil {
			t.Fatal(err)
		}
		if s, now = look(); now.Root != string(c.want) || now.RootError == "" || now.Trouble("p") == "" || now.Emptied() != (c.want == root.Foreign) {
			t.Errorf("%s copy: %+v", name, now)
		}
	}
	r.memory[1].Wipe()
	r.replace(1)
	if s, now = look(); now.Root != "ok" || now.RootError != "" || s.Strength.EmptiedShards != 0 || s.Strength.LostShards == 0 {
		t.Errorf("replaced: %+v, %+v", now, s.Strength)
	}
	if rep := r.repair(); rep.Restored == 0 || r.pool.AwayTargets(ctx) != nil {
		t.Errorf("repaired %+v", rep)
	}
	r.whole()
	r.expect(r.disk("d", testDisk), model)
}
