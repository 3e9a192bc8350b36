package densetree

import (
	"math/rand/v2"
	"slices"
	"sync/atomic"
	"testing"

	"graindisk/block"
	"graindisk/internal/vfs"
)

// benchTree maps a 64 GiB disk of 64 KiB grains written once in order and once more at random, in files.
func benchTree(b *testing.B, cache int64) *Tree {
	const n = 1 << 20
	d := &disk{fs: vfs.OS{}, dir: b.TempDir(), cache: cache}
	d.open(b)
	tree := New(Options{Store: d.store})
	b.Cleanup(tree.Close)
	r := rand.New(rand.NewPCG(1, 1))
	for i := range n / 1024 {
		tree.Put(grains(1024*i, 1024, 1, block.ExtentID(1024*i)))
	}
	for i := range n / 4 / 256 {
		var es []Entry
		for range 256 {
			es = append(es, grains(r.IntN(n), 1, 1, block.ExtentID(n+i))...)
		}
		tree.Put(distinct(es))
	}
	must(b, tree.Flush())
	return tree
}

// distinct is es in order without those that start where another does.
func distinct(es []Entry) []Entry {
	slices.SortFunc(es, func(a, b Entry) int { return int(int64(a.LBA) - int64(b.LBA)) })
	return slices.CompactFunc(es, func(a, b Entry) bool { return a.LBA == b.LBA })
}

func BenchmarkLookupGrain(b *testing.B) {
	for name, cache := range map[string]int64{"pages=cached": 64 << 20, "pages=file": 1} {
		b.Run(name, func(b *testing.B) {
			tree := benchTree(b, cache)
			r := rand.New(rand.NewPCG(1, 2))
			b.ReportAllocs()
			for b.Loop() {
				must(b, tree.Lookup(block.LBA(r.IntN(1<<24-16)), 16, func(Entry) bool { return true }))
			}
		})
	}
}

// BenchmarkReplay reports the time per entry of what recovery puts: publications in order, over others.
func BenchmarkReplay(b *testing.B) {
	var hold atomic.Bool
	hold.Store(true)
	const n = 1 << 20
	r := rand.New(rand.NewPCG(1, 2))
	var batches [][]Entry
	for range 16 {
		var es []Entry
		for range block.ExtentsMax {
			es = append(es, grains(r.IntN(n), 1, 1, block.ExtentID(r.Uint64()>>8))...)
		}
		batches = append(batches, distinct(es))
	}
	var tree *Tree
	entries := 0
	for i := 0; b.Loop(); i++ {
		if i%len(batches) == 0 {
			tree = New(Options{Hold: &hold})
		}
		tree.Put(batches[i%len(batches)])
		entries += len(batches[i%len(batches)])
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(entries), "ns/entry")
}

// BenchmarkPut reports the time per entry of puts as publication makes them: one in order over the
// whole disk, many at a time, and of single ones.
func BenchmarkPut(b *testing.B) {
	for _, c := range []struct {
		name string
		n    int
	}{{"batch=1", 1}, {"batch=512", 512}, {"batch=32768", 32768}} {
		b.Run(c.name, func(b *testing.B) {
			tree := benchTree(b, 16<<20)
			r := rand.New(rand.NewPCG(1, 2))
			b.ReportAllocs()
			var es []Entry
			for i := 0; b.Loop(); i++ {
				if len(es) == 0 {
					b.StopTimer()
					for range c.n {
						es = append(es, grains(r.IntN(1<<20), 1, 1, block.ExtentID(i))...)
					}
					es = distinct(es)
					b.StartTimer()
					tree.Put(es)
				}
				es = es[1:]
			}
			s := tree.Stats()
			if s.Put > 0 {
				b.ReportMetric(float64(s.MergedBytes)/float64(s.Put), "mergedB/entry")
			}
		})
	}
}
