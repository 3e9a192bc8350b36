package loss

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"graindisk/test/harness"
)

const (
	imageBytes   = 2 << 30
	nonZeroBytes = 512 << 20 // the least that the image must hold

	randomFiles     = 28
	randomFileBytes = 16 << 20
)

// makeImage makes a sparse ext4 image at path: an unpacked kernel package, tens of thousands of blocks of
// small files and executables, beside files that do not compress.
func makeImage(t *testing.T, path string) {
	t.Helper()
	harness.Need(t, "dpkg-deb", "mkfs.ext4")
	dir := filepath.Join(t.TempDir(), "files")
	harness.Must(t, "dpkg-deb", "-x", kernelPackage(t), dir)
	random := rand.NewChaCha8([32]byte{'i', 'm', 'a', 'g', 'e'})
	for i := range randomFiles {
		body := make([]byte, randomFileBytes)
		random.Read(body)
		if err := os.WriteFile(filepath.Join(dir, fmt.Sprintf("random-%d", i)), body, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	harness.Must(t, "mkfs.ext4", "-q", "-F", "-d", dir, path, fmt.Sprintf("%dk", imageBytes>>10))
	if n := countNonZero(t, path); n < nonZeroBytes {
		t.Fatalf("the image holds %d MiB that are not zero, want at least %d", n>>20, nonZeroBytes>>20)
	} else {
		t.Logf("COUNT image of %d MiB, %d MiB of them not zero", imageBytes>>20, n>>20)
	}
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
}

// kernelPackage is the path of Debian's cloud kernel package, downloaded once.
func kernelPackage(t *testing.T) string {
	t.Helper()
	cache, err := os.UserCacheDir()
	if err != nil {
		t.Fatal(err)
	}
	cache = filepath.Join(cache, "graindisk", "kernel")
	if err := os.MkdirAll(cache, 0o755); err != nil {
		t.Fatal(err)
	}
	if have := packagesIn(t, cache); len(have) > 0 {
		return have[0]
	}
	harness.Need(t, "apt-get", "apt-cache", "dpkg")
	meta := "linux-image-cloud-" + strings.TrimSpace(harness.Must(t, "dpkg", "--print-architecture"))
	name := ""
	for line := range strings.Lines(harness.Must(t, "apt-cache", "depends", meta)) {
		if _, dep, ok := strings.Cut(line, "Depends: linux-image-"); ok {
			name = "linux-image-" + strings.TrimSpace(dep)
		}
	}
	if name == "" {
		t.Fatalf("apt knows no package %s: run \"apt-get update\"", meta)
	}
	tmp, err := os.MkdirTemp(cache, "download-") // beside its final place, to be renamed there whole
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(tmp)
	harness.Must(t, "sh", "-c", `cd "$1" && apt-get -q download "$2"`, "sh", tmp, name)
	have := packagesIn(t, tmp)
	if len(have) != 1 {
		t.Fatalf("apt-get download %s left %q", name, have)
	}
	to := filepath.Join(cache, filepath.Base(have[0]))
	if err := os.Rename(have[0], to); err != nil {
		t.Fatal(err)
	}
	return to
}

func packagesIn(t *testing.T, dir string) []string {
	t.Helper()
	found, err := filepath.Glob(filepath.Join(dir, "linux-image-*.deb"))
	if err != nil {
		t.Fatal(err)
	}
	return found
}

const chunkBytes = 1 << 20

// countNonZero is how many bytes of a file lie in blocks of 4 KiB that are not all zero.
func countNonZero(t *testing.T, path string) (n int64) {
	t.Helper()
	const blockBytes = 4096
	zeroes := make([]byte, blockBytes)
	eachChunk(t, path, func(_ int64, chunk []byte) {
		for len(chunk) > 0 {
			b := chunk[:min(blockBytes, len(chunk))]
			if !bytes.Equal(b, zeroes[:len(b)]) {
				n += int64(len(b))
			}
			chunk = chunk[len(b):]
		}
	})
	return n
}

// mustEqual expects two files of the same bytes.
func mustEqual(t *testing.T, want, got string) {
	t.Helper()
	f, err := os.Open(got)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if st, err := f.Stat(); err != nil || st.Size() != imageBytes {
		t.Fatalf("%s: %v, want %d bytes (%v)", got, st.Size(), imageBytes, err)
	}
	other := make([]byte, chunkBytes)
	eachChunk(t, want, func(off int64, chunk []byte) {
		if _, err := io.ReadFull(f, other[:len(chunk)]); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(chunk, other[:len(chunk)]) {
			i := 0
			for chunk[i] == other[i] {
				i++
			}
			t.Fatalf("%s differs from %s at byte %d: %#x, want %#x", got, want, off+int64(i), other[i], chunk[i])
		}
	})
}

// eachChunk calls do with the whole of a file, in order, in pieces of at most chunkBytes.
func eachChunk(t *testing.T, path string, do func(off int64, chunk []byte)) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	chunk := make([]byte, chunkBytes)
	for off := int64(0); ; {
		n, err := io.ReadFull(f, chunk)
		do(off, chunk[:n])
		off += int64(n)
		switch {
		case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
			return
		case err != nil:
			t.Fatal(err)
		}
	}
}
