package pool

import (
	"context"
	"fmt"
	"math"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"graindisk/pool/root"
	"graindisk/vdisk"
)

// A pulse tells whether this process may have been standing still for long: stopped by a signal, or asleep with its
// machine. Meanwhile another gateway may have watched the beat stand still, and taken the pool over. So a reply of
// the pool, whatever it says, leaves only while the pulse is good:
//
//	good until T ──── a tick before T: good until tick + half ──── …
//	     │
//	     └─ no tick before T ─► held back ─► the root read by a quorum ─► ours: good until (begin of reading) + half
//	                                                                  └─► another's: fenced, nothing leaves any more
//
// T is compared with the clock when a reply is about to leave (Pool.hold), not when a tick comes: between
// the end of a pause and the tick that notices it no reply can slip. A tick cannot hide a pause either: it
// reads the clock once, and what it stores is that reading and half; if the process stood still in
// between, T lies in the past when it goes on. If it stands still between the check and the system call that sends the
// reply, then the reply says what was true before the pause and is like one that was long on its way.
//
// half is half the watch time: a watcher takes over only what has stood still for all of it. An owner that is merely cut
// off from its targets has a good pulse: it goes on, and what it acknowledges after a takeover goes to quarantine.
//
// The clock is the monotonic one, and CLOCK_BOOTTIME, which counts while the machine sleeps. To ask for that takes a
// system call; so a reply compares the monotonic clock and that of the wall, which are had without, and only
// when one of them is beyond its T is the other asked.
type pulse struct {
	half time.Duration // 0: pauses do not matter
	base time.Time
	boot func() time.Duration

	until atomic.Int64 // T by the monotonic clock, ns since base
	wall  atomic.Int64 // T by that of the wall, ns since 1970
	kick  chan struct{}

	mu      sync.Mutex
	bootT   time.Duration // guarded by mu
	doubted bool          // guarded by mu: the root must be read
	changed chan struct{} // guarded by mu; closed when T was set or the pulse has ended
	ended   bool          // guarded by mu
}

// instant is one reading of the clocks.
type instant struct {
	mono, wall int64
	boot       time.Duration
}

func (u *pulse) init(watch time.Duration) {
	u.half, u.base, u.boot = watch/2, time.Now(), bootClock
	if bootClockHook != nil {
		u.boot = bootClockHook
	}
	u.kick, u.changed = make(chan struct{}, 1), make(chan struct{})
	u.renew(u.now(), true)
}

// bootClockHook is the clock of pools in tests that pause them.
var bootClockHook func() time.Duration

// bootClock is the time since the machine was started, its sleep included.
func bootClock() time.Duration {
	var ts unix.Timespec
	if unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts) != nil {
		return 0 // then the monotonic clock alone counts
	}
	return time.Duration(ts.Nano())
}

func (u *pulse) now() instant {
	t := time.Now()
	return instant{int64(t.Sub(u.base)), t.UnixNano(), u.boot()}
}

// good tells, without waiting for anything, whether a reply may leave. It may say no when it could say yes: late tells.
func (u *pulse) good() bool {
	until := u.until.Load()
	if until == math.MaxInt64 {
		return true
	}
	t := time.Now()
	return int64(t.Sub(u.base)) < until && t.UnixNano() < u.wall.Load()
}

// late tells whether T has passed at that time.
func (u *pulse) late(at instant) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.doubted || u.half > 0 && (at.mono >= u.until.Load() || at.boot >= u.bootT)
}

// renew sets T to half after at, unless it is later already. Only with proof, when the root was read or claimed after at, does
// it end a doubt.
func (u *pulse) renew(at instant, proof bool) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.doubted && !proof || !u.doubted && u.half > 0 && u.until.Load() > at.mono+int64(u.half) {
		return
	}
	u.doubted = false
	if u.half == 0 {
		u.until.Store(math.MaxInt64)
	} else {
		u.bootT = at.boot + u.half
		u.wall.Store(at.wall + int64(u.half))
		u.until.Store(at.mono + int64(u.half))
	}
	u.wakeLocked()
}

func (u *pulse) wakeLocked() {
	close(u.changed)
	u.changed = make(chan struct{})
}

