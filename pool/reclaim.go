package pool

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"graindisk/backend"
	"graindisk/block"
	"graindisk/grains/segment"
	"graindisk/internal/planted"
	"graindisk/pool/root"
)

// Reclaim deletes from the targets what nothing can reach any more: segments of which nothing is mapped, parts
// of old checkpoints, and what a failed upload left. One segment's way, each step by a later round than the last
// where a root has to be committed in between:
//
//	dead      no tree maps any of it, hidden entries included; that is for ever
//	gone      a committed cut's record says that it is not needed to rebuild the maps: see restate
//	doomed    a checkpoint leaves it out: no map, no usage row, but it is on that checkpoint's list
//	released  every checkpoint that the committed root names leaves it out; the clock of the grace starts,
//	          once a local checkpoint holds that
//	deleted   after DeleteGrace, from all targets; then it leaves the list
//
// Invariants:
//   - An object is deleted only when no checkpoint that the committed root names reaches it, nor any cut after
//     the oldest of them, and that has been so for the grace.
//   - Before it is deleted a stable local checkpoint leaves it out as well, so that no recovery of this tier
//     comes back to maps that know it.
//   - A crash at any point repeats steps, and forgets at most the clock: what is dead stays dead, and names are
//     never used again, so that deleting twice, or after another owner took over, harms nobody.
//
// The parts of checkpoints are listed once after each new checkpoint: that finds what crashes have left as well.
// A failed upload is known only to the process that made it; after a crash pool fsck finds those.

// doomed is what is to be deleted: a segment, or one object.
type doomed struct {
	Segment *segment.Info  `json:"segment,omitempty"`
	Key     string         `json:"key,omitempty"`
	Target  block.TargetID `json:"target,omitempty"` // that has Key
	By      ckptID         `json:"by"`               // the first checkpoint that leaves it out; zero if none ever had it
	Since   int64          `json:"since,omitempty"`  // released, in milliseconds since 1970; 0 if not yet

	recorded bool // Since is in a stable local checkpoint
}

// ckptID names a published checkpoint; they are made in order.
type ckptID struct {
	Epoch uint64 `json:"epoch"`
	N     uint64 `json:"n"`
}

func (a ckptID) compare(b ckptID) int {
	return cmp.Or(cmp.Compare(a.Epoch, b.Epoch), cmp.Compare(a.N, b.N))
}

func idOf(ref root.CheckpointRef) ckptID { return ckptID{ref.Epoch, ref.N} }

// reclaimCounts are guarded by Pool.mu.
type reclaimCounts struct {
	doomedSegments int
	doomedBytes    uint64
	segments       int // deleted, as the rest
	bytes          uint64
	objects        int
}

// How much one round takes on: cuts whose records are read, runs of blocks stated again, segments deleted at a time.
const (
	restateCutsMax  = 512
	restateRunsMax  = 1 << 20
	restateUnread   = 16 // records that their targets did not give now: publishing waits for this
	bookkeepingCuts = 64 // dead segments without data are worth a cut of their own from so many on
	deleteAtOnce    = 512
	deleteTimeout   = time.Minute
)

// reclaimSpace runs until ctx ends. It fails only if the pool has another owner. A step that fails keeps the others from
// nothing: each takes up only what is on record as far as it needs.
func (p *Pool) reclaimSpace(ctx context.Context) error {
	tick := time.NewTicker(p.o.reclaimTick)
	defer tick.Stop()
	round, listed := time.Now(), ckptID{} // of the last round; the newest checkpoint when ckpt/ was listed
	steps := []func(context.Context) error{
		p.dropDisks,
		func(ctx context.Context) error {
			if time.Since(round) < p.o.reclaimRound {
				return nil
			}
			round = time.Now()
			return p.reclaimRound(ctx)
		},
		p.startClocks,
		func(ctx context.Context) (err error) {
			listed, err = p.doomParts(ctx, listed)
			return err
		},
		p.deleteDue,
	}
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
		for _, step := range steps {
			if ctx.Err() != nil { // goes before what is ready as well
				return ctx.Err()
			}
			err := step(ctx)
			switch {
			case ctx.Err() != nil:
				return ctx.Err()
			case errors.Is(err, root.ErrFenced), errors.Is(err, root.ErrHeld), errors.Is(err, root.ErrNewer):
				return fmt.Errorf("reclaim: %w", err)
			case err != nil:
				p.o.Log.Warn("reclaim goes on later", "pool", p.o.Name, "err", err)
			}
		}
	}
}

