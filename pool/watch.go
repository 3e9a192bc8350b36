package pool

import (
	"context"
	"fmt"
	"sync"
	"time"

	"graindisk/pool/root"
)

// A pool that another log holds is watched before it is refused or taken over: for Options.Watch by the monotonic
// clock of this process, and no less than twice the time between the owner's beats.
//
//	root and beats read ─┬─ one of them is newer than at first: the owner lives ─► *OwnedError, with Takeover too
//	        ▲            └─ not for all of the time: it stands still
//	        └── again ──────┘                         ├─ no Takeover ─► *OwnedError: as of which cut it would come back
//	                                                  └─ Takeover ─► consent that names the (epoch, owner) seen
//
// This is for people: it keeps them from taking a pool away from a host that is well. What keeps two owners from
// publishing is the root.

// Sighting is what a watcher learnt of a pool that another log holds.
type Sighting struct {
	Epoch   uint64
	Log     string // uuid
	Host    string
	Cut     uint64 // the newest published
	Beat    *Beat  // the newest of this tenure; nil if none was found
	Watched time.Duration
	Signs   string // what moved while we watched; empty if nothing did
	Gone    bool   // the owner is known to be gone, so that there was nothing to watch
}

// OwnedError refuses a pool that another owner holds. It matches root.ErrHeld.
type OwnedError struct {
	Pool string
	Seen Sighting
}

// Error is one line that says who, since when, what would be lost, and what to type next.
func (e *OwnedError) Error() string {
	s := e.Seen
	who := fmt.Sprintf("held by %s (log %s, epoch %d, published through cut %d)", s.Host, s.Log, s.Epoch, s.Cut)
	if s.Signs != "" {
		return fmt.Sprintf(`%s, which is alive: %s while it was watched for %v; --takeover would be refused too. Let it go there with "gateway pool release %s", or stop that gateway`,
			who, s.Signs, s.Watched.Round(100*time.Millisecond), e.Pool)
	}
	return fmt.Sprintf(`%s, %s. If that host can be started again, start it there: its log has everything. If it is lost, "gateway serve --takeover" takes the pool over as of cut %d and gives up %s`,
		who, s.still(), s.Cut, s.cost())
}

// Unwrap gives the root's own refusal.
func (e *OwnedError) Unwrap() error {
	s := e.Seen
	return &root.HeldError{Epoch: s.Epoch, Owner: s.Log, OwnerName: s.Host, Cut: s.Cut}
}

// still says how long nothing moved.
func (s *Sighting) still() string {
	switch {
	case s.Gone:
		return "whose process, of this very data directory, has ended"
	case s.Watched == 0:
		return "which was not watched: it may be alive"
	}
	return fmt.Sprintf("which has given no sign of life for %v: it is dead, stands still, or is cut off from the targets", s.Watched.Round(100*time.Millisecond))
}

// cost says what a takeover gives up, as far as anybody knows. A beat is as old as it is, and a commit after it is no
// reason to think that less is lost: what was acknowledged since is not known either way.
func (s *Sighting) cost() string {
	what := fmt.Sprintf("every write that %s acknowledged and did not publish by then", s.Host)
	switch b := s.Beat; {
	case b == nil:
		what += ": how many bytes, and how old, is not known, as it left no beat"
	case b.Cut < s.Cut:
		what += fmt.Sprintf(": how many bytes is not known, as its last beat, %s by its clock, is older than that cut", b.Time.UTC().Format(time.RFC3339))
	default:
		what += ": " + b.Dirty() + "; how much it acknowledged after that beat is not known"
	}
	if s.Gone {
		return what
	}
	return what + "; if it still runs, it may go on acknowledging into its own log until it hears of this, and lists that in quarantine there"
}

// sign is what one target shows of an owner's life.
type sign struct {
	seen  bool // the target has answered
	epoch root.Ballot
	ver   uint64
	beat  *Beat
}

