package pool

import (
	"context"
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// TestWriteBackYieldsToReadsForAWhile waits beside no reads, short ones and one that never ends.
func TestWriteBackYieldsToReadsForAWhile(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var f foreground
		wait := func() time.Duration {
			start := time.Now()
			if err := f.Wait(t.Context()); err != nil {
				t.Error(err)
			}
			return time.Since(start)
		}
		if d := wait(); d != 0 {
			t.Errorf("waited %v for no reads", d)
		}
		f.Enter()
		f.Enter()
		var wg sync.WaitGroup
		for range 3 {
			wg.Go(func() {
				if d := wait(); d != 10*time.Millisecond {
					t.Errorf("waited %v for reads of 10 ms", d)
				}
			})
		}
		time.Sleep(time.Millisecond)
		f.Leave()
		time.Sleep(9 * time.Millisecond)
		f.Leave()
		wg.Wait()
		f.Enter()
		if d := wait(); d != foregroundYield {
			t.Errorf("waited %v for a read that never ends", d)
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if err := f.Wait(ctx); !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	})
}
