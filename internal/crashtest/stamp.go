package crashtest

import (
	"encoding/binary"
	"errors"
	"fmt"

	"graindisk/block"
)

// A Stamp says which operation of a Model wrote a block, and where. The zero Stamp is a block of
// zeroes. Every sector of a stamped block is complete in itself:
//
//	0       4      8    16    24       28    32          512
//	+-------+------+----+-----+--------+-----+------------+
//	| magic | disk | op | lba | sector | crc | filling... |
//	+-------+------+----+-----+--------+-----+------------+
//
// Integers are little-endian, crc is CRC32C over the sector without itself, and the filling differs
// from stamp to stamp, so that no two blocks compress or deduplicate into one.
type Stamp struct {
	Op   uint64 // counts from 1; 0 only in the zero Stamp
	Disk block.DiskID
	LBA  block.LBA
}

// ErrNotStamped means a block is neither zeroes nor one whole stamp: torn, or damaged.
var ErrNotStamped = errors.New("block is not one stamp")

const (
	stampMagic     = 0x54534447 // "GDST"
	stampHeaderLen = 32
)

// Fill writes the stamp all over one block.
func (s Stamp) Fill(b []byte) {
	le := binary.LittleEndian
	for i := range block.Size / SectorSize {
		p := b[i*SectorSize:][:SectorSize]
		le.PutUint32(p, stampMagic)
		le.PutUint32(p[4:], uint32(s.Disk))
		le.PutUint64(p[8:], s.Op)
		le.PutUint64(p[16:], uint64(s.LBA))
		le.PutUint32(p[24:], uint32(i))
		seed := mix(s.Op, uint64(s.Disk), uint64(s.LBA), uint64(i))
		for off := stampHeaderLen; off < SectorSize; off += 8 {
			seed = seed*6364136223846793005 + 1442695040888963407
			le.PutUint64(p[off:], seed)
		}
		le.PutUint32(p[28:], stampCRC(p))
	}
}

func stampCRC(p []byte) uint32 {
	return block.CRC(p[:28]) ^ block.CRC(p[stampHeaderLen:])
}

// ParseStamp reads the stamp of one block; the error matches ErrNotStamped.
func ParseStamp(b []byte) (Stamp, error) {
	if len(b) != block.Size {
		return Stamp{}, fmt.Errorf("%w: %d bytes", ErrNotStamped, len(b))
	}
	first, err := parseSector(b, 0)
	for i := 1; i < block.Size/SectorSize && err == nil; i++ {
		var s Stamp
		if s, err = parseSector(b, i); err == nil && s != first {
			err = fmt.Errorf("%w: sector 0 is of %v, sector %d of %v", ErrNotStamped, first, i, s)
		}
	}
	if err != nil {
		return Stamp{}, err
	}
	return first, nil
}

func parseSector(b []byte, i int) (Stamp, error) {
	p := b[i*SectorSize:][:SectorSize]
	if sector(p) == zeroes {
		return Stamp{}, nil
	}
	le := binary.LittleEndian
	s := Stamp{le.Uint64(p[8:]), block.DiskID(le.Uint32(p[4:])), block.LBA(le.Uint64(p[16:]))}
	if le.Uint32(p) != stampMagic || le.Uint32(p[24:]) != uint32(i) || le.Uint32(p[28:]) != stampCRC(p) || s.Op == 0 {
		return Stamp{}, fmt.Errorf("%w: sector %d holds something else (%x...)", ErrNotStamped, i, p[:8])
	}
	return s, nil
}

// String prints the stamp as "op 7 (disk 1, block 42)".
func (s Stamp) String() string {
	if s == (Stamp{}) {
		return "zeroes"
	}
	return fmt.Sprintf("op %d (disk %d, block %d)", s.Op, s.Disk, s.LBA)
}
