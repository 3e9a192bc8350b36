package pool

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"graindisk/block"
	"graindisk/grains/segment"
	"graindisk/pool/root"
)

// A scrub reads everything that the pool has on its targets and compares it with what it must be:
//
//	copies of the root  ──► damaged: the root is committed once more, see scrubber.roots
//	checkpoints named   ──► a copy damaged or missing: stored again from another; none left: a new checkpoint
//	stripes, by number  ──► segment.Examine: a shard damaged or missing: stored again, byte for byte as it was
//
// What is repaired goes to where it was, under the name that it had, and only over what was seen there: a
// damaged object is replaced by a put on the condition of its ETag, a missing one is put if it is absent. An answer
// is damage only when it came twice: bits may flip on the way as well. Nothing is stored at a target that
// does not show its copy of the root: it may have been emptied, or swapped, and returns as a new member only.
//
// The log and the cache on the tier are not the scrub's: a block there is checked when it is read. Nor is the
// beat: nothing depends on it, and its next writing replaces whatever is there.

// ErrUnrepaired means that a scrub has left damage.
var ErrUnrepaired = errors.New("damage left")

// ErrUnread means that a scrub could not read everything.
var ErrUnread = errors.New("not everything could be read")

// ScrubOptions say how a scrub goes about it.
type ScrubOptions struct {
	BytesPerSecond int64 // what is read at most; 0 = no bound, but requests of guests go first
	DryRun         bool  // repair nothing
}

// ScrubReport is what a scrub has found, up to now if it is still running.
type ScrubReport struct {
	Started       time.Time `json:"started"`
	Ended         time.Time `json:"ended,omitzero"`
	Segments      int       `json:"segments"`       // looked at
	SegmentsTotal int       `json:"segments_total"` // to look at
	Objects       int64     `json:"objects"`        // read: shards, parts of checkpoints, copies of the root
	Bytes         int64     `json:"bytes"`          // read
	Lacking       int64     `json:"lacking"`        // shards that are stored nowhere, by their segment's row: a matter for repair
	// Dead objects are damaged or missing for good, and are no loss: nothing maps their segments any more. They are in
	// none of the counts.
	Dead int64 `json:"dead"`
	ScrubCounts
	Problems []ScrubProblem `json:"problems"` // the first thousand
	Lost     []DamagedRange `json:"lost"`     // the first thousand
}

// ScrubCounts count objects, but for LostBytes.
type ScrubCounts struct {
	Damaged      int64 `json:"damaged"`      // not what was stored there
	Missing      int64 `json:"missing"`      // not there
	Repaired     int64 `json:"repaired"`     // of the two
	Unrepairable int64 `json:"unrepairable"` // of the two: what is left of the others does not suffice
	Unread       int64 `json:"unread"`       // their targets did not answer: nothing is known of them
	LostBytes    int64 `json:"lost_bytes"`   // of disks, that nothing has any more; reading them fails
}

func (c *ScrubCounts) add(o ScrubCounts) {
	c.Damaged += o.Damaged
	c.Missing += o.Missing
	c.Repaired += o.Repaired
	c.Unrepairable += o.Unrepairable
	c.Unread += o.Unread
	c.LostBytes += o.LostBytes
}

// ScrubProblem is one object that was not as it must be.
type ScrubProblem struct {
	Target  string `json:"target"`
	Object  string `json:"object"`
	Problem string `json:"problem"`
	Outcome string `json:"outcome"` // "repaired", or why not and what to do
}

// DamagedRange are blocks of a disk that cannot be read any more.
type DamagedRange struct {
	Disk   string    `json:"disk"`
	LBA    block.LBA `json:"lba"`    // times 4096 is a byte offset
	Blocks uint64    `json:"blocks"` // of 4096 bytes
}

