package segment

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"syscall"
	"testing"
	"time"

	"graindisk/block"
)

// TestAnnouncedPayloadFits fills segments with random extents: all fit, and columns are balanced.
func TestAnnouncedPayloadFits(t *testing.T) {
	rng := seeded(t)
	for range 80 {
		k, blocksMax := 1+rng.IntN(KMax), 1+rng.IntN(64)
		var sizes []int
		total := 0
		for range rng.IntN(100) {
			sizes = append(sizes, 1+rng.IntN(blocksMax))
			total += sizes[len(sizes)-1]
		}
		b, err := NewBuilder(BuildOptions{ID: 1, K: uint8(k), M: 1, PayloadBytes: int64(total) * block.Size})
		if err != nil {
			t.Fatal(err)
		}
		lba := block.LBA(0)
		for _, n := range sizes {
			if b.Room() < int64(n)*block.Size || b.Full() {
				t.Fatalf("room for %d bytes before the end", b.Room())
			}
			if p, err := b.Add(1, lba, n, 1); err != nil || len(p) != n*block.Size || cap(p) != len(p) {
				t.Fatalf("k=%d: extent of %d blocks: %d bytes, %v", k, n, len(p), err)
			}
			lba += block.LBA(n)
		}
		if !b.Full() || b.Extents() != len(sizes) || b.PayloadBytes() != int64(total)*block.Size {
			t.Fatalf("%d extents, %d bytes, full %v", b.Extents(), b.PayloadBytes(), b.Full())
		}
		if _, err := b.Add(1, lba, 1, 1); !errors.Is(err, ErrFull) {
			t.Fatalf("one more: %v", err)
		}
		s, err := b.Seal(nil, planned(uint8(k), 1))
		if err != nil {
			t.Fatal(err)
		}
		if share := total/k + 1 + blocksMax; int(s.Info.ShardBytes) > share*block.Size {
			t.Fatalf("k=%d: areas of %d blocks for a share of %d", k, s.Info.ShardBytes/block.Size, share)
		}
		if !slices.IsSortedFunc(s.Index.Entries, func(a, b Entry) int { return int(a.Shard) - int(b.Shard) }) {
			t.Fatal("not column-major")
		}
	}
}

