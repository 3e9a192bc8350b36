package reopen

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"graindisk/backend/backendtest/miniotest"
	"graindisk/block"
	"graindisk/frontend/nbd/nbdclient"
	"graindisk/test/harness"
)

func TestMain(m *testing.M) {
	code := m.Run()
	harness.Cleanup()
	os.Exit(code)
}

const (
	diskBytes = 1 << 30
	tailBytes = 8 << 20
	readLimit = 10 * time.Second // from exec to the first read: generous; the benchmark tells

	// What a reopen may read: one slot of the tier, which holds the tail, to its end; the tail again, with a
	// header for each block, to make it stable; 64 bytes for each unpublished block of 4 KiB, twice what index
	// and metadata log need; and what any process reads. What it writes depends on how many slots it has made
	// ready when the read is served.
	slotBytes  = 64 << 20
	tailMost   = 2 * tailBytes
	blockShare = 64
	startBytes = 8 << 20

	writers = 8
	samples = 1000 // blocks looked at after each reopen
)

// TestReopenReadsATailAndAnIndex fills the log behind targets that hang, kills the gateway and opens again,
// with targets that hang and with targets that answer. What it reads and replays must not grow with what is
// unpublished, but for the index.
func TestReopenReadsATailAndAnIndex(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	store := miniotest.Start(t)
	// Cut by nothing but the end: whatever packs a cut right after the reopen would be counted.
	s := harness.NewSite(t, store, "2GiB", 10*time.Minute, fmt.Sprintf("{name: d, size: %d}", diskBytes))
	w := &world{t: t, site: s, rng: rand.New(rand.NewPCG(seed, 0))}
	w.g = harness.Serve(t, "--config", s.Config)
	w.uri = w.g.URIs[0]
	store.Pause(t)

	var took []work
	for _, unpublished := range []int64{64 << 20, 256 << 20} {
		w.write(unpublished - w.written)
		w.reopen() // seals what is there
		w.write(tailBytes)
		hanging := w.reopen()
		if !strings.Contains(w.g.Log(), "looked=500ms") {
			t.Error("a gateway that came right back did not take a short look at the root")
		}
		store.Resume(t)
		w.write(tailBytes)
		answering := w.reopen()
		store.Pause(t)
		dirty := harness.Show(t, "d", "--config", s.Config).UnpublishedBytes
		t.Logf("COUNT %d MiB unpublished: %v with targets that hang, %v with targets that answer", dirty>>20, hanging, answering)
		if dirty < unpublished*9/10 {
			t.Fatalf("%d bytes are unpublished after %d were written at random", dirty, w.written)
		}
		for _, x := range []work{hanging, answering} {
			most := slotBytes + tailMost + startBytes + dirty/block.Size*blockShare
			if x.read > most {
				t.Errorf("%v with %d MiB unpublished: at most %d MiB may be read", x, dirty>>20, most>>20)
			}
			if most := w.written/block.Size + 1000; x.records > most {
				t.Errorf("%v: %d records were written in all", x, most)
			}
		}
		took = append(took, hanging)
	}
	if grown := took[1].read - took[0].read; grown > slotBytes/2+192<<20/block.Size*blockShare {
		t.Errorf("four times as much unpublished: %d MiB more were read", grown>>20)
	}
	store.Resume(t)
	if code := w.g.Stop(); code != 0 {
		t.Errorf("exit %d", code)
	}
	w.g = harness.Serve(t, "--config", s.Config)
	w.check()
}

// work is what a reopen took until the first read was served.
type work struct {
	took                 time.Duration
	read, wrote, records int64
}

func (w work) String() string {
	return fmt.Sprintf("%v, %d records replayed, %d KiB read, %d KiB written", w.took.Round(time.Millisecond), w.records, w.read>>10, w.wrote>>10)
}

// world is a gateway and what its disk must hold.
type world struct {
	t       *testing.T
	site    harness.Site
	g       *harness.Gateway
	uri     string
	rng     *rand.Rand
	written int64
	rounds  [diskBytes / block.Size]uint32 // of the last write to each block; 0: none
	round   uint32
	last    int // block written last
}

