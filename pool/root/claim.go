package root

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"

	"graindisk/internal/planted"
)

// Consent names the tenure that a takeover may end, as the person who gave it saw it.
type Consent struct {
	Epoch uint64
	Owner string // log uuid
}

// ClaimOptions say who claims.
type ClaimOptions struct {
	Owner     string   // log uuid, stable on the tier before the claim
	OwnerName string   // host, for messages
	Consent   *Consent // nil: only a released pool, or one that Owner holds already
	Own       bool     // not even a released pool, unless Owner was the last to hold it: else ErrFenced
	Above     uint64   // the claim's epoch is higher than this: the highest one Owner ever recorded

	// Epoch is told every ballot before anything is written under it, also when a later commit has to
	// claim again. It makes the epoch stable beside the log; if it fails, so does the claim. May be nil.
	Epoch func(Ballot) error
}

// tenure is what Commit needs of a won claim.
type tenure struct {
	ballot  Ballot
	ver     uint64 // of the value last proposed
	val     Value  // last proposed
	enc     []byte // val as JSON
	unknown bool   // whether val's outcome was never learnt
	cfg     Config // of the last value known to be committed
}

// errAgain ends an attempt to claim that is worth repeating.
var errAgain = errors.New("claim was contended")

// Claim makes o.Owner the owner of the pool in a new epoch and returns the value committed for it: the
// newest one before, with the new owner. A pool held by another log gives *HeldError unless o.Consent
// names exactly that tenure. It tries until it is decided or ctx ends; then the error matches
// ErrNoQuorum, the claim may have taken effect, and the same owner may claim again.
func (r *Register) Claim(ctx context.Context, o ClaimOptions) (Value, error) {
	if o.Owner == "" {
		return Value{}, errors.New("claim root: no owner")
	}
	r.setTenure(nil, ErrNotClaimed)
	r.used = max(r.used, o.Above)
	r.onEpoch = o.Epoch
	for attempt := 1; ; attempt++ {
		w, b, err := r.acquire(ctx, o.admit)
		if err != nil {
			return Value{}, fmt.Errorf("claim root: %w", err)
		}
		v := w.Val
		v.Owner, v.OwnerName, v.State = o.Owner, o.OwnerName, Held
		t := &tenure{ballot: b, ver: w.Ver, cfg: w.Val.Cfg}
		switch err := r.propose(ctx, t, v); {
		case err == nil:
			r.setTenure(t, nil)
			r.o.Log.Info("root claimed", "epoch", b.Epoch, "version", t.ver, "cut", v.Cut)
			_, mine, err := clone(v)
			return mine, err
		case !errors.Is(err, errAgain):
			return Value{}, fmt.Errorf("claim root: %w", err)
		}
		if err := r.pause(ctx, attempt); err != nil {
			return Value{}, fmt.Errorf("claim root: %w: contended: %w", ErrNoQuorum, err)
		}
	}
}

// admit judges whether the claim may follow w.
func (o ClaimOptions) admit(w Copy) error {
	if o.Own && w.Val.Owner != o.Owner {
		return fmt.Errorf("%w: epoch %d of %s (log %s)", ErrFenced, w.Accepted.Epoch, w.Val.OwnerName, w.Val.Owner)
	}
	if w.Val.State == Released || w.Val.Owner == o.Owner {
		return nil
	}
	if o.Consent != nil && *o.Consent == (Consent{w.Accepted.Epoch, w.Val.Owner}) {
		return nil
	}
	return &HeldError{
		Epoch: w.Accepted.Epoch, Owner: w.Val.Owner, OwnerName: w.Val.OwnerName,
		Cut: w.Val.Cut, Horizon: w.Val.Horizon,
	}
}

