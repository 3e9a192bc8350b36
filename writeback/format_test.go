package writeback

import (
	"bytes"
	"errors"
	"flag"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"

	"graindisk/block"
	"graindisk/tier"
)

var update = flag.Bool("update", false, "rewrite the golden files")

var (
	goldLog  = UUID{1, 1, 1, 1}
	goldTerm = UUID{2, 2, 2, 2}
)

// goldBatch is a batch of one record of each kind.
func goldBatch() (*batchHeader, []byte) {
	payload := append(append(stampBlock(7), stampBlock(8)...), padded([]byte("snapshot"))...)
	h := &batchHeader{log: goldLog, term: goldTerm, file: 3, offset: 1, first: 100, stable: 99, prevCRC: 0xabcd, time: 1e18,
		entries: []entry{{Data, 5, 1000, 2}, {Unmap, 5, 0, 1 << 34}, {Op, 6, 8, 1}}}
	for i := 0; i < len(payload); i += block.Size {
		h.crcs = append(h.crcs, block.CRC(payload[i:i+block.Size]))
	}
	return h, payload
}

func goldIndex() *ckptIndex {
	g := newGeneration(0)
	crcs := someChecksums()
	crcs.put(tier.NewPlace(2, 4), []uint32{1, 2, 3})
	g.apply(1, 5, entry{Data, 1, 10, 3}, tier.NewPlace(2, 4), nil)
	g.apply(2, 6, entry{Unmap, 1, 11, 1}, 0, nil)
	g.apply(3, 7, entry{Op, 2, 2, 1}, 0, []byte("op"))
	return &ckptIndex{
		crcs:  crcs,
		pos:   position{term: goldTerm, file: 4, seq: 4, prevCRC: 9},
		files: []*logFile{{slot: 2, file: 3, first: 1, last: 3}},
		gens:  []*generation{g, newGeneration(3)},
	}
}

// someChecksums is for a tier of 8 slots of 64 blocks.
func someChecksums() checksums {
	return checksums{64, make([]atomic.Pointer[[]uint32], 8), new(atomic.Int64)}
}

func encodeIndex(x *ckptIndex) (b []byte) {
	x.encode(func(p []byte) error { b = append(b, p...); return nil })
	return b
}

// golden has one encoding of each format.
func golden() map[string][]byte {
	fh := fileHeader{log: goldLog, term: goldTerm, file: 3, slot: 17, slotBlocks: 16384, first: 100, stable: 99, prevCRC: 0x1234}
	bh, payload := goldBatch()
	batch := bh.encode(nil)
	f := &logFile{slot: 17, file: 3, term: goldTerm, first: 100, last: 102, end: 5, prevCRC: bh.crc, time: 1e18}
	sealed := encodeSealed(f, bh.appendSealed(nil, func(int) []byte { return []byte("snapshot") }))
	mh := metaHeader{log: goldLog, term: goldTerm, number: 2, previous: 1, first: 5}
	mr := metaRecord{kind: metaSealed, seq: 5, offset: block.Size, payload: sealed}
	index := encodeIndex(goldIndex())
	ch := ckptHeader{log: goldLog, generation: 1, firstMeta: 2, seq: 3, indexLen: uint64(len(index)), stateLen: 5,
		indexCRC: block.CRC(index), stateCRC: block.CRC([]byte("state"))}
	return map[string][]byte{
		"file":       fh.encode(),
		"batch":      append(batch, payload...),
		"meta":       append(mh.encode(), mr.encode(goldTerm.seed())...),
		"checkpoint": append(append(ch.encode(), index...), "state"...),
		"identity":   identity{log: goldLog, pool: testPool, slotBytes: 64 << 20}.encode(),
	}
}

