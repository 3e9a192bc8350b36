package cache

import (
	"fmt"
	"math/rand/v2"
	"testing"

	"graindisk/block"
	"graindisk/internal/vfs"
	"graindisk/tier"
)

func BenchmarkReadHit(b *testing.B) {
	for _, blocks := range []int{1, 16} {
		b.Run(fmt.Sprintf("io=%dKiB", 4*blocks), func(b *testing.B) {
			s, err := tier.Open(tier.Options{FS: vfs.OS{}, Dir: b.TempDir(), SlotBytes: 16 << 20, Slots: 16})
			if err != nil {
				b.Fatal(err)
			}
			defer s.Close()
			c, err := New(s, Options{})
			if err != nil {
				b.Fatal(err)
			}
			defer c.Close()
			const n = 1000
			for id := range block.ExtentID(n) {
				c.Fill(1, id, extent(id, 0, 16))
				c.settle()
			}
			r := rand.New(rand.NewPCG(1, 1))
			p := make([]byte, blocks*block.Size)
			b.SetBytes(int64(len(p)))
			b.ReportAllocs()
			for b.Loop() {
				if !c.Read(block.ExtentID(r.IntN(n)), r.IntN(17-blocks), blocks, p) {
					b.Fatal("miss")
				}
			}
		})
	}
}

// BenchmarkIndexMemory reports the size of the index per GiB of tier, all of it adopted.
func BenchmarkIndexMemory(b *testing.B) {
	for _, blocks := range []int{1, 16} {
		b.Run(fmt.Sprintf("extent=%dKiB", 4*blocks), func(b *testing.B) {
			for b.Loop() {
				s := bigSpace{slots: 64}
				c, err := New(s, Options{})
				if err != nil {
					b.Fatal(err)
				}
				id := block.ExtentID(0)
				refs := make([]BlockRef, blocks)
				for slot := range s.slots {
					for at := 0; at+blocks <= s.SlotBlocks(); at += blocks {
						for i := range refs {
							refs[i].Place = tier.NewPlace(slot, uint32(at+i))
						}
						c.Adopt(1, id, refs)
						id++
					}
				}
				gib := float64(s.slots*s.SlotBlocks()*block.Size) / (1 << 30)
				b.ReportMetric(float64(c.Stats().MemoryBytes)/(1<<20)/gib, "MiB/GiB")
			}
		})
	}
}

// bigSpace is a tier of 64 MiB slots without files.
type bigSpace struct {
	anySpace
	slots int
}

func (s bigSpace) Slots() int    { return s.slots }
func (bigSpace) SlotBlocks() int { return 16384 }
