package loss

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"testing"
	"time"

	"graindisk/block"
	"graindisk/frontend/nbd/nbdclient"
	"graindisk/internal/crashtest"
	"graindisk/test/harness"
)

const (
	disks        = 4
	writers      = 2    // at a time, of each disk
	diskBlocks   = 2048 // of each disk
	hostsLost    = 5    // in a short run
	hostsSoak    = 50   // in a long one, at least
	holeOneIn    = 8
	runBlocksMax = 16
)

// TestLostHostComesBackAtOneCut writes four disks, two writes of each at a time, while the gateway publishes as it
// likes, kills it at a random moment, takes its SSD away and takes the pool over. All disks must show one and the same
// prefix of what was acknowledged, which holds every cut known to be published; and an image of each, extracted
// before that, must be the same.
func TestLostHostComesBackAtOneCut(t *testing.T) {
	seed, until := seedAndEnd(t)
	rounds := hostsLost
	if !until.IsZero() {
		rounds = hostsSoak
	}
	random := rand.New(rand.NewPCG(seed, 0))
	s := newSite(t, []target{newDirectory(t), newDirectory(t), newDirectory(t)},
		"{name: a, size: 8MiB}, {name: b, size: 8MiB}, {name: c, size: 8MiB}, {name: d, size: 8MiB}")
	l := &load{model: crashtest.NewModel(), random: random}
	for d := range disks {
		l.model.AddDisk(block.DiskID(d+1), diskBlocks)
	}

	g := s.serve(t)
	round, written, lost := 0, 0, 0
	for ; round < rounds || time.Now().Before(until); round++ {
		l.connect(t, g)
		n := l.writeUntilKilled(t, s, g, time.Duration(500+random.IntN(4000))*time.Millisecond)
		s.loseHost(t, g)
		images := l.extract(t, s)
		g = s.serve(t, "--takeover")
		l.connect(t, g)
		cut := harness.Show(t, "a", "--config", s.config).PublishedCut
		if err := l.model.CheckCut(l.read, cut); err != nil {
			t.Fatalf("round %d, cut %d: %v", round, cut, err)
		}
		l.expectImages(t, images, cut)
		gone := l.lostSince(t)
		if err := l.model.Recover(l.read); err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
		l.model.Published(cut, l.model.Mark())
		t.Logf("COUNT round %d: %d writes, back at cut %d without the last %d of them", round, n, cut, gone)
		written, lost = written+n, lost+gone
	}
	t.Logf("COUNT %d hosts lost, each at one cut of %d disks", round, disks)
	// A host that loses all or nothing would show little.
	if written < 100*round || lost == 0 || lost > written*9/10 {
		t.Errorf("%d writes and %d of them lost in %d rounds: nothing much was tested", written, lost, round)
	}
}

// seedAndEnd are GRAINDISK_SEED, or a random seed, and when a run of GRAINDISK_SOAK is over.
func seedAndEnd(t *testing.T) (seed uint64, until time.Time) {
	seed = rand.Uint64()
	if v := os.Getenv("GRAINDISK_SEED"); v != "" {
		var err error
		if seed, err = strconv.ParseUint(v, 10, 64); err != nil {
			t.Fatalf("GRAINDISK_SEED: %v", err)
		}
	}
	t.Logf("GRAINDISK_SEED=%d", seed)
	if v := os.Getenv("GRAINDISK_SOAK"); v != "" {
		d, err := time.ParseDuration(v)
		if err != nil {
			t.Fatalf("GRAINDISK_SOAK: %v", err)
		}
		until = time.Now().Add(d)
	}
	return seed, until
}

// load writes disks. Disk i of the model is clients[i-1].
type load struct {
	model   *crashtest.Model
	random  *rand.Rand
	clients []*nbdclient.Client

	mu    sync.Mutex
	round []uint64 // the acknowledged writes of this round, by their numbers in the model
}

func (l *load) connect(t *testing.T, g *harness.Gateway) {
	t.Helper()
	for _, c := range l.clients {
		c.Close()
	}
	l.clients = nil
	for _, uri := range g.URIs {
		c, err := nbdclient.Dial(t.Context(), uri, nbdclient.Options{})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		l.clients = append(l.clients, c)
	}
}

