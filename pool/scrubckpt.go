package pool

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"graindisk/backend"
	"graindisk/block"
	"graindisk/grains/extent"
	"graindisk/grains/segment"
	"graindisk/pool/root"
)

// hurtCopy is a copy of a part that no other copy can mend.
type hurtCopy struct {
	t       block.TargetID
	key     string
	missing bool
	err     error
}

// checkpoints reads all copies of all parts of the checkpoints that the root names, and sees to it that there
// are as many as were stored. If a part has no good copy left, new checkpoints are published that share no part
// with those before, until the root names the damaged one no more. It fails only with ctx's cause.
func (s *scrubber) checkpoints(ctx context.Context) error {
	seen := map[partID]bool{}
	var hurt []hurtCopy
	var of []root.CheckpointRef
	for _, ref := range s.p.value().Checkpoints {
		h := s.checkpoint(ctx, ref, seen)
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if len(h) > 0 && s.p.rootNames(ref) {
			hurt, of = append(hurt, h...), append(of, ref)
		}
	}
	if len(hurt) == 0 {
		return nil
	}
	outcome := s.renewCheckpoints(ctx, of)
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	for _, h := range hurt {
		s.tally(h.missing, outcome == outRenewed, false)
		s.problem(s.p.targetName(h.t), h.key, h.err, outcome)
	}
	return nil
}

const outRenewed = "repaired: a new checkpoint has taken its place"

// rootNames tells whether the root names a checkpoint.
func (p *Pool) rootNames(ref root.CheckpointRef) bool {
	return slices.ContainsFunc(p.value().Checkpoints, func(c root.CheckpointRef) bool { return c.Epoch == ref.Epoch && c.N == ref.N })
}

// renewCheckpoints has the publisher replace those checkpoints, and says what became of it.
func (s *scrubber) renewCheckpoints(ctx context.Context, old []root.CheckpointRef) string {
	switch {
	case s.o.DryRun:
		return outDryRun
	case !s.p.isClaimed() || s.p.broken.Load() != nil || s.p.gate() != nil:
		return outStopped
	}
	if err := s.p.needAllRuns(ctx); err != nil {
		return fmt.Sprintf("not repaired: %v", err)
	}
	for range root.CheckpointsMax {
		s.p.repair.ask(wantWholeCheckpoint)
		if err := s.p.Publish(ctx); err != nil {
			return fmt.Sprintf("not repaired: no new checkpoint was published: %v", err)
		}
		if !slices.ContainsFunc(old, s.p.rootNames) {
			return outRenewed
		}
	}
	return "not repaired: the root still names this checkpoint"
}

// checkpoint reads one checkpoint; seen are parts done already. It returns what nothing but a new checkpoint can mend.
func (s *scrubber) checkpoint(ctx context.Context, ref root.CheckpointRef, seen map[partID]bool) []hurtCopy {
	body, hurt := s.part(ctx, ref, partID{ref.Epoch, ref.N, 0}, func(b []byte) error {
		if block.CRC(b) != ref.CRC {
			return fmt.Errorf("not the manifest that the root names: %w", segment.ErrDamaged)
		}
		return nil
	})
	if body == nil {
		return hurt
	}
	snap, err := decodeSnapshot(body)
	if err != nil {
		s.p.o.Log.Error("scrub: manifest not read", "pool", s.p.o.Name, "err", err)
		return nil
	}
	for _, t := range snap.Tables {
		body, h := s.part(ctx, ref, partID{ref.Epoch, ref.N, t.Part}, func(b []byte) error { return new(snapshot).join(t, b) })
		if hurt = append(hurt, h...); body == nil {
			return hurt
		}
		if err := snap.join(t, body); err != nil {
			return hurt
		}
	}
	runs, usage := map[partID][]runRef{}, map[partID][]runRef{}
	var order []partID
	add := func(to map[partID][]runRef, r runRef) {
		id := partID{r.Epoch, r.N, r.Part}
		if !seen[id] {
			seen[id] = true
			order = append(order, id)
		}
		to[id] = append(to[id], r)
	}
	for _, d := range snap.Disks {
		for _, r := range d.Runs {
			add(runs, r)
		}
	}
	for _, r := range snap.Usage {
		add(usage, r)
	}
	for _, id := range order {
		if ctx.Err() != nil {
			return hurt
		}
		_, h := s.part(ctx, ref, id, func(b []byte) error { return checkRuns(b, runs[id], usage[id]) })
		hurt = append(hurt, h...)
	}
	return hurt
}

