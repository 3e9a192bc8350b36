package root

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/google/uuid"

	"graindisk/backend"
)

// Store is all the register needs of a backend.Store, with the same contract. It may be called
// concurrently; drivers do not retry conditional puts.
type Store interface {
	Get(ctx context.Context, key string, max int64) (body []byte, etag string, err error)
	Put(ctx context.Context, key string, body []byte, c backend.Cond) (etag string, err error)
}

// Target is a place where a copy is expected. Which member it is, its copy says.
type Target struct {
	Name  string // for messages
	Store Store
}

// Options say how to open a register.
type Options struct {
	Pool    string   // uuid the copies must carry; empty: that of a majority of Targets
	Targets []Target // at least one

	Linger         time.Duration // how long a settled round waits for the rest; default 250 ms
	RequestTimeout time.Duration // of one request; default 10 s
	BackOff        time.Duration // first pause after a failure; doubles up to 32 times that; default 50 ms

	Log   *slog.Logger                         // default: discarded
	Rand  io.Reader                            // uuids, nonces and jitter; never fails; default crypto/rand
	After func(time.Duration) <-chan time.Time // default time.After
}

func (o Options) withDefaults() Options {
	o.Linger = cmp.Or(o.Linger, 250*time.Millisecond)
	o.RequestTimeout = cmp.Or(o.RequestTimeout, 10*time.Second)
	o.BackOff = cmp.Or(o.BackOff, 50*time.Millisecond)
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Rand == nil {
		o.Rand = rand.Reader
	}
	if o.After == nil {
		o.After = time.After
	}
	return o
}

// Register is one process's view of a pool's root. Read and Ballot may be called at any time; Claim
// and Commit are serialised by the caller.
type Register struct {
	o        Options
	targets  []*target
	rules    rules
	claimant string // uuid of this process, in all its ballots

	// Of the caller of Claim and Commit:
	used    uint64             // highest epoch of any ballot of ours
	tenure  *tenure            // nil while there is none
	lost    error              // why there is none
	onEpoch func(Ballot) error // of the last Claim

	mu     sync.Mutex
	pool   string             // guarded by mu; fixed once known
	ballot Ballot             // guarded by mu; of the tenure
	seenAt map[string]*target // guarded by mu: where each member was first seen
	rand   io.Reader          // guarded by mu
}

// target is a Target and the copy last known to be there. At most one goroutine of Claim or Commit
// works on a target at a time.
type target struct {
	Target
	copy Copy
	etag string // of copy; empty: not known
	down bool   // as last logged
}

// Open makes a register. It talks to nobody.
func Open(o Options) (*Register, error) {
	o = o.withDefaults()
	if len(o.Targets) == 0 || len(o.Targets) > MembersMax {
		return nil, fmt.Errorf("open root: %d targets, want 1 to %d", len(o.Targets), MembersMax)
	}
	r := &Register{o: o, rules: safeRules, pool: o.Pool, rand: o.Rand, lost: ErrNotClaimed, seenAt: map[string]*target{}}
	r.claimant = r.uuid()
	for _, t := range o.Targets {
		r.targets = append(r.targets, &target{Target: t})
	}
	return r, nil
}

// Ballot is that of the tenure; zero while there is none. A commit that had to claim again changes it.
func (r *Register) Ballot() Ballot {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.ballot
}

func (r *Register) setBallot(b Ballot) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.ballot = b
}

// State is what became of the question for a copy.
type State string

// The states of a target; all but OK count as down.
const (
	OK          State = "ok"
	Missing     State = "missing"
	Foreign     State = "foreign"
	Damaged     State = "damaged"
	Newer       State = "newer"
	Unreachable State = "unreachable"
)

func stateOf(err error) State {
	switch {
	case err == nil:
		return OK
	case errors.Is(err, ErrMissing):
		return Missing
	case errors.Is(err, ErrForeign):
		return Foreign
	case errors.Is(err, ErrNewer):
		return Newer
	case errors.Is(err, ErrDamaged):
		return Damaged
	}
	return Unreachable
}

// TargetView is what one target answered.
type TargetView struct {
	Name  string
	State State
	Copy  *Copy // nil unless State is OK, or Foreign and readable
	Err   error // nil if State is OK
}

// View is what the targets say.
type View struct {
	Pool      string // uuid; empty if no copy tells
	Targets   []TargetView
	Best      *Copy // of those with the highest (accepted, version), seeds apart; nil if there is none
	Quorum    bool  // a quorum answered: nothing newer than Best was committed when the read began
	Committed bool  // a quorum holds exactly Best's version: it is committed
}

// Read asks every target with plain gets. It fails only if no copy at all can be read.
func (r *Register) Read(ctx context.Context) (View, error) { return r.read(ctx, true) }

