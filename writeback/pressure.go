package writeback

import (
	"context"
	"time"

	"graindisk/block"
)

// Dirty is what the cloud does not hold yet.
type Dirty struct {
	// Bytes is the net data, counted once per generation that holds it, and a block for each unmapped
	// range and each operation: it is 0 only if everything is published.
	Bytes  int64
	Oldest time.Time // of the first record, zero if there is none
}

// add adds so many blocks whose oldest record is of that time, in ns since 1970, if it is not 0.
func (d *Dirty) add(units int, oldest int64) {
	d.Bytes += int64(units) * block.Size
	if oldest == 0 {
		return
	}
	if t := time.Unix(0, oldest); d.Oldest.IsZero() || t.Before(d.Oldest) {
		d.Oldest = t
	}
}

func (g *generation) dirty() (sum Dirty) {
	sum.add(g.units, g.oldest)
	return sum
}

// Unpublished is what a lost host would cost, in all. It costs nothing worth counting.
func (l *Log) Unpublished() (sum Dirty) {
	l.ensureIndex()
	l.idx.RLock()
	defer l.idx.RUnlock()
	for _, g := range l.gens {
		sum.add(g.units, g.oldest)
	}
	return sum
}

// UnpublishedOf is what a lost host would cost one disk.
func (l *Log) UnpublishedOf(disk block.DiskID) (sum Dirty) {
	l.ensureIndex()
	l.idx.RLock()
	defer l.idx.RUnlock()
	for _, g := range l.gens {
		if d := g.disks[disk]; d != nil {
			sum.add(d.units(), d.oldest)
		}
	}
	return sum
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
	p.Waiting = l.waiting()
	return p
}

// Admit waits while appends with Data wait for a slot. A caller that holds locks during Append calls
// it first, so that hardly ever a lock is held for as long as the tier is full.
func (l *Log) Admit(ctx context.Context) error {
	for {
		l.mu.Lock()
		starved, err := l.starved, l.err
		l.mu.Unlock()
		if err != nil || !starved {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(slotPoll):
		}
	}
}

// Roomy tells whether an append of so many blocks of data would most likely go straight into the
// current file, without waiting for a slot. It is a hint: other appends may come first.
func (l *Log) Roomy(blocks int) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.err == nil && !l.starved && len(l.queue) == 0 && l.cur != nil && !l.cur.reserved &&
		l.slotBlocks()-int(l.cur.end) >= 2*blocks+64
}

// waiting tells whether appends wait for a slot.
func (l *Log) waiting() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.starved
}
