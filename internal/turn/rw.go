package turn

import "sync"

// RWLock is a Lock that any number of readers may hold at once; the zero value is free. Who waits is let
// in in order of arrival, so that neither kind starves the other. It must not be copied after first use.
type RWLock struct {
	mu   sync.Mutex
	held int // readers that hold it, or -1 for the one writer
	next []rwWaiter
}

type rwWaiter struct {
	in    chan struct{}
	write bool
}

// RLock waits for its turn to hold the lock with other readers.
func (l *RWLock) RLock() { l.lock(false) }

// Lock waits for its turn to hold the lock alone.
func (l *RWLock) Lock() { l.lock(true) }

func (l *RWLock) lock(write bool) {
	l.mu.Lock()
	if len(l.next) == 0 && l.admitLocked(write) {
		l.mu.Unlock()
		return
	}
	w := rwWaiter{make(chan struct{}), write}
	l.next = append(l.next, w)
	l.mu.Unlock()
	<-w.in
}

// admitLocked takes the lock if it is to be had.
func (l *RWLock) admitLocked(write bool) bool {
	switch {
	case write && l.held == 0:
		l.held = -1
	case !write && l.held >= 0:
		l.held++
	default:
		return false
	}
	return true
}

// RUnlock undoes one RLock. It panics if no reader holds the lock.
func (l *RWLock) RUnlock() { l.unlock(false) }

// Unlock undoes a Lock. It panics if no writer holds the lock.
func (l *RWLock) Unlock() { l.unlock(true) }

func (l *RWLock) unlock(write bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case write && l.held == -1:
		l.held = 0
	case !write && l.held > 0:
		l.held--
	default:
		panic("turn: unlock of a free lock")
	}
	n := 0
	for n < len(l.next) && l.admitLocked(l.next[n].write) {
		close(l.next[n].in)
		n++
	}
	if l.next = l.next[n:]; len(l.next) == 0 {
		l.next = nil
	}
}
