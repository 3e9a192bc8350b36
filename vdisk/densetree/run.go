package densetree

import (
	"encoding/binary"
	"errors"
	"fmt"

	"graindisk/block"
)

var (
	// ErrCorrupt means bytes or a set of runs that no tree has written.
	ErrCorrupt = errors.New("damaged run")
	// ErrNewer means a run written by a newer version of the format.
	ErrNewer = errors.New("run format is newer than this program")
)

// Run is an immutable sorted row of entries on one level, never empty. Its ID names its content
// within the tree: runs with the same ID encode to the same bytes.
type Run struct {
	ID    uint64
	Level int       // 0 only in a Snapshot
	First block.LBA // first block covered
	Last  block.LBA // last block covered
	es    []packed
}

func newRun(id uint64, level int, es []packed) *Run {
	return &Run{ID: id, Level: level, First: es[0].start(), Last: es[len(es)-1].end() - 1, es: es}
}

// Len is the number of entries.
func (r *Run) Len() int { return len(r.es) }

// Each tells fn the entries in LBA order until it returns false.
func (r *Run) Each(fn func(Entry) bool) {
	for _, p := range r.es {
		if !fn(p.entry()) {
			return
		}
	}
}

// The encoded header; offsets as drawn in the package comment.
const (
	runMagic   = "GDRN"
	runVersion = 1
	offVersion = 4
	offFlags   = 6
	offIncomp  = 8
	offID      = 16
	offLevel   = 24
	offCount   = 28
	offFirst   = 32
	offLast    = 40
	offBody    = 48
	headerLen  = 52
	crcLen     = 4
)

// The tag byte of an encoded entry.
const (
	tagKind   = 3
	tagGap    = 1 << 2
	tagBlocks = 1 << 3
	tagExtent = 1 << 4
	tagPart   = 1 << 5
	tagKnown  = 1<<6 - 1
)

// Encode is the run in its stored form.
func (r *Run) Encode() []byte {
	b := make([]byte, headerLen, headerLen+8*len(r.es)+crcLen)
	copy(b, runMagic)
	binary.LittleEndian.PutUint16(b[offVersion:], runVersion)
	binary.LittleEndian.PutUint64(b[offID:], r.ID)
	binary.LittleEndian.PutUint32(b[offLevel:], uint32(r.Level))
	binary.LittleEndian.PutUint32(b[offCount:], uint32(len(r.es)))
	binary.LittleEndian.PutUint64(b[offFirst:], uint64(r.First))
	binary.LittleEndian.PutUint64(b[offLast:], uint64(r.Last))
	d := delta{lba: r.First}
	for _, p := range r.es {
		b = d.append(b, p)
	}
	binary.LittleEndian.PutUint32(b[offBody:], uint32(len(b)-headerLen))
	return binary.LittleEndian.AppendUint32(b, block.CRC(b))
}

// delta is what one entry inherits from those before it; the same in writing and reading.
type delta struct {
	lba    block.LBA // where the next entry starts without a gap
	extent uint64    // the next extent's name if none is told
	blocks uint16    // of the last data entry
}

func (d *delta) follow(p packed) {
	d.lba = p.end()
	if p.kind() == Data {
		d.extent, d.blocks = p.ref+1, p.blocks
	}
}

func (d *delta) append(b []byte, p packed) []byte {
	tagAt := len(b)
	tag := byte(p.kind())
	b = append(b, 0)
	if p.start() != d.lba {
		tag |= tagGap
		b = binary.AppendUvarint(b, uint64(p.start()-d.lba))
	}
	if p.kind() != Data || p.blocks != d.blocks {
		tag |= tagBlocks
		b = binary.AppendUvarint(b, p.len())
	}
	if p.kind() == Data && p.ref != d.extent {
		tag |= tagExtent
		b = binary.AppendVarint(b, int64(p.ref-d.extent))
	}
	if p.kind() == Data && (p.off != 0 || p.orig != p.blocks) {
		tag |= tagPart
		b = binary.AppendUvarint(b, uint64(p.off))
		b = binary.AppendUvarint(b, uint64(p.orig))
	}
	b[tagAt] = tag
	d.follow(p)
	return b
}

// RunLen is the length of the encoded run at the head of b, for runs that lie back to back.
func RunLen(b []byte) (int, error) {
	if len(b) < headerLen || string(b[:offVersion]) != runMagic {
		return 0, fmt.Errorf("densetree: no run here: %w", ErrCorrupt)
	}
	n := headerLen + int64(binary.LittleEndian.Uint32(b[offBody:])) + crcLen
	if n > int64(len(b)) {
		return 0, fmt.Errorf("densetree: run of %d bytes in %d: %w", n, len(b), ErrCorrupt)
	}
	return int(n), nil
}

