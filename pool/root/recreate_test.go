package root

import (
	"errors"
	"testing"

	"graindisk/backend/backendtest"
)

// TestRecreate makes a root under a ballot of its own, in two tries, and has the pool claimed above that: the owner
// before is fenced, although he knows the pool.
func TestRecreate(t *testing.T) {
	b := newBench(t, 3)
	old := b.open()
	lost := b.claim(old, "A", nil)
	for _, m := range b.stores {
		if err := m.Delete(t.Context(), Key); err != nil {
			t.Fatal(err)
		}
	}
	v := firstValue(3)
	for i := range v.Cfg.Members {
		v.Cfg.Members[i].UUID += " anew"
	}
	pool := old.pool
	at := Ballot{Epoch: 70, Claimant: "rebuild"}
	if err := Recreate(t.Context(), b.targets, pool, v, Ballot{}); err == nil {
		t.Fatal("a root without an epoch was made")
	}
	if c, err := Unfinished(t.Context(), b.targets); c != nil || err != nil {
		t.Fatalf("without a root: %+v, %v", c, err)
	}
	for i := range createTries {
		b.stores[1].Inject("put", i, backendtest.Refused)
	}
	if err := Recreate(t.Context(), b.targets, pool, v, at); err == nil {
		t.Fatal("made with a target that takes no put")
	}
	c, err := Unfinished(t.Context(), b.targets)
	if err != nil || c == nil || c.Pool != pool || c.Accepted != at || c.Val.Cfg.Members[0] != v.Cfg.Members[0] {
		t.Fatalf("half made: %+v, %v", c, err)
	}
	b.stores[2].SetOffline(true)
	if c, err := Unfinished(t.Context(), b.targets); c != nil || err == nil || errors.Is(err, ErrExists) {
		t.Fatalf("half made, a target away: %+v, %v", c, err)
	}
	b.stores[2].SetOffline(false)
	b.targets[0], b.targets[1] = b.targets[1], b.targets[0]
	if c, err := Unfinished(t.Context(), b.targets); c != nil || !errors.Is(err, ErrExists) {
		t.Fatalf("half made on other targets: %+v, %v", c, err)
	}
	b.targets[0], b.targets[1] = b.targets[1], b.targets[0]
	if err := Recreate(t.Context(), b.targets, c.Pool, c.Val, c.Accepted); err != nil {
		t.Fatalf("finished: %v", err)
	}
	if c, err := Unfinished(t.Context(), b.targets); c != nil || !errors.Is(err, ErrExists) {
		t.Fatalf("all made: %+v, %v", c, err)
	}
	r := b.open()
	b.claim(r, "B", nil)
	if e := r.Ballot().Epoch; e <= at.Epoch {
		t.Errorf("claimed in epoch %d", e)
	}
	if c, err := Unfinished(t.Context(), b.targets); c != nil || !errors.Is(err, ErrExists) {
		t.Fatalf("claimed: %+v, %v", c, err)
	}
	if err := old.Commit(t.Context(), lost); !errors.Is(err, ErrFenced) {
		t.Errorf("the owner before: %v", err)
	}
}
