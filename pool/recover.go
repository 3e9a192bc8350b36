package pool

import (
	"context"
	"fmt"

	"github.com/google/uuid"

	"graindisk/block"
	"graindisk/grains/segment"
	"graindisk/pool/root"
	"graindisk/vdisk/densetree"
	"graindisk/writeback"
)

// openLocal opens the pool from the tier: local checkpoint, metadata log, tail of the data log. The
// root, where it could be read, may be one cut ahead; a tier without a local state (we crashed
// between the first claim and the first local checkpoint) takes it from the root, which it then needs.
func (p *Pool) openLocal(ctx context.Context, id writeback.Identity, view *root.Copy) error {
	p.logID = id.Log
	if view != nil && p.uuid != uuid.UUID(id.Pool) {
		return fmt.Errorf("%w: the tier %s belongs to pool %s, the targets to pool %s", ErrForeignTier, p.o.TierDir, id.Pool, p.uuid)
	}
	p.uuid = uuid.UUID(id.Pool)
	rec, err := p.openTier()
	if err != nil {
		return err
	}
	haveState := len(rec.State) > 0
	if haveState {
		if err := p.loadState(rec.State); err != nil {
			return fmt.Errorf("local checkpoint: %w", err)
		}
	}
	if err := p.replayMeta(rec.Meta); err != nil {
		return fmt.Errorf("metadata log: %w", err)
	}
	if view == nil {
		if !haveState {
			return fmt.Errorf("%w: the tier %s has no map yet, and the targets do not answer", root.ErrNoQuorum, p.o.TierDir)
		}
		p.setMembers(p.val.Cfg.Members, nil)
	} else {
		if err := p.checkAge(view); err != nil {
			return err
		}
		if !haveState || uint64(rec.End) < view.Val.Horizon {
			p.forget()
			err = p.loadRoot(ctx, view.Val)
		} else {
			p.val = view.Val
			err = p.catchUp(ctx, view.Val)
		}
		if err != nil {
			return err
		}
	}
	if err := p.log.DropThrough(p.pub.horizon); err != nil {
		return err
	}
	for _, o := range rec.Ops {
		if o.Seq <= p.pub.horizon {
			continue
		}
		meta, err := decodeOp(o.Payload)
		if err != nil {
			return err
		}
		p.addDisk(o.Disk, meta)
	}
	p.o.Log.Info("pool opened from its log", "pool", p.o.Name, "epoch", p.epoch.Load(), "cut", p.pub.cut,
		"unpublished_bytes", p.log.Unpublished().Bytes, "files_scanned", rec.Files, "torn_bytes", rec.TornBytes)
	return nil
}

// forget drops every map, before they are read from the targets instead.
func (p *Pool) forget() {
	clear(p.disks)
	clear(p.trees)
	clear(p.segments)
	clear(p.pub.disks)
	p.pub.cut, p.pub.cutCRC, p.pub.horizon = 0, 0, 0
	p.pub.ckpt = checkpointer{}
}

// replayMeta applies the metadata log's records above the local checkpoint.
func (p *Pool) replayMeta(recs []writeback.MetaRecord) error {
	for _, r := range recs {
		switch r.Kind {
		case metaEpoch:
			e, err := decodeEpoch(r.Payload)
			if err != nil {
				return err
			}
			p.raiseEpoch(e)
		case metaPublication:
			rec, infos, idx, err := decodePublication(r.Payload)
			if err != nil {
				return err
			}
			if rec.Cut <= p.pub.cut {
				continue
			}
			last := infos[len(infos)-1]
			p.applyCut(rec, last, idx)
			p.val.Cut, p.val.Horizon, p.val.LastCRC = rec.Cut, rec.Horizon, rec.CRC()
		default:
			return fmt.Errorf("record kind %d: %w", r.Kind, writeback.ErrNewer)
		}
	}
	return nil
}

// loadRoot reads all maps from the targets: the checkpoint that the root names, then the cuts since.
func (p *Pool) loadRoot(ctx context.Context, v root.Value) error {
	if err := p.loadCheckpoint(ctx, v); err != nil {
		return err
	}
	return p.catchUp(ctx, v)
}

// catchUp applies the cuts that the root names and the maps do not have yet.
func (p *Pool) catchUp(ctx context.Context, v root.Value) error {
	if v.Cut == p.pub.cut {
		return nil
	}
	if n := len(v.Cuts); n == 0 || v.Cuts[n-1].Cut != v.Cut || v.Cuts[0].Cut > p.pub.cut+1 {
		// A log that knows the root's epoch is at most the one cut behind that it was publishing.
		return fmt.Errorf("the root is at cut %d and does not name the cuts from %d on: %w", v.Cut, p.pub.cut+1, segment.ErrDamaged)
	}
	for _, ref := range v.Cuts {
		if ref.Cut <= p.pub.cut {
			continue
		}
		if ref.Cut != p.pub.cut+1 {
			return fmt.Errorf("root names cut %d after cut %d: %w", ref.Cut, p.pub.cut, segment.ErrDamaged)
		}
		if err := p.loadCut(ctx, ref); err != nil {
			return fmt.Errorf("cut %d: %w", ref.Cut, err)
		}
	}
	return nil
}

// loadCut reads one cut's record and the indexes of its segments, and applies them.
func (p *Pool) loadCut(ctx context.Context, ref root.CutRef) error {
	last := refInfo(ref)
	rec, x, err := segment.ReadCut(ctx, p.segmentStore, last)
	if err != nil {
		return err
	}
	if rec.Cut != ref.Cut || rec.PrevCut != p.pub.cut || rec.PrevCRC != p.pub.cutCRC || rec.CRC() != ref.Segment.CRC {
		return fmt.Errorf("record of cut %d after cut %d does not fit the root: %w", rec.Cut, rec.PrevCut, segment.ErrDamaged)
	}
	idx := make([]*segment.Index, 0, len(rec.Segments)+1)
	for _, info := range rec.Segments {
		x, err := p.reader.Index(ctx, info)
		if err != nil {
			return err
		}
		idx = append(idx, x)
	}
	p.applyCut(rec, last, append(idx, x))
	return nil
}

// loadTrees makes the disks of a snapshot with the runs that load fetches.
func (p *Pool) loadTrees(s *snapshot, load func(runRef) (*densetree.Run, error)) error {
	for _, d := range s.Disks {
		var runs []*densetree.Run
		for _, ref := range d.Runs {
			r, err := load(ref)
			if err != nil {
				return fmt.Errorf("map of disk %s: %w", d.Meta.Name, err)
			}
			p.runID.Store(max(p.runID.Load(), r.ID))
			runs = append(runs, r)
		}
		t, err := densetree.Load(p.treeOptions(), runs)
		if err != nil {
			return fmt.Errorf("map of disk %s: %w", d.Meta.Name, err)
		}
		p.trees[d.Disk] = t
		p.pub.disks[d.Disk] = d.Meta
		p.addDisk(d.Disk, d.Meta)
	}
	for _, info := range s.Segments {
		p.segments[info.ID] = info
		p.pub.nextSeg = max(p.pub.nextSeg, info.ID+1)
	}
	p.pub.cut, p.pub.cutCRC, p.pub.horizon = s.Cut, s.CutCRC, writeback.Seq(s.Horizon)
	p.nextDisk = max(p.nextDisk, block.DiskID(s.NextDisk))
	return nil
}
