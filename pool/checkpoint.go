package pool

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"sort"
	"time"

	"graindisk/backend"
	"graindisk/block"
	"graindisk/grains/segment"
	"graindisk/internal/planted"
	"graindisk/pool/root"
	"graindisk/vdisk/densetree"
	"graindisk/writeback"
)

// A published checkpoint is a manifest, part 0, and the runs it names, in parts of this and of older
// checkpoints: runs are immutable, so only those made since the last checkpoint are stored again.
// Every part is stored m+1 times, on different targets, under ckpt/<epoch>/<n>/<part>.<copy>:
//
//	0       4     6     8          16      24  28     32     36    40
//	+-------+-----+-----+----------+-------+---+------+------+-----+------+
//	| GDCK  | ver | 0   | incompat | epoch | n | part | len  | crc | body |
//	+-------+-----+-----+----------+-------+---+------+------+-----+------+
//
// crc is CRC32C over the header without it and the body. The manifest's body is a snapshot in JSON;
// the body of another part is encoded runs and blobs of the usage table back to back, or, if the manifest
// would be long, one of its tables: rows of its disks and segments, in JSON.
const (
	partMagic     = "GDCK"
	partVersion   = 1
	partHeaderLen = 40
	partBytesMax  = 1 << 30 // what a reader accepts; the first release wrote any manifest as one part
	partBytesFull = 8 << 20 // where a writer starts the next part
)

func encodePart(epoch uint64, n uint32, part int, body []byte) []byte {
	b := make([]byte, partHeaderLen, partHeaderLen+len(body))
	copy(b, partMagic)
	binary.LittleEndian.PutUint16(b[4:], partVersion)
	binary.LittleEndian.PutUint64(b[16:], epoch)
	binary.LittleEndian.PutUint32(b[24:], n)
	binary.LittleEndian.PutUint32(b[28:], uint32(part))
	binary.LittleEndian.PutUint32(b[32:], uint32(len(body)))
	b = append(b, body...)
	binary.LittleEndian.PutUint32(b[36:], partCRC(b))
	return b
}

func partCRC(b []byte) uint32 {
	return block.CRC(append(slices.Clone(b[:36]), b[partHeaderLen:]...))
}

// decodePart checks a part and returns its body, which aliases b.
func decodePart(b []byte, epoch uint64, n uint32, part int) ([]byte, error) {
	if len(b) < partHeaderLen || string(b[:4]) != partMagic {
		return nil, fmt.Errorf("checkpoint part: bad magic: %w", segment.ErrDamaged)
	}
	le := binary.LittleEndian
	if v, inc := le.Uint16(b[4:]), le.Uint64(b[8:]); v > partVersion || inc != 0 {
		return nil, fmt.Errorf("checkpoint part: version %d, incompat bits %#x: %w", v, inc, segment.ErrNewer)
	}
	if int(le.Uint32(b[32:])) != len(b)-partHeaderLen || le.Uint32(b[36:]) != partCRC(b) {
		return nil, fmt.Errorf("checkpoint part: bad length or checksum: %w", segment.ErrDamaged)
	}
	if e, m, q := le.Uint64(b[16:]), le.Uint32(b[24:]), le.Uint32(b[28:]); e != epoch || m != n || int(q) != part {
		return nil, fmt.Errorf("checkpoint part: is part %d of %d/%d, want part %d of %d/%d: %w", q, e, m, part, epoch, n, segment.ErrDamaged)
	}
	return b[partHeaderLen:], nil
}

func partKey(epoch, n uint64, part, copyNo int) string {
	return fmt.Sprintf("ckpt/%d/%d/%d.%d", epoch, n, part, copyNo)
}

// checkpointer remembers which runs are stored where.
type checkpointer struct {
	n    uint64            // checkpoints written under this epoch
	runs map[uint64]runRef // by run number
	at   time.Time         // of the newest one of this process
	// old says that runs are what a local checkpoint knew: the parts may be gone with a checkpoint that
	// named them.
	old bool
}

