package backendtest

import (
	"slices"
	"syscall"
	"testing"
	"time"
)

// Measure reports what a request of n bytes costs this process, cpu-µs/op, and how long it takes. do makes the
// i-th one; one more is made before.
func Measure(b *testing.B, n int, do func(i int) error) {
	b.Helper()
	if err := do(0); err != nil { // connects
		b.Fatal(err)
	}
	b.SetBytes(int64(n))
	b.ReportAllocs()
	var took []time.Duration
	before, i := cpuTime(b), 0
	for b.Loop() {
		start := time.Now()
		if err := do(i); err != nil {
			b.Fatal(err)
		}
		took = append(took, time.Since(start))
		i++
	}
	cpu := cpuTime(b) - before
	slices.Sort(took)
	b.ReportMetric(float64(cpu.Microseconds())/float64(i), "cpu-µs/op")
	b.ReportMetric(took[i/2].Seconds()*1e3, "p50-ms")
	b.ReportMetric(took[i*99/100].Seconds()*1e3, "p99-ms")
}

func cpuTime(b *testing.B) time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
