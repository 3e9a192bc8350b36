package writeback

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
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

	mu       sync.Mutex
	err      error // why the log takes no more
	queue    []*waiter
	writing  bool       // somebody leads: builds and writes a batch, or has been told to
	idle     *sync.Cond // writing has become false
	cur      *logFile   // takes appends; nil before the first
	files    []*logFile // all not yet clean, by file sequence; cur is the last
	nextFile uint64
	written  Seq    // all up to here are written and visible
	stable   Seq    // all up to here are stable
	horizon  Seq    // all up to here are published
	prevCRC  uint32 // of the batch header written last
	round    *syncRound
	ready    []readySlot
	starved  bool // the queue waits for a slot
	urgent   bool // … and UNMAP or OP records are in it
	replay   *replayed
	settling bool // recovered, and the horizon not told yet: no slot may change hands

	batch batch // scratch of whoever leads

	meta metaLog
	ckpt checkpointer

	toSeal chan struct{} // capacity 1: there may be a full file
	kick   chan struct{} // capacity 1: look for slots
	stop   context.CancelFunc
	done   sync.WaitGroup
}

// logFile is the run-time state of one log file.
type logFile struct {
	slot     int
	file     uint64
	term     UUID
	first    Seq
	last     Seq    // first-1 while it has no record
	end      uint32 // blocks used
	prevCRC  uint32 // of the header written last
	time     int64  // of the first batch
	reserved bool   // its slot is one of the reserve: no DATA
	full     bool   // takes no more
	synced   bool   // full, and stable to its end
	sealed   bool
	entries  []byte // body of the Sealed record, until sealed
}

type readySlot struct {
	slot     int
	reserved bool
}

// start runs the goroutines of a log whose state is set up.
func (l *Log) start() {
	ctx, cancel := context.WithCancel(context.Background())
	l.stop = cancel
	l.idle = sync.NewCond(&l.mu)
	l.toSeal = make(chan struct{}, 1)
	l.kick = make(chan struct{}, 1)
	l.done.Go(func() { l.sealFiles(ctx) })
	l.done.Go(func() { l.prepareSlots(ctx) })
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

// Pressure tells how full the tier is.
type Pressure struct {
	Slots int // of the tier
	Busy  int // of them, not to be had: unpublished, or being filled
	// Waiting means that appends wait for a slot.
	Waiting bool
	Dirty   Dirty
}

// Pressure reports how full the tier is, for the pacer.
func (l *Log) Pressure() Pressure {
	_, busy, _ := l.space.Counts()
	p := Pressure{Slots: l.space.Slots(), Busy: busy, Dirty: l.Unpublished()}
	l.mu.Lock()
	p.Waiting = l.starved
	l.mu.Unlock()
	return p
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
		if !w.inFlight {
			w.finish(err)
		}
	}
	clear(l.queue)
	l.queue = l.queue[:0]
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
	keep := l.files[:0]
	for _, f := range l.files {
		if f.sealed && (f.last <= l.horizon || planted.Bug("log: space freed before publication")) {
			l.space.SetClean(f.slot)
			continue
		}
		keep = append(keep, f)
	}
	clear(l.files[len(keep):])
	l.files = keep
}

// prepareSlots keeps slots at hand until ctx ends, and wakes the queue when it waited for one.
func (l *Log) prepareSlots(ctx context.Context) {
	poll := time.NewTimer(0)
	defer poll.Stop()
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
				l.opts.Log.Warn("no slot for the log", "err", err)
				poll.Reset(time.Second)
				break
			}
			if !got {
				if l.Pressure().Waiting {
					poll.Reset(slotPoll)
				}
				break
			}
		}
	}
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
	enough := len(l.ready) >= aheadSlots
	urgent := l.urgent && len(l.ready) == 0
	l.mu.Unlock()
	if enough {
		return false, nil
	}
	r := readySlot{}
	var err error
	if r.slot, err = l.space.Take(reserveSlots); errors.Is(err, tier.ErrNoSlot) && urgent {
		r.reserved = true
		r.slot, err = l.space.Take(0)
	}
	if errors.Is(err, tier.ErrNoSlot) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	if err := l.space.Prewrite(r.slot); err != nil {
		l.space.Free(r.slot)
		return false, err
	}
	l.mu.Lock()
	l.ready = append(l.ready, r)
	if l.cur != nil && !r.reserved {
		l.cur.reserved = false
	}
	l.slotCameLocked()
	l.mu.Unlock()
	return true, nil
}

// Close syncs what is written and ends the log; appends that wait for space fail. The tier stays
// open. It does not publish anything.
func (l *Log) Close() error {
	err := l.Sync(context.Background())
	if errors.Is(err, ErrClosed) {
		return nil
	}
	l.mu.Lock()
	if l.err == nil {
		l.failLocked(ErrClosed)
	}
	for l.writing {
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