// Commit makes v the pool's value, under the tenure of the last Claim. v must carry on from the value
// committed or tried last, whatever became of that. An error means:
//
//   - ErrFenced: another claim has won; the tenure is over, and v is not and will not be committed by us,
//     though the winner may have adopted it.
//   - ErrUnknown: no quorum was heard of before ctx ended, or too many copies are down. Commit the same
//     value again; its number is kept.
//   - anything else: v is not acceptable, or there is no tenure; nothing was written.
//
// Committing a Released value ends the tenure.
func (r *Register) Commit(ctx context.Context, v Value) error {
	t := r.tenure
	if t == nil {
		return fmt.Errorf("commit root: %w", r.lost)
	}
	err := errors.Join(v.validate(), v.checkSuccessor(t.val), r.rules.follows(v.Cfg, t.val.Cfg))
	if t.unknown && v.Cfg.No != t.val.Cfg.No { // a second change before the first has settled could split the quorum
		err = errors.Join(err, fmt.Errorf("config %d follows config %d, whose outcome is unknown", v.Cfg.No, t.val.Cfg.No))
	}
	if err != nil {
		return fmt.Errorf("commit root: unacceptable value: %w", err)
	}
	err = r.propose(ctx, t, v)
	for attempt := 1; errors.Is(err, errAgain); attempt++ {
		if err = r.reclaim(ctx, t); err == nil {
			err = r.propose(ctx, t, v)
		}
		if errors.Is(err, errAgain) && r.pause(ctx, attempt) != nil {
			err = fmt.Errorf("%w: contended: %w", ErrUnknown, ctx.Err())
		}
	}
	switch {
	case errors.Is(err, ErrFenced):
		r.setTenure(nil, err)
	case err == nil && v.State == Released:
		r.setTenure(nil, ErrNotClaimed)
	}
	if err != nil {
		return fmt.Errorf("commit root: %w", err)
	}
	return nil
}

// reclaim takes a new ballot for t after the old one was outbid. It goes on only if the newest value
// is of this process: a rival may have claimed and gone again, or be another process with our log.
func (r *Register) reclaim(ctx context.Context, t *tenure) error {
	w, b, err := r.acquire(ctx, func(w Copy) error {
		if w.Accepted.Claimant == r.claimant {
			return nil
		}
		return fmt.Errorf("%w: epoch %d of %s (log %s)", ErrFenced, w.Accepted.Epoch, w.Val.OwnerName, w.Val.Owner)
	})
	switch {
	case errors.Is(err, ErrFenced):
		return err
	case err != nil:
		return fmt.Errorf("%w: %w", ErrUnknown, err)
	}
	t.ballot, t.ver, t.cfg, t.unknown = b, w.Ver, w.Val.Cfg, false
	r.setBallot(b)
	r.o.Log.Warn("root claimed again after a rival's attempt", "epoch", b.Epoch)
	return nil
}

func (r *Register) setTenure(t *tenure, lost error) {
	r.tenure, r.lost = t, lost
	if t == nil {
		t = &tenure{}
	}
	r.setBallot(t.ballot)
}

// propose has v accepted under t's ballot by a quorum of the last committed configuration and of v's
// own. It fails with errAgain if a higher ballot was met, else with ErrUnknown.
func (r *Register) propose(ctx context.Context, t *tenure, v Value) error {
	enc, v, err := clone(v)
	if err != nil {
		return err
	}
	t.ver = r.rules.version(t.ver, t.unknown, bytes.Equal(enc, t.enc))
	t.val, t.enc, t.unknown = v, enc, true
	committed := func(as []answer) bool {
		has := count(as).done
		if planted.Bug("root: committed by one copy") {
			return count(as).best != nil
		}
		return r.rules.quorum(t.cfg, v.Cfg, has)
	}
	settled := func(as []answer) bool { return committed(as) || count(as).refused }
	answers := r.ask(ctx, "accept", settled, func(ctx context.Context, tg *target) answer {
		return r.edit(ctx, tg, commitTries, func(o Copy) (Copy, verdict) {
			return r.rules.accept(o, t.ballot, t.ver, v)
		})
	})
	r.noteDown(answers)
	switch {
	case committed(answers):
		t.unknown, t.cfg = false, v.Cfg
		return nil
	case count(answers).refused:
		return errAgain
	}
	return fmt.Errorf("%w: %w", ErrUnknown, r.roundError(answers))
}

