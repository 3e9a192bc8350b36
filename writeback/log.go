package writeback

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"graindisk/block"
	"graindisk/internal/planted"
	"graindisk/internal/vfs"
	"graindisk/tier"
)

// reserveSlots are left to UNMAP and OP records when DATA has to wait for space.
const reserveSlots = 2

// aheadSlots are taken and written over before they are needed [tune].
const aheadSlots = 2

// Batches written at the same time: at most flightMost, and one next to another only once so many
// blocks wait. Small records are better gathered: with 4 at any size, 4 KiB appends by 32 callers
// took half as long again as with 1, and from 256 KiB on it is the other way round [tune].
const (
	flightMost   = 4
	besideBlocks = 64
)

// slotPoll is how often a log without a slot looks for one: pins and other users of the tier give
// slots back without telling.
const slotPoll = 20 * time.Millisecond

// Options say where a log is. Space and Dir are its own or, for Space, shared with other logs and
// the cache of the same tier, opened by the caller and closed after the log.
type Options struct {
	FS    vfs.FS
	Dir   string // of identity, meta-* and ckpt-*; exists
	Space *tier.Space
	Pool  UUID         // the pool whose writes these are
	Log   *slog.Logger // default: discard
	// Now tells the time of records, for ages only; default time.Now.
	Now func() time.Time
	// MaxExposure and MaxExposureAge bound what the loss of the host costs: while so many bytes are
	// unpublished, or the oldest of them is so old, new writes wait (Admit). 0 is no bound.
	MaxExposure    int64
	MaxExposureAge time.Duration
}

func (o Options) withDefaults() Options {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	return o
}

// Log is an open log. All methods are safe for concurrent use. Locks are taken in the order
// meta.mu, idx, mu; none is held over I/O but meta.mu.
type Log struct {
	opts  Options
	fs    vfs.FS
	space *tier.Space
	id    UUID
	term  UUID

	idx  sync.RWMutex
	gens []*generation // oldest first; the last is the active one
	crcs checksums

	mu       sync.Mutex
	err      error // why the log takes no more
	queue    []*waiter
	leading  bool       // somebody leads: builds a batch, or has been told to
	flight   []*batch   // built and not shown, in order; at most flightMost
	showing  bool       // somebody shows what has landed
	tip      tip        // the end of the newest in flight; set anew when none is
	idle     *sync.Cond // leading has become false, or flight empty
	cur      *logFile   // takes appends; nil before the first
	files    []*logFile // all not yet clean, by file sequence; cur is the last
	nextFile uint64
	written  Seq    // all up to here are written and visible
	stable   Seq    // all up to here are stable
	horizon  Seq    // all up to here are published
	prevCRC  uint32 // of the batch header written last
	round    *syncRound
	early    early
	ready    []readySlot
	starved  bool // the queue waits for a slot
	urgent   bool // … and UNMAP or OP records are in it
	settling bool // recovered, and the horizon not told yet: no slot may change hands
	spare    []*batch

	// replay is what recovery read and has not put into gens yet; that is done once, when it is needed.
	replay atomic.Pointer[replayed]

	hurt      bool          // a write or sync failed, and is not mended yet
	mending   bool          // the mender is at it
	kept      bool          // … and has copied the batches in flight: their callers may leave
	mended    chan struct{} // closed when hurt has become false
	pauses    atomic.Uint64 // begun so far
	obstacles obstacle      // what waits for the file system
	said      bool          // … has been logged
	health    Health        // but for Failed

	waiting int // blocks of payload in the queue
	beside  int // how many of them make for another batch in flight; fixed

	gate *gate // of appends with Data

	meta metaLog
	ckpt checkpointer

	toSeal    chan struct{} // capacity 1: there may be a full file
	toMend    chan struct{} // capacity 1: hurt, and nothing is under way any more
	kick      chan struct{} // capacity 1: look for slots
	closing   chan struct{} // closed by Close: nothing waits for the file system any more
	closeOnce sync.Once
	ctx       context.Context // of the goroutines and of AppendMeta
	stop      context.CancelFunc
	done      sync.WaitGroup
}

// logFile is the run-time state of one log file.
type logFile struct {
	slot     int
	file     uint64
	term     UUID
	first    Seq
	last     Seq    // shown; first-1 while it has no record
	end      uint32 // blocks used by what is shown
	taken    Seq    // last, with what is in flight
	takenEnd uint32 // end, with what is in flight
	prevCRC  uint32 // of the last batch shown
	time     int64  // of the first batch
	reserved bool   // its slot is one of the reserve: no DATA
	full     bool   // takes no more
	synced   bool   // full, and stable to its end
	sealed   bool
	entries  []byte // body of the Sealed record, until sealed
	bad      error  // a write or sync of it failed: mend it
}

// complete tells whether all the file will ever hold is shown.
func (f *logFile) complete() bool { return f.full && f.last == f.taken }

type readySlot struct {
	slot     int
	reserved bool
}

// start runs the goroutines of a log whose state is set up.
func (l *Log) start() {
	ctx, cancel := context.WithCancel(context.Background())
	l.ctx, l.stop = ctx, cancel
	l.beside = besideBlocks
	l.idle = sync.NewCond(&l.mu)
	l.toSeal = make(chan struct{}, 1)
	l.toMend = make(chan struct{}, 1)
	l.kick = make(chan struct{}, 1)
	l.closing = make(chan struct{})
	l.done.Go(func() { l.sealFiles(ctx) })
	l.done.Go(func() { l.prepareSlots(ctx) })
	l.done.Go(func() { l.mend(ctx) })
	l.SpaceFreed()
}

// UUID names the log.
func (l *Log) UUID() UUID { return l.id }

