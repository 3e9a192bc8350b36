package pool

import (
	"context"
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// TestPacer lets four goroutines send 16 MB at 1 MB/s between them: the last of them passes when all before it have had
// their time, and a pause in between earns nothing.
func TestPacer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := pacer{rate: 1e6}
		for range 2 {
			begin := time.Now()
			var wg sync.WaitGroup
			for range 4 {
				wg.Go(func() {
					for range 4 {
						if err := p.wait(t.Context(), 1e6); err != nil {
							t.Error(err)
						}
					}
				})
			}
			wg.Wait()
			if took := time.Since(begin); took != 15*time.Second {
				t.Errorf("16 MB took %v; the last of them passes after 15 s", took)
			}
			time.Sleep(time.Minute)
		}
	})
}

// TestPacerEnds cancels who waits, and who would not have to: at no bound, too.
func TestPacerEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		why := errors.New("enough")
		ctx, cancel := context.WithCancelCause(t.Context())
		p := pacer{rate: 1}
		if err := p.wait(ctx, 3600); err != nil {
			t.Fatal(err)
		}
		time.AfterFunc(time.Second, func() { cancel(why) })
		begin := time.Now()
		if err := p.wait(ctx, 1); !errors.Is(err, why) || time.Since(begin) != time.Second {
			t.Errorf("cancelled after a second, it failed after %v: %v", time.Since(begin), err)
		}
		if err := new(pacer).wait(ctx, 1); !errors.Is(err, why) {
			t.Errorf("without a bound: %v", err)
		}
	})
}
