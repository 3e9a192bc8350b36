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

// Pressure tells how full the tier is, and what that does to appends with Data.
type Pressure struct {
	Slots int // of the tier
	Busy  int // of them, not to be had: unpublished, or being filled
	// Waiting means that appends wait: for a slot, or for the exposure to fall below its bound.
	Waiting bool
	// Delay is what an append that comes now waits for the pace alone; at most a second.
	Delay time.Duration
	// Exposed means that Dirty is at or over its bound, Options.MaxExposure or MaxExposureAge.
	Exposed bool
	Dirty   Dirty
}

// Pressure reports how full the tier is, for the pacer.
func (l *Log) Pressure() Pressure {
	_, busy, _ := l.space.Counts()
	p := Pressure{Slots: l.space.Slots(), Busy: busy, Dirty: l.Unpublished()}
	p.Exposed = l.exposed(p.Dirty)
	d, open := l.gate.delay()
	p.Waiting = l.starving() || !open && l.gate.waiting.Load() > 0 && (p.Exposed || d == slotPoll)
	p.Delay = d
	return p
}

// starving tells whether appends wait for a slot, or for a failed write to be mended.
func (l *Log) starving() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.starved || l.hurt
}

// exposed tells whether d is at a bound on exposure.
func (l *Log) exposed(d Dirty) bool {
	o := &l.opts
	return o.MaxExposure > 0 && d.Bytes >= o.MaxExposure ||
		o.MaxExposureAge > 0 && !d.Oldest.IsZero() && o.Now().Sub(d.Oldest) >= o.MaxExposureAge
}

// shut tells the gate whether new writes wait altogether, or fail.
func (l *Log) shut() (bool, error) {
	l.mu.Lock()
	starved, err := l.starved || l.hurt, l.err
	l.mu.Unlock()
	if err != nil || starved || l.opts.MaxExposure <= 0 && l.opts.MaxExposureAge <= 0 {
		return starved, err
	}
	return l.exposed(l.Unpublished()), nil
}

// marginShare is the share of a slot that counts as used before it is: an append that is let in as the
// last fits, one batch of 4 MiB in a slot of 64 MiB.
const marginShare = 16

// zone is how much of the space above the mark is in use: at most 0 below it, 1 when there is none left
// for data. It counts what is left of the current file, so it has no steps.
func (l *Log) zone() float64 {
	free, busy, clean := l.space.Counts()
	usable := float64(free + busy + clean - reserveSlots)
	left := float64(free+clean-reserveSlots) - 1./marginShare
	l.mu.Lock()
	for _, r := range l.ready {
		if !r.reserved {
			left++
		}
	}
	if l.cur != nil && !l.cur.reserved && !l.cur.full {
		left += 1 - float64(l.cur.end)/float64(l.slotBlocks())
	}
	l.mu.Unlock()
	return ((1 - max(0, left)/usable) - paceMark) / (1 - paceMark)
}

// Admit waits until so many bytes of Data may be appended: as the tier fills appends are delayed more and
// more, in the order they come, and where it is full, or the exposure at its bound, they wait until
// that has changed or ctx ends. Whoever appends Data calls it first and holds no lock meanwhile; only
// what other appends take between the two can then make Append itself wait. UNMAP and OP records
// need no admission.
func (l *Log) Admit(ctx context.Context, bytes int) error { return l.gate.enter(ctx, bytes) }

// Roomy tells whether an append of so many blocks of data would most likely be admitted at once and go
// straight into the current file. It is a hint: other appends may come first.
func (l *Log) Roomy(blocks int) bool {
	if _, open := l.gate.delay(); !open {
		return false
	}
	if shut, err := l.shut(); shut || err != nil {
		return false
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	return !l.hurt && len(l.queue) == 0 && l.cur != nil && !l.cur.reserved && l.slotBlocks()-int(l.cur.end) >= 2*blocks+64
}
