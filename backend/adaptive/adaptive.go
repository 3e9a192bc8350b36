// Package adaptive stands between a pool and a store on the network. It masks what passes by itself,
// finds out how much the store can bear and stays below it, keeps to the limits that people set, and
// knows how the store is doing.
//
//	            ┌──────────────── adaptive.Store ────────────────┐
//	caller ───► │ health ─► rate limits ─► concurrency ─► inner  │ ───► store
//	            │   ▲            (schedule)     (AIMD)       │   │
//	            │   └───────── outcome, latency ◄────────────┘   │
//	            └──────────── again, after a back-off ───────────┘
//
// What is tried again, with exponential back-off and full jitter: calls that failed as Transient or
// Throttled, except a put with a condition, whose refusal could then be the echo of its own lost
// success; that one is for the caller, who knows what he wrote. Each attempt has a time-out of its own, so
// that a network that swallows packets is noticed. Attempts are few: a reader that has k other shards to
// ask is better served by an error soon.
//
// A call that is refused for its credentials makes a store that is a backend.Refresher get them anew, once for all
// calls refused at that time and at most once in 30 s, and is made once more if they changed.
//
// Nothing is asked twice at the same moment: a slow answer is waited for, up to the time-out. What hedging there is
// is for the reader of segments, with one budget for the pool.
//
// Concurrency is the additive-increase, multiplicative-decrease rule of congestion control (Chiu and Jain,
// 1989), per store: a success while the limit is used up adds a quarter of 1/limit, a throttled call halves
// it, a failed one takes a fifth, once for all calls that were under way. Waiting reads go before waiting writes; every eighth
// grant is a write's, so that neither starves.
//
// Health:
//
//	OK ──(over 10 % fail, or throttled)──► Degraded ──(8 in a row and 5 s without a success)──► Offline
//	 ▲                                       │  ▲                                                 │
//	 └──(3 in a row, below 2 % fail)─────────┘  └────────────(one probe succeeds)─────────────────┘
//
// While a store is offline all calls fail at once as Transient, but for one at a time that is let through as
// a probe, after 1 s, 2 s, … up to 15 s.
package adaptive

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync/atomic"
	"time"

	"graindisk/backend"
)

// ErrOffline is in the chain of the error of a call that was not made since the store is offline.
var ErrOffline = errors.New("the store is offline")

// Options of a Store. A zero field has the default that its comment names.
type Options struct {
	Limits   Limits   // default: none but Concurrency
	Schedule []Window // limits by the time of day; the first that fits replaces Limits
	// Attempts of a call that may be tried again; default 3.
	Attempts int
	// Timeout of one attempt, plus TimeoutPerMiB for what it carries; defaults 15 s and 4 s.
	Timeout, TimeoutPerMiB time.Duration
	Prices                 Prices
	Log                    *slog.Logger // default: discard
	// OnState, if set, is told of each change of health, without locks held.
	OnState func(from, to State)
}

