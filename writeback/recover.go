package writeback

import (
	"errors"
	"fmt"
	"path"
	"slices"

	"graindisk/block"
	"graindisk/internal/planted"
	"graindisk/internal/vfs"
	"graindisk/tier"
)

// Recovered is what Open found.
type Recovered struct {
	UUID  UUID
	State []byte       // the pool's, of the checkpoint; nil if there is none
	Meta  []MetaRecord // the pool's, since the checkpoint's FreezeAndRotate, in order
	Ops   []OpRecord   // all recovered OP records not known to be published, in order
	End   Seq          // of the last record
	// Files is how many log files were scanned, TornBytes how much lay in whole or broken batches
	// beyond the recovered end, Records how many records lay above the checkpoint.
	Files     int
	TornBytes int64
	Records   int
}

// MetaRecord is one record of the pool in the metadata log.
type MetaRecord struct {
	Kind    uint8
	Payload []byte
}

// replayed is all that recovery read, kept until the first append so that DropThrough can leave
// some of it out.
type replayed struct {
	gens  []*generation // of the checkpoint
	crcs  checksums     // of the blocks in gens
	ckpt  Seq
	files []*sealedFile
	// gone lists files whose slots were reused or removed; that is right only if they were published.
	gone []*logFile
	end  Seq // of all of it
}

// recovery is the work of one Open.
type recovery struct {
	o    Options
	id   identity
	out  *Recovered
	play *replayed

	ckptGen   uint64
	firstMeta uint64
	chain     uint64 // number of the last metadata file of the chain
	chainLen  int64
	lastMeta  uint64 // highest number seen, valid or not
	metaSeq   uint64 // of the next record
	pos       position
	known     []*logFile // sealed, by file sequence
	scanned   []*sealedFile
	stable    Seq        // highest sequence any header claims to be stable
	claim     string     // where
	tornAt    string     // where the scan ended
	read      []readPart // of checkpoints and metadata files relied on: what may not be stable
	nextFile  uint64
}

// readPart is bytes [off, end) of a file, whose last write may have been seen without its sync.
type readPart struct {
	name     string
	off, end int64
}

// Open recovers the log in o.Dir and opens it under a new term. It refuses a log that is missing
// (ErrNoLog), of another pool (ErrForeign), of a newer format (ErrNewer) or damaged (ErrDamaged).
// Before it serves, the caller calls DropThrough with the horizon it knows to be published.
func Open(o Options) (*Log, *Recovered, error) {
	o = o.withDefaults()
	l, out, err := open(o)
	if err != nil {
		return nil, nil, fmt.Errorf("open log %s: %w", o.Dir, err)
	}
	o.Log.Info("log recovered", "end", uint64(out.End), "files", out.Files, "records", out.Records, "torn_bytes", out.TornBytes)
	return l, out, nil
}

func open(o Options) (*Log, *Recovered, error) {
	id, err := readIdentity(o.FS, o.Dir)
	if err != nil {
		return nil, nil, err
	}
	if id.pool != o.Pool {
		return nil, nil, fmt.Errorf("%w: it is of pool %s, not %s", ErrForeign, id.pool, o.Pool)
	}
	r := &recovery{o: o, id: id, out: &Recovered{UUID: id.log}, play: &replayed{}, metaSeq: 1}
	if planted.Bug("recovery: slots change hands before they are claimed") {
		o.Space.Claimed()
	}
	for _, step := range []func() error{r.readCheckpoint, r.readMeta, r.scanFiles, r.checkClaims, r.syncRead} {
		if err := step(); err != nil {
			return nil, nil, err
		}
	}
	l, err := r.begin()
	if err != nil {
		return nil, nil, err
	}
	return l, r.out, nil
}

// readCheckpoint finds the newest valid checkpoint. One that is not whole is one whose writing was
// cut short; if it was damaged instead, the metadata files the other one needs are missing. The other
// one is not read in full: it says nothing that the newest does not know better.
func (r *recovery) readCheckpoint() error {
	names := []string{ckptName(1), ckptName(0)}
	if r.peekGeneration(names[1]) > r.peekGeneration(names[0]) {
		slices.Reverse(names)
	}
	for _, file := range names {
		name := path.Join(r.o.Dir, file)
		crcs := newChecksums(r.o.Space)
		h, x, state, err := readCkpt(r.o.FS, name, crcs)
		if errors.Is(err, errTorn) {
			continue
		}
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		if h.log != r.id.log || ckptName(h.generation) != file {
			return fmt.Errorf("%w: %s is not of this log", ErrDamaged, name)
		}
		r.ckptGen, r.firstMeta = h.generation, h.firstMeta
		r.pos, r.known = x.pos, x.files
		r.play.gens, r.play.crcs, r.play.ckpt = x.gens, crcs, h.seq
		r.out.State = state
		r.claimStable(h.seq, name)
		r.read = append(r.read, readPart{name: name, end: block.Size})
		return nil
	}
	r.play.crcs = newChecksums(r.o.Space)
	return nil
}

