package densetree

import (
	"fmt"

	"graindisk/block"
	"graindisk/internal/planted"
)

// Kind says what a range of a disk is made of.
type Kind uint8

const (
	None Kind = iota // never written: nothing in this tree says anything about it
	Data             // stored in an extent
	Hole             // zeroes, written or trimmed
	Base             // not here: the same LBA of the version below
)

// String is the kind's name as the tools print it.
func (k Kind) String() string {
	switch k {
	case None:
		return "none"
	case Data:
		return "data"
	case Hole:
		return "hole"
	case Base:
		return "base"
	}
	return fmt.Sprintf("kind(%d)", uint8(k))
}

// EndMax is the highest end a range may have, in blocks: its byte offset still fits in 64 bits.
const EndMax block.LBA = 1 << 52

// Entry maps [LBA, LBA+Blocks). Blocks is at least 1, below 2^16 for Data.
type Entry struct {
	LBA    block.LBA
	Blocks uint64
	Kind   Kind
	Extent block.ExtentID // Data only
	Off    uint16         // Data only: the extent's block that LBA is, Off+Blocks <= Orig
	Orig   uint16         // Data only: blocks of the whole extent when it was stored
}

// End is the first LBA behind the entry.
func (e Entry) End() block.LBA { return e.LBA + block.LBA(e.Blocks) }

func (e Entry) validate() error {
	switch {
	case e.Kind != Data && e.Kind != Hole && e.Kind != Base:
		return fmt.Errorf("entry at %d: %v cannot be stored", e.LBA, e.Kind)
	case e.Blocks == 0:
		return fmt.Errorf("entry at %d is empty", e.LBA)
	case e.LBA >= EndMax || e.Blocks > uint64(EndMax-e.LBA):
		return fmt.Errorf("entry at %d of %d blocks ends beyond %d", e.LBA, e.Blocks, EndMax)
	case e.Kind == Data && uint64(e.Off)+e.Blocks > uint64(e.Orig):
		return fmt.Errorf("entry at %d: blocks [%d,+%d) of extent %v, which has %d", e.LBA, e.Off, e.Blocks, e.Extent, e.Orig)
	}
	return nil
}

// packed is an Entry in 24 bytes without pointers: 384 MiB per TiB of 64 KiB extents.
// A Data entry is shorter than 2^16 blocks, because Orig is; the others need no extent name
// and keep their length in its place.
type packed struct {
	key    uint64 // LBA << 2 | kind
	ref    uint64 // Data: the extent's name; Hole, Base: blocks
	blocks uint16 // Data only, as the next two
	off    uint16
	orig   uint16
}

const packedBytes = 24

func pack(e Entry) packed {
	p := packed{key: uint64(e.LBA)<<2 | uint64(e.Kind), ref: e.Blocks}
	if e.Kind == Data {
		p.ref, p.blocks, p.off, p.orig = uint64(e.Extent), uint16(e.Blocks), e.Off, e.Orig
	}
	return p
}

func (p packed) entry() Entry {
	e := Entry{LBA: p.start(), Blocks: p.len(), Kind: p.kind()}
	if e.Kind == Data {
		e.Extent, e.Off, e.Orig = block.ExtentID(p.ref), p.off, p.orig
	}
	return e
}

func (p packed) kind() Kind       { return Kind(p.key & 3) }
func (p packed) start() block.LBA { return block.LBA(p.key >> 2) }
func (p packed) end() block.LBA   { return p.start() + block.LBA(p.len()) }

func (p packed) len() uint64 {
	if p.kind() == Data {
		return uint64(p.blocks)
	}
	return p.ref
}

// clip is the part of p inside [lba, end), which must not be empty.
func (p packed) clip(lba, end block.LBA) packed {
	head, tail := max(p.start(), lba)-p.start(), p.end()-min(p.end(), end)
	if p.kind() == Data {
		if !planted.Bug("map: the rest of an extent is found at its start") {
			p.off += uint16(head)
		}
		p.blocks -= uint16(head + tail)
	} else {
		p.ref -= uint64(head + tail)
	}
	p.key += uint64(head) << 2
	return p
}

// continues reports whether next maps what follows p, so that one entry can say both.
func (p packed) continues(next packed) bool {
	if p.kind() != next.kind() || p.end() != next.start() {
		return false
	}
	return p.kind() != Data || p.ref == next.ref && p.off+p.blocks == next.off && p.orig == next.orig
}

// join is p and next in one, after continues(next).
func (p packed) join(next packed) packed {
	if p.kind() == Data {
		p.blocks += next.blocks
	} else {
		p.ref += next.ref
	}
	return p
}

// sameBlocks reports whether p and q, both Data, map each LBA they share to the same stored block.
func (p packed) sameBlocks(q packed) bool {
	return p.ref == q.ref && uint64(p.start())-uint64(p.off) == uint64(q.start())-uint64(q.off)
}

// Loss is blocks of an extent that nothing in the tree maps any longer.
type Loss struct {
	Extent block.ExtentID
	Orig   uint16 // blocks of the whole extent, as its entries said
	Blocks uint16 // how many of them are lost
}

// appendLoss notes what of old disappears behind newer, which overlaps it.
func appendLoss(lost []Loss, old, newer packed) []Loss {
	if old.kind() != Data || newer.kind() == Data && old.sameBlocks(newer) {
		return lost
	}
	hidden := old.clip(newer.start(), newer.end())
	return append(lost, Loss{block.ExtentID(old.ref), old.orig, hidden.blocks})
}
