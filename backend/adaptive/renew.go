package adaptive

import (
	"context"
	"sync/atomic"
	"time"

	"graindisk/backend"
)

// How often a store whose credentials are refused gets them anew. [tune]
const (
	renewGap     = 30 * time.Second // between tries, whatever came of the last
	renewTimeout = 15 * time.Second
)

// renewal gets credentials anew for all calls that were refused: one of them asks, the others wait for it.
//
//	refused ──► renewed since the call began? ── yes ──► once more
//	                │ no
//	                └─► asked within renewGap? ── yes ──► refused
//	                        │ no
//	                        └─► ask ── they changed ──► once more
type renewal struct {
	changes atomic.Int64  // of the credentials
	turn    chan struct{} // held by who asks; a lock that one can stop waiting for
	asked   time.Time     // the last try's end; guarded by turn
}

func newRenewal() *renewal { return &renewal{turn: make(chan struct{}, 1)} }

// renew reports whether a call that began when so many changes were seen, and was refused, may be made again.
func (s *Store) renew(ctx context.Context, seen int64) bool {
	from, ok := s.inner.(backend.Refresher)
	if !ok {
		return false
	}
	r := s.renewal
	select {
	case r.turn <- struct{}{}:
		defer func() { <-r.turn }()
	case <-ctx.Done():
		return false
	}
	if r.changes.Load() != seen {
		return true
	}
	if !r.asked.IsZero() && time.Since(r.asked) < renewGap {
		return false
	}
	rctx, cancel := context.WithTimeoutCause(ctx, renewTimeout, errTimeout)
	defer cancel()
	changed, err := from.Refresh(rctx)
	if ctx.Err() != nil {
		return false // that says nothing; the next one asks
	}
	r.asked = time.Now()
	switch {
	case err != nil:
		s.o.Log.Warn("credentials are refused, and no new ones are to be had", "store", s.inner.String(), "err", err)
	case !changed:
		s.o.Log.Warn("credentials are refused, and there are no others", "store", s.inner.String())
	default:
		r.changes.Add(1)
		s.o.Log.Info("credentials were refused; new ones are in use", "store", s.inner.String())
	}
	return err == nil && changed
}
