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
	// beyond the recovered end.
	Files     int
	TornBytes int64
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
	ckpt  Seq
	files []*sealedFile
	// gone lists files whose slots were reused; that is right only if they were published.
	gone []*logFile
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
	stable    Seq      // highest sequence any header claims to be stable
	claim     string   // where
	tornAt    string   // where the scan ended
	read      []string // checkpoints and metadata files relied on
	nextFile  uint64
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
	o.Log.Info("log recovered", "end", uint64(out.End), "files", out.Files, "torn_bytes", out.TornBytes)
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
// cut short; if it was damaged instead, the metadata files the other one needs are missing.
func (r *recovery) readCheckpoint() error {
	for gen := range uint64(2) {
		name := path.Join(r.o.Dir, ckptName(gen))
		h, x, state, err := readCkpt(r.o.FS, name)
		if errors.Is(err, errTorn) {
			continue
		}
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		if h.log != r.id.log || ckptName(h.generation) != ckptName(gen) {
			return fmt.Errorf("%w: %s is not of this log", ErrDamaged, name)
		}
		r.read = append(r.read, name)
		if h.generation <= r.ckptGen {
			continue
		}
		r.ckptGen, r.firstMeta = h.generation, h.firstMeta
		r.pos, r.known = x.pos, x.files
		r.play.gens, r.play.ckpt = x.gens, h.seq
		r.out.State = state
		r.claimStable(h.seq, name)
	}
	return nil
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
	r.read = append(r.read, name)
	r.chainLen += int64(len(b))
	return r.replayMeta(name, b, h.term)
}