// localCheckpoint freezes the log, writes the local checkpoint as of the freeze and returns the
// frozen generation, which stays unpublished.
func (p *Pool) localCheckpoint(ctx context.Context) (*writeback.Frozen, error) {
	p.localMu.Lock()
	defer p.localMu.Unlock()
	p.mapsMu.Lock()
	defer p.mapsMu.Unlock()
	c, err := p.log.FreezeAndRotate(ctx)
	if err != nil {
		return nil, err
	}
	v := p.mapsNow()
	defer v.release()
	state, err := p.encodeState(v)
	if err != nil {
		return nil, err
	}
	err = p.log.WriteCheckpoint(c, state)
	p.keepRuns(v, err)
	if err != nil {
		if p.log.Failed() != nil {
			return nil, err
		}
		p.o.Log.Warn("local checkpoint not written; the one before holds", "pool", p.o.Name, "err", err)
	}
	return c.Frozen, nil
}

// checkpointIfDue publishes a checkpoint if the root names enough cuts.
func (p *Pool) checkpointIfDue(ctx context.Context) error {
	if len(p.value().Cuts) < p.o.CheckpointCuts {
		return nil
	}
	return p.publishCheckpoint(ctx)
}

// publishCheckpoint stores the maps as of the newest cut and commits the root that names them.
func (p *Pool) publishCheckpoint(ctx context.Context) error {
	if p.pub.ckpt.old {
		p.confirmStored(ctx)
	}
	p.pub.ckpt.n++ // whatever becomes of it: names are used once
	epoch, n := p.epoch.Load(), p.pub.ckpt.n
	next := map[uint64]runRef{}
	part, body := 1, []byte(nil)
	flush := func() error {
		if len(body) == 0 {
			return nil
		}
		_, err := p.putPart(ctx, epoch, n, part, body)
		part, body = part+1, nil
		return err
	}
	put := func(b []byte) (runRef, error) {
		if len(body)+len(b) > partBytesFull {
			if err := flush(); err != nil {
				return runRef{}, err
			}
		}
		ref := runRef{Epoch: epoch, N: n, Part: part, Off: int64(len(body)), Len: int64(len(b))}
		body = append(body, b...)
		return ref, nil
	}
	p.mapsMu.Lock()
	p.doomDead(ckptID{epoch, n})
	view, change := p.mapsNow(), p.repair.change()
	p.mapsMu.Unlock()
	defer view.release()
	if planted.Bug("reclaim: before the commit") {
		p.deleteDoomed(ctx, p.pub.doomed)
	}
	s, err := p.snapshotNow(view, func(r *densetree.Run) (runRef, error) {
		ref, ok := p.pub.ckpt.runs[r.ID]
		if !ok {
			err := p.needRuns(ctx, []*densetree.Run{r})
			var b []byte
			if err == nil {
				err = p.mending(ctx, func() (err error) {
					b, err = r.Encode()
					return err
				})
			}
			if err == nil {
				ref, err = put(b)
			}
			if err != nil {
				return ref, err
			}
			ref.ID = r.ID
		}
		next[r.ID] = ref
		return ref, nil
	}, put)
	if err == nil {
		err = flush()
	}
	if err != nil {
		return err
	}
	p.boots.add(s)
	manifest, tables, err := s.split(part, p.o.tableRows)
	if err != nil {
		return err
	}
	for i, t := range tables {
		if _, err := p.putPart(ctx, epoch, n, part+i, t); err != nil {
			return err
		}
	}
	targets, err := p.putPart(ctx, epoch, n, 0, manifest)
	if err != nil {
		return err
	}
	ref := root.CheckpointRef{
		Epoch: epoch, N: n, Cut: s.Cut, K: 1, M: uint8(len(targets) - 1), Targets: targets,
		Bytes: int64(len(manifest)), CRC: block.CRC(manifest),
	}
	err = p.update(ctx, func(v *root.Value) {
		v.Checkpoints = append([]root.CheckpointRef{ref}, v.Checkpoints...)
		v.Checkpoints = v.Checkpoints[:min(2, len(v.Checkpoints))]
		v.Cuts = slices.DeleteFunc(slices.Clone(v.Cuts), func(c root.CutRef) bool { return c.Cut <= s.Cut })
	})
	if err != nil {
		return err
	}
	p.setStored(next)
	p.pub.ckpt.at = time.Now()
	p.repair.published(change)
	p.o.Log.Info("checkpoint published", "pool", p.o.Name, "cut", s.Cut, "n", n)
	return nil
}

