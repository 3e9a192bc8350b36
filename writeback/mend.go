package writeback

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"graindisk/block"
	"graindisk/tier"
)

// A write or sync of a log file that failed is not tried again on that file: the kernel may have
// dropped the bytes and counts their pages as clean, so that a second sync would succeed without
// them. The file's content is written into the file of a fresh slot instead, and that takes the first
// one's place and name:
//
//	slot-000005  header | batches … stable | batches … written |      a sync of it failed
//	slot-000009  the same bytes, checked by their CRCs, synced
//	             rename slot-000009 → slot-000005, sync of the folder
//	             batches in flight, from RAM, at the places they had
//
// Invariants:
//   - between the failure and the end of this no batch is built, none becomes visible, and no sync
//     runs: stable stays where it was, and a FLUSH waits.
//   - at every moment the name slot-000005 stands for a file that holds all batches shown, in the
//     same places: nothing refers to the slot anew, recovery need not know, and a crash finds either
//     file. What a reader has in hand stays right too.
//   - the copy under way in slot-000009 says that it is slot 5, so recovery passes over it.
//   - if the bytes cannot be had back intact, the log stops.

// mendTries is how many fresh files are tried, one after the other, before the log stops.
const mendTries = 4

// hurtLocked notes that a write or sync failed: no new batch, no round of syncing until it is mended.
func (l *Log) hurtLocked() {
	if !l.hurt {
		l.hurt = true
		l.mended = make(chan struct{})
	}
}

// restLocked wakes the mender if nothing is under way any more.
func (l *Log) restLocked() {
	if l.hurt && l.canMendLocked() {
		poke(l.toMend)
	}
}

func (l *Log) canMendLocked() bool {
	return l.err == nil && !l.mending && !l.leading && !l.showing && l.round == nil &&
		!slices.ContainsFunc(l.flight, func(b *batch) bool { return !b.landed })
}

// mend mends what is hurt until ctx ends.
func (l *Log) mend(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-l.toMend:
		}
		l.mu.Lock()
		can := l.hurt && l.canMendLocked()
		l.mending = l.mending || can
		l.mu.Unlock()
		if can {
			l.mendAll(ctx)
		}
	}
}

// mendAll replaces the files with failed writes or syncs and writes the batches in flight again.
// Nothing else builds, shows or syncs while l.mending, so the list of those in flight stays.
func (l *Log) mendAll(ctx context.Context) {
	flight := slices.Clone(l.flight)
	for _, b := range flight {
		b.keep()
	}
	l.mu.Lock()
	l.kept = true
	for _, b := range flight {
		b.again = b.err != nil
		for _, p := range b.pieces {
			p.w.notify()
		}
	}
	l.mu.Unlock()
	err := l.mendFiles(ctx, flight)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.hurt, l.mending, l.kept = false, false, false
	close(l.mended)
	if err == nil {
		for _, b := range flight {
			b.err = nil
		}
	} else {
		l.failLocked(fmt.Errorf("%w: %w", ErrFailed, err)) // unless it had failed meanwhile
	}
	l.showLandedLocked()
	if !l.leading {
		l.passLeadLocked()
	}
}

// keep copies what the batch wrote, so that it no longer depends on the callers' memory.
func (b *batch) keep() {
	if b.own == nil {
		b.own = make([]byte, 0, len(b.first)+len(b.buf)+b.blocks*block.Size)
		for _, p := range b.buffers() {
			b.own = append(b.own, p...)
		}
	}
}

func (l *Log) mendFiles(ctx context.Context, flight []*batch) error {
	var wait retry
	for tries := 0; ; {
		if err := l.Failed(); err != nil {
			return err
		}
		err := l.tryMend(flight)
		switch {
		case err == nil:
			l.passed(onData)
			return nil
		case errors.Is(err, ErrDamaged):
			return err
		case refused(err), errors.Is(err, tier.ErrNoSlot):
			l.obstructed(onData, err)
		default:
			if tries++; tries == mendTries {
				return err
			}
			l.opts.Log.Warn("log file not mended yet", "err", err)
			continue
		}
		if why := l.pause(ctx, &wait); why != nil {
			return fmt.Errorf("%w, after: %w", why, err)
		}
	}
}

func (l *Log) tryMend(flight []*batch) error {
	l.mu.Lock()
	files := slices.Clone(l.files)
	l.mu.Unlock()
	for _, f := range files {
		if f.bad == nil {
			continue
		}
		if err := l.replace(f); err != nil {
			return fmt.Errorf("%w, to mend: %w", err, f.bad)
		}
		l.opts.Log.Warn("log file written anew", "slot", f.slot, "file", f.file, "err", f.bad)
		f.bad = nil
		l.mu.Lock()
		l.health.Mended++
		l.mu.Unlock()
		for _, b := range flight {
			b.again = b.again || b.file == f
		}
	}
	for _, b := range flight {
		if !b.again {
			continue
		}
		if err := l.space.WriteAt(b.at, [][]byte{b.own}); err != nil {
			if !refused(err) {
				b.file.bad = err
			}
			return err
		}
		b.again = false
	}
	return nil
}