// peekGeneration is the generation that a checkpoint's header states; 0 if it is not valid.
func (r *recovery) peekGeneration(file string) uint64 {
	f, err := r.o.FS.Open(path.Join(r.o.Dir, file))
	if err != nil {
		return 0 // readCkpt tells why
	}
	defer f.Close()
	b := make([]byte, block.Size)
	if _, err := f.ReadAt(b, 0); err != nil {
		return 0
	}
	h, _ := decodeCkptHeader(b)
	return h.generation
}

// claimStable notes that a header says everything through seq is stable.
func (r *recovery) claimStable(seq Seq, where string) {
	if seq > r.stable {
		r.stable, r.claim = seq, where
	}
}

// readMeta replays the metadata files from the one the checkpoint names.
func (r *recovery) readMeta() error {
	numbers, err := metaNumbers(r.o.FS, r.o.Dir)
	if err != nil {
		return err
	}
	for _, n := range numbers {
		r.lastMeta = n
		if n < r.firstMeta {
			continue // replaced by the checkpoint; begin deletes it
		}
		if err := r.readMetaFile(n); err != nil {
			return err
		}
	}
	if r.chain == 0 || r.pos.seq == 0 {
		return fmt.Errorf("%w: metadata log %s is missing", ErrDamaged, metaName(max(1, r.firstMeta)))
	}
	return nil
}

