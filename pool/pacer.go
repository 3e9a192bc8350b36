package pool

import (
	"context"
	"sync"
	"time"
)

// pacer lets so many bytes through per second, on average. The zero value lets everything through. Safe for
// concurrent use.
type pacer struct {
	rate int64 // bytes per second; 0 = no bound

	mu   sync.Mutex
	next time.Time // when all that was let through has had its time
}

// wait waits until n bytes more may pass, or fails with ctx's cause once that has ended.
func (p *pacer) wait(ctx context.Context, n int64) error {
	if !pause(ctx, p.due(n)) {
		return context.Cause(ctx)
	}
	return nil
}

// due counts n bytes more and tells how long they have to wait.
func (p *pacer) due(n int64) time.Duration {
	if p.rate <= 0 {
		return 0
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	if p.next.Before(now) {
		p.next = now
	}
	left := p.next.Sub(now)
	p.next = p.next.Add(time.Duration(float64(n) / float64(p.rate) * float64(time.Second)))
	return left
}