func TestBuilderRefuses(t *testing.T) {
	for _, o := range []BuildOptions{{ID: 0, K: 1}, {ID: block.SegmentMax, K: 1}, {ID: 1, K: 0}, {ID: 1, K: 17}, {ID: 1, K: 1, M: 5},
		{ID: 1, K: 1, PayloadBytes: -4096}, {ID: 1, K: 1, PayloadBytes: 5}, {ID: 1, K: 1, PayloadBytes: 2 << 30}} {
		if _, err := NewBuilder(o); err == nil {
			t.Errorf("%+v accepted", o)
		}
	}
	b, err := NewBuilder(BuildOptions{ID: 1, K: 2, M: 1, PayloadBytes: 1 << 20, ExtentBytesMax: 64 << 10})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := b.Add(5, 100, 16, 1); err != nil {
		t.Fatal(err)
	}
	for name, add := range map[string]func() ([]byte, error){
		"a lower disk":        func() ([]byte, error) { return b.Add(4, 200, 1, 1) },
		"a lower lba":         func() ([]byte, error) { return b.Add(5, 99, 1, 1) },
		"no blocks":           func() ([]byte, error) { return b.Add(5, 200, 0, 1) },
		"too many blocks":     func() ([]byte, error) { return b.Add(5, 200, 17, 1) },
		"an lba past 2^51":    func() ([]byte, error) { return b.Add(5, 1<<51, 1, 1) },
		"a name of no extent": func() ([]byte, error) { return b.AddMoved(7, 5, 200, 1, 1) },
	} {
		if _, err := add(); err == nil || errors.Is(err, ErrFull) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := b.Seal(nil, []block.TargetID{1, 0, 0}); err == nil {
		t.Error("sealed with fewer than k targets")
	}
	if _, err := b.Seal(nil, planned(2, 1)); err == nil {
		t.Error("sealed twice")
	}
	if _, err := b.Add(6, 0, 1, 1); err == nil {
		t.Error("added after sealing")
	}
}

func TestSlotsAreBounded(t *testing.T) {
	b, err := NewBuilder(BuildOptions{ID: 1, K: 1, PayloadBytes: (block.ExtentsMax + 1) * block.Size})
	if err != nil {
		t.Fatal(err)
	}
	for i := range block.ExtentsMax {
		if _, err := b.Add(1, block.LBA(i), 1, uint64(i)); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := b.Add(1, block.ExtentsMax, 1, 1); !errors.Is(err, ErrFull) || !b.Full() {
		t.Fatalf("slot %d: %v", block.ExtentsMax, err)
	}
	if s, err := b.Seal(nil, planned(1, 0)); err != nil || s.Info.Extents != block.ExtentsMax {
		t.Fatal(err)
	}
}

// TestMovedAndFingerprints keeps a moved extent's name and hashes each extent.
func TestMovedAndFingerprints(t *testing.T) {
	b, err := NewBuilder(BuildOptions{ID: 9, K: 1, M: 1, PayloadBytes: 2 * block.Size,
		Fingerprint: func(p []byte) [16]byte { return [16]byte{p[0]} }})
	if err != nil {
		t.Fatal(err)
	}
	born := block.NewExtentID(4, 1000)
	for i, name := range []block.ExtentID{born, block.NewExtentID(9, 1)} {
		p, err := b.AddMoved(name, 1, block.LBA(i), 1, 5)
		if err != nil {
			t.Fatal(err)
		}
		p[0] = byte(i + 1)
	}
	s, err := b.Seal(nil, planned(1, 1))
	if err != nil {
		t.Fatal(err)
	}
	shard, err := OpenShard(s.Shards[1])
	if err != nil {
		t.Fatal(err)
	}
	x := shard.Index
	if x.Entries[0].Name != born || x.Entries[1].Name != block.NewExtentID(9, 1) || x.Fingerprints[0] != [16]byte{1} || x.Fingerprints[1] != [16]byte{2} {
		t.Fatalf("%+v", x)
	}
}

// TestRebuildShard makes every shard anew from every choice of k others.
func TestRebuildShard(t *testing.T) {
	rng := seeded(t)
	for _, p := range [][2]uint8{{1, 1}, {2, 1}, {4, 2}, {3, 0}} {
		for _, extents := range []int{0, 20} {
			s := build(t, BuildOptions{ID: 2, Epoch: 2, K: p[0], M: p[1]}, randomExtents(rng, extents, 2), sampleCut(2))
			n := len(s.Shards)
			losses(n, int(p[1]), func(lost []int) {
				left := slices.Clone(s.Shards)
				for i, l := range lost {
					left[l] = nil
					if i%2 == 1 { // a damaged one is passed over
						left[l] = bytes.Clone(s.Shards[l])
						left[l][HeaderBytes-100] ^= 1
					}
				}
				for _, want := range lost {
					got, err := RebuildShard(left, want)
					if err != nil || !bytes.Equal(got, s.Shards[want]) {
						t.Fatalf("%d+%d: shard %d without %v: %v", p[0], p[1], want, lost, err)
					}
				}
			})
			left := slices.Clone(s.Shards)
			for i := range int(p[1]) + 1 {
				left[i] = nil
			}
			if _, err := RebuildShard(left, 0); !errors.Is(err, ErrDamaged) {
				t.Fatalf("%d+%d with too few: %v", p[0], p[1], err)
			}
		}
	}
	a := build(t, BuildOptions{ID: 2, K: 2, M: 1}, randomExtents(rng, 5, 2), nil)
	b := build(t, BuildOptions{ID: 2, K: 2, M: 1}, randomExtents(rng, 5, 2), nil)
	if _, err := RebuildShard([][]byte{nil, a.Shards[1], b.Shards[2]}, 0); !errors.Is(err, ErrDamaged) {
		t.Fatalf("from two stripes: %v", err)
	}
}

// TestSummedExtents expects the same shards whether Seal computes a checksum or was told of it, and Verify to
// find one that it was told wrongly.
func TestSummedExtents(t *testing.T) {
	rng := seeded(t)
	data := make([]byte, 7*block.Size)
	for i := range data {
		data[i] = byte(rng.Uint32())
	}
	seal := func(add func(b *Builder, blocks int, p []byte) ([]byte, error)) *Sealed {
		b, err := NewBuilder(BuildOptions{ID: 1, K: 2, M: 1, PayloadBytes: int64(len(data)), Rand: bytes.NewReader(make([]byte, 16))})
		if err != nil {
			t.Fatal(err)
		}
		for from, blocks := 0, 1; from < 7; from, blocks = from+blocks, blocks*2 {
			p := data[from*block.Size : (from+blocks)*block.Size]
			dst, err := add(b, blocks, p)
			if err != nil {
				t.Fatal(err)
			}
			copy(dst, p)
		}
		s, err := b.Seal(nil, planned(2, 1))
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	plain := seal(func(b *Builder, blocks int, p []byte) ([]byte, error) {
		return b.Add(1, block.LBA(8*blocks), blocks, 1)
	})
	summed := func(wrong int) *Sealed {
		return seal(func(b *Builder, blocks int, p []byte) ([]byte, error) {
			crc := block.CRC(p)
			if blocks == wrong {
				crc++
			}
			return b.AddSummed(1, block.LBA(8*blocks), blocks, 1, crc)
		})
	}
	good := summed(0)
	for n := range plain.Shards {
		if !bytes.Equal(plain.Shards[n], good.Shards[n]) {
			t.Errorf("shard %d differs", n)
		}
	}
	if err := good.Verify(); err != nil {
		t.Error(err)
	}
	if err := summed(2).Verify(); !errors.Is(err, ErrDamaged) {
		t.Errorf("a wrong checksum: %v", err)
	}
}

// BenchmarkSeal packs 32 MiB: the caller's copy, checksums, parity, index, read-back. cpu-s/GiB
// includes what recycling the memory of sealed segments costs.
func BenchmarkSeal(b *testing.B) {
	for _, c := range []struct {
		k, m   uint8
		blocks int
	}{{4, 2, 16}, {4, 2, 1}, {2, 1, 16}, {1, 1, 16}} {
		b.Run(fmt.Sprintf("%d+%d/extent=%dKiB", c.k, c.m, c.blocks*4), func(b *testing.B) {
			const payload = 32 << 20
			src := make([]byte, payload)
			rng := rand.New(rand.NewPCG(1, 1))
			for i := 0; i < len(src); i += 8 {
				le.PutUint64(src[i:], rng.Uint64())
			}
			b.SetBytes(payload)
			start, buffers := cpuSeconds(b), NewBuffers(1<<30)
			for b.Loop() {
				builder, err := NewBuilder(BuildOptions{ID: 1, K: c.k, M: c.m, PayloadBytes: payload, Buffers: buffers})
				if err != nil {
					b.Fatal(err)
				}
				for at := 0; at < payload; at += c.blocks * block.Size {
					p, err := builder.Add(1, block.LBA(at/block.Size*3), c.blocks, uint64(at))
					if err != nil {
						b.Fatal(err)
					}
					copy(p, src[at:])
				}
				s, err := builder.Seal(nil, planned(c.k, c.m))
				if err != nil {
					b.Fatal(err)
				}
				s.Release(true)
			}
			b.ReportMetric((cpuSeconds(b)-start)/(float64(b.N)*payload/(1<<30)), "cpu-s/GiB")
			runtime.KeepAlive(src)
		})
	}
}

// cpuSeconds is the processor time the test has used so far, in user and kernel mode.
func cpuSeconds(b *testing.B) float64 {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return (time.Duration(u.Utime.Nano()) + time.Duration(u.Stime.Nano())).Seconds()
}