func TestFormatsAreFrozen(t *testing.T) {
	for name, got := range golden() {
		file := filepath.Join("testdata", name+".golden")
		if *update {
			if err := os.WriteFile(file, got, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, want) {
			t.Errorf("%s: what is written is not what was released", name)
		}
	}
}

func TestEncodedComesBack(t *testing.T) {
	g := golden()
	h, err := decodeBatchHeader(g["batch"], goldTerm)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(h.encode(nil), g["batch"][:block.Size]) {
		t.Error("batch header changed")
	}
	if _, err := decodeBatchHeader(g["batch"], UUID{}); !errors.Is(err, errTorn) {
		t.Errorf("batch of another term: %v", err)
	}
	m, _, err := decodeMetaRecord(g["meta"][block.Size:], block.Size, goldTerm.seed())
	if err != nil {
		t.Fatal(err)
	}
	s, err := decodeSealed(m.payload)
	if err != nil || s.last() != 102 {
		t.Fatalf("sealed: %+v, %v", s, err)
	}
	var recs []sealedRecord
	s.each(func(seq Seq, r *sealedRecord) {
		if seq != 100+Seq(len(recs)) {
			t.Errorf("sealed record %d is numbered %d", len(recs), seq)
		}
		recs = append(recs, *r)
	})
	if string(recs[2].payload) != "snapshot" || le.Uint32(recs[0].crcs[4:]) != h.crcs[1] || recs[2].at != 4 {
		t.Errorf("sealed: %+v", recs)
	}
	_, x, state, err := parseCkpt(g["checkpoint"], someChecksums())
	if err != nil || string(state) != "state" || !bytes.Equal(encodeIndex(x), encodeIndex(goldIndex())) {
		t.Errorf("checkpoint: %+v, %v", x, err)
	}
}

// decoders read each golden format from its head.
var decoders = map[string]func([]byte) error{
	"file":       func(b []byte) error { _, err := decodeFileHeader(b); return err },
	"batch":      func(b []byte) error { _, err := decodeBatchHeader(b, goldTerm); return err },
	"meta":       func(b []byte) error { _, err := decodeMetaHeader(b); return err },
	"checkpoint": func(b []byte) error { _, _, _, err := parseCkpt(b, someChecksums()); return err },
	"identity":   func(b []byte) error { _, err := decodeIdentity(b); return err },
}

// reseal makes the header's checksum right again after a change.
func reseal(name string, b []byte) {
	switch name {
	case "batch":
		le.PutUint32(b[batchCRCAt:], crcAround(goldTerm.seed(), b[:block.Size], batchCRCAt))
	case "file", "meta":
		le.PutUint32(b[fileCRCAt:], crcSeeded(goldTerm.seed(), b[:fileCRCAt]))
	default:
		le.PutUint32(b[fileCRCAt:], block.CRC(b[:fileCRCAt]))
	}
}

func TestNewerAndDamagedAreTold(t *testing.T) {
	for name, whole := range golden() {
		decode := decoders[name]
		for what, c := range map[string]struct {
			at   int
			seal bool
			want error
		}{
			"newer version":    {4, true, ErrNewer},
			"unknown incompat": {9, true, ErrNewer},
			"flipped version":  {4, false, errTorn},
			"flipped bit":      {50, false, errTorn},
			"padding in use":   {4000, true, errTorn},
		} {
			b := bytes.Clone(whole)
			b[c.at] ^= 2
			if c.seal {
				reseal(name, b)
			}
			if err := decode(b); !errors.Is(err, c.want) {
				t.Errorf("%s, %s: %v, want %v", name, what, err, c.want)
			}
		}
		for n := range 64 {
			if err := decode(whole[:n]); !errors.Is(err, errTorn) {
				t.Errorf("%s cut to %d bytes: %v", name, n, err)
			}
		}
	}
	b := bytes.Clone(golden()["batch"])
	b[batchFixed] = byte(dataRef)
	reseal("batch", b)
	if err := decoders["batch"](b); !errors.Is(err, ErrNewer) {
		t.Errorf("DATAREF: %v", err)
	}
}

// fuzzHeader feeds a decoder with headers whose checksum is made right.
func fuzzHeader(f *testing.F, name string) {
	f.Add(golden()[name])
	f.Fuzz(func(t *testing.T, b []byte) {
		decoders[name](b)
		if len(b) >= block.Size {
			copy(b[32:48], goldTerm[:])
			reseal(name, b)
			decoders[name](b)
		}
	})
}

func FuzzFileHeader(f *testing.F) { fuzzHeader(f, "file") }
func FuzzMetaHeader(f *testing.F) { fuzzHeader(f, "meta") }
func FuzzIdentity(f *testing.F)   { fuzzHeader(f, "identity") }

func FuzzBatchHeader(f *testing.F) {
	f.Add(golden()["batch"][:block.Size])
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) < block.Size {
			b = append(b, make([]byte, block.Size-len(b))...)
		}
		b = b[:block.Size]
		copy(b, batchMagic)
		copy(b[32:48], goldTerm[:])
		le.PutUint32(b[60:], 1)
		reseal("batch", b)
		h, err := decodeBatchHeader(b, goldTerm)
		if err != nil {
			return
		}
		h2, err := decodeBatchHeader(h.encode(nil), goldTerm)
		if err != nil || h2.last() != h.last() || h2.payload != h.payload {
			t.Fatalf("%+v came back as %+v, %v", h, h2, err)
		}
	})
}

func FuzzMetaRecord(f *testing.F) {
	f.Add(golden()["meta"][block.Size:])
	f.Fuzz(func(t *testing.T, b []byte) {
		decodeMetaRecord(b, block.Size, goldTerm.seed())
		if len(b) >= metaFixed {
			n := int(le.Uint32(b[8:]))
			if n = blocksFor(metaFixed+n) * block.Size; n <= len(b) {
				le.PutUint32(b[12:], crcAround(goldTerm.seed(), b[:n], 12))
				decodeMetaRecord(b, block.Size, goldTerm.seed())
			}
		}
	})
}

func FuzzSealed(f *testing.F) {
	m, _, _ := decodeMetaRecord(golden()["meta"][block.Size:], block.Size, goldTerm.seed())
	f.Add(m.payload)
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := decodeSealed(b)
		if err != nil {
			return
		}
		file := &logFile{slot: int(s.slot), file: s.file, term: s.term, first: s.first, last: s.last(), end: s.end, prevCRC: s.endCRC, time: s.time}
		again, err := decodeSealed(encodeSealed(file, s.body))
		if err != nil || again.last() != s.last() {
			t.Fatalf("%+v came back as %+v, %v", s, again, err)
		}
	})
}

func FuzzCheckpointIndex(f *testing.F) {
	f.Add(encodeIndex(goldIndex()))
	f.Fuzz(func(t *testing.T, b []byte) {
		decodeCkptIndex(b, checksums{})
		x, err := decodeCkptIndex(b, someChecksums())
		if err != nil {
			return
		}
		if _, err := decodeCkptIndex(encodeIndex(x), someChecksums()); err != nil {
			t.Fatalf("what was decoded does not decode again: %v", err)
		}
	})
}

func FuzzPosition(f *testing.F) {
	f.Add(goldIndex().pos.append(nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		if p, err := decodePosition(b); err == nil && !bytes.Equal(p.append(nil), b[:positionLen]) {
			t.Fatalf("%x came back as %x", b, p.append(nil))
		}
	})
}
