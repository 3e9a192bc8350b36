package segment

import (
	"context"
	"errors"
	"fmt"

	"graindisk/block"
)

// Sizes of the fixed parts of a shard.
const (
	HeaderBytes  = 4096
	TrailerBytes = 256

	headerMagic  = "GDSH"
	trailerMagic = "GDST"
)

// Header is the first block of a shard: enough to know what an object is.
type Header struct {
	Pool  [16]byte
	ID    block.SegmentID
	Epoch uint64
	Salt  [16]byte
	KeyID uint32
	K, M  uint8
	Shard uint8
}

func (h Header) append(b []byte) []byte {
	start := len(b)
	b = appendPreamble(b, headerMagic, 0)
	b = append(b, h.Pool[:]...)
	b = le.AppendUint64(b, uint64(h.ID))
	b = le.AppendUint64(b, h.Epoch)
	b = append(b, h.Salt[:]...)
	b = le.AppendUint32(b, h.KeyID)
	b = append(b, h.K, h.M, h.Shard, 0)
	b = append(b, make([]byte, HeaderBytes-crcBytes-(len(b)-start))...)
	return seal(b, start)
}

// DecodeHeader decodes the header at the head of b.
func DecodeHeader(b []byte) (Header, error) {
	_, c, err := open(b[:min(len(b), HeaderBytes)], "shard header", headerMagic, 0, HeaderBytes)
	if err != nil {
		return Header{}, err
	}
	h := Header{Pool: c.id16(), ID: block.SegmentID(c.u64()), Epoch: c.u64(), Salt: c.id16(), KeyID: c.u32(),
		K: c.u8(), M: c.u8(), Shard: c.u8()}
	c.zeroes(len(c.b))
	return h, c.end()
}

// Trailer is the end of a shard: with it everything in the object can be found, and the other shards.
type Trailer struct {
	Pool     [16]byte
	Info     Info   // Targets as planned when the segment was sealed
	Cut      uint64 // the cut the segment belongs to; 0 = none
	Shard    uint8
	AreaCRC  uint32 // CRC32C of this shard's extents area, data or parity
	IndexCRC uint32 // the checksum at the end of the index
	CutCRC   uint32 // the checksum at the end of the cut record; 0 without one
	KeyID    uint32
}

func (t Trailer) append(b []byte) []byte {
	start := len(b)
	b = appendPreamble(b, trailerMagic, 0)
	b = append(b, t.Pool[:]...)
	b = le.AppendUint64(b, uint64(t.Info.ID))
	b = le.AppendUint64(b, t.Info.Epoch)
	b = le.AppendUint64(b, t.Cut)
	b = le.AppendUint64(b, t.Info.PayloadBytes)
	b = le.AppendUint64(b, HeaderBytes)
	b = le.AppendUint64(b, uint64(t.Info.indexOffset()))
	b = le.AppendUint64(b, uint64(t.Info.cutOffset()))
	b = le.AppendUint32(b, t.Info.ShardBytes)
	b = le.AppendUint32(b, t.Info.IndexBytes)
	b = le.AppendUint32(b, t.Info.CutBytes)
	b = le.AppendUint32(b, t.Info.Extents)
	b = le.AppendUint32(b, t.AreaCRC)
	b = le.AppendUint32(b, t.IndexCRC)
	b = le.AppendUint32(b, t.CutCRC)
	b = le.AppendUint32(b, t.KeyID)
	b = append(b, t.Info.K, t.Info.M, t.Shard, 0)
	for _, target := range t.Info.Targets {
		b = le.AppendUint16(b, uint16(target))
	}
	b = append(b, make([]byte, TrailerBytes-crcBytes-(len(b)-start))...)
	return seal(b, start)
}

