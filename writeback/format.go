package writeback

import (
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"hash/crc32"

	"graindisk/block"
)

// What callers branch on.
var (
	// ErrFailed means a write or sync of the log failed; it takes no more appends or syncs.
	ErrFailed = errors.New("the log has failed")
	// ErrClosed means the log was closed.
	ErrClosed = errors.New("the log is closed")
	// ErrNewer means a newer version of the format, or an incompat bit this reader does not know.
	ErrNewer = errors.New("written by a newer version")
	// ErrDamaged means bytes that were stable are missing or fail their checksum.
	ErrDamaged = errors.New("log damaged")
	// ErrForeign means the log belongs to another pool.
	ErrForeign = errors.New("log of another pool")
	// ErrExists means Create met a log.
	ErrExists = errors.New("log exists")
	// ErrNoLog means Open met none.
	ErrNoLog = errors.New("no log")
	// errTorn means bytes that are not a whole, valid header or record: at the tail a crash explains
	// it, elsewhere it is damage.
	errTorn = errors.New("not valid")
)

// Seq numbers a record; the first is 1 and it rises by one per record for the life of the log.
type Seq uint64

// UUID is 128 random bits naming a log, a pool or a term.
type UUID [16]byte

// String prints the UUID in hex.
func (u UUID) String() string { return hex.EncodeToString(u[:]) }

// seed is where the checksums of headers written under a term start.
func (u UUID) seed() uint32 { return block.CRC(u[:]) }

// Kind says what a record is.
type Kind uint8

// The kinds of records. Their numbers are frozen.
const (
	Data    Kind = 1 // blocks of a disk
	dataRef Kind = 2 // reserved: blocks kept in a bulk file
	Unmap   Kind = 3 // a range of a disk that reads as zeroes
	Op      Kind = 4 // opaque to the log
)

// String names the kind.
func (k Kind) String() string {
	switch k {
	case Data:
		return "data"
	case dataRef:
		return "dataref"
	case Unmap:
		return "unmap"
	case Op:
		return "op"
	}
	return fmt.Sprintf("kind %d", uint8(k))
}

const formatVersion = 1

// lbaMax bounds a disk: 2^52 blocks of 4 KiB fill 64 bits of byte offset.
const lbaMax = 1 << 52

var (
	le        = binary.LittleEndian
	zeroBlock [block.Size]byte
)

// crcSeeded continues a checksum from seed over p.
func crcSeeded(seed uint32, p []byte) uint32 { return crc32.Update(seed, block.Castagnoli, p) }

// crcAround is the seeded checksum of p with the four bytes at `at` taken as zero.
func crcAround(seed uint32, p []byte, at int) uint32 {
	c := crcSeeded(seed, p[:at])
	c = crcSeeded(c, zeroBlock[:4])
	return crcSeeded(c, p[at+4:])
}

// putStart writes what every format starts with: magic, version, flags 0, incompat 0.
func putStart(b []byte, magic string) {
	copy(b, magic)
	le.PutUint16(b[4:], formatVersion)
}

// checkStart checks version, flags and incompat bits of a header whose checksum was right.
func checkStart(b []byte, what string) error {
	if v := le.Uint16(b[4:]); v != formatVersion {
		return fmt.Errorf("%w: %s of version %d, this program knows %d", ErrNewer, what, v, formatVersion)
	}
	if bits := le.Uint64(b[8:]); bits != 0 {
		return fmt.Errorf("%w: %s with unknown incompat bits %#x", ErrNewer, what, bits)
	}
	return nil
}

func isZero(p []byte) bool {
	for _, c := range p {
		if c != 0 {
			return false
		}
	}
	return true
}

// blocksFor is how many blocks n bytes fill.
func blocksFor(n int) int { return (n + block.Size - 1) / block.Size }

// padded grows b with zeroes to whole blocks.
func padded(b []byte) []byte {
	return append(b, zeroBlock[:blocksFor(len(b))*block.Size-len(b)]...)
}
