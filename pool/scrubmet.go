package pool

import (
	"context"
	"errors"
	"time"

	"graindisk/backend"
	"graindisk/block"
	"graindisk/grains/segment"
)

// metDamage are segments in which reads met damage, to be examined one after the other. A segment is
// examined at most once in metAgain: what cannot be repaired would be met by every read.
type metDamage struct {
	wake   chan struct{} // holds a token if something may be in the queue
	queue  []metShard
	lately map[block.SegmentID]time.Time // queued then
}

type metShard struct {
	id    block.SegmentID
	shard int
}

const (
	metMax   = 1000 // segments that are remembered; more are left to the scrub
	metAgain = 10 * time.Minute
)

// metDamaged is told by readers that a shard did not serve.
func (p *Pool) metDamaged(id block.SegmentID, shard int, err error) {
	if !p.o.RepairReads || !errors.Is(err, segment.ErrDamaged) && !errors.Is(err, backend.ErrNotFound) {
		return
	}
	c := &p.scrubs
	c.mu.Lock()
	defer c.mu.Unlock()
	now := time.Now()
	if len(c.met.lately) >= metMax {
		for id, t := range c.met.lately {
			if now.Sub(t) >= metAgain {
				delete(c.met.lately, id)
			}
		}
	}
	if t, ok := c.met.lately[id]; ok && now.Sub(t) < metAgain || len(c.met.lately) >= metMax {
		return
	}
	if c.met.lately == nil {
		c.met.lately = map[block.SegmentID]time.Time{}
	}
	c.met.lately[id] = now
	c.met.queue = append(c.met.queue, metShard{id, shard})
	select {
	case c.met.wake <- struct{}{}:
	default:
	}
}

// repairMet examines what metDamaged was told of, until ctx ends. Shards on targets that do not show their copy
// of the root are left alone: all of them are missing there.
func (p *Pool) repairMet(ctx context.Context) {
	c := &p.scrubs
	for ctx.Err() == nil {
		c.mu.Lock()
		var next metShard
		if len(c.met.queue) > 0 && p.isClaimed() {
			next, c.met.queue = c.met.queue[0], c.met.queue[1:]
		}
		waits := len(c.met.queue) > 0
		c.mu.Unlock()
		if next.id == 0 {
			var again <-chan time.Time // while the pool is not claimed
			if waits {
				again = time.After(time.Second)
			}
			select {
			case <-c.met.wake:
			case <-again:
			case <-ctx.Done():
			}
			continue
		}
		p.roundStep(ctx, &scrubRound{}, func(ctx context.Context, s *scrubber) error {
			info, ok := p.segmentRow(next.id)
			if !ok || next.shard >= info.Shards() || s.mayRepair(ctx, info.Targets[next.shard]) != "" {
				return nil
			}
			return s.segment(ctx, next.id)
		})
	}
}

// keepScrubbing starts what scrubs by itself, until ctx ends.
func (p *Pool) keepScrubbing(ctx context.Context) {
	if p.o.RepairReads {
		p.ahead.Go(func() { p.repairMet(ctx) })
	}
	if p.o.ScrubPeriod > 0 {
		p.ahead.Go(func() { p.scrubRounds(ctx) })
	}
}

// ScrubSummary is a scrub without its lists.
type ScrubSummary struct {
	Started       time.Time `json:"started,omitzero"`
	Ended         time.Time `json:"ended,omitzero"`
	Segments      int       `json:"segments"`
	SegmentsTotal int       `json:"segments_total"`
	Objects       int64     `json:"objects"`
	Bytes         int64     `json:"bytes"`
	ScrubCounts
}

func (r ScrubReport) summary() ScrubSummary {
	return ScrubSummary{r.Started, r.Ended, r.Segments, r.SegmentsTotal, r.Objects, r.Bytes, r.ScrubCounts}
}

// ScrubRunning tells how far the scrub is that was asked for; nil while none runs.
func (p *Pool) ScrubRunning() *ScrubSummary {
	p.scrubs.mu.Lock()
	defer p.scrubs.mu.Unlock()
	if p.scrubs.running == nil {
		return nil
	}
	s := p.scrubs.running.report().summary()
	return &s
}

// ScrubStatus tells how far scrubbing is, and what it has found.
type ScrubStatus struct {
	PeriodSeconds float64       `json:"period_seconds"`    // 0 = the pool is not scrubbed by itself
	Round         *ScrubSummary `json:"round,omitempty"`   // the one that goes on by itself; Ended is that of the one before
	Running       *ScrubSummary `json:"running,omitempty"` // one that was asked for
	Last          *ScrubSummary `json:"last,omitempty"`    // the newest of these that ended
	Found         ScrubCounts   `json:"found"`             // since the pool was opened, damage that reads met included
	ReadBytes     int64         `json:"read_bytes"`        // since then
	Queue         int           `json:"queue"`             // segments in which reads met damage, not examined yet
}

func (p *Pool) scrubStatus() ScrubStatus {
	total := len(p.segmentsFrom(0))
	c := &p.scrubs
	c.mu.Lock()
	defer c.mu.Unlock()
	s := ScrubStatus{PeriodSeconds: p.o.ScrubPeriod.Seconds(), Found: c.total, ReadBytes: c.bytes, Queue: len(c.met.queue)}
	if r := c.round; r.started != 0 {
		s.Round = &ScrubSummary{time.Unix(r.started, 0).UTC(), time.Time{}, int(r.segments), total, r.objects, r.bytes, r.found}
		if r.ended != 0 {
			s.Round.Ended = time.Unix(r.ended, 0).UTC()
		}
	}
	if c.running != nil {
		now := c.running.report().summary()
		s.Running = &now
	}
	if !c.last.Started.IsZero() {
		last := c.last
		s.Last = &last
	}
	return s
}
