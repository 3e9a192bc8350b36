package turn

import (
	"slices"
	"testing"
	"testing/synctest"
	"time"
)

// TestLockHasOneHolderInOrder has many goroutines hold the lock for a while of fake time, each for itself,
// and expects them to come in order: with a sync.Mutex no time would pass at all.
func TestLockHasOneHolderInOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const n = 50
		var l Lock
		var came []int
		holders := 0
		l.Lock()
		for i := range n {
			go func() {
				l.Lock()
				defer l.Unlock()
				if holders++; holders != 1 {
					t.Errorf("%d holders", holders)
				}
				time.Sleep(time.Second)
				holders--
				came = append(came, i)
			}()
			synctest.Wait() // it waits for the lock now
		}
		if len(came) != 0 {
			t.Errorf("%v came in while the lock was held", came)
		}
		start := time.Now()
		l.Unlock()
		time.Sleep(n*time.Second + time.Millisecond)
		synctest.Wait()
		if took := time.Since(start); len(came) != n || !slices.IsSorted(came) || took > (n+1)*time.Second {
			t.Errorf("came %v in %v", came, took)
		}
		l.Lock() // it is free again
		defer l.Unlock()
	})
}

func TestUnlockOfAFreeLockPanics(t *testing.T) {
	defer func() {
		if recover() == nil {
			t.Error("no panic")
		}
	}()
	var l Lock
	l.Unlock()
}
