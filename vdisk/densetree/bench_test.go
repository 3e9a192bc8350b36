package densetree

import (
	"math/rand/v2"
	"testing"

	"graindisk/block"
)

// benchTree maps a 64 GiB disk of 64 KiB grains written once in order and once more at random.
func benchTree() *Tree {
	const n = 1 << 20
	tree := New(Options{})
	r := rand.New(rand.NewPCG(1, 1))
	for i := range n / 1024 {
		tree.Put(grains(1024*i, 1024, 1, block.ExtentID(1024*i)))
	}
	for i := range n / 4 {
		tree.Put(grains(r.IntN(n), 1, 1, block.ExtentID(n+i)))
	}
	return tree
}

func BenchmarkLookupGrain(b *testing.B) {
	tree := benchTree()
	r := rand.New(rand.NewPCG(1, 2))
	b.ReportAllocs()
	for b.Loop() {
		tree.Lookup(block.LBA(r.IntN(1<<24-16)), 16, func(Entry) bool { return true })
	}
}

func BenchmarkPutRandom(b *testing.B) {
	tree := benchTree()
	r := rand.New(rand.NewPCG(1, 2))
	es := make([]Entry, 0, 512)
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		es = append(es, grains(512*r.IntN(1<<11)+r.IntN(256), 1, 1, block.ExtentID(i))...)
		if tree.Put(es); len(es) > 0 {
			es = es[:0]
		}
	}
}
