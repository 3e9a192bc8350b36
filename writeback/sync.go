package writeback

import (
	"context"
	"fmt"
	"slices"

	"graindisk/internal/planted"
)

// syncRound is one round of syncing; whoever comes while it runs waits for the next.
type syncRound struct {
	done chan struct{}
}

// Sync makes everything stable that was written when it was called. Calls are combined: one round
// runs at a time, and the next serves all who came meanwhile. Once a round has begun for this call,
// ctx no longer ends it.
func (l *Log) Sync(ctx context.Context) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.syncLocked(ctx, l.written)
}

// syncThrough makes everything up to target, which is written, stable.
func (l *Log) syncThrough(ctx context.Context, target Seq) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.syncLocked(ctx, target)
}

func (l *Log) syncLocked(ctx context.Context, target Seq) error {
	for l.stable < target {
		if l.err != nil {
			return l.err
		}
		var wait chan struct{}
		switch {
		case l.hurt: // even while a round runs: its end does not help
			wait = l.mended
		case l.round != nil:
			wait = l.round.done
		default:
			l.runRoundLocked()
			continue
		}
		l.mu.Unlock()
		select {
		case <-wait:
			l.mu.Lock()
		case <-ctx.Done():
			l.mu.Lock()
			return fmt.Errorf("sync: %w", context.Cause(ctx))
		}
	}
	return l.err
}

// unsynced is a file with records to sync, as it was when the round began.
type unsynced struct {
	f        *logFile
	last     Seq
	complete bool
}

// runRoundLocked syncs the files with unsynced records, in order, through what is written now. If a
// sync fails, its file is to be mended, and stable goes as far as the files before it.
func (l *Log) runRoundLocked() {
	r := &syncRound{done: make(chan struct{})}
	l.round = r
	l.early.syncs()
	through := l.written
	var files []unsynced
	for _, f := range l.files {
		if !f.synced && f.last >= f.first {
			files = append(files, unsynced{f, f.last, f.complete()})
		}
	}
	l.mu.Unlock()
	var err error
	synced := 0
	for _, u := range files {
		if err = l.space.Sync(u.f.slot); err != nil {
			break
		}
		synced++
	}
	l.mu.Lock()
	for _, u := range files[:synced] {
		l.stable = max(l.stable, u.last)
		u.f.synced = u.complete
	}
	if err == nil {
		if planted.Bug("log: a sync counts what came while it ran") {
			through = l.written
		}
		l.stable = max(l.stable, through)
	} else if l.err == nil {
		files[synced].f.bad = err
		l.hurtLocked()
	}
	l.round = nil
	close(r.done)
	l.restLocked()
}

// sealFiles seals full files in their order until ctx ends or the log fails.
func (l *Log) sealFiles(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-l.toSeal:
		}
		for ctx.Err() == nil {
			f := l.nextToSeal()
			if f == nil {
				break
			}
			if err := l.seal(ctx, f); err != nil {
				return // the log has stopped and said why, or is closing
			}
		}
	}
}

func (l *Log) nextToSeal() *logFile {
	l.mu.Lock()
	defer l.mu.Unlock()
	if i := slices.IndexFunc(l.files, func(f *logFile) bool { return !f.sealed }); i >= 0 && l.files[i].complete() {
		return l.files[i]
	}
	return nil
}

// seal makes a full file stable and then says so in the metadata log.
func (l *Log) seal(ctx context.Context, f *logFile) error {
	if planted.Bug("log: sealed before it is stable") {
		f.synced = true
	} else if err := l.syncThrough(ctx, f.last); err != nil {
		return err
	}
	err := l.withMeta(ctx, func(m *metaLog) error {
		if err := m.appendSealedLocked(f, f.entries); err != nil {
			return err
		}
		l.mu.Lock()
		f.sealed, f.synced, f.entries = true, true, nil
		l.cleanLocked()
		l.mu.Unlock()
		return nil
	})
	if err == nil {
		l.SpaceFreed()
	}
	return err
}
