package writeback

import (
	"context"
	"errors"
	"fmt"
	"syscall"
	"time"
)

// How long to wait before a file system that took no write is tried again: at first, and at most.
const (
	retryFirst = time.Millisecond
	retryMost  = time.Second
)

// refused tells whether a file system turned down a call for want of space or because it is
// read-only. Nothing that it took before is in doubt then, and it may take the same write later.
// Of a sync that is not so: see Log.mendAll.
func refused(err error) bool {
	return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) || errors.Is(err, syscall.EROFS)
}

// obstacle is a kind of call that waits for the tier's file system.
type obstacle uint8

const (
	onSlot obstacle = 1 << iota // making a slot ready
	onData                      // a write or sync of the log
	onMeta                      // the metadata log
	onCheckpoint
)

// Health says whether the log takes appends, and if not, why.
type Health struct {
	// Failed is why the log has stopped for good, nil while it has not.
	Failed error
	// Waits is what the tier's file system answered last, while the log tries again until it takes
	// writes; nil otherwise. Appends, syncs of what is not stable and publications may wait then.
	Waits error
	Since time.Time // when that began
	// Mended counts the files written anew since Open after a write or a sync of them had failed.
	Mended int
}

// Health tells how the log is. Safe for concurrent use.
func (l *Log) Health() Health {
	l.mu.Lock()
	defer l.mu.Unlock()
	h := l.health
	h.Failed = l.err
	return h
}

// sayAfter is how long a call must be refused before the log says so: while the tier's files take up the
// last of the space, others are refused for a moment each time one of them is given up.
const sayAfter = 100 * time.Millisecond

// obstructed notes that a call must be tried again. The log says so once, until all such calls passed.
func (l *Log) obstructed(by obstacle, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.health.Waits = err
	if l.obstacles == 0 {
		l.health.Since = l.opts.Now()
	}
	l.obstacles |= by
	if !l.said && l.opts.Now().Sub(l.health.Since) >= sayAfter {
		l.said = true
		l.opts.Log.Warn("the tier takes no writes; the log waits", "err", err)
	}
}

// passed notes that a call of that kind succeeded.
func (l *Log) passed(by obstacle) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.obstacles&by == 0 {
		return
	}
	if l.obstacles &^= by; l.obstacles != 0 {
		return
	}
	if l.said {
		l.opts.Log.Info("the tier takes writes again", "seconds", l.opts.Now().Sub(l.health.Since).Seconds())
	}
	l.said, l.health.Waits, l.health.Since = false, nil, time.Time{}
}

// retry is the pause between tries of one call.
type retry struct{ delay time.Duration }

// pauseSpread is how many pauses in a row differ by a microsecond each, so that those who were refused at
// the same moment do not come back at the same moment.
const pauseSpread = 512

// pause waits before the next try, a little longer each time. It fails if ctx ends or the log is
// closed: then what was refused has failed.
func (l *Log) pause(ctx context.Context, r *retry) error {
	r.delay = min(max(2*r.delay, retryFirst), retryMost)
	t := time.NewTimer(r.delay + time.Duration(l.pauses.Add(1)%pauseSpread)*time.Microsecond)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-l.closing:
		return errClosing
	}
}

// StopWaiting ends all waiting for a file system that takes no writes, for good: what it refuses from now
// on has failed. Close begins with it; whoever must first end other work on the log calls it before.
func (l *Log) StopWaiting() { l.closeOnce.Do(func() { close(l.closing) }) }

// errClosing ends the waiting for a file system when the log is closed.
var errClosing = errors.New("not waited for any longer")

// withMeta runs do under the metadata lock until it succeeds. What the file system refuses is tried
// until it is taken; what fails otherwise a few times, each in a new file, and then the log stops.
// ctx ends the waiting between tries.
func (l *Log) withMeta(ctx context.Context, do func(*metaLog) error) error {
	var wait retry
	for tries := 0; ; {
		if err := l.Failed(); err != nil {
			return err
		}
		l.meta.mu.Lock()
		err := do(&l.meta)
		l.meta.mu.Unlock()
		switch {
		case err == nil:
			l.passed(onMeta)
			return nil
		case errors.Is(err, ErrClosed):
			return err
		case refused(err):
			l.obstructed(onMeta, err)
		default:
			if tries++; tries == mendTries || errors.Is(err, ErrDamaged) {
				return l.fail(err)
			}
			continue
		}
		if why := l.pause(ctx, &wait); why != nil {
			return fmt.Errorf("%w, after: %w", why, err)
		}
	}
}
