package kill

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"graindisk/frontend/nbd/nbdclient"
	"graindisk/frontend/nbd/proto"
)

const (
	conns        = 4
	depth        = 4         // requests under way on each connection
	writeBytes   = 150 << 10 // the longest
	hotBytes     = 4 << 20   // half of all requests go there, to overlap
	chunkBytes   = 1 << 20
	roundBytes   = 32 << 20             // written at full speed; what follows is paced,
	pacedRequest = 2 * time.Millisecond // one request of a worker in so long, to spare the test machine's disk
)

// client writes to one disk through several connections and knows what it must hold.
type client struct {
	t      *testing.T
	uri    string
	record *record
	disk   int64 // bytes
	seed   uint64
	counts struct{ writes, fua, zeroes, flushes, reads, cut, bytes atomic.Int64 }
}

func newClient(t *testing.T, uri string, disk int64, seed uint64) *client {
	return &client{t: t, uri: uri, disk: disk, seed: seed, record: newRecord(disk / sectorBytes)}
}

func (c *client) dial() []*nbdclient.Client {
	c.t.Helper()
	var out []*nbdclient.Client
	for range conns {
		nc, err := nbdclient.Dial(c.t.Context(), c.uri, nbdclient.Options{})
		if err != nil {
			c.t.Fatal(err)
		}
		if nc.Info().Flags&proto.FlagCanMultiConn == 0 {
			c.t.Fatal("several connections are not offered")
		}
		out = append(out, nc)
	}
	return out
}

// verify reads the whole disk and judges every sector; no load may be running. It returns the number
// of sectors that were ever written.
func (c *client) verify() (sectors int) {
	c.t.Helper()
	var checked, next atomic.Int64
	var g errgroup.Group
	for _, nc := range c.dial() {
		g.Go(func() error {
			defer nc.Close()
			p := make([]byte, chunkBytes)
			for {
				off := (next.Add(1) - 1) * chunkBytes
				if off >= c.disk {
					return nil
				}
				if err := nc.ReadAt(c.t.Context(), p, off); err != nil {
					return err
				}
				n, err := c.record.settle(p, off/sectorBytes)
				checked.Add(int64(n))
				if err != nil {
					return err
				}
			}
		})
	}
	if err := g.Wait(); err != nil {
		c.t.Fatalf("seed %d: %v", c.seed, err)
	}
	c.record.restarted()
	return int(checked.Load())
}

// load is the requests of one life of the gateway.
type load struct {
	c       *client
	conns   []*nbdclient.Client
	budget  atomic.Int64
	workers sync.WaitGroup
}

// start starts the load.
func (c *client) start(round uint64) *load {
	l := &load{c: c, conns: c.dial()}
	l.budget.Store(roundBytes)
	for i, nc := range l.conns {
		for j := range depth {
			rng := rand.New(rand.NewPCG(c.seed, round<<16|uint64(i*depth+j)))
			l.workers.Go(func() { l.work(nc, rng) })
		}
	}
	return l
}

// wait waits until every connection is broken and every request has failed.
func (l *load) wait() {
	l.workers.Wait()
	for _, nc := range l.conns {
		nc.Close()
	}
}

// work sends requests until the connection breaks. A request that the gateway answers with an error,
// or a read that returns what it cannot, fails the test.
func (l *load) work(nc *nbdclient.Client, rng *rand.Rand) {
	p := make([]byte, writeBytes)
	pace := time.NewTicker(pacedRequest)
	defer pace.Stop()
	for {
		err := l.request(nc, rng, p)
		var errno proto.Errno
		switch {
		case errors.As(err, &errno) || errors.Is(err, errRead):
			l.c.t.Errorf("seed %d: %v", l.c.seed, err)
			return
		case err != nil:
			l.c.counts.cut.Add(1)
			return
		}
		if l.budget.Load() < 0 {
			<-pace.C
		}
	}
}

// errRead marks a read that returned what it cannot.
var errRead = errors.New("wrong data")

// request does one request of a random kind and waits for its reply.
func (l *load) request(nc *nbdclient.Client, rng *rand.Rand, p []byte) error {
	c, ctx := l.c, context.Background()
	first, n := c.extent(rng)
	off, p := first*sectorBytes, p[:n*sectorBytes]
	switch k := rng.IntN(100); {
	case k < 8:
		if err := nc.Flush(ctx); err != nil {
			return err
		}
		c.counts.flushes.Add(1)
	case k < 18:
		v := c.record.reading(first, n)
		if err := nc.ReadAt(ctx, p, off); err != nil {
			return err
		}
		if err := v.check(p); err != nil {
			return fmt.Errorf("%w: %w", errRead, err)
		}
		c.counts.reads.Add(1)
	case k < 24:
		w := c.record.issue(first, n, true)
		flags := []uint16{0, proto.CmdFlagNoHole, proto.CmdFlagFUA}[rng.IntN(3)]
		if err := nc.WriteZeroes(ctx, off, n*sectorBytes, flags); err != nil {
			return err
		}
		w.acked()
		c.counts.zeroes.Add(1)
	default:
		w := c.record.issue(first, n, false)
		stamp(p, w.id, first)
		fua := rng.IntN(10) == 0
		l.budget.Add(-int64(len(p)))
		if err := nc.WriteAt(ctx, p, off, fua); err != nil {
			return err
		}
		w.acked()
		c.counts.writes.Add(1)
		c.counts.bytes.Add(int64(len(p)))
		if fua {
			c.counts.fua.Add(1)
		}
	}
	return nil
}

// extent draws a range of the disk, in sectors: mostly short, mostly not on block boundaries.
func (c *client) extent(rng *rand.Rand) (first, n int64) {
	switch rng.IntN(10) {
	case 0:
		n = 1 + rng.Int64N(writeBytes/sectorBytes)
	case 1, 2, 3:
		n = 8 * (1 + rng.Int64N(8)) // may cover blocks exactly
	default:
		n = 1 + rng.Int64N(32)
	}
	area := c.disk
	if rng.IntN(2) == 0 {
		area = hotBytes
	}
	first = rng.Int64N(area/sectorBytes - n + 1)
	if n%8 == 0 && rng.IntN(2) == 0 {
		first &^= 7
	}
	return first, n
}

func (c *client) String() string {
	n := &c.counts
	return fmt.Sprintf("%d writes (%d FUA) of %d MiB, %d of zeroes, %d flushes, %d reads, %d requests cut off",
		n.writes.Load(), n.fua.Load(), n.bytes.Load()>>20, n.zeroes.Load(), n.flushes.Load(), n.reads.Load(), n.cut.Load())
}
