package adaptive

import (
	"context"
	"fmt"
	"sync"
	"time"

	"golang.org/x/time/rate"
)

// Limits that people set. 0 is no limit.
type Limits struct {
	Concurrency       int   // calls under way, at most; default 64
	RequestsPerSecond int   // of all kinds
	UploadPerSecond   int64 // bytes
	DownloadPerSecond int64 // bytes
}

const concurrencyDefault = 64

func (l Limits) withDefaults() Limits {
	if l.Concurrency == 0 {
		l.Concurrency = concurrencyDefault
	}
	return l
}

// Window is limits for a part of the day, by the local clock. A window that ends before it begins goes
// over midnight.
type Window struct {
	From, To time.Duration // since midnight, in [0, 24 h]
	Limits   Limits
}

func (w Window) holds(now time.Time) bool {
	h, m, s := now.Clock()
	at := time.Duration(h)*time.Hour + time.Duration(m)*time.Minute + time.Duration(s)*time.Second
	if w.From <= w.To {
		return w.From <= at && at < w.To
	}
	return at >= w.From || at < w.To
}

// pace makes calls wait for the limits in force.
type pace struct {
	always Limits
	day    []Window

	mu       sync.Mutex
	inForce  Limits
	requests *rate.Limiter
	up, down *rate.Limiter
}

// burst is how much of a rate may go at once.
const burst = 250 * time.Millisecond

func newPace(o Options) *pace {
	p := &pace{always: o.Limits, day: o.Schedule,
		requests: rate.NewLimiter(rate.Inf, 1), up: rate.NewLimiter(rate.Inf, 1), down: rate.NewLimiter(rate.Inf, 1)}
	p.refresh(time.Now())
	return p
}

// refresh brings the limits of this time of day into force.
func (p *pace) refresh(now time.Time) {
	want := p.always
	for _, w := range p.day {
		if w.holds(now) {
			want = w.Limits
			break
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if want == p.inForce {
		return
	}
	p.inForce = want
	for _, x := range []struct {
		l   *rate.Limiter
		per float64
	}{{p.requests, float64(want.RequestsPerSecond)}, {p.up, float64(want.UploadPerSecond)}, {p.down, float64(want.DownloadPerSecond)}} {
		if x.per == 0 {
			x.l.SetLimit(rate.Inf)
			continue
		}
		x.l.SetBurst(max(1, int(x.per*burst.Seconds())))
		x.l.SetLimit(rate.Limit(x.per))
	}
}

// wait waits until the limits allow the call.
func (p *pace) wait(ctx context.Context, c call) error {
	p.refresh(time.Now())
	if err := p.requests.Wait(ctx); err != nil {
		return waitError(ctx, err)
	}
	bytes := p.down
	if c.op == Put {
		bytes = p.up
	}
	for left := c.bytes; left > 0 && bytes.Limit() != rate.Inf; {
		n := min(left, int64(bytes.Burst()))
		if err := bytes.WaitN(ctx, int(n)); err != nil {
			return waitError(ctx, err)
		}
		left -= n
	}
	return nil
}

// waitError is ctx's error, or the limiter's that the wait would outlast ctx.
func waitError(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return fmt.Errorf("rate limit: %w", err)
}
