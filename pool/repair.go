package pool

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"graindisk/backend"
	"graindisk/block"
	"graindisk/grains/segment"
	"graindisk/pool/root"
)

// Repair brings segments back to full strength: each shard that was never stored, or whose target is no longer
// a member of the pool, is restored on a member that has fewest of its stripe. The weakest segments come first.
// A pass ends with a published checkpoint that has the new places and lies itself on enough targets. It is done in
// the background, at Options.RepairRate, when there is something to do and a target to do it on; and at once, by
// Repair, for who asks.

// repairer is the state of repairs. The zero value becomes ready by init.
type repairer struct {
	slots chan struct{} // tokens of restoreShard
	pass  chan struct{} // holds a token while a pass is under way
	end   sync.Once     // takes it for good
	asked atomic.Int32  // who waits for the pass in the background to make way, or has made it

	asks chan memberAsk
	wake chan struct{} // capacity 1: a pass in the background may be worth while now

	look atomic.Bool // there may be something to repair
	weak atomic.Bool // a target was replaced: the published checkpoint may lack copies
	thin atomic.Bool // a part of it was stored with fewer copies, since a target was lost; weak once that is back
	want atomic.Int32

	mu          sync.Mutex
	unpublished map[block.SegmentID]uint64 // segments with places that no published checkpoint has, by the change
	changes     uint64
	background  context.CancelFunc // of the pass in the background; nil while there is none
	progress    RepairProgress     // of the pass under way, or the last one
	err         error              // of the last pass
}

// What the committer is asked for beside cuts.
const (
	wantNothing int32 = iota
	wantCheckpoint
	wantWholeCheckpoint // with all maps, whatever the older ones hold
)

func (r *repairer) init() {
	r.slots, r.pass = make(chan struct{}, restoresMax), make(chan struct{}, 1)
	r.asks = make(chan memberAsk)
	r.unpublished, r.wake = map[block.SegmentID]uint64{}, make(chan struct{}, 1)
	r.look.Store(true)
}

// moved notes that the row of a segment has changed.
func (r *repairer) moved(id block.SegmentID) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.changes++
	r.unpublished[id] = r.changes
	r.look.Store(true)
}

// forget is for maps that are read from the targets instead: what those say is published.
func (r *repairer) forget() {
	r.mu.Lock()
	defer r.mu.Unlock()
	clear(r.unpublished)
}

// change is the number of the newest change; published forgets those up to it.
func (r *repairer) change() uint64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.changes
}

func (r *repairer) published(change uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for id, c := range r.unpublished {
		if c <= change {
			delete(r.unpublished, id)
		}
	}
}

// notPublished lists the segments with places that only the tier knows, ascending.
func (r *repairer) notPublished() []block.SegmentID {
	r.mu.Lock()
	defer r.mu.Unlock()
	ids := make([]block.SegmentID, 0, len(r.unpublished))
	for id := range r.unpublished {
		ids = append(ids, id)
	}
	slices.Sort(ids)
	return ids
}

// lookAfter takes note of segments that came into the pool. They may lack shards from the start, or have been
// stored, in part, on a target that was replaced before the cut was committed.
func (p *Pool) lookAfter(infos []segment.Info) {
	members := dataMembers(p.value().Cfg)
	for _, i := range infos {
		if len(lostShards(i, members)) > 0 {
			p.repair.look.Store(true)
		}
	}
}

// RepairOptions say how to repair.
type RepairOptions struct {
	BytesPerSecond int64                // of restored shards; 0 is as fast as the targets go
	Progress       func(RepairProgress) // called now and then, by one goroutine at a time; may be nil
}

// RepairProgress is how far a repair is. Totals are as of its beginning.
type RepairProgress struct {
	SegmentsDone   int     `json:"segments_done"`
	SegmentsTotal  int     `json:"segments_total"`
	BytesDone      int64   `json:"bytes_done"` // of restored shards
	BytesTotal     int64   `json:"bytes_total"`
	BytesPerSecond float64 `json:"bytes_per_second"`
}

