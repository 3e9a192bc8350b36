package segment

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"graindisk/block"
)

var update = flag.Bool("update", false, "rewrite the golden files")

// sampleCut is a record with everything in it.
func sampleCut(epoch uint64) *CutRecord {
	return &CutRecord{
		Epoch: epoch, Cut: 12, PrevCut: 11, PrevCRC: 0xfeedbeef, Horizon: 987654, Time: 1750000000,
		Segments: []Info{{ID: 40, Epoch: epoch, K: 2, M: 1, Targets: []block.TargetID{3, 0, 1}, ShardBytes: 1 << 20,
			IndexBytes: 777, Extents: 32, PayloadBytes: 2 << 20}},
		Disks: []DiskChange{
			{Disk: 3, Unmaps: []Run{{LBA: 0, Blocks: 1}, {LBA: 1, Blocks: 5}, {LBA: 1 << 30, Blocks: 1 << 33}}},
			{Disk: 4, Meta: &DiskMeta{Name: "vm1@monday", SizeBytes: 10 << 30, Flags: DiskDeleted, Parent: 3}},
			{Disk: 9, Unmaps: []Run{{LBA: 7, Blocks: 9}}, Meta: &DiskMeta{Name: "vm1", SizeBytes: 10 << 30, Parent: 4}},
		},
	}
}

// goldenSegment is always the same: its bytes are what testdata holds.
func goldenSegment(t testing.TB, k, m uint8, fingerprint bool) (*Sealed, []extent) {
	rng := rand.New(rand.NewPCG(1, 2))
	o := BuildOptions{ID: 258, Epoch: 6, K: k, M: m, Rand: bytes.NewReader([]byte("0123456789abcdef"))}
	if fingerprint {
		o.Fingerprint = func(p []byte) (f [16]byte) { copy(f[:], p); return f }
	}
	list := randomExtents(rng, 3, 1)
	return build(t, o, list, sampleCut(6)), list
}