// doubt holds replies back until the root has been read.
func (u *pulse) doubt() {
	u.mu.Lock()
	u.doubted = true
	u.until.Store(math.MinInt64)
	u.mu.Unlock()
	u.poke()
}

func (u *pulse) poke() {
	select {
	case u.kick <- struct{}{}:
	default:
	}
}

// end lets those who wait go on: the pool is closed.
func (u *pulse) end() {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.ended = true
	u.wakeLocked()
}

// next is closed when T is set anew; ended tells that it will not be.
func (u *pulse) next() (changed <-chan struct{}, ended bool) {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.changed, u.ended
}

// hold returns nil when a reply of the pool that is ready now may leave. It waits while replies are held back, and
// fails with ErrFenced once the pool has another owner, with ErrClosed if the pool is closed meanwhile, and
// when ctx ends. A reply whose hold has failed must never leave.
//
// What is acknowledged is in the list of what was lost, should the pool be fenced: its change was in the log before
// hold was called, and hold found the pool not fenced, which it was before the list was made.
func (p *Pool) hold(ctx context.Context) error {
	for {
		if err := p.gate(); err != nil {
			return err
		}
		if p.pulse.good() {
			return nil
		}
		changed, ended := p.pulse.next()
		switch {
		case p.pulse.good(): // since a moment ago
			continue
		case ended:
			return fmt.Errorf("pool %s: %w", p.o.Name, vdisk.ErrClosed)
		}
		p.pulse.poke()
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// keepPulse ticks until ctx ends.
func (p *Pool) keepPulse(ctx context.Context) {
	u := &p.pulse
	defer u.end()
	var ticks <-chan time.Time
	if u.half > 0 {
		tick := time.NewTicker(max(u.half/4, time.Millisecond)) // an eighth of the watch time
		defer tick.Stop()
		ticks = tick.C
	}
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticks:
		case <-u.kick:
		}
		at := u.now()
		if !u.late(at) {
			u.renew(at, false)
			continue
		}
		p.o.Log.Warn("this process stood still, or has cause to doubt that it owns the pool: replies are held back until the root has been read",
			"pool", p.o.Name, "pause_max", u.half)
		if !p.askRoot(ctx) {
			return
		}
	}
}

// askRoot reads the root from a quorum, however long the targets take, and lets replies go if the pool is still
// ours. It reports false if it is not, or ctx ended.
func (p *Pool) askRoot(ctx context.Context) bool {
	told := false
	for wait := backoff(0); ; wait = wait.next() {
		at := p.pulse.now()
		rctx, cancel := context.WithTimeout(ctx, 30*time.Second)
		view, err := p.lookAtRoot(rctx)
		cancel()
		if err == nil {
			err = view.Err()
		}
		newer := newerRoot(view)
		switch {
		case ctx.Err() != nil:
			return false
		case newer != nil:
			p.stopServing(newer)
			return false
		case err == nil && !p.owns(view.Best):
			p.stopServing(fmt.Errorf("%w: epoch %d of %s (log %s)", root.ErrFenced, view.Best.Accepted.Epoch, view.Best.Val.OwnerName, view.Best.Val.Owner))
			return false
		case err == nil:
			if p.pulse.renew(at, true); !p.pulse.late(p.pulse.now()) {
				p.o.Log.Info("the root was read: the pool is still ours, replies go on", "pool", p.o.Name, "epoch", p.epoch.Load())
				return true
			}
		case !told:
			told = true
			p.o.Log.Warn("the root cannot be read; replies wait until it can", "pool", p.o.Name, "err", err)
		}
		if wait.sleep(ctx) != nil {
			return false
		}
	}
}

// owns tells whether a committed copy of the root names this process as the owner. The epoch of a claim of ours
// is raised before any target hears of it.
func (p *Pool) owns(c *root.Copy) bool {
	return c.Val.Owner == p.logID.String() && c.Accepted.Epoch <= p.epoch.Load()
}

// stopServing ends a pool that has been found to be another's. If the publisher had ended before, for another reason, it
// cannot list what is lost: this does.
func (p *Pool) stopServing(err error) {
	p.stopPublishing(err)
	p.pub.cancel()
	p.pulse.end()
	<-p.pub.done
	if p.isFenced() && p.fence.Load() == nil {
		p.noteFence()
	}
}
