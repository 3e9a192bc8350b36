package densetree

import (
	"fmt"
	"sync"
	"sync/atomic"
)

// background is the state of the goroutine that merges. It runs while there is something to merge.
type background struct {
	closing atomic.Bool
	stop    chan struct{} // closed with closing

	mu      sync.Mutex
	changed sync.Cond // running went false
	running bool
	err     error // of the last merge
	retryAt int   // entries of level 0 at which a failed merge is tried again
}

func (b *background) init() {
	b.stop = make(chan struct{})
	b.changed.L = &b.mu
}

func (b *background) lastErr() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.err
}

// freeze makes level 0 the frozen one and has it merged. If the one before is still being merged it
// waits; if that has failed, level 0 stays, to grow, and the merge is tried again now and then. The
// caller holds writer.
func (t *Tree) freeze() {
	b := &t.bg
	b.mu.Lock()
	for t.isFrozen() && !b.closing.Load() {
		if !b.running {
			if b.err != nil && t.level0.n < b.retryAt {
				break
			}
			t.startLocked()
		}
		if b.err != nil { // the retry is under way; a put does not wait for what may fail again
			break
		}
		b.changed.Wait()
	}
	b.mu.Unlock()
	if t.isFrozen() || b.closing.Load() || t.level0.n == 0 {
		return
	}
	t.setLevel0(level0{}, t.memoryRuns(t.level0, true), nil)
	b.mu.Lock()
	t.startLocked()
	b.mu.Unlock()
}

func (t *Tree) isFrozen() bool {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return t.rows != nil && len(t.rows.frozen()) > 0
}

func (t *Tree) startLocked() {
	if !t.bg.running && !t.bg.closing.Load() {
		t.bg.running = true
		go t.mergeLoop()
	}
}

// mergeLoop merges until every level has its size.
func (t *Tree) mergeLoop() {
	b := &t.bg
	for {
		err := t.mergeAll()
		if err != nil && !b.closing.Load() {
			t.o.MergeFailed(fmt.Errorf("merge maps: %w", err))
		}
		t.mu.RLock()
		n := t.level0.n
		t.mu.RUnlock()
		b.mu.Lock()
		b.err, b.retryAt = err, n+max(1, t.o.Level0Max/4)
		if err != nil || b.closing.Load() || !t.isFrozen() {
			b.running = false
			b.changed.Broadcast()
			b.mu.Unlock()
			return
		}
		b.mu.Unlock()
	}
}

// mergeAll merges the frozen level 0, then whatever has become too large. One merge runs at a time
// among the trees of a store.
func (t *Tree) mergeAll() error {
	if s := t.o.Store; s != nil {
		select {
		case s.merging <- struct{}{}:
		case <-t.bg.stop:
			return ErrClosed
		}
		defer func() {
			<-s.merging
			s.sweep()
		}()
	}
	if err := t.mergeFrozen(); err != nil {
		return err
	}
	for i := 1; i < levelsMax; i++ {
		for t.levelLen(i) > t.levelMax(i) {
			if err := t.mergeRun(i); err != nil {
				return err
			}
		}
	}
	return nil
}

// wait returns when nothing is being merged any more. The merge under way may fail of what has passed since, like a
// page that was not here: then it is tried again. The caller holds writer, so that nothing is added.
func (t *Tree) wait() error {
	b := &t.bg
	b.mu.Lock()
	defer b.mu.Unlock()
	for b.running {
		b.changed.Wait()
	}
	if t.isFrozen() || b.err != nil {
		t.startLocked()
	}
	for b.running {
		b.changed.Wait()
	}
	if b.closing.Load() {
		return ErrClosed
	}
	return b.err
}

// Flush merges level 0 down and waits for that.
func (t *Tree) Flush() error {
	t.writer.Lock()
	defer t.writer.Unlock()
	return t.flush()
}

func (t *Tree) flush() error {
	if err := t.wait(); err != nil {
		return err
	}
	t.freeze()
	return t.wait()
}

// Compact merges everything into the lowest level; every hidden block has then been reported.
func (t *Tree) Compact() error {
	t.writer.Lock()
	defer t.writer.Unlock()
	if err := t.flush(); err != nil {
		return err
	}
	if s := t.o.Store; s != nil {
		s.merging <- struct{}{}
		defer func() {
			<-s.merging
			s.sweep()
		}()
	}
	for i := 1; i < t.levels(); i++ {
		for t.levelLen(i) > 0 {
			if err := t.mergeRun(i); err != nil {
				return err
			}
		}
	}
	return nil
}

// Close ends the merge under way, if there is one, and lets the content go. A merge that was cut short
// is done again by the next process. Lookups that have begun finish; the files stay for Store.Keep to
// judge.
func (t *Tree) Close() {
	b := &t.bg
	if b.closing.Swap(true) {
		return
	}
	close(b.stop)
	b.mu.Lock()
	b.changed.Broadcast()
	for b.running {
		b.changed.Wait()
	}
	b.mu.Unlock()
	t.writer.Lock()
	defer t.writer.Unlock()
	t.o.Guard.Lock()
	t.mu.Lock()
	w := t.rows
	t.rows = nil
	t.mu.Unlock()
	t.o.Guard.Unlock()
	w.release()
	if s := t.o.Store; s != nil {
		s.trees.Add(-1)
		s.level0.Add(-int64(t.level0.n))
	}
}
