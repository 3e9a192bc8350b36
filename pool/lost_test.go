package pool

import (
	"context"
	"testing"

	"graindisk/block"
	"graindisk/pool/root"
	"graindisk/writeback"
)

// TestTheCutOfUnknownOutcomeCountsIfItWentThrough asks a log whose owner died between the commit of its second cut and the
// record of it, what a later owner's root has of it.
func TestTheCutOfUnknownOutcomeCountsIfItWentThrough(t *testing.T) {
	r := newRig(t, nil)
	d := r.disk("d", testDisk)
	values := []root.Value{r.pool.value()}
	for i := range 2 {
		r.write(d, int64(i)*block.Size, make([]byte, block.Size))
		r.publish()
		values = append(values, r.pool.value())
	}
	old := r.pool
	r.abandon()
	r.newHost()
	r.open(true)
	r.write(r.disk("d", testDisk), 0, make([]byte, block.Size))
	claimed := r.pool.value()
	r.publish()
	third := r.pool.value()
	if third.Cut != 3 || claimed.Cut != 2 {
		t.Fatalf("cuts %d and %d", claimed.Cut, third.Cut)
	}
	swallowed := third
	swallowed.Cuts = nil
	at := func(cut uint64) writeback.Seq { return writeback.Seq(values[cut].Horizon) }
	for _, c := range []struct {
		name    string
		knows   uint64 // the newest cut that the log knows to be published
		root    root.Value
		offline bool
		cut     uint64
		sure    bool
	}{
		{"all is known", 2, claimed, false, 2, true},
		{"the other's cut is not ours", 2, third, false, 2, true},
		{"it went through", 1, claimed, false, 2, true},
		{"it went through and another came after it", 1, third, false, 2, true},
		{"it cannot be read", 1, third, true, 1, false},
		{"it is in a checkpoint", 1, swallowed, false, 1, false},
		{"a root from before it", 1, values[1], false, 1, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			r.offline(c.offline)
			defer r.offline(false)
			old.pub.cut, old.pub.horizon = c.knows, at(c.knows)
			cut, horizon, sure := old.publishedThrough(context.Background(), c.root)
			if cut != c.cut || horizon != at(c.cut) || sure != c.sure {
				t.Errorf("cut %d, horizon %d, sure %v; want cut %d, horizon %d, sure %v", cut, horizon, sure, c.cut, at(c.cut), c.sure)
			}
		})
	}
}
