// Package turn has mutexes for work that may take long. sync.Mutex guards memory and is given back at once;
// a Lock or a RWLock may be held over I/O, and over the wait for a failed call to be tried again. They are
// handed over in the order of those who came, and who waits for one waits at a channel, which tests that
// fake the time can tell from someone at work.
package turn

import "sync"

// Lock is a mutual exclusion lock; the zero value is free. It must not be copied after first use.
type Lock struct {
	mu   sync.Mutex
	held bool
	next []chan struct{} // those who wait, in order
}

// Lock waits for its turn.
func (l *Lock) Lock() {
	l.mu.Lock()
	if !l.held {
		l.held = true
		l.mu.Unlock()
		return
	}
	c := make(chan struct{})
	l.next = append(l.next, c)
	l.mu.Unlock()
	<-c
}

// Unlock hands the lock to the one who has waited longest. It panics if nobody holds it.
func (l *Lock) Unlock() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.held {
		panic("turn: unlock of a free lock")
	}
	if len(l.next) == 0 {
		l.held = false
		return
	}
	close(l.next[0])
	l.next = l.next[1:]
}