// ReadQuorum is Read that waits for a quorum, and for the others no longer than Options.Linger after
// that: one target that hangs does not hold it up. What has not answered counts as unreachable.
func (r *Register) ReadQuorum(ctx context.Context) (View, error) { return r.read(ctx, false) }

func (r *Register) read(ctx context.Context, all bool) (View, error) {
	v := r.survey(ctx, all, nil)
	if v.Best == nil {
		return v, fmt.Errorf("read root: %w", v.quorumError())
	}
	return v, nil
}

// survey asks all targets at once, waiting for all of them or, unless all is set, for a quorum and a
// little longer. keep, if not nil, is given each copy and its ETag.
func (r *Register) survey(ctx context.Context, all bool, keep func(t *target, c Copy, etag string)) View {
	settled := func(as []answer) bool { return !all && r.view(as).Quorum }
	return r.view(r.ask(ctx, "survey", settled, func(ctx context.Context, t *target) answer {
		c, etag, err := r.get(ctx, t)
		if err != nil {
			return answer{verdict: down, err: err}
		}
		if keep != nil {
			keep(t, c, etag)
		}
		return answer{verdict: done, copy: c}
	}))
}

// errPending stands for the answer of a target that is still awaited.
var errPending = errors.New("no answer yet")

// view judges a round of plain gets.
func (r *Register) view(answers []answer) View {
	v := View{Pool: r.poolOf(answers)}
	for i, a := range answers {
		if a.verdict == pending {
			a.err = errPending
		}
		t := TargetView{Name: r.targets[i].Name, Err: a.err}
		if a.verdict == done {
			t.Copy = &answers[i].copy
			switch {
			case t.Copy.Pool != v.Pool && v.Pool == "":
				t.Err = fmt.Errorf("%w: it is of pool %s, which too few targets show", ErrForeign, t.Copy.Pool)
			case t.Copy.Pool != v.Pool:
				t.Err = fmt.Errorf("%w: it is of pool %s", ErrForeign, t.Copy.Pool)
			case t.Copy.Seeded(): // it has an answer to give, and no value
			case v.Best == nil || t.Copy.compareAccepted(v.Best.Accepted, v.Best.Ver) > 0:
				v.Best = t.Copy
			}
		}
		t.State = stateOf(t.Err)
		v.Targets = append(v.Targets, t)
	}
	if v.Best != nil {
		v.Quorum = v.Best.Val.Cfg.Quorum(v.members(func(*Copy) bool { return true }))
		v.Committed = v.Best.Val.Cfg.Quorum(v.members(func(c *Copy) bool {
			return c.compareAccepted(v.Best.Accepted, v.Best.Ver) == 0
		}))
	}
	return v
}

// members tells of a uuid whether that member's copy is there and satisfies ok.
func (v View) members(ok func(*Copy) bool) func(uuid string) bool {
	return func(uuid string) bool {
		for _, t := range v.Targets {
			if t.State == OK && t.Copy.Member == uuid && ok(t.Copy) {
				return true
			}
		}
		return false
	}
}

// poolOf is the pool the register is of: the one it was told or settled on, else the one that a
// majority of the targets shows.
func (r *Register) poolOf(answers []answer) string {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.pool != "" {
		return r.pool
	}
	votes := map[string]int{}
	for _, a := range answers {
		if a.verdict == done {
			votes[a.copy.Pool]++
		}
	}
	for p, n := range votes {
		if n > len(r.targets)/2 {
			return p
		}
	}
	return ""
}

// Err says what v lacks for a quorum; nil if it has one.
func (v View) Err() error {
	if v.Quorum {
		return nil
	}
	return v.quorumError()
}

// quorumError is what v lacks.
func (v View) quorumError() *QuorumError {
	e := &QuorumError{Targets: v.Targets}
	if v.Best == nil || slices.ContainsFunc(v.Targets, func(t TargetView) bool { return t.State == Unreachable }) {
		return e
	}
	seen := v.members(func(*Copy) bool { return true })
	for _, ms := range [][]Member{v.Best.Val.Cfg.Members, v.Best.Val.Cfg.Next} {
		for _, m := range ms {
			if !seen(m.UUID) {
				e.Absent = append(e.Absent, m)
			}
		}
	}
	return e
}

// hopeless reports whether no quorum can come from asking again: too few targets hold a copy or may
// answer later.
func (v View) hopeless() bool {
	later := 0
	for _, t := range v.Targets {
		if t.State == Unreachable && retryable(t.Err) {
			later++
		}
	}
	if v.Best == nil {
		return later == 0
	}
	return !v.Best.Val.Cfg.reachable(v.members(func(*Copy) bool { return true }), later)
}

// uuid makes a random one.
func (r *Register) uuid() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return uuid.Must(uuid.NewRandomFromReader(r.rand)).String()
}
