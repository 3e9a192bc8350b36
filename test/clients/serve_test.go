package clients

import (
	"crypto/sha256"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"graindisk/test/harness"
)

func TestMain(m *testing.M) {
	code := m.Run()
	harness.Cleanup()
	os.Exit(code)
}

const diskBytes = 64 << 20

// server is a gateway on the embedded default with the disks vm1 and vm2, of 64 MiB, and big, of 1 TiB.
type server struct {
	*harness.Gateway
	t   *testing.T
	dir string
}

func serve(t *testing.T) *server {
	t.Helper()
	dir, err := os.MkdirTemp("", "clients-") // shorter than t.TempDir: sockets have short paths
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	s := &server{t: t, dir: dir}
	s.start()
	return s
}

func (s *server) start() {
	s.t.Helper()
	s.Gateway = harness.Serve(s.t, "--data", s.path("data"), "--disk", "vm1=64MiB", "--disk", "vm2=64MiB", "--disk", "big=1TiB")
	g := s.Gateway
	s.t.Cleanup(func() {
		if s.Gateway != g {
			return // restarted since
		}
		if code := g.Stop(); code != 0 {
			s.t.Errorf("clean shutdown: exit %d", code)
		}
	})
}

// restart kills the gateway and starts it again.
func (s *server) restart() {
	s.t.Helper()
	s.Kill()
	s.start()
}

func (s *server) path(name string) string { return filepath.Join(s.dir, name) }

func (s *server) socket() string { return s.path("data/nbd.sock") }

func (s *server) uri(disk string) string { return "nbd+unix:///" + disk + "?socket=" + s.socket() }

// image writes a file as large as a disk: random but for some holes and zeroes. It returns its path.
func (s *server) image(name string, seed byte) string {
	s.t.Helper()
	random := rand.NewChaCha8([32]byte{seed})
	f, err := os.Create(s.path(name))
	if err != nil {
		s.t.Fatal(err)
	}
	defer f.Close()
	p := make([]byte, 1<<20)
	for i := range int64(diskBytes / len(p)) {
		random.Read(p)
		switch i % 5 {
		case 3:
			continue // a hole
		case 4:
			clear(p[1000:500_000])
		}
		if _, err := f.WriteAt(p, i*int64(len(p))); err != nil {
			s.t.Fatal(err)
		}
	}
	if err := f.Truncate(diskBytes); err != nil {
		s.t.Fatal(err)
	}
	return f.Name()
}

// same fails the test unless two files hold the same bytes.
func (s *server) same(a, b string) {
	s.t.Helper()
	var sums []string
	for _, name := range []string{a, b} {
		p, err := os.ReadFile(name)
		if err != nil {
			s.t.Fatal(err)
		}
		sums = append(sums, fmt.Sprintf("%d bytes, %x", len(p), sha256.Sum256(p)))
	}
	if sums[0] != sums[1] {
		s.t.Errorf("%s (%s) and %s (%s) differ", a, sums[0], b, sums[1])
	}
}