func (r *recovery) readMetaFile(n uint64) error {
	name := path.Join(r.o.Dir, metaName(n))
	b, err := readAll(r.o.FS, name)
	if err != nil {
		return err
	}
	h, err := decodeMetaHeader(b)
	if errors.Is(err, errTorn) {
		// The header is synced before the first record is written, and a file left behind by a
		// crash before that is never followed: the next one names the file before it.
		if len(b) <= block.Size {
			return nil
		}
		return fmt.Errorf("%w: %s has records but no valid header", ErrDamaged, name)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	switch first := r.chain == 0; {
	case h.log != r.id.log || h.number != n:
		return fmt.Errorf("%w: %s is not of this log", ErrDamaged, name)
	case first && r.firstMeta != 0 && n != r.firstMeta, first && r.firstMeta == 0 && h.previous != 0:
		return fmt.Errorf("%w: metadata log before %s is missing, or the newest checkpoint", ErrDamaged, name)
	case first:
		r.metaSeq = h.first
	case h.previous != r.chain || h.first != r.metaSeq:
		return fmt.Errorf("%w: %s continues %s at record %d, which ends at %d", ErrDamaged, name, metaName(h.previous), h.first, r.metaSeq)
	}
	r.chain = n
	r.chainLen += int64(len(b))
	last, err := r.replayMeta(name, b, h.term)
	r.read = append(r.read, last)
	return err
}

// replayMeta applies the records of one file. The file ends at the first bad one, torn by a crash,
// unless a later one is whole, which cannot be since each is synced before the next is written. last
// is the last record, or the header if there is none: all before it were synced.
func (r *recovery) replayMeta(name string, b []byte, term UUID) (last readPart, err error) {
	seed := term.seed()
	off := block.Size
	last = readPart{name: name, end: block.Size}
	for off < len(b) {
		m, n, err := decodeMetaRecord(b[off:], int64(off), seed)
		if err == nil && m.seq != r.metaSeq {
			return last, fmt.Errorf("%w: %s at %d: record %d where %d was due", ErrDamaged, name, off, m.seq, r.metaSeq)
		}
		if err != nil {
			break
		}
		if err := r.apply(m); errors.Is(err, errTorn) {
			return last, fmt.Errorf("%w: %s at %d: record %d of kind %d makes no sense", ErrDamaged, name, off, m.seq, m.kind)
		} else if err != nil {
			return last, fmt.Errorf("%s at %d: %w", name, off, err)
		}
		r.metaSeq++
		last.off, last.end = int64(off), int64(off+n)
		off += n
	}
	for at := off + block.Size; at < len(b); at += block.Size {
		if m, _, err := decodeMetaRecord(b[at:], int64(at), seed); err == nil {
			return last, fmt.Errorf("%w: %s at %d: record %d is bad, and record %d after it is not", ErrDamaged, name, off, r.metaSeq, m.seq)
		}
	}
	return last, nil
}

func (r *recovery) apply(m metaRecord) error {
	switch {
	case m.kind >= OpaqueMin:
		r.out.Meta = append(r.out.Meta, MetaRecord{Kind: m.kind, Payload: slices.Clone(m.payload)})
	case m.kind == metaTerm:
		p, err := decodePosition(m.payload)
		if err != nil || len(m.payload) != positionLen {
			return errTorn
		}
		r.pos = p
	case m.kind == metaSealed:
		s, err := decodeSealed(m.payload)
		if err != nil {
			return err
		}
		if s.term != r.pos.term || s.file != r.pos.file || s.first != r.pos.seq {
			return errTorn
		}
		r.sealed(s)
	default:
		return fmt.Errorf("%w: metadata record of kind %d", ErrNewer, m.kind)
	}
	return nil
}

// sealed takes a file into the state.
func (r *recovery) sealed(s *sealedFile) {
	r.pos = position{term: s.term, file: s.file + 1, seq: s.last() + 1, prevCRC: s.endCRC}
	r.play.files = append(r.play.files, s)
	r.known = append(r.known, &logFile{slot: int(s.slot), file: s.file, term: s.term, first: s.first, last: s.last(),
		end: s.end, full: true, synced: true, sealed: true})
}

// checkClaims tells damage from a torn tail.
func (r *recovery) checkClaims() error {
	r.out.End = r.pos.seq - 1
	if r.stable > r.out.End {
		return fmt.Errorf("%w: record %d is missing at %s, but %s says that everything through %d was stable",
			ErrDamaged, r.pos.seq, r.tornAt, r.claim, r.stable)
	}
	return nil
}

// syncRead makes what was read stable before anything is built on it: after the death of the
// process alone, it may still be in the page cache only. It writes the same bytes again before it
// syncs: if a sync failed in the life before, the pages count as clean, and a sync alone would
// succeed without them. Of a checkpoint that is the header, written only after the payload's sync; of
// a metadata file the last record, since each is synced before the next is written.
func (r *recovery) syncRead() error {
	if planted.Bug("recovery: what it read is not synced") {
		return nil
	}
	for _, s := range r.scanned {
		if s.last() > r.stable && !planted.Bug("recovery: synced but not written again") {
			if err := r.rewriteSlot(s); err != nil {
				return err
			}
		}
		if err := r.o.Space.Sync(int(s.slot)); err != nil {
			return err
		}
	}
	for _, p := range r.read {
		f, err := r.o.FS.Open(p.name)
		if err != nil {
			return err
		}
		if err := errors.Join(rewrite(f, p.off, p.end), f.Sync(), f.Close()); err != nil {
			return fmt.Errorf("sync %s: %w", p.name, err)
		}
	}
	return r.o.FS.SyncDir(r.o.Dir)
}

const rewriteBytes = 1 << 20 // at a time

func (r *recovery) rewriteSlot(s *sealedFile) error {
	buf := make([]byte, rewriteBytes)
	for at := uint32(0); at < s.end; at += rewriteBytes / block.Size {
		p := buf[:min(rewriteBytes, int(s.end-at)*block.Size)]
		place := tier.NewPlace(int(s.slot), at)
		if err := r.o.Space.ReadAt(place, p); err != nil {
			return err
		}
		if err := r.o.Space.WriteAt(place, [][]byte{p}); err != nil {
			return err
		}
	}
	return nil
}

func rewrite(f vfs.File, off, end int64) error {
	b := make([]byte, end-off)
	if _, err := f.ReadAt(b, off); err != nil {
		return err
	}
	_, err := f.WriteAt(b, off)
	return err
}

// begin seals what was scanned and starts a new term. Until its Term record is stable, a crash
// leaves a log that recovers to the same records.
func (r *recovery) begin() (*Log, error) {
	l := newLog(r.o, r.id.log)
	m := &l.meta
	m.seq, m.number, m.bytes = r.metaSeq, r.chain, r.chainLen
	if err := m.rotateLocked(r.lastMeta + 1); err != nil {
		return nil, err
	}
	pos := position{term: l.term, file: r.nextFile, seq: r.pos.seq}
	err := func() error {
		for _, s := range r.scanned {
			f := &logFile{slot: int(s.slot), file: s.file, term: s.term, first: s.first, last: s.last(), end: s.end, prevCRC: s.endCRC, time: s.time}
			if err := m.appendSealedLocked(f, s.body); err != nil {
				return err
			}
		}
		if err := m.appendTermLocked(pos); err != nil {
			return err
		}
		return removeMeta(r.o.FS, r.o.Dir, func(n uint64) bool { return n < r.firstMeta || r.chain < n && n < m.number })
	}()
	if err != nil {
		return nil, errors.Join(err, m.close())
	}
	l.ckpt.generation = r.ckptGen
	l.claimSlots(r)
	r.play.end = r.out.End
	r.out.Ops = r.play.ops()
	for _, s := range r.play.files {
		if s.last() > r.play.ckpt {
			r.out.Records += s.n
		}
	}
	l.replay.Store(r.play)
	l.settling = true
	l.startAt(pos)
	return l, nil
}

// claimSlots tells the tier which slots the log holds. Of two files in one slot the later is there, and
// a slot that the tier no longer has was removed while clean.
func (l *Log) claimSlots(r *recovery) {
	last := map[int]*logFile{}
	for _, f := range r.known {
		last[f.slot] = f
	}
	for _, f := range r.known {
		if last[f.slot] != f || f.slot >= l.space.Slots() {
			r.play.gone = append(r.play.gone, f)
			continue
		}
		l.space.SetBusy(f.slot)
		l.files = append(l.files, f)
	}
	l.space.Claimed()
}

// ops lists the OP records in order.
func (p *replayed) ops() (list []OpRecord) {
	for _, g := range p.gens {
		list = append(list, g.ops...)
	}
	for _, s := range p.files {
		if s.ops == 0 {
			continue
		}
		s.each(func(seq Seq, rec *sealedRecord) {
			if rec.kind == Op && seq > p.ckpt {
				list = append(list, OpRecord{Seq: seq, Disk: rec.disk, Payload: slices.Clone(rec.payload)})
			}
		})
	}
	return list
}

// build makes one generation of what was recovered above horizon, and the checksums of its blocks. It
// uses p up. Records in slots that the tier does not have are left out; DropThrough refuses them.
func (p *replayed) build(horizon Seq) (*generation, checksums) {
	g := newGeneration(0)
	for i, from := range p.gens {
		if from.last <= horizon {
			continue
		}
		if len(g.disks) == 0 && len(g.ops) == 0 {
			g = from
		} else {
			g.merge(from)
		}
		p.gens[i] = nil
	}
	for _, s := range p.files {
		if s.last() <= max(p.ckpt, horizon) {
			continue
		}
		s.each(func(seq Seq, rec *sealedRecord) {
			if seq <= p.ckpt || seq <= horizon {
				return
			}
			place := tier.NewPlace(int(s.slot), rec.at)
			if rec.kind == Data && !p.crcs.putEncoded(place, rec.crcs) {
				return
			}
			g.apply(seq, s.time, rec.entry, place, slices.Clone(rec.payload))
		})
	}
	g.last = max(p.end, horizon)
	return g, p.crcs
}

// ensureIndex puts what was recovered into the index if that has not been done.
func (l *Log) ensureIndex() {
	if l.replay.Load() == nil {
		return
	}
	l.idx.Lock()
	defer l.idx.Unlock()
	if p := l.replay.Load(); p != nil {
		l.setIndexLocked(p, 0)
	}
}

// setIndexLocked makes the index from what was recovered above horizon; idx is held.
func (l *Log) setIndexLocked(p *replayed, horizon Seq) {
	g, crcs := p.build(horizon)
	l.gens, l.crcs = []*generation{g}, crcs
	l.replay.Store(nil)
}

// straddles tells whether a generation of the checkpoint is kept whole though the horizon lies within
// it. Its entries may name blocks in files wholly below the horizon, so no file is clean before the
// next Publish.
func (p *replayed) straddles(horizon Seq) bool {
	return slices.ContainsFunc(p.gens, func(g *generation) bool { return g.last > horizon })
}

// DropThrough leaves out of the index what was recovered at or below horizon, which is published,
// and lets the slots wholly below it be evicted. Until it, or the first append, the log takes no slot,
// so that a cache can claim those it knows. A horizon above the recovered end drops everything
// and lets sequences continue above it. It is called after Open, before the first append and Freeze.
func (l *Log) DropThrough(horizon Seq) error {
	l.mu.Lock()
	end, pos := l.written, position{term: l.term, file: l.nextFile, seq: horizon + 1, prevCRC: l.prevCRC}
	l.mu.Unlock()
	play := l.replay.Load()
	if play == nil {
		return errors.New("drop published records: the log is in use already")
	}
	if err := play.check(horizon); err != nil {
		return err
	}
	if horizon > end {
		if err := l.withMeta(l.ctx, func(m *metaLog) error { return m.appendTermLocked(pos) }); err != nil {
			return err
		}
	}
	straddles := play.straddles(horizon)
	l.idx.Lock()
	l.setIndexLocked(play, horizon)
	l.idx.Unlock()
	l.mu.Lock()
	l.written, l.stable = max(end, horizon), max(l.stable, horizon)
	if !straddles {
		l.horizon = max(l.horizon, horizon)
	}
	l.settling = false
	l.cleanLocked()
	l.mu.Unlock()
	l.SpaceFreed()
	return nil
}

// check refuses to go on when records above horizon are gone from the tier.
func (p *replayed) check(horizon Seq) error {
	for _, f := range p.gone {
		if f.last > horizon {
			return fmt.Errorf("%w: %s was reused or removed, yet file %d in it held records through %d, and only %d is published",
				ErrDamaged, tier.Name(f.slot), f.file, f.last, horizon)
		}
	}
	return nil
}