// writeUntilKilled writes until the gateway dies, which it does after d, and returns how many writes were
// acknowledged. Beside it a second goroutine notes what is certainly published.
func (l *load) writeUntilKilled(t *testing.T, s site, g *harness.Gateway, d time.Duration) (acked int) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { l.notePublished(ctx, t, s) })
	wg.Go(func() {
		<-time.After(d)
		cancel() // before the kill, which ends the asking
		g.Kill()
	})
	l.round = l.round[:0]
	for i, c := range l.clients {
		for range writers {
			random := rand.New(rand.NewPCG(l.random.Uint64(), 0))
			wg.Go(func() {
				for l.step(t, c, block.DiskID(i+1), random) == nil {
				}
			})
		}
	}
	wg.Wait()
	return len(l.round)
}

// notePublished asks for the newest cut, again and again. The cut after the one that it is told may have
// been frozen already, but the one after that holds all that was acknowledged before it asked.
func (l *load) notePublished(ctx context.Context, t *testing.T, s site) {
	for ctx.Err() == nil {
		mark := l.model.Mark()
		r := harness.Run(t, "disk", "show", "a", "--config", s.config, "--json")
		if r.Code != 0 {
			return // killed meanwhile
		}
		var d harness.Disk
		if err := json.Unmarshal([]byte(r.Stdout), &d); err != nil {
			t.Errorf("disk show printed %q: %v", r.Stdout, err)
			return
		}
		l.model.Published(d.PublishedCut+2, mark)
	}
}

// step writes or unmaps a few blocks of a disk.
func (l *load) step(t *testing.T, c *nbdclient.Client, id block.DiskID, random *rand.Rand) error {
	n := 1 + random.IntN(runBlocksMax)
	lba := random.IntN(diskBlocks - n + 1)
	if random.IntN(holeOneIn) == 0 {
		op := l.model.IssueHole(id, block.LBA(lba), n)
		err := c.Trim(t.Context(), int64(lba)*block.Size, int64(n)*block.Size, false)
		if err == nil {
			l.model.Acked(op)
		}
		return err
	}
	op, data := l.model.IssueWrite(id, block.LBA(lba), n)
	err := c.WriteAt(t.Context(), data, int64(lba)*block.Size, false)
	if err == nil {
		l.model.Acked(op)
		l.mu.Lock()
		l.round = append(l.round, op)
		l.mu.Unlock()
	}
	return err
}

// image is a disk as extract wrote it, and the cut that it is of.
type image struct {
	cut  uint64
	data []byte
}

// extract writes an image of each disk, without any gateway.
func (l *load) extract(t *testing.T, s site) (images []image) {
	t.Helper()
	dir := t.TempDir()
	for i := range disks {
		to := filepath.Join(dir, string(rune('a'+i)))
		var r struct{ Cut uint64 }
		harness.JSON(t, &r, "extract", filepath.Base(to), to, "--config", s.config)
		data, err := os.ReadFile(to)
		if err != nil {
			t.Fatal(err)
		}
		images = append(images, image{r.Cut, data})
	}
	return images
}

// expectImages expects images of the disks as they are now, of the given cut.
func (l *load) expectImages(t *testing.T, images []image, cut uint64) {
	t.Helper()
	for i, c := range l.clients {
		b := make([]byte, diskBlocks*block.Size)
		if err := c.ReadAt(t.Context(), b, 0); err != nil {
			t.Fatal(err)
		}
		if images[i].cut != cut || !bytes.Equal(images[i].data, b) {
			t.Errorf("disk %d: the image of cut %d is not what the disk has at cut %d", i+1, images[i].cut, cut)
		}
	}
}

// read is what a disk shows now.
func (l *load) read(disk block.DiskID, lba block.LBA) (crashtest.Stamp, error) {
	b := make([]byte, block.Size)
	if err := l.clients[disk-1].ReadAt(context.Background(), b, int64(lba)*block.Size); err != nil {
		return crashtest.Stamp{}, fmt.Errorf("read: %w", err)
	}
	return crashtest.ParseStamp(b)
}

// lostSince counts the writes of this round that came after the newest one that any disk shows.
func (l *load) lostSince(t *testing.T) (n int) {
	t.Helper()
	var newest uint64
	for disk := range block.DiskID(disks) {
		for lba := range block.LBA(diskBlocks) {
			s, err := l.read(disk+1, lba)
			if err != nil {
				t.Fatal(err)
			}
			newest = max(newest, s.Op)
		}
	}
	for _, op := range l.round {
		if op > newest {
			n++
		}
	}
	return n
}
