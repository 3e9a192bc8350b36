package root

import (
	"context"
	"errors"
	"math/rand/v2"
)

// contender is a host with a log that wants the pool: it claims, commits, releases, starts over. What
// it knows across crashes is its log's uuid and the epochs it recorded.
type contender struct {
	w   *world
	log string

	who      int        // this life's register: a hundred for each log
	rng      *rand.Rand // this life's decisions
	reg      *Register
	ctx      context.Context // ends with the life
	kill     context.CancelFunc
	cancel   context.CancelFunc // ends the operation under way; nil if none is
	ended    chan struct{}
	again    bool // to be started once this life has ended
	above    uint64
	recorded map[Ballot]bool
}

// start begins a life.
func (c *contender) start(rng *rand.Rand) {
	c.rng = rand.New(rand.NewPCG(rng.Uint64(), rng.Uint64()))
	c.who = max(c.who, int(c.log[4]-'0')*100) + 1
	c.reg = c.w.register(c.who)
	c.ctx, c.kill = context.WithCancel(context.Background())
	c.ended = make(chan struct{})
	go func() {
		defer close(c.ended)
		c.live()
	}()
}

func (c *contender) finished() bool {
	select {
	case <-c.ended:
		return true
	default:
		return false
	}
}

// crash ends the life; its puts may still be under way.
func (c *contender) crash() { c.kill() }

// deadline ends the operation under way. The world is locked or the contender waits.
func (c *contender) deadline() {
	if c.cancel != nil {
		c.cancel()
	}
}

// live claims and commits a few times. Consent is given on sight, or kept from long ago.
func (c *contender) live() {
	var consent *Consent
	for tries := 2 + c.rng.IntN(3); tries > 0 && c.ctx.Err() == nil; tries-- {
		v, err := c.claim(consent)
		var held *HeldError
		if errors.As(err, &held) && (consent == nil || c.rng.IntN(2) == 0) {
			consent = &Consent{held.Epoch, held.Owner}
		}
		if err == nil && !c.commits(v) {
			return
		}
	}
}

// commits makes a few commits on top of v, repeating or replacing those whose outcome is unknown. It
// reports false if the contender is satisfied.
func (c *contender) commits(v Value) bool {
	for n := 1 + c.rng.IntN(3); n > 0 && c.ctx.Err() == nil; n-- {
		v = c.w.chk.child(v)
		if n == 1 && c.rng.IntN(2) == 0 {
			v.State = Released
		}
		for {
			err := c.commit(v)
			switch {
			case err == nil && v.State == Released:
				return false
			case err == nil:
			case errors.Is(err, ErrFenced):
				return true
			case !errors.Is(err, ErrUnknown):
				c.w.chk.fail("%s: commit: %v", c.log, err)
				return false
			case c.ctx.Err() == nil && c.rng.IntN(2) == 0:
				continue
			}
			break
		}
		v.State = Held
	}
	return c.rng.IntN(2) == 0
}

// begin makes the context of an operation, which the scheduler may end.
func (c *contender) begin() (context.Context, func()) {
	ctx, cancel := context.WithCancel(c.ctx)
	c.w.mu.Lock()
	defer c.w.mu.Unlock()
	c.cancel = cancel
	return ctx, func() {
		c.w.mu.Lock()
		defer c.w.mu.Unlock()
		c.cancel = nil
		cancel()
	}
}

func (c *contender) claim(consent *Consent) (Value, error) {
	ctx, end := c.begin()
	defer end()
	op := c.w.chk.start()
	v, err := c.reg.Claim(ctx, ClaimOptions{
		Owner: c.log, OwnerName: "host of " + c.log, Consent: consent, Above: c.above,
		Epoch: func(b Ballot) error {
			c.above = max(c.above, b.Epoch)
			c.w.chk.ballot(b, consent)
			return nil
		},
	})
	c.w.note("%s: claim: %v", c.log, err)
	if err == nil {
		c.w.chk.claimed(op, c.reg.Ballot(), v)
	}
	return v, err
}

func (c *contender) commit(v Value) error {
	ctx, end := c.begin()
	defer end()
	op := c.w.chk.start()
	err := c.reg.Commit(ctx, v)
	c.w.note("%s: commit of value %d: %v", c.log, v.LastCRC, err)
	if err == nil {
		c.w.chk.committed(op, c.reg.Ballot(), v)
	}
	return err
}

func (w *world) note(format string, args ...any) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.logf(format, args...)
}
