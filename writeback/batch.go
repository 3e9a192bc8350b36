package writeback

import (
	"fmt"

	"graindisk/block"
)

// batchHeader is what a batch starts with; it fills headerBlocks blocks, the payload follows.
//
//	0       4     6     8          16         32     48         56       60
//	+-------+-----+-----+----------+----------+------+----------+--------+---------+
//	| GDLB  | ver | 0   | incompat | log uuid | term | file seq | offset | hblocks |
//	+-------+-----+-----+----------+----------+------+----------+--------+---------+
//	64          72       80        84        88         92    96     104
//	+-----------+--------+---------+---------+----------+-----+------+-------------+------+------+
//	| first seq | stable | records | pblocks | prev crc | crc | time | entries …   | crcs | zero |
//	+-----------+--------+---------+---------+----------+-----+------+-------------+------+------+
//
//	entry: kind u8 | zero u8×3 | disk u32 | lba u64 | blocks u64
//	crcs:  CRC32C (plain) of each payload block, u32
//
// offset is the batch's own, in blocks from the start of the file. prev crc is that of the batch
// header before, of the file header for the first. crc covers all header blocks but itself. time
// is when the batch was written, in nanoseconds since 1970. In an OP entry lba holds the exact
// length of the payload in bytes, and blocks what that fills; UNMAP has no payload.
type batchHeader struct {
	log          UUID
	term         UUID
	file         uint64
	offset       uint32
	headerBlocks uint32
	first        Seq
	stable       Seq
	payload      uint32 // blocks
	prevCRC      uint32
	crc          uint32 // set by encode and decode
	time         int64
	entries      []entry
	crcs         []uint32
}

type entry struct {
	kind   Kind
	disk   block.DiskID
	lba    uint64 // OP: bytes of payload
	blocks uint64
}

const (
	batchMagic    = "GDLB"
	batchFixed    = 104
	batchCRCAt    = 92
	entryLen      = 24
	batchBlocks   = 1024 // payload the leader gathers for one write: 4 MiB [tune]
	opBytesMax    = 1 << 20
	headerHeadMax = 1 << 16 // blocks of header a decoder believes: far above any slot's share
)

// headerBlocks is how many blocks the header of a batch fills.
func headerBlocks(records, payload int) int {
	return blocksFor(batchFixed + entryLen*records + 4*payload)
}

// blocksAll is the length of the batch in blocks.
func (h *batchHeader) blocksAll() uint32 { return h.headerBlocks + h.payload }

// last is the sequence of the batch's last record.
func (h *batchHeader) last() Seq { return h.first + Seq(len(h.entries)) - 1 }

// payloadBlocks is how many blocks of payload the entry has.
func (e *entry) payloadBlocks() uint64 {
	if e.kind == Unmap {
		return 0
	}
	return e.blocks
}

// encode appends the header to dst[:0] and returns it.
func (h *batchHeader) encode(dst []byte) []byte {
	h.headerBlocks = uint32(headerBlocks(len(h.entries), len(h.crcs)))
	h.payload = uint32(len(h.crcs))
	b := append(dst[:0], zeroBlock[:batchFixed]...)
	putStart(b, batchMagic)
	copy(b[16:], h.log[:])
	copy(b[32:], h.term[:])
	le.PutUint64(b[48:], h.file)
	le.PutUint32(b[56:], h.offset)
	le.PutUint32(b[60:], h.headerBlocks)
	le.PutUint64(b[64:], uint64(h.first))
	le.PutUint64(b[72:], uint64(h.stable))
	le.PutUint32(b[80:], uint32(len(h.entries)))
	le.PutUint32(b[84:], h.payload)
	le.PutUint32(b[88:], h.prevCRC)
	le.PutUint64(b[96:], uint64(h.time))
	for i := range h.entries {
		b = h.entries[i].append(b)
	}
	for _, c := range h.crcs {
		b = le.AppendUint32(b, c)
	}
	b = padded(b)
	h.crc = crcAround(h.term.seed(), b, batchCRCAt)
	le.PutUint32(b[batchCRCAt:], h.crc)
	return b
}

func (e *entry) append(b []byte) []byte {
	b = append(b, byte(e.kind), 0, 0, 0)
	b = le.AppendUint32(b, uint32(e.disk))
	b = le.AppendUint64(b, e.lba)
	return le.AppendUint64(b, e.blocks)
}

// batchHeaderBlocks peeks at the first block of a header for its length in blocks; 0 if it is none.
func batchHeaderBlocks(b []byte) int {
	if len(b) < block.Size || string(b[:4]) != batchMagic {
		return 0
	}
	n := le.Uint32(b[60:])
	if n > headerHeadMax {
		return 0
	}
	return int(n)
}

// decodeBatchHeader reads a header written under term from its blocks; errTorn if it is not one.
func decodeBatchHeader(b []byte, term UUID) (*batchHeader, error) {
	n := batchHeaderBlocks(b)
	if n == 0 || len(b) < n*block.Size {
		return nil, errTorn
	}
	b = b[:n*block.Size]
	h := &batchHeader{headerBlocks: uint32(n), crc: le.Uint32(b[batchCRCAt:])}
	copy(h.log[:], b[16:])
	copy(h.term[:], b[32:])
	if h.term != term || crcAround(term.seed(), b, batchCRCAt) != h.crc {
		return nil, errTorn
	}
	if err := checkStart(b, "log batch"); err != nil {
		return nil, err
	}
	h.file = le.Uint64(b[48:])
	h.offset = le.Uint32(b[56:])
	h.first = Seq(le.Uint64(b[64:]))
	h.stable = Seq(le.Uint64(b[72:]))
	h.payload = le.Uint32(b[84:])
	h.prevCRC = le.Uint32(b[88:])
	h.time = int64(le.Uint64(b[96:]))
	records := le.Uint32(b[80:])
	need := batchFixed + entryLen*uint64(records) + 4*uint64(h.payload)
	if records == 0 || need > uint64(len(b)) || !isZero(b[need:]) {
		return nil, errTorn
	}
	var sum uint64
	h.entries = make([]entry, records)
	for i := range h.entries {
		e := &h.entries[i]
		if err := e.decode(b[batchFixed+entryLen*i:]); err != nil {
			return nil, err
		}
		sum += e.payloadBlocks()
		if sum > uint64(h.payload) {
			return nil, errTorn
		}
	}
	if sum != uint64(h.payload) {
		return nil, errTorn
	}
	h.crcs = make([]uint32, h.payload)
	for i := range h.crcs {
		h.crcs[i] = le.Uint32(b[batchFixed+entryLen*int(records)+4*i:])
	}
	return h, nil
}

// decode reads an entry from at least entryLen bytes.
func (e *entry) decode(b []byte) error {
	e.kind = Kind(b[0])
	e.disk = block.DiskID(le.Uint32(b[4:]))
	e.lba = le.Uint64(b[8:])
	e.blocks = le.Uint64(b[16:])
	if !isZero(b[1:4]) {
		return errTorn
	}
	switch e.kind {
	case Data, Unmap:
		if e.blocks == 0 || e.blocks > lbaMax || e.lba > lbaMax-e.blocks {
			return errTorn
		}
	case Op:
		if e.lba > opBytesMax || e.blocks != uint64(blocksFor(int(e.lba))) {
			return errTorn
		}
	default:
		return fmt.Errorf("%w: log record of %v", ErrNewer, e.kind)
	}
	return nil
}