// DecodeRun reads what Encode wrote; b is not kept. Errors match ErrCorrupt or ErrNewer.
func DecodeRun(b []byte) (*Run, error) {
	if err := checkHeader(b); err != nil {
		return nil, fmt.Errorf("densetree: decode run: %w", err)
	}
	r := &Run{
		ID:    binary.LittleEndian.Uint64(b[offID:]),
		Level: int(binary.LittleEndian.Uint32(b[offLevel:])),
	}
	count := int(binary.LittleEndian.Uint32(b[offCount:]))
	d := delta{lba: block.LBA(binary.LittleEndian.Uint64(b[offFirst:]))}
	in := varints{b: b[headerLen : len(b)-crcLen]}
	if r.Level > levelsMax || count == 0 || count > min(runMax, len(in.b)) {
		return nil, fmt.Errorf("densetree: decode run %d: %w: %d entries in %d bytes on level %d",
			r.ID, ErrCorrupt, count, len(in.b), r.Level)
	}
	r.es = make([]packed, 0, count) // an entry takes at least one byte
	for range count {
		p, err := d.read(&in)
		if err != nil {
			return nil, fmt.Errorf("densetree: decode run %d: entry %d: %w", r.ID, len(r.es), err)
		}
		r.es = append(r.es, p)
	}
	r.First, r.Last = r.es[0].start(), r.es[count-1].end()-1
	if len(in.b) > 0 || uint64(r.First) != binary.LittleEndian.Uint64(b[offFirst:]) ||
		uint64(r.Last) != binary.LittleEndian.Uint64(b[offLast:]) {
		return nil, fmt.Errorf("densetree: decode run %d: %w: entries cover [%d, %d] with %d bytes left",
			r.ID, ErrCorrupt, r.First, r.Last, len(in.b))
	}
	return r, nil
}

// checkHeader checks everything of b that can be checked without reading the entries.
func checkHeader(b []byte) error {
	if len(b) < headerLen+crcLen || string(b[:offVersion]) != runMagic {
		return fmt.Errorf("%w: not a run", ErrCorrupt)
	}
	if v := binary.LittleEndian.Uint16(b[offVersion:]); v > runVersion {
		return fmt.Errorf("%w: version %d", ErrNewer, v)
	}
	if bits := binary.LittleEndian.Uint64(b[offIncomp:]); bits != 0 {
		return fmt.Errorf("%w: incompat bits %#x", ErrNewer, bits)
	}
	body := b[:len(b)-crcLen]
	if got, want := block.CRC(body), binary.LittleEndian.Uint32(b[len(body):]); got != want {
		return fmt.Errorf("%w: crc %08x, stored %08x", ErrCorrupt, got, want)
	}
	if binary.LittleEndian.Uint16(b[offVersion:]) != runVersion ||
		binary.LittleEndian.Uint16(b[offFlags:]) != 0 ||
		int64(binary.LittleEndian.Uint32(b[offBody:])) != int64(len(body)-headerLen) {
		return fmt.Errorf("%w: header", ErrCorrupt)
	}
	return nil
}

// read decodes the next entry.
func (d *delta) read(in *varints) (packed, error) {
	tag := in.byte()
	if tag&^tagKnown != 0 {
		return packed{}, fmt.Errorf("%w: tag %#x", ErrCorrupt, tag)
	}
	e := Entry{LBA: d.lba, Kind: Kind(tag & tagKind), Blocks: uint64(d.blocks)}
	var gap uint64
	if tag&tagGap != 0 {
		gap = in.uint(uint64(EndMax))
	}
	if tag&tagBlocks != 0 {
		e.Blocks = in.uint(uint64(EndMax))
	} else if e.Kind != Data {
		e.Blocks = 0 // refused below
	}
	e.LBA += block.LBA(gap) // neither exceeds EndMax
	if e.Kind == Data {
		extent := d.extent
		if tag&tagExtent != 0 {
			extent += uint64(in.int())
		}
		e.Extent, e.Orig = block.ExtentID(extent), uint16(min(e.Blocks, 1<<16-1))
		if tag&tagPart != 0 {
			e.Off, e.Orig = uint16(in.uint(1<<16-1)), uint16(in.uint(1<<16-1))
		}
	} else if tag&(tagExtent|tagPart) != 0 {
		return packed{}, fmt.Errorf("%w: tag %#x", ErrCorrupt, tag)
	}
	if in.bad {
		return packed{}, fmt.Errorf("%w: cut short or out of bounds", ErrCorrupt)
	}
	if err := e.validate(); err != nil {
		return packed{}, fmt.Errorf("%w: %w", ErrCorrupt, err)
	}
	p := pack(e)
	d.follow(p)
	return p, nil
}

// varints takes numbers off the front of b; bad is set when one was cut short or too large.
type varints struct {
	b   []byte
	bad bool
}

func (v *varints) byte() byte {
	if len(v.b) == 0 {
		v.bad = true
		return 0
	}
	c := v.b[0]
	v.b = v.b[1:]
	return c
}

func (v *varints) uint(max uint64) uint64 {
	x, n := binary.Uvarint(v.b)
	if n <= 0 || x > max {
		v.bad = true
		return 0
	}
	v.b = v.b[n:]
	return x
}

func (v *varints) int() int64 {
	x, n := binary.Varint(v.b)
	if n <= 0 {
		v.bad = true
		return 0
	}
	v.b = v.b[n:]
	return x
}
