package local

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"graindisk/backend"
)

// alignedBody is n bytes of noise that begin shift bytes behind a boundary of directAlign.
func alignedBody(n, shift int) []byte {
	b := make([]byte, n+shift+directAlign)
	at := int(-uintptr(unsafe.Pointer(&b[0])) % directAlign)
	b = b[at+shift:][:n]
	rand.NewChaCha8([32]byte{byte(n), byte(n >> 8), byte(shift)}).Read(b)
	return b
}

// TestPutOfEveryShape stores bodies round the bounds of direct writes, from memory that is aligned and
// memory that is not, and expects the same bytes back.
func TestPutOfEveryShape(t *testing.T) {
	s, err := Open(t.TempDir(), Options{})
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range []int{0, 1, directMin - 1, directMin, directMin + 1, directMin + directAlign, directChunk - 1,
		directChunk + directAlign, 2*directChunk + 511, chunkBytes + directChunk + 1} {
		for _, shift := range []int{0, 1, 512} {
			body := alignedBody(n, shift)
			if want := n >= directMin && shift == 0; directHead(body) > 0 != want {
				t.Errorf("%d bytes, shifted by %d: %d of them would go directly", n, shift, directHead(body))
			}
			key := fmt.Sprintf("k/%d-%d", n, shift)
			if _, err := s.Put(t.Context(), key, body, backend.Cond{Absent: true}); err != nil {
				t.Fatalf("put %d bytes, shifted by %d: %v", n, shift, err)
			}
			got, _, err := s.Get(t.Context(), key, int64(n))
			if err != nil || !bytes.Equal(got, body) {
				t.Fatalf("%d bytes, shifted by %d: %d other bytes (%v)", n, shift, len(got), err)
			}
		}
	}
}

// TestRefusedDirectWriteGoesOn has the kernel refuse a direct write, here for where its memory is, and
// expects that what is left can be written as ever.
func TestRefusedDirectWriteGoesOn(t *testing.T) {
	f, err := os.CreateTemp(t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	body := alignedBody(directMin, 1)
	done, err := writeDirect(t.Context(), f, body)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := writeChunks(t.Context(), f, body[done:], chunkBytes); err != nil {
		t.Fatalf("after %d bytes: %v", done, err)
	}
	if got, err := os.ReadFile(f.Name()); err != nil || !bytes.Equal(got, body) {
		t.Fatalf("%d other bytes (%v)", len(got), err)
	}
}

func BenchmarkPut(b *testing.B) {
	for _, n := range []int{64 << 10, 256 << 10, 1 << 20, 16 << 20} {
		for _, shift := range []int{0, 64} {
			b.Run(fmt.Sprintf("%dKiB/shifted=%d", n>>10, shift), func(b *testing.B) {
				s, err := Open(b.TempDir(), Options{})
				if err != nil {
					b.Fatal(err)
				}
				body := alignedBody(n, shift)
				b.SetBytes(int64(n))
				used := cpuTime()
				i := 0
				for b.Loop() {
					if _, err := s.Put(b.Context(), fmt.Sprintf("k/%d", i%4), body, backend.Cond{}); err != nil {
						b.Fatal(err)
					}
					i++
				}
				b.ReportMetric(float64(cpuTime()-used)/1e6/float64(b.N), "cpu-ms/op")
			})
		}
	}
}

// cpuTime is the processor time this process has used, in nanoseconds.
func cpuTime() int64 {
	var u unix.Rusage
	_ = unix.Getrusage(unix.RUSAGE_SELF, &u) // cannot fail with these arguments
	return u.Utime.Nano() + u.Stime.Nano()
}
