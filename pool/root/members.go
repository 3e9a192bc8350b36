package root

import (
	"context"
	"errors"
	"fmt"

	"graindisk/backend"
)

// Seeded reports whether o has accepted no value yet: Seed put it, and no commit has reached it since. Its
// Val is that of no commit; it only says which members there were. Such a copy may have promised ballots.
func (o Copy) Seeded() bool { return o.Ver == 0 }

// Seed puts the first copy of m, which is to become a member, at the named target. It needs a tenure. The
// target must answer and hold no root, else ErrExists, but for two cases:
//
//   - m's copy is there already, of an earlier call perhaps: then there is nothing to do.
//   - the copy there is of this pool, of a member that is in no configuration known to this tenure, and has
//     promised nothing above the tenure's ballot: a change that came to nothing left it, or one that is
//     past. m takes its place. Whatever that copy had said, this tenure's quorum has seen or outbid.
//
// m.UUID is new and m.ID was never used: an acceptor must not forget, so a uuid that the configuration
// names is refused (ErrMember). After any other error Seed is called again with another new uuid; nothing
// names this one. Seed makes at most one put, and a lost reply is settled by a get. What it cannot settle
// is a put so late that the copy was wiped in between; who empties a target by hand waits until no request
// of a gateway can be under way to it.
//
// The copy has promised and accepted nothing, and counts for m alone, so nothing of the pool depends on it
// before a commit names m. Seed is not to be called at the same time as Claim or Commit.
func (r *Register) Seed(ctx context.Context, target string, m Member) error {
	t := r.tenure
	if t == nil {
		return fmt.Errorf("seed root: %w", r.lost)
	}
	if err := checkMembers([]Member{m}); err != nil {
		return fmt.Errorf("seed root: %w", err)
	}
	for _, tg := range r.targets {
		if tg.Name == target {
			if err := r.seed(ctx, t, tg, m); err != nil {
				return fmt.Errorf("seed root: member %s at target %s: %w", m.UUID, target, err)
			}
			return nil
		}
	}
	return fmt.Errorf("seed root: no target %q", target)
}

func (r *Register) seed(ctx context.Context, t *tenure, tg *target, m Member) error {
	tg.etag = "" // whatever comes of it, the next edit reads the copy
	there, cond, err := r.seedAt(ctx, t, tg, m)
	if there || err != nil {
		return err
	}
	c := Copy{
		Pool: r.poolOf(nil), Member: m.UUID, Nonce: r.uuid(),
		Val: Value{Format: ValueFormat, Cfg: t.cfg, State: Released},
	}
	body, err := c.encode()
	if err != nil {
		return err
	}
	putErr := r.putSeed(ctx, tg, body, cond)
	if putErr == nil {
		return nil
	}
	if there, _, err = r.seedAt(ctx, t, tg, m); there {
		return nil
	}
	return errors.Join(putErr, err)
}

func (r *Register) putSeed(ctx context.Context, tg *target, body []byte, cond backend.Cond) error {
	ctx, cancel := context.WithTimeout(ctx, r.o.RequestTimeout)
	defer cancel()
	_, err := tg.Store.Put(ctx, Key, body, cond)
	return err
}

// seedAt looks whether m's copy is at tg and, if not, under which condition it may be put there.
func (r *Register) seedAt(ctx context.Context, t *tenure, tg *target, m Member) (there bool, c backend.Cond, err error) {
	ctx, cancel := context.WithTimeout(ctx, r.o.RequestTimeout)
	defer cancel()
	named := func(uuid string) bool {
		_, now := t.cfg.Member(uuid)
		_, tried := t.val.Cfg.Member(uuid)
		return now || tried
	}
	body, etag, err := tg.Store.Get(ctx, Key, bytesMax)
	switch {
	case errors.Is(err, backend.ErrNotFound) && named(m.UUID):
		return false, c, ErrMember
	case errors.Is(err, backend.ErrNotFound):
		return false, backend.Cond{Absent: true}, nil
	case err != nil:
		return false, c, err
	}
	o, err := Decode(body)
	switch {
	case err != nil:
		return false, c, fmt.Errorf("%w: %w", ErrExists, err)
	case o.Pool == r.poolOf(nil) && o.Member == m.UUID:
		return true, c, nil
	case o.Pool == r.poolOf(nil) && !named(o.Member) && !named(m.UUID) && o.Promised.Compare(t.ballot) <= 0:
		return false, backend.Cond{Match: etag}, nil
	}
	return false, c, fmt.Errorf("%w: of pool %s, member %s, %s, epoch %d", ErrExists, o.Pool, o.Member, o.Val.State, o.Promised.Epoch)
}

// Change is the configuration that a change from c to members begins with. Committed, it makes every
// later quorum take a majority of both sets; then Finish's is committed. Each new member is seeded first.
// A change has to be finished, or taken back by the old members in a configuration of the next number:
// whoever claims the pool and finds Next set sees to that.
// Few members are best changed at a time: while Next is set, a majority of it has to answer too.
func (c Config) Change(members []Member) Config {
	return Config{No: c.No + 1, Members: c.Members, Next: members}
}

// Finish is the configuration that ends the change c is in the middle of; c itself if it is in none.
func (c Config) Finish() Config {
	if len(c.Next) == 0 {
		return c
	}
	return Config{No: c.No + 1, Members: c.Next}
}
