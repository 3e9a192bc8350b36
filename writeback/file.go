package writeback

import (
	"graindisk/block"
)

// fileHeader is block 0 of a log file.
//
//	0       4     6     8          16         32     48         56     60
//	+-------+-----+-----+----------+----------+------+----------+------+-------------+
//	| GDLF  | ver | 0   | incompat | log uuid | term | file seq | slot | slot blocks |
//	+-------+-----+-----+----------+----------+------+----------+------+-------------+
//	64          72       80         84                          4092
//	+-----------+--------+----------+---------------------------+-----+
//	| first seq | stable | prev crc | zero                      | crc |
//	+-----------+--------+----------+---------------------------+-----+
//
// prev crc is that of the last batch header of the file before, 0 in the first file of a term.
// The header is written together with the file's first batch.
type fileHeader struct {
	log        UUID
	term       UUID
	file       uint64 // file sequence: rises by one per file of a term, never falls
	slot       uint32
	slotBlocks uint32
	first      Seq // of the first record
	stable     Seq
	prevCRC    uint32
	crc        uint32 // set by encode and decode
}

const (
	fileMagic = "GDLF"
	fileCRCAt = block.Size - 4
)

func (h *fileHeader) encode() []byte {
	b := make([]byte, block.Size)
	putStart(b, fileMagic)
	copy(b[16:], h.log[:])
	copy(b[32:], h.term[:])
	le.PutUint64(b[48:], h.file)
	le.PutUint32(b[56:], h.slot)
	le.PutUint32(b[60:], h.slotBlocks)
	le.PutUint64(b[64:], uint64(h.first))
	le.PutUint64(b[72:], uint64(h.stable))
	le.PutUint32(b[80:], h.prevCRC)
	h.crc = crcSeeded(h.term.seed(), b[:fileCRCAt])
	le.PutUint32(b[fileCRCAt:], h.crc)
	return b
}

// decodeFileHeader reads block 0 of a slot; errTorn if it is not a file header.
func decodeFileHeader(b []byte) (h fileHeader, err error) {
	if len(b) < block.Size || string(b[:4]) != fileMagic {
		return h, errTorn
	}
	copy(h.log[:], b[16:])
	copy(h.term[:], b[32:])
	h.crc = le.Uint32(b[fileCRCAt:])
	if crcSeeded(h.term.seed(), b[:fileCRCAt]) != h.crc {
		return h, errTorn
	}
	if err := checkStart(b, "log file"); err != nil {
		return h, err
	}
	h.file = le.Uint64(b[48:])
	h.slot = le.Uint32(b[56:])
	h.slotBlocks = le.Uint32(b[60:])
	h.first = Seq(le.Uint64(b[64:]))
	h.stable = Seq(le.Uint64(b[72:]))
	h.prevCRC = le.Uint32(b[80:])
	if !isZero(b[84:fileCRCAt]) {
		return h, errTorn
	}
	return h, nil
}