// Err is nil if everything was read and all that anything needs is as it must be, now. Else it matches ErrUnrepaired or ErrUnread.
func (r ScrubReport) Err() error {
	left := r.Damaged + r.Missing - r.Repaired
	switch {
	case r.LostBytes > 0:
		return fmt.Errorf("%w: %d objects, and %d bytes of disks are lost", ErrUnrepaired, left, r.LostBytes)
	case left > 0:
		return fmt.Errorf("%w: %d objects", ErrUnrepaired, left)
	case r.Unread > 0:
		return fmt.Errorf("%w: %d objects of targets that did not answer", ErrUnread, r.Unread)
	}
	return nil
}

const (
	problemsMax = 1000 // kept of a report
	scrubAtOnce = 2    // stripes in memory: one is examined while the next is read
)

// scrubs is the state of scrubbing in a Pool.
type scrubs struct {
	turn chan struct{}   // holds a token while one runs
	done <-chan struct{} // closed when the pool is being closed
	end  sync.Once       // takes the turn for good

	mu      sync.Mutex
	running *scrubber               // guarded by mu; the one that was asked for, nil while none runs
	last    ScrubSummary            // guarded by mu; of the newest of these that ended
	round   scrubRound              // guarded by mu
	total   ScrubCounts             // guarded by mu; since the pool was opened, of all scrubs and of damage met by reads
	bytes   int64                   // guarded by mu; read since then
	met     metDamage               // guarded by mu
	fits    map[block.TargetID]bool // guarded by mu; members that showed their copy of the root
	fitsAt  time.Time               // guarded by mu; when that was looked at
}

func (c *scrubs) init(done <-chan struct{}) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.turn, c.done = make(chan struct{}, 1), done
	c.met.wake = make(chan struct{}, 1)
}

// scrubber is one scrub.
type scrubber struct {
	p    *Pool
	o    ScrubOptions
	pace pacer

	mu  sync.Mutex
	rep ScrubReport
}

func (p *Pool) newScrubber(o ScrubOptions) *scrubber {
	return &scrubber{
		p: p, o: o, pace: pacer{rate: o.BytesPerSecond},
		rep: ScrubReport{Started: time.Now().UTC(), Problems: []ScrubProblem{}, Lost: []DamagedRange{}},
	}
}

// Scrub reads everything that the pool has on its targets, repairs what it can, and reports. One runs at a
// time; the others wait. It fails only if ctx ends or the pool is closed, and then tells what it had found. Whether
// all is well is ScrubReport.Err.
func (p *Pool) Scrub(ctx context.Context, o ScrubOptions) (ScrubReport, error) {
	s := p.newScrubber(o)
	err := p.scrubbing(ctx, s, func(ctx context.Context) error {
		p.scrubs.mu.Lock()
		p.scrubs.running = s
		p.scrubs.mu.Unlock()
		if err := s.begin(ctx); err != nil {
			return err
		}
		ids := p.segmentsFrom(0)
		s.count(func(r *ScrubReport) { r.SegmentsTotal = len(ids) })
		g, gctx := errgroup.WithContext(ctx)
		g.SetLimit(scrubAtOnce)
		for _, id := range ids {
			if gctx.Err() != nil {
				break
			}
			g.Go(func() error { return s.segment(gctx, id) })
		}
		return g.Wait()
	})
	p.scrubs.mu.Lock()
	defer p.scrubs.mu.Unlock()
	if p.scrubs.running == s {
		p.scrubs.running, p.scrubs.last = nil, s.report().summary()
	}
	return s.report(), err
}

