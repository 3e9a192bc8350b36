package segment

import (
	"encoding/binary"
	"fmt"
	"unsafe"

	"graindisk/block"
)

const (
	indexMagic       = "GDIX"
	indexHeaderBytes = 88
	indexBytesMin    = indexHeaderBytes + crcBytes
	entryBytesMin    = 6  // flags, sequence, checksum
	entryBytesMax    = 69 // every field at its longest
	indexBytesMax    = indexBytesMin + block.ExtentsMax*entryBytesMax

	// flagFingerprints says that each entry ends with a fingerprint of 16 bytes.
	flagFingerprints = 1
	// lbaMax bounds LBA+Blocks, so that byte offsets within a disk fit 63 bits.
	lbaMax = 1 << 51
)

// Entry is one extent of a segment; its slot is its place in Index.Entries.
type Entry struct {
	Name   block.ExtentID `json:"name"` // where it was born: this segment and slot unless it was moved here
	LBA    block.LBA      `json:"lba"`
	Seq    uint64         `json:"seq"`    // sequence of the newest write in it
	Offset uint32         `json:"offset"` // bytes into the extents area of its shard
	Stored uint32         `json:"stored"` // bytes there
	CRC    uint32         `json:"crc"`    // CRC32C of the stored bytes
	Disk   block.DiskID   `json:"disk"`
	Blocks uint16         `json:"blocks"`
	Shard  uint8          `json:"shard"` // always a data shard
	Codec  uint8          `json:"codec"` // a Codec; 0 = stored as is
}

// Index names every extent of a segment. It is read-only once decoded or sealed and safe for
// concurrent use.
type Index struct {
	Info    Info // Targets and CutBytes are unknown to the index and left zero
	Pool    [16]byte
	Salt    [16]byte // random; key = HKDF(pool key, salt) once segments are encrypted
	KeyID   uint32   // 0 = not encrypted
	Entries []Entry
	// Fingerprints has one hash per slot for deduplication, or is nil.
	Fingerprints [][16]byte
}

// Verify tells whether stored has the checksum of what was sealed in slot. The checksum is of the
// bytes alone: which segment they belong to is proven by the index, which names itself, and bytes of
// another place that are equal are as good. So an extent keeps its checksum when it is moved.
func (x *Index) Verify(slot int, stored []byte) bool {
	return block.CRC(stored) == x.Entries[slot].CRC
}

// memBytes is what the index costs in memory, near enough for a cache's budget.
func (x *Index) memBytes() int64 {
	return int64(unsafe.Sizeof(*x)) + int64(cap(x.Entries))*int64(unsafe.Sizeof(Entry{})) + int64(cap(x.Fingerprints))*16
}

// describes checks that the index is the one info speaks of.
func (x *Index) describes(info Info) error {
	if x.Info.ID != info.ID || x.Info.Epoch != info.Epoch || x.Info.K != info.K || x.Info.M != info.M ||
		x.Info.ShardBytes != info.ShardBytes || x.Info.IndexBytes != info.IndexBytes ||
		x.Info.Extents != info.Extents || x.Info.PayloadBytes != info.PayloadBytes {
		return fmt.Errorf("index of segment %d epoch %d (%d+%d) found in the place of segment %d epoch %d (%d+%d): %w",
			x.Info.ID, x.Info.Epoch, x.Info.K, x.Info.M, info.ID, info.Epoch, info.K, info.M, ErrDamaged)
	}
	return nil
}

// Bits of an entry's first byte: which fields follow, in this order. What is absent is as the
// previous entry suggests; a field that repeats the suggestion is not canonical and refused.
const (
	entryDisk       = 1 << iota // disk: difference to the previous, at least 1; then the LBA itself
	entryContiguous             // LBA: right behind the previous extent (else: difference of the starts)
	entryBlocks                 // blocks: differ from the previous entry's
	entryShard                  // shard: difference to the previous, at least 1; the offset starts at 0
	entryGap                    // offset: bytes left free before it, at least 1
	entryCodec                  // codec, then the stored length (else: 0, blocks * 4096)
	entryName                   // name: u64, born elsewhere
	entryUnknown
)

// appendIndex adds the encoding of x to b.
// Append adds the encoding to b, as it stands in every shard.
func (x *Index) Append(b []byte) []byte { return appendIndex(b, x) }

