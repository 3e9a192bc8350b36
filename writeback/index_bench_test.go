package writeback

import (
	"fmt"
	"math/rand/v2"
	"sync/atomic"
	"testing"

	"graindisk/block"
	"graindisk/tier"
)

const benchBlocks = 1 << 18 // 1 GiB of data

var benchCRCs = checksums{16384, make([]atomic.Pointer[[]uint32], 16), new(atomic.Int64)}

// benchGeneration holds benchBlocks blocks of disk 1, written in runs of `run` blocks at random places
// of a disk four times that size.
func benchGeneration(run int) *generation {
	g := newGeneration(0)
	rng := rand.New(rand.NewPCG(1, 2))
	for i := range benchBlocks / run {
		benchApply(g, rng, i, run)
	}
	return g
}

func benchApply(g *generation, rng *rand.Rand, i, run int) {
	lba := rng.Uint64N(uint64(4*benchBlocks/run)) * uint64(run)
	at := uint32(i*run) % benchBlocks
	place := tier.NewPlace(int(at/16384), at%16384)
	benchCRCs.put(place, make([]uint32, run))
	g.apply(Seq(i+1), 1, entry{Data, 1, lba, uint64(run)}, place, nil)
}

func BenchmarkIndexLookup(b *testing.B) {
	for _, run := range []int{1, 16} {
		g := benchGeneration(run)
		d := g.disks[1]
		for _, n := range []int{1, 16} {
			for _, where := range []string{"any", "miss"} {
				b.Run(fmt.Sprintf("written=%dKiB/io=%dKiB/%s", 4*run, 4*n, where), func(b *testing.B) {
					rng := rand.New(rand.NewPCG(3, 4))
					out := make([]Found, n)
					base := uint64(0)
					if where == "miss" {
						base = 1 << 30
					}
					b.ReportAllocs()
					for b.Loop() {
						clear(out)
						d.lookup(block.LBA(base+rng.Uint64N(uint64(4*benchBlocks/n))*uint64(n)), out, &benchCRCs)
					}
				})
			}
		}
	}
}

func BenchmarkIndexApply(b *testing.B) {
	for _, run := range []int{1, 16} {
		b.Run(fmt.Sprintf("write=%dKiB", 4*run), func(b *testing.B) {
			rng := rand.New(rand.NewPCG(5, 6))
			var g *generation
			for i := 0; b.Loop(); i++ {
				if i%(benchBlocks/run) == 0 {
					g = newGeneration(0)
				}
				benchApply(g, rng, i, run)
			}
		})
	}
}

func BenchmarkIndexBlocks(b *testing.B) {
	for _, run := range []int{1, 16} {
		f := Frozen{gen: benchGeneration(run), crcs: benchCRCs}
		b.Run(fmt.Sprintf("written=%dKiB", 4*run), func(b *testing.B) {
			for b.Loop() {
				f.Blocks(1)
			}
		})
	}
}
