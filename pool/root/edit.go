package root

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"time"

	"graindisk/backend"
)

// claimTries is how many failures of one target a claim sits out before it counts the target as down
// for this ballot; the next ballot asks it again. A commit has no bound but its context.
const (
	claimTries  = 3
	commitTries = math.MaxInt
)

// roundStarts is logged as each round of requests starts.
const roundStarts = "root round starts"

// answer is one target's part in a round.
type answer struct {
	verdict verdict // pending, done, refused or down
	copy    Copy    // as proven at the target; if done or refused
	err     error   // if down
}

// ask runs f for every target at once and returns all answers; what names the round in the log. Once settled says that those given
// decide the round, the others have r.o.Linger left; then, and when ctx ends, they are cut off.
func (r *Register) ask(ctx context.Context, what string, settled func([]answer) bool, f func(context.Context, *target) answer) []answer {
	r.o.Log.Debug(roundStarts, "round", what)
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	type numbered struct {
		i int
		a answer
	}
	replies := make(chan numbered, len(r.targets))
	for i, t := range r.targets {
		go func() { replies <- numbered{i, f(ctx, t)} }()
	}
	answers := make([]answer, len(r.targets))
	var linger <-chan time.Time
	for left := len(answers); left > 0; {
		select {
		case n := <-replies:
			answers[n.i] = n.a
			left--
			if linger == nil && left > 0 && settled(answers) {
				linger = r.o.After(r.o.Linger)
			}
		case <-linger:
			stop()
		}
	}
	return answers
}

// edit applies rule to t's copy until the copy proves that it is done or refused. Any failure of a put
// leaves its outcome open, so the copy is read again: a get may prove "done", never "not done".
func (r *Register) edit(ctx context.Context, t *target, tries int, rule func(Copy) (Copy, verdict)) answer {
	for failures := 0; ; {
		next, v, err := r.step(ctx, t, rule)
		if err == nil {
			return answer{verdict: v, copy: next}
		}
		t.etag = ""
		failures++
		if failures >= tries || !retryable(err) || ctx.Err() != nil {
			return answer{verdict: down, err: err}
		}
		if !errors.Is(err, backend.ErrPrecondition) || failures > 1 {
			if r.pause(ctx, failures) != nil {
				return answer{verdict: down, err: err}
			}
		}
	}
}

// step reads the copy unless it is known, and puts what rule makes of it.
func (r *Register) step(ctx context.Context, t *target, rule func(Copy) (Copy, verdict)) (Copy, verdict, error) {
	if t.etag == "" {
		c, etag, err := r.get(ctx, t)
		if err != nil {
			return Copy{}, down, err
		}
		t.copy, t.etag = c, etag
	}
	next, v := rule(t.copy)
	if v != change {
		return t.copy, v, nil
	}
	next.Nonce = r.uuid()
	body, err := next.encode()
	if err != nil {
		return Copy{}, down, err
	}
	ctx, cancel := context.WithTimeout(ctx, r.o.RequestTimeout)
	defer cancel()
	etag, err := t.Store.Put(ctx, Key, body, backend.Cond{Match: t.etag})
	if err != nil {
		return Copy{}, down, err
	}
	t.copy, t.etag = next, etag
	return next, done, nil
}

// get reads t's copy, which must be of this pool (if it is known yet) and of a member that no other
// target has shown.
func (r *Register) get(ctx context.Context, t *target) (Copy, string, error) {
	ctx, cancel := context.WithTimeout(ctx, r.o.RequestTimeout)
	defer cancel()
	body, etag, err := t.Store.Get(ctx, Key, bytesMax)
	if errors.Is(err, backend.ErrNotFound) {
		return Copy{}, "", fmt.Errorf("%w: %w", ErrMissing, err)
	}
	if err != nil {
		return Copy{}, "", err
	}
	c, err := Decode(body)
	if err != nil {
		return Copy{}, "", fmt.Errorf("root in %v: %w", t.Store, err)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.pool != "" && c.Pool != r.pool {
		return Copy{}, "", fmt.Errorf("%w: it is of pool %s", ErrForeign, c.Pool)
	}
	if first := r.seenAt[c.Member]; first != nil && first != t {
		return Copy{}, "", fmt.Errorf("%w: it is the copy of member %s, seen at target %s", ErrForeign, c.Member, first.Name)
	}
	r.seenAt[c.Member] = t
	return c, etag, nil
}

// retryable reports whether asking again may help.
func retryable(err error) bool {
	if stateOf(err) != Unreachable {
		return false
	}
	switch backend.ClassOf(err) {
	case backend.Transient, backend.Throttled, backend.Precondition, backend.NotFound:
		return true
	}
	return false
}

// pause waits a random time that grows with the count of failures, or until ctx ends.
func (r *Register) pause(ctx context.Context, failures int) error {
	longest := r.o.BackOff << min(failures-1, 5)
	var b [8]byte
	r.mu.Lock()
	_, err := r.rand.Read(b[:])
	r.mu.Unlock()
	if err != nil {
		return fmt.Errorf("read random bytes: %w", err)
	}
	d := longest/2 + time.Duration(binary.LittleEndian.Uint64(b[:])%uint64(longest/2+1))
	select {
	case <-r.o.After(d):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// tally counts a round of edits.
type tally struct {
	done    func(uuid string) bool
	refused bool
	best    *Copy // highest accepted among those done; nil if none is
}

func count(answers []answer) tally {
	ok := map[string]bool{}
	t := tally{done: func(uuid string) bool { return ok[uuid] }}
	for i := range answers {
		switch a := &answers[i]; a.verdict {
		case done:
			ok[a.copy.Member] = true
			if a.copy.Seeded() {
				continue // a promise, and no value
			}
			if t.best == nil || a.copy.compareAccepted(t.best.Accepted, t.best.Ver) > 0 {
				t.best = &a.copy
			}
		case refused:
			t.refused = true
		}
	}
	return t
}

// noteDown logs targets that stopped or began to answer.
func (r *Register) noteDown(answers []answer) {
	for i, a := range answers {
		t := r.targets[i]
		if isDown := a.verdict == down; isDown != t.down {
			t.down = isDown
			if isDown {
				r.o.Log.Warn("root copy is down", "target", t.Name, "err", a.err)
			} else {
				r.o.Log.Info("root copy is back", "target", t.Name)
			}
		}
	}
}