// reclaimRound has a cut say what is not needed any more, and a checkpoint leave out what one has said it of.
func (p *Pool) reclaimRound(ctx context.Context) error {
	p.pub.own.Lock()
	w := p.dying(ctx)
	p.pub.pending = w
	p.pub.own.Unlock()
	if w != nil {
		err := p.beforeClose(func() error {
			p.pub.force.Store(true)
			return p.Publish(ctx)
		})
		if err != nil {
			return err
		}
	}
	p.pub.own.Lock()
	defer p.pub.own.Unlock()
	waiting := slices.ContainsFunc(p.pub.doomed, func(d doomed) bool { return d.Since == 0 })
	if !waiting && !slices.ContainsFunc(p.usage.Dead(), p.pub.gone.Segment) || ctx.Err() != nil {
		return ctx.Err()
	}
	return p.publishCheckpoint(ctx)
}

// beforeClose does what adds to the log, or takes a cut, unless the pool is being closed.
func (p *Pool) beforeClose(do func() error) error {
	select {
	case p.pub.early <- struct{}{}:
		defer func() { <-p.pub.early }()
		return do()
	default:
		return nil
	}
}

// endReclaim waits for what beforeClose does, and has it do nothing more.
func (p *Pool) endReclaim(ctx context.Context) error {
	if ctx.Err() != nil { // goes before what may be had as well
		return ctx.Err()
	}
	select {
	case p.pub.early <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// doomDead takes the segments that are gone out of the tables, for the checkpoint that is about to be made of
// them. The caller holds own and mapsMu.
func (p *Pool) doomDead(by ckptID) {
	for _, id := range p.usage.Dead() {
		if !p.pub.gone.Segment(id) {
			continue
		}
		p.mu.Lock()
		info, ok := p.segments[id]
		p.mu.Unlock()
		if err := errors.Join(p.usage.Condemn(id), p.usage.Remove(id)); err != nil || !ok {
			p.usageFailed(err)
			continue
		}
		p.mu.Lock()
		delete(p.segments, id)
		p.mu.Unlock()
		p.pub.doomed = append(p.pub.doomed, doomed{Segment: &info, By: by})
	}
	p.countDoomed()
}

// countDoomed brings the figures up to the list.
func (p *Pool) countDoomed() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.reclaimed.doomedSegments, p.reclaimed.doomedBytes = 0, 0
	for _, d := range p.pub.doomed {
		if d.Segment != nil {
			p.reclaimed.doomedSegments++
			p.reclaimed.doomedBytes += d.Segment.PayloadBytes
		}
	}
}

// uploadFailed notes shards that no cut will name.
func (p *Pool) uploadFailed(info segment.Info) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.failedUploads = append(p.failedUploads, info)
}

// startClocks notes which of the doomed no checkpoint of the committed root names any more, and has a local
// checkpoint hold that.
func (p *Pool) startClocks(ctx context.Context) error {
	refs, now := p.value().Checkpoints, time.Now().UnixMilli()
	if planted.Bug("reclaim: a segment one checkpoint still names") {
		refs = refs[:min(1, len(refs))]
	}
	p.pub.own.Lock()
	p.mapsMu.Lock()
	p.mu.Lock()
	for _, info := range p.failedUploads {
		p.pub.doomed = append(p.pub.doomed, doomed{Segment: &info})
	}
	p.failedUploads = nil
	p.mu.Unlock()
	unrecorded := false
	for i := range p.pub.doomed {
		d := &p.pub.doomed[i]
		if d.Since == 0 && d.released(refs) {
			d.Since = now
		}
		unrecorded = unrecorded || d.Since != 0 && !d.recorded
	}
	p.countDoomed()
	stamped := len(p.pub.doomed)
	p.mapsMu.Unlock()
	p.pub.own.Unlock()
	if !unrecorded {
		return nil
	}
	if err := p.checkpointHere(ctx); err != nil {
		return err
	}
	p.pub.own.Lock()
	defer p.pub.own.Unlock()
	p.mapsMu.Lock()
	defer p.mapsMu.Unlock()
	for i := range p.pub.doomed[:stamped] { // others are added behind, and only reclaim takes away
		d := &p.pub.doomed[i]
		d.recorded = d.Since != 0
	}
	return nil
}