// putPart stores m+1 copies on different targets, or one on each that placement leaves, passing over those that fail,
// however long it takes, and tells which: copy i is on the i-th.
func (p *Pool) putPart(ctx context.Context, epoch, n uint64, part int, body []byte) ([]block.TargetID, error) {
	obj := encodePart(epoch, uint32(n), part, body)
	for wait := backoff(0); ; wait = wait.next() {
		_, m, targets := p.placement(0)
		slices.Sort(targets)
		targets = slices.DeleteFunc(slices.Compact(targets), func(t block.TargetID) bool { return t == 0 })
		var on []block.TargetID
		var errs []error
		for _, t := range targets {
			if len(on) > int(m) {
				break
			}
			store, ok := p.store(t)
			if !ok { // replaced a moment ago
				continue
			}
			if err := p.judge(ctx, t, putShard(ctx, store, partKey(epoch, n, part, len(on)), obj)); err != nil {
				errs = append(errs, err)
				continue
			}
			on = append(on, t)
		}
		if len(on) > 0 && len(on) >= min(int(m)+1, len(targets)) {
			if thin(len(on), p.value()) {
				p.repair.thin.Store(true)
			}
			return on, nil
		}
		p.o.Log.Warn("checkpoint part not stored, trying again", "pool", p.o.Name, "part", part, "err", errors.Join(errs...))
		if err := wait.sleep(ctx); err != nil {
			return nil, err
		}
	}
}

// thin tells whether so many copies of a part are fewer than there are when no target is lost.
func thin(copies int, v root.Value) bool {
	return copies < min(v.Stripe.Parity+1, len(dataMembers(v.Cfg)))
}

// getPart reads a part from whichever target has a good copy. As with readPart, there is no word of damage in the error
// as long as a target has not answered.
func (p *Pool) getPart(ctx context.Context, epoch, n uint64, part int) ([]byte, error) {
	var proven, passing []error
	members := p.dataMembers()
	for _, t := range members {
		store, ok := p.store(t)
		if !ok {
			passing = append(passing, fmt.Errorf("target %s is not among the configured ones", p.targetName(t)))
			continue
		}
		for c := range members {
			var b []byte
			var err error
			for range damageReads {
				b, _, err = store.Get(ctx, partKey(epoch, n, part, c), partBytesMax)
				if err == nil {
					b, err = decodePart(b, epoch, uint32(n), part)
				}
				if err == nil {
					return b, nil
				}
				if !final(err) {
					break
				}
			}
			named := fmt.Errorf("target %s: %w", p.targetName(t), err)
			switch {
			case errors.Is(err, backend.ErrNotFound):
			case final(err):
				proven = append(proven, named)
			default:
				passing = append(passing, named)
			}
		}
	}
	switch {
	case isNewer(errors.Join(proven...)):
	case len(passing) > 0:
		proven = passing
	case len(proven) == 0:
		return nil, fmt.Errorf("checkpoint %d/%d part %d is on no target: %w", epoch, n, part, segment.ErrDamaged)
	}
	return nil, fmt.Errorf("checkpoint %d/%d part %d: %w", epoch, n, part, errors.Join(proven...))
}

// confirmStored forgets those runs that the newest published checkpoint does not name: only what it and
// the one before name is kept on the targets.
func (p *Pool) confirmStored(ctx context.Context) {
	stored := map[uint64]runRef{}
	if v := p.value(); len(v.Checkpoints) > 0 {
		s, err := p.readManifest(ctx, v.Checkpoints[0])
		if err != nil {
			p.o.Log.Warn("published checkpoint not read, the next one stores all maps again", "pool", p.o.Name, "err", err)
			s = &snapshot{}
		}
		for _, d := range s.Disks {
			for _, r := range d.Runs {
				if p.pub.ckpt.runs[r.ID] == r { // a number alone may have been used by a run that a crash took
					stored[r.ID] = r
				}
			}
		}
	}
	p.setStored(stored)
	p.pub.ckpt.old = false
}

// loadCheckpoint reads the newest checkpoint that the root names; without one the maps start empty.
func (p *Pool) loadCheckpoint(ctx context.Context, v root.Value) error {
	if len(v.Checkpoints) == 0 {
		return nil
	}
	s, err := p.readManifest(ctx, v.Checkpoints[0])
	if err != nil {
		return err
	}
	got, err := p.fetchMaps(ctx, s)
	if err != nil {
		return err
	}
	stored := map[uint64]runRef{}
	err = p.loadTrees(s, func(r runRef) (*densetree.Run, error) {
		stored[r.ID] = r
		return got.runs[r.ID], nil
	}, func(r runRef) ([]byte, error) { return got.blobs[r], nil })
	p.setStored(stored)
	return err
}