func appendIndex(b []byte, x *Index) []byte {
	start := len(b)
	var flags uint16
	if x.Fingerprints != nil {
		flags |= flagFingerprints
	}
	b = appendPreamble(b, indexMagic, flags)
	b = append(b, x.Pool[:]...)
	b = le.AppendUint64(b, uint64(x.Info.ID))
	b = le.AppendUint64(b, x.Info.Epoch)
	b = append(b, x.Salt[:]...)
	b = le.AppendUint32(b, x.KeyID)
	b = append(b, x.Info.K, x.Info.M, 0, 0)
	b = le.AppendUint32(b, x.Info.ShardBytes)
	b = le.AppendUint32(b, uint32(len(x.Entries)))
	b = le.AppendUint64(b, x.Info.PayloadBytes)
	var prev Entry
	for slot, e := range x.Entries {
		b = appendEntry(b, &prev, &e, block.NewExtentID(x.Info.ID, slot))
		if x.Fingerprints != nil {
			b = append(b, x.Fingerprints[slot][:]...)
		}
		prev = e
	}
	return seal(b, start)
}

func appendEntry(b []byte, prev, e *Entry, own block.ExtentID) []byte {
	at := len(b)
	var bits uint8
	b = append(b, 0)
	switch {
	case e.Disk != prev.Disk:
		bits |= entryDisk
		b = binary.AppendUvarint(b, uint64(e.Disk-prev.Disk))
		b = binary.AppendUvarint(b, uint64(e.LBA))
	case e.LBA == prev.LBA+block.LBA(prev.Blocks):
		bits |= entryContiguous
	default:
		b = binary.AppendUvarint(b, uint64(e.LBA-prev.LBA))
	}
	if e.Blocks != prev.Blocks {
		bits |= entryBlocks
		b = binary.AppendUvarint(b, uint64(e.Blocks))
	}
	end := prev.Offset + prev.Stored
	if e.Shard != prev.Shard {
		bits |= entryShard
		b = append(b, e.Shard-prev.Shard)
		end = 0
	}
	if e.Offset != end {
		bits |= entryGap
		b = binary.AppendUvarint(b, uint64(e.Offset-end))
	}
	if e.Codec != 0 {
		bits |= entryCodec
		b = append(b, e.Codec)
		b = binary.AppendUvarint(b, uint64(e.Stored))
	}
	if e.Name != own {
		bits |= entryName
		b = le.AppendUint64(b, uint64(e.Name))
	}
	b[at] = bits
	b = binary.AppendUvarint(b, zigzag(int64(e.Seq-prev.Seq)))
	return le.AppendUint32(b, e.CRC)
}

// DecodeIndex decodes exactly one index. The result does not alias b.
func DecodeIndex(b []byte) (*Index, error) {
	flags, c, err := open(b, "index", indexMagic, flagFingerprints, indexBytesMin)
	if err != nil {
		return nil, err
	}
	x := &Index{Pool: c.id16()}
	x.Info.ID = block.SegmentID(c.u64())
	x.Info.Epoch = c.u64()
	x.Salt = c.id16()
	x.KeyID = c.u32()
	x.Info.K, x.Info.M = c.u8(), c.u8()
	c.zeroes(2)
	x.Info.ShardBytes = c.u32()
	x.Info.Extents = c.u32()
	x.Info.PayloadBytes = c.u64()
	x.Info.IndexBytes = uint32(min(len(b), indexBytesMax+1))
	whole := x.Info // with every shard stored, for the bounds
	for range min(x.Info.Shards(), KMax+MMax) {
		whole.Targets = append(whole.Targets, 1)
	}
	if err := whole.validate(); err != nil {
		return nil, fmt.Errorf("index: %v: %w", err, ErrDamaged)
	}
	if x.KeyID != 0 {
		return nil, fmt.Errorf("index of segment %d: encrypted with key %d: %w", x.Info.ID, x.KeyID, ErrNewer)
	}
	size := entryBytesMin
	if flags&flagFingerprints != 0 {
		size += 16
	}
	if int(x.Info.Extents) > len(c.b)/size {
		return nil, fmt.Errorf("index of segment %d: %d extents cannot lie in %d bytes: %w", x.Info.ID, x.Info.Extents, len(c.b), ErrDamaged)
	}
	if err := x.decodeEntries(c, flags&flagFingerprints != 0); err != nil {
		return nil, fmt.Errorf("segment %d: %w", x.Info.ID, err)
	}
	return x, nil
}