// RepairReport is what a repair has done.
type RepairReport struct {
	Segments      int   `json:"segments"` // that lacked shards and could be looked after
	Restored      int   `json:"restored_shards"`
	RestoredBytes int64 `json:"restored_bytes"`
	// Failed shards could not be restored for now: Error says why for one of them.
	Failed int    `json:"failed_shards"`
	Error  string `json:"error,omitempty"`
	// Waiting segments lack shards that no target can take: too few live.
	Waiting int `json:"waiting_segments"`
	// Unreadable segments have too few intact shards left; the first of them are named.
	Unreadable    int               `json:"unreadable_segments"`
	UnreadableIDs []block.SegmentID `json:"unreadable_ids,omitempty"`
	// Checkpoint says that one was published, with the new places.
	Checkpoint bool `json:"checkpoint"`
	// Away targets do not show their copy of the root; what they hold, or held, was not looked after.
	Away []AwayTarget `json:"away_targets,omitempty"`
}

const unreadableNamed = 16

// ErrNotClaimed means that the pool serves from its log and its targets have not confirmed yet that it is its owner.
var ErrNotClaimed = errors.New("the pool is not claimed yet; its targets do not answer")

// Repair restores what can be restored now. It takes the turn of a repair in the background. It fails if ctx
// ends, the pool is closed, or cannot repair at all; what it met on its way is in the report.
func (p *Pool) Repair(ctx context.Context, o RepairOptions) (RepairReport, error) {
	defer p.repair.preempt()()
	return p.repairPass(ctx, o)
}

// preempt ends the pass in the background, if there is one, and lets none begin until release is called.
func (r *repairer) preempt() (release func()) {
	r.asked.Add(1) // before looking: a pass that registers itself later sees it
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.background != nil {
		r.background()
	}
	return func() { r.asked.Add(-1) }
}

// endRepairs waits until no pass runs and lets none begin; the publisher's context has ended.
func (p *Pool) endRepairs() { p.repair.end.Do(func() { p.repair.pass <- struct{}{} }) }

// mayChange tells why the pool must not change anything in the cloud; nil if it may.
func (p *Pool) mayChange() error {
	if b := p.broken.Load(); b != nil {
		return b.err
	}
	if err := p.gate(); err != nil {
		return err
	}
	if !p.isClaimed() {
		return fmt.Errorf("pool %s: %w", p.o.Name, ErrNotClaimed)
	}
	return nil
}

func (p *Pool) repairPass(ctx context.Context, o RepairOptions) (rep RepairReport, err error) {
	if err := p.mayChange(); err != nil {
		return rep, err
	}
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	go func() {
		select {
		case <-p.scrubs.done:
			stop(fmt.Errorf("repair pool %s: the pool is being closed", p.o.Name))
		case <-ctx.Done():
		}
	}()
	select {
	case p.repair.pass <- struct{}{}:
	case <-ctx.Done():
		return rep, context.Cause(ctx)
	}
	defer func() { <-p.repair.pass }()
	defer func() {
		p.repair.mu.Lock()
		p.repair.err = err
		p.repair.mu.Unlock()
	}()
	p.repair.look.Store(false)
	rep, err = p.restoreAll(ctx, o)
	if err == nil {
		rep.Checkpoint, err = p.publishPlaces(ctx)
	}
	if err != nil && ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	if err != nil || rep.Failed > 0 || rep.Waiting > 0 || rep.Unreadable > 0 {
		p.repair.look.Store(true)
	}
	return rep, err
}

// task is a segment with shards to restore.
type task struct {
	info   segment.Info
	shards []int
	spare  int // shards that may yet be lost
}

// dataMembers are the members that hold shards, in the order of the configuration.
func dataMembers(c root.Config) []block.TargetID {
	var ids []block.TargetID
	for _, m := range c.Members {
		if !m.Witness {
			ids = append(ids, m.ID)
		}
	}
	return ids
}

// lostShards are those that no member has, as the row says.
func lostShards(i segment.Info, members []block.TargetID) (lost []int) {
	for s, t := range i.Targets {
		if !slices.Contains(members, t) {
			lost = append(lost, s)
		}
	}
	return lost
}

