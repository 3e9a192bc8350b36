package segment

import (
	"encoding/binary"
	"fmt"
	"strconv"
	"strings"

	"graindisk/block"
)

// Bounds of a stripe and of the parts of a shard. They keep a damaged length from becoming an
// allocation; the usual segment (32 MiB of payload) is far below them.
const (
	KMax          = 16       // data shards
	MMax          = 4        // parity shards
	ShardBytesMax = 1 << 30  // extents area of one shard
	CutBytesMax   = 64 << 20 // cut record: about 10 million unmaps
)

// Info locates a stored segment: with it, every part of every shard is one ranged read away.
// Targets is as of the last repair and wins over the copy in the trailers, which tells where the
// shards were meant to go when the segment was sealed.
type Info struct {
	ID           block.SegmentID  `json:"segment"`
	Epoch        uint64           `json:"epoch"`
	K            uint8            `json:"k"`             // data shards, 1..16
	M            uint8            `json:"m"`             // parity shards, 0..4
	Targets      []block.TargetID `json:"targets"`       // k+m; 0 = that shard was not stored
	ShardBytes   uint32           `json:"shard_bytes"`   // extents area of each shard, a multiple of block.Size
	IndexBytes   uint32           `json:"index_bytes"`   // index with its checksum
	CutBytes     uint32           `json:"cut_bytes"`     // cut record with its checksum; 0 = none
	Extents      uint32           `json:"extents"`       // slots in use, at most block.ExtentsMax
	PayloadBytes uint64           `json:"payload_bytes"` // guest data, before any compression
}

// Shards is k+m.
func (i Info) Shards() int { return int(i.K) + int(i.M) }

// Key is the object's name of one shard: "seg/<low byte of the segment>/<segment>-<epoch>.<shard>".
func (i Info) Key(shard int) string {
	return fmt.Sprintf("seg/%02x/%d-%d.%d", uint8(i.ID), i.ID, i.Epoch, shard)
}

// ParseKey is the inverse of Info.Key; ok is false for a key of another shape.
func ParseKey(key string) (id block.SegmentID, epoch uint64, shard int, ok bool) {
	parts := strings.FieldsFunc(key, func(r rune) bool { return r == '/' || r == '-' || r == '.' })
	if len(parts) != 5 {
		return 0, 0, 0, false
	}
	n, err1 := strconv.ParseUint(parts[2], 10, 48)
	epoch, err2 := strconv.ParseUint(parts[3], 10, 64)
	shard, err3 := strconv.Atoi(parts[4])
	id = block.SegmentID(n)
	if err1 != nil || err2 != nil || err3 != nil || shard < 0 || shard >= KMax+MMax ||
		key != (Info{ID: id, Epoch: epoch}).Key(shard) {
		return 0, 0, 0, false
	}
	return id, epoch, shard, true
}

// ObjectBytes is the size of each shard's object.
func (i Info) ObjectBytes() int64 { return i.trailerOffset() + TrailerBytes }

func (i Info) indexOffset() int64   { return HeaderBytes + int64(i.ShardBytes) }
func (i Info) cutOffset() int64     { return i.indexOffset() + int64(i.IndexBytes) }
func (i Info) trailerOffset() int64 { return i.cutOffset() + int64(i.CutBytes) }

// Append adds the encoding to b: varints in the order of the fields, Targets without their count,
// which is k+m.
func (i Info) Append(b []byte) []byte {
	b = binary.AppendUvarint(b, uint64(i.ID))
	b = binary.AppendUvarint(b, i.Epoch)
	b = append(b, i.K, i.M)
	for _, t := range i.Targets {
		b = binary.AppendUvarint(b, uint64(t))
	}
	b = binary.AppendUvarint(b, uint64(i.ShardBytes))
	b = binary.AppendUvarint(b, uint64(i.IndexBytes))
	b = binary.AppendUvarint(b, uint64(i.CutBytes))
	b = binary.AppendUvarint(b, uint64(i.Extents))
	return binary.AppendUvarint(b, i.PayloadBytes)
}

// infoBytesMin is the least an encoded Info takes: ten single bytes with one target.
const infoBytesMin = 10

// DecodeInfo reads what Append wrote from the head of b and returns the rest.
func DecodeInfo(b []byte) (Info, []byte, error) {
	c := &cursor{what: "segment info", b: b}
	i := c.info()
	return i, c.b, c.err
}

func (c *cursor) info() Info {
	var i Info
	i.ID = block.SegmentID(c.uvarint(uint64(block.SegmentMax - 1)))
	i.Epoch = c.uvarint(1<<64 - 1)
	i.K, i.M = c.u8(), c.u8()
	if i.K > KMax || i.M > MMax {
		c.fail("profile %d+%d", i.K, i.M)
		return Info{}
	}
	i.Targets = make([]block.TargetID, i.Shards())
	for n := range i.Targets {
		i.Targets[n] = block.TargetID(c.uvarint(1<<16 - 1))
	}
	i.ShardBytes = uint32(c.uvarint(ShardBytesMax))
	i.IndexBytes = uint32(c.uvarint(indexBytesMax))
	i.CutBytes = uint32(c.uvarint(CutBytesMax))
	i.Extents = uint32(c.uvarint(block.ExtentsMax))
	i.PayloadBytes = c.uvarint(1<<64 - 1)
	if c.err == nil {
		if err := i.validate(); err != nil {
			c.fail("%v", err)
		}
	}
	return i
}

// Validate refuses an Info whose fields make no sense together, such as one read from JSON.
func (i Info) Validate() error {
	if err := i.validate(); err != nil {
		return fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	return nil
}

// validate checks the bounds of every field. Targets may name as few as k shards, never fewer.
func (i Info) validate() error {
	stored := 0
	for _, t := range i.Targets {
		if t != 0 {
			stored++
		}
	}
	switch {
	case i.ID == 0 || i.ID >= block.SegmentMax:
		return fmt.Errorf("segment number %d out of range", i.ID)
	case i.K < 1 || i.K > KMax || i.M > MMax:
		return fmt.Errorf("segment %d: profile %d+%d out of range", i.ID, i.K, i.M)
	case len(i.Targets) != i.Shards():
		return fmt.Errorf("segment %d: %d targets for profile %d+%d", i.ID, len(i.Targets), i.K, i.M)
	case stored < int(i.K):
		return fmt.Errorf("segment %d: %d shards stored, %d needed to read it", i.ID, stored, i.K)
	case i.ShardBytes > ShardBytesMax || i.ShardBytes%block.Size != 0:
		return fmt.Errorf("segment %d: extents area of %d bytes", i.ID, i.ShardBytes)
	case i.IndexBytes < indexBytesMin || i.IndexBytes > indexBytesMax:
		return fmt.Errorf("segment %d: index of %d bytes", i.ID, i.IndexBytes)
	case i.CutBytes > CutBytesMax || i.CutBytes > 0 && i.CutBytes < cutBytesMin:
		return fmt.Errorf("segment %d: cut record of %d bytes", i.ID, i.CutBytes)
	case i.Extents > block.ExtentsMax:
		return fmt.Errorf("segment %d: %d extents", i.ID, i.Extents)
	}
	return nil
}
