package writeback

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"slices"
	"sync"

	"github.com/tidwall/btree"

	"graindisk/block"
	"graindisk/internal/planted"
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
}

const ckptFileLen = 32

func (x *ckptIndex) encode() []byte {
	b := x.pos.append(nil)
	b = le.AppendUint32(b, uint32(len(x.files)))
	b = le.AppendUint32(b, uint32(len(x.gens)))
	for _, f := range x.files {
		b = le.AppendUint64(b, uint64(f.slot))
		b = le.AppendUint64(b, f.file)
		b = le.AppendUint64(b, uint64(f.first))
		b = le.AppendUint64(b, uint64(f.last))
	}
	for _, g := range x.gens {
		f := Frozen{gen: g}
		b = le.AppendUint64(b, uint64(g.last))
		b = le.AppendUint64(b, uint64(g.oldest))
		b = le.AppendUint32(b, uint32(len(g.disks)))
		b = le.AppendUint32(b, uint32(len(g.ops)))
		for _, id := range f.Disks() {
			b = le.AppendUint64(b, uint64(id))
			b = le.AppendUint64(b, uint64(g.disks[id].oldest))
			b = appendBlocks(b, f.Blocks(id), f.Holes(id))
		}
		for _, op := range g.ops {
			b = le.AppendUint64(b, uint64(op.Seq))
			b = le.AppendUint32(b, uint32(op.Disk))
			b = le.AppendUint32(b, uint32(len(op.Payload)))
			b = append(b, op.Payload...)
		}
	}
	return b
}

func appendBlocks(b []byte, blocks []Block, holes []Range) []byte {
	b = le.AppendUint64(b, uint64(len(blocks)))
	b = le.AppendUint64(b, uint64(len(holes)))
	for len(blocks) > 0 {
		n := 1
		for n < len(blocks) && blocks[n].LBA == blocks[0].LBA+block.LBA(n) && blocks[n].Place == blocks[0].Place+tier.Place(n) {
			n++
		}
		b = le.AppendUint64(b, uint64(blocks[0].LBA))
		b = le.AppendUint64(b, uint64(blocks[0].Place))
		b = le.AppendUint64(b, uint64(n))
		for _, x := range blocks[:n] {
			b = le.AppendUint32(b, x.CRC)
		}
		blocks = blocks[n:]
	}
	for _, h := range holes {
		b = le.AppendUint64(b, uint64(h.LBA))
		b = le.AppendUint64(b, h.Blocks)
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

func decodeCkptIndex(b []byte) (*ckptIndex, error) {
	pos, err := decodePosition(b)
	if err != nil {
		return nil, err
	}
	x := &ckptIndex{pos: pos}
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
		x.gens = append(x.gens, r.generation())
	}
	if r.bad || len(r.b) != 0 {
		return nil, errTorn
	}
	return x, nil
}

func (r *reader) generation() *generation {
	g := newGeneration(Seq(r.u64()))
	g.oldest = int64(r.u64())
	disks, ops := uint64(r.u32()), uint64(r.u32())
	for range r.count(disks, 32) {
		id := r.u64()
		if id > 1<<32-1 {
			r.bad = true
		}
		g.disks[block.DiskID(id)] = r.disk()
	}
	for range r.count(ops, 16) {
		op := OpRecord{Seq: Seq(r.u64()), Disk: block.DiskID(r.u32())}
		op.Payload = slices.Clone(r.bytes(uint64(r.u32())))
		g.ops = append(g.ops, op)
	}
	return g
}

func (r *reader) disk() *diskIndex {
	d := &diskIndex{oldest: int64(r.u64())}
	blocks, holes := r.u64(), r.u64()
	left := r.count(blocks, 4)
	d.blocks = make(map[block.LBA]loc, left)
	for left > 0 && !r.bad {
		lba, place, n := block.LBA(r.u64()), tier.Place(r.u64()), r.u64()
		if n == 0 || n > uint64(left) || place.Slot() >= tier.SlotsMax {
			r.bad = true
			break
		}
		for i := range n {
			d.blocks[lba+block.LBA(i)] = loc{place + tier.Place(i), r.u32()}
		}
		left -= int(n)
	}
	d.holes = btree.Map[block.LBA, block.LBA]{}
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
	mu         sync.Mutex
	generation uint64 // of the newest valid one, 0 if there is none
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
	c, err := l.rotateAndFreeze()
	if err != nil {
		return nil, err
	}
	if err := l.syncThrough(ctx, c.Frozen.Seq); err != nil {
		return nil, fmt.Errorf("checkpoint at %d: %w", c.Frozen.Seq, err)
	}
	return c, nil
}

func (l *Log) rotateAndFreeze() (*Checkpoint, error) {
	l.meta.mu.Lock()
	defer l.meta.mu.Unlock()
	before := l.meta.bytes
	if err := l.meta.rotateLocked(l.meta.number + 1); err != nil {
		return nil, l.fail(err)
	}
	c := &Checkpoint{Frozen: l.Freeze(), firstMeta: l.meta.number, metaBytes: before}
	c.index.pos = l.meta.pos
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

// WriteCheckpoint writes c with the pool's state into the older of the two slots and, once it is
// stable, deletes the metadata files it replaces. After an error the checkpoint before it holds.
// Of several checkpoints begun, write only the newest.
func (l *Log) WriteCheckpoint(c *Checkpoint, state []byte) error {
	if err := l.Failed(); err != nil {
		return err
	}
	l.ckpt.mu.Lock()
	defer l.ckpt.mu.Unlock()
	gen := l.ckpt.generation + 1
	name := path.Join(l.opts.Dir, ckptName(gen))
	if err := l.writeCkpt(name, gen, c, state); err != nil {
		return fmt.Errorf("write checkpoint %s: %w", name, err)
	}
	l.ckpt.generation = gen
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
	defer func() { err = errors.Join(err, f.Close()) }()
	index := c.index.encode()
	h := ckptHeader{log: l.id, generation: gen, firstMeta: c.firstMeta, seq: c.Frozen.Seq,
		indexLen: uint64(len(index)), stateLen: uint64(len(state)), indexCRC: block.CRC(index), stateCRC: block.CRC(state)}
	if err := f.WritevAt([][]byte{index, state}, block.Size); err != nil {
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

// readCkpt reads one slot; errTorn if it holds no whole checkpoint.
func readCkpt(fsys vfs.FS, name string) (h ckptHeader, x *ckptIndex, state []byte, err error) {
	b, err := readAll(fsys, name)
	if errors.Is(err, fs.ErrNotExist) {
		return h, nil, nil, errTorn
	}
	if err != nil {
		return h, nil, nil, err
	}
	return parseCkpt(b)
}

func parseCkpt(b []byte) (h ckptHeader, x *ckptIndex, state []byte, err error) {
	if h, err = decodeCkptHeader(b); err != nil {
		return h, nil, nil, err
	}
	r := &reader{b: b[block.Size:]}
	index, state := r.bytes(h.indexLen), r.bytes(h.stateLen)
	if r.bad || block.CRC(index) != h.indexCRC || block.CRC(state) != h.stateCRC {
		return h, nil, nil, errTorn
	}
	x, err = decodeCkptIndex(index)
	return h, x, state, err
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
