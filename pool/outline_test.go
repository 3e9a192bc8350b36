package pool

import (
	"context"
	"errors"
	"strings"
	"testing"

	"graindisk/pool/root"
)

// TestAnOutlineTellsWhoHasAPool looks at a pool that was never made, is held, and is released, and at too few targets.
func TestAnOutlineTellsWhoHasAPool(t *testing.T) {
	r := newRig(t, nil)
	ctx := context.Background()
	targets := r.options(false).Targets
	look := func() *Outline {
		t.Helper()
		before := r.contents()
		o, err := ReadOutline(ctx, "p", targets, t.TempDir())
		if err != nil {
			t.Fatal(err)
		}
		for i, was := range before {
			for key, b := range r.contents()[i] {
				if key != beatKey && string(was[key]) != string(b) {
					t.Errorf("target %d: %s has changed", i, key)
				}
			}
		}
		return o
	}
	d := r.disk("d", testDisk)
	r.write(d, 0, make([]byte, 4096))
	r.publish()
	cut := r.pool.value().Cut
	r.abandon()
	o := look()
	if o.State != root.Held || o.PublishedCut != cut || o.Epoch != 1 || o.Owner == "" || o.OwnerHere || !o.Committed || len(o.Targets) != 3 || o.Targets[0].Root != "ok" {
		t.Errorf("held: %+v", o)
	}
	if s := o.String(); !strings.HasPrefix(s, "held by "+o.Owner) || !strings.Contains(s, o.OwnerLog) {
		t.Errorf("held: %s", s)
	}
	r.open(false)
	if err := r.pool.Close(ctx); err != nil {
		t.Fatal(err)
	}
	if o = look(); o.State != root.Released || !strings.Contains(o.String(), "released at cut ") {
		t.Errorf("released: %+v: %s", o, o)
	}
	r.stores[0].SetOffline(true)
	if o = look(); o.State != root.Released || o.Targets[0].Root != string(root.Unreachable) || o.Targets[0].RootError == "" {
		t.Errorf("one target away: %+v", o)
	}
	r.stores[1].SetOffline(true)
	if o, err := ReadOutline(ctx, "p", targets, t.TempDir()); !errors.Is(err, root.ErrNoQuorum) || errors.Is(err, ErrNoPool) {
		t.Errorf("two targets away: %+v, %v", o, err)
	}
	for i := range r.memory {
		r.stores[i].SetOffline(false)
		r.memory[i].Wipe()
	}
	if o, err := ReadOutline(ctx, "p", targets, t.TempDir()); !errors.Is(err, ErrNoPool) || !strings.Contains(err.Error(), "gateway pool create p") {
		t.Errorf("no pool: %+v, %v", o, err)
	}
}
