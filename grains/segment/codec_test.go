package segment

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"graindisk/block"
)

// mixedExtents returns sorted extents, about half of which can be packed.
func mixedExtents(rng *rand.Rand, n, blocksMax int) []extent {
	list := randomExtents(rng, n, blocksMax)
	for i := range list {
		if rng.IntN(2) == 0 {
			p := list[i].data
			for j := 0; j < len(p); j += 64 {
				copy(p[j:], fmt.Sprintf("line %d of extent %d, and some more of the same text", j/64, i))
			}
			le.PutUint64(p[rng.IntN(len(p)-8):], rng.Uint64())
			continue
		}
		for j := 0; j < len(list[i].data); j += 8 {
			le.PutUint64(list[i].data[j:], rng.Uint64())
		}
	}
	return list
}

// buildPacked seals the extents in a segment of room stored bytes; those that do not fit are left out.
func buildPacked(t testing.TB, o BuildOptions, room int64, list []extent) (*Sealed, []extent) {
	t.Helper()
	o.Pool, o.PayloadBytes = testPool, room
	b, err := NewBuilder(o)
	if err != nil {
		t.Fatal(err)
	}
	for i, e := range list {
		err := b.AddData(e.disk, e.lba, e.data, e.seq)
		if errors.Is(err, ErrFull) {
			list = list[:i]
			break
		}
		if err != nil {
			t.Fatalf("extent %d: %v", i, err)
		}
	}
	s, err := b.Seal(nil, planned(o.K, o.M))
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Verify(); err != nil {
		t.Fatal(err)
	}
	return s, list
}

func packedExtents(s *Sealed) (n int) {
	for _, e := range s.Index.Entries {
		if e.Codec != 0 {
			n++
		}
	}
	return n
}

// TestPackedSegments packs random extents with every codec, over memory full of old bytes, and reads
// them back healthy and with every choice of m shards lost.
func TestPackedSegments(t *testing.T) {
	rng := seeded(t)
	buffers := NewBuffers(1 << 30)
	packed, raw := 0, 0
	for _, c := range []Codec{CodecNone, CodecS2, CodecZstd} {
		for _, p := range [][2]uint8{{1, 0}, {2, 1}, {4, 2}} {
			for round := range 3 {
				list := mixedExtents(rng, 1+rng.IntN(60), 1+rng.IntN(16))
				var plain int64
				for _, e := range list {
					plain += int64(len(e.data))
				}
				o := BuildOptions{ID: 7, Epoch: 2, K: p[0], M: p[1], Codec: c, Buffers: buffers}
				s, fit := buildPacked(t, o, up(plain, block.Size), list)
				if len(fit) != len(list) || s.Info.PayloadBytes != uint64(plain) {
					t.Fatalf("%v: %d of %d extents, %d of %d bytes", c, len(fit), len(list), s.Info.PayloadBytes, plain)
				}
				n := packedExtents(s)
				if c == CodecNone && n > 0 {
					t.Fatalf("%d extents packed unasked", n)
				}
				packed, raw = packed+n, raw+len(list)-n
				stores := newTargets(s.Info.Shards())
				stores.put(s)
				for n, b := range s.Shards {
					if _, err := OpenShard(b); err != nil {
						t.Fatalf("%v round %d shard %d: %v", c, round, n, err)
					}
				}
				checkPadding(t, s)
				losses(s.Info.Shards(), int(p[1]), func(lost []int) {
					info := s.Info
					info.Targets = slices.Clone(info.Targets)
					for _, l := range lost {
						info.Targets[l] = 0
					}
					if err := readAll(t.Context(), NewReader(ReaderOptions{Targets: stores.get}), info, list); err != nil {
						t.Fatalf("%v %d+%d without %v: %v", c, p[0], p[1], lost, err)
					}
				})
				for _, b := range s.Shards { // the next one must not show through
					b = b[:cap(b)]
					for i := range b {
						b[i] = 0xa5
					}
				}
				s.Release(true)
			}
		}
	}
	if packed == 0 || raw == 0 {
		t.Errorf("%d extents packed, %d not", packed, raw)
	}
	if st := buffers.Stats(); st.Lent != 0 || st.Peak == 0 || st.Idle == 0 {
		t.Errorf("memory: %+v", st)
	}
}