// cut is what the body of its part has.
func (ref runRef) cut(body []byte) ([]byte, error) {
	if ref.Off < 0 || ref.Len < 0 || ref.Off > int64(len(body))-ref.Len {
		return nil, fmt.Errorf("run %d outside its part: %w", ref.ID, segment.ErrDamaged)
	}
	return body[ref.Off : ref.Off+ref.Len], nil
}

// decode takes one run out of the body of its part.
func (ref runRef) decode(body []byte) (*densetree.Run, error) {
	b, err := ref.cut(body)
	if err != nil {
		return nil, err
	}
	r, err := densetree.DecodeRun(b)
	if err != nil {
		return nil, err
	}
	if r.ID != ref.ID {
		return nil, fmt.Errorf("run %d where %d should be: %w", r.ID, ref.ID, segment.ErrDamaged)
	}
	return r, nil
}

// stored is where the newest published checkpoint has a run.
func (p *Pool) stored(id uint64) (runRef, bool) {
	runs := p.storedRuns.Load()
	if runs == nil {
		return runRef{}, false
	}
	ref, ok := (*runs)[id]
	return ref, ok
}

// setStored makes runs, which is not changed any more, what the newest published checkpoint holds.
func (p *Pool) setStored(runs map[uint64]runRef) {
	p.pub.ckpt.runs = runs
	p.storedRuns.Store(&runs)
}

// mendMap fetches a run whose file is damaged from the published checkpoint, if that holds it.
func (p *Pool) mendMap(ctx context.Context, pe *densetree.PageError) error {
	if pe.Partial() != nil {
		return p.bringPage(ctx, pe)
	}
	ref, ok := p.stored(pe.ID)
	if !ok {
		p.o.Log.Error("map is damaged and not published yet", "pool", p.o.Name, "err", pe)
		return pe
	}
	body, err := p.getPart(ctx, ref.Epoch, ref.N, ref.Part)
	var r *densetree.Run
	if err == nil {
		r, err = ref.decode(body)
	}
	if err == nil {
		err = pe.Mend(r)
	}
	if err != nil {
		p.o.Log.Error("map is damaged and not to be had from the targets", "pool", p.o.Name, "err", errors.Join(pe, err))
		return err
	}
	p.o.Log.Warn("map was damaged, the published checkpoint has it", "pool", p.o.Name, "err", pe)
	return nil
}

// mending does what reads whole maps, again for each run whose file proves damaged and which the published checkpoint has.
// Lookups see to that by themselves, but of a map that is merged, or whose disk is gone, nobody may look anything up.
func (p *Pool) mending(ctx context.Context, do func() error) error {
	for mended := map[uint64]bool{}; ; {
		err := do()
		pe := new(densetree.PageError)
		if err == nil || !errors.As(err, &pe) || pe.Partial() != nil || mended[pe.ID] {
			return err
		}
		mended[pe.ID] = true
		if err := p.mendMap(ctx, pe); err != nil {
			return err
		}
	}
}

// mergeFailed mends what it can; the merge is tried again later.
func (p *Pool) mergeFailed(err error) {
	pe := new(densetree.PageError)
	if errors.As(err, &pe) && pe.Partial() != nil { // bringMaps has it tried again
		p.far.hurry.Store(true)
		p.o.Log.Debug("maps are merged when they are here", "pool", p.o.Name, "err", err)
		return
	}
	p.o.Log.Warn("maps not merged, trying again later", "pool", p.o.Name, "err", err)
	if errors.As(err, &pe) {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		_ = p.mendMap(ctx, pe) // which says so
	}
}

// sort gives the snapshot one order, whatever order the maps gave.
func (s *snapshot) sort() {
	sort.Slice(s.Disks, func(i, j int) bool { return s.Disks[i].Disk < s.Disks[j].Disk })
	sort.Slice(s.Segments, func(i, j int) bool { return s.Segments[i].ID < s.Segments[j].ID })
}
