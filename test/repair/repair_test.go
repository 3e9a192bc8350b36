package repair

import (
	"bytes"
	"context"
	"hash/crc32"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/minio/minio-go/v7"

	"graindisk/backend/backendtest/miniotest"
	"graindisk/frontend/nbd/nbdclient"
	"graindisk/test/harness"
)

func TestMain(m *testing.M) {
	code := m.Run()
	harness.Cleanup()
	os.Exit(code)
}

// status is what the test wants of `pool status --json`.
type status struct {
	Segments int `json:"segments"`
	Below    int `json:"segments_below_strength"`
	Strength struct {
		Whole int   `json:"whole_segments"`
		Lost  int   `json:"lost_shards"`
		Lacks int64 `json:"lacking_bytes"`
	} `json:"strength"`
	Targets []struct {
		Name   string `json:"name"`
		ID     int    `json:"id"`
		Shards int    `json:"shards"`
	} `json:"targets"`
}

// report is what the test wants of `pool repair --json`.
type report struct {
	Restored int   `json:"restored_shards"`
	Bytes    int64 `json:"restored_bytes"`
	Failed   int   `json:"failed_shards"`
	Waiting  int   `json:"waiting_segments"`
}

const diskBytes = 64 << 20

// TestAnyTargetMayBeLostAndReplaced kills one of three servers and deletes all it has while fio writes and
// verifies; starts an empty one in its place, replaces the target and repairs; then does the same to another
// server, for good, and opens the pool on a fresh host.
func TestAnyTargetMayBeLostAndReplaced(t *testing.T) {
	harness.Need(t, "fio")
	servers := []*miniotest.Server{miniotest.Start(t), miniotest.Start(t), miniotest.Start(t)}
	targets := make([]string, len(servers))
	for i, s := range servers {
		targets[i] = harness.S3Target(t, s)
	}
	site := harness.NewSiteOn(t, targets, "1GiB", time.Second, "{name: vm1, size: 64MiB}, {name: vm2, size: 64MiB}")
	g := harness.Serve(t, "--config", site.Config)
	fill(t, g.URIs[1])
	harness.WaitPublished(t, "vm2", "--config", site.Config)
	ended := fio(t, g.URIs[0])
	begun := harness.Show(t, "vm1", "--config", site.Config).PublishedCut
	for harness.Show(t, "vm1", "--config", site.Config).PublishedCut < begun+2 { // it is in full swing
		time.Sleep(50 * time.Millisecond)
	}

	servers[1].Lose(t)
	if out, err := ended(); err != nil {
		t.Fatalf("fio: %v\n%s\nthe gateway wrote:\n%s", err, out, g.Log())
	}
	servers[1].Start(t)
	if err := servers[1].Client().MakeBucket(t.Context(), "bucket-1", minio.MakeBucketOptions{}); err != nil {
		t.Fatal(err)
	}
	if out := harness.Must(t, harness.Binary(t), "pool", "replace-target", "main", "t1", "--config", site.Config); !strings.Contains(out, "number 4 now") {
		t.Errorf("replace-target said %q", out)
	}
	refused(t, site, "nothing is to be replaced") // once is enough
	var rep []report
	harness.JSON(t, &rep, "pool", "repair", "main", "--rate", "200MiB", "--config", site.Config)
	if len(rep) != 1 || rep[0].Failed+rep[0].Waiting > 0 {
		t.Errorf("repaired %+v", rep)
	}
	var s status
	harness.JSON(t, &s, "pool", "status", "main", "--config", site.Config)
	if s.Below != 0 || s.Strength.Whole != s.Segments || s.Strength.Lost != 0 || s.Strength.Lacks != 0 || s.Segments == 0 {
		t.Errorf("after the repair the status says %+v", s)
	}
	for _, target := range s.Targets {
		if target.Shards == 0 || target.Name == "t1" && target.ID != 4 {
			t.Errorf("after the repair the status says %+v", s.Targets)
		}
	}
	t.Logf("COUNT %d segments whole again, %d shards restored by the command", s.Segments, rep[0].Restored)
	want := [2]uint32{sum(t, g.URIs[0]), sum(t, g.URIs[1])}
	harness.WaitPublished(t, "vm1", "--config", site.Config)

	servers[0].Lose(t)
	if got := [2]uint32{sum(t, g.URIs[0]), sum(t, g.URIs[1])}; got != want {
		t.Errorf("with another target gone the disks read as %x, want %x", got, want)
	}
	g.Kill()
	if err := os.RemoveAll(site.Tier); err != nil {
		t.Fatal(err)
	}
	g = harness.Serve(t, "--config", site.Config, "--takeover")
	if got := [2]uint32{sum(t, g.URIs[0]), sum(t, g.URIs[1])}; got != want {
		t.Errorf("on a fresh host the disks read as %x, want %x", got, want)
	}
}

// refused asks for a replacement of t1 that must not be made.
func refused(t *testing.T, s harness.Site, why string) {
	t.Helper()
	r := harness.Run(t, "pool", "replace-target", "main", "t1", "--config", s.Config)
	if r.Code != 1 || !strings.Contains(r.Stderr, why) {
		t.Errorf("replace-target: exit %d: %s", r.Code, r.Stderr)
	}
}

// fill writes all of a disk.
func fill(t *testing.T, uri string) {
	t.Helper()
	c := dial(t, uri)
	defer c.Close()
	p := make([]byte, 1<<20)
	for off := int64(0); off < diskBytes; off += int64(len(p)) {
		for i := range p {
			p[i] = byte(off>>20) + byte(i*i>>7)
		}
		if err := c.WriteAt(t.Context(), p, off, false); err != nil {
			t.Fatal(err)
		}
	}
	if err := c.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// sum is the checksum of all of a disk.
func sum(t *testing.T, uri string) (crc uint32) {
	t.Helper()
	c := dial(t, uri)
	defer c.Close()
	p := make([]byte, 4<<20)
	for off := int64(0); off < diskBytes; off += int64(len(p)) {
		if err := c.ReadAt(t.Context(), p, off); err != nil {
			t.Fatalf("read at %d of %s: %v", off, uri, err)
		}
		crc = crc32.Update(crc, crc32.IEEETable, p)
	}
	return crc
}

// fio writes all of a disk for some 8 seconds, in random order and sizes, and reads it back as it goes; a single
// failed request or wrong byte is fatal to it. ended waits for its end.
func fio(t *testing.T, uri string) (ended func() (string, error)) {
	t.Helper()
	ctx, stop := context.WithTimeout(context.Background(), 3*time.Minute)
	cmd := exec.CommandContext(ctx, "fio", "--name=verify", "--ioengine=nbd", "--uri="+uri, "--iodepth=8",
		"--rw=randwrite", "--bsrange=4k-64k", "--size=32m", "--rate=4m", "--fsync=32",
		"--verify=crc32c", "--verify_backlog=64", "--verify_fatal=1", "--randseed=7")
	cmd.Dir = t.TempDir()
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	t.Cleanup(stop)
	return func() (string, error) { err := <-done; return out.String(), err }
}

func dial(t *testing.T, uri string) *nbdclient.Client {
	t.Helper()
	c, err := nbdclient.Dial(t.Context(), uri, nbdclient.Options{})
	if err != nil {
		t.Fatal(err)
	}
	return c
}