// released tells whether none of the checkpoints names d.
func (d *doomed) released(refs []root.CheckpointRef) bool {
	if d.By == (ckptID{}) {
		return true
	}
	reach := func(r root.CheckpointRef) bool { return idOf(r).compare(d.By) < 0 }
	return len(refs) > 0 && !slices.ContainsFunc(refs, reach)
}

// doomParts lists the parts of checkpoints that are stored, if a checkpoint was made since listed, and dooms those
// that neither it nor the one before needs. It returns what to list after.
func (p *Pool) doomParts(ctx context.Context, listed ckptID) (ckptID, error) {
	v := p.value()
	if len(v.Checkpoints) == 0 || idOf(v.Checkpoints[0]) == listed {
		return listed, nil
	}
	newest, needed := idOf(v.Checkpoints[0]), map[partID]bool{}
	for _, ref := range v.Checkpoints {
		s, err := p.readManifest(ctx, ref)
		if err != nil {
			return listed, fmt.Errorf("parts of checkpoint %d/%d: %w", ref.Epoch, ref.N, err)
		}
		s.parts(idOf(ref), needed)
	}
	for _, m := range v.Cfg.Members {
		store, ok := p.store(m.ID)
		if !ok || m.Witness {
			continue
		}
		keys, err := listAll(ctx, store, "ckpt/")
		if err != nil {
			return listed, fmt.Errorf("list checkpoints: target %s: %w", p.targetName(m.ID), err)
		}
		p.doomKeys(m.ID, slices.DeleteFunc(keys, func(key string) bool {
			id, ok := parsePartKey(key)
			return !ok || needed[id] || (ckptID{id.epoch, id.n}).compare(newest) > 0
		}))
	}
	return newest, nil
}

// doomKeys puts objects of a target on the list that nothing reaches, those that are on it aside.
func (p *Pool) doomKeys(target block.TargetID, keys []string) {
	if len(keys) == 0 {
		return
	}
	p.pub.own.Lock()
	defer p.pub.own.Unlock()
	p.mapsMu.Lock()
	defer p.mapsMu.Unlock()
	known := map[string]bool{}
	for _, d := range p.pub.doomed {
		if d.Target == target {
			known[d.Key] = true
		}
	}
	for _, key := range keys {
		if !known[key] {
			p.pub.doomed = append(p.pub.doomed, doomed{Key: key, Target: target, Since: time.Now().UnixMilli()})
		}
	}
}

// listAll lists every key below a prefix.
func listAll(ctx context.Context, s backend.Store, prefix string) (keys []string, err error) {
	for after := ""; ; {
		objs, more, err := s.List(ctx, prefix, after, 1000)
		if err != nil {
			return nil, err
		}
		for _, o := range objs {
			keys = append(keys, o.Key)
			after = o.Key
		}
		if !more || len(objs) == 0 {
			return keys, nil
		}
	}
}

// parts adds the parts that a checkpoint needs, its own and those of older ones.
func (s *snapshot) parts(own ckptID, needed map[partID]bool) {
	needed[partID{own.Epoch, own.N, 0}] = true
	for _, t := range s.Tables {
		needed[partID{own.Epoch, own.N, t.Part}] = true
	}
	for _, d := range s.Disks {
		for _, r := range d.Runs {
			needed[partID{r.Epoch, r.N, r.Part}] = true
		}
	}
	for _, r := range s.Usage {
		needed[partID{r.Epoch, r.N, r.Part}] = true
	}
}

// parsePartKey is the inverse of partKey, but for the number of the copy.
func parsePartKey(key string) (id partID, ok bool) {
	var copyNo int
	n, err := fmt.Sscanf(key, "ckpt/%d/%d/%d.%d", &id.epoch, &id.n, &id.part, &copyNo)
	return id, err == nil && n == 4 && key == partKey(id.epoch, id.n, id.part, copyNo)
}

