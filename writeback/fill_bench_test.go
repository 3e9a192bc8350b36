package writeback

import (
	"testing"

	"graindisk/block"
	"graindisk/tier"
)

// BenchmarkFill builds the index of a million runs of one block, as reading a checkpoint does, leaf by leaf
// and run by run.
func BenchmarkFill(b *testing.B) {
	const n = 1 << 20
	b.Run("leaf by leaf", func(b *testing.B) {
		for b.Loop() {
			var t runs
			f := filler{t: &t}
			for i := range n {
				f.set(block.LBA(4*i), 1, tier.Place(7*i))
			}
			f.flush()
		}
		b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/n, "ns/run")
	})
	b.Run("run by run", func(b *testing.B) {
		for b.Loop() {
			var t runs
			for i := range n {
				t.set(block.LBA(4*i), 1, tier.Place(7*i))
			}
		}
		b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/n, "ns/run")
	})
}
