package nbd

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"sync"
	"testing"
	"time"

	"graindisk/block"
	"graindisk/frontend/nbd/nbdclient"
	"graindisk/internal/crashtest"
	"graindisk/internal/vfs"
	"graindisk/tier"
	"graindisk/vdisk"
	"graindisk/vdisk/densetree"
	"graindisk/writeback"
)

// host is a machine with one real disk, its log on a file system that can lose power, served over TCP.
type host struct {
	t     testing.TB
	fs    vfs.FS
	space *tier.Space
	log   *writeback.Log
	tree  *densetree.Tree
	store *remoteStore
	disk  *vdisk.Disk

	srv    *Server
	addr   string
	stop   context.CancelFunc
	served chan error
}

// remoteStore holds extents filled with a byte, none of them local.
type remoteStore struct {
	pass func(ctx context.Context) error // nil: at once
	fill byte
}

func (*remoteStore) ReadCached(block.ExtentID, int, []byte) bool { return false }
func (*remoteStore) Ahead(func() []vdisk.Piece, func(int)) bool  { return false }
func (*remoteStore) AheadMax() int64                             { return 1 << 20 }
func (r *remoteStore) Read(ctx context.Context, ps []vdisk.Piece, ready func([]vdisk.Done)) error {
	if ready != nil {
		ready(nil)
	}
	if r.pass != nil {
		if err := r.pass(ctx); err != nil {
			return err
		}
	}
	for i, p := range ps {
		for j := range p.Dst {
			p.Dst[j] = r.fill
		}
		if ready != nil {
			ready([]vdisk.Done{{Piece: i}})
		}
	}
	return nil
}

// boot opens the log of a file system, or creates it, and serves the disk.
func boot(t testing.TB, fs vfs.FS, size int64, lo ListenOptions, create bool) *host {
	t.Helper()
	h := &host{t: t, fs: fs, store: &remoteStore{fill: 0xee}, tree: densetree.New(densetree.Options{}), served: make(chan error, 1)}
	if create {
		if err := errors.Join(fs.MkdirAll("log"), fs.SyncDir("/")); err != nil {
			t.Fatal(err)
		}
	}
	var err error
	if h.space, err = tier.Open(tier.Options{FS: fs, Dir: "log", SlotBytes: 1 << 20, Slots: 64}); err != nil {
		t.Fatal(err)
	}
	o := writeback.Options{FS: fs, Dir: "log", Space: h.space}
	if create {
		h.log, err = writeback.Create(o)
	} else if h.log, _, err = writeback.Open(o); err == nil {
		err = h.log.DropThrough(0)
	}
	if err != nil {
		t.Fatal(err)
	}
	h.disk = vdisk.New(vdisk.Options{ID: 1, Name: "disk", Size: size, Log: h.log, Tree: h.tree, Extents: h.store, Gate: func() error { return nil }})
	if h.srv, err = New(Options{Exports: oneExport(h.disk)}); err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	h.addr = URI(ln.Addr(), "disk")
	ctx, stop := context.WithCancel(bg)
	h.stop = stop
	go func() { h.served <- h.srv.Serve(ctx, ln, lo) }()
	t.Cleanup(h.die)
	return h
}

// die ends the machine, whatever it is at.
func (h *host) die() {
	if h.stop == nil {
		return
	}
	h.stop()
	<-h.served
	_ = h.log.Close() // fails where the power went
	_ = h.space.Close()
	h.stop = nil
}

func (h *host) client(o nbdclient.Options) *nbdclient.Client {
	h.t.Helper()
	c, err := nbdclient.Dial(bg, h.addr, o)
	if err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { _ = c.Close() })
	return c
}

// only is the one connection there is.
func (h *host) only() *conn {
	h.t.Helper()
	h.srv.mu.Lock()
	defer h.srv.mu.Unlock()
	if len(h.srv.conns) != 1 {
		h.t.Fatalf("%d connections", len(h.srv.conns))
	}
	for c := range h.srv.conns {
		return c
	}
	panic("unreachable")
}

// gone waits for the end of a connection and checks that it holds nothing any more.
func (h *host) gone(c *conn) {
	h.t.Helper()
	for deadline := time.Now().Add(testTimeout); ; time.Sleep(time.Millisecond) {
		h.srv.mu.Lock()
		_, there := h.srv.conns[c]
		h.srv.mu.Unlock()
		if !there {
			break
		}
		if time.Now().After(deadline) {
			h.t.Fatal("the connection does not end")
		}
	}
	if r, w, s := c.reads.used, c.writes.used, c.slow.used; r != 0 || w != 0 || s != 0 || len(c.caches) != 0 {
		h.t.Errorf("held: %d bytes of replies, %d of writes, %d slow requests, %d prefetches", r, w, s, len(c.caches))
	}
	if !c.lanesIdle() || len(c.box.queue) != 0 || c.flush.running || c.pending != [laneCount]*batch{} {
		h.t.Error("batches, flushes or replies are left")
	}
}

