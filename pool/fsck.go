package pool

import (
	"context"
	"errors"
	"fmt"

	"graindisk/backend"
	"graindisk/block"
	"graindisk/grains/extent"
	"graindisk/grains/segment"
)

// FsckReport is what a recount of all maps found.
type FsckReport struct {
	Pool     string   `json:"pool"`
	Segments int      `json:"segments"`        // compared
	Leaks    []string `json:"leaks,omitempty"` // counts that are too high: space that is not gained back
	Low      []string `json:"low,omitempty"`   // counts that are too low: what is mapped might be deleted
	Damage   string   `json:"damage,omitempty"`
	// Orphans are objects of segments that neither the maps know nor the list of what is to be deleted, and that a
	// process left which is gone; -1 if nobody looked. Reclaimed says that they are on that list now.
	Orphans     int   `json:"orphans"`
	OrphanBytes int64 `json:"orphan_bytes"`
	Reclaimed   bool  `json:"reclaimed,omitempty"`
	// Strays are shards of segments that are in use, on targets where no row has them: a repair that did not come to its
	// end has left them, or is under way. They take space until their segment goes.
	Strays     int   `json:"strays,omitempty"`
	StrayBytes int64 `json:"stray_bytes,omitempty"`
}

// Bad tells whether something that is needed may be deleted, or cannot be had.
func (r *FsckReport) Bad() bool { return len(r.Low) > 0 || r.Damage != "" }

// Fsck counts anew what the maps of all disks have of every segment, and compares. With orphans it lists the targets
// as well; with reclaim what it finds there is deleted after the grace. It holds nothing up but cuts, for as long as a
// view of the maps takes.
func (p *Pool) Fsck(ctx context.Context, orphans, reclaim bool) (FsckReport, error) {
	r := FsckReport{Pool: p.o.Name, Orphans: -1}
	rep, err := p.CheckUsage(ctx)
	switch {
	case errors.Is(err, extent.ErrDamaged):
		r.Damage = err.Error()
	case err != nil:
		return r, fmt.Errorf("fsck pool %s: %w", p.o.Name, err)
	}
	if g := p.usageErr.Load(); g != nil && r.Damage == "" {
		r.Damage = g.err.Error()
	}
	r.Segments = p.usage.Totals().Segments
	for _, d := range rep.Leaks {
		r.Leaks = append(r.Leaks, d.String())
	}
	for _, d := range rep.Low {
		r.Low = append(r.Low, d.String())
	}
	if orphans || reclaim {
		err = p.findOrphans(ctx, &r, reclaim)
	}
	if err != nil {
		return r, fmt.Errorf("fsck pool %s: %w", p.o.Name, err)
	}
	return r, nil
}

// findOrphans lists the segments on the targets. Those of this process's epochs are left alone: they may be on their
// way. Of older ones nothing can come to be named any more.
func (p *Pool) findOrphans(ctx context.Context, r *FsckReport, reclaim bool) error {
	if !p.isClaimed() {
		return errors.New("the pool is not claimed yet; try again once its targets answer")
	}
	epoch := p.firstEpoch.Load()
	r.Orphans = 0
	for _, m := range p.value().Cfg.Members {
		store, ok := p.store(m.ID)
		if !ok || m.Witness {
			continue
		}
		for after, more := "", true; more; {
			var objs []backend.Info
			var err error
			if objs, more, err = store.List(ctx, "seg/", after, 1000); err != nil {
				return fmt.Errorf("target %s: %w", p.targetName(m.ID), err)
			}
			var keys []string
			for _, o := range objs {
				after = o.Key
				id, e, shard, ok := segment.ParseKey(o.Key)
				switch {
				case !ok || e >= epoch:
				case !p.known(id, e):
					keys = append(keys, o.Key)
					r.OrphanBytes += o.Size
				case p.strays(id, e, shard, m.ID):
					r.Strays++
					r.StrayBytes += o.Size
				}
			}
			r.Orphans += len(keys)
			if reclaim {
				p.doomKeys(m.ID, keys)
			}
			more = more && len(objs) > 0
		}
	}
	r.Reclaimed = reclaim
	return nil
}

// strays tells whether the row of a segment has that shard on another target, or on none that is a member any more.
func (p *Pool) strays(id block.SegmentID, epoch uint64, shard int, on block.TargetID) bool {
	info, ok := p.segmentInfo(id)
	return ok && info.Epoch == epoch && shard < info.Shards() && info.Targets[shard] != on
}

// known tells whether the maps know a segment, or what is to be deleted names it.
func (p *Pool) known(id block.SegmentID, epoch uint64) bool {
	p.mu.Lock()
	info, ok := p.segments[id]
	p.mu.Unlock()
	if ok && info.Epoch == epoch {
		return true
	}
	p.mapsMu.Lock()
	defer p.mapsMu.Unlock()
	for _, d := range p.pub.doomed {
		if d.Segment != nil && d.Segment.ID == id && d.Segment.Epoch == epoch {
			return true
		}
	}
	return false
}
