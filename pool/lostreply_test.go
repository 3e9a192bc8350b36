package pool

import (
	"fmt"
	"strings"
	"testing"

	"graindisk/backend/adaptive"
	"graindisk/backend/backendtest"
)

// TestLostRepliesAreNeitherDuplicatesNorRivals loses the reply to every first put of a shard and of the root,
// each after its effect, with the stores wrapped as in the gateway: every segment must be there once, under one
// number, and nobody be taken for a rival.
func TestLostRepliesAreNeitherDuplicatesNorRivals(t *testing.T) {
	r := newRig(t, func(o *Options) {
		for i := range o.Targets {
			o.Targets[i].Store = adaptive.New(o.Targets[i].Store, adaptive.Options{})
		}
	})
	d := r.disk("d", 4<<20)
	const rounds = 6
	for i := range rounds {
		for _, s := range r.stores {
			s.Inject("put", 1, backendtest.LostReply)
			s.Inject("put", 3, backendtest.LostReply)
		}
		r.write(d, int64(i)<<19, backendtest.Body(uint64(i), 300<<10))
		r.publish()
	}
	lost := 0
	names := map[string]int{}
	for _, s := range r.stores {
		lost += s.Injected()[backendtest.LostReply]
		objs, _, err := s.List(t.Context(), "seg/", "", 1000)
		if err != nil {
			t.Fatal(err)
		}
		for _, o := range objs {
			name, _, _ := strings.Cut(o.Key, ".")
			names[name]++
		}
	}
	if lost < 2*rounds {
		t.Errorf("only %d replies were lost", lost)
	}
	st := r.pool.Status()
	if st.State != "serving" || st.Error != "" || st.Epoch != 1 {
		t.Errorf("state %s, %q, epoch %d", st.State, st.Error, st.Epoch)
	}
	if len(names) != st.Segments {
		t.Errorf("%d segments are stored, the pool knows %d", len(names), st.Segments)
	}
	for name, shards := range names {
		if shards < 2 {
			t.Errorf("%s has %s", name, fmt.Sprint(shards, " shards"))
		}
	}
}