func (x *Index) decodeEntries(c *cursor, fingerprints bool) error {
	x.Entries = make([]Entry, x.Info.Extents)
	if fingerprints {
		x.Fingerprints = make([][16]byte, x.Info.Extents)
	}
	var payload uint64
	var prev Entry
	for slot := range x.Entries {
		e := c.entry(&prev, block.NewExtentID(x.Info.ID, slot))
		if fingerprints {
			x.Fingerprints[slot] = c.id16()
		}
		if c.err == nil {
			if err := e.validate(x.Info); err != nil {
				c.fail("slot %d: %v", slot, err)
			}
		}
		if c.err != nil {
			return c.err
		}
		x.Entries[slot], prev = e, e
		payload += uint64(e.Blocks) * block.Size
	}
	if payload != x.Info.PayloadBytes {
		c.fail("extents hold %d bytes, the header says %d", payload, x.Info.PayloadBytes)
	}
	return c.end()
}

// entry reads the inverse of appendEntry.
func (c *cursor) entry(prev *Entry, own block.ExtentID) Entry {
	e := Entry{Disk: prev.Disk, LBA: prev.LBA, Blocks: prev.Blocks, Shard: prev.Shard, Name: own}
	bits := c.u8()
	switch {
	case bits&entryUnknown != 0 || bits&entryDisk != 0 && bits&entryContiguous != 0:
		c.fail("entry bits %#x", bits)
	case bits&entryDisk != 0:
		e.Disk += block.DiskID(c.positive(uint64(1<<32 - 1 - prev.Disk)))
		e.LBA = block.LBA(c.uvarint(lbaMax))
	case bits&entryContiguous != 0:
		e.LBA += block.LBA(prev.Blocks)
	default:
		d := c.uvarint(lbaMax)
		if d == uint64(prev.Blocks) {
			c.fail("contiguous extent not marked so")
		}
		e.LBA += block.LBA(d)
	}
	if bits&entryBlocks != 0 {
		e.Blocks = uint16(c.positive(1<<16 - 1))
		if e.Blocks == prev.Blocks {
			c.fail("blocks given twice")
		}
	}
	e.Offset = prev.Offset + prev.Stored // no overflow: both were within ShardBytesMax
	if bits&entryShard != 0 {
		e.Shard += uint8(c.positive(KMax))
		e.Offset = 0
	}
	if bits&entryGap != 0 {
		e.Offset += uint32(c.positive(ShardBytesMax))
	}
	e.Stored = uint32(e.Blocks) * block.Size
	if bits&entryCodec != 0 {
		if e.Codec = c.u8(); e.Codec == 0 {
			c.fail("codec 0 given")
		}
		e.Stored = uint32(c.positive(ShardBytesMax))
	}
	if bits&entryName != 0 {
		if e.Name = block.ExtentID(c.u64()); e.Name == own {
			c.fail("own name given")
		}
	}
	e.Seq = prev.Seq + uint64(unzigzag(c.uvarint(1<<64-1)))
	e.CRC = c.u32()
	return e
}

// positive reads a varint from 1 to max.
func (c *cursor) positive(max uint64) uint64 {
	v := c.uvarint(max)
	if v == 0 {
		c.fail("zero where at least one is meant")
	}
	return v
}

// validate checks one entry against the segment's bounds. Disk 0 cannot occur: the first entry
// differs from disk 0 or fails here.
func (e *Entry) validate(info Info) error {
	switch {
	case e.Disk == 0:
		return fmt.Errorf("names no disk")
	case e.Blocks == 0 || uint64(e.LBA)+uint64(e.Blocks) > lbaMax:
		return fmt.Errorf("%d blocks at %d", e.Blocks, e.LBA)
	case e.Shard >= info.K:
		return fmt.Errorf("lies in shard %d of %d", e.Shard, info.K)
	case uint64(e.Offset)+uint64(e.Stored) > uint64(info.ShardBytes):
		return fmt.Errorf("%d bytes at %d leave the area of %d", e.Stored, e.Offset, info.ShardBytes)
	case e.Codec == 0 && e.Offset%block.Size != 0:
		return fmt.Errorf("offset %d is not aligned", e.Offset)
	case e.Codec != 0 && e.Codec < codecs && (e.Blocks > packedBlocksMax || e.Stored >= uint32(e.Blocks)*block.Size):
		return fmt.Errorf("%d blocks packed into %d bytes by %v", e.Blocks, e.Stored, Codec(e.Codec))
	case e.Name.Segment() == 0 || e.Name.Slot() >= block.ExtentsMax:
		return fmt.Errorf("name %v out of range", e.Name)
	}
	return nil
}