// deleteDue deletes what has been released for the grace, some at a time.
func (p *Pool) deleteDue(ctx context.Context) error {
	before := time.Now().Add(-p.o.DeleteGrace).UnixMilli()
	for {
		var due []doomed
		p.pub.own.Lock()
		for _, d := range p.pub.doomed {
			if d.recorded && d.Since <= before && len(due) < deleteAtOnce {
				due = append(due, d)
			}
		}
		p.pub.own.Unlock()
		if len(due) == 0 {
			return nil
		}
		gone, err := p.deleteDoomed(ctx, due)
		p.deleted(due, gone)
		if err != nil {
			return err
		}
	}
}

// objects are those of d, by target. A shard that is said to be missing may be anywhere: its put may have
// succeeded without an answer. So may any shard once the members have changed: a repair may have stored it where no row
// says so, or a host that was lost may have known a row that no checkpoint has.
func (d *doomed) objects(cfg root.Config, add func(t block.TargetID, key string)) {
	if d.Segment == nil {
		add(d.Target, d.Key)
		return
	}
	for i, t := range d.Segment.Targets {
		if t != 0 && cfg.No <= 1 {
			add(t, d.Segment.Key(i))
			continue
		}
		for _, m := range dataMembers(cfg) {
			add(m, d.Segment.Key(i))
		}
	}
}

// deleteDoomed deletes list from the targets and tells of each whether all of it is gone. What is on a target that
// is no member any more counts as gone.
func (p *Pool) deleteDoomed(ctx context.Context, list []doomed) (gone []bool, err error) {
	cfg := p.value().Cfg
	gone = make([]bool, len(list))
	keys, of := map[block.TargetID][]string{}, map[block.TargetID][]int{}
	for i := range list {
		gone[i] = true
		list[i].objects(cfg, func(t block.TargetID, key string) {
			keys[t], of[t] = append(keys[t], key), append(of[t], i)
		})
	}
	var errs []error
	for _, m := range cfg.Members {
		store, ok := p.store(m.ID)
		if len(keys[m.ID]) == 0 {
			continue
		}
		var got []error
		if ok {
			dctx, cancel := context.WithTimeout(ctx, deleteTimeout)
			got = backend.DeleteMany(dctx, store, keys[m.ID])
			cancel()
		}
		for k, i := range of[m.ID] {
			if !ok || got != nil && got[k] != nil {
				gone[i] = false
			}
		}
		if first := errors.Join(got...); first != nil {
			errs = append(errs, fmt.Errorf("target %s: %w", p.targetName(m.ID), firstOf(got)))
		} else if !ok {
			errs = append(errs, fmt.Errorf("target %s is not there", p.targetName(m.ID)))
		}
	}
	return gone, errors.Join(errs...)
}

func firstOf(errs []error) error {
	i := slices.IndexFunc(errs, func(err error) bool { return err != nil })
	return errs[i]
}

// deleted takes off the list what of due is gone.
func (p *Pool) deleted(due []doomed, gone []bool) {
	p.pub.own.Lock()
	defer p.pub.own.Unlock()
	p.mapsMu.Lock()
	defer p.mapsMu.Unlock()
	done := map[string]bool{}
	segments, bytes := 0, uint64(0)
	for i, d := range due {
		if !gone[i] {
			continue
		}
		done[d.name()] = true
		if d.Segment != nil {
			segments++
			bytes += d.Segment.PayloadBytes
		}
	}
	p.pub.doomed = slices.DeleteFunc(slices.Clone(p.pub.doomed), func(d doomed) bool { return done[d.name()] })
	p.countDoomed()
	p.mu.Lock()
	p.reclaimed.segments += segments
	p.reclaimed.bytes += bytes
	p.reclaimed.objects += len(done) - segments
	p.mu.Unlock()
	if len(done) > 0 {
		p.o.Log.Info("deleted from the targets what nothing needs", "pool", p.o.Name, "segments", segments, "bytes", bytes, "others", len(done)-segments)
	}
}

// name tells d from all others.
func (d *doomed) name() string {
	if d.Segment != nil {
		return d.Segment.Key(0)
	}
	return fmt.Sprintf("%s@%d", d.Key, d.Target)
}
