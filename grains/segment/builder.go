package segment

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"slices"

	"graindisk/block"
)

// BuildOptions describe a segment before anything is in it.
type BuildOptions struct {
	Pool  [16]byte
	ID    block.SegmentID
	Epoch uint64
	K, M  uint8
	Cut   uint64 // the cut the segment will belong to; 0 = none (a cleaner's segment)
	// PayloadBytes is what will be added in all, as stored, a multiple of block.Size; 0 = an empty
	// segment. It is the segment's capacity and what balances the columns: after adding much less, Seal
	// lays them out anew.
	PayloadBytes int64
	// ExtentBytesMax is the largest extent that will be added; default 256 KiB, the largest grain.
	ExtentBytesMax int64
	// Codec packs the extents that AddData brings, where that pays.
	Codec Codec
	// Buffers lends the memory of the shards; nil = each segment has its own.
	Buffers *Buffers
	// Fingerprint, if set, gives each extent a hash for deduplication.
	Fingerprint func(data []byte) [16]byte
	// Rand is where the salt comes from; default crypto/rand.
	Rand io.Reader
}

// Builder is a bank: a segment being filled in memory. It is not safe for concurrent use, except that
// the slices returned by Add may be filled from any goroutine before Seal is called.
type Builder struct {
	o         BuildOptions
	areaBytes int64    // capacity of each column
	objects   [][]byte // by shard: header and column, made when first needed
	index     Index
	shard     int   // column being filled
	used      int64 // bytes of it in use
	stored    int64 // bytes of all columns in use, what aligning costs included
	packer    packer
	sealed    bool
	summed    []bool // by slot: its checksum came with it
}

// Sealed is a segment ready to be stored: Shards[n] goes to Info.Targets[n] under Info.Key(n).
type Sealed struct {
	Info   Info
	Index  *Index
	Shards [][]byte // complete objects; read-only

	buffers *Buffers
}

// NewBuilder starts a segment. Memory is taken column by column as extents come.
func NewBuilder(o BuildOptions) (*Builder, error) {
	if o.ExtentBytesMax == 0 {
		o.ExtentBytesMax = 256 << 10
	}
	if o.Rand == nil {
		o.Rand = rand.Reader
	}
	if o.ID == 0 || o.ID >= block.SegmentMax || o.K < 1 || o.K > KMax || o.M > MMax || o.PayloadBytes < 0 || o.PayloadBytes%block.Size != 0 {
		return nil, fmt.Errorf("new segment %d: profile %d+%d, %d bytes: out of range", o.ID, o.K, o.M, o.PayloadBytes)
	}
	b := &Builder{o: o, objects: make([][]byte, int(o.K)+int(o.M))}
	if o.PayloadBytes > 0 {
		// A column starts and ends within half an extent of its share.
		b.areaBytes = up(o.PayloadBytes/int64(o.K)+min(o.ExtentBytesMax, o.PayloadBytes), block.Size)
		if o.Codec != CodecNone {
			b.areaBytes += block.Size // an extent stored as it is begins on a block
		}
	}
	if b.areaBytes > ShardBytesMax {
		return nil, fmt.Errorf("new segment %d: %d bytes in %d shards is more than a segment holds", o.ID, o.PayloadBytes, o.K)
	}
	b.packer.codec = o.Codec
	b.index = Index{Info: Info{ID: o.ID, Epoch: o.Epoch, K: o.K, M: o.M}, Pool: o.Pool}
	if _, err := io.ReadFull(o.Rand, b.index.Salt[:]); err != nil {
		return nil, fmt.Errorf("new segment %d: salt: %w", o.ID, err)
	}
	return b, nil
}

func up(n, unit int64) int64 { return (n + unit - 1) / unit * unit }

// Add reserves the next slot for an extent of blocks at lba of disk, whose newest write is seq, and
// returns the room for its data, which the caller fills before Seal, all of it: what it holds before is
// undefined. Extents come sorted by (disk, LBA). ErrFull means that this one goes to the next segment.
func (b *Builder) Add(disk block.DiskID, lba block.LBA, blocks int, seq uint64) ([]byte, error) {
	return b.AddMoved(block.NewExtentID(b.o.ID, len(b.index.Entries)), disk, lba, blocks, seq)
}

