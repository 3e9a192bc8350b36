package pool

import (
	"context"
	"sync"
	"time"
)

// yieldMax is how long one segment's upload makes way for reads in all: publishing must go on, or the log
// fills. [tune]
const yieldMax = 250 * time.Millisecond

// foreground counts requests of guests that wait for targets, so that uploads can make way. The zero value
// is ready; safe for concurrent use.
type foreground struct {
	mu   sync.Mutex
	n    int
	none chan struct{} // closed when n falls to 0; nil while it is
}

// enter says that a request waits for a target, until the returned function is called, once.
func (f *foreground) enter() (leave func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.n++; f.n == 1 {
		f.none = make(chan struct{})
	}
	return f.leave
}

func (f *foreground) leave() {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.n--; f.n == 0 {
		close(f.none)
		f.none = nil
	}
}

// yield waits while requests wait for targets, until ctx ends or for as long as left says.
func (f *foreground) yield(ctx context.Context, left time.Duration) {
	f.mu.Lock()
	none := f.none
	f.mu.Unlock()
	if none == nil || left <= 0 {
		return
	}
	t := time.NewTimer(left)
	defer t.Stop()
	select {
	case <-none:
	case <-t.C:
	case <-ctx.Done():
	}
}
