package writeback

import (
	"fmt"
	"math/rand/v2"
	"testing"

	"graindisk/block"
	"graindisk/internal/vfs"
	"graindisk/tier"
)

// BenchmarkReopen is the time from the death of the process to the first read served, the stores away,
// with so much unpublished in random writes, the last 96 MiB of it never synced.
// Run it with -benchtime=3x; it writes to the directory for temporary files.
func BenchmarkReopen(b *testing.B) {
	for _, blocks := range []int{1, 16} {
		for _, gib := range []int{1, 2, 4} {
			b.Run(fmt.Sprintf("write=%dKiB/dirty=%dGiB", 4*blocks, gib), func(b *testing.B) {
				o := Options{FS: vfs.OS{}, Dir: b.TempDir(), Pool: testPool}
				l := benchReopen(b, &o, nil)
				rng := rand.New(rand.NewPCG(1, uint64(gib)))
				benchFill(b, l, rng, blocks, int64(gib)<<30-96<<20)
				if err := l.Sync(bg); err != nil {
					b.Fatal(err)
				}
				for b.Loop() {
					b.StopTimer()
					benchFill(b, l, rng, blocks, 96<<20)
					l.fail(ErrClosed) // as good as dead
					l.stop()
					l.done.Wait()
					b.StartTimer()
					l = benchReopen(b, &o, l)
					var found [1]Found
					var pins Pins
					l.Lookup(1, 0, found[:], &pins)
					pins.Release()
				}
				b.ReportMetric(float64(l.IndexBytes())/float64(l.Unpublished().Bytes)*(1<<10), "indexMiB/GiB")
				l.Close()
				l.space.Close()
			})
		}
	}
}

func benchReopen(b *testing.B, o *Options, old *Log) *Log {
	b.Helper()
	space, err := tier.Open(tier.Options{FS: o.FS, Dir: o.Dir, SlotBytes: 64 << 20, Slots: 160})
	if err != nil {
		b.Fatal(err)
	}
	o.Space = space
	if old == nil {
		l, err := Create(*o)
		if err != nil {
			b.Fatal(err)
		}
		return l
	}
	l, _, err := Open(*o)
	if err == nil {
		err = l.DropThrough(0)
	}
	if err != nil {
		b.Fatal(err)
	}
	return l
}

// benchFill appends random writes in batches of 1 MiB, with checkpoints as a pool makes them.
func benchFill(b *testing.B, l *Log, rng *rand.Rand, blocks int, bytes int64) {
	b.Helper()
	buf := make([]byte, blocks*block.Size)
	recs := make([]Record, 1<<20/len(buf))
	for ; bytes > 0; bytes -= 1 << 20 {
		for i := range recs {
			recs[i] = Record{Kind: Data, Disk: 1, LBA: block.LBA(rng.Uint64N(1<<28/uint64(blocks)) * uint64(blocks)), Data: buf}
		}
		_, err := l.Append(bg, recs)
		if err == nil && l.MetaBytes() >= 16<<20 {
			err = l.Checkpoint(bg, func() ([]byte, error) { return []byte("state"), nil })
		}
		if err != nil {
			b.Fatal(err)
		}
	}
}
