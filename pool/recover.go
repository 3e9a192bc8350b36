package pool

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/google/uuid"

	"graindisk/block"
	"graindisk/grains/extent"
	"graindisk/grains/segment"
	"graindisk/internal/planted"
	"graindisk/pool/root"
	"graindisk/vdisk/densetree"
	"graindisk/writeback"
)

// openLocal opens the pool from the tier: local checkpoint, metadata log, tail of the data log. The
// root may be one cut ahead; the publisher applies that once it has claimed the pool, and until then the
// log has those writes. A tier without a local state (we crashed between the first claim and the first
// local checkpoint), or one whose log ends below the published horizon, takes its maps from the root,
// which it then needs.
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
	haveState, err := p.replay(rec)
	if err != nil {
		return err
	}
	reload := !haveState
	if view != nil {
		if err := p.checkAge(view); err != nil {
			return err
		}
		reload = reload || uint64(rec.End) < view.Val.Horizon
	} else {
		if reload {
			return fmt.Errorf("%w: the tier %s has no map yet, or a damaged one, and %w", root.ErrNoQuorum, p.o.TierDir, errRootNeeded)
		}
		if p.val.State == root.Released { // anyone may have opened it since
			return fmt.Errorf("%w: the pool was closed cleanly, and %w; nothing is lost, start again when they do", root.ErrNoQuorum, errRootNeeded)
		}
		p.setMembers(p.val.Cfg.Members, nil)
	}
	if reload {
		// What the root says is ours to build on only once it is committed under our own claim.
		if err := p.refuseNewer(ctx, view.Val); err != nil {
			return err
		}
		p.forget()
		if err := p.claim(ctx, root.ClaimOptions{Own: true}); err != nil {
			return err
		}
		if err := p.loadRoot(ctx, p.value()); err != nil {
			return err
		}
	}
	if planted.Bug("recovery: horizon too high") {
		p.pub.horizon++
	}
	if err := p.log.DropThrough(p.pub.horizon); err != nil {
		return err
	}
	if reload {
		if err := p.settle(ctx); err != nil {
			return err
		}
	}
	p.runs.RemoveOrphans()
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
	p.closeMaps()
	if p.runs != nil { // nobody brings what no tree has any more
		p.runs.Discard(p.runs.Partial())
	}
	clear(p.rows)
	clear(p.trees)
	clear(p.segments)
	p.repair.forget()
	p.usage = extent.NewUsage()
	clear(p.pub.disks)
	p.nextDisk = 1
	p.pub.cut, p.pub.cutCRC, p.pub.horizon, p.pub.nextSeg = 0, 0, 0, block.SegmentID(p.val.SegLimit)
	p.pub.ckpt, p.pub.gone, p.pub.goneCut, p.pub.doomed, p.pub.nextDisk = checkpointer{}, nil, 0, nil, 1
	p.far.clear()
	p.storedRuns.Store(nil)
}

// closeMaps ends what the maps do in the background. Nobody may read or change them any more.
func (p *Pool) closeMaps() {
	p.mu.Lock()
	trees := maps.Clone(p.trees)
	p.mu.Unlock()
	for _, id := range slices.Sorted(maps.Keys(trees)) {
		trees[id].Close()
	}
}

// replay brings the maps to what the tier knows: the local checkpoint's state and the metadata log's
// records above it. It reports false if there is no state, or none that is whole; then only the epoch is known.
func (p *Pool) replay(rec *writeback.Recovered) (haveState bool, err error) {
	haveState = len(rec.State) > 0
	if haveState {
		err := p.loadState(rec.State)
		if errors.Is(err, densetree.ErrCorrupt) {
			p.o.Log.Error("maps on the tier are damaged, they must be read from the targets", "pool", p.o.Name, "err", err)
			haveState, err = false, nil
		}
		if err != nil {
			return false, fmt.Errorf("local checkpoint: %w", err)
		}
	}
	p.replaying.Store(true)
	defer p.replaying.Store(false)
	if err := p.replayMeta(rec.Meta, haveState); err != nil {
		return false, fmt.Errorf("metadata log: %w", err)
	}
	return haveState, nil
}

