package densetree

import (
	"encoding/binary"
	"fmt"

	"graindisk/block"
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