// clone copies v, which the caller may change later, and gives its encoding.
func clone(v Value) (enc []byte, c Value, err error) {
	if enc, err = json.Marshal(v); err == nil {
		err = json.Unmarshal(enc, &c)
	}
	if err != nil {
		return nil, Value{}, fmt.Errorf("encode root value: %w", err)
	}
	return enc, c, nil
}

// acquire has a quorum promise a new ballot and returns the newest value among their copies, if admit
// passes it before the first write and again after the promises.
func (r *Register) acquire(ctx context.Context, admit func(Copy) error) (Copy, Ballot, error) {
	for attempt := 1; ; attempt++ {
		w, b, err := r.tryAcquire(ctx, admit)
		var noQuorum *QuorumError
		if err == nil || !errors.Is(err, errAgain) {
			return w, b, err
		}
		if r.pause(ctx, attempt) != nil {
			if errors.As(err, &noQuorum) {
				return w, b, fmt.Errorf("%w: %w", noQuorum, ctx.Err())
			}
			return w, b, fmt.Errorf("%w: contended: %w", ErrNoQuorum, ctx.Err())
		}
	}
}

func (r *Register) tryAcquire(ctx context.Context, admit func(Copy) error) (Copy, Ballot, error) {
	s := r.survey(ctx, false, func(t *target, c Copy, etag string) { t.copy, t.etag = c, etag })
	if err := r.usable(s); err != nil {
		return Copy{}, Ballot{}, err
	}
	if err := admit(*s.Best); err != nil {
		return Copy{}, Ballot{}, err
	}
	b := r.nextBallot(s)
	if r.onEpoch != nil {
		if err := r.onEpoch(b); err != nil {
			return Copy{}, Ballot{}, fmt.Errorf("record epoch %d: %w", b.Epoch, err)
		}
	}
	promised := func(as []answer) bool {
		n := count(as)
		return n.best != nil && r.rules.quorum(n.best.Val.Cfg, n.best.Val.Cfg, n.done)
	}
	settled := func(as []answer) bool { return promised(as) || count(as).refused }
	answers := r.ask(ctx, "promise", settled, func(ctx context.Context, t *target) answer {
		return r.edit(ctx, t, claimTries, func(o Copy) (Copy, verdict) { return r.rules.promise(o, b) })
	})
	r.noteDown(answers)
	if !promised(answers) {
		return Copy{}, Ballot{}, fmt.Errorf("%w: %w", errAgain, r.roundError(answers))
	}
	w := *count(answers).best
	if w.Accepted.Epoch == b.Epoch { // a rival's tenure of the same number: two of one epoch must not be
		return Copy{}, Ballot{}, errAgain
	}
	return w, b, r.rules.recheck(admit, w)
}

// usable reports why a claim cannot start from s: errAgain if it may later.
func (r *Register) usable(s View) error {
	for _, t := range s.Targets {
		if t.State == Newer {
			return fmt.Errorf("target %s: %w", t.Name, t.Err)
		}
	}
	if !s.Quorum {
		if s.hopeless() {
			return s.quorumError()
		}
		return fmt.Errorf("%w: %w", errAgain, s.quorumError())
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.pool = s.Pool
	return nil
}

// nextBallot is above all that s shows and all this process ever used.
func (r *Register) nextBallot(s View) Ballot {
	for _, t := range s.Targets {
		if t.State == OK {
			r.used = max(r.used, t.Copy.Promised.Epoch)
		}
	}
	r.used++
	return Ballot{Epoch: r.used, Claimant: r.claimant}
}

// roundError tells what a round of edits lacked.
func (r *Register) roundError(answers []answer) error {
	e := &QuorumError{}
	for i, a := range answers {
		v := TargetView{Name: r.targets[i].Name, State: stateOf(a.err), Err: a.err}
		if a.verdict == refused {
			v.Err = fmt.Errorf("promised to epoch %d", a.copy.Promised.Epoch)
		}
		e.Targets = append(e.Targets, v)
	}
	return e
}
