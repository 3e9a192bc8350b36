package pool

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/google/uuid"

	"graindisk/backend"
	"graindisk/block"
	"graindisk/grains/segment"
	"graindisk/pool/root"
)

// A target whose place was emptied, or that was given up for another place, comes back as a new member: a new uuid,
// because its copy of the root is not to be counted for what the lost one had promised, and a new number, because
// nothing of what segments had on the old number is there. A change of members is
//
//	the newcomer's first copy of the root put ─► {members, next} committed ─► next is members: committed
//
// each commit by majorities of both sets. A process that dies in between leaves next set; the next owner
// finishes the change. What the old number held is lost from the last commit on: Repair restores it.

// What a change of members is refused for.
var (
	// ErrTargetInUse means that the place holds the copy of the root of a member.
	ErrTargetInUse = errors.New("nothing is to be replaced")
	// ErrIsTarget means that what is to be added is a member.
	ErrIsTarget = errors.New("it is a target of the pool already")
	// ErrNoTarget means that the pool has no such target.
	ErrNoTarget = errors.New("no such target")
	// ErrTooFew means that the pool's stripes would have too few targets, because one is to be a witness.
	ErrTooFew = errors.New("too few targets that are no witnesses")
)

// TargetChange is a change of members that is done.
type TargetChange struct {
	Target string         `json:"target"`
	Old    block.TargetID `json:"old,omitempty"` // 0: a target was added
	New    block.TargetID `json:"new"`
	// Witness: the new one holds a copy of the root and no shards, as its configuration says.
	Witness bool `json:"witness,omitempty"`
}

// memberAsk is a question to keepRepaired, which alone changes members: a commit of a new configuration that is
// broken off would keep the publisher from committing anything else.
type memberAsk struct {
	name   string
	add    bool
	answer chan<- memberAnswer // has room
}

type memberAnswer struct {
	change TargetChange
	err    error
}

// ReplaceTarget makes the place configured under name a new member of the pool, in the stead of the one that
// was lost there. The place must answer and hold neither a member's copy of this pool's root nor anything of another
// pool. It needs a majority of the other copies. If ctx ends first, the change may still be made.
func (p *Pool) ReplaceTarget(ctx context.Context, name string) (TargetChange, error) {
	return p.askForMember(ctx, name, false)
}

// AddTarget is ReplaceTarget for a configured place that was no target of the pool before. Segments that are
// stored already stay where they are.
func (p *Pool) AddTarget(ctx context.Context, name string) (TargetChange, error) {
	return p.askForMember(ctx, name, true)
}

func (p *Pool) askForMember(ctx context.Context, name string, add bool) (TargetChange, error) {
	if err := p.mayChange(); err != nil {
		return TargetChange{}, err
	}
	defer p.repair.preempt()()
	answer := make(chan memberAnswer, 1)
	select {
	case p.repair.asks <- memberAsk{name, add, answer}:
	case <-p.pub.done:
		return TargetChange{}, p.stopped()
	case <-ctx.Done():
		return TargetChange{}, ctx.Err()
	}
	select {
	case a := <-answer:
		return a.change, a.err
	case <-p.pub.local:
		return TargetChange{}, p.stopped()
	case <-ctx.Done():
		return TargetChange{}, ctx.Err()
	}
}

