package writeback

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"slices"

	"graindisk/block"
	"graindisk/internal/planted"
	"graindisk/internal/turn"
	"graindisk/internal/vfs"
	"graindisk/tier"
)

// ckptHeader is block 0 of a checkpoint slot, ckpt-A (odd generations) or ckpt-B (even). The
// payload, index then state, follows from byte 4096.
//
//	0       4     6     8          16         32           40           48         56
//	+-------+-----+-----+----------+----------+------------+------------+----------+-----------+
//	| GDCK  | ver | 0   | incompat | log uuid | generation | first meta | S        | index len |
//	+-------+-----+-----+----------+----------+------------+------------+----------+-----------+
//	64          72          76          80                      4092
//	+-----------+-----------+-----------+-----------------------+-----+
//	| state len | index crc | state crc | zero                  | crc |
//	+-----------+-----------+-----------+-----------------------+-----+
//
// first meta is the number of the first metadata file to replay, S the sequence through which the
// checkpoint holds what was not yet published.
type ckptHeader struct {
	log        UUID
	generation uint64
	firstMeta  uint64
	seq        Seq
	indexLen   uint64
	stateLen   uint64
	indexCRC   uint32
	stateCRC   uint32
}

const ckptMagic = "GDCK"

func ckptName(generation uint64) string {
	if generation%2 == 1 {
		return "ckpt-A"
	}
	return "ckpt-B"
}

func (h *ckptHeader) encode() []byte {
	b := make([]byte, block.Size)
	putStart(b, ckptMagic)
	copy(b[16:], h.log[:])
	for i, v := range []uint64{h.generation, h.firstMeta, uint64(h.seq), h.indexLen, h.stateLen} {
		le.PutUint64(b[32+8*i:], v)
	}
	le.PutUint32(b[72:], h.indexCRC)
	le.PutUint32(b[76:], h.stateCRC)
	le.PutUint32(b[fileCRCAt:], block.CRC(b[:fileCRCAt]))
	return b
}

func decodeCkptHeader(b []byte) (h ckptHeader, err error) {
	if len(b) < block.Size || string(b[:4]) != ckptMagic || block.CRC(b[:fileCRCAt]) != le.Uint32(b[fileCRCAt:]) {
		return h, errTorn
	}
	if err := checkStart(b, "local checkpoint"); err != nil {
		return h, err
	}
	copy(h.log[:], b[16:])
	h.generation, h.firstMeta, h.seq = le.Uint64(b[32:]), le.Uint64(b[40:]), Seq(le.Uint64(b[48:]))
	h.indexLen, h.stateLen = le.Uint64(b[56:]), le.Uint64(b[64:])
	h.indexCRC, h.stateCRC = le.Uint32(b[72:]), le.Uint32(b[76:])
	if !isZero(b[80:fileCRCAt]) {
		return h, errTorn
	}
	return h, nil
}

// ckptIndex is the index part of a checkpoint.
//
//	position (40 bytes, see Term) | files u32 | generations u32
//	file:       slot u32 | zero u32 | file seq u64 | first seq u64 | last seq u64
//	generation: last seq u64 | oldest i64 | disks u32 | ops u32
//	disk:       id u32 | zero u32 | oldest i64 | blocks u64 | holes u64, then per run of blocks
//	            lba u64 | place u64 | n u64 | n × crc u32; per hole: lba u64 | blocks u64
//	op:         seq u64 | disk u32 | length u32 | payload
//
// files are the sealed ones not yet clean. blocks counts blocks, not runs.
type ckptIndex struct {
	pos   position
	files []*logFile
	gens  []*generation
	crcs  checksums // of the blocks in gens
}

const ckptFileLen = 32