// records is how many records the log has taken.
func (h *host) records() uint64 { return uint64(h.log.Written()) }

const sector = 512

// stampSector fills p with a stamp.
func stampSector(p []byte, stamp uint64) []byte {
	for i := 0; i < len(p); i += 8 {
		binary.LittleEndian.PutUint64(p[i:], stamp)
	}
	return p
}

// stampOf is the stamp of a sector; ok is false if it has several.
func stampOf(p []byte) (stamp uint64, ok bool) {
	stamp = binary.LittleEndian.Uint64(p)
	return stamp, bytes.Equal(p, stampSector(make([]byte, len(p)), stamp))
}

// TestNeighbouringSectors has every sector of a few blocks written by its own writer over several connections,
// a third of the blocks stored far away before, while another connection reads: no sector ever goes back or
// is torn, and in the end each has its last stamp.
func TestNeighbouringSectors(t *testing.T) {
	const blocks, writes = 3, 60
	const sectors = blocks * block.Size / sector
	h := boot(t, crashtest.NewFS(crashtest.Options{}), 1<<20, ListenOptions{}, true)
	h.store.fill = 0
	h.tree.Put([]densetree.Entry{{LBA: 0, Blocks: 1, Kind: densetree.Data, Extent: block.NewExtentID(1, 0), Orig: 1}})
	conns := []*nbdclient.Client{h.client(nbdclient.Options{}), h.client(nbdclient.Options{Extended: true})}
	reader := h.client(nbdclient.Options{})
	var wg sync.WaitGroup
	over := make(chan struct{})
	for s := range sectors {
		wg.Go(func() {
			p := make([]byte, sector)
			for i := range uint64(writes) {
				if err := conns[s%2].WriteAt(bg, stampSector(p, i+1), int64(s)*sector, i%16 == 0); err != nil {
					t.Errorf("sector %d: %v", s, err)
					return
				}
			}
		})
	}
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		last := make([]uint64, sectors)
		for ended := false; !ended; {
			select {
			case <-over:
				ended = true // and once more
			default:
			}
			p := make([]byte, blocks*block.Size)
			if err := reader.ReadAt(bg, p, 0); err != nil {
				t.Errorf("read: %v", err)
				return
			}
			for s := range sectors {
				stamp, ok := stampOf(p[s*sector:][:sector])
				if !ok || stamp < last[s] || ended && stamp != writes {
					t.Errorf("sector %d has stamp %d (whole: %v) after %d; all written: %v", s, stamp, ok, last[s], ended)
					return
				}
				last[s] = stamp
			}
		}
	}()
	wg.Wait()
	close(over)
	<-watched
}

// TestNoFlushOverLostWrites cuts the power at a random call while two clients write over TCP. Whoever
// connects to the machine afterwards and gets a FLUSH through finds every write that was acknowledged before,
// and nothing that was never sent. With acknowledgements that do not wait for stable storage, as a unix socket has
// them, the same check finds losses, which shows that it can; what was flushed there is never lost.
func TestNoFlushOverLostWrites(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	const rounds = 20
	losses := 0
	for i := uint64(0); i < rounds || losses == 0 && i < 10*rounds; i++ { // most rounds that may lose something do
		keep := crashtest.KeepRandom
		if i%4 >= 2 {
			keep = crashtest.KeepNone
		}
		lost, unflushed := powerCutRound(t, seed+i, keep, ListenOptions{AckStable: i%2 == 0})
		if lost != "" {
			t.Fatalf("seed %d: %s", seed+i, lost)
		}
		losses += unflushed
	}
	if losses == 0 {
		t.Error("no round without stable acknowledgements lost a write: the check shows nothing")
	}
}

