package pool

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"graindisk/backend"
	"graindisk/block"
	"graindisk/pool/root"
)

// A target shows that it is the one it was by its copy of the root. How that was is known from the open; a target can be
// emptied, wiped or unmounted later, and a pool that rests would not notice. So who asks how the pool is has them asked:
//
//	copy of the root       means                                    shards on it count as
//	---------------------------------------------------------------------------------------
//	ok                     it is there                              stored
//	missing, foreign       it was emptied, or is another place      lost, until it is replaced (members.go) and repaired
//	damaged, newer         a copy went bad                          stored
//	gone                   its place is not there, or was wiped     stored: it may be mounted again
//	unreachable            it is away; nobody knows                 stored: it may come back

// rootGone is the state of a copy whose place says that it is not there: a directory that is not mounted or was wiped,
// a bucket that was deleted.
const rootGone root.State = "gone"

// lookTimeout is how long a target is asked for its copy of the root by someone who waits for the status.
const lookTimeout = 2 * time.Second

// LookAtTargets asks all targets at once how their copies of the root are, for the next Status. It takes at most two
// seconds; a target that has not answered by then counts as unreachable.
func (p *Pool) LookAtTargets(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, lookTimeout)
	defer cancel()
	var wg sync.WaitGroup
	for _, m := range p.value().Cfg.Members {
		s, ok := p.store(m.ID)
		if !ok {
			continue
		}
		wg.Go(func() {
			state, err := p.lookAtCopy(ctx, s, m)
			p.storesMu.Lock()
			defer p.storesMu.Unlock()
			if p.stores[m.ID] == s { // it was not replaced meanwhile
				p.roots[m.ID], p.rootErrs[m.ID] = state, err
			}
		})
	}
	wg.Wait()
}

// lookAtCopy reads a member's copy of the root.
func (p *Pool) lookAtCopy(ctx context.Context, s backend.Store, m root.Member) (root.State, error) {
	body, _, err := s.Get(ctx, root.Key, rootBytesMax)
	if errors.Is(err, backend.ErrNotFound) {
		return root.Missing, nil
	}
	if backend.ClassOf(err) == backend.Permanent {
		return rootGone, err
	}
	if err != nil {
		return root.Unreachable, err
	}
	c, err := root.Decode(body)
	switch {
	case errors.Is(err, root.ErrNewer):
		return root.Newer, err
	case err != nil:
		return root.Damaged, err
	case c.Pool != p.uuid.String():
		return root.Foreign, fmt.Errorf("it is of pool %s", c.Pool)
	case c.Member != m.UUID:
		return root.Foreign, fmt.Errorf("it is of another target of this pool, %s", c.Member)
	}
	return root.OK, nil
}

// emptied tells whether what was on a target is not there any more, as of the last look.
func (p *Pool) emptied(t block.TargetID) bool {
	return TargetStatus{Root: p.rootState(t)}.Emptied()
}

// rootError is why a target's copy of the root is not ok, empty if that says nothing more than its state.
func (p *Pool) rootError(t block.TargetID) string {
	p.storesMu.RLock()
	defer p.storesMu.RUnlock()
	if err := p.rootErrs[t]; err != nil {
		return err.Error()
	}
	return ""
}

// Emptied tells whether the target does not hold any more what it held.
func (t TargetStatus) Emptied() bool {
	return t.Root == string(root.Missing) || t.Root == string(root.Foreign)
}

// NeedsCare tells whether the target is not what it was until a person sees to it.
func (t TargetStatus) NeedsCare() bool { return t.Emptied() || t.Root == string(rootGone) }

// Trouble says in a line what is wrong with the target of a pool, and what to do; empty if nothing is.
func (t TargetStatus) Trouble(pool string) string {
	replace := fmt.Sprintf(`"gateway pool replace-target %s %s"`, pool, t.Name)
	switch root.State(t.Root) {
	case root.Missing:
		return fmt.Sprintf("it was emptied: its copy of the root is missing, and what it held is lost; %s takes the empty place as a new target, and what was lost is restored then", replace)
	case root.Foreign:
		return fmt.Sprintf("another place is there: %s; bring its own back, or give it an empty one and use %s", t.RootError, replace)
	case rootGone:
		return fmt.Sprintf("its place is not there: %s; mount it, or bring it back; if it is lost for good, make an empty one and use %s", t.RootError, replace)
	case root.Unreachable:
		return fmt.Sprintf("it does not answer: %s; it is used again when it does; if it is lost for good, make an empty place there and use %s", t.RootError, replace)
	case root.Damaged:
		return fmt.Sprintf("its copy of the root is damaged: %s; \"gateway pool scrub %s\" repairs it", t.RootError, pool)
	case root.Newer:
		return fmt.Sprintf("its copy of the root is of a newer release: %s", t.RootError)
	}
	return ""
}

// AwayTarget is a target whose shards could not be looked after.
type AwayTarget struct {
	Target string `json:"target"`
	Root   string `json:"root"`            // how its copy of the root is: missing, foreign, gone or unreachable
	Shards int    `json:"shards"`          // that the pool has on it
	Error  string `json:"error,omitempty"` // what is wrong and what to do
}

// AwayTargets asks the targets for their copies of the root, and lists those that do not show it: what they held is not
// restored before they answer, or are replaced.
func (p *Pool) AwayTargets(ctx context.Context) (away []AwayTarget) {
	p.LookAtTargets(ctx)
	for _, t := range p.Status().Targets {
		if t.NeedsCare() || t.Root == string(root.Unreachable) {
			away = append(away, AwayTarget{t.Name, t.Root, t.Shards, t.Trouble(p.o.Name)})
		}
	}
	return away
}