// DecodeTrailer decodes the trailer at the end of b.
func DecodeTrailer(b []byte) (Trailer, error) {
	_, c, err := open(b[max(0, len(b)-TrailerBytes):], "shard trailer", trailerMagic, 0, TrailerBytes)
	if err != nil {
		return Trailer{}, err
	}
	t := Trailer{Pool: c.id16()}
	t.Info.ID, t.Info.Epoch, t.Cut, t.Info.PayloadBytes = block.SegmentID(c.u64()), c.u64(), c.u64(), c.u64()
	area, index, cut := c.u64(), c.u64(), c.u64()
	t.Info.ShardBytes, t.Info.IndexBytes, t.Info.CutBytes, t.Info.Extents = c.u32(), c.u32(), c.u32(), c.u32()
	t.AreaCRC, t.IndexCRC, t.CutCRC, t.KeyID = c.u32(), c.u32(), c.u32(), c.u32()
	t.Info.K, t.Info.M, t.Shard = c.u8(), c.u8(), c.u8()
	c.zeroes(1)
	for range min(t.Info.Shards(), KMax+MMax) {
		t.Info.Targets = append(t.Info.Targets, block.TargetID(c.u16()))
	}
	c.zeroes(len(c.b))
	if err := c.end(); err != nil {
		return Trailer{}, err
	}
	if err := t.Info.validate(); err != nil {
		return Trailer{}, fmt.Errorf("shard trailer: %w: %w", err, ErrDamaged)
	}
	if int(t.Shard) >= t.Info.Shards() || area != HeaderBytes || index != uint64(t.Info.indexOffset()) || cut != uint64(t.Info.cutOffset()) {
		return Trailer{}, fmt.Errorf("shard trailer: shard %d of %d+%d with parts at %d, %d, %d: %w",
			t.Shard, t.Info.K, t.Info.M, area, index, cut, ErrDamaged)
	}
	return t, nil
}

// Store is all this package needs of a backend.
type Store interface {
	// ReadAt fills p from off or fails; it never returns short. Safe for concurrent use.
	ReadAt(ctx context.Context, key string, p []byte, off int64) error
}

// ReadTrailer reads the trailer of an object of size bytes, found by listing, and checks that the
// object is the shard its key says.
func ReadTrailer(ctx context.Context, s Store, key string, size int64) (Trailer, error) {
	id, epoch, shard, ok := ParseKey(key)
	if !ok || size < HeaderBytes+indexBytesMin+TrailerBytes {
		return Trailer{}, fmt.Errorf("%s of %d bytes is no shard: %w", key, size, ErrDamaged)
	}
	b := make([]byte, TrailerBytes)
	if err := s.ReadAt(ctx, key, b, size-TrailerBytes); err != nil {
		return Trailer{}, fmt.Errorf("read trailer: %w", err)
	}
	t, err := DecodeTrailer(b)
	if err != nil {
		return Trailer{}, fmt.Errorf("%s: %w", key, err)
	}
	if t.Info.ID != id || t.Info.Epoch != epoch || int(t.Shard) != shard || t.Info.ObjectBytes() != size {
		return Trailer{}, fmt.Errorf("%s of %d bytes holds shard %d of segment %d epoch %d, %d bytes: %w",
			key, size, t.Shard, t.Info.ID, t.Info.Epoch, t.Info.ObjectBytes(), ErrDamaged)
	}
	return t, nil
}

// ReadCut reads the record of a cut and the index of its last segment, the one info locates, in one
// ranged read from the first shard that has both intact. If none has, those whose bytes were wrong are asked once more:
// they may have been hurt on their way.
func ReadCut(ctx context.Context, targets Getter, info Info) (*CutRecord, *Index, error) {
	if err := info.validate(); err != nil {
		return nil, nil, err
	}
	if info.CutBytes == 0 {
		return nil, nil, fmt.Errorf("segment %d holds no cut record", info.ID)
	}
	b := make([]byte, info.ObjectBytes()-info.indexOffset())
	var errs []error
	order := make([]int, info.Shards())
	for shard := range order {
		order[shard] = shard
	}
	for n := 0; n < len(order); n++ {
		shard := order[n]
		err := readShard(ctx, targets, info, shard, b, info.indexOffset())
		if err == nil {
			var x *Index
			var cut *CutRecord
			if x, cut, err = decodeTail(b, info); err == nil {
				return cut, x, nil
			}
		}
		if errs = append(errs, err); wrongBytes(err) && n < info.Shards() {
			order = append(order, shard)
		}
	}
	return nil, nil, fmt.Errorf("read cut record of segment %d: %w", info.ID, verdict(ctx, errs))
}