// powerCutRound returns what was lost against the promise, and how many acknowledged writes are gone that
// nobody promised to keep.
func powerCutRound(t *testing.T, seed uint64, keep crashtest.Keep, lo ListenOptions) (lost string, unflushed int) {
	const blocks = 40
	rng := rand.New(rand.NewPCG(seed, 1))
	fs := crashtest.NewFS(crashtest.Options{Seed: seed})
	h := boot(t, fs, blocks*block.Size, lo, true)
	fs.CutAfter(20 + rng.IntN(150))
	var mu sync.Mutex // guards what follows, of each block
	var sent, acked, kept [blocks]uint64
	var wg sync.WaitGroup
	for w := range 2 {
		c := h.client(nbdclient.Options{Extended: w == 1})
		for k := range 2 { // each has the blocks of one remainder by 4
			rng := rand.New(rand.NewPCG(seed, uint64(2+2*w+k)))
			wg.Go(func() {
				p := make([]byte, block.Size)
				for stamp := uint64(1); ; stamp++ {
					if rng.IntN(8) == 0 {
						mu.Lock()
						before := acked
						mu.Unlock()
						if c.Flush(bg) != nil {
							return
						}
						mu.Lock()
						for b := range before { // of all connections
							kept[b] = max(kept[b], before[b])
						}
						mu.Unlock()
						continue
					}
					b, fua := 4*rng.IntN(blocks/4)+2*w+k, rng.IntN(8) == 0
					mu.Lock()
					sent[b] = stamp
					mu.Unlock()
					if c.WriteAt(bg, stampSector(p, stamp), int64(b)*block.Size, fua) != nil {
						return
					}
					mu.Lock()
					acked[b] = stamp
					if fua || lo.AckStable {
						kept[b] = stamp
					}
					mu.Unlock()
				}
			})
		}
	}
	for deadline := time.Now().Add(testTimeout); !fs.WasCut(); time.Sleep(100 * time.Microsecond) {
		if time.Now().After(deadline) {
			t.Fatalf("seed %d: no power cut", seed)
		}
	}
	h.die()
	wg.Wait()
	again := boot(t, fs.RebootKeep(seed, keep), blocks*block.Size, lo, false)
	c := again.client(nbdclient.Options{})
	if err := c.Flush(bg); err != nil {
		return "", 0 // it may refuse; it may not pretend
	}
	p := make([]byte, blocks*block.Size)
	if err := c.ReadAt(bg, p, 0); err != nil {
		return err.Error(), 0
	}
	for b := range blocks {
		stamp, ok := stampOf(p[b*block.Size:][:block.Size])
		switch {
		case !ok || stamp > sent[b]:
			return fmt.Sprintf("block %d: stamp %d (whole: %v), sent up to %d", b, stamp, ok, sent[b]), 0
		case stamp < kept[b]:
			return fmt.Sprintf("block %d: stamp %d after %d was promised", b, stamp, kept[b]), 0
		case stamp < acked[b]:
			unflushed++
		}
	}
	again.die()
	return "", unflushed
}

// TestClientKilledInFlight kills a client with 256 requests under way, of every kind, most of them stuck on a
// store that does not answer, or lets it say goodbye before it goes: nothing stays held, and the next client gets
// everything it asks for.
func TestClientKilledInFlight(t *testing.T) {
	const n = 256
	h := boot(t, crashtest.NewFS(crashtest.Options{}), 64<<20, ListenOptions{}, true)
	held := newGate()
	h.store.pass = held.pass
	h.tree.Put([]densetree.Entry{{LBA: 0, Blocks: n, Kind: densetree.Data, Extent: block.NewExtentID(1, 0), Orig: n}})
	h.srv.goodbyeChecks = 1
	for round := range 3 {
		victim := h.client(nbdclient.Options{Extended: round > 0, Allocation: true})
		c := h.only()
		ctx, kill := context.WithCancel(bg)
		var wg sync.WaitGroup
		for i := range int64(n) {
			wg.Go(func() {
				off, p := i*block.Size, make([]byte, 512)
				var err error
				switch i % 8 {
				case 0, 1:
					err = victim.ReadAt(ctx, make([]byte, 8192), off) // from the store
				case 2, 3:
					err = victim.WriteAt(ctx, p, off+512, i%3 == 0) // reads the block from the store first
				case 4:
					err = victim.WriteZeroes(ctx, off+100, 200, 0)
				case 5:
					err = victim.Cache(ctx, off, 64<<10)
				case 6:
					_, err = victim.BlockStatus(ctx, off, 1<<20, false)
				default:
					err = victim.Flush(ctx)
				}
				if err == nil && i%8 < 6 {
					t.Errorf("request %d succeeded without the store", i)
				}
			})
		}
		for range 8 {
			within(t, "a request", held.entered)
		}
		if round == 2 {
			_ = victim.Close() // says goodbye
		}
		kill() // with all of it in flight
		wg.Wait()
		h.gone(c)
		for len(held.entered) > 0 {
			<-held.entered
		}
	}
	close(held.open)
	next := h.client(nbdclient.Options{})
	want := bytes.Repeat([]byte{7}, n*block.Size)
	if err := errors.Join(next.WriteAt(bg, want[:1], 0, true), next.WriteAt(bg, want[:n*block.Size-1], 1, false), next.Flush(bg)); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(want))
	if err := next.ReadAt(bg, got, 0); err != nil || !bytes.Equal(got, want) {
		t.Fatalf("read back: %v", err)
	}
}