// encode gives the index in pieces of about ckptPiece bytes to write, which must not keep them.
func (x *ckptIndex) encode(write func([]byte) error) error {
	b := x.pos.append(make([]byte, 0, ckptPiece+ckptPiece/8))
	var err error
	flush := func(least int) {
		if len(b) > least && err == nil {
			err = write(b)
			b = b[:0]
		}
	}
	b = le.AppendUint32(b, uint32(len(x.files)))
	b = le.AppendUint32(b, uint32(len(x.gens)))
	for _, f := range x.files {
		b = le.AppendUint64(b, uint64(f.slot))
		b = le.AppendUint64(b, f.file)
		b = le.AppendUint64(b, uint64(f.first))
		b = le.AppendUint64(b, uint64(f.last))
	}
	for _, g := range x.gens {
		f := Frozen{gen: g, crcs: x.crcs}
		disks := f.Disks()
		b = le.AppendUint64(b, uint64(g.last))
		b = le.AppendUint64(b, uint64(g.oldest))
		b = le.AppendUint32(b, uint32(len(disks)))
		b = le.AppendUint32(b, uint32(len(g.ops)))
		for _, id := range disks {
			d := g.disks[id]
			b = le.AppendUint64(b, uint64(id))
			b = le.AppendUint64(b, uint64(d.oldest))
			b = le.AppendUint64(b, uint64(d.data.blocks))
			b = le.AppendUint64(b, uint64(d.holes.Len()))
			for r := range f.Runs(id) {
				b = r.append(b)
				flush(ckptPiece)
			}
			d.holes.Scan(func(s, e block.LBA) bool {
				b = le.AppendUint64(b, uint64(s))
				b = le.AppendUint64(b, uint64(e-s))
				flush(ckptPiece)
				return true
			})
		}
		for _, op := range g.ops {
			b = le.AppendUint64(b, uint64(op.Seq))
			b = le.AppendUint32(b, uint32(op.Disk))
			b = le.AppendUint32(b, uint32(len(op.Payload)))
			b = append(b, op.Payload...)
			flush(ckptPiece)
		}
	}
	flush(0)
	return err
}

const ckptPiece = 1 << 20

func (r *Run) append(b []byte) []byte {
	b = le.AppendUint64(b, uint64(r.LBA))
	b = le.AppendUint64(b, uint64(r.Place))
	b = le.AppendUint64(b, uint64(r.Blocks))
	for _, c := range r.CRCs {
		b = le.AppendUint32(b, c)
	}
	return b
}

// reader takes fields off a slice; once it ran short everything is zero and bad is set.
type reader struct {
	b   []byte
	bad bool
}

func (r *reader) bytes(n uint64) []byte {
	if r.bad || n > uint64(len(r.b)) {
		r.bad = true
		return nil
	}
	p := r.b[:n:n]
	r.b = r.b[n:]
	return p
}

func (r *reader) u64() uint64 {
	if p := r.bytes(8); p != nil {
		return le.Uint64(p)
	}
	return 0
}

func (r *reader) u32() uint32 {
	if p := r.bytes(4); p != nil {
		return le.Uint32(p)
	}
	return 0
}

// count reads a number of things that take at least size bytes each.
func (r *reader) count(n uint64, size int) int {
	if n > uint64(len(r.b)/size) {
		r.bad = true
	}
	if r.bad {
		return 0
	}
	return int(n)
}

// decodeCkptIndex reads an index whose blocks lie on the tier of crcs, and puts their checksums there.
// Blocks in slots beyond it are left out: DropThrough refuses if they are needed. If crcs has no slots at
// all, checksums are skipped.
func decodeCkptIndex(b []byte, crcs checksums) (*ckptIndex, error) {
	pos, err := decodePosition(b)
	if err != nil {
		return nil, err
	}
	x := &ckptIndex{pos: pos, crcs: crcs}
	r := &reader{b: b[positionLen:]}
	files, gens := uint64(r.u32()), uint64(r.u32())
	for range r.count(files, ckptFileLen) {
		slot := r.u64()
		f := &logFile{slot: int(slot), file: r.u64(), first: Seq(r.u64()), last: Seq(r.u64()), full: true, synced: true, sealed: true}
		if slot >= tier.SlotsMax || f.last < f.first {
			r.bad = true
		}
		x.files = append(x.files, f)
	}
	for range r.count(gens, 24) {
		x.gens = append(x.gens, r.generation(&x.crcs))
	}
	if r.bad || len(r.b) != 0 {
		return nil, errTorn
	}
	return x, nil
}

