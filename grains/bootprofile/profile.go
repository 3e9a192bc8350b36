// Package bootprofile remembers what a disk reads first, so that the next time it can be on the local tier
// before it is asked for.
//
//	attach ─► Recorder: the grains read within a while, in that order ─► Profile ─► file, checkpoint
//	next time ─► Profile ─► read ahead of the guest, in the background
//
// A profile is a hint: it names places of a disk, not what is stored there, so one that is old, or of an
// older state of the disk, is never wrong, only of less use. Integers are little-endian.
//
//	0      4         6       8          16          32     36       40     44
//	+------+---------+-------+----------+-----------+------+--------+------+------------+-----+
//	| GDBP | version | flags | incompat | pool uuid | disk | ranges | body | ranges ... | crc |
//	+------+---------+-------+----------+-----------+------+--------+------+------------+-----+
//
//	range:  varint first block minus the end of the range before (at first minus 0), uvarint blocks
//
// in the order in which they were first read; no two overlap. body is the length of the ranges in bytes, crc
// is CRC32C over everything before it. The pool's uuid and the disk's number are those of the disk.
package bootprofile

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"graindisk/block"
)

var (
	// ErrDamaged means bytes that are no profile.
	ErrDamaged = errors.New("damaged boot profile")
	// ErrNewer means a profile written by a newer version of the format.
	ErrNewer = errors.New("boot profile is newer than this program")
)

const (
	magic     = "GDBP"
	version   = 1
	headerLen = 44
	crcLen    = 4
	rangeMax  = 2 * binary.MaxVarintLen64
	// lbaMax bounds what a range may name: more than any disk has.
	lbaMax = 1 << 48
)

// RangesMax is how many ranges a profile has at most: some 8 KiB.
const RangesMax = 2048

// BytesMax is the longest an encoded profile can be.
const BytesMax = headerLen + RangesMax*rangeMax + crcLen

// Range is blocks of a disk; never empty.
type Range struct {
	First  block.LBA
	Blocks uint32
}

func (r Range) end() block.LBA { return r.First + block.LBA(r.Blocks) }

// Profile is what a disk read first.
type Profile struct {
	Pool   [16]byte
	Disk   block.DiskID
	Ranges []Range // in the order of reading; at most RangesMax
}

// Blocks is how many there are in all ranges.
func (p Profile) Blocks() (n int64) {
	for _, r := range p.Ranges {
		n += int64(r.Blocks)
	}
	return n
}

// Encode is the profile as drawn in the package comment.
func (p Profile) Encode() []byte {
	b := make([]byte, headerLen, headerLen+8*len(p.Ranges))
	copy(b, magic)
	binary.LittleEndian.PutUint16(b[4:], version)
	copy(b[16:], p.Pool[:])
	binary.LittleEndian.PutUint32(b[32:], uint32(p.Disk))
	binary.LittleEndian.PutUint32(b[36:], uint32(len(p.Ranges)))
	last := block.LBA(0)
	for _, r := range p.Ranges {
		b = binary.AppendVarint(b, int64(r.First-last))
		b = binary.AppendUvarint(b, uint64(r.Blocks))
		last = r.end()
	}
	binary.LittleEndian.PutUint32(b[40:], uint32(len(b)-headerLen))
	return binary.LittleEndian.AppendUint32(b, block.CRC(b))
}

// Decode reads a profile. Errors match ErrDamaged or ErrNewer.
func Decode(b []byte) (p Profile, err error) {
	if len(b) < headerLen+crcLen || string(b[:4]) != magic {
		return p, fmt.Errorf("%w: not a boot profile", ErrDamaged)
	}
	le := binary.LittleEndian
	if v, bits := le.Uint16(b[4:]), le.Uint64(b[8:]); v > version || bits != 0 {
		return p, fmt.Errorf("%w: version %d, incompat bits %#x", ErrNewer, v, bits)
	}
	sum := len(b) - crcLen
	if got, want := block.CRC(b[:sum]), le.Uint32(b[sum:]); got != want {
		return p, fmt.Errorf("%w: crc %08x, stored %08x", ErrDamaged, got, want)
	}
	n := le.Uint32(b[36:])
	if le.Uint16(b[4:]) != version || n > RangesMax || int64(le.Uint32(b[40:])) != int64(sum-headerLen) {
		return p, fmt.Errorf("%w: header", ErrDamaged)
	}
	p = Profile{Pool: [16]byte(b[16:32]), Disk: block.DiskID(le.Uint32(b[32:]))}
	body, last := b[headerLen:sum], int64(0)
	for range n {
		delta, i := binary.Varint(body)
		if i <= 0 {
			return Profile{}, fmt.Errorf("%w: range", ErrDamaged)
		}
		blocks, j := binary.Uvarint(body[i:])
		first := last + delta
		if j <= 0 || delta <= -lbaMax || delta >= lbaMax || first < 0 || blocks == 0 || blocks > 1<<32-1 || first+int64(blocks) > lbaMax {
			return Profile{}, fmt.Errorf("%w: range", ErrDamaged)
		}
		body = body[i+j:]
		p.Ranges = append(p.Ranges, Range{block.LBA(first), uint32(blocks)})
		last = first + int64(blocks)
	}
	if len(body) > 0 {
		return Profile{}, fmt.Errorf("%w: %d bytes left", ErrDamaged, len(body))
	}
	return p, nil
}

// Describe writes what an encoded profile says, for people. It fails with Decode's errors.
func Describe(w io.Writer, b []byte) error {
	p, err := Decode(b)
	if err != nil {
		return err
	}
	fmt.Fprintf(w, "boot profile of disk %d of pool %x: %d ranges, %d bytes\n", p.Disk, p.Pool, len(p.Ranges), p.Blocks()*block.Size)
	for _, r := range p.Ranges {
		fmt.Fprintf(w, "blocks       %d-%d\n", r.First, r.end()-1)
	}
	return nil
}
