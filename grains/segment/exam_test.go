package segment

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"graindisk/block"
)

// examined is a sealed stripe with everything in it that a stripe can have.
func examined(t testing.TB, rng *rand.Rand, k, m uint8, extents int) *Sealed {
	o := BuildOptions{ID: 77, Epoch: 5, K: k, M: m, Cut: 9, Codec: CodecS2, Pool: testPool,
		PayloadBytes: int64(extents) * 3 * block.Size, ExtentBytesMax: 3 * block.Size}
	b, err := NewBuilder(o)
	if err != nil {
		t.Fatal(err)
	}
	for i, e := range randomExtents(rng, extents, 3) {
		for j := 0; j < len(e.data) && i%4 > 0; j += 8 { // every fourth packs well, and leaves a gap behind
			le.PutUint64(e.data[j:], rng.Uint64())
		}
		if err := b.AddData(e.disk, e.lba, e.data, e.seq); err != nil {
			t.Fatal(err)
		}
	}
	cut := &CutRecord{Epoch: 5, Cut: 9, PrevCut: 8, Horizon: 1234, Time: 1, Disks: []DiskChange{{Disk: 3, Unmaps: []Run{{7, 8}}}}}
	s, err := b.Seal(cut, planned(k, m))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func objectsOf(s *Sealed) [][]byte {
	out := make([][]byte, len(s.Shards))
	for n, b := range s.Shards {
		out[n] = slices.Clone(b)
	}
	return out
}

// wantMended checks that an exam blames exactly the shards in bad and gives every object as it was sealed.
func wantMended(s *Sealed, x *Exam, bad ...int) error {
	for n, err := range x.Bad {
		if (err != nil) != slices.Contains(bad, n) {
			return fmt.Errorf("shard %d: %v; want %v to be found bad", n, err, bad)
		}
	}
	if x.Err != nil || len(x.Lost) > 0 {
		return fmt.Errorf("lost %v: %v", x.Lost, x.Err)
	}
	for n, b := range s.Shards {
		if !bytes.Equal(x.Object(n), b) {
			return fmt.Errorf("shard %d is not mended byte for byte", n)
		}
	}
	return nil
}

// TestAnExamFindsEveryFlippedBit flips a bit of every byte outside the extents area, and of some inside, of
// every shard.
func TestAnExamFindsEveryFlippedBit(t *testing.T) {
	rng := seeded(t)
	for _, p := range []struct{ k, m uint8 }{{1, 0}, {1, 1}, {2, 1}, {3, 2}} {
		t.Run(fmt.Sprintf("%d+%d", p.k, p.m), func(t *testing.T) {
			s := examined(t, rng, p.k, p.m, 5)
			objects := objectsOf(s)
			if err := wantMended(s, Examine(s.Info, testPool, objects, nil)); err != nil {
				t.Fatal(err)
			}
			for n := range objects {
				for at := 0; at < len(objects[n]); at++ {
					if at > 64 && at < HeaderBytes || at >= HeaderBytes && int64(at) < s.Info.indexOffset() {
						at = min(at+rng.IntN(200), int(s.Info.indexOffset())-1) // padding and extents: some
					}
					bit := byte(1) << rng.IntN(8)
					objects[n][at] ^= bit
					x := Examine(s.Info, testPool, objects, nil)
					objects[n][at] ^= bit
					if p.m > 0 {
						if err := wantMended(s, x, n); err != nil {
							t.Fatalf("byte %d of shard %d: %v", at, n, err)
						}
						continue
					}
					if b := x.Object(0); x.Bad[0] == nil || b != nil && !bytes.Equal(b, s.Shards[0]) || b == nil && x.Err == nil {
						t.Fatalf("byte %d without parity: %v, %v", at, x.Bad[0], x.Err)
					}
				}
			}
		})
	}
}

// TestAnExamMendsAllThatParityCan takes away or spoils every choice of m shards.
func TestAnExamMendsAllThatParityCan(t *testing.T) {
	rng := seeded(t)
	for _, p := range []struct{ k, m uint8 }{{1, 1}, {1, 2}, {2, 1}, {4, 2}} {
		for _, extents := range []int{0, 1, 40} {
			s := examined(t, rng, p.k, p.m, extents)
			losses(int(p.k+p.m), int(p.m), func(lost []int) {
				for name, spoil := range map[string]func(b []byte) []byte{
					"gone":      func([]byte) []byte { return nil },
					"empty":     func([]byte) []byte { return []byte{} },
					"cut short": func(b []byte) []byte { return b[:rng.IntN(len(b))] },
					"longer":    func(b []byte) []byte { return append(b, 1) },
					"noise": func(b []byte) []byte {
						for i := range b {
							b[i] = byte(rng.Uint32())
						}
						return b
					},
				} {
					objects := objectsOf(s)
					var bad []int
					for _, n := range lost {
						if objects[n] = spoil(objects[n]); objects[n] != nil {
							bad = append(bad, n)
						}
					}
					if err := wantMended(s, Examine(s.Info, testPool, objects, nil), bad...); err != nil {
						t.Fatalf("%d+%d, %d extents, shards %v %s: %v", p.k, p.m, extents, lost, name, err)
					}
				}
			})
		}
	}
}

// TestAnExamSeesThroughGoodChecksums puts shards in place whose own checksums are all right.
func TestAnExamSeesThroughGoodChecksums(t *testing.T) {
	rng := seeded(t)
	s, other := examined(t, rng, 2, 1, 20), examined(t, rng, 2, 1, 20)
	// forge changes a byte of an area and makes the trailer fit.
	forge := func(b []byte, at int) []byte {
		b = slices.Clone(b)
		b[HeaderBytes+at]++
		tr, err := DecodeTrailer(b)
		if err != nil {
			t.Fatal(err)
		}
		tr.AreaCRC = block.CRC(b[HeaderBytes:s.Info.indexOffset()])
		return tr.append(b[:s.Info.trailerOffset()])
	}
	gap := slices.IndexFunc(s.Index.Entries, func(e Entry) bool { return e.Shard == 0 && e.Stored%block.Size != 0 })
	if gap < 0 {
		t.Fatal("no extent leaves a gap")
	}
	between := int(s.Index.Entries[gap].Offset + s.Index.Entries[gap].Stored)
	for name, c := range map[string]struct {
		shard int
		b     []byte
	}{
		"parity of other data":             {2, forge(s.Shards[2], 5000)},
		"data that the index denies":       {1, forge(s.Shards[1], 0)},
		"something between the extents":    {0, forge(s.Shards[0], between)},
		"another shard of the stripe":      {0, s.Shards[1]},
		"the same shard, sealed otherwise": {1, other.Shards[1]},
	} {
		objects := objectsOf(s)
		objects[c.shard] = c.b
		if err := wantMended(s, Examine(s.Info, testPool, objects, nil), c.shard); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	for n := range 3 { // of three equal shards two outvote one, which is whole by itself
		seed := rng.Uint64() // of one size, with another salt
		a, b := examined(t, rand.New(rand.NewPCG(seed, 0)), 1, 2, 3), examined(t, rand.New(rand.NewPCG(seed, 0)), 1, 2, 3)
		objects := objectsOf(a)
		objects[n] = b.Shards[n]
		if err := wantMended(a, Examine(a.Info, testPool, objects, nil), n); err != nil {
			t.Errorf("shard %d of a mirror sealed otherwise: %v", n, err)
		}
	}
	if _, err := OpenShard(forge(s.Shards[2], 5000)); err != nil {
		t.Errorf("the forged parity is not what this test needs: %v", err)
	}
	objects := objectsOf(s)
	if x := Examine(s.Info, [16]byte{1}, objects, nil); x.Err == nil || x.Bad[0] == nil {
		t.Errorf("shards of another pool pass: %v %v", x.Bad, x.Err)
	}
}

// TestAnExamTakesWhatIsLeftOfEveryShard hurts all shards of a stripe, each elsewhere.
func TestAnExamTakesWhatIsLeftOfEveryShard(t *testing.T) {
	rng := seeded(t)
	s := examined(t, rng, 2, 1, 20)
	objects := objectsOf(s)
	first := s.Index.Entries[0]
	behind := slices.IndexFunc(s.Index.Entries, func(e Entry) bool { return e.Shard == 1 && e.Offset >= first.Stored })
	at := HeaderBytes + int64(s.Index.Entries[behind].Offset)
	objects[0][100] ^= 1                                    // header
	objects[0][HeaderBytes+first.Offset] ^= 1               // its first extent
	objects[1][at] ^= 1                                     // one that lies behind that one's range
	objects[1][s.Info.ObjectBytes()-10] ^= 1                // trailer
	objects[2][0] ^= 1                                      // header
	objects[2][HeaderBytes+int64(s.Info.ShardBytes)-1] ^= 1 // parity of the end
	if err := wantMended(s, Examine(s.Info, testPool, objects, nil), 0, 1, 2); err != nil {
		t.Fatal(err)
	}
}

// TestAnExamTellsWhatIsLost hurts two extents in one range of two shards of 2+1.
func TestAnExamTellsWhatIsLost(t *testing.T) {
	rng := seeded(t)
	s := examined(t, rng, 2, 1, 40)
	in1 := slices.IndexFunc(s.Index.Entries, func(e Entry) bool { return e.Shard == 1 })
	a, b := s.Index.Entries[0], s.Index.Entries[in1]
	objects := objectsOf(s)
	objects[0][HeaderBytes+a.Offset] ^= 1
	objects[1][HeaderBytes+b.Offset] ^= 1
	x := Examine(s.Info, testPool, objects, nil)
	if !slices.Equal(x.Lost, []int{0, in1}) || x.Err == nil || x.Object(0) != nil {
		t.Fatalf("lost %v, want slots 0 and %d: %v", x.Lost, in1, x.Err)
	}
	if x.Bad[0] == nil || x.Bad[1] == nil || x.Bad[2] != nil {
		t.Errorf("judged %v", x.Bad)
	}
	for n := range objects { // now no index is left
		objects[n][s.Info.indexOffset()+20] ^= 1
	}
	if x = Examine(s.Info, testPool, objects, nil); x.Index != nil || x.Err == nil || x.Lost != nil {
		t.Errorf("without any index: %+v", x)
	}
	if x = Examine(s.Info, testPool, objects, s.Index); x.Err == nil || !slices.Equal(x.Lost, []int{0, in1}) {
		t.Errorf("with an index from elsewhere: lost %v, %v", x.Lost, x.Err)
	}
	if x.Bad[2] == nil || !strings.Contains(x.Err.Error(), "index") {
		t.Errorf("judged %v: %v", x.Bad, x.Err)
	}
}

// FuzzExamine gives an exam any bytes for the shards of a stripe of 2+1.
func FuzzExamine(f *testing.F) {
	s := examined(f, rand.New(rand.NewPCG(1, 2)), 2, 1, 6)
	f.Add(s.Shards[0], s.Shards[1], s.Shards[2])
	f.Add(s.Shards[0], []byte{}, s.Shards[2][:5000])
	f.Fuzz(func(t *testing.T, a, b, c []byte) {
		x := Examine(s.Info, testPool, [][]byte{a, b, c}, nil)
		for n, o := range [][]byte{a, b, c} {
			if got := x.Object(n); got == nil != (x.Err != nil) || got != nil && x.Bad[n] == nil && !bytes.Equal(got, o) {
				t.Errorf("shard %d: %v, %v", n, x.Bad[n], x.Err)
			}
		}
	})
}
