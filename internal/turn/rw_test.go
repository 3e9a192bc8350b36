package turn

import (
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// TestRWLockLetsReadersInTogetherAndInOrder queues readers and writers at a held lock, each to hold it for
// a second of fake time, and expects readers that follow one another to share it and all to come in order.
func TestRWLockLetsReadersInTogetherAndInOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var l RWLock
		var mu sync.Mutex // guards what follows
		readers, writers := 0, 0
		var came []int
		at := map[int]time.Duration{}
		start := time.Now()
		l.Lock()
		const queue = "rrwrwwrrr"
		for i, kind := range queue {
			go func() {
				n, lock, unlock := &readers, l.RLock, l.RUnlock
				if kind == 'w' {
					n, lock, unlock = &writers, l.Lock, l.Unlock
				}
				lock()
				defer unlock()
				mu.Lock()
				*n++
				if writers > 1 || writers == 1 && readers > 0 {
					t.Errorf("%d readers and %d writers hold the lock", readers, writers)
				}
				came, at[i] = append(came, i), time.Since(start)
				mu.Unlock()
				time.Sleep(time.Second)
				mu.Lock()
				defer mu.Unlock()
				*n--
			}()
			synctest.Wait() // it waits for the lock now
		}
		if len(came) != 0 {
			t.Errorf("%v came in while the lock was held", came)
		}
		l.Unlock()
		time.Sleep(time.Minute)
		mu.Lock()
		defer mu.Unlock()
		slices.Sort(came) // those of one moment come in any order
		for i, want := range []int{0, 0, 1, 2, 3, 4, 5, 5, 5} {
			if len(came) != len(queue) || came[i] != i || at[i] != time.Duration(want)*time.Second {
				t.Fatalf("of %s came %v, at %v", queue, came, at)
			}
		}
		l.RLock() // it is free again
		defer l.RUnlock()
		l.RLock()
		defer l.RUnlock()
	})
}

func TestUnlockOfAFreeRWLockPanics(t *testing.T) {
	for name, unlock := range map[string]func(*RWLock){
		"nobody holds it, RUnlock": (*RWLock).RUnlock,
		"nobody holds it, Unlock":  (*RWLock).Unlock,
		"a reader holds it":        func(l *RWLock) { l.RLock(); l.Unlock() },
		"a writer holds it":        func(l *RWLock) { l.Lock(); l.RUnlock() },
	} {
		t.Run(name, func(t *testing.T) {
			defer func() {
				if recover() == nil {
					t.Error("no panic")
				}
			}()
			unlock(new(RWLock))
		})
	}
}
