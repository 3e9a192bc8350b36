package tier_test

import (
	"errors"
	"slices"
	"syscall"
	"testing"
	"time"

	"graindisk/block"
	"graindisk/internal/vfs"
	"graindisk/tier"
)

// plainFS hides what a file can do beyond vfs.File.
type plainFS struct{ vfs.FS }

type plainFile struct{ vfs.File }

func (f plainFS) Open(name string) (vfs.File, error) { return plain(f.FS.Open(name)) }

func (f plainFS) Create(name string) (vfs.File, error) { return plain(f.FS.Create(name)) }

func plain(f vfs.File, err error) (vfs.File, error) {
	if err != nil {
		return nil, err
	}
	return plainFile{f}, nil
}

const benchSlotBytes = 64 << 20

// BenchmarkPrewrite makes slots of 64 MiB ready while somebody writes 8 KiB and syncs, over and over. It
// reports the CPU time of both, and how long the other's writes took.
func BenchmarkPrewrite(b *testing.B) {
	for _, c := range []struct {
		name string
		fs   vfs.FS
		make func(*tier.Space, int) error
	}{
		{"cached", plainFS{vfs.OS{}}, (*tier.Space).Prewrite},
		{"direct", vfs.OS{}, (*tier.Space).Prewrite},
		{"direct/paced", vfs.OS{}, func(s *tier.Space, slot int) error { return s.PrewriteAhead(slot, func() bool { return false }) }},
	} {
		b.Run(c.name, func(b *testing.B) {
			other := openSlot(b, vfs.OS{}, b.TempDir())
			defer other.Close()
			stop, ended := make(chan struct{}), make(chan []time.Duration)
			go func() { ended <- writeAndSync(b, other, stop) }()
			cpu := cpuTime()
			b.SetBytes(benchSlotBytes)
			for b.Loop() {
				s := openSpace(b, c.fs, b.TempDir())
				slot, err := s.Take(0)
				if err == nil {
					err = c.make(s, slot)
				}
				if err = errors.Join(err, s.Close()); err != nil {
					b.Fatal(err)
				}
			}
			cpu = cpuTime() - cpu
			close(stop)
			took := <-ended
			slices.Sort(took)
			b.ReportMetric(float64(cpu.Milliseconds())/float64(b.N), "cpu-ms/op")
			b.ReportMetric(float64(took[len(took)/2].Microseconds()), "p50-µs")
			b.ReportMetric(float64(took[len(took)*99/100].Microseconds()), "p99-µs")
		})
	}
}

func openSpace(b *testing.B, fsys vfs.FS, dir string) *tier.Space {
	s, err := tier.Open(tier.Options{FS: fsys, Dir: dir, SlotBytes: benchSlotBytes, Slots: 4})
	if err != nil {
		b.Fatal(err)
	}
	s.Claimed()
	return s
}

// openSlot opens a space whose slot 0 is ready and taken.
func openSlot(b *testing.B, fsys vfs.FS, dir string) *tier.Space {
	s := openSpace(b, fsys, dir)
	if _, err := s.Take(0); err != nil {
		b.Fatal(err)
	}
	if err := s.Prewrite(0); err != nil {
		b.Fatal(err)
	}
	return s
}

func writeAndSync(b *testing.B, s *tier.Space, stop chan struct{}) (took []time.Duration) {
	p := make([]byte, 2*block.Size)
	for at := uint32(0); ; at = (at + 2) % (16 << 10) {
		select {
		case <-stop:
			return took
		default:
		}
		start := time.Now()
		err := s.WriteAt(tier.NewPlace(0, at), [][]byte{p})
		if err == nil {
			err = s.Sync(0)
		}
		if err != nil {
			b.Error(err)
		}
		took = append(took, time.Since(start))
	}
}

func cpuTime() time.Duration {
	var r syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &r); err != nil {
		return 0
	}
	return time.Duration(r.Utime.Nano() + r.Stime.Nano())
}