// AddSummed is Add for data that has the checksum crc, as its caller makes sure when it fills the room: Seal
// need not read it for that, and Verify tells whether it was so.
func (b *Builder) AddSummed(disk block.DiskID, lba block.LBA, blocks int, seq uint64, crc uint32) ([]byte, error) {
	p, err := b.Add(disk, lba, blocks, seq)
	if err == nil {
		slot := len(b.index.Entries) - 1
		b.index.Entries[slot].CRC, b.summed[slot] = crc, true
	}
	return p, err
}

// AddMoved is Add for an extent that was born in another segment and keeps its name.
func (b *Builder) AddMoved(name block.ExtentID, disk block.DiskID, lba block.LBA, blocks int, seq uint64) ([]byte, error) {
	if blocks < 1 || blocks > 1<<16-1 || int64(blocks)*block.Size > b.o.ExtentBytesMax {
		return nil, fmt.Errorf("segment %d: extent of %d blocks, at most %d bytes were announced", b.o.ID, blocks, b.o.ExtentBytesMax)
	}
	return b.place(Entry{Name: name, Disk: disk, LBA: lba, Blocks: uint16(blocks), Seq: seq, Stored: uint32(blocks) * block.Size})
}

// AddData is Add for data that is at hand, whole blocks: it is copied, packed by the segment's codec
// where that saves at least an eighth.
func (b *Builder) AddData(disk block.DiskID, lba block.LBA, plain []byte, seq uint64) error {
	blocks := len(plain) / block.Size
	if b.o.Codec == CodecNone || blocks > packedBlocksMax || b.sealed || b.Room() == 0 {
		dst, err := b.Add(disk, lba, blocks, seq)
		copy(dst, plain)
		return err
	}
	packed := b.packer.pack(plain)
	if packed == nil {
		dst, err := b.Add(disk, lba, blocks, seq)
		copy(dst, plain)
		return err
	}
	dst, err := b.place(Entry{
		Name: block.NewExtentID(b.o.ID, len(b.index.Entries)), Disk: disk, LBA: lba, Blocks: uint16(blocks), Seq: seq,
		Stored: uint32(len(packed)), Codec: uint8(b.o.Codec),
	})
	copy(dst, packed)
	return err
}

// place gives an extent the next slot and its bytes.
func (b *Builder) place(e Entry) ([]byte, error) {
	size := int64(e.Stored)
	shard, off := b.next(b.o.PayloadBytes, e)
	switch n := len(b.index.Entries); {
	case b.sealed:
		return nil, fmt.Errorf("segment %d is sealed", b.o.ID)
	case n > 0 && (e.Disk < b.index.Entries[n-1].Disk || e.Disk == b.index.Entries[n-1].Disk && e.LBA < b.index.Entries[n-1].LBA):
		return nil, fmt.Errorf("segment %d: disk %d lba %d after disk %d lba %d", b.o.ID, e.Disk, e.LBA, b.index.Entries[n-1].Disk, b.index.Entries[n-1].LBA)
	case b.Room() == 0 || b.stored+b.pad(shard, off)+size > b.o.PayloadBytes:
		return nil, fmt.Errorf("segment %d: %w", b.o.ID, ErrFull)
	}
	e.Shard, e.Offset = uint8(shard), uint32(off)
	whole := b.index.Info
	whole.ShardBytes = uint32(b.areaBytes)
	if err := e.validate(whole); err != nil {
		return nil, fmt.Errorf("segment %d: extent %v: %w", b.o.ID, e.Name, err)
	}
	b.stored += b.pad(shard, off) + size
	b.shard, b.used = shard, off+size
	b.index.Entries, b.summed = append(b.index.Entries, e), append(b.summed, false)
	b.index.Info.PayloadBytes += uint64(e.Blocks) * block.Size
	at := HeaderBytes + off
	return b.object(shard)[at : at+size : at+size], nil
}

// next is the place of the next extent when total bytes are laid out: the column of k equal parts in
// which its middle lies, or ends, which never falls, and the offset there. What is not packed begins on a
// block.
func (b *Builder) next(total int64, e Entry) (shard int, off int64) {
	if total == 0 {
		return b.shard, b.used
	}
	twiceMiddle := 2*b.stored + int64(e.Stored)
	shard = min(int((twiceMiddle*int64(b.o.K)-1)/(2*total)), int(b.o.K)-1)
	if shard != b.shard {
		return shard, 0
	}
	if e.Codec == uint8(CodecNone) {
		return shard, up(b.used, block.Size)
	}
	return shard, b.used
}