// checkPadding expects zeroes between and behind the extents of every data shard.
func checkPadding(t *testing.T, s *Sealed) {
	t.Helper()
	for n, b := range s.Shards[:s.Info.K] {
		area := bytes.Clone(b[HeaderBytes:s.Info.indexOffset()])
		for _, e := range s.Index.Entries {
			if int(e.Shard) == n {
				clear(area[e.Offset : e.Offset+e.Stored])
			}
		}
		if !bytes.Equal(area, make([]byte, len(area))) {
			t.Errorf("shard %d of %d+%d shows old memory between its extents", n, s.Info.K, s.Info.M)
		}
	}
}

// TestPackingFillsByStoredBytes fills a segment with text that packs well: it holds far more than its
// room, and its columns are even, also when it stays nearly empty.
func TestPackingFillsByStoredBytes(t *testing.T) {
	rng := seeded(t)
	for _, c := range []Codec{CodecS2, CodecZstd} {
		var list []extent
		for i := range 400 {
			e := extent{1, block.LBA(16 * i), 16, 1, make([]byte, 64<<10)}
			for j := 0; j < len(e.data); j += 32 {
				copy(e.data[j:], fmt.Sprintf("%d of the %dth is text", rng.IntN(1000), j))
			}
			list = append(list, e)
		}
		const room = 2 << 20
		full, fit := buildPacked(t, BuildOptions{ID: 7, K: 4, M: 2, Codec: c}, room, list)
		if got := full.Info.PayloadBytes; got < 2*room || len(fit) == len(list) {
			t.Errorf("%v: %d bytes in a segment for %d", c, got, room)
		}
		part, _ := buildPacked(t, BuildOptions{ID: 8, K: 4, M: 2, Codec: c}, room, list[:40])
		for _, s := range []*Sealed{full, part} {
			var stored int64
			for _, e := range s.Index.Entries {
				stored += int64(e.Stored)
			}
			if even := stored/4 + 64<<10; int64(s.Info.ShardBytes) > up(even, block.Size) {
				t.Errorf("%v: areas of %d bytes for %d stored in 4", c, s.Info.ShardBytes, stored)
			}
		}
	}
}

// TestWhatDoesNotPackIsHardlyTried counts how often packing is tried on noise.
func TestWhatDoesNotPackIsHardlyTried(t *testing.T) {
	noise := randomExtents(seeded(t), 1, 1)[0].data
	for i := range noise {
		noise[i] ^= byte(rand.Uint32())
	}
	p := packer{codec: CodecS2}
	text := bytes.Repeat([]byte("text"), 1024)
	tries, before := 0, 0
	for range 1000 {
		if before = p.failed; p.pack(noise) != nil {
			t.Fatal("noise was packed")
		}
		tries += p.failed - before
	}
	if tries < 1000/packTries || tries > 1000/packTries+packTries {
		t.Errorf("%d tries for 1000 extents of noise", tries)
	}
	found := 0
	for range packTries {
		if p.pack(text) != nil {
			found++
		}
	}
	if found == 0 || p.pack(text) == nil {
		t.Errorf("text after noise is not found")
	}
}

