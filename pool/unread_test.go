package pool

import (
	"bytes"
	"context"
	"errors"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"

	"graindisk/backend"
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

// TestSilentTargetIsNoCopy has one of two copies of all parts of a checkpoint lost at a target that does not answer when
// it is asked for them: what was not seen must not count, or nobody would store it again.
func TestSilentTargetIsNoCopy(t *testing.T) {
	r := newRig(t, nil)
	d := r.disk("a", 1<<20)
	r.write(d, 0, bytes.Repeat([]byte{1}, 64<<10))
	r.publish()
	if err := r.pool.publishCheckpoint(t.Context()); err != nil {
		t.Fatal(err)
	}
	weak := func() bool {
		t.Helper()
		weak, err := r.pool.checkpointWeak(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return weak
	}
	if weak() {
		t.Error("the checkpoint lacks copies from the beginning")
	}
	for i, s := range r.stores {
		has := false
		for key := range r.memory[i].Objects() {
			has = has || strings.HasPrefix(key, "ckpt/")
		}
		s.Before = func(op, key string) error {
			if op == "stat" {
				return &backend.Error{Op: op, Store: s.String(), Key: key, Class: backend.Transient, Err: errors.New("slow down")}
			}
			return nil
		}
		if got := weak(); got != has {
			t.Errorf("target %d does not answer and has copies, %v: the checkpoint lacks some, %v", i, has, got)
		}
		s.Before = nil
	}
	if weak() {
		t.Error("the checkpoint lacks copies though all targets answer")
	}
}
