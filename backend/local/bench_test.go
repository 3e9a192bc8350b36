package local

import (
	"os"
	"path/filepath"
	"testing"

	"graindisk/backend"
	"graindisk/backend/backendtest"
)

// BenchmarkReads compares a ranged read of 64 KiB with opening the file, reading and closing it.
func BenchmarkReads(b *testing.B) {
	const size, n = 16 << 20, 64 << 10
	dir := b.TempDir()
	s, err := Open(dir, Options{})
	if err != nil {
		b.Fatal(err)
	}
	if _, err := s.Put(b.Context(), "seg/00/1", backendtest.Body(1, size), backend.Cond{}); err != nil {
		b.Fatal(err)
	}
	p, path := make([]byte, n), filepath.Join(dir, "seg/00/1")
	b.Run("os", func(b *testing.B) {
		backendtest.Measure(b, n, func(i int) error {
			f, err := os.Open(path)
			if err != nil {
				return err
			}
			defer f.Close()
			_, err = f.ReadAt(p, int64(i*n%size))
			return err
		})
	})
	b.Run("driver", func(b *testing.B) {
		backendtest.Measure(b, n, func(i int) error { return s.ReadAt(b.Context(), "seg/00/1", p, int64(i*n%size)) })
	})
}