func (r *reader) generation(crcs *checksums) *generation {
	g := newGeneration(Seq(r.u64()))
	g.oldest = int64(r.u64())
	disks, ops := uint64(r.u32()), uint64(r.u32())
	for range r.count(disks, 32) {
		id := r.u64()
		if id > 1<<32-1 || g.disks[block.DiskID(id)] != nil {
			r.bad = true
		}
		d := r.disk(crcs)
		g.disks[block.DiskID(id)] = d
		g.units += d.units()
	}
	for range r.count(ops, 16) {
		op := OpRecord{Seq: Seq(r.u64()), Disk: block.DiskID(r.u32())}
		op.Payload = slices.Clone(r.bytes(uint64(r.u32())))
		g.disk(op.Disk, g.oldest).ops++
		g.ops = append(g.ops, op)
		g.units++
	}
	return g
}

func (r *reader) disk(crcs *checksums) *diskIndex {
	d := &diskIndex{oldest: int64(r.u64())}
	blocks, holes := r.u64(), r.u64()
	left := r.count(blocks, 4)
	fill := filler{t: &d.data}
	for left > 0 && !r.bad {
		head := r.bytes(24)
		if head == nil {
			break
		}
		lba, place, n := le.Uint64(head), tier.Place(le.Uint64(head[8:])), le.Uint64(head[16:])
		if n == 0 || n > uint64(left) || lba > lbaMax-n || place.Slot() >= tier.SlotsMax {
			r.bad = true
			break
		}
		sums := r.bytes(4 * n)
		left -= int(n)
		if len(crcs.slots) > 0 {
			if place.Slot() >= len(crcs.slots) {
				continue
			}
			r.bad = r.bad || !crcs.putEncoded(place, sums)
		}
		if !r.bad {
			fill.set(block.LBA(lba), int(n), place)
		}
	}
	fill.flush()
	for range r.count(holes, 16) {
		lba, n := r.u64(), r.u64()
		if n == 0 || n > lbaMax || lba > lbaMax-n {
			r.bad = true
			break
		}
		d.addHole(block.LBA(lba), block.LBA(lba+n))
	}
	return d
}

// checkpointer writes checkpoints, one at a time.
type checkpointer struct {
	mu         turn.Lock // held over a checkpoint, from the freeze to the fold; before meta.mu
	generation uint64    // of the newest valid one, 0 if there is none
	firstMeta  uint64    // that the newest one written by this Log names
}

// Checkpoint is what FreezeAndRotate captured, to be written by WriteCheckpoint.
type Checkpoint struct {
	// Frozen is the generation the freeze ended. It takes its place in the row to be published.
	Frozen    *Frozen
	index     ckptIndex
	firstMeta uint64
	metaBytes int64 // of the files before firstMeta
}

// FreezeAndRotate begins a local checkpoint: it starts a new metadata file, freezes the index, and
// makes the log stable through the freeze. The state given to WriteCheckpoint must hold the effect
// of all AppendMeta calls before this one; those after it are replayed on top.
func (l *Log) FreezeAndRotate(ctx context.Context) (*Checkpoint, error) {
	if err := l.Failed(); err != nil {
		return nil, err
	}
	l.ckpt.mu.Lock()
	defer l.ckpt.mu.Unlock()
	c, err := l.rotateAndFreeze(ctx, false)
	if err != nil {
		return nil, err
	}
	if err := l.syncThrough(ctx, c.Frozen.Seq); err != nil {
		return nil, fmt.Errorf("checkpoint at %d: %w", c.Frozen.Seq, err)
	}
	return c, nil
}

func (l *Log) rotateAndFreeze(ctx context.Context, split bool) (c *Checkpoint, err error) {
	err = l.withMeta(ctx, func(m *metaLog) (err error) {
		c, err = l.rotateAndFreezeLocked(m, split)
		return err
	})
	return c, err
}

