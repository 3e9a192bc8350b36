package block

import (
	"fmt"
	"math/rand/v2"
	"testing"
)

func TestJoinCRC(t *testing.T) {
	rng := rand.NewChaCha8([32]byte{1})
	whole := make([]byte, 300<<10)
	rng.Read(whole)
	cut := []int{0, 1, 2, 7, 8, 4095, 4096, 4097, 64 << 10, 100<<10 + 13, len(whole)}
	for _, from := range cut {
		for _, to := range cut {
			if to < from {
				continue
			}
			a, b := whole[:from], whole[from:to]
			want := CRC(whole[:to])
			if got := JoinCRC(CRC(a), CRC(b), int64(len(b))); got != want {
				t.Errorf("%d bytes and %d: %#x, want %#x", len(a), len(b), got, want)
			}
			if got := MoreCRC(CRC(a), b); got != want {
				t.Errorf("%d bytes and %d more: %#x, want %#x", len(a), len(b), got, want)
			}
		}
	}
	zeros := make([]byte, 1<<20)
	long := CRC(whole)
	for range 5 {
		long = MoreCRC(long, zeros)
	}
	short := JoinCRC(CRC(whole), CRC(make([]byte, 5<<20)), 5<<20)
	if long != short {
		t.Errorf("5 MiB of zeroes: %#x, want %#x", short, long)
	}
}

func BenchmarkJoinCRC(b *testing.B) {
	p := make([]byte, 64<<10)
	for _, n := range []int{4 << 10, 64 << 10, 60 << 10, 37<<10 + 11} {
		c := CRC(p[:n])
		b.Run(fmt.Sprintf("join/%d", n), func(b *testing.B) {
			for b.Loop() {
				c = JoinCRC(c, 1, int64(n))
			}
		})
		b.Run(fmt.Sprintf("read/%d", n), func(b *testing.B) {
			for b.Loop() {
				c = MoreCRC(c, p[:n])
			}
		})
	}
}
