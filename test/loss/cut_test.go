package loss

import (
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
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
	lockstepBlocks = 2048 // of each disk
	hostsLost      = 5    // in a short run
	holeOneIn      = 8
	runBlocksMax   = 16
)

// TestLostHostComesBackAtOneCut writes two disks in turn, one write at a time, while the gateway publishes
// as it likes, kills it at a random moment, takes its SSD away and takes the pool over. Both disks must
// show one and the same prefix of what was written, which holds every cut known to be published.
func TestLostHostComesBackAtOneCut(t *testing.T) {
	seed, until := seedAndEnd(t)
	random := rand.New(rand.NewPCG(seed, 0))
	s := newSite(t, []target{newDirectory(t), newDirectory(t), newDirectory(t)}, "{name: a, size: 8MiB}, {name: b, size: 8MiB}")
	l := &lockstep{model: crashtest.NewModel(), random: random}
	l.model.AddDisk(1, lockstepBlocks)
	l.model.AddDisk(2, lockstepBlocks)

	g := s.serve(t)
	round, written, lost := 0, 0, 0
	for ; round < hostsLost || time.Now().Before(until); round++ {
		l.connect(t, g)
		n := l.writeUntilKilled(t, s, g, time.Duration(500+random.IntN(4000))*time.Millisecond)
		s.loseHost(t, g)
		g = s.serve(t, "--takeover")
		l.connect(t, g)
		cut := harness.Show(t, "a", "--config", s.config).PublishedCut
		if err := l.model.CheckCut(l.read, cut); err != nil {
			t.Fatalf("round %d, cut %d: %v", round, cut, err)
		}
		gone := l.lostSince(t)
		if err := l.model.Recover(l.read); err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
		l.model.Published(cut, l.model.Mark())
		t.Logf("COUNT round %d: %d writes, back at cut %d without the last %d of them", round, n, cut, gone)
		written, lost = written+n, lost+gone
	}
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

// lockstep writes two disks in turn. Disk i of the model is clients[i-1].
type lockstep struct {
	model   *crashtest.Model
	random  *rand.Rand
	clients []*nbdclient.Client
	turn    int
	round   []uint64 // the writes of this round, by their numbers in the model
}

func (l *lockstep) connect(t *testing.T, g *harness.Gateway) {
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
func (l *lockstep) writeUntilKilled(t *testing.T, s site, g *harness.Gateway, d time.Duration) (acked int) {
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
	for l.step(t) == nil {
		acked++
	}
	wg.Wait()
	return acked
}

// notePublished asks for the newest cut, again and again. The cut after the one that it is told may have
// been frozen already, but the one after that holds all that was acknowledged before it asked.
func (l *lockstep) notePublished(ctx context.Context, t *testing.T, s site) {
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

// step writes or unmaps a few blocks of the disk whose turn it is.
func (l *lockstep) step(t *testing.T) error {
	disk := l.turn%2 + 1
	l.turn++
	c, id := l.clients[disk-1], block.DiskID(disk)
	n := 1 + l.random.IntN(runBlocksMax)
	lba := l.random.IntN(lockstepBlocks - n + 1)
	if l.random.IntN(holeOneIn) == 0 {
		op := l.model.IssueHole(id, block.LBA(lba), n)
		return l.acked(op, c.Trim(t.Context(), int64(lba)*block.Size, int64(n)*block.Size, false))
	}
	op, data := l.model.IssueWrite(id, block.LBA(lba), n)
	l.round = append(l.round, op)
	return l.acked(op, c.WriteAt(t.Context(), data, int64(lba)*block.Size, false))
}

func (l *lockstep) acked(op uint64, err error) error {
	if err == nil {
		l.model.Acked(op)
	}
	return err
}

// read is what a disk shows now.
func (l *lockstep) read(disk block.DiskID, lba block.LBA) (crashtest.Stamp, error) {
	b := make([]byte, block.Size)
	if err := l.clients[disk-1].ReadAt(context.Background(), b, int64(lba)*block.Size); err != nil {
		return crashtest.Stamp{}, fmt.Errorf("read: %w", err)
	}
	return crashtest.ParseStamp(b)
}

// lostSince counts the writes of this round that came after the newest one that either disk shows.
func (l *lockstep) lostSince(t *testing.T) (n int) {
	t.Helper()
	var newest uint64
	for disk := range block.DiskID(2) {
		for lba := range block.LBA(lockstepBlocks) {
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