// repairTasks lists what lacks shards, the weakest first.
func (p *Pool) repairTasks() (tasks []task) {
	members := dataMembers(p.value().Cfg)
	p.mu.Lock()
	for _, i := range p.segments {
		if lost := lostShards(i, members); len(lost) > 0 {
			tasks = append(tasks, task{info: i, shards: lost, spare: i.Shards() - len(lost) - int(i.K)})
		}
	}
	p.mu.Unlock()
	slices.SortFunc(tasks, func(a, b task) int {
		return cmp.Or(cmp.Compare(a.spare, b.spare), cmp.Compare(a.info.ID, b.info.ID))
	})
	return tasks
}

// chooseTarget is where a lost shard of a segment goes: the live target with fewest of its shards, if that is
// fewer than its share.
func chooseTarget(targets []block.TargetID, live []block.TargetID, members int, turn int) (block.TargetID, bool) {
	share := (len(targets) + members - 1) / members
	best, least := block.TargetID(0), share
	for i := range live {
		t, n := live[(i+turn)%len(live)], 0
		for _, o := range targets {
			if o == t {
				n++
			}
		}
		if n < least {
			best, least = t, n
		}
	}
	return best, best != 0
}

// repairTargets asks which members can take shards now: they answer, and hold their copy of the root. One that
// was emptied is not among them: what it is given would be lost with it again, when it is replaced.
func (p *Pool) repairTargets(ctx context.Context) (live []block.TargetID) {
	for _, t := range dataMembers(p.value().Cfg) {
		store, ok := p.store(t)
		if !ok || p.avoided(t) {
			continue
		}
		pctx, cancel := context.WithTimeout(ctx, probeTimeout)
		_, err := store.Stat(pctx, root.Key)
		cancel()
		switch {
		case err == nil:
			live = append(live, t)
		case !errors.Is(err, backend.ErrNotFound):
			_ = p.judge(ctx, t, err)
		}
	}
	return live
}

const probeTimeout = 10 * time.Second

// restoreAll restores every lost shard that a live target can take.
func (p *Pool) restoreAll(ctx context.Context, o RepairOptions) (rep RepairReport, err error) {
	tasks := p.repairTasks()
	if len(tasks) == 0 {
		return rep, nil
	}
	live, members := p.repairTargets(ctx), len(dataMembers(p.value().Cfg))
	w := repairWork{p: p, o: o, pace: pacer{rate: o.BytesPerSecond}, begin: time.Now(), rep: &rep}
	w.progress.SegmentsTotal = len(tasks)
	for _, t := range tasks {
		w.progress.BytesTotal += t.info.ObjectBytes() * int64(len(t.shards))
	}
	w.tell()
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(2 * restoresMax) // half of them are read back
	for _, t := range tasks {
		if gctx.Err() != nil {
			break
		}
		g.Go(func() error { return w.segment(gctx, t, live, members) })
	}
	err = errors.Join(g.Wait(), ctx.Err())
	p.o.Log.Info("repair", "pool", p.o.Name, "segments", rep.Segments, "restored", rep.Restored, "bytes", rep.RestoredBytes,
		"failed", rep.Failed, "waiting", rep.Waiting, "unreadable", rep.Unreadable, "err", err)
	return rep, err
}

// repairWork is one pass.
type repairWork struct {
	p     *Pool
	o     RepairOptions
	pace  pacer
	begin time.Time

	mu       sync.Mutex
	rep      *RepairReport
	progress RepairProgress
}

