package pool

import (
	"context"
	"errors"
	"fmt"
	"time"

	"graindisk/backend"
	"graindisk/block"
	"graindisk/grains/segment"
	"graindisk/pool/root"
	"graindisk/writeback"
)

// Publish makes a cut of everything that is in the log now, and returns when it is published.
func (p *Pool) Publish(ctx context.Context) error {
	answer := make(chan error, 1)
	select {
	case p.pub.kick <- answer:
	case <-p.pub.done:
		return p.stopped()
	case <-ctx.Done():
		return ctx.Err()
	}
	select {
	case err := <-answer:
		return err
	case <-p.pub.done:
		select {
		case err := <-answer:
			return err
		default:
			return p.stopped()
		}
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (p *Pool) stopped() error {
	if b := p.broken.Load(); b != nil {
		return b.err
	}
	return ErrShutdown
}

// Close ends the pool; no disk of it may be in use any more. It publishes everything and releases the
// pool. If the targets do not answer before ctx ends, it leaves the log intact and the pool held and
// returns ErrShutdown: the next Open on this tier serves everything.
func (p *Pool) Close(ctx context.Context) error {
	p.endBoots()
	perr := p.endReclaim(ctx)
	if perr == nil {
		perr = p.Publish(ctx)
	}
	p.pub.cancel()
	p.endScrubs()
	if perr != nil {
		p.log.StopWaiting() // the publisher may be at it
	}
	p.endRepairs()
	<-p.pub.done
	<-p.pub.local
	// From here on this goroutine is the publisher.
	switch {
	case perr == nil:
		if perr = p.release(ctx); perr != nil && ctx.Err() != nil {
			perr = fmt.Errorf("close pool %s: everything is published, but the pool could not be released: %w", p.o.Name, ErrShutdown)
		}
	case ctx.Err() != nil:
		u := p.log.Unpublished()
		perr = fmt.Errorf("close pool %s: %w: %d bytes stay in the log on %s and the pool stays held; start the gateway again to publish them",
			p.o.Name, ErrShutdown, u.Bytes, p.o.TierDir)
	}
	p.mapsMu.Lock()
	p.closed = true
	p.mapsMu.Unlock()
	return errors.Join(perr, p.endTier())
}

// release checkpoints both sides, so that whoever opens next has little to read, and says in the root
// that nobody owns the pool.
func (p *Pool) release(ctx context.Context) error {
	if v := p.value(); v.Cut > 0 && (len(v.Cuts) > p.o.CheckpointCuts/8 || len(p.repair.notPublished()) > 0) {
		if err := p.publishCheckpoint(ctx); err != nil {
			return err
		}
	}
	if err := p.update(ctx, func(v *root.Value) { v.State = root.Released }); err != nil {
		return err
	}
	f, err := p.localCheckpoint(ctx)
	if err != nil {
		return err
	}
	return p.log.Publish(f)
}

// Owner is the log that this process owns the pool by; ok is false once it was found that it does not, or
// once the pool has stopped for another reason.
func (p *Pool) Owner() (log writeback.UUID, ok bool) {
	return p.logID, p.broken.Load() == nil && p.gateFn.Load() == nil
}

// Claimed is the epoch in which this process has claimed the pool; 0 before it has.
func (p *Pool) Claimed() uint64 {
	if !p.isClaimed() {
		return 0
	}
	return p.epoch.Load()
}

// Status is a pool as people and programs want to see it.
type Status struct {
	Name                  string         `json:"name"`
	UUID                  string         `json:"uuid"`
	State                 string         `json:"state"` // serving | claiming | stopped
	Error                 string         `json:"error,omitempty"`
	Epoch                 uint64         `json:"epoch"`
	Owner                 OwnerStatus    `json:"owner"`
	Fenced                *Fence         `json:"fenced,omitempty"`      // once another owner has taken over
	Quarantines           []Quarantine   `json:"quarantines,omitempty"` // on the tier, as of the open
	RequestCost           float64        `json:"request_cost"`          // of all targets since the pool was opened, by the configured prices
	PublishedCut          uint64         `json:"published_cut"`
	UnpublishedBytes      int64          `json:"unpublished_bytes"`
	UnpublishedAgeSeconds float64        `json:"unpublished_age_seconds"`
	Exposure              ExposureStatus `json:"exposure"`
	Log                   LogStatus      `json:"log"`
	Stripe                string         `json:"stripe"`
	Segments              int            `json:"segments"`
	// SegmentsBelowStrength survive the loss of fewer targets than the profile says, until they are repaired.
	SegmentsBelowStrength int                 `json:"segments_below_strength"`
	Strength              StrengthStatus      `json:"strength"`
	Repair                RepairStatus        `json:"repair"`
	Space                 SpaceStatus         `json:"space"`
	Requests              Requests            `json:"requests"` // to all targets, since the pool was opened
	Buffers               segment.BufferStats `json:"buffers"`  // memory of segments on their way
	Targets               []TargetStatus      `json:"targets"`
	Tier                  TierStatus          `json:"tier"`
	Scrub                 ScrubStatus         `json:"scrub"`
	Reads                 ReadCounts          `json:"-"`
}

// TargetStatus is one target of a pool.
type TargetStatus struct {
	Name    string         `json:"name"`
	ID      block.TargetID `json:"id"`                // in the pool; a replaced target has another
	Witness bool           `json:"witness,omitempty"` // it holds its copy of the root and no shards
	Shards  int            `json:"shards"`
	Where   string         `json:"where"`
	Avoided bool           `json:"avoided"` // it failed a moment ago
	// Root is how its copy of the root was when it was last looked at, see Pool.LookAtTargets: ok, missing, foreign,
	// damaged, newer, gone or unreachable; empty if nobody has looked yet.
	Root      string `json:"root"`
	RootError string `json:"root_error,omitempty"` // what more there is to say of that
	// Health is what the store itself reports, if it does.
	Health *backend.Health `json:"health,omitempty"`
}

// TierStatus is how the tier's slots are used.
type TierStatus struct {
	Dir       string `json:"dir"`
	SlotBytes int64  `json:"slot_bytes"`
	Free      int    `json:"free_slots"`
	Busy      int    `json:"busy_slots"`
	Clean     int    `json:"clean_slots"`
	// IndexBytes is the memory of the index of unpublished writes.
	IndexBytes int64 `json:"index_bytes"`
	// MapsAwayBytes are of maps that are fetched still, after an open on a fresh host: until then reads may wait for them.
	MapsAwayBytes int64       `json:"maps_away_bytes"`
	Cache         CacheStatus `json:"cache"`
}

// Status reports on the pool.
func (p *Pool) Status() Status {
	pr := p.log.Pressure()
	u := pr.Dirty
	s := Status{
		Name: p.o.Name, UUID: p.uuid.String(), State: "serving", Epoch: p.epoch.Load(),
		UnpublishedBytes: u.Bytes, UnpublishedAgeSeconds: age(u), Exposure: p.exposure(pr),
	}
	free, busy, clean := p.space.Counts()
	s.Log = logStatus(p.log.Health(), time.Now())
	s.Reads = p.readCounts()
	s.Tier = TierStatus{
		Dir: p.o.TierDir, SlotBytes: p.space.SlotBytes(), Free: free, Busy: busy, Clean: clean, IndexBytes: p.log.IndexBytes(),
		MapsAwayBytes: p.mapsAway(), Cache: s.Reads.short(),
	}
	if !p.isClaimed() {
		s.State = "claiming"
	}
	if b := p.broken.Load(); b != nil {
		s.State, s.Error = "stopped", b.err.Error()
	}
	v := p.value()
	s.PublishedCut = v.Cut
	s.Space, s.Scrub = p.spaceStatus(), p.scrubStatus()
	s.Stripe = fmt.Sprintf("%d+%d", v.Stripe.Data, v.Stripe.Parity)
	p.mu.Lock()
	defer p.mu.Unlock()
	s.Segments = len(p.segments)
	var shards map[block.TargetID]int
	s.Strength, shards = p.strengthLocked(v)
	s.SegmentsBelowStrength, s.Repair = s.Strength.Below, p.repair.status()
	s.Owner, s.Fenced, s.Quarantines = p.ownerStatus(v), p.fence.Load(), p.quarantines
	s.Buffers = p.buffers.Stats()
	for _, r := range p.Requests() {
		s.Requests = s.Requests.plus(r)
	}
	for _, m := range v.Cfg.Members {
		t := TargetStatus{ID: m.ID, Name: p.targetName(m.ID), Witness: m.Witness, Shards: shards[m.ID], Avoided: p.avoidedLocked(m.ID), Root: p.rootState(m.ID), RootError: p.rootError(m.ID)}
		if st, ok := p.store(m.ID); ok {
			t.Where = st.String()
			if c, ok := st.(*countedStore); ok {
				st = c.Store
			}
			if w, ok := st.(backend.Watched); ok {
				h := w.Health()
				t.Health = &h
				s.RequestCost += h.Cost
			}
		}
		s.Targets = append(s.Targets, t)
	}
	return s
}