// TestVerifyFindsAnyChange flips one bit of every part of a sealed stripe.
func TestVerifyFindsAnyChange(t *testing.T) {
	rng := seeded(t)
	s := build(t, BuildOptions{ID: 7, Epoch: 2, K: 2, M: 2}, randomExtents(rng, 20, 4), sampleCut(2))
	if err := s.Verify(); err != nil {
		t.Fatal(err)
	}
	for n := range s.Shards {
		for _, at := range []int64{20, HeaderBytes - 9, HeaderBytes, s.Info.indexOffset() - 1, s.Info.indexOffset() + 60,
			s.Info.cutOffset() + 30, s.Info.trailerOffset() + 70, s.Info.ObjectBytes() - 1, rng.Int64N(s.Info.ObjectBytes())} {
			s.Shards[n][at] ^= 1
			if err := s.Verify(); !errors.Is(err, ErrDamaged) {
				t.Errorf("shard %d byte %d: %v", n, at, err)
			}
			s.Shards[n][at] ^= 1
		}
	}
	// What has the right checksums may still not be what was meant.
	for _, n := range []int{0, 2} {
		b := bytes.Clone(s.Shards[n])
		area := b[HeaderBytes:s.Info.indexOffset()]
		area[len(area)-1] ^= 1
		tr, err := DecodeTrailer(b)
		if err != nil {
			t.Fatal(err)
		}
		tr.AreaCRC = block.CRC(area)
		s.Shards[n] = tr.append(b[:s.Info.trailerOffset()])
		if err := s.Verify(); !errors.Is(err, ErrDamaged) {
			t.Errorf("shard %d changed with its checksum: %v", n, err)
		}
		area[len(area)-1] ^= 1
		tr.AreaCRC = block.CRC(area)
		tr.append(b[:s.Info.trailerOffset()])
	}
	if err := s.Verify(); err != nil {
		t.Fatal(err)
	}
}

// TestDamagedPackingIsDamage changes packed bytes and their checksum.
func TestDamagedPackingIsDamage(t *testing.T) {
	rng := seeded(t)
	plain := bytes.Repeat([]byte("some text "), 2*block.Size)[:4*block.Size]
	for _, c := range []Codec{CodecS2, CodecZstd} {
		good := appendPacked(nil, c, plain)
		if got, err := unpack(c, good, len(plain)); err != nil || !bytes.Equal(got, plain) {
			t.Fatalf("%v: %v", c, err)
		}
		for range 2000 {
			b := bytes.Clone(good)
			b[rng.IntN(len(b))] ^= 1 << rng.IntN(8)
			if got, err := unpack(c, b, len(plain)); err == nil && !bytes.Equal(got, plain) || err != nil && !errors.Is(err, ErrDamaged) {
				t.Fatalf("%v: %v", c, err)
			}
		}
		for _, size := range []int{block.Size, 5 * block.Size} {
			if _, err := unpack(c, good, size); !errors.Is(err, ErrDamaged) {
				t.Errorf("%v: taken for %d bytes: %v", c, size, err)
			}
		}
	}
	if _, err := unpack(codecs, plain, len(plain)); !errors.Is(err, ErrNewer) {
		t.Errorf("unknown codec: %v", err)
	}
}

// TestGoldenPacked reads packed segments of the first release that had them. What a packer makes of
// data may change with its version; what it made must stay readable.
func TestGoldenPacked(t *testing.T) {
	for _, c := range []Codec{CodecS2, CodecZstd} {
		list := mixedExtents(rand.New(rand.NewPCG(3, 4)), 6, 2)
		file := filepath.Join("testdata", "segment-"+c.String())
		if *update {
			o := BuildOptions{ID: 259, Epoch: 6, K: 1, Codec: c, Rand: bytes.NewReader([]byte("0123456789abcdef"))}
			s, _ := buildPacked(t, o, 64<<10, list)
			if err := os.WriteFile(file, s.Shards[0], 0o644); err != nil {
				t.Fatal(err)
			}
		}
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		shard, err := OpenShard(b)
		if err != nil {
			t.Fatal(err)
		}
		packed := 0
		for _, e := range shard.Index.Entries {
			if e.Codec == uint8(c) {
				packed++
			}
		}
		if packed == 0 {
			t.Errorf("%v: nothing in it is packed", c)
		}
		stores := newTargets(1)
		stores[0].objects[shard.Trailer.Info.Key(0)] = b
		if err := readAll(t.Context(), NewReader(ReaderOptions{Targets: stores.get}), shard.Trailer.Info, list); err != nil {
			t.Error(err)
		}
	}
}