// scrubbing runs f, which is to scrub with s, when it is its turn, with a context that ends with the pool.
func (p *Pool) scrubbing(ctx context.Context, s *scrubber, f func(context.Context) error) error {
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	go func() {
		select {
		case <-p.scrubs.done:
			stop(fmt.Errorf("scrub pool %s: the pool is being closed", p.o.Name))
		case <-ctx.Done():
		}
	}()
	select {
	case p.scrubs.turn <- struct{}{}:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	defer func() { <-p.scrubs.turn }()
	err := f(ctx)
	s.count(func(r *ScrubReport) { r.Ended = time.Now().UTC() })
	rep := s.report()
	p.scrubs.mu.Lock()
	defer p.scrubs.mu.Unlock()
	p.scrubs.total.add(rep.ScrubCounts)
	p.scrubs.bytes += rep.Bytes
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}

// endScrubs waits until none runs and lets none begin; p.scrubs.done is closed.
func (p *Pool) endScrubs() { p.scrubs.end.Do(func() { p.scrubs.turn <- struct{}{} }) }

// begin looks at what there is beside the stripes: it tells which targets may be repaired.
func (s *scrubber) begin(ctx context.Context) error {
	if err := s.roots(ctx); err != nil {
		return err
	}
	return s.checkpoints(ctx)
}

// segmentsFrom are the numbers of all segments from one on, ascending.
func (p *Pool) segmentsFrom(first block.SegmentID) []block.SegmentID {
	p.mu.Lock()
	defer p.mu.Unlock()
	ids := slices.Sorted(maps.Keys(p.segments))
	at, _ := slices.BinarySearch(ids, first)
	return ids[at:]
}

// segmentRow is where a segment's shards are now.
func (p *Pool) segmentRow(id block.SegmentID) (segment.Info, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	info, ok := p.segments[id]
	return info, ok
}

func (s *scrubber) count(f func(*ScrubReport)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f(&s.rep)
}

// report is a copy of what was found so far.
func (s *scrubber) report() ScrubReport {
	s.mu.Lock()
	defer s.mu.Unlock()
	r := s.rep
	r.Problems, r.Lost = slices.Clone(r.Problems), slices.Clone(r.Lost)
	return r
}

// Outcomes of a problem, for people.
const (
	outRepaired = "repaired"
	outDryRun   = "left as it is: this was a dry run"
	outAway     = "not repaired: too few of the others could be read now; scrub again when their targets answer"
	outDead     = "left as it is: nothing needs it any more, its segment is on its way out"
	outHopeless = "cannot be repaired: what is left of the others does not suffice"
	outMember   = "not repaired: this target does not show its copy of the root; if it was emptied or replaced, make it a new member of the pool with \"gateway pool replace-target\""
	outRootDown = "not repaired: it may have promised what nobody else knows, so it counts as down; make this target a new member of the pool with \"gateway pool replace-target\""
	outStopped  = "not repaired: the pool is not claimed by this gateway, or publishing has stopped"
)

// problem notes an object that is not as it must be.
func (s *scrubber) problem(target, object string, what error, outcome string) {
	s.p.o.Log.Warn("scrub: object is not as it must be", "pool", s.p.o.Name, "target", target, "object", object, "problem", what, "outcome", outcome)
	s.count(func(r *ScrubReport) {
		if len(r.Problems) < problemsMax {
			r.Problems = append(r.Problems, ScrubProblem{target, object, fmt.Sprint(what), outcome})
		}
	})
}

// isTarget tells whether a target is a member of the pool, or about to be.
func (p *Pool) isTarget(t block.TargetID) bool {
	c := p.value().Cfg
	return slices.ContainsFunc(slices.Concat(c.Members, c.Next), func(m root.Member) bool { return m.ID == t })
}

// mayRepair says why nothing may be stored at a target; empty if it may.
func (s *scrubber) mayRepair(ctx context.Context, t block.TargetID) string {
	switch {
	case s.o.DryRun:
		return outDryRun
	case !s.p.isClaimed() || s.p.broken.Load() != nil || s.p.gate() != nil:
		return outStopped
	case !s.isMember(ctx, t):
		return outMember
	}
	return ""
}

// roots reads every copy of the root. A damaged one may have promised something to a rival before it was
// damaged, so it counts as down and is never written from what others say. But as long as the ETag under which
// this register's own last put left it is still the object's, nobody has changed it since: what the copy says
// is known. The next commit puts on the condition of that ETag, without reading first, so it changes the copy
// from the very state that it is in. So the root is committed once more. If the ETag is another, by a rival's
// put or because the damage changed it, the put fails, and the copy stays down.
func (s *scrubber) roots(ctx context.Context) error {
	view := s.readRoot(ctx)
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	after, err := view, error(nil)
	damaged := func(v root.View, i int) bool { return v.Targets[i].State == root.Damaged }
	for i := range view.Targets {
		if damaged(view, i) && !s.o.DryRun && s.p.isClaimed() {
			if after, err = s.commitAgain(ctx); err != nil {
				return err
			}
			break
		}
	}
	s.learnMembers(after)
	for i, t := range view.Targets {
		s.judgeRoot(t, damaged(view, i) && after.Targets[i].State == root.OK)
	}
	return nil
}

// learnMembers notes which members show their copy of the root.
func (s *scrubber) learnMembers(v root.View) {
	fits := map[block.TargetID]bool{}
	if v.Best != nil {
		for _, m := range slices.Concat(v.Best.Val.Cfg.Members, v.Best.Val.Cfg.Next) {
			fits[m.ID] = slices.ContainsFunc(v.Targets, func(t root.TargetView) bool { return t.State == root.OK && t.Copy.Member == m.UUID })
		}
	}
	s.p.scrubs.mu.Lock()
	defer s.p.scrubs.mu.Unlock()
	s.p.scrubs.fits, s.p.scrubs.fitsAt = fits, time.Now()
}

// membersAge is how long it counts what was seen of the copies of the root. [tune]
const membersAge = time.Second

// isMember tells whether a target shows its copy of the root now, or did a moment ago.
func (s *scrubber) isMember(ctx context.Context, t block.TargetID) bool {
	s.p.scrubs.mu.Lock()
	old := time.Since(s.p.scrubs.fitsAt) >= membersAge
	s.p.scrubs.mu.Unlock()
	if old {
		view, _ := s.p.reg.Read(ctx) // a view without a copy has no members
		s.learnMembers(view)
	}
	s.p.scrubs.mu.Lock()
	defer s.p.scrubs.mu.Unlock()
	return s.p.scrubs.fits[t]
}

// readRoot asks for all copies of the root. One is damaged only if it was each time.
func (s *scrubber) readRoot(ctx context.Context) root.View {
	view, err := s.p.reg.Read(ctx)
	for range scrubTries {
		if !slices.ContainsFunc(view.Targets, func(t root.TargetView) bool { return t.State == root.Damaged }) {
			break
		}
		var again root.View
		if again, err = s.p.reg.Read(ctx); again.Best == nil {
			break
		}
		for i, t := range view.Targets { // the newest view, with what was well before
			if again.Targets[i].State == root.Damaged && t.State == root.OK {
				again.Targets[i] = t
			}
		}
		view = again
	}
	if err != nil {
		s.p.o.Log.Warn("scrub: root not read", "pool", s.p.o.Name, "err", err)
	}
	return view
}

// commitAgain commits the root as it is and looks again.
func (s *scrubber) commitAgain(ctx context.Context) (root.View, error) {
	cctx, cancel := context.WithTimeout(ctx, rootTimeout)
	err := s.p.update(cctx, func(*root.Value) {})
	cancel()
	if ctx.Err() != nil {
		return root.View{}, context.Cause(ctx)
	}
	if err != nil {
		s.p.o.Log.Warn("scrub: root not committed", "pool", s.p.o.Name, "err", err)
		if final(err) {
			s.p.failed(ctx, err)
		}
	}
	return s.readRoot(ctx), nil
}

// rootTimeout bounds the commit that a damaged copy of the root is repaired by.
const rootTimeout = 30 * time.Second

// judgeRoot counts one copy of the root.
func (s *scrubber) judgeRoot(t root.TargetView, repaired bool) {
	s.count(func(r *ScrubReport) {
		r.Objects++
		switch t.State {
		case root.OK, root.Newer:
		case root.Missing:
			r.Missing++
		case root.Unreachable:
			r.Unread++
		default:
			r.Damaged++
		}
		if repaired {
			r.Repaired++
		}
	})
	switch {
	case t.State == root.OK, t.State == root.Unreachable:
	case repaired:
		s.problem(t.Name, root.Key, t.Err, outRepaired)
	case t.State == root.Damaged && s.o.DryRun:
		s.problem(t.Name, root.Key, t.Err, outDryRun)
	default:
		s.problem(t.Name, root.Key, t.Err, outRootDown)
	}
}