// Stable is the highest sequence known to survive a power cut, with all before it.
func (l *Log) Stable() Seq {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.stable
}

// Written is the highest sequence acknowledged, with all before it.
func (l *Log) Written() Seq {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.written
}

// SpaceFreed says that slots may have become free or clean; appends waiting for one go on.
func (l *Log) SpaceFreed() { poke(l.kick) }

func poke(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// fail stops the log; the first cause stays. What waits is told.
func (l *Log) fail(cause error) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.failLocked(fmt.Errorf("%w: %w", ErrFailed, cause))
}

func (l *Log) failLocked(err error) error {
	if l.err != nil {
		return l.err
	}
	l.err = err
	if !errors.Is(err, ErrClosed) {
		l.opts.Log.Error("log stopped", "err", err)
	}
	for _, w := range l.queue {
		if w.flying == 0 {
			w.finish(err)
		}
	}
	clear(l.queue)
	l.queue, l.waiting = l.queue[:0], 0
	if l.hurt && !l.mending { // else the mender does it
		l.hurt = false
		close(l.mended)
	}
	l.showLandedLocked()
	return err
}

// Failed is nil while the log takes appends, else why not.
func (l *Log) Failed() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.err
}

// cleanLocked gives up the files that lie wholly at or below the horizon.
func (l *Log) cleanLocked() {
	keep, all := l.files[:0], len(l.files)
	for _, f := range l.files {
		if f.sealed && (f.last <= l.horizon || planted.Bug("log: space freed before publication")) {
			l.crcs.drop(f.slot)
			l.space.SetClean(f.slot)
			continue
		}
		keep = append(keep, f)
	}
	clear(l.files[len(keep):])
	l.files = keep
	if n := all - len(keep); n > 0 {
		l.gate.freed(int64(n) * l.space.SlotBytes())
	}
}

// prepareSlots keeps slots at hand until ctx ends, and wakes the queue when it waited for one.
func (l *Log) prepareSlots(ctx context.Context) {
	poll := time.NewTimer(0)
	defer poll.Stop()
	var wait retry
	for {
		select {
		case <-ctx.Done():
			return
		case <-l.kick:
		case <-poll.C:
		}
		for ctx.Err() == nil {
			got, err := l.prepareOne()
			if err != nil {
				l.obstructed(onSlot, err)
				if l.pause(ctx, &wait) != nil {
					return
				}
				continue
			}
			wait = retry{}
			if !got {
				if l.starving() {
					poll.Reset(slotPoll)
				}
				break
			}
		}
	}
}

// unsealedMax full files that are not sealed yet bring no more slots, so that recovery never scans more
// than these, those that were at hand, and the current one. A tier that syncs more slowly than it is
// written holds writers back here. [tune]
const unsealedMax = 2

// unsealedLocked counts the full files that are not sealed yet; they are the last but one and before.
func (l *Log) unsealedLocked() (n int) {
	for i := len(l.files) - 1; i >= 0 && !l.files[i].sealed; i-- {
		if l.files[i].full {
			n++
		}
	}
	return n
}

// slotsShort tells whether the current file is the last one with a slot, or the log is being closed.
func (l *Log) slotsShort() bool {
	select {
	case <-l.closing:
		return true
	default:
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.ready) == 0
}

// prepareOne gets one slot ready; false if there is none or none is needed.
func (l *Log) prepareOne() (bool, error) {
	l.mu.Lock()
	if l.err != nil || l.settling {
		l.mu.Unlock()
		return false, nil
	}
	if l.cur != nil && l.cur.reserved {
		// The reserve itself is not touched for DATA: free it for all once there is more.
		if free, _, clean := l.space.Counts(); free+clean >= reserveSlots {
			l.cur.reserved = false
			l.slotCameLocked()
		}
	}
	for i := range l.ready {
		if free, _, clean := l.space.Counts(); free+clean >= reserveSlots {
			l.ready[i].reserved = false
		}
	}
	urgent := l.urgent && len(l.ready) == 0
	enough := len(l.ready) >= aheadSlots || l.unsealedLocked() >= unsealedMax && !urgent
	l.mu.Unlock()
	if enough {
		return false, nil
	}
	r := readySlot{}
	var err error
	if r.slot, err = l.takeSlot(reserveSlots, l.slotsShort); errors.Is(err, tier.ErrNoSlot) && urgent {
		r.reserved = true
		r.slot, err = l.takeSlot(0, l.slotsShort)
	}
	if errors.Is(err, tier.ErrNoSlot) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	l.passed(onSlot)
	l.mu.Lock()
	l.ready = append(l.ready, r)
	if l.cur != nil && !r.reserved {
		l.cur.reserved = false
	}
	l.slotCameLocked()
	l.mu.Unlock()
	return true, nil
}

// Close syncs what is written and ends the log; appends that wait for space fail, and a file system
// that takes no writes is not waited for. The tier stays open. It does not publish anything.
func (l *Log) Close() error {
	l.StopWaiting()
	err := l.Sync(context.Background())
	if errors.Is(err, ErrClosed) {
		return nil
	}
	l.mu.Lock()
	if l.err == nil {
		l.failLocked(ErrClosed)
	}
	for l.leading || len(l.flight) > 0 {
		l.idle.Wait()
	}
	l.mu.Unlock()
	l.stop()
	l.done.Wait()
	l.mu.Lock()
	for _, r := range l.ready {
		l.space.Free(r.slot)
	}
	l.ready = nil
	l.mu.Unlock()
	return errors.Join(err, l.meta.close())
}

// slotBlocks is the length of a log file in blocks.
func (l *Log) slotBlocks() int { return int(l.space.SlotBytes() / block.Size) }