func (o Options) withDefaults() Options {
	if o.Attempts == 0 {
		o.Attempts = 3
	}
	if o.Timeout == 0 {
		o.Timeout = 15 * time.Second
	}
	if o.TimeoutPerMiB == 0 {
		o.TimeoutPerMiB = 4 * time.Second
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	o.Limits = o.Limits.withDefaults()
	o.Schedule = append([]Window(nil), o.Schedule...)
	for i := range o.Schedule {
		o.Schedule[i].Limits = o.Schedule[i].Limits.withDefaults()
	}
	return o
}

// Store is a backend.Store that adapts to the one it wraps. Safe for concurrent use.
type Store struct {
	inner   backend.Store
	o       Options
	gate    *gate
	pace    *pace
	health  *health
	stats   *stats
	renewal *renewal

	noBatches atomic.Bool // the store said that it knows none
}

var _ backend.Watched = (*Store)(nil)

// New wraps inner.
func New(inner backend.Store, o Options) *Store {
	o = o.withDefaults()
	s := &Store{inner: inner, o: o, gate: newGate(o.Limits.Concurrency), pace: newPace(o), stats: newStats(o.Prices), renewal: newRenewal()}
	s.health = newHealth(func(from, to State, why error) {
		switch to {
		case OK:
			o.Log.Info("target is well again", "store", inner.String())
		default:
			o.Log.Warn("target is "+to.String(), "store", inner.String(), "err", why)
		}
		if o.OnState != nil {
			o.OnState(from, to)
		}
	})
	return s
}

// State is how the store is doing.
func (s *Store) State() State { return s.health.current() }

// Health implements backend.Watched.
func (s *Store) Health() backend.Health {
	h := s.stats.health()
	state, since := s.health.since()
	h.State, h.Since, h.Concurrency = state.String(), since.UTC(), s.gate.size()
	return h
}

// call is one operation on the store.
type call struct {
	op    Op
	key   string
	bytes int64 // that it carries, as far as is known before
	again bool  // it may be tried again
}

// do makes a call, again if need be. f returns how many bytes were carried.
func (s *Store) do(ctx context.Context, c call, f func(context.Context) (int64, error)) error {
	renewed := false
	for attempt := 1; ; attempt++ {
		seen := s.renewal.changes.Load()
		err := s.attempt(ctx, c, f)
		class := backend.ClassOf(err)
		if class == backend.Auth && !renewed && s.renew(ctx, seen) {
			renewed = true // what was refused had no effect: a put with a condition may go again, too
			s.stats.retried(c.op)
			continue
		}
		if class != backend.Transient && class != backend.Throttled || ctx.Err() != nil {
			return err
		}
		if !c.again || attempt >= s.o.Attempts || errors.Is(err, ErrOffline) {
			return err
		}
		s.stats.retried(c.op)
		if sleep(ctx, backoff(attempt, class == backend.Throttled)) != nil {
			return err
		}
	}
}

const (
	backoffMin      = 50 * time.Millisecond
	backoffMax      = 5 * time.Second
	throttledFactor = 4 // a store that says so is left alone longer
)

// backoff is how long to wait after the n-th attempt: full jitter over a doubling time.
func backoff(n int, throttled bool) time.Duration {
	d := backoffMin << min(n-1, 10)
	if throttled {
		d *= throttledFactor
	}
	return rand.N(min(d, backoffMax)) + time.Millisecond
}

func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// attempt makes a call once, when health, limits and concurrency let it.
func (s *Store) attempt(ctx context.Context, c call, f func(context.Context) (int64, error)) error {
	probe, err := s.health.admit(time.Now())
	if err != nil {
		return s.fail(c, err)
	}
	verdict := abandoned
	defer func() { s.health.note(time.Now(), verdict, probe, err) }()
	if err = s.pace.wait(ctx, c); err != nil {
		return s.fail(c, err)
	}
	if err = s.gate.enter(ctx, c.op == Put || c.op == Delete || c.op == Copy); err != nil {
		return s.fail(c, err)
	}
	actx, cancel := context.WithTimeoutCause(ctx, s.timeout(c), errTimeout)
	defer cancel()
	start := time.Now()
	var n int64
	n, err = f(actx)
	took := time.Since(start)
	verdict = judge(ctx, actx, err)
	s.gate.leave(start, verdict)
	s.stats.note(c.op, backend.ClassOf(err), n, took)
	return err
}

// timeout of one attempt. What a copy moves is not known; it does not pass through here.
func (s *Store) timeout(c call) time.Duration {
	n := c.bytes
	if c.op == Copy {
		n = copyBytes
	}
	return s.o.Timeout + time.Duration(n>>20)*s.o.TimeoutPerMiB
}

var errTimeout = errors.New("no answer in time")

// fail is the error of a call that was not made.
func (s *Store) fail(c call, err error) error {
	return &backend.Error{Op: c.op.String(), Store: s.inner.String(), Key: c.key, Class: backend.Transient, Err: err}
}

// verdict is what a call tells of its store.
type verdict uint8

const (
	abandoned verdict = iota // nothing: the caller gave up
	good                     // it answered, if only to refuse
	slow                     // it asked for less
	bad                      // it failed, or did not answer
)

// judge says what the outcome of a call with the caller's ctx and the attempt's actx tells.
func judge(ctx, actx context.Context, err error) verdict {
	switch backend.ClassOf(err) {
	case backend.Transient:
		if ctx.Err() != nil && !errors.Is(context.Cause(actx), errTimeout) && !errors.Is(ctx.Err(), context.DeadlineExceeded) {
			return abandoned
		}
		return bad
	case backend.Throttled:
		return slow
	}
	return good
}

// Put implements backend.Store.
func (s *Store) Put(ctx context.Context, key string, body []byte, c backend.Cond) (etag string, err error) {
	n := int64(len(body))
	err = s.do(ctx, call{Put, key, n, c == backend.Cond{}}, func(ctx context.Context) (_ int64, err error) {
		etag, err = s.inner.Put(ctx, key, body, c)
		return n, err
	})
	return etag, err
}

// Get implements backend.Store.
func (s *Store) Get(ctx context.Context, key string, max int64) (body []byte, etag string, err error) {
	err = s.do(ctx, call{Get, key, min(max, unknownBytes), true}, func(ctx context.Context) (_ int64, err error) {
		body, etag, err = s.inner.Get(ctx, key, max)
		return int64(len(body)), err
	})
	return body, etag, err
}

// unknownBytes is what a whole object is taken for before it has come.
const unknownBytes = 1 << 20

// ReadAt implements backend.Store.
func (s *Store) ReadAt(ctx context.Context, key string, p []byte, off int64) error {
	if len(p) == 0 {
		return s.inner.ReadAt(ctx, key, p, off) // asks nothing of the store
	}
	n := int64(len(p))
	return s.do(ctx, call{Read, key, n, true}, func(ctx context.Context) (int64, error) {
		return n, s.inner.ReadAt(ctx, key, p, off)
	})
}

// Stat implements backend.Store.
func (s *Store) Stat(ctx context.Context, key string) (info backend.Info, err error) {
	err = s.do(ctx, call{Stat, key, 0, true}, func(ctx context.Context) (_ int64, err error) {
		info, err = s.inner.Stat(ctx, key)
		return 0, err
	})
	return info, err
}

// Delete implements backend.Store.
func (s *Store) Delete(ctx context.Context, key string) error {
	return s.do(ctx, call{Delete, key, 0, true}, func(ctx context.Context) (int64, error) {
		return 0, s.inner.Delete(ctx, key)
	})
}

// List implements backend.Store.
func (s *Store) List(ctx context.Context, prefix, after string, max int) (objs []backend.Info, more bool, err error) {
	err = s.do(ctx, call{List, prefix, 0, true}, func(ctx context.Context) (_ int64, err error) {
		objs, more, err = s.inner.List(ctx, prefix, after, max)
		return 0, err
	})
	return objs, more, err
}

// String names the store that is wrapped.
func (s *Store) String() string { return s.inner.String() }

// Op is a kind of call.
type Op uint8

// The kinds of calls.
const (
	Put Op = iota
	Get
	Read
	Stat
	Delete
	List
	Copy
	ops
)

// String is the word of backend.Error.Op.
func (o Op) String() string {
	names := [ops]string{"put", "get", "read", "stat", "delete", "list", "copy"}
	if o < ops {
		return names[o]
	}
	return fmt.Sprintf("op %d", uint8(o))
}
