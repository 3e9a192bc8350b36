package pool

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"graindisk/backend"
	"graindisk/block"
	"graindisk/grains/segment"
)

const (
	// scrubPiece is what a scrub asks of a target at a time: so much may delay the read of a guest. With the
	// question for its size, a shard of 16 MiB costs six requests; a TiB in 2+1 is 98 000 shards. [tune]
	scrubPiece = 4 << 20
	scrubYield = 250 * time.Millisecond // how long a piece makes way for reads of guests
	scrubTries = 3                      // until a read counts as unread; and to get two answers that agree
)

// lying is how an object lies at its target.
type lying struct {
	state lyingState
	etag  string
	body  []byte // one byte longer than expected if the object is longer
	err   error  // why it was not read
}

type lyingState uint8

const (
	notStored lyingState = iota // by the segment's row: it was never put, or its target is none of the pool's any more
	atHand
	missing
	unread
)

func (l lying) same(o lying) bool { return l.state == o.state && bytes.Equal(l.body, o.body) }

// look reads an object, at most max bytes of it, piece by piece, as guests leave room, into memory of lent, which may be
// nil.
func (s *scrubber) look(ctx context.Context, t block.TargetID, key string, max int64, lent *segment.Buffers) lying {
	store, ok := s.p.store(t)
	if !ok {
		return lying{state: unread, err: fmt.Errorf("target %s is not configured", s.p.targetName(t))}
	}
	var err error
	wait := backoff(0)
	for try := range scrubTries {
		if try > 0 && wait.sleep(ctx) != nil {
			break
		}
		wait = wait.next()
		var st backend.Info
		if st, err = store.Stat(ctx, key); errors.Is(err, backend.ErrNotFound) {
			return lying{state: missing, err: err}
		}
		if err != nil {
			continue
		}
		n := min(st.Size, max)
		body := lent.Get(n)[:n]
		if err = s.read(ctx, store, key, body); err != nil {
			lent.Put(body, true)
		} else {
			s.count(func(r *ScrubReport) { r.Bytes += int64(len(body)) })
			return lying{state: atHand, etag: st.ETag, body: body}
		}
	}
	return lying{state: unread, err: err}
}

func (s *scrubber) read(ctx context.Context, store backend.Store, key string, p []byte) error {
	for off := 0; off < len(p); off += scrubPiece {
		piece := p[off:min(off+scrubPiece, len(p))]
		if err := s.pace.wait(ctx, int64(len(piece))); err != nil {
			return err
		}
		s.p.foreground.yield(ctx, scrubYield)
		if err := store.ReadAt(ctx, key, piece, int64(off)); err != nil {
			return err
		}
	}
	return nil
}