func (p *Pool) replayMeta(recs []writeback.MetaRecord, haveState bool) error {
	var row publicationRow
	for _, r := range recs {
		switch r.Kind {
		case metaEpoch:
			e, err := decodeEpoch(r.Payload)
			if err != nil {
				return err
			}
			p.raiseEpoch(e)
			p.val.State = root.Held // claimed, or as good as
		case metaPublication:
			rec, infos, idx, err := decodePublication(r.Payload)
			if err != nil {
				return err
			}
			if rec.Cut > p.pub.cut && haveState {
				if err := p.replayCut(rec, infos, idx); err != nil {
					return err
				}
			}
		case metaPlacement:
			pl, err := decodePlacement(r.Payload)
			if err != nil {
				return err
			}
			if haveState {
				p.applyPlacement(pl)
			}
		case metaPublicationPart, metaPublicationEnd:
			cut, _, _, err := publicationHead(r.Payload)
			if err != nil {
				return err
			}
			if cut <= p.pub.cut || !haveState {
				continue
			}
			if r.Kind == metaPublicationPart {
				if err := row.add(r.Payload); err != nil {
					return err
				}
				continue
			}
			rec, infos, idx, err := row.end(r.Payload)
			if err != nil {
				return err
			}
			if err := p.replayCut(rec, infos, idx); err != nil {
				return err
			}
		default:
			return fmt.Errorf("record kind %d: %w", r.Kind, writeback.ErrNewer)
		}
	}
	return nil
}

// replayCut applies a cut whose publication is on record.
func (p *Pool) replayCut(rec *segment.CutRecord, infos []segment.Info, idx []*segment.Index) error {
	if rec.PrevCut != p.pub.cut {
		return fmt.Errorf("record of cut %d follows cut %d, not %d: %w", rec.Cut, rec.PrevCut, p.pub.cut, writeback.ErrDamaged)
	}
	p.applyCut(rec, infos, idx)
	p.val.Cut, p.val.Horizon, p.val.LastCRC = rec.Cut, rec.Horizon, rec.CRC()
	return nil
}

// loadRoot reads all maps from the targets: the checkpoint that the root names, then the cuts since. A
// target that does not answer is asked again for a while.
func (p *Pool) loadRoot(ctx context.Context, v root.Value) error {
	ctx, cancel := context.WithTimeout(ctx, loadTimeout)
	defer cancel()
	for wait := backoff(0); ; wait = wait.next() {
		err := p.loadCheckpoint(ctx, v)
		if err == nil {
			err = p.catchUp(ctx, v, false) // settle stores the result
		}
		if err == nil || final(err) || wait.sleep(ctx) != nil {
			return err
		}
		p.forget()
	}
}

// loadTimeout bounds how long opening a pool from its targets alone waits for them.
const loadTimeout = 2 * time.Minute

// final tells errors that asking again will not mend.
func final(err error) bool {
	for _, e := range []error{
		root.ErrFenced, root.ErrHeld, root.ErrNewer, ErrForeignTier, segment.ErrDamaged, segment.ErrNewer,
		densetree.ErrCorrupt, densetree.ErrNewer, writeback.ErrDamaged, writeback.ErrNewer, writeback.ErrFailed, writeback.ErrClosed,
	} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// settle writes a local checkpoint of maps that were read from the targets, with what the log holds
// beyond them. Without it nothing may be served: there is none before it, and a tier without one takes its
// maps from the targets again.
func (p *Pool) settle(ctx context.Context) error {
	if err := p.checkpointHere(ctx); err != nil {
		return err
	}
	p.mu.Lock()
	p.claimed = true
	p.mu.Unlock()
	return nil
}

// loadTrees makes the disks of a snapshot with the runs that load gives, and the usage table with the bytes
// that get fetches.
func (p *Pool) loadTrees(s *snapshot, load func(runRef) (*densetree.Run, error), get func(runRef) ([]byte, error)) error {
	for _, d := range s.Disks {
		runs := make([]*densetree.Run, 0, len(d.Runs))
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
		p.boots.learn(d.Disk, d.Boot)
		p.addDisk(d.Disk, d.Meta)
	}
	for _, info := range s.Segments {
		p.segments[info.ID] = info
		p.pub.nextSeg = max(p.pub.nextSeg, info.ID+1)
	}
	p.pub.cut, p.pub.cutCRC, p.pub.horizon = s.Cut, s.CutCRC, writeback.Seq(s.Horizon)
	p.nextDisk = max(p.nextDisk, block.DiskID(s.NextDisk))
	p.pub.nextDisk = max(p.pub.nextDisk, block.DiskID(s.NextDisk))
	p.pub.doomed, p.pub.gone, p.pub.goneCut = s.Doomed, s.Gone, s.GoneCut
	for i := range p.pub.doomed { // read from the tier, or it holds what was read before it serves
		p.pub.doomed[i].recorded = p.pub.doomed[i].Since != 0
	}
	return p.decodeUsage(s.Usage, get)
}
