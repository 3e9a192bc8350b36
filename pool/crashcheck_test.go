package pool

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"

	"graindisk/block"
	"graindisk/grains/segment"
	"graindisk/internal/crashtest"
	"graindisk/pool/root"
	"graindisk/tier"
	"graindisk/vdisk/densetree"
)

// The checkers of the invariants of the design. I1, what the clients see, and I5, recovering twice, are
// world.check and world.again; I4 is guarded; that the counts of I2 are right is world.checkUsage.

// checkStored expects every shard of every segment that a map names (I2), and all that the committed root
// leads to (I3).
func (w *world) checkStored() error {
	for _, g := range w.stores {
		if err := g.violation(); err != nil {
			return err
		}
	}
	p := w.p
	p.mu.Lock()
	infos := slices.Collect(maps.Values(p.segments))
	p.mu.Unlock()
	for _, info := range infos { // what is being deleted is no longer among them
		if err := w.checkShards("I2", info); err != nil {
			return fmt.Errorf("the table: %w", err)
		}
	}
	for _, d := range w.disks {
		t := p.tree(d.id)
		if t == nil {
			continue
		}
		var err error
		unread := p.lookup(w.life.ctx, t, 0, uint64(d.blocks), func(e densetree.Entry) bool {
			if e.Kind != densetree.Data {
				return true
			}
			w.stats.inc("I2 entries checked")
			p.mu.Lock()
			info, ok := p.segments[e.Extent.Segment()]
			p.mu.Unlock()
			switch {
			case !ok:
				err = fmt.Errorf("I2: disk %d block %d is in segment %d, which the pool does not know", d.id, e.LBA, e.Extent.Segment())
			case e.Extent.Slot() >= int(info.Extents) || uint64(e.Off)+e.Blocks > uint64(e.Orig):
				err = fmt.Errorf("I2: disk %d block %d: %+v is not in segment %+v", d.id, e.LBA, e, info)
			default:
				err = w.checkShards("I2", info)
			}
			return err == nil
		})
		if w.fs.WasCut() {
			return nil // maps are read from the tier
		}
		if err = errors.Join(err, unread); err != nil {
			return err
		}
	}
	return w.checkRoot()
}

// checkShards expects all shards of a segment where its info says.
func (w *world) checkShards(what string, info segment.Info) error {
	there := 0
	if info.K > 1 {
		w.stats.inc("stripes of several data shards")
	}
	for i, t := range info.Targets {
		if t == 0 {
			continue
		}
		g := w.storeOf(t)
		if g == nil && w.lossRng != nil { // lost with its target
			continue
		}
		if g == nil || !g.has(info.Key(i)) {
			if g != nil && w.emptied >= 0 && g == w.stores[w.emptied] {
				continue
			}
			return fmt.Errorf("%s: shard %s is not stored at target %d", what, info.Key(i), t)
		}
		there++
	}
	if w.lossRng != nil && there >= int(info.K) { // an older row may name a target that was lost since
		return nil
	}
	if w.mirror && there == 1 && slices.Contains(info.Targets, 0) {
		w.stats.inc("segments on half a mirror")
		return nil
	}
	if there <= int(info.K) && info.M > 0 {
		return fmt.Errorf("%s: segment %d has %d shards of %d+%d: no loss would be survived", what, info.ID, there, info.K, info.M)
	}
	return nil
}

// checkRoot follows the root that a majority holds to everything that a fresh host would need of it.
func (w *world) checkRoot() error {
	var copies []root.Copy
	for _, g := range w.stores {
		c, err := root.Decode(g.root())
		if err != nil && w.emptied >= 0 && g == w.stores[w.emptied] {
			continue
		}
		if err != nil {
			return fmt.Errorf("I3: root at %s: %w", g, err)
		}
		copies = append(copies, c)
	}
	for i, c := range copies {
		same := 0
		for _, o := range copies {
			if o.Accepted == c.Accepted && o.Ver == c.Ver {
				same++
			}
		}
		if same <= crashTargets/2 {
			continue
		}
		w.stats.inc("I3 roots followed")
		for _, ref := range c.Val.Cuts {
			if err := w.checkCut(refInfo(ref)); err != nil {
				return fmt.Errorf("cut %d of the root at target %d: %w", ref.Cut, i, err)
			}
		}
		for no, ref := range c.Val.Checkpoints {
			for n, t := range ref.Targets {
				g := w.storeOf(t)
				if w.lossRng != nil && (g == nil || w.emptied >= 0 && g == w.stores[w.emptied]) {
					continue // the older checkpoint, or one that is about to be written anew
				}
				if key := partKey(ref.Epoch, ref.N, 0, n); g == nil || !g.has(key) {
					return fmt.Errorf("I3: %s, which the root names, is not at target %d", key, t)
				}
			}
			if no > 0 && w.lossRng != nil { // it says where shards were before targets were lost
				continue
			}
			if err := w.checkCheckpoint(ref); err != nil {
				return fmt.Errorf("I3: checkpoint %d/%d of the root at target %d: %w", ref.Epoch, ref.N, i, err)
			}
		}
		return nil
	}
	return nil // a commit is under way
}