// replayMeta applies the records of one file. The file ends at the first bad one, torn by a crash,
// unless a later one is whole, which cannot be since each is synced before the next is written.
func (r *recovery) replayMeta(name string, b []byte, term UUID) error {
	seed := term.seed()
	off := block.Size
	for off < len(b) {
		m, n, err := decodeMetaRecord(b[off:], int64(off), seed)
		if err == nil && m.seq != r.metaSeq {
			return fmt.Errorf("%w: %s at %d: record %d where %d was due", ErrDamaged, name, off, m.seq, r.metaSeq)
		}
		if err != nil {
			break
		}
		if err := r.apply(m); errors.Is(err, errTorn) {
			return fmt.Errorf("%w: %s at %d: record %d of kind %d makes no sense", ErrDamaged, name, off, m.seq, m.kind)
		} else if err != nil {
			return fmt.Errorf("%s at %d: %w", name, off, err)
		}
		r.metaSeq++
		off += n
	}
	for at := off + block.Size; at < len(b); at += block.Size {
		if m, _, err := decodeMetaRecord(b[at:], int64(at), seed); err == nil {
			return fmt.Errorf("%w: %s at %d: record %d is bad, and record %d after it is not", ErrDamaged, name, off, r.metaSeq, m.seq)
		}
	}
	return nil
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
// succeed without them.
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
	for _, name := range r.read {
		f, err := r.o.FS.Open(name)
		if err != nil {
			return err
		}
		if err := errors.Join(rewrite(f), f.Sync(), f.Close()); err != nil {
			return fmt.Errorf("sync %s: %w", name, err)
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

func rewrite(f vfs.File) error {
	size, err := f.Size()
	buf := make([]byte, min(size, rewriteBytes))
	for off := int64(0); err == nil && off < size; off += int64(len(buf)) {
		p := buf[:min(int64(len(buf)), size-off)]
		if _, err = f.ReadAt(p, off); err == nil {
			_, err = f.WriteAt(p, off)
		}
	}
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
			if err := m.appendSealedLocked(f, s.encodeRecords()); err != nil {
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
	l.replay, l.settling = r.play, true
	g := r.play.build(0)
	g.last = r.out.End
	l.gens = []*generation{g}
	r.out.Ops = g.ops
	l.startAt(pos)
	return l, nil
}

// encodeRecords is the body of a Sealed record.
func (s *sealedFile) encodeRecords() (b []byte) {
	for i := range s.records {
		rec := &s.records[i]
		b = le.AppendUint32(rec.append(b), rec.at)
		if rec.kind == Data {
			for _, c := range rec.crcs {
				b = le.AppendUint32(b, c)
			}
		}
		b = append(b, rec.payload...)
	}
	return b
}

// claimSlots tells the tier which slots the log holds. Of two files in one slot the later is there.
func (l *Log) claimSlots(r *recovery) {
	last := map[int]*logFile{}
	for _, f := range r.known {
		last[f.slot] = f
	}
	for _, f := range r.known {
		if last[f.slot] != f {
			r.play.gone = append(r.play.gone, f)
			continue
		}
		l.space.SetBusy(f.slot)
		l.files = append(l.files, f)
	}
}

// build makes one generation of what was recovered above horizon.
func (p *replayed) build(horizon Seq) *generation {
	g := newGeneration(0)
	for _, from := range p.gens {
		if from.last > horizon {
			g.merge(from)
		}
	}
	for _, s := range p.files {
		for i := range s.records {
			rec := &s.records[i]
			if seq := s.first + Seq(i); seq > p.ckpt && seq > horizon {
				g.apply(seq, s.time, rec.entry, tier.NewPlace(int(s.slot), rec.at), rec.crcs, rec.payload)
			}
		}
	}
	return g
}

// straddles tells whether a generation of the checkpoint is kept whole though the horizon lies within
// it. Its entries may name blocks in files wholly below the horizon, so no file is clean before the
// next Publish.
func (p *replayed) straddles(horizon Seq) bool {
	return slices.ContainsFunc(p.gens, func(g *generation) bool { return g.last > horizon })
}

// merge applies a later generation on top of g.
func (g *generation) merge(from *generation) {
	for id, d := range from.disks {
		to := g.disk(id, d.oldest)
		d.holes.Scan(func(s, e block.LBA) bool { to.unmap(s, e); return true })
		for lba, at := range d.blocks {
			to.blocks[lba] = at
		}
	}
	if from.oldest != 0 && (g.oldest == 0 || from.oldest < g.oldest) {
		g.oldest = from.oldest
	}
	g.ops = append(g.ops, from.ops...)
	g.last = from.last
}

// DropThrough leaves out of the index what was recovered at or below horizon, which is published,
// and lets the slots wholly below it be evicted. Until it, or the first append, the log takes no slot,
// so that a cache can claim those it knows. A horizon above the recovered end drops everything
// and lets sequences continue above it. It is called after Open, before the first append and Freeze.
func (l *Log) DropThrough(horizon Seq) error {
	l.mu.Lock()
	play, end, pos := l.replay, l.written, position{term: l.term, file: l.nextFile, seq: horizon + 1, prevCRC: l.prevCRC}
	l.mu.Unlock()
	if play == nil {
		return errors.New("drop published records: the log is in use already")
	}
	for _, f := range play.gone {
		if f.last > horizon {
			return fmt.Errorf("%w: %s was reused, yet file %d in it held records through %d, and only %d is published",
				ErrDamaged, tier.Name(f.slot), f.file, f.last, horizon)
		}
	}
	g := play.build(horizon)
	g.last = max(end, horizon)
	if horizon > end {
		l.meta.mu.Lock()
		err := l.meta.appendTermLocked(pos)
		l.meta.mu.Unlock()
		if err != nil {
			return l.fail(err)
		}
	}
	l.idx.Lock()
	l.gens = []*generation{g}
	l.idx.Unlock()
	l.mu.Lock()
	l.written, l.stable = max(end, horizon), max(l.stable, horizon)
	if !play.straddles(horizon) {
		l.horizon = max(l.horizon, horizon)
	}
	l.settling = false
	l.cleanLocked()
	l.mu.Unlock()
	l.SpaceFreed()
	return nil
}
