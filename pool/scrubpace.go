package pool

import (
	"context"
	"sync"
	"time"
)

// pacer bounds a stream of reads. The zero value lets everything through.
type pacer struct {
	rate int64 // bytes per second; 0 = no bound

	mu   sync.Mutex
	next time.Time // when all that was let through has had its time
}

// wait waits until n bytes more may be read, or fails with ctx's cause.
func (p *pacer) wait(ctx context.Context, n int64) error {
	if p.rate <= 0 {
		return nil
	}
	p.mu.Lock()
	now := time.Now()
	if p.next.Before(now) {
		p.next = now
	}
	wait := p.next.Sub(now)
	p.next = p.next.Add(time.Duration(float64(n) / float64(p.rate) * float64(time.Second)))
	p.mu.Unlock()
	if !pause(ctx, wait) {
		return context.Cause(ctx)
	}
	return nil
}