// watch looks at a held pool for as long as it must, and returns the newest copy of the root with what was seen.
// It fails only with ctx. The pool may have been released or claimed meanwhile, as the copy tells.
func (p *Pool) watch(ctx context.Context, first *root.Copy) (*root.Copy, *Sighting, error) {
	s := &Sighting{Epoch: first.Accepted.Epoch, Log: first.Val.Owner, Host: first.Val.OwnerName, Cut: first.Val.Cut}
	signs := make([]sign, len(p.o.Targets))
	begun, last := time.Now(), first
	look := func() {
		now, best := p.readSigns(ctx)
		for i, n := range now {
			switch was := signs[i]; {
			case !n.seen:
				continue
			case was.seen && n.after(was, s.Epoch) && s.Signs == "":
				s.Signs = n.tell(was)
			}
			if b := n.beat; b != nil && b.Epoch == s.Epoch && b.Log == s.Log && b.newer(s.Beat) {
				s.Beat = b
			}
			signs[i] = n
		}
		if best != nil {
			last = best
			s.Cut = max(s.Cut, best.Val.Cut)
		}
	}
	look()
	if p.o.Gone != nil && p.o.Gone(s.Epoch, s.Log) {
		s.Gone = true
		return last, s, ctx.Err()
	}
	for p.o.Watch > 0 && s.Signs == "" && ctx.Err() == nil && last.Val.State == root.Held && last.Accepted.Epoch == s.Epoch && last.Val.Owner == s.Log {
		long := p.o.Watch
		if s.Beat != nil {
			long = max(long, 2*time.Duration(s.Beat.EverySeconds*float64(time.Second)))
		}
		left := long - time.Since(begun)
		if left <= 0 {
			break
		}
		if s.Watched == 0 {
			p.o.Log.Info("another owner holds the pool: watching for signs of life", "pool", p.o.Name, "host", s.Host, "epoch", s.Epoch, "for", long)
		}
		select {
		case <-time.After(min(left, max(long/10, 10*time.Millisecond))):
		case <-ctx.Done():
		}
		look()
		s.Watched = time.Since(begun)
	}
	return last, s, ctx.Err()
}

// readSigns reads root and beat of every target, side by side. best is nil unless a quorum showed the root.
func (p *Pool) readSigns(ctx context.Context) (signs []sign, best *root.Copy) {
	ctx, cancel := context.WithTimeout(ctx, beatPatience)
	defer cancel()
	signs = make([]sign, len(p.o.Targets))
	beats := make([]*Beat, len(p.o.Targets))
	var wg sync.WaitGroup
	for i, t := range p.o.Targets {
		wg.Go(func() {
			if b, _, err := readBeat(ctx, t.Store); err == nil && b != nil && b.Pool == p.uuid.String() {
				beats[i] = b
			}
		})
	}
	view, err := p.reg.ReadQuorum(ctx)
	wg.Wait()
	for i, t := range view.Targets {
		if t.State == root.OK {
			signs[i] = sign{true, t.Copy.Accepted, t.Copy.Ver, beats[i]}
		}
	}
	if err == nil && view.Quorum {
		best = view.Best
	}
	return signs, best
}

// after tells whether a target shows something that the owner of that epoch must have done since.
func (n sign) after(was sign, epoch uint64) bool {
	if c := n.epoch.Compare(was.epoch); c != 0 {
		return c > 0
	}
	return n.ver > was.ver || n.beat != nil && n.beat.Epoch == epoch && n.beat.newer(was.beat)
}

// tell says what moved.
func (n sign) tell(was sign) string {
	switch {
	case n.epoch != was.epoch:
		return fmt.Sprintf("the pool was claimed in epoch %d", n.epoch.Epoch)
	case n.ver > was.ver:
		return fmt.Sprintf("it committed version %d of the root", n.ver)
	}
	return fmt.Sprintf("it wrote beat %d", n.beat.Seq)
}

// consent watches the owner of a pool that is held by another log than ours, and returns the consent to end its
// tenure, if that was given and the owner stands still, beside the newest copy of the root. A pool that nobody
// holds needs none.
func (p *Pool) consent(ctx context.Context, c *root.Copy) (*root.Copy, *Sighting, error) {
	c, s, err := p.watch(ctx, c)
	switch {
	case err != nil:
		return nil, nil, err
	case c.Val.State != root.Held:
		return c, nil, nil
	case c.Accepted.Epoch != s.Epoch && s.Signs == "":
		s.Signs = fmt.Sprintf("the pool was claimed in epoch %d by %s", c.Accepted.Epoch, c.Val.OwnerName)
	}
	if s.Signs != "" || !p.o.Takeover {
		return nil, nil, &OwnedError{p.o.Name, *s}
	}
	return c, s, nil
}

// tookOver says what the takeover has given up.
func (p *Pool) tookOver(s *Sighting) {
	if s == nil {
		return
	}
	p.o.Log.Warn(fmt.Sprintf("pool %s taken over from %s, as of cut %d", p.o.Name, s.Host, p.value().Cut),
		"epoch", p.epoch.Load(), "their_epoch", s.Epoch, "their_log", s.Log, "watched", s.Watched.Round(time.Millisecond), "given_up", s.cost())
}
