package root

import (
	"bytes"
	"context"
	"errors"
	"fmt"

	"graindisk/backend"
)

// Create puts the first copies of a pool's root, all of them or it fails. v is the first value: not
// held, its i-th member at targets[i]. A target that holds any other root is refused with ErrExists
// before anything is written. A Create that failed halfway may be repeated with the same pool and
// value as long as nobody has claimed the pool; one may not claim a pool while it is being created.
func Create(ctx context.Context, targets []Target, pool string, v Value) error {
	return create(ctx, targets, Copy{Pool: pool, Ver: 1, Val: v, Nonce: "created"})
}

// create puts first as the first copy of every member.
func create(ctx context.Context, targets []Target, first Copy) error {
	pool, v := first.Pool, first.Val
	if err := v.validate(); err != nil {
		return fmt.Errorf("create root: %w", err)
	}
	if pool == "" || v.State != Released || len(v.Cfg.Next) > 0 || len(targets) != len(v.Cfg.Members) {
		return fmt.Errorf("create root of pool %q: state %q, %d targets, %d members, %d next members",
			pool, v.State, len(targets), len(v.Cfg.Members), len(v.Cfg.Next))
	}
	bodies := make([][]byte, len(targets))
	for i, m := range v.Cfg.Members {
		var err error
		first.Member = m.UUID
		if bodies[i], err = first.encode(); err != nil {
			return fmt.Errorf("create root: %w", err)
		}
	}
	for i, t := range targets {
		if _, err := holds(ctx, t, bodies[i]); err != nil {
			return fmt.Errorf("create root: target %s: %w", t.Name, err)
		}
	}
	for i, t := range targets {
		if err := createCopy(ctx, t, bodies[i]); err != nil {
			return fmt.Errorf("create root: target %s: %w", t.Name, err)
		}
	}
	return nil
}

// createTries bounds the puts of one copy; each failure is followed by a look at what is there.
const createTries = 3

func createCopy(ctx context.Context, t Target, body []byte) error {
	var putErr error
	for range createTries {
		if have, err := holds(ctx, t, body); have || err != nil {
			return err
		}
		if _, putErr = t.Store.Put(ctx, Key, body, backend.Cond{Absent: true}); putErr == nil {
			return nil
		}
	}
	if have, err := holds(ctx, t, body); have || err != nil {
		return err
	}
	return putErr
}

// holds reports whether t holds exactly body; another root there is an error.
func holds(ctx context.Context, t Target, body []byte) (bool, error) {
	got, _, err := t.Store.Get(ctx, Key, bytesMax)
	switch {
	case errors.Is(err, backend.ErrNotFound):
		return false, nil
	case err != nil:
		return false, err
	case bytes.Equal(got, body):
		return true, nil
	}
	c, err := Decode(got)
	if err != nil {
		return false, fmt.Errorf("%w: %w", ErrExists, err)
	}
	return false, fmt.Errorf("%w: of pool %s, member %s, %s, epoch %d", ErrExists, c.Pool, c.Member, c.Val.State, c.Promised.Epoch)
}