// pad is what the place leaves free behind the last extent.
func (b *Builder) pad(shard int, off int64) int64 {
	if shard != b.shard {
		return 0
	}
	return off - b.used
}

// Room is how many stored bytes the segment still takes; aligning may cost up to a block of it.
func (b *Builder) Room() int64 {
	if len(b.index.Entries) >= block.ExtentsMax {
		return 0
	}
	return b.o.PayloadBytes - b.stored
}

// Full tells whether no extent fits any more.
func (b *Builder) Full() bool { return b.Room() == 0 }

// Extents is how many slots are in use, PayloadBytes what they hold.
func (b *Builder) Extents() int { return len(b.index.Entries) }

// StoredBytes is what the guest data added so far takes.
func (b *Builder) StoredBytes() int64 { return b.stored }

// PayloadBytes is the guest data added so far, before packing.
func (b *Builder) PayloadBytes() int64 { return int64(b.index.Info.PayloadBytes) }

// object is the memory of one shard: header and column, with room behind for an index of 4 KiB extents,
// so that sealing rarely copies. What it holds is undefined.
func (b *Builder) object(shard int) []byte {
	if b.objects[shard] == nil {
		tail := indexBytesMin + b.o.PayloadBytes/block.Size*13 + TrailerBytes
		b.objects[shard] = b.o.Buffers.Get(HeaderBytes + b.areaBytes + tail)[:HeaderBytes+b.areaBytes]
	}
	return b.objects[shard]
}

// Discard gives the memory of a builder back that will not be sealed.
func (b *Builder) Discard() {
	b.sealed = true
	for n, o := range b.objects {
		b.o.Buffers.Put(o, true)
		b.objects[n] = nil
	}
}

// Seal computes checksums and parity and returns the finished shards; the builder is spent. targets
// are by shard, k+m of them, 0 where a shard will not be stored; at least k are stored. A cut record
// goes into the last segment of its cut; its Segments lists the others, already sealed.
func (b *Builder) Seal(cut *CutRecord, targets []block.TargetID) (*Sealed, error) {
	info := &b.index.Info
	if b.sealed {
		return nil, fmt.Errorf("seal segment %d: done before", b.o.ID)
	}
	b.sealed = true
	b.balance()
	areas := b.trim()
	if b.o.Fingerprint != nil {
		b.index.Fingerprints = make([][16]byte, len(b.index.Entries))
	}
	for slot := range b.index.Entries {
		e := &b.index.Entries[slot]
		data := areas[e.Shard][e.Offset : e.Offset+e.Stored]
		if !b.summed[slot] {
			e.CRC = block.CRC(data)
		}
		if b.o.Fingerprint != nil {
			b.index.Fingerprints[slot] = b.o.Fingerprint(data)
		}
	}
	if b.o.M > 0 && info.ShardBytes > 0 {
		c, err := coder(b.o.K, b.o.M)
		if err != nil {
			return nil, fmt.Errorf("seal segment %d: %w", b.o.ID, err)
		}
		if err := c.Encode(areas); err != nil {
			return nil, fmt.Errorf("seal segment %d: parity: %w", b.o.ID, err)
		}
	}
	tail := appendIndex(nil, &b.index)
	info.IndexBytes = uint32(len(tail))
	whole := *info
	whole.Targets = slices.Clone(targets)
	t := Trailer{Pool: b.o.Pool, Cut: b.o.Cut, IndexCRC: le.Uint32(tail[len(tail)-crcBytes:])}
	if cut != nil {
		if err := b.checkCut(cut); err != nil {
			return nil, fmt.Errorf("seal segment %d: %w", b.o.ID, err)
		}
		tail = cut.Append(tail)
		whole.CutBytes = uint32(min(len(tail)-int(info.IndexBytes), CutBytesMax+1))
		t.Cut, t.CutCRC = cut.Cut, le.Uint32(tail[len(tail)-crcBytes:])
	}
	if err := whole.validate(); err != nil {
		return nil, fmt.Errorf("seal: %w", err)
	}
	t.Info = whole
	return b.finish(t, areas, tail)
}