// changeMember seeds a newcomer and makes it a member. ctx ends with the pool only.
func (p *Pool) changeMember(ctx context.Context, name string, add bool) (c TargetChange, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("pool %s: target %s: %w", p.o.Name, name, err)
		}
	}()
	if err := p.finishMembers(ctx); err != nil {
		return c, err
	}
	place, ok := p.placeOf(name)
	if !ok {
		return c, fmt.Errorf("%w in the configuration that the gateway was started with", ErrNoTarget)
	}
	old := p.memberAt(name)
	switch {
	case old == nil && !add:
		return c, fmt.Errorf("%w in the pool; add it with \"gateway pool add-target\"", ErrNoTarget)
	case old != nil && add:
		return c, fmt.Errorf("%w, number %d; nothing is to be added", ErrIsTarget, old.ID)
	}
	cctx, cancel := context.WithTimeout(ctx, restoreTimeout)
	defer cancel()
	if err := backend.Reopen(cctx, place.Store); err != nil {
		return c, err
	}
	if err := p.awaitPlace(cctx, place.Store); err != nil {
		return c, err
	}
	cfg := p.value().Cfg
	m := root.Member{ID: nextTarget(cfg), UUID: uuid.NewString(), Name: name, Witness: place.Witness}
	next := slices.Clone(cfg.Members)
	if old != nil {
		next[slices.IndexFunc(next, func(o root.Member) bool { return o.ID == old.ID })] = m
	} else {
		next = append(next, m)
	}
	if err := p.enoughData(next); err != nil {
		return c, err
	}
	if err := p.seed(cctx, name, m); err != nil {
		return c, err
	}
	err = p.update(ctx, func(v *root.Value) { v.Cfg = v.Cfg.Change(next) })
	if err == nil {
		err = p.finishMembers(ctx)
	}
	if err != nil {
		return c, err
	}
	c = TargetChange{Target: name, New: m.ID, Witness: m.Witness}
	if old != nil {
		c.Old = old.ID
	}
	return c, nil
}

// enoughData refuses members of which one that is no witness, lost, would take more of a stripe than there is parity.
func (p *Pool) enoughData(members []root.Member) error {
	s, n := p.value().Stripe, len(dataMembers(root.Config{Members: members}))
	if n == 0 || s.Parity > 0 && shardsOnEach(s, n) > s.Parity {
		return fmt.Errorf("%d would be left for stripes of %s: %w", n, stripeName(s), ErrTooFew)
	}
	return nil
}

// shardsOnEach is the most shards of a stripe that one of n targets holds.
func shardsOnEach(s root.Stripe, n int) int { return (s.Data + s.Parity + n - 1) / n }

// warnOfWitnesses says which targets are configured as what they are not in the pool.
func (p *Pool) warnOfWitnesses() {
	for _, m := range p.value().Cfg.Members {
		name := p.targetName(m.ID)
		if place, ok := p.placeOf(name); ok && place.Witness != m.Witness {
			p.o.Log.Warn("target keeps its part in the pool; the configuration says another, which it gets if it is emptied and replaced",
				"pool", p.o.Name, "target", name, "witness", m.Witness, "configured", place.Witness)
		}
	}
}

// nextTarget is a number that no target of the pool ever had: the highest is never given up, but for a higher one.
func nextTarget(c root.Config) (id block.TargetID) {
	for _, m := range append(slices.Clone(c.Members), c.Next...) {
		id = max(id, m.ID)
	}
	return id + 1
}

// seed puts the newcomer's first copy. Nobody commits meanwhile.
func (p *Pool) seed(ctx context.Context, name string, m root.Member) error {
	select {
	case p.pub.commit <- struct{}{}:
	case <-ctx.Done():
		return ctx.Err()
	}
	defer func() { <-p.pub.commit }()
	return p.reg.Seed(ctx, name, m)
}

// finishMembers ends a change of members that is half done; without one it does nothing.
func (p *Pool) finishMembers(ctx context.Context) error {
	was := p.value().Cfg
	if len(was.Next) == 0 {
		return nil
	}
	for _, m := range was.Next {
		if place, ok := p.placeOf(m.Name); ok && !slices.Contains(was.Members, m) {
			p.setStore(m, place.Store)
		}
	}
	err := p.update(ctx, func(v *root.Value) { v.Cfg = v.Cfg.Finish() })
	if err != nil {
		return err
	}
	for _, m := range was.Members {
		if !slices.Contains(was.Next, m) {
			p.dropStore(m.ID)
		}
	}
	p.o.Log.Warn("targets changed: what the segments had on former ones is lost until it is repaired", "pool", p.o.Name,
		"config", was.No+1, "was", was.Members, "now", was.Next)
	p.repair.weak.Store(true)
	p.repair.nudge()
	return nil
}

