package loss

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"graindisk/frontend/nbd/nbdclient"
	"graindisk/test/harness"
)

func TestMain(m *testing.M) {
	code := m.Run()
	harness.Cleanup()
	os.Exit(code)
}

// site is a gateway's configuration and the directories that it names.
type site struct{ config, tier string }

// newSite writes the configuration of pool main on the given targets, and creates the pool.
func newSite(t *testing.T, targets []target, disks string) site {
	t.Helper()
	dir := t.TempDir()
	s := site{filepath.Join(dir, "gateway.yaml"), filepath.Join(dir, "tier")}
	var list strings.Builder
	for i, g := range targets {
		fmt.Fprintf(&list, "      - %s\n", g.yaml(fmt.Sprintf("t%d", i)))
	}
	text := fmt.Sprintf(`data: %q
tier: {dir: %q, size: 2GiB, ram: 64MiB}
pools:
  main:
    stripe: {data: 2, parity: 1}
    max_dirty_age: 1s
    targets:
%s    disks: [%s]
`, filepath.Join(dir, "data"), s.tier, list.String(), disks)
	if err := os.WriteFile(s.config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	harness.Must(t, harness.Binary(t), "pool", "create", "main", "--config", s.config)
	return s
}

// serve starts the gateway; its exports come in the order of their names.
func (s site) serve(t *testing.T, more ...string) *harness.Gateway {
	t.Helper()
	return harness.Serve(t, append([]string{"--config", s.config}, more...)...)
}

// loseHost kills the gateway and takes its SSD away.
func (s site) loseHost(t *testing.T, g *harness.Gateway) {
	t.Helper()
	g.Kill()
	if err := os.RemoveAll(s.tier); err != nil {
		t.Fatal(err)
	}
}

// objectsMin is the least number of objects that a target of the image holds: a shard of every segment of
// 32 MiB, and the root.
const objectsMin = nonZeroBytes>>25 + 1

// TestImageSurvivesTheLossOfHostAndAnyTarget writes an image onto two S3 stores and a directory. Then,
// for each of the three in turn, the host is lost together with all that the target holds, and the image
// must be what it was. A second disk gets new data in every round, published while a target is
// empty, which the next round loses another target of.
func TestImageSurvivesTheLossOfHostAndAnyTarget(t *testing.T) {
	harness.Need(t, "nbdcopy", "qemu-img", "e2fsck")
	dir := t.TempDir()
	image, back := filepath.Join(dir, "image"), filepath.Join(dir, "back")
	makeImage(t, image)
	targets := []target{newBucket(t), newBucket(t), newDirectory(t)}
	s := newSite(t, targets, fmt.Sprintf("{name: image, size: %d}, {name: more, size: 64MiB}", imageBytes))

	g := s.serve(t)
	harness.Must(t, "nbdcopy", "--flush", image, g.URIs[0])
	more := newRounds(t, g)
	for i, lost := range targets {
		for _, disk := range []string{"image", "more"} {
			harness.WaitPublished(t, disk, "--config", s.config)
		}
		before := harness.Show(t, "image", "--config", s.config)
		s.loseHost(t, g)
		if i > 0 {
			targets[i-1].restore(t)
		}
		had := lost.objects(t)
		lost.empty(t)
		if had < objectsMin || lost.objects(t) != 0 {
			t.Fatalf("target %d held %d objects and holds %d", i, had, lost.objects(t))
		}

		g = s.serve(t, "--takeover")
		after := harness.Show(t, "image", "--config", s.config)
		if after.PublishedCut < before.PublishedCut || after.Epoch <= before.Epoch {
			t.Fatalf("taken over at cut %d, epoch %d; the lost host had published cut %d in epoch %d",
				after.PublishedCut, after.Epoch, before.PublishedCut, before.Epoch)
		}
		if i == 0 {
			harness.Must(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", image, g.URIs[0])
		}
		harness.Must(t, "nbdcopy", g.URIs[0], back)
		mustEqual(t, image, back)
		harness.Must(t, "e2fsck", "-fn", back)
		if err := os.Remove(back); err != nil {
			t.Fatal(err)
		}
		more.next(t, g)
		t.Logf("COUNT target %d lost with %d objects: the image is whole", i, had)
	}
	if code := g.Stop(); code != 0 {
		t.Errorf("the gateway ended with %d", code)
	}
}

// rounds is a disk that gets a piece of new data in each round.
type rounds struct {
	random *rand.ChaCha8
	want   [][]byte
}

const roundBytes = 8<<20 - 12345 // neither a whole segment nor whole blocks

func newRounds(t *testing.T, g *harness.Gateway) *rounds {
	r := &rounds{random: rand.NewChaCha8([32]byte{'m', 'o', 'r', 'e'})}
	r.next(t, g)
	return r
}

// next expects all that was written before, and writes the next piece.
func (r *rounds) next(t *testing.T, g *harness.Gateway) {
	t.Helper()
	c, err := nbdclient.Dial(t.Context(), g.URIs[1], nbdclient.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for i, want := range r.want {
		got := make([]byte, roundBytes)
		if err := c.ReadAt(t.Context(), got, int64(i)*roundBytes); err != nil || !bytes.Equal(got, want) {
			t.Fatalf("disk more: piece %d of %d differs from what was written (%v)", i, len(r.want), err)
		}
	}
	piece := make([]byte, roundBytes)
	r.random.Read(piece)
	if err := c.WriteAt(t.Context(), piece, int64(len(r.want))*roundBytes, false); err != nil {
		t.Fatal(err)
	}
	r.want = append(r.want, piece)
}