// segment examines one stripe and repairs it. It fails only with ctx's cause.
func (s *scrubber) segment(ctx context.Context, id block.SegmentID) error {
	for ctx.Err() == nil {
		info, ok := s.p.segmentRow(id)
		if !ok {
			break // deleted meanwhile
		}
		found, x := s.examine(ctx, info)
		now, ok := s.p.segmentRow(id)
		again := ok && !slices.Equal(now.Targets, info.Targets) // a shard has moved
		if ok && !again && ctx.Err() == nil {
			s.settle(ctx, info, found, x)
		}
		for _, f := range found {
			s.p.buffers.Put(f.body, true)
		}
		if !again {
			break
		}
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	s.count(func(r *ScrubReport) { r.Segments++ })
	return nil
}

// examine reads all shards of a stripe and compares them. Those that are not what they must be are read again
// until two answers agree: so what is found lies there.
func (s *scrubber) examine(ctx context.Context, info segment.Info) ([]lying, *segment.Exam) {
	found := make([]lying, info.Shards())
	look := func(n int) lying {
		return s.look(ctx, info.Targets[n], info.Key(n), info.ObjectBytes()+1, s.p.buffers)
	}
	var wg sync.WaitGroup
	for n, t := range info.Targets {
		if t != 0 && s.p.isTarget(t) {
			wg.Go(func() { found[n] = look(n) })
		}
	}
	wg.Wait()
	for _, f := range found {
		if f.state == atHand {
			s.count(func(r *ScrubReport) { r.Objects++ })
		}
	}
	sure := make([]bool, len(found))
	for try := 0; ; try++ {
		x := s.p.examineObjects(ctx, info, found)
		again := false
		for n := range found {
			if sure[n] || found[n].state != missing && (found[n].state != atHand || x.Bad[n] == nil) {
				continue
			}
			if try >= scrubTries {
				s.p.buffers.Put(found[n].body, true)
				found[n] = lying{state: unread, err: fmt.Errorf("its target answers otherwise each time: %w", errors.Join(x.Bad[n], found[n].err))}
				again = true
				continue
			}
			now := look(n)
			if sure[n] = now.same(found[n]); !sure[n] {
				found[n], now, again = now, found[n], true
			}
			s.p.buffers.Put(now.body, true)
		}
		if !again || ctx.Err() != nil {
			return found, x
		}
	}
}

// examineObjects is segment.Examine with the index that the tier has, should the shards have none.
func (p *Pool) examineObjects(ctx context.Context, info segment.Info, found []lying) *segment.Exam {
	objects := make([][]byte, len(found))
	for n, f := range found {
		objects[n] = f.body
	}
	x := segment.Examine(info, p.uuid, objects, nil)
	if x.Index == nil {
		if known, err := p.reader.Index(ctx, info); err == nil {
			x = segment.Examine(info, p.uuid, objects, known)
		}
	}
	return x
}

// settle counts what was found in a stripe and repairs what can be.
func (s *scrubber) settle(ctx context.Context, info segment.Info, found []lying, x *segment.Exam) {
	away := false
	for n, f := range found {
		if f.state == notStored {
			s.count(func(r *ScrubReport) { r.Lacking++ })
		}
		if f.state == unread {
			away = true
			s.count(func(r *ScrubReport) { r.Unread++ })
			s.p.o.Log.Debug("scrub: shard not read", "pool", s.p.o.Name, "object", info.Key(n), "err", f.err)
		}
	}
	hurt, dead := false, x.Err != nil && !x.RecordLost() && s.p.segmentDead(info.ID)
	for n, f := range found {
		if f.state == missing || f.state == atHand && x.Bad[n] != nil {
			hurt = true
			s.settleShard(ctx, info, n, f, x, away, dead)
		}
	}
	if x.Err == nil || away || !hurt || dead {
		return
	}
	lost := s.p.lostRanges(ctx, info, x)
	s.count(func(r *ScrubReport) {
		for _, l := range lost {
			r.LostBytes += int64(l.Blocks) * block.Size
		}
		r.Lost = append(r.Lost, lost[:min(len(lost), max(0, problemsMax-len(r.Lost)))]...)
	})
	s.p.o.Log.Error("scrub: segment is damaged beyond repair", "pool", s.p.o.Name, "segment", uint64(info.ID), "lost", lost, "err", x.Err)
}

// settleShard counts one shard that is not what it must be, and stores it anew if that is possible and allowed.
// away says that others could not be read, dead that nobody needs the stripe.
func (s *scrubber) settleShard(ctx context.Context, info segment.Info, n int, f lying, x *segment.Exam, away, dead bool) {
	t, what, outcome := info.Targets[n], f.err, outRepaired
	if f.state == atHand {
		what = x.Bad[n]
	}
	body, hopeless := x.Object(n), false
	switch why := s.mayRepair(ctx, t); {
	case body == nil && away:
		outcome = outAway
	case body == nil && dead:
		s.count(func(r *ScrubReport) { r.Dead++ })
		s.problem(s.p.targetName(t), info.Key(n), what, outDead)
		return
	case body == nil:
		outcome, hopeless = outHopeless, true
	case why != "":
		outcome = why
	default:
		wanted := func() bool { _, ok := s.p.segmentRow(info.ID); return ok }
		if err := s.putBack(ctx, t, info.Key(n), f, body, wanted); err != nil {
			outcome = fmt.Sprintf("not repaired: %v", err)
		}
	}
	s.tally(f.state == missing, outcome == outRepaired, hopeless)
	s.problem(s.p.targetName(t), info.Key(n), what, outcome)
}

func (s *scrubber) tally(missing, repaired, hopeless bool) {
	s.count(func(r *ScrubReport) {
		if missing {
			r.Missing++
		} else {
			r.Damaged++
		}
		if repaired {
			r.Repaired++
		}
		if hopeless {
			r.Unrepairable++
		}
	})
}

// putBack stores body under key, where an object was found damaged or missing, and reads it back. Whatever else is
// there by now stays. If the object is not wanted any more when it is there, it is removed again: its segment
// was deleted meanwhile.
func (s *scrubber) putBack(ctx context.Context, t block.TargetID, key string, was lying, body []byte, wanted func() bool) error {
	store, ok := s.p.store(t)
	if !ok {
		return fmt.Errorf("target %s is not configured", s.p.targetName(t))
	}
	cond := backend.Cond{Absent: true}
	if was.state == atHand {
		cond = backend.Cond{Match: was.etag}
	}
	var err error
	wait := backoff(0)
	for range scrubTries {
		if !wanted() {
			return errors.New("it is being deleted")
		}
		if err = s.pace.wait(ctx, int64(len(body))); err != nil {
			return err
		}
		pctx, cancel := context.WithTimeout(ctx, putTimeout)
		_, err = store.Put(pctx, key, body, cond)
		cancel()
		now := s.look(ctx, t, key, int64(len(body))+1, nil)
		if now.state == atHand && bytes.Equal(now.body, body) { // also if only the reply was lost
			if wanted() {
				return nil
			}
			return errors.Join(errors.New("it is being deleted"), store.Delete(ctx, key))
		}
		if err == nil {
			err = fmt.Errorf("what was stored is not what is read back: %w", now.err)
			if now.err == nil {
				err = errors.New("what was stored is not what is read back")
			}
			return err
		}
		if c := backend.ClassOf(err); c != backend.Transient && c != backend.Throttled {
			return err
		}
		if wait.sleep(ctx) != nil {
			return context.Cause(ctx)
		}
		wait = wait.next()
	}
	return err
}