// FuzzUnpack feeds damaged packed extents to the unpackers, with the checksum of the plain bytes right or
// wrong.
func FuzzUnpack(f *testing.F) {
	for _, c := range []Codec{CodecS2, CodecZstd} {
		f.Add(uint8(c), uint8(2), appendPacked(nil, c, bytes.Repeat([]byte("abcdefgh"), block.Size/4)))
		f.Add(uint8(c), uint8(1), appendPacked(nil, c, make([]byte, block.Size)))
	}
	f.Fuzz(func(t *testing.T, codec, blocks uint8, b []byte) {
		size := (1 + int(blocks)%packedBlocksMax) * block.Size
		plain, err := unpack(1+Codec(codec)%(codecs-1), b, size)
		switch {
		case err == nil && (len(plain) != size || block.CRC(plain) != le.Uint32(b)):
			t.Fatalf("%d bytes, %d expected", len(plain), size)
		case err != nil && !errors.Is(err, ErrDamaged):
			t.Fatalf("unclassified: %v", err)
		}
	})
}

// TestBuffersAreBounded lends and takes back.
func TestBuffersAreBounded(t *testing.T) {
	p := NewBuffers(1 << 20)
	a, b := p.Get(300<<10), p.Get(900<<10)
	if st := p.Stats(); st.Lent < 1200<<10 || st.Peak != st.Lent {
		t.Errorf("%+v", st)
	}
	p.Put(a, true)
	p.Put(b, true)
	if st := p.Stats(); st.Lent != 0 || st.Idle > 1<<20 || st.Idle < 900<<10 {
		t.Errorf("the larger one is kept: %+v", st)
	}
	if c := p.Get(500 << 10); &c[:1][0] != &b[:1][0] {
		t.Error("fresh memory though there is some")
	}
	p.Put(p.Get(100<<10), true)
	if p.Drop(); p.Stats().Idle != 0 || p.Stats().Lent < 500<<10 {
		t.Errorf("dropped: %+v", p.Stats())
	}
	p.Put(p.Get(400<<10), false)
	if st := p.Stats(); st.Idle != 0 {
		t.Errorf("taken back though somebody may read it: %+v", st)
	}
}

// BenchmarkVerify reads a sealed segment of 32 MiB again.
func BenchmarkVerify(b *testing.B) {
	for _, c := range []Codec{CodecNone, CodecS2, CodecZstd} {
		b.Run(c.String(), func(b *testing.B) {
			const payload = 32 << 20
			rng := rand.New(rand.NewPCG(1, 1))
			var list []extent
			for range payload / (2 << 20) {
				list = append(list, mixedExtents(rng, 32, 1)...)
			}
			bld, err := NewBuilder(BuildOptions{ID: 1, K: 4, M: 2, PayloadBytes: payload, Codec: c})
			if err != nil {
				b.Fatal(err)
			}
			for i := range payload / (64 << 10) {
				p := make([]byte, 0, 64<<10)
				for len(p) < cap(p) {
					p = append(p, list[(i*16+len(p)/block.Size)%len(list)].data...)
				}
				if err := bld.AddData(1, block.LBA(i*16), p, 1); err != nil {
					b.Fatal(err)
				}
			}
			s, err := bld.Seal(nil, planned(4, 2))
			if err != nil {
				b.Fatal(err)
			}
			b.SetBytes(payload)
			start := cpuSeconds(b)
			for b.Loop() {
				if err := s.Verify(); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric((cpuSeconds(b)-start)/(float64(b.N)*payload/(1<<30)), "cpu-s/GiB")
		})
	}
}