// stamp is what a round writes to a block.
func stamp(blk int, round uint32) []byte {
	var word [8]byte
	binary.LittleEndian.PutUint64(word[:], uint64(blk)<<32|uint64(round))
	return bytes.Repeat(word[:], block.Size/8)
}

// write sends n bytes in writes of one block, at random, each block by the same writer.
func (w *world) write(n int64) {
	w.t.Helper()
	eg, ctx := errgroup.WithContext(w.t.Context())
	count := int(n / block.Size / writers)
	w.round++
	for i := range writers {
		rng := rand.New(rand.NewPCG(w.rng.Uint64(), 0))
		eg.Go(func() error {
			c, err := nbdclient.Dial(ctx, w.uri, nbdclient.Options{})
			if err != nil {
				return err
			}
			defer c.Close()
			for range count {
				blk := rng.IntN(len(w.rounds)/writers)*writers + i
				if err := c.WriteAt(ctx, stamp(blk, w.round), int64(blk)*block.Size, false); err != nil {
					return err
				}
				w.rounds[blk] = w.round
				if i == 0 {
					w.last = blk
				}
			}
			return nil
		})
	}
	if err := eg.Wait(); err != nil {
		w.t.Fatal(err)
	}
	w.written += n
}

var records = regexp.MustCompile(`msg="log recovered".* records=(\d+)`)

// reopen kills the gateway, starts it again, and looks at some blocks.
func (w *world) reopen() (x work) {
	w.t.Helper()
	w.g.Kill()
	began := time.Now()
	var err error
	if w.g, err = harness.Start(w.t, "--config", w.site.Config); err != nil {
		w.t.Fatal(err)
	}
	w.firstRead()
	x.took = time.Since(began)
	x.read, x.wrote = w.g.Asked()
	if x.took > readLimit {
		w.t.Errorf("the first read was served after %v", x.took)
	}
	if err := w.g.WaitReady(); err != nil {
		w.t.Fatal(err)
	}
	m := records.FindStringSubmatch(w.g.Log())
	if m == nil {
		w.t.Fatalf("the gateway does not say how many records it replayed: %s", w.g.Log())
	}
	if x.records, err = strconv.ParseInt(m[1], 10, 64); err != nil {
		w.t.Fatal(err)
	}
	w.check()
	return x
}

// firstRead connects again and again until the block written last is read.
func (w *world) firstRead() {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(w.t.Context(), time.Minute)
	defer cancel()
	for {
		c, err := nbdclient.Dial(ctx, w.uri, nbdclient.Options{})
		if err == nil {
			defer c.Close()
			w.checkBlock(ctx, c, w.last)
			return
		}
		select {
		case <-time.After(time.Millisecond):
		case <-ctx.Done():
			w.t.Fatalf("no read was served: %v", err)
		}
	}
}

// check reads blocks at random.
func (w *world) check() {
	w.t.Helper()
	c, err := nbdclient.Dial(w.t.Context(), w.uri, nbdclient.Options{})
	if err != nil {
		w.t.Fatal(err)
	}
	defer c.Close()
	for range samples {
		blk := w.rng.IntN(len(w.rounds))
		for w.rounds[blk] == 0 { // some block that was written
			blk = (blk + 1) % len(w.rounds)
		}
		w.checkBlock(w.t.Context(), c, blk)
	}
}

func (w *world) checkBlock(ctx context.Context, c *nbdclient.Client, blk int) {
	w.t.Helper()
	p := make([]byte, block.Size)
	if err := c.ReadAt(ctx, p, int64(blk)*block.Size); err != nil {
		w.t.Fatal(err)
	}
	if !bytes.Equal(p, stamp(blk, w.rounds[blk])) {
		w.t.Fatalf("block %d: other bytes than round %d wrote", blk, w.rounds[blk])
	}
}