// balance lays the extents out anew if so much less was added than announced that the first columns
// have it all.
func (b *Builder) balance() {
	var longest int64
	for _, e := range b.index.Entries {
		longest = max(longest, int64(e.Offset+e.Stored))
	}
	if longest <= b.stored/int64(b.o.K)+b.o.ExtentBytesMax {
		return
	}
	old, total := b.objects, b.stored
	b.objects = make([][]byte, len(old))
	b.areaBytes = up(total/int64(b.o.K)+min(b.o.ExtentBytesMax, total), block.Size) + block.Size
	b.shard, b.used, b.stored = 0, 0, 0
	for slot := range b.index.Entries {
		e := &b.index.Entries[slot]
		from := old[e.Shard][HeaderBytes+int64(e.Offset):][:e.Stored]
		shard, off := b.next(total, *e)
		b.stored += b.pad(shard, off) + int64(e.Stored)
		b.shard, b.used = shard, off+int64(e.Stored)
		e.Shard, e.Offset = uint8(shard), uint32(off)
		copy(b.object(shard)[HeaderBytes+off:], from)
	}
	for _, o := range old {
		b.o.Buffers.Put(o, true)
	}
}

// trim shortens every column to the longest one's use, on a block, zeroes what no extent fills, and
// returns the areas. Columns that were never used and those of parity are made here.
func (b *Builder) trim() [][]byte {
	var used int64
	ends := make([]int64, len(b.objects)) // of what is written, by shard
	for _, e := range b.index.Entries {
		clear(b.objects[e.Shard][HeaderBytes+ends[e.Shard] : HeaderBytes+int64(e.Offset)])
		ends[e.Shard] = int64(e.Offset + e.Stored)
		used = max(used, ends[e.Shard])
	}
	used = up(used, block.Size)
	b.areaBytes = used
	b.index.Info.ShardBytes = uint32(used)
	b.index.Info.Extents = uint32(len(b.index.Entries))
	areas := make([][]byte, len(b.objects))
	for n := range b.objects {
		b.objects[n] = b.object(n)[:HeaderBytes+used]
		areas[n] = b.objects[n][HeaderBytes:]
		if n < int(b.o.K) { // parity is written whole
			clear(areas[n][ends[n]:])
		}
	}
	return areas
}

func (b *Builder) checkCut(cut *CutRecord) error {
	if err := cut.validate(); err != nil {
		return err
	}
	if cut.Epoch != b.o.Epoch || b.o.Cut != 0 && cut.Cut != b.o.Cut {
		return fmt.Errorf("record of cut %d epoch %d in a segment of cut %d epoch %d", cut.Cut, cut.Epoch, b.o.Cut, b.o.Epoch)
	}
	if slices.ContainsFunc(cut.Segments, func(i Info) bool { return i.ID == b.o.ID }) {
		return errors.New("a cut record does not list its own segment")
	}
	return nil
}

// finish writes what surrounds the areas, and reads back what every reader will depend on.
func (b *Builder) finish(t Trailer, areas [][]byte, tail []byte) (*Sealed, error) {
	h := Header{Pool: b.o.Pool, ID: b.o.ID, Epoch: b.o.Epoch, Salt: b.index.Salt, K: b.o.K, M: b.o.M}
	crcs := b.index.areaCRCs(areas)
	for n, object := range b.objects {
		h.Shard, t.Shard, t.AreaCRC = uint8(n), uint8(n), crcs[n]
		if need := t.Info.ObjectBytes(); int64(cap(object)) < need {
			object = append(b.o.Buffers.Get(need), object...)
			b.o.Buffers.Put(b.objects[n], true)
		}
		h.append(object[:0])
		b.objects[n] = t.append(append(object, tail...))
	}
	last := b.objects[len(b.objects)-1]
	x, _, err := decodeTail(last[t.Info.indexOffset():], t.Info)
	if err != nil {
		return nil, fmt.Errorf("seal segment %d: read back: %w", b.o.ID, err)
	}
	s := &Sealed{Info: t.Info, Index: x, Shards: b.objects, buffers: b.o.Buffers}
	b.objects = nil
	return s, nil
}
