package pool

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"testing/synctest"

	"graindisk/block"
)

// TestOutageIsNotAskedForEveryRecord has many dead segments whose records a round of reclaiming wants to read while
// no target answers: it gives up soon, since publishing waits for it, and the next round finds all of them.
func TestOutageIsNotAskedForEveryRecord(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := reclaimRig(t)
		d := r.disk("a", 1<<20)
		const cuts = 3 * restateUnread
		for i := range cuts {
			r.write(d, 0, []byte{byte(i), 1: 1, block.Size - 1: 1})
			r.publish()
		}
		dying := func() (requests int64, found bool) {
			var n atomic.Int64
			for _, s := range r.stores {
				s.Before = func(string, string) error { n.Add(1); return nil }
			}
			r.pool.pub.own.Lock()
			defer r.pool.pub.own.Unlock()
			w := r.pool.dying(t.Context())
			for _, s := range r.stores {
				s.Before = nil
			}
			return n.Load(), w != nil && len(w.cuts) >= restateUnread
		}
		r.offline(true)
		if n, found := dying(); n < restateUnread || n > 3*restateUnread || found {
			t.Errorf("%d requests to targets that are away, found %v", n, found)
		}
		r.offline(false)
		if n, found := dying(); n < cuts/2 || !found {
			t.Errorf("%d requests once they were back, found %v", n, found)
		}
		r.close()
	})
}

// TestRecountEndsWithItsContext asks for a recount of maps that are not here while no target answers: it waits, until
// whoever asked goes.
func TestRecountEndsWithItsContext(t *testing.T) {
	r, _, _ := absentRig(t, nil)
	r.offline(true)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() {
		_, err := r.pool.Fsck(ctx, false, false)
		done <- err
	}()
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("fsck of maps that cannot be had: %v", err)
	}
	r.offline(false)
	if rep, err := r.pool.Fsck(t.Context(), false, false); err != nil || rep.Bad() {
		t.Errorf("fsck once they can: %+v, %v", rep, err)
	}
}