// checkRuns checks what a checkpoint names in the body of a part.
func checkRuns(body []byte, runs, usage []runRef) error {
	for _, r := range runs {
		if _, err := r.decode(body); err != nil {
			return err
		}
	}
	for _, r := range usage {
		b, err := r.cut(body)
		if err == nil {
			err = extent.NewUsage().Load(b)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// foundCopy is one copy of a part as it lies at a target.
type foundCopy struct {
	t    block.TargetID
	key  string
	is   lying
	body []byte // nil if it is no good
	err  error  // why
}

// part reads all copies of one part, which check must pass, and repairs those that are no good, or fewer than there
// were, from one that is. It returns the part's body, or nil and the copies that a new checkpoint must make up for.
func (s *scrubber) part(ctx context.Context, ref root.CheckpointRef, id partID, check func([]byte) error) ([]byte, []hurtCopy) {
	copies, away := s.copies(ctx, id, check)
	s.count(func(r *ScrubReport) { r.Unread += int64(away) })
	var body []byte
	taken := map[block.TargetID]bool{} // has a copy, good or not, or nobody knows
	for _, c := range copies {
		taken[c.t] = true
		if c.body != nil {
			body = c.body
		}
	}
	if ctx.Err() != nil {
		return nil, nil
	}
	key := partKey(id.epoch, id.n, id.part, 0)
	if body == nil {
		return nil, s.noCopy(copies, key, away)
	}
	object := encodePart(id.epoch, uint32(id.n), id.part, body)
	wanted := func() bool { return s.p.rootNames(ref) }
	repair := func(c foundCopy, missing bool) {
		outcome := outRepaired
		if why := s.mayRepair(ctx, c.t); why != "" {
			outcome = why
		} else if err := s.putBack(ctx, c.t, c.key, c.is, object, wanted); err != nil {
			outcome = fmt.Sprintf("not repaired: %v", err)
		}
		if ctx.Err() != nil || !wanted() {
			return
		}
		s.tally(missing, outcome == outRepaired, false)
		s.problem(s.p.targetName(c.t), c.key, c.err, outcome)
	}
	for _, c := range copies {
		if c.is.state == atHand && c.body == nil {
			repair(c, false)
		}
	}
	members := s.p.dataMembers()
	want := min(s.p.value().Stripe.Parity+1, len(members)) - away
	for _, t := range members {
		if len(taken) >= want {
			break
		}
		if taken[t] || !s.o.DryRun && !s.isMember(ctx, t) {
			continue
		}
		taken[t] = true
		repair(foundCopy{t: t, key: key, is: lying{state: missing}, err: errors.New("there are fewer copies than were stored")}, true)
	}
	return body, nil
}

// noCopy is what is hurt of a part without a good copy; if some could not be read there may be one.
func (s *scrubber) noCopy(copies []foundCopy, key string, away int) (hurt []hurtCopy) {
	if away > 0 {
		for _, c := range copies {
			if c.is.state == atHand {
				s.tally(false, false, false)
				s.problem(s.p.targetName(c.t), c.key, c.err, outAway)
			}
		}
		return nil
	}
	for _, c := range copies {
		hurt = append(hurt, hurtCopy{c.t, c.key, false, c.err})
	}
	if len(hurt) == 0 {
		hurt = append(hurt, hurtCopy{0, key, true, errors.New("it is on no target")})
	}
	return hurt
}

// dataMembers are the targets that hold more than the root.
func (p *Pool) dataMembers() []block.TargetID { return dataMembers(p.value().Cfg) }

// copies finds the copies of a part by their names. away is how many targets did not answer, or not to the end.
func (s *scrubber) copies(ctx context.Context, id partID, check func([]byte) error) (copies []foundCopy, away int) {
	prefix := strings.TrimSuffix(partKey(id.epoch, id.n, id.part, 0), "0")
	for _, t := range s.p.dataMembers() {
		store, ok := s.p.store(t)
		if !ok {
			away++
			continue
		}
		objs, err := list(ctx, store, prefix)
		if err != nil {
			s.p.o.Log.Debug("scrub: checkpoint not listed", "pool", s.p.o.Name, "target", s.p.targetName(t), "err", err)
			away++
			continue
		}
		unreadHere := false
		for _, o := range objs {
			no, ok := strings.CutPrefix(o.Key, prefix)
			if _, err := strconv.ParseUint(no, 10, 8); !ok || err != nil {
				continue
			}
			c := s.copy(ctx, t, o.Key, id, check)
			switch c.is.state {
			case atHand:
				copies = append(copies, c)
			case unread:
				unreadHere = true
			}
		}
		if unreadHere {
			away++
		}
	}
	return copies, away
}

func list(ctx context.Context, store backend.Store, prefix string) ([]backend.Info, error) {
	objs, _, err := store.List(ctx, prefix, "", 100)
	return objs, err
}

// copy reads one copy, until two answers agree if it is no good.
func (s *scrubber) copy(ctx context.Context, t block.TargetID, key string, id partID, check func([]byte) error) foundCopy {
	c := foundCopy{t: t, key: key}
	for try := 0; ; try++ {
		now := s.look(ctx, t, key, partBytesMax+partHeaderLen, nil)
		sure := try > 0 && now.same(c.is)
		c.is = now
		if now.state != atHand || sure {
			break
		}
		if try > scrubTries {
			c.is = lying{state: unread}
			break
		}
		var body []byte
		body, c.err = decodePart(now.body, id.epoch, uint32(id.n), id.part)
		if c.err == nil {
			c.err = check(body)
		}
		if c.err == nil {
			c.body = body
			break
		}
	}
	if c.is.state == atHand {
		s.count(func(r *ScrubReport) { r.Objects++ })
	}
	return c
}
