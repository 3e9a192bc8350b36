package segment

import (
	"bytes"
	"errors"
	"testing"
)

// withCRC replaces the last four bytes by the right checksum, so that the fuzzer gets past it.
func withCRC(b []byte) []byte {
	if len(b) < crcBytes {
		return b
	}
	return seal(bytes.Clone(b[:len(b)-crcBytes]), 0)
}

// checkDecoder expects b refused by a known error, or encoded back to the same bytes.
func checkDecoder(t *testing.T, b []byte, err error, encode func() []byte) {
	t.Helper()
	if err != nil {
		if !errors.Is(err, ErrDamaged) && !errors.Is(err, ErrNewer) {
			t.Fatalf("unclassified: %v", err)
		}
		return
	}
	if got := encode(); !bytes.Equal(got, b) {
		t.Fatalf("decodes, but encodes back to %x, not %x", got, b)
	}
}

func FuzzDecodeIndex(f *testing.F) {
	for _, fingerprint := range []bool{false, true} {
		s, _ := goldenSegment(f, 2, 1, fingerprint)
		f.Add(s.Shards[0][s.Info.indexOffset():s.Info.cutOffset()])
	}
	f.Add(appendIndex(nil, &Index{Info: Info{ID: 1, K: 1}}))
	f.Fuzz(func(t *testing.T, b []byte) {
		b = withCRC(b)
		x, err := DecodeIndex(b)
		checkDecoder(t, b, err, func() []byte { return appendIndex(nil, x) })
	})
}

func FuzzDecodeCutRecord(f *testing.F) {
	f.Add(sampleCut(4).Append(nil))
	f.Add((&CutRecord{Cut: 1}).Append(nil))
	f.Add((&CutRecord{Cut: 12, Gone: sampleGone()}).Append(nil))
	f.Add(deletedCut().Append(nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		b = withCRC(b)
		r, err := DecodeCutRecord(b)
		checkDecoder(t, b, err, func() []byte { return r.Append(nil) })
	})
}

func FuzzDecodeTrailer(f *testing.F) {
	s, _ := goldenSegment(f, 2, 1, false)
	f.Add(s.Shards[2][s.Info.trailerOffset():])
	f.Fuzz(func(t *testing.T, b []byte) {
		b = withCRC(b[max(0, len(b)-TrailerBytes):])
		tr, err := DecodeTrailer(b)
		checkDecoder(t, b, err, func() []byte { return tr.append(nil) })
	})
}

func FuzzDecodeHeader(f *testing.F) {
	s, _ := goldenSegment(f, 2, 1, false)
	f.Add(s.Shards[2][:HeaderBytes])
	f.Fuzz(func(t *testing.T, b []byte) {
		b = withCRC(b[:min(len(b), HeaderBytes)])
		h, err := DecodeHeader(b)
		checkDecoder(t, b, err, func() []byte { return h.append(nil) })
	})
}

func FuzzDecodeInfo(f *testing.F) {
	f.Add(sampleCut(4).Segments[0].Append(nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		i, rest, err := DecodeInfo(b)
		checkDecoder(t, b[:len(b)-len(rest)], err, func() []byte { return i.Append(nil) })
	})
}

// FuzzOpenShard feeds whole objects to all that looks at them.
func FuzzOpenShard(f *testing.F) {
	s := build(f, BuildOptions{ID: 4, Epoch: 2, K: 1, M: 1}, nil, sampleCut(2)) // small: no area
	f.Add(s.Shards[0])
	f.Add(s.Shards[1][:HeaderBytes])
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := OpenShard(b)
		r, err2 := Inspect(b)
		if (err == nil) != (err2 == nil) || (err == nil) != (len(r.Problems) == 0) {
			t.Fatalf("open: %v; inspect: %v, %v", err, err2, r.Problems)
		}
		if err == nil && s.Trailer.Info.ObjectBytes() != int64(len(b)) {
			t.Fatal("size")
		}
	})
}
