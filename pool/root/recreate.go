package root

import (
	"context"
	"errors"
	"fmt"

	"graindisk/backend"
)

// recreated marks copies that Recreate made and that nobody has changed since.
const recreated = "recreated"

// Recreate puts the copies of a root that was lost on every target, as Create does, but under ballot b, which
// is above all that the pool's objects tell of: whoever claims next goes above it, and whoever owned the
// pool before finds a value that is not its own. Nobody may claim the pool meanwhile.
func Recreate(ctx context.Context, targets []Target, pool string, v Value, b Ballot) error {
	if b.Epoch == 0 || b.Claimant == "" {
		return fmt.Errorf("create root of pool %q under epoch %d of %q", pool, b.Epoch, b.Claimant)
	}
	return create(ctx, targets, Copy{Pool: pool, Promised: b, Accepted: b, Ver: 1, Val: v, Nonce: recreated})
}

// Unfinished looks for any copy of a root on the targets, all of which must answer. It returns nil if there
// is none. If all copies there are were made by one Recreate that did not reach every target, and nobody has
// changed them, it returns one of them: Recreate with its pool, value and ballot finishes what was begun. Any
// other root fails with ErrExists and says where and what it is.
func Unfinished(ctx context.Context, targets []Target) (*Copy, error) {
	var first *Copy
	there := 0
	for i, t := range targets {
		body, _, err := t.Store.Get(ctx, Key, bytesMax)
		if errors.Is(err, backend.ErrNotFound) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("target %s: %w", t.Name, err)
		}
		c, err := Decode(body)
		if err != nil {
			return nil, fmt.Errorf("target %s: %w, which cannot be read: %w", t.Name, ErrExists, err)
		}
		there++
		if first == nil {
			first = &c
		}
		pristine := c.Nonce == recreated && c.Ver == 1 && c.Promised == c.Accepted &&
			c.Pool == first.Pool && c.Accepted == first.Accepted &&
			len(c.Val.Cfg.Members) == len(targets) && c.Val.Cfg.Members[i].UUID == c.Member
		if !pristine {
			return nil, fmt.Errorf("target %s: %w: of pool %s, %s, epoch %d, cut %d", t.Name, ErrExists, c.Pool, c.Val.State, c.Accepted.Epoch, c.Val.Cut)
		}
	}
	if there == len(targets) && there > 0 {
		return nil, fmt.Errorf("all targets: %w: of pool %s, epoch %d, cut %d", ErrExists, first.Pool, first.Accepted.Epoch, first.Val.Cut)
	}
	return first, nil
}