// segment restores the lost shards of one segment. It fails only if the whole pass cannot go on.
func (w *repairWork) segment(ctx context.Context, t task, live []block.TargetID, members int) error {
	targets, waits, tried := slices.Clone(t.info.Targets), false, false
	for _, s := range t.shards {
		targets[s] = 0
	}
	for _, s := range t.shards {
		to, ok := chooseTarget(targets, live, members, int(t.info.ID)+s)
		if !ok {
			waits = true
			continue
		}
		tried = true
		bytes := t.info.ObjectBytes()
		if err := w.pace.wait(ctx, bytes); err != nil {
			return err
		}
		err := w.p.restoreShard(ctx, t.info, s, to, false)
		if errors.Is(err, backend.ErrPrecondition) { // other bytes under the shard's own name: it went bad there
			err = w.p.restoreShard(ctx, t.info, s, to, true)
		}
		if err == nil {
			targets[s] = to
		}
		if stop := w.note(ctx, t.info, bytes, err); stop != nil {
			return stop
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if waits {
		w.rep.Waiting++
	}
	if tried {
		w.rep.Segments++
	}
	w.progress.SegmentsDone++
	w.tellLocked()
	return nil
}

// note counts what became of one shard; it returns an error that ends the pass.
func (w *repairWork) note(ctx context.Context, info segment.Info, bytes int64, err error) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	switch {
	case err == nil:
		w.rep.Restored++
		w.rep.RestoredBytes += bytes
		w.progress.BytesDone += bytes
		w.tellLocked()
		return nil
	case ctx.Err() != nil:
		return ctx.Err()
	case errors.Is(err, errGone):
		return nil
	case w.p.mayChange() != nil, w.p.log.Failed() != nil:
		return err
	case errors.Is(err, segment.ErrDamaged):
		w.rep.Unreadable++
		if len(w.rep.UnreadableIDs) < unreadableNamed {
			w.rep.UnreadableIDs = append(w.rep.UnreadableIDs, info.ID)
		}
		w.p.o.Log.Error("segment cannot be repaired", "pool", w.p.o.Name, "segment", uint64(info.ID), "err", err)
	default:
		w.rep.Failed++
		w.p.o.Log.Warn("shard not restored, it is tried again", "pool", w.p.o.Name, "segment", uint64(info.ID), "err", err)
	}
	w.rep.Error = err.Error()
	return nil
}

func (w *repairWork) tell() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.tellLocked()
}

func (w *repairWork) tellLocked() {
	if d := time.Since(w.begin).Seconds(); d > 0 {
		w.progress.BytesPerSecond = float64(w.progress.BytesDone) / d
	}
	w.p.repair.mu.Lock()
	w.p.repair.progress = w.progress
	w.p.repair.mu.Unlock()
	if w.o.Progress != nil {
		w.o.Progress(w.progress)
	}
}

// ask has the committer publish a checkpoint with its next answer; of two that are asked for it makes the one with more.
func (r *repairer) ask(want int32) {
	for {
		was := r.want.Load()
		if was >= want || r.want.CompareAndSwap(was, want) {
			return
		}
	}
}

// publishPlaces has a checkpoint published if rows of segments have changed since the last, and one with all
// maps if the last one lacks copies. It reports whether there was need. Maps that are far are fetched first, so that
// cuts need not wait for them; if one cannot be read, that is the error, but places are published all the same.
func (p *Pool) publishPlaces(ctx context.Context) (published bool, err error) {
	weak := p.repair.weak.Swap(false) // before looking: what is lost from here on is the next one's
	defer func() {
		if weak && err != nil {
			p.repair.weak.Store(true)
		}
	}()
	want := wantNothing
	if len(p.repair.notPublished()) > 0 {
		want = wantCheckpoint
	}
	var unread error
	if weak {
		lacks, err := p.checkpointWeak(ctx)
		for wait := backoff(0); err != nil; wait = wait.next() {
			p.o.Log.Warn("published checkpoint not looked through, trying again", "pool", p.o.Name, "err", err)
			if serr := wait.sleep(ctx); serr != nil {
				return false, serr
			}
			lacks, err = p.checkpointWeak(ctx)
		}
		if lacks {
			if unread = p.needAllRuns(ctx); ctx.Err() != nil {
				return false, ctx.Err()
			}
			if unread == nil {
				want = wantWholeCheckpoint
			}
		}
	}
	if want == wantNothing {
		return false, unread
	}
	p.repair.ask(want)
	if err := p.Publish(ctx); err != nil {
		return false, err
	}
	return true, unread
}

