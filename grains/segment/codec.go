package segment

import (
	"fmt"
	"sync"

	"github.com/klauspost/compress/s2"
	"github.com/klauspost/compress/zstd"

	"graindisk/block"
)

// Codec says how the bytes of an extent are stored. Every extent is packed by itself, so that it can be
// read, rebuilt and moved by itself. All but CodecNone store
//
//	0                  4
//	+------------------+------------------------+
//	| CRC of the plain | S2 block or Zstd frame |
//	+------------------+------------------------+
//
// so both forms are checked: the entry's CRC is of the bytes above, and proves what lay in the store;
// the one here proves what came of unpacking them.
type Codec uint8

// The codecs of this release. Their numbers are stored.
const (
	CodecNone Codec = 0
	CodecS2   Codec = 1
	CodecZstd Codec = 2
	codecs          = 3
)

var codecNames = [codecs]string{"none", "s2", "zstd"}

// String is the codec's name in configurations and messages.
func (c Codec) String() string {
	if c < codecs {
		return codecNames[c]
	}
	return fmt.Sprintf("codec %d", uint8(c))
}

// ParseCodec is the inverse of String; "" is CodecNone.
func ParseCodec(name string) (Codec, error) {
	if name == "" {
		return CodecNone, nil
	}
	for c, n := range codecNames {
		if n == name {
			return Codec(c), nil
		}
	}
	return 0, fmt.Errorf("compression %q: must be none, s2 or zstd", name)
}

const plainCRCBytes = 4

// Packing pays from an eighth saved on. After packTries extents in a row for which it did not, only one
// in packTries is tried until one pays again: data of a kind lies together, and what cannot be packed
// should cost next to nothing.
const packTries = 8

// packer packs the extents of one segment.
type packer struct {
	codec   Codec
	scratch []byte
	failed  int // in a row
	skipped int // since the last try
}

// pack returns what to store for an extent, which aliases scratch and holds until the next call, or nil
// if it is to be stored as it is.
func (p *packer) pack(plain []byte) []byte {
	if p.failed >= packTries {
		if p.skipped++; p.skipped < packTries {
			return nil
		}
		p.skipped = 0
	}
	b := appendPacked(p.scratch[:0], p.codec, plain)
	p.scratch = b
	if len(b) > len(plain)-len(plain)/8 {
		p.failed++
		return nil
	}
	p.failed = 0
	return b
}

// appendPacked adds the stored form of plain to b.
func appendPacked(b []byte, c Codec, plain []byte) []byte {
	b = le.AppendUint32(b, block.CRC(plain))
	switch c {
	case CodecS2:
		at := len(b)
		if need := at + s2.MaxEncodedLen(len(plain)); cap(b) < need {
			b = append(make([]byte, 0, need), b...)
		}
		return b[:at+len(s2.Encode(b[at:cap(b)], plain))]
	default:
		return zstdEncoder().EncodeAll(plain, b)
	}
}

// unpack turns stored bytes of slot, which passed Verify, into the extent's data; it aliases stored if
// they are not packed. Errors: ErrNewer for a codec of a later version, ErrDamaged for bytes that are not
// what was packed. It allocates what the entry's block count says and no more.
func (x *Index) unpack(slot int, stored []byte) ([]byte, error) {
	e := &x.Entries[slot]
	c := Codec(e.Codec)
	if c == CodecNone {
		return stored, nil
	}
	plain, err := unpack(c, stored, int(e.Blocks)*block.Size)
	if err != nil {
		return nil, fmt.Errorf("segment %d slot %d: %w", x.Info.ID, slot, err)
	}
	return plain, nil
}

func unpack(c Codec, stored []byte, size int) ([]byte, error) {
	if c >= codecs {
		return nil, fmt.Errorf("packed by %v: %w", c, ErrNewer)
	}
	if len(stored) < plainCRCBytes {
		return nil, fmt.Errorf("%v: %d bytes: %w", c, len(stored), ErrDamaged)
	}
	body := stored[plainCRCBytes:]
	var plain []byte
	var err error
	if c == CodecS2 {
		var n int
		if n, err = s2.DecodedLen(body); err == nil && n != size {
			err = fmt.Errorf("%d bytes inside, %d expected", n, size)
		}
		if err == nil {
			plain, err = s2.Decode(make([]byte, size), body)
		}
	} else {
		plain, err = zstdDecoder().DecodeAll(body, make([]byte, 0, size))
	}
	if err == nil && len(plain) != size {
		err = fmt.Errorf("%d bytes inside, %d expected", len(plain), size)
	}
	if err != nil {
		return nil, fmt.Errorf("%v: %w: %w", c, err, ErrDamaged)
	}
	if block.CRC(plain) != le.Uint32(stored) {
		return nil, fmt.Errorf("%v: what was unpacked fails its checksum: %w", c, ErrDamaged)
	}
	return plain, nil
}

// packedBlocksMax is the largest extent that is packed, the largest grain: unpacking may allocate so much
// for a few bytes. zstdWindow is as long.
const (
	packedBlocksMax = 64
	zstdWindow      = packedBlocksMax * block.Size
)

// Both are made on first use and safe for concurrent use, each call on the caller's goroutine.
var (
	zstdEncoder = sync.OnceValue(func() *zstd.Encoder {
		e, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderConcurrency(2),
			zstd.WithWindowSize(zstdWindow), zstd.WithEncoderCRC(false), zstd.WithLowerEncoderMem(true))
		if err != nil {
			panic(err) // of the options above
		}
		return e
	})
	zstdDecoder = sync.OnceValue(func() *zstd.Decoder {
		d, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(0), zstd.WithDecoderLowmem(true),
			zstd.WithDecoderMaxWindow(zstdWindow), zstd.WithDecodeAllCapLimit(true))
		if err != nil {
			panic(err) // of the options above
		}
		return d
	})
)