func (l *Log) rotateAndFreezeLocked(m *metaLog, split bool) (*Checkpoint, error) {
	before := m.bytes
	if err := m.rotateLocked(m.number + 1); err != nil {
		return nil, err
	}
	c := &Checkpoint{Frozen: l.freeze(split), firstMeta: l.meta.number, metaBytes: before}
	c.index.pos, c.index.crcs = l.meta.pos, c.Frozen.crcs
	l.idx.RLock()
	for _, g := range l.gens {
		if g.last <= c.Frozen.Seq && g != l.gens[len(l.gens)-1] {
			c.index.gens = append(c.index.gens, g)
		}
	}
	l.idx.RUnlock()
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, f := range l.files {
		if f.sealed {
			c.index.files = append(c.index.files, f)
		}
	}
	return c, nil
}

// Checkpoint writes a local checkpoint that ends no generation: it bounds recovery while nothing can be
// published. state is called once, after which no AppendMeta is missing from what it returns: the
// caller sees to it that none runs between the call of Checkpoint and the return of state. What is
// appended meanwhile is folded into the index afterwards. Freeze waits for it.
func (l *Log) Checkpoint(ctx context.Context, state func() ([]byte, error)) error {
	if err := l.Failed(); err != nil {
		return err
	}
	l.ckpt.mu.Lock()
	defer l.ckpt.mu.Unlock()
	c, err := l.rotateAndFreeze(ctx, true)
	if err != nil {
		return err
	}
	defer l.fold(c.Frozen.gen)
	b, err := state()
	if err != nil {
		return err
	}
	if err := l.syncThrough(ctx, c.Frozen.Seq); err != nil {
		return fmt.Errorf("checkpoint at %d: %w", c.Frozen.Seq, err)
	}
	return l.writeCheckpointLocked(c, b)
}

// foldUnits is how much is folded under one hold of the index lock: less than a millisecond.
const foldUnits = 1024

// fold puts the active generation back into g, which a checkpoint split off before it and nobody else
// has. Each step leaves every lookup what it was.
func (l *Log) fold(g *generation) {
	for done := false; !done; {
		l.idx.Lock()
		n := len(l.gens)
		if done = g.takeOver(l.gens[n-1], foldUnits); done {
			l.gens = slices.Delete(l.gens, n-1, n) // g is the active one again
			g.split = false
		}
		l.idx.Unlock()
	}
}

// takeOver moves about so many holes and runs of the generation after g into g; it reports true when
// nothing is left of that. On each disk holes go first: a block that leaves a generation where a hole
// covers it would be hidden by that hole.
func (g *generation) takeOver(from *generation, units int) (all bool) {
	for id, d := range from.disks {
		to := g.disk(id, d.oldest)
		before, beforeFrom := to.units(), d.units()
		for s, e, ok := d.holes.Min(); ok && units > 0; s, e, ok = d.holes.Min() {
			d.holes.Delete(s)
			to.unmap(s, e)
			units--
		}
		for d.data.blocks > 0 && units > 0 {
			for _, r := range d.data.takeLeaf() {
				to.data.set(r.lba(), r.blocks(), r.place)
				units--
			}
		}
		if units > 0 {
			to.ops += d.ops
			delete(from.disks, id)
			d.ops = 0
		}
		g.units += to.units() - before
		from.units += d.units() - beforeFrom
		if units <= 0 {
			return false
		}
	}
	g.mergeRest(from)
	return true
}

// WriteCheckpoint writes c with the pool's state into the older of the two slots and, once it is
// stable, deletes the metadata files it replaces. After an error the checkpoint before it holds. If a
// checkpoint that was begun later is written already, that holds more than c, and nothing is done.
func (l *Log) WriteCheckpoint(c *Checkpoint, state []byte) error {
	l.ckpt.mu.Lock()
	defer l.ckpt.mu.Unlock()
	return l.writeCheckpointLocked(c, state)
}