// needAllRuns fetches the maps that are far, from where the older checkpoints have them, as one with all maps needs
// them. It waits for the targets; without the end of ctx its error is damage of all copies.
func (p *Pool) needAllRuns(ctx context.Context) error {
	err := p.needRuns(ctx, p.runs.Partial())
	if err != nil && ctx.Err() == nil {
		err = fmt.Errorf("no new checkpoint of all maps: one cannot be read: %w", err)
		p.o.Log.Error("no new checkpoint of all maps", "pool", p.o.Name, "err", err)
	}
	return err
}

// checkpointIfWanted publishes the checkpoint that a repair or a scrub has asked for. It belongs to the committer,
// and so waits for no map: who asks for one with all maps has had them fetched. Should some be far even so, the older
// checkpoints' parts stay in use, and the checkpoint counts as lacking copies still.
func (p *Pool) checkpointIfWanted(ctx context.Context) error {
	want := p.repair.want.Swap(wantNothing)
	if want == wantNothing || p.value().Cut == 0 {
		return nil
	}
	p.pub.own.Lock()
	defer p.pub.own.Unlock()
	switch {
	case want < wantWholeCheckpoint:
	case len(p.runs.Partial()) > 0:
		p.repair.weak.Store(true)
	default:
		p.pub.ckpt.runs, p.pub.ckpt.old = nil, false // readers go on finding the older parts
	}
	return p.publishCheckpoint(ctx)
}

// checkpointWeak tells whether some part of the newest published checkpoint lies on fewer targets than one is
// stored on. Targets that do not answer count as having theirs: they are away, not lost.
func (p *Pool) checkpointWeak(ctx context.Context) (bool, error) {
	v := p.value()
	if len(v.Checkpoints) == 0 {
		return false, nil
	}
	s, err := p.readManifest(ctx, v.Checkpoints[0])
	if err != nil {
		if ctx.Err() != nil || !final(err) {
			return false, err
		}
		return true, nil
	}
	ids := []partID{{v.Checkpoints[0].Epoch, v.Checkpoints[0].N, 0}}
	for _, t := range s.Tables {
		ids = append(ids, partID{v.Checkpoints[0].Epoch, v.Checkpoints[0].N, t.Part})
	}
	for _, d := range s.Disks {
		for _, r := range d.Runs {
			ids = append(ids, partID{r.Epoch, r.N, r.Part})
		}
	}
	for _, r := range s.Usage {
		ids = append(ids, partID{r.Epoch, r.N, r.Part})
	}
	seen := map[partID]bool{}
	members := dataMembers(v.Cfg)
	for _, id := range ids {
		if seen[id] {
			continue
		}
		seen[id] = true
		if p.copiesOfPart(ctx, id, members) < min(v.Stripe.Parity+1, len(members)) {
			return true, nil
		}
	}
	return false, ctx.Err()
}

// copiesOfPart counts the members that are seen to have a copy of a part. One that does not answer may have lost it: it is
// rather stored once too often.
func (p *Pool) copiesOfPart(ctx context.Context, id partID, members []block.TargetID) (n int) {
	for _, t := range members {
		store, ok := p.store(t)
		for c := 0; ok && c < len(members); c++ {
			_, err := store.Stat(ctx, partKey(id.epoch, id.n, id.part, c))
			if err == nil {
				n++
			}
			if !errors.Is(err, backend.ErrNotFound) {
				break
			}
		}
	}
	return n
}

// How often the background looks whether there is something to repair, and after how many times that it tries
// again what it could do nothing about: the number doubles up to repairPatience. [tune]
const (
	repairPoll     = 10 * time.Second
	repairPatience = 32
)

// keepRepaired repairs in the background until ctx ends, and changes the members when it is asked to, or when a
// change was left half done.
func (p *Pool) keepRepaired(ctx context.Context) {
	tick := time.NewTicker(p.o.repairPoll)
	defer tick.Stop()
	for pause, left := 1, 1; ; {
		if ctx.Err() != nil {
			return
		}
		select {
		case <-ctx.Done():
			return
		case a := <-p.repair.asks:
			c, err := p.changeMember(ctx, a.name, a.add)
			a.answer <- memberAnswer{c, err}
			continue
		case <-p.repair.wake:
			pause, left = 1, 0
		case <-tick.C:
			left--
		}
		if p.mayChange() != nil {
			continue
		}
		if err := p.finishMembers(ctx); err != nil {
			p.o.Log.Warn("change of targets is tried again", "pool", p.o.Name, "err", err)
			continue
		}
		if left > 0 || !p.repair.look.Load() || p.o.RepairRate < 0 {
			continue
		}
		if p.repairQuietly(ctx) {
			pause = 1
		} else {
			pause = min(2*pause, repairPatience)
		}
		left = pause
	}
}