// checkCut expects all segments of a cut, whose last is given.
func (w *world) checkCut(last segment.Info) error {
	if err := w.checkShards("I3", last); err != nil {
		return err
	}
	at := func(t block.TargetID) (segment.Store, bool) {
		if g := w.storeOf(t); g != nil {
			return g.Memory, true
		}
		return nil, false
	}
	rec, _, err := segment.ReadCut(context.Background(), at, last)
	if err != nil {
		return err
	}
	for _, info := range rec.Segments {
		if err := w.checkShards("I3", info); err != nil {
			return err
		}
	}
	return nil
}

// checkCheckpoint expects every part that a checkpoint names, and every segment that its maps do: of both that are
// kept, since who has read the root before the last commit may be at the older one.
func (w *world) checkCheckpoint(ref root.CheckpointRef) error {
	get := func(n int) ([]byte, error) { // of the checkpoint itself
		return w.part(partID{ref.Epoch, ref.N, n})
	}
	manifest, err := get(0)
	if err != nil {
		return err
	}
	s, err := decodeSnapshot(manifest)
	if err != nil {
		return err
	}
	for _, t := range s.Tables {
		b, err := get(t.Part)
		if err == nil {
			err = s.join(t, b)
		}
		if err != nil {
			return err
		}
	}
	infos := map[block.SegmentID]segment.Info{}
	for _, i := range s.Segments {
		infos[i.ID] = i
	}
	checked := map[block.SegmentID]bool{}
	for _, d := range s.Disks {
		for _, ref := range d.Runs {
			b, err := w.part(partID{ref.Epoch, ref.N, ref.Part})
			var r *densetree.Run
			if err == nil {
				r, err = ref.decode(b)
			}
			if err != nil {
				return err
			}
			err = errors.Join(r.Each(func(e densetree.Entry) bool {
				if seg := e.Extent.Segment(); e.Kind == densetree.Data && !checked[seg] && err == nil {
					checked[seg] = true
					w.stats.inc("I3 segments of checkpoints checked")
					err = w.checkShards("I3", infos[seg])
				}
				return err == nil
			}), err)
			if err != nil {
				return err
			}
		}
	}
	return nil
}

// part is a part of a checkpoint, from whatever target has it.
func (w *world) part(id partID) ([]byte, error) {
	for _, g := range w.stores {
		for c := range crashTargets {
			b, _, err := g.Memory.Get(context.Background(), partKey(id.epoch, id.n, id.part, c), partBytesMax)
			if err == nil {
				return decodePart(b, id.epoch, uint32(id.n), id.part)
			}
		}
	}
	return nil, fmt.Errorf("part %v is on no target", id)
}

// checkRot flips bytes at rest, in all clean slots of the tier and in one shard of every other segment, has
// reads of clean slots fail, and expects the disks to show the same (I6). The shards are mended then.
func (w *world) checkRot(all [][]byte) error {
	if w.p == nil || w.emptied >= 0 || !w.life.quiet(true) {
		return nil
	}
	defer w.life.quiet(false)
	p := w.p
	for slot := range p.space.Slots() {
		if !p.space.Exists(slot) || p.space.Busy(slot) {
			continue
		}
		name := "tier/" + tier.Name(slot)
		if w.rng.IntN(4) == 0 {
			w.fs.Inject(crashtest.Fault{Op: crashtest.OpRead, Path: name})
			w.stats.inc("I6 slots unreadable")
			continue
		}
		for range 2 {
			if err := w.fs.Corrupt(name, w.rng.Int64N(p.space.SlotBytes())); err == nil {
				w.stats.inc("I6 bytes rotten in slots")
			}
		}
	}
	defer w.fs.ClearFaults()
	p.mu.Lock()
	infos := slices.SortedFunc(maps.Values(p.segments), func(a, b segment.Info) int { return cmp.Compare(a.ID, b.ID) })
	dead := p.usage.Dead()
	p.mu.Unlock()
	for _, info := range infos {
		shard := w.rng.IntN(info.Shards())
		if w.rng.IntN(2) == 0 || info.M == 0 || slices.Contains(info.Targets, 0) && w.mirror || info.Targets[shard] == 0 {
			continue
		}
		at := w.rng.Uint64()
		flip := func(b []byte) []byte {
			b[at%uint64(len(b))] ^= 0x10
			return b
		}
		g := w.storeOf(info.Targets[shard])
		if g == nil && w.lossRng != nil && slices.Contains(dead, info.ID) { // lost with its target
			continue
		} else if g == nil {
			return fmt.Errorf("segment %d is said to be on target %d, which no copy of the root has", info.ID, info.Targets[shard])
		}
		g.Damage(info.Key(shard), flip)
		defer g.Damage(info.Key(shard), flip)
		w.stats.inc("I6 shards rotten")
	}
	now, err := w.content(p)
	if err == nil {
		w.stats.inc("I6 disks read through rot")
		err = same(all, now)
	}
	if err != nil && !w.fs.WasCut() {
		return fmt.Errorf("I6: with rotten slots and shards: %w", err)
	}
	return nil
}