func (p *Pool) setStore(m root.Member, s backend.Store) {
	p.storesMu.Lock()
	defer p.storesMu.Unlock()
	p.stores[m.ID], p.names[m.ID], p.roots[m.ID] = s, m.Name, root.OK
	delete(p.rootErrs, m.ID)
}

func (p *Pool) dropStore(t block.TargetID) {
	p.storesMu.Lock()
	defer p.storesMu.Unlock()
	delete(p.stores, t)
	delete(p.names, t)
	delete(p.roots, t)
	delete(p.rootErrs, t)
}

// placeOf finds a configured target.
func (p *Pool) placeOf(name string) (Target, bool) {
	for _, t := range p.o.Targets {
		if t.Name == name {
			return t, true
		}
	}
	return Target{}, false
}

// memberAt is the member that people know by the name.
func (p *Pool) memberAt(name string) *root.Member {
	for _, m := range p.value().Cfg.Members {
		if p.targetName(m.ID) == name {
			return &m
		}
	}
	return nil
}

// rootBytesMax bounds what is read of an object that may be a copy of the root.
const rootBytesMax = 1 << 20

// awaitPlace is checkPlace that gives a place some time to answer: one that was away for long is asked seldom.
func (p *Pool) awaitPlace(ctx context.Context, s backend.Store) error {
	until := time.Now().Add(2 * p.o.repairPoll)
	for wait := backoff(0); ; wait = wait.next() {
		err := p.checkPlace(ctx, s)
		var of *backend.Error
		if !errors.As(err, &of) || of.Class != backend.Transient && of.Class != backend.Throttled || time.Now().After(until) {
			return err
		}
		if wait.sleep(ctx) != nil {
			return err
		}
	}
}

// checkPlace refuses a place that cannot become a new member: one that does not answer, that holds the copy of a
// member, or anything of another pool. What an attempt before has left, or a member of former times, is not in the
// way: Seed takes the place of its copy of the root, and shards there are as good as ever.
func (p *Pool) checkPlace(ctx context.Context, s backend.Store) error {
	body, _, err := s.Get(ctx, root.Key, rootBytesMax)
	if errors.Is(err, backend.ErrNotFound) {
		return p.checkShards(ctx, s)
	}
	if err != nil {
		return fmt.Errorf("%s must answer before it can take part: %w", s, err)
	}
	c, err := root.Decode(body)
	if err != nil {
		return fmt.Errorf("%s holds an object %q that cannot be read: %w; delete it there if nothing else needs it", s, root.Key, err)
	}
	m, member := p.value().Cfg.Member(c.Member)
	switch {
	case c.Pool != p.uuid.String():
		return fmt.Errorf("%s holds pool %s: %w; give it an empty place or its own prefix", s, c.Pool, ErrNotEmpty)
	case member:
		return fmt.Errorf("%w: %s is target %d, with its data; \"gateway pool repair\" restores what it lacks", ErrTargetInUse, s, m.ID)
	}
	return nil
}

// checkShards refuses a place without a root in which there are shards of another pool: their names may be ours.
func (p *Pool) checkShards(ctx context.Context, s backend.Store) error {
	objs, _, err := s.List(ctx, "seg/", "", 100)
	if err != nil {
		return fmt.Errorf("%s must answer before it can take part: %w", s, err)
	}
	for _, o := range objs {
		t, err := segment.ReadTrailer(ctx, s, o.Key, o.Size)
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case err == nil && t.Pool != p.uuid:
			return fmt.Errorf("%s holds %q of pool %s: %w; give it an empty place or its own prefix", s, o.Key, uuid.UUID(t.Pool), ErrNotEmpty)
		case err == nil:
			return nil // ours: stored since it was emptied
		}
	}
	return nil
}
