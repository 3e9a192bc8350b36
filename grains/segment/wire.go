package segment

import (
	"encoding/binary"
	"errors"
	"fmt"

	"graindisk/block"
)

var le = binary.LittleEndian

// What callers branch on. Every error of a decoder matches one of the first two.
var (
	// ErrDamaged means stored bytes contradict their checksum or their format, and for reads that no
	// choice of shards gives bytes that do not.
	ErrDamaged = errors.New("stored segment is damaged")
	// ErrNewer means the bytes were written by a newer version of the program.
	ErrNewer = errors.New("written by a newer version")
	// ErrFull means the extent does not fit in this segment any more; seal it and use the next.
	ErrFull = errors.New("segment is full")
)

// Every encoding starts with magic, u16 version, u16 flags, u64 incompat bits.
const (
	formatVersion = 1
	preambleBytes = 16
	crcBytes      = 4
)

func appendPreamble(b []byte, magic string, flags uint16) []byte {
	b = append(b, magic...)
	b = le.AppendUint16(b, formatVersion)
	b = le.AppendUint16(b, flags)
	return le.AppendUint64(b, 0)
}

// open checks the length, the preamble and the checksum in the last four bytes of b, and returns the
// flags and a cursor over what lies between. The checksum comes after the version: a newer format may
// keep it elsewhere.
func open(b []byte, what, magic string, knownFlags uint16, bytesMin int) (uint16, *cursor, error) {
	if len(b) < bytesMin {
		return 0, nil, fmt.Errorf("%s of %d bytes is too short: %w", what, len(b), ErrDamaged)
	}
	if string(b[:4]) != magic {
		return 0, nil, fmt.Errorf("%s starts with %x, not %q: %w", what, b[:4], magic, ErrDamaged)
	}
	if v := le.Uint16(b[4:]); v > formatVersion {
		return 0, nil, fmt.Errorf("%s has format version %d, this program knows %d: %w", what, v, formatVersion, ErrNewer)
	} else if v == 0 {
		return 0, nil, fmt.Errorf("%s has format version 0: %w", what, ErrDamaged)
	}
	flags := le.Uint16(b[6:])
	if unknown := flags &^ knownFlags; unknown != 0 {
		return 0, nil, fmt.Errorf("%s has unknown flags %#x: %w", what, unknown, ErrNewer)
	}
	if bits := le.Uint64(b[8:]); bits != 0 {
		return 0, nil, fmt.Errorf("%s has unknown incompat bits %#x: %w", what, bits, ErrNewer)
	}
	body := b[:len(b)-crcBytes]
	if got, want := block.CRC(body), le.Uint32(b[len(body):]); got != want {
		return 0, nil, fmt.Errorf("%s has checksum %08x, its bytes give %08x: %w", what, want, got, ErrDamaged)
	}
	return flags, &cursor{what: what, b: body[preambleBytes:]}, nil
}

// seal appends the checksum of everything from start to the end of b.
func seal(b []byte, start int) []byte {
	return le.AppendUint32(b, block.CRC(b[start:]))
}

// cursor reads fields one after the other. After the first problem it returns zeroes and keeps err.
type cursor struct {
	what string
	b    []byte
	err  error
}

func (c *cursor) fail(format string, args ...any) {
	if c.err == nil {
		c.err = fmt.Errorf("%s: %s: %w", c.what, fmt.Sprintf(format, args...), ErrDamaged)
	}
	c.b = nil
}

// take returns the next n bytes, aliasing the input, or nil.
func (c *cursor) take(n int) []byte {
	if n > len(c.b) {
		c.fail("ends early")
		return nil
	}
	p := c.b[:n:n]
	c.b = c.b[n:]
	return p
}

func (c *cursor) u8() uint8 {
	if p := c.take(1); p != nil {
		return p[0]
	}
	return 0
}

func (c *cursor) u16() uint16 {
	if p := c.take(2); p != nil {
		return le.Uint16(p)
	}
	return 0
}

func (c *cursor) u32() uint32 {
	if p := c.take(4); p != nil {
		return le.Uint32(p)
	}
	return 0
}

func (c *cursor) u64() uint64 {
	if p := c.take(8); p != nil {
		return le.Uint64(p)
	}
	return 0
}

func (c *cursor) id16() (id [16]byte) {
	copy(id[:], c.take(16))
	return id
}

// uvarint reads a varint of the least possible length and at most max.
func (c *cursor) uvarint(max uint64) uint64 {
	if c.err != nil {
		return 0
	}
	v, n := binary.Uvarint(c.b)
	if n <= 0 || n > 1 && c.b[n-1] == 0 {
		c.fail("bad varint")
		return 0
	}
	if v > max {
		c.fail("value %d above its bound %d", v, max)
		return 0
	}
	c.b = c.b[n:]
	return v
}

// count reads how many items follow, each of at least bytesMin bytes, so that a caller may allocate.
func (c *cursor) count(max, bytesMin int) int {
	n := c.uvarint(uint64(max))
	if n > uint64(len(c.b)/bytesMin) {
		c.fail("%d items cannot lie in %d bytes", n, len(c.b))
		return 0
	}
	return int(n)
}

// zeroes takes n bytes of padding.
func (c *cursor) zeroes(n int) {
	for _, v := range c.take(n) {
		if v != 0 {
			c.fail("padding is not zero")
			return
		}
	}
}

// end is the first problem met, or that bytes are left over.
func (c *cursor) end() error {
	if c.err == nil && len(c.b) > 0 {
		c.fail("%d bytes too many", len(c.b))
	}
	return c.err
}

// zigzag folds small negative numbers next to small positive ones.
func zigzag(v int64) uint64   { return uint64(v<<1) ^ uint64(v>>63) }
func unzigzag(v uint64) int64 { return int64(v>>1) ^ -int64(v&1) }
