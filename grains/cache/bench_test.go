package cache

import (
	"fmt"
	"math/rand/v2"
	"testing"

	"graindisk/block"
	"graindisk/internal/vfs"
	"graindisk/tier"
)

// BenchmarkReadHit reads at random what is on the tier, and in the kernel's page cache: without a RAM
// cache, from one that holds it all, and past one that is far too small.
func BenchmarkReadHit(b *testing.B) {
	for _, ram := range []int64{0, 256 << 20, 1 << 20} {
		for _, blocks := range []int{1, 16} {
			b.Run(fmt.Sprintf("ram=%dMiB/io=%dKiB", ram>>20, 4*blocks), func(b *testing.B) {
				s, err := tier.Open(tier.Options{FS: vfs.OS{}, Dir: b.TempDir(), SlotBytes: 16 << 20, Slots: 16})
				if err != nil {
					b.Fatal(err)
				}
				defer s.Close()
				s.Claimed()
				c, err := New(s, Options{RAMBytes: ram})
				if err != nil {
					b.Fatal(err)
				}
				defer c.Close()
				const n = 1000
				r := rand.New(rand.NewPCG(1, 1))
				p := make([]byte, 16*block.Size)
				for id := range block.ExtentID(n) {
					c.Fill(1, id, extent(id, 0, 16))
					c.settle()
					if !c.Read(id, 0, 16, p) {
						b.Fatal("miss")
					}
				}
				p = p[:blocks*block.Size]
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
}