func (l *Log) writeCheckpointLocked(c *Checkpoint, state []byte) error {
	if err := l.Failed(); err != nil {
		return err
	}
	if c.firstMeta <= l.ckpt.firstMeta {
		return nil
	}
	gen := l.ckpt.generation + 1
	name := path.Join(l.opts.Dir, ckptName(gen))
	if err := l.writeCkpt(name, gen, c, state); err != nil {
		if refused(err) {
			l.obstructed(onCheckpoint, err)
		}
		return fmt.Errorf("write checkpoint %s: %w", name, err)
	}
	l.passed(onCheckpoint)
	l.ckpt.generation, l.ckpt.firstMeta = gen, c.firstMeta
	l.meta.mu.Lock()
	l.meta.bytes -= c.metaBytes
	l.meta.mu.Unlock()
	if err := removeMeta(l.fs, l.opts.Dir, func(n uint64) bool { return n < c.firstMeta }); err != nil {
		return fmt.Errorf("after checkpoint %s: %w", name, err)
	}
	return nil
}

// writeCkpt empties the slot, which holds nothing needed, and fills it: payload first, header last.
func (l *Log) writeCkpt(name string, gen uint64, c *Checkpoint, state []byte) (err error) {
	f, err := l.fs.Create(name)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = f.Truncate(0) // gives space back; the slot holds nothing
		}
		err = errors.Join(err, f.Close())
	}()
	h := ckptHeader{log: l.id, generation: gen, firstMeta: c.firstMeta, seq: c.Frozen.Seq,
		stateLen: uint64(len(state)), stateCRC: block.CRC(state)}
	err = c.index.encode(func(p []byte) error {
		_, err := f.WriteAt(p, block.Size+int64(h.indexLen))
		h.indexLen += uint64(len(p))
		h.indexCRC = crcSeeded(h.indexCRC, p)
		return err
	})
	if err == nil && len(state) > 0 {
		_, err = f.WriteAt(state, block.Size+int64(h.indexLen))
	}
	if err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	if _, err := f.WriteAt(h.encode(), 0); err != nil || planted.Bug("checkpoint: metadata log cut before it is stable") {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	return l.fs.SyncDir(l.opts.Dir)
}

// removeMeta deletes the metadata files whose numbers are dead.
func removeMeta(fsys vfs.FS, dir string, dead func(uint64) bool) error {
	numbers, err := metaNumbers(fsys, dir)
	if err != nil {
		return err
	}
	removed := false
	for _, n := range numbers {
		if !dead(n) {
			continue
		}
		if err := fsys.Remove(path.Join(dir, metaName(n))); err != nil {
			return err
		}
		removed = true
	}
	if removed {
		return fsys.SyncDir(dir)
	}
	return nil
}

func metaNumbers(fsys vfs.FS, dir string) (list []uint64, err error) {
	names, err := fsys.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	for _, e := range names {
		if n, ok := parseMetaName(e.Name()); ok {
			list = append(list, n)
		}
	}
	slices.Sort(list)
	return list, nil
}

// readCkpt reads one slot, into crcs too; errTorn if it holds no whole checkpoint.
func readCkpt(fsys vfs.FS, name string, crcs checksums) (h ckptHeader, x *ckptIndex, state []byte, err error) {
	b, err := readAll(fsys, name)
	if errors.Is(err, fs.ErrNotExist) {
		return h, nil, nil, errTorn
	}
	if err != nil {
		return h, nil, nil, err
	}
	return parseCkpt(b, crcs)
}

func parseCkpt(b []byte, crcs checksums) (h ckptHeader, x *ckptIndex, state []byte, err error) {
	if h, err = decodeCkptHeader(b); err != nil {
		return h, nil, nil, err
	}
	r := &reader{b: b[block.Size:]}
	index, state := r.bytes(h.indexLen), r.bytes(h.stateLen)
	if r.bad || block.CRC(index) != h.indexCRC || block.CRC(state) != h.stateCRC {
		return h, nil, nil, errTorn
	}
	x, err = decodeCkptIndex(index, crcs)
	return h, x, slices.Clone(state), err
}

func readAll(fsys vfs.FS, name string) ([]byte, error) {
	f, err := fsys.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	size, err := f.Size()
	if err != nil {
		return nil, err
	}
	b := make([]byte, size)
	if _, err := f.ReadAt(b, 0); err != nil && !(errors.Is(err, io.EOF) && size == 0) {
		return nil, err
	}
	return b, nil
}