// repairQuietly is one pass in the background, and tells whether it did all or part of what there was to do. It
// makes way for one that somebody asks for.
func (p *Pool) repairQuietly(ctx context.Context) bool {
	pctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer func() {
		p.repair.mu.Lock()
		defer p.repair.mu.Unlock()
		p.repair.background = nil
	}()
	p.repair.mu.Lock()
	p.repair.background = cancel
	p.repair.mu.Unlock()
	if p.repair.asked.Load() > 0 {
		return false
	}
	rep, err := p.repairPass(pctx, RepairOptions{BytesPerSecond: p.o.RepairRate})
	if err != nil && pctx.Err() == nil {
		p.o.Log.Warn("repair is tried again", "pool", p.o.Name, "err", err)
	}
	return err == nil && (rep.Restored > 0 || !p.repair.look.Load())
}

// nudge has the background look now.
func (r *repairer) nudge() {
	r.look.Store(true)
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

// StrengthStatus says how many segments could lose as many targets as the profile says, and what the others lack.
type StrengthStatus struct {
	Whole int `json:"whole_segments"`
	// Below survive the loss of fewer targets than the profile says.
	Below int `json:"segments_below_strength"`
	// Unreadable are those of Below that lack more shards than they can.
	Unreadable int `json:"unreadable_segments"`
	// Unpublished are those of Below that are whole by a repair of which no published checkpoint knows yet.
	Unpublished   int   `json:"unpublished_segments"`
	MissingShards int   `json:"missing_shards"` // that no target took
	LostShards    int   `json:"lost_shards"`    // that were on targets which are no members any more
	EmptiedShards int   `json:"emptied_shards"` // on members that do not show their copy of the root: they must be replaced
	LackingBytes  int64 `json:"lacking_bytes"`  // of all these
}

// strength counts, and tells the number of shards on each target. It runs with mu held.
func (p *Pool) strengthLocked(v root.Value) (StrengthStatus, map[block.TargetID]int) {
	var s StrengthStatus
	on := map[block.TargetID]int{}
	members := dataMembers(v.Cfg)
	emptied := map[block.TargetID]bool{}
	for _, t := range members {
		emptied[t] = p.emptied(t)
	}
	moved := p.repair.notPublished()
	for id, i := range p.segments {
		stored := 0
		for _, t := range i.Targets {
			switch {
			case slices.Contains(members, t) && !emptied[t]:
				stored++
				on[t]++
				continue
			case emptied[t]:
				s.EmptiedShards++
				on[t]++
			case t == 0:
				s.MissingShards++
			default:
				s.LostShards++
			}
			s.LackingBytes += i.ObjectBytes()
		}
		_, unpublished := slices.BinarySearch(moved, id)
		below := stored-int(i.K) < v.Stripe.Parity
		switch {
		case stored < int(i.K):
			s.Unreadable++
		case !below && unpublished:
			s.Unpublished++
		}
		if below || unpublished {
			s.Below++
		} else {
			s.Whole++
		}
	}
	return s, on
}

// RepairStatus is the repair under way, or the last one.
type RepairStatus struct {
	Running    bool   `json:"running"`
	Background bool   `json:"background"`
	Error      string `json:"error,omitempty"` // of the last one
	RepairProgress
}

func (r *repairer) status() RepairStatus {
	r.mu.Lock()
	defer r.mu.Unlock()
	s := RepairStatus{Running: len(r.pass) > 0, Background: r.background != nil, RepairProgress: r.progress}
	if r.err != nil && !errors.Is(r.err, context.Canceled) {
		s.Error = r.err.Error()
	}
	return s
}