// decodeTail decodes index, cut record and trailer from what follows the extents area, and checks
// that they belong to info and to each other. The cut record is nil where there is none.
func decodeTail(b []byte, info Info) (*Index, *CutRecord, error) {
	t, err := DecodeTrailer(b)
	if err != nil {
		return nil, nil, err
	}
	if t.Info.CutBytes != info.CutBytes {
		return nil, nil, fmt.Errorf("cut record of %d bytes, %d expected: %w", t.Info.CutBytes, info.CutBytes, ErrDamaged)
	}
	if int64(len(b)) != info.ObjectBytes()-info.indexOffset() {
		return nil, nil, fmt.Errorf("%d bytes behind the extents area: %w", len(b), ErrDamaged)
	}
	index, rest := b[:info.IndexBytes], b[info.IndexBytes:]
	x, err := DecodeIndex(index)
	if err != nil {
		return nil, nil, err
	}
	if err := errors.Join(x.describes(info), x.describes(t.Info)); err != nil {
		return nil, nil, err
	}
	if x.Pool != t.Pool || le.Uint32(index[len(index)-crcBytes:]) != t.IndexCRC {
		return nil, nil, fmt.Errorf("index and trailer do not belong together: %w", ErrDamaged)
	}
	if info.CutBytes == 0 {
		return x, nil, nil
	}
	rest = rest[:info.CutBytes]
	cut, err := DecodeCutRecord(rest)
	if err != nil {
		return nil, nil, err
	}
	if cut.Cut != t.Cut || cut.Epoch != t.Info.Epoch || le.Uint32(rest[len(rest)-crcBytes:]) != t.CutCRC {
		return nil, nil, fmt.Errorf("cut record %d and trailer do not belong together: %w", cut.Cut, ErrDamaged)
	}
	return x, cut, nil
}

// Shard is one whole shard object, decoded and checked. Area aliases the object.
type Shard struct {
	Header  Header
	Trailer Trailer
	Index   *Index
	Cut     *CutRecord // nil where there is none
	Area    []byte
}

// OpenShard decodes an object and checks every byte of it.
func OpenShard(b []byte) (*Shard, error) {
	t, err := DecodeTrailer(b)
	if err != nil {
		return nil, err
	}
	if int64(len(b)) != t.Info.ObjectBytes() {
		return nil, fmt.Errorf("shard of %d bytes, %d expected: %w", len(b), t.Info.ObjectBytes(), ErrDamaged)
	}
	s := &Shard{Trailer: t, Area: b[HeaderBytes:t.Info.indexOffset()]}
	if s.Header, err = DecodeHeader(b); err != nil {
		return nil, err
	}
	if s.Index, s.Cut, err = decodeTail(b[t.Info.indexOffset():], t.Info); err != nil {
		return nil, err
	}
	want := Header{Pool: t.Pool, ID: t.Info.ID, Epoch: t.Info.Epoch, Salt: s.Index.Salt, KeyID: t.KeyID, K: t.Info.K, M: t.Info.M, Shard: t.Shard}
	if s.Header != want || t.KeyID != s.Index.KeyID {
		return nil, fmt.Errorf("shard header and trailer do not belong together: %w", ErrDamaged)
	}
	if block.CRC(s.Area) != t.AreaCRC {
		return nil, fmt.Errorf("extents area of shard %d of segment %d fails its checksum: %w", t.Shard, t.Info.ID, ErrDamaged)
	}
	return s, s.checkExtents()
}

// checkExtents checks the extents that lie in this shard.
func (s *Shard) checkExtents() error {
	for slot, e := range s.Index.Entries {
		if e.Shard == s.Trailer.Shard && !s.Index.Verify(slot, s.Area[e.Offset:e.Offset+e.Stored]) {
			return fmt.Errorf("slot %d of segment %d fails its checksum: %w", slot, s.Trailer.Info.ID, ErrDamaged)
		}
	}
	return nil
}

// ReadTail reads what lies behind the extents area of one shard, whose trailer t was read from key: the
// index, and the cut record if there is one. Unlike ReadCut it asks for no other shard, so it also tells what
// a segment was of which too few shards are left.
func ReadTail(ctx context.Context, s Store, key string, t Trailer) (*Index, *CutRecord, error) {
	b := make([]byte, t.Info.ObjectBytes()-t.Info.indexOffset())
	if err := s.ReadAt(ctx, key, b, t.Info.indexOffset()); err != nil {
		return nil, nil, fmt.Errorf("read index: %w", err)
	}
	x, cut, err := decodeTail(b, t.Info)
	if err != nil {
		return nil, nil, fmt.Errorf("%s: %w", key, err)
	}
	return x, cut, nil
}