// replace writes what is shown of f into a fresh file, makes it stable and puts it in f's place.
func (l *Log) replace(f *logFile) error {
	slot, err := l.freshSlot()
	if err != nil {
		return err
	}
	if f.end > 0 {
		err = l.copyFile(f, slot)
	}
	if err == nil {
		err = l.space.Sync(slot)
	}
	if err == nil {
		err = l.space.Replace(f.slot, slot)
	}
	if err != nil {
		l.space.Shun(slot)
		return err
	}
	l.space.Free(slot)
	return nil
}

// freshSlot takes a slot, the reserve included.
func (l *Log) freshSlot() (int, error) {
	l.mu.Lock()
	if len(l.ready) > 0 {
		slot := l.ready[0].slot
		l.ready = slices.Delete(l.ready, 0, 1)
		l.mu.Unlock()
		poke(l.kick)
		return slot, nil
	}
	l.mu.Unlock()
	return l.takeSlot(0, func() bool { return true })
}

// takeSlot takes a slot and makes it ready, leaving reserve others; while hurry says false, it takes its
// time. If the file system has no room for another file, one that exists is taken.
func (l *Log) takeSlot(reserve int, hurry func() bool) (int, error) {
	slot, err := l.space.Take(reserve)
	if err != nil {
		return 0, err
	}
	if err = l.space.PrewriteAhead(slot, hurry); err == nil {
		return slot, nil
	}
	l.space.Shun(slot)
	if refused(err) {
		if made, err := l.space.TakeMade(reserve); err == nil {
			return made, nil
		}
	}
	return 0, err
}

// copyFile writes the blocks of f that are shown to the same blocks of a slot. The batches must follow
// from each other up to the last one shown, and a payload that is not stable must be whole; one that is
// stable is copied as it is, since its blocks are checked when they are read.
func (l *Log) copyFile(f *logFile, slot int) error {
	l.mu.Lock()
	stable := l.stable
	l.mu.Unlock()
	buf := make([]byte, block.Size)
	if err := l.space.ReadAt(tier.NewPlace(f.slot, 0), buf); err != nil {
		return err
	}
	h, err := decodeFileHeader(buf)
	if err != nil || h.log != l.id || h.term != f.term || h.file != f.file {
		return fmt.Errorf("%w: header of log file %d in %s", ErrDamaged, f.file, tier.Name(f.slot))
	}
	if err := l.space.WriteAt(tier.NewPlace(slot, 0), [][]byte{buf}); err != nil {
		return err
	}
	at, next, crc := uint32(1), f.first, h.crc
	for at < f.end {
		b, raw, err := l.readBatch(f, at)
		if err != nil {
			return err
		}
		if b.first != next || b.prevCRC != crc || b.last() > stable && !b.holds(raw[int(b.headerBlocks)*block.Size:]) {
			return fmt.Errorf("%w: batch of record %d in %s block %d, needed after a failed write", ErrDamaged, next, tier.Name(f.slot), at)
		}
		if err := l.space.WriteAt(tier.NewPlace(slot, at), [][]byte{raw}); err != nil {
			return err
		}
		at, next, crc = at+b.blocksAll(), b.last()+1, b.crc
	}
	if at != f.end || next != f.last+1 || crc != f.prevCRC {
		return fmt.Errorf("%w: log file %d in %s ends at block %d, not %d", ErrDamaged, f.file, tier.Name(f.slot), at, f.end)
	}
	return nil
}

// readBatch reads the batch at a block of f, payload included.
func (l *Log) readBatch(f *logFile, at uint32) (*batchHeader, []byte, error) {
	place, damaged := tier.NewPlace(f.slot, at), fmt.Errorf("%w: no batch in %s block %d", ErrDamaged, tier.Name(f.slot), at)
	raw := make([]byte, block.Size)
	if err := l.space.ReadAt(place, raw); err != nil {
		return nil, nil, err
	}
	n := batchHeaderBlocks(raw)
	if n == 0 || int64(at)+int64(n) > int64(f.end) {
		return nil, nil, damaged
	}
	raw = make([]byte, n*block.Size)
	if err := l.space.ReadAt(place, raw); err != nil {
		return nil, nil, err
	}
	h, err := decodeBatchHeader(raw, f.term)
	if err != nil || h.log != l.id || h.file != f.file || h.offset != at || int64(at)+int64(h.blocksAll()) > int64(f.end) {
		return nil, nil, damaged
	}
	raw = slices.Grow(raw, int(h.payload)*block.Size)[:int(h.blocksAll())*block.Size]
	if err := l.space.ReadAt(place+tier.Place(n), raw[n*block.Size:]); err != nil {
		return nil, nil, err
	}
	return h, raw, nil
}
