package pool

import (
	"context"
	"sync"
	"time"
)

// foregroundYield is the longest that one request of write-back lets reads go first: with its usual
// tens of milliseconds per request, write-back keeps at least a good part of its pace under any load
// of reads, and is never starved. [tune]
const foregroundYield = 50 * time.Millisecond

// foreground tells write-back of reads that wait for targets, so that it lets them go first. The
// zero value is ready; all methods are safe for concurrent use.
type foreground struct {
	mu    sync.Mutex
	reads int
	idle  chan struct{} // closed when reads falls to 0; nil while nobody waits
}

// Enter counts a read that is about to ask targets.
func (f *foreground) Enter() {
	f.mu.Lock()
	f.reads++
	f.mu.Unlock()
}

// Leave undoes one Enter.
func (f *foreground) Leave() {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.reads--; f.reads == 0 && f.idle != nil {
		close(f.idle)
		f.idle = nil
	}
}

// Wait returns when no read waits for targets, or after foregroundYield, or with ctx's error. Write-back
// calls it before each request.
func (f *foreground) Wait(ctx context.Context) error {
	f.mu.Lock()
	if f.reads == 0 {
		f.mu.Unlock()
		return ctx.Err()
	}
	if f.idle == nil {
		f.idle = make(chan struct{})
	}
	idle := f.idle
	f.mu.Unlock()
	t := time.NewTimer(foregroundYield)
	defer t.Stop()
	select {
	case <-idle:
	case <-t.C:
	case <-ctx.Done():
		return ctx.Err()
	}
	return nil
}