// TestGolden compares sealed shards with those of the first release, and reads those.
func TestGolden(t *testing.T) {
	for _, c := range []struct {
		k, m        uint8
		fingerprint bool
	}{{2, 1, false}, {1, 1, true}} {
		s, list := goldenSegment(t, c.k, c.m, c.fingerprint)
		stores := newTargets(s.Info.Shards())
		for n, b := range s.Shards {
			file := filepath.Join("testdata", fmt.Sprintf("segment-%d+%d.shard%d", c.k, c.m, n))
			if *update {
				if err := os.WriteFile(file, b, 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(b, want) {
				t.Errorf("%s: what is sealed today differs", file)
			}
			shard, err := OpenShard(want)
			if err != nil {
				t.Fatalf("%s: %v", file, err)
			}
			if !reflect.DeepEqual(shard.Cut, sampleCut(6)) || !reflect.DeepEqual(shard.Trailer.Info, s.Info) {
				t.Errorf("%s: decodes to %+v, %+v", file, shard.Trailer, shard.Cut)
			}
			stores[n].objects[s.Info.Key(n)] = want
		}
		if err := readAll(t.Context(), NewReader(ReaderOptions{Targets: stores.get}), s.Info, list); err != nil {
			t.Error(err)
		}
	}
}

// TestEveryBitFlip changes one bit in every byte of a shard and expects each to be noticed.
func TestEveryBitFlip(t *testing.T) {
	rng := seeded(t)
	s, _ := goldenSegment(t, 2, 1, true)
	for n, b := range s.Shards {
		for at := range b {
			bit := byte(1) << rng.IntN(8)
			b[at] ^= bit
			if _, err := OpenShard(b); !errors.Is(err, ErrDamaged) && !errors.Is(err, ErrNewer) {
				t.Fatalf("shard %d byte %d bit %#x: %v", n, at, bit, err)
			}
			b[at] ^= bit
		}
		for _, size := range []int{0, 1, 100, TrailerBytes, HeaderBytes, len(b) - 1} {
			if _, err := OpenShard(b[:size]); !errors.Is(err, ErrDamaged) {
				t.Fatalf("first %d bytes: %v", size, err)
			}
		}
	}
}

// TestPartsOfOthersDoNotFit exchanges intact parts between two intact shards.
func TestPartsOfOthersDoNotFit(t *testing.T) {
	a, _ := goldenSegment(t, 2, 1, false)
	cut := sampleCut(6)
	cut.Horizon++
	b := build(t, BuildOptions{ID: 258, Epoch: 6, K: 2, M: 1}, randomExtents(rand.New(rand.NewPCG(1, 2)), 3, 1), cut) // another salt
	i := a.Info
	for _, c := range []struct {
		name     string
		from, to int64
	}{
		{"header", 0, HeaderBytes}, {"index", i.indexOffset(), i.cutOffset()}, {"cut record", i.cutOffset(), i.trailerOffset()},
		{"trailer", i.trailerOffset(), i.ObjectBytes()}, {"all but the trailer", 0, i.trailerOffset()},
	} {
		mixed := bytes.Clone(a.Shards[0])
		copy(mixed[c.from:c.to], b.Shards[0][c.from:c.to])
		if _, err := OpenShard(mixed); !errors.Is(err, ErrDamaged) {
			t.Errorf("%s of another segment: %v", c.name, err)
		}
		mixed = bytes.Clone(a.Shards[0])
		copy(mixed[c.from:c.to], a.Shards[1][c.from:c.to])
		if _, err := OpenShard(mixed); c.name != "index" && c.name != "cut record" && !errors.Is(err, ErrDamaged) {
			t.Errorf("%s of another shard: %v", c.name, err)
		}
	}
}

// TestNewer plants versions, bits and flags of the future, with right checksums.
func TestNewer(t *testing.T) {
	s, _ := goldenSegment(t, 1, 1, false)
	b, i := s.Shards[0], s.Info
	for _, c := range []struct {
		name   string
		part   []byte
		decode func([]byte) error
	}{
		{"header", b[:HeaderBytes], func(p []byte) error { _, err := DecodeHeader(p); return err }},
		{"index", b[i.indexOffset():i.cutOffset()], func(p []byte) error { _, err := DecodeIndex(p); return err }},
		{"cut record", b[i.cutOffset():i.trailerOffset()], func(p []byte) error { _, err := DecodeCutRecord(p); return err }},
		{"trailer", b[i.trailerOffset():], func(p []byte) error { _, err := DecodeTrailer(p); return err }},
	} {
		for _, f := range []struct {
			at    int
			value byte
			names string
		}{{4, 2, "version 2"}, {7, 1, "flags 0x100"}, {15, 0x80, "bits 0x8000000000000000"}} {
			p := bytes.Clone(c.part)
			p[f.at] = f.value
			err := c.decode(seal(p[:len(p)-crcBytes], 0))
			if !errors.Is(err, ErrNewer) || !strings.Contains(err.Error(), f.names) {
				t.Errorf("%s: %v does not name %q", c.name, err, f.names)
			}
		}
		if err := c.decode(c.part); err != nil {
			t.Errorf("%s: %v", c.name, err)
		}
	}
}

// TestNotCanonical plants contents that no writer gives, with right checksums.
func TestNotCanonical(t *testing.T) {
	s, _ := goldenSegment(t, 1, 1, false)
	b, i := s.Shards[0], s.Info
	index := b[i.indexOffset():i.cutOffset()]
	for _, c := range []struct {
		name  string
		at    int
		value string
	}{
		{"payload that is not the sum of the extents", 80, "\x00\x50"},
		{"padding that is not zero", 70, "\x01"},
		{"shard area of half a block", 72, "\x00\x08"},
		{"fewer extents than entries", 76, "\x02"},
		{"more extents than entries", 76, "\x04"},
		{"more extents than bytes", 78, "\xff"},
		{"entry bit 7", 88, "\x85"},
		{"disk 0", 89, "\x00"},
	} {
		p := bytes.Clone(index)
		copy(p[c.at:], c.value)
		if _, err := DecodeIndex(seal(p[:len(p)-crcBytes], 0)); !errors.Is(err, ErrDamaged) {
			t.Errorf("index with %s: %v", c.name, err)
		}
	}
	x := &Index{Info: Info{ID: 1, K: 1, ShardBytes: 8192, PayloadBytes: 4096}}
	x.Entries = []Entry{{Name: block.NewExtentID(1, 0), Disk: 1, Blocks: 1, Stored: 4096, Offset: 100}}
	if _, err := DecodeIndex(appendIndex(nil, x)); !errors.Is(err, ErrDamaged) {
		t.Errorf("unaligned extent: %v", err)
	}
	long := &cursor{what: "test", b: []byte{0x81, 0x00}}
	if long.uvarint(1 << 40); !errors.Is(long.err, ErrDamaged) {
		t.Error("a varint longer than needed passes")
	}
	r := (&CutRecord{Cut: 1}).Append(nil)
	for _, tail := range []string{"\x00\x00\x00", "\x01\x00", "\xff\x01\x00", "\x00\x01\x01\x04", "\x00\x01\x01\x01\x00", "\x00\x02\x01\x00\x00\x00"} {
		p := append(bytes.Clone(r[:cutHeaderBytes]), tail...)
		if _, err := DecodeCutRecord(seal(p, 0)); !errors.Is(err, ErrDamaged) {
			t.Errorf("cut record with %x: %v", tail, err)
		}
	}
}

// TestEncryptedIsRefused meets a key id, for which version 1 has no meaning.
func TestEncryptedIsRefused(t *testing.T) {
	s, _ := goldenSegment(t, 1, 1, false)
	index := bytes.Clone(s.Shards[0][s.Info.indexOffset():s.Info.cutOffset()])
	index[64] = 3 // key id
	if _, err := DecodeIndex(seal(index[:len(index)-crcBytes], 0)); !errors.Is(err, ErrNewer) {
		t.Errorf("encrypted segment: %v", err)
	}
}

// TestIndexIsSmall holds the index to 12 bytes per random 4 KiB extent and 8 per sequential grain.
func TestIndexIsSmall(t *testing.T) {
	rng := seeded(t)
	random, sequential := &Index{}, &Index{}
	lba := block.LBA(0)
	for slot := range 8192 {
		lba += block.LBA(1 + rng.IntN(6400)) // 8192 random writes over 100 GiB
		e := Entry{Name: block.NewExtentID(5, slot), Disk: 1, LBA: lba, Blocks: 1, Seq: 1e6 + rng.Uint64N(1<<18), Offset: uint32(slot) * 4096, Stored: 4096, CRC: rng.Uint32()}
		random.Entries = append(random.Entries, e)
		e.LBA, e.Blocks, e.Stored, e.Offset, e.Seq = block.LBA(slot)*16, 16, 65536, uint32(slot)*65536, uint64(slot)
		sequential.Entries = append(sequential.Entries, e)
	}
	for _, c := range []struct {
		name string
		x    *Index
		max  float64
	}{{"random", random, 12}, {"sequential", sequential, 8}} {
		c.x.Info.ID = 5
		per := float64(len(appendIndex(nil, c.x))) / 8192
		t.Logf("%s: %.2f bytes per extent", c.name, per)
		if per > c.max {
			t.Errorf("%s: %.2f bytes per extent, more than %v", c.name, per, c.max)
		}
	}
}

// TestIndexFields round-trips what the builder of today never writes, and moved names.
func TestIndexFields(t *testing.T) {
	rng := seeded(t)
	for range 200 {
		x := &Index{Info: Info{ID: 1 << 40, Epoch: rng.Uint64(), K: 3, M: 2, ShardBytes: 64 << 20}, Pool: testPool}
		var disk block.DiskID
		var lba block.LBA
		shard, at := uint8(0), uint32(0)
		x.Entries = []Entry{}
		for slot := range rng.IntN(50) {
			if disk == 0 || rng.IntN(5) == 0 {
				disk, lba = disk+1+block.DiskID(rng.Uint32N(1<<20)), block.LBA(rng.Uint64N(1<<40))
			}
			if shard < 2 && rng.IntN(9) == 0 {
				shard, at = shard+1, 0
			}
			e := Entry{Name: block.NewExtentID(1<<40, slot), Disk: disk, LBA: lba, Blocks: uint16(1 + rng.IntN(64)), Seq: rng.Uint64(), Shard: shard, CRC: rng.Uint32()}
			at = (at + 4095) &^ 4095
			e.Offset, e.Stored = at+4096*rng.Uint32N(3), uint32(e.Blocks)*4096
			if rng.IntN(3) == 0 {
				e.Codec, e.Stored = 7, 1+rng.Uint32N(5000)
			}
			if rng.IntN(3) == 0 {
				e.Name = block.NewExtentID(block.SegmentID(1+rng.Uint64N(1<<47)), rng.IntN(block.ExtentsMax))
			}
			at = e.Offset + e.Stored
			lba += block.LBA(rng.IntN(100)) // may overlap the one before: versions of one block can be moved together
			x.Entries = append(x.Entries, e)
			x.Info.PayloadBytes += uint64(e.Blocks) * 4096
		}
		if rng.IntN(2) == 0 {
			x.Fingerprints = make([][16]byte, len(x.Entries))
			for i := range x.Fingerprints {
				le.PutUint64(x.Fingerprints[i][:], rng.Uint64())
			}
		}
		b := appendIndex(nil, x)
		x.Info.IndexBytes, x.Info.Extents = uint32(len(b)), uint32(len(x.Entries))
		got, err := DecodeIndex(b)
		if err != nil || !reflect.DeepEqual(got, x) {
			t.Fatalf("got %+v, want %+v; %v", got, x, err)
		}
	}
}

// TestCutRecord round-trips 100 000 unmaps in little space and chains two records.
func TestCutRecord(t *testing.T) {
	rng := seeded(t)
	r := sampleCut(2)
	if b := r.Append(nil); le.Uint32(b[len(b)-4:]) != r.CRC() || block.CRC(b[:len(b)-4]) != r.CRC() {
		t.Error("CRC() is not the checksum of the encoding")
	}
	all := r.AllSegments(Info{ID: 99})
	if len(all) != 2 || all[0].ID != 40 || all[1].ID != 99 || len(r.Segments) != 1 {
		t.Errorf("segments of the cut: %v", all)
	}
	big := DiskChange{Disk: 77}
	var at block.LBA
	for range 100_000 {
		at += block.LBA(rng.IntN(5000))
		u := Run{LBA: at, Blocks: 1 + rng.Uint64N(500)}
		big.Unmaps = append(big.Unmaps, u)
		at += block.LBA(u.Blocks)
	}
	r.Disks = append(r.Disks, big)
	b := r.Append(nil)
	got, err := DecodeCutRecord(b)
	if err != nil || !reflect.DeepEqual(got, r) || len(b) > 500_000 {
		t.Fatalf("%d bytes, equal %v, %v", len(b), reflect.DeepEqual(got, r), err)
	}
	for name, bad := range map[string]func(*CutRecord){
		"cut 0":               func(r *CutRecord) { r.Cut, r.PrevCut = 0, 0 },
		"cut before previous": func(r *CutRecord) { r.PrevCut = 12 },
		"disks out of order":  func(r *CutRecord) { r.Disks[0].Disk = 5 },
		"disk 0":              func(r *CutRecord) { r.Disks[0].Disk = 0 },
		"overlapping unmaps":  func(r *CutRecord) { r.Disks[0].Unmaps[1].LBA = 0 },
		"empty unmap":         func(r *CutRecord) { r.Disks[0].Unmaps[1].Blocks = 0 },
		"unmap past the end":  func(r *CutRecord) { r.Disks[0].Unmaps[2].Blocks = 1 << 63 },
		"parent after child":  func(r *CutRecord) { r.Disks[1].Meta.Parent = 4 },
		"long name":           func(r *CutRecord) { r.Disks[1].Meta.Name = strings.Repeat("x", 256) },
		"segment without id":  func(r *CutRecord) { r.Segments[0].ID = 0 },
		"own segment":         func(r *CutRecord) { r.Segments[0].ID = 5 },
		"another epoch":       func(r *CutRecord) { r.Epoch = 3 },
	} {
		r := sampleCut(2)
		bad(r)
		builder, err := NewBuilder(BuildOptions{ID: 5, Epoch: 2, K: 1})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := builder.Seal(r, planned(1, 0)); err == nil {
			t.Errorf("%s: sealed", name)
		}
	}
}

// TestReadCut reads a record through whatever shard has it intact, from segments with and without data.
func TestReadCut(t *testing.T) {
	ctx := t.Context()
	for _, extents := range []int{0, 6} {
		s := build(t, BuildOptions{ID: 20, Epoch: 2, Cut: 12, K: 2, M: 1}, randomExtents(seeded(t), extents, 2), sampleCut(2))
		if (s.Info.ShardBytes == 0) != (extents == 0) {
			t.Fatalf("%d extents in areas of %d bytes", extents, s.Info.ShardBytes)
		}
		for broken := range 4 {
			stores := newTargets(3)
			stores.put(s)
			for n := range broken {
				switch n {
				case 0:
					stores.flip(s.Info, n, s.Info.indexOffset()+20)
				case 1:
					stores.flip(s.Info, n, s.Info.cutOffset()+20)
				case 2:
					clear(stores[n].objects)
				}
			}
			cut, x, err := ReadCut(ctx, stores.get, s.Info)
			if broken == 3 {
				if !errors.Is(err, ErrDamaged) {
					t.Errorf("nothing intact: %v", err)
				}
				continue
			}
			if err != nil || !reflect.DeepEqual(cut, sampleCut(2)) || len(x.Entries) != extents || stores.reads() != broken+1 {
				t.Errorf("%d broken: %+v, %v", broken, cut, err)
			}
		}
		stores := newTargets(3)
		stores.put(s)
		for n := range 3 {
			tr, err := ReadTrailer(ctx, stores[n], s.Info.Key(n), s.Info.ObjectBytes())
			if err != nil || !reflect.DeepEqual(tr.Info, s.Info) || tr.Cut != 12 || int(tr.Shard) != n || tr.CutCRC != sampleCut(2).CRC() || tr.Pool != testPool {
				t.Errorf("trailer of shard %d: %+v, %v", n, tr, err)
			}
		}
		other := build(t, BuildOptions{ID: 21, Epoch: 2, K: 2, M: 1}, randomExtents(seeded(t), extents, 2), sampleCut(2))
		info := other.Info // asks for 21 where 20 lies
		info.ShardBytes, info.IndexBytes, info.CutBytes = s.Info.ShardBytes, s.Info.IndexBytes, s.Info.CutBytes
		for n := range 3 {
			stores[n].objects[info.Key(n)] = s.Shards[n]
		}
		if _, _, err := ReadCut(ctx, stores.get, info); !errors.Is(err, ErrDamaged) {
			t.Errorf("record of another segment: %v", err)
		}
		stores[0].objects[s.Info.Key(0)] = s.Shards[1]
		if _, err := ReadTrailer(ctx, stores[0], s.Info.Key(0), s.Info.ObjectBytes()); !errors.Is(err, ErrDamaged) {
			t.Errorf("shard 1 under the key of shard 0: %v", err)
		}
	}
	s := build(t, BuildOptions{ID: 20, K: 1}, nil, nil)
	if _, _, err := ReadCut(ctx, newTargets(1).get, s.Info); err == nil {
		t.Error("a cut record was read where there is none")
	}
}

func TestKeysAndInfo(t *testing.T) {
	i := Info{ID: 0x1ff, Epoch: 41, K: 2, M: 1, Targets: []block.TargetID{1, 0, 65535}, ShardBytes: 4096, IndexBytes: 100, CutBytes: 70, Extents: 1, PayloadBytes: 4096}
	if k := i.Key(2); k != "seg/ff/511-41.2" {
		t.Errorf("key %q", k)
	}
	if id, epoch, shard, ok := ParseKey(i.Key(2)); !ok || id != 0x1ff || epoch != 41 || shard != 2 {
		t.Errorf("parsed %d %d %d %v", id, epoch, shard, ok)
	}
	for _, k := range []string{"", "seg/ff/511-41", "seg/fe/511-41.2", "seg/ff/511-41.2.3", "seg/ff/0511-41.2", "ckpt/ff/511-41.2", "seg/ff/511-41.20", "seg/ff/511-41.-1", "seg/ff/511.41-2"} {
		if _, _, _, ok := ParseKey(k); ok {
			t.Errorf("%q parses", k)
		}
	}
	b := append(i.Append(nil), 0xaa)
	got, rest, err := DecodeInfo(b)
	if err != nil || !reflect.DeepEqual(got, i) || !bytes.Equal(rest, []byte{0xaa}) {
		t.Errorf("%+v, %x, %v", got, rest, err)
	}
	for n := range len(b) - 1 {
		if _, _, err := DecodeInfo(b[:n]); !errors.Is(err, ErrDamaged) {
			t.Errorf("%d bytes of an info: %v", n, err)
		}
	}
	var back Info
	if j, err := json.Marshal(i); err != nil || json.Unmarshal(j, &back) != nil || !reflect.DeepEqual(back, i) {
		t.Errorf("json: %s, %v", j, err)
	}
}

// TestDescribe dumps an intact and a damaged shard.
func TestDescribe(t *testing.T) {
	s, _ := goldenSegment(t, 2, 1, false)
	var out strings.Builder
	if err := Describe(&out, s.Shards[1]); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"segment 258 epoch 6, shard 1 of 2+1", "slot 2 name 258.2 ", "cut 12 epoch 6", "with segment 40", `disk 4 is "vm1@monday"`, "disk 3 unmap 5 blocks at 1"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("no %q in:\n%s", want, &out)
		}
	}
	s.Shards[1][HeaderBytes+5] ^= 1
	s.Shards[1][7] ^= 1
	r, err := Inspect(s.Shards[1])
	if err == nil || len(r.Problems) != 3 || len(r.Extents) != 3 || r.CutData == nil { // header, area, its extent
		t.Errorf("%v: %+v", err, r)
	}
	if r, err := Inspect([]byte("no shard")); !errors.Is(err, ErrDamaged) || len(r.Problems) == 0 {
		t.Errorf("%v: %+v", err, r)
	}
}
