package nbd

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"maps"
	"math"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"graindisk/frontend/nbd/nbdclient"
	"graindisk/frontend/nbd/proto"
	"graindisk/vdisk"
)

// gate makes a device's operation wait until it is opened or the operation is cancelled.
type gate struct {
	entered chan struct{} // one token per operation that arrived
	open    chan struct{}
}

func newGate() gate { return gate{make(chan struct{}, 1<<16), make(chan struct{})} }

func (g gate) pass(ctx context.Context) error {
	g.entered <- struct{}{}
	select {
	case <-g.open:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

var bg = context.Background()

// TestBlockedWriteHoldsNobodyElse has a write wait for room, and expects cached reads, reads
// from the store, TRIM and FLUSH of the same connection to be answered meanwhile.
func TestBlockedWriteHoldsNobodyElse(t *testing.T) {
	full := newGate()
	d := newMemDevice(1 << 20)
	d.onTry = func(off int64, _ int) bool { return off < 1<<19 }
	d.onWrite = func(ctx context.Context, ops []WriteOp, _ bool) error {
		if ops[0].Kind == OpWrite {
			return full.pass(ctx)
		}
		return nil
	}
	s := startServer(t, Options{Exports: oneExport(d)}, ListenOptions{})
	c := s.client(nbdclient.Options{})
	wrote := make(chan error, 1)
	go func() { wrote <- c.WriteAt(bg, make([]byte, 4096), 0, false) }()
	within(t, "the write", full.entered)
	others := make(chan error, 1)
	go func() {
		p := make([]byte, 4096)
		others <- errors.Join(c.ReadAt(bg, p, 0), c.ReadAt(bg, p, 1<<19), c.Trim(bg, 8192, 4096, false),
			c.WriteZeroes(bg, 0, 8192, 0), c.Flush(bg))
	}()
	if err := within(t, "an answer to the others", others); err != nil {
		t.Error(err)
	}
	select {
	case err := <-wrote:
		t.Errorf("the blocked write returned: %v", err)
	default:
	}
	close(full.open)
	if err := within(t, "the end of the write", wrote); err != nil {
		t.Error(err)
	}
}

// TestSlowReadsAreBounded has as many reads wait for the store as may, and expects cached reads
// to go on; one more stops the reader until a read is done.
func TestSlowReadsAreBounded(t *testing.T) {
	store := newGate()
	d := newMemDevice(1 << 20)
	d.onTry = func(off int64, _ int) bool { return off == 0 }
	d.onRead = func(ctx context.Context, _ int64, _ int) error { return store.pass(ctx) }
	s := startServer(t, Options{Exports: oneExport(d), SlowReads: 3}, ListenOptions{})
	c := s.client(nbdclient.Options{})
	read := func(off int64) <-chan error {
		ch := make(chan error, 1)
		go func() { ch <- c.ReadAt(bg, make([]byte, 512), off) }()
		return ch
	}
	var slow []<-chan error
	for i := range 3 {
		slow = append(slow, read(int64(i+1)<<12))
		within(t, "a slow read", store.entered)
	}
	if err := within(t, "a cached read", read(0)); err != nil {
		t.Error(err)
	}
	slow = append(slow, read(4<<12), read(5<<12))
	// A fourth must not enter while three wait: nothing can prove it never will, but letting
	// them go must let exactly the other two in.
	if n := len(store.entered); n != 0 {
		t.Errorf("%d more reads entered the store", n)
	}
	close(store.open)
	for _, ch := range slow {
		if err := within(t, "the end of a slow read", ch); err != nil {
			t.Error(err)
		}
	}
	if n := d.reads.Load(); n != 5 {
		t.Errorf("%d reads from the store, want 5", n)
	}
}

// request28 encodes one request.
func request28(cmd proto.Cmd, flags uint16, cookie, off uint64, n uint32) []byte {
	p := binary.BigEndian.AppendUint32(nil, proto.MagicRequest)
	p = binary.BigEndian.AppendUint16(p, flags)
	p = binary.BigEndian.AppendUint16(p, uint16(cmd))
	p = binary.BigEndian.AppendUint64(p, cookie)
	p = binary.BigEndian.AppendUint64(p, off)
	return binary.BigEndian.AppendUint32(p, n)
}

// simpleReplies reads n simple replies without data, in any order, and returns the codes by cookie.
func (r raw) simpleReplies(n int) map[uint64]uint32 {
	r.t.Helper()
	codes, err := r.replies(n)
	if err != nil {
		r.t.Fatalf("after %d replies: %v", len(codes), err)
	}
	return codes
}

// allReplies reads simple replies without data until the server closes; the error is nil at a
// clean end.
func (r raw) allReplies() (map[uint64]uint32, error) {
	r.t.Helper()
	codes, err := r.replies(math.MaxInt)
	if err == io.EOF {
		err = nil
	}
	return codes, err
}

func (r raw) replies(n int) (map[uint64]uint32, error) {
	r.t.Helper()
	codes := map[uint64]uint32{}
	p := make([]byte, 16)
	for range n {
		if _, err := io.ReadFull(r, p); err != nil {
			return codes, err
		}
		if binary.BigEndian.Uint32(p) != proto.MagicSimpleReply {
			r.t.Fatalf("not a simple reply: %x", p)
		}
		codes[binary.BigEndian.Uint64(p[8:])] = binary.BigEndian.Uint32(p[4:])
	}
	return codes, nil
}

// TestNeighboursAreOneBatch sends requests in one piece, with the device busy, and looks at how
// they reach it: few batches, in order, stability apart.
func TestNeighboursAreOneBatch(t *testing.T) {
	type call struct {
		offs   []int64
		stable bool
	}
	var mu sync.Mutex
	var calls []call
	first := newGate()
	d := newMemDevice(1 << 20)
	d.onWrite = func(ctx context.Context, ops []WriteOp, stable bool) error {
		k := call{stable: stable}
		for _, op := range ops {
			k.offs = append(k.offs, op.Off)
		}
		mu.Lock()
		calls = append(calls, k)
		mu.Unlock()
		return first.pass(ctx)
	}
	s := startServer(t, Options{Exports: oneExport(d)}, ListenOptions{})
	r := s.raw()
	r.goDisk(false)
	r.sendBytes(append(request28(proto.CmdWrite, 0, 1, 0, 1), 1))
	within(t, "the first write", first.entered)
	var p []byte
	var want []int64
	for i := range uint64(300) {
		flags := uint16(0)
		if i == 200 {
			flags = proto.CmdFlagFUA
		}
		p = append(append(p, request28(proto.CmdWrite, flags, i+2, i, 1)...), byte(i))
		want = append(want, int64(i))
	}
	r.sendBytes(append(p, request28(proto.CmdRead, 0, 999, 0, 0)...))
	r.expect(hexSimple + `00000000 00000000000003e7`) // everything before it is in the lane
	close(first.open)
	for cookie, code := range r.simpleReplies(301) {
		if code != 0 {
			t.Errorf("request %d: error %d", cookie, code)
		}
	}
	mu.Lock()
	defer mu.Unlock()
	var got []int64
	for i, k := range calls[1:] {
		got = append(got, k.offs...)
		if fua := slices.Equal(k.offs, []int64{200}); k.stable != fua {
			t.Errorf("batch %d of %v: stable %v", i+1, k.offs, k.stable)
		}
		if len(k.offs) > batchOpsMax {
			t.Errorf("batch of %d", len(k.offs))
		}
	}
	if !slices.Equal(got, want) {
		t.Errorf("order of writes: %v", got)
	}
	if len(calls) > 10 {
		t.Errorf("%d batches for 301 writes", len(calls))
	}
	for i, got := range d.contents()[:300] {
		if got != byte(i) {
			t.Fatalf("byte %d is %d", i, got)
		}
	}
}

// TestAckStable expects every write of such a listener to be stable, and FUA to make it so
// elsewhere.
func TestAckStable(t *testing.T) {
	for _, ack := range []bool{false, true} {
		d := newMemDevice(1 << 16)
		d.stable = make([]byte, 1<<16)
		s := startServer(t, Options{Exports: oneExport(d)}, ListenOptions{AckStable: ack})
		c := s.client(nbdclient.Options{})
		if err := c.WriteAt(bg, []byte("plain"), 0, false); err != nil {
			t.Fatal(err)
		}
		if err := c.WriteAt(bg, []byte("fua"), 100, true); err != nil {
			t.Fatal(err)
		}
		d.mu.RLock()
		if got := string(d.stable[:5]) == "plain"; got != ack {
			t.Errorf("ack stable %v: write is stable: %v", ack, got)
		}
		if string(d.stable[100:103]) != "fua" {
			t.Errorf("ack stable %v: write with FUA is not stable", ack)
		}
		d.mu.RUnlock()
		if err := c.Flush(bg); err != nil {
			t.Fatal(err)
		}
		d.mu.RLock()
		if string(d.stable[:5]) != "plain" {
			t.Error("flushed write is not stable")
		}
		d.mu.RUnlock()
	}
}

// TestFlushCoversOtherConnections completes a write on one connection and flushes on another.
func TestFlushCoversOtherConnections(t *testing.T) {
	d := newMemDevice(1 << 16)
	d.stable = make([]byte, 1<<16)
	s := startServer(t, Options{Exports: oneExport(d)}, ListenOptions{})
	a, b := s.client(nbdclient.Options{}), s.client(nbdclient.Options{SimpleReplies: true})
	for i := range byte(50) {
		if err := a.WriteAt(bg, []byte{i}, int64(i), false); err != nil {
			t.Fatal(err)
		}
		if err := b.Flush(bg); err != nil {
			t.Fatal(err)
		}
		d.mu.RLock()
		if d.stable[i] != i {
			t.Fatalf("write %d is not stable after FLUSH", i)
		}
		d.mu.RUnlock()
	}
}

// TestFlushesShare has many FLUSH requests wait for one that is under way: they share the next.
func TestFlushesShare(t *testing.T) {
	g := newGate()
	d := newMemDevice(1 << 16)
	d.onFlush = g.pass
	s := startServer(t, Options{Exports: oneExport(d)}, ListenOptions{})
	r := s.raw()
	r.goDisk(false)
	r.sendBytes(request28(proto.CmdFlush, 0, 1, 0, 0))
	within(t, "the first flush", g.entered)
	for i := range uint64(20) {
		r.sendBytes(request28(proto.CmdFlush, 0, i+2, 0, 0))
	}
	r.sendBytes(request28(proto.CmdRead, 0, 999, 0, 0))
	r.expect(hexSimple + `00000000 00000000000003e7`)
	close(g.open)
	r.simpleReplies(21)
	if n := d.flushes.Load(); n != 2 {
		t.Errorf("%d flushes reached the device, want 2", n)
	}
}

// TestErrorStaysWithItsRequest has one write of a batch fail.
func TestErrorStaysWithItsRequest(t *testing.T) {
	first := newGate()
	d := newMemDevice(1 << 16)
	d.onWrite = func(ctx context.Context, ops []WriteOp, _ bool) error {
		if ops[0].Off == 4095 {
			return first.pass(ctx)
		}
		for _, op := range ops {
			if op.Off == 7 {
				return vdisk.ErrDamaged
			}
		}
		return nil
	}
	s := startServer(t, Options{Exports: oneExport(d)}, ListenOptions{})
	r := s.raw()
	r.goDisk(false)
	r.sendBytes(append(request28(proto.CmdWrite, 0, 4095, 4095, 1), 0))
	within(t, "the first write", first.entered)
	var p []byte
	for i := range uint64(20) {
		p = append(append(p, request28(proto.CmdWrite, 0, i, i, 1)...), byte(i))
	}
	r.sendBytes(append(p, request28(proto.CmdRead, 0, 999, 0, 0)...))
	r.expect(hexSimple + `00000000 00000000000003e7`)
	close(first.open)
	for cookie, code := range r.simpleReplies(21) {
		if bad := cookie == 7; bad != (code == 5) || !bad && code != 0 {
			t.Errorf("write %d: error %d", cookie, code)
		}
	}
}

// TestConcurrentModel has several clients read, write, trim and zero regions of their own, all
// at once over several connections, and compares with plain memory.
func TestConcurrentModel(t *testing.T) {
	t.Run("through the lanes", func(t *testing.T) { concurrentModel(t, func(d *memDevice) Device { return d }) })
	t.Run("by the reader itself", func(t *testing.T) {
		concurrentModel(t, func(d *memDevice) Device { return &promptDevice{memDevice: d} })
	})
}

// promptDevice promises for two batches of three that they need not wait.
type promptDevice struct {
	*memDevice
	asked atomic.Uint64
}

func (d *promptDevice) Prompt([]WriteOp) bool { return d.asked.Add(1)%3 != 0 }

// TestPromptWritesAreStableAfterFlush writes and flushes one at a time, both ways mixed.
func TestPromptWritesAreStableAfterFlush(t *testing.T) {
	d := newMemDevice(1 << 16)
	s := startServer(t, Options{Exports: oneExport(&promptDevice{memDevice: d})}, ListenOptions{})
	c := s.client(nbdclient.Options{})
	d.stable = make([]byte, 1<<16)
	for i := range byte(90) {
		if err := errors.Join(c.WriteAt(bg, []byte{i}, int64(i), i%2 == 0), c.Flush(bg)); err != nil {
			t.Fatal(err)
		}
		d.mu.RLock()
		if d.stable[i] != i {
			t.Fatalf("write %d is not stable after FLUSH", i)
		}
		d.mu.RUnlock()
	}
	if n := d.flushes.Load(); n != 90 {
		t.Errorf("%d flushes reached the device, want 90", n)
	}
}

// beginDevice waits in BeginFlush for the test.
type beginDevice struct {
	promptDevice
	begin chan struct{}
}

func (d *beginDevice) BeginFlush() { <-d.begin }

// TestFlushBeginsAfterTheAnswer expects the device to be told that a FLUSH may come when the client has the
// answer to its write, and not for a write that was stable anyway.
func TestFlushBeginsAfterTheAnswer(t *testing.T) {
	d := &beginDevice{promptDevice{memDevice: newMemDevice(1 << 16)}, make(chan struct{})}
	s := startServer(t, Options{Exports: oneExport(d)}, ListenOptions{})
	c := s.client(nbdclient.Options{})
	for i := range byte(6) {
		if err := c.WriteAt(bg, []byte{i}, 0, false); err != nil { // needs no begin to be answered
			t.Fatal(err)
		}
		select {
		case d.begin <- struct{}{}:
		case <-time.After(testTimeout):
			t.Fatalf("write %d: not told", i)
		}
		if err := c.WriteAt(bg, []byte{i}, 1, true); err != nil {
			t.Fatal(err)
		}
	}
	close(d.begin)
}

func concurrentModel(t *testing.T, as func(*memDevice) Device) {
	const workers, region, steps = 8, 256 << 10, 150
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	var n atomic.Uint64
	d := newMemDevice(workers * region)
	d.onTry = func(int64, int) bool { return n.Add(1)%3 != 0 }
	s := startServer(t, Options{Exports: oneExport(as(d)), InFlightBytes: 1 << 20, SlowReads: 2}, ListenOptions{})
	clients := []*nbdclient.Client{
		s.client(nbdclient.Options{}), s.client(nbdclient.Options{Extended: true}), s.client(nbdclient.Options{SimpleReplies: true}),
	}
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() {
			rnd := rand.New(rand.NewPCG(seed, uint64(w)))
			model := make([]byte, region)
			base := int64(w * region)
			for step := range steps {
				c := clients[rnd.IntN(len(clients))]
				off := rnd.IntN(region)
				size := rnd.IntN(min(region-off, 1<<(rnd.IntN(18)+1)) + 1)
				at := base + int64(off)
				var err error
				switch part := model[off : off+size]; rnd.IntN(6) {
				case 0, 1:
					for i := range part {
						part[i] = byte(rnd.Uint32())
					}
					err = c.WriteAt(bg, part, at, rnd.IntN(4) == 0)
				case 2:
					clear(part)
					err = c.WriteZeroes(bg, at, int64(size), proto.CmdFlagNoHole)
				case 3:
					err = c.Trim(bg, at, int64(size), false)
					if from, to := (off+4095)&^4095, (off+size)&^4095; from < to {
						clear(model[from:to])
					}
				case 4:
					err = c.Flush(bg)
				default:
					got := make([]byte, size)
					if err = c.ReadAt(bg, got, at); err == nil && !bytes.Equal(got, part) {
						t.Errorf("worker %d step %d: %d bytes at %d differ", w, step, size, off)
						return
					}
				}
				if err != nil {
					t.Errorf("worker %d step %d: %v", w, step, err)
					return
				}
			}
		})
	}
	wg.Wait()
}

// TestShutdownAnswersWhatWasRead stops a server that holds a blocked write, a slow read and a
// flush, and expects all three answered before the end of the stream.
func TestShutdownAnswersWhatWasRead(t *testing.T) {
	g := newGate()
	d := newMemDevice(1 << 16)
	d.onTry = func(int64, int) bool { return false }
	d.onRead = func(ctx context.Context, _ int64, _ int) error { return g.pass(ctx) }
	d.onWrite = func(ctx context.Context, _ []WriteOp, _ bool) error { return g.pass(ctx) }
	d.onFlush = g.pass
	s := startServer(t, Options{Exports: oneExport(d)}, ListenOptions{})
	r := s.raw()
	r.goDisk(false)
	r.sendBytes(append(request28(proto.CmdWrite, 0, 1, 0, 1), 'x'))
	r.sendBytes(request28(proto.CmdRead, 0, 2, 8, 0))
	// In one piece: who has read the trim has read the flush.
	r.sendBytes(append(request28(proto.CmdTrim, 0, 3, 4096, 4096), request28(proto.CmdFlush, 0, 4, 0, 0)...))
	for range 3 {
		within(t, "a request", g.entered)
	}
	ended := make(chan error, 1)
	go func() { ended <- s.Shutdown(bg) }()
	// The drained reader reads no further; the rest is answered once the device answers.
	for !s.isDraining() {
		runtime.Gosched()
	}
	// A read of the socket that had begun may still take this one, and then answers it too.
	_, _ = r.Write(request28(proto.CmdRead, 0, 5, 8, 0))
	close(g.open)
	codes, err := r.allReplies()
	if err != nil && !strings.Contains(err.Error(), "reset by peer") {
		t.Error(err)
	}
	if code, ok := codes[5]; ok && code == 0 {
		delete(codes, 5)
	}
	if want := map[uint64]uint32{1: 0, 2: 0, 3: 0, 4: 0}; !maps.Equal(codes, want) {
		t.Errorf("replies %v, want %v", codes, want)
	}
	_ = r.Close()
	if err := within(t, "shutdown", ended); err != nil {
		t.Error(err)
	}
	if d.contents()[0] != 'x' {
		t.Error("the write is lost")
	}
}

// TestShutdownGivesUp breaks off what does not end in time.
func TestShutdownGivesUp(t *testing.T) {
	g := newGate()
	d := newMemDevice(1 << 16)
	d.onWrite = func(ctx context.Context, _ []WriteOp, _ bool) error { return g.pass(ctx) }
	s := startServer(t, Options{Exports: oneExport(d)}, ListenOptions{})
	c := s.client(nbdclient.Options{})
	wrote := make(chan error, 1)
	go func() { wrote <- c.WriteAt(bg, []byte("x"), 0, false) }()
	within(t, "the write", g.entered)
	ctx, cancel := context.WithCancel(bg)
	cancel()
	if err := s.Shutdown(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("shutdown: %v", err)
	}
	if err := within(t, "the end of the write", wrote); err == nil {
		t.Error("a write that was broken off succeeded")
	}
}

// TestServeEndsWithContext breaks the clients of one listener off.
func TestServeEndsWithContext(t *testing.T) {
	exports := oneExport(newMemDevice(1 << 16))
	s, err := New(Options{Exports: exports})
	if err != nil {
		t.Fatal(err)
	}
	ln, err := Listen("tcp://127.0.0.1:0", false)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(bg)
	served := make(chan error, 1)
	go func() { served <- s.Serve(ctx, ln, ListenOptions{AckStable: true}) }()
	c, err := nbdclient.Dial(bg, URI(ln.Addr(), "disk"), nbdclient.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := c.WriteAt(bg, []byte("over tcp"), 0, false); err != nil {
		t.Fatal(err)
	}
	cancel()
	if err := within(t, "the end of Serve", served); !errors.Is(err, context.Canceled) {
		t.Errorf("serve: %v", err)
	}
	if err := c.Flush(bg); err == nil {
		t.Error("flush succeeded without a server")
	}
	_ = c.Close()
	if n := exports.open.Load(); n != 0 {
		t.Errorf("%d exports were not released", n)
	}
}

// TestClientGone leaves with requests of every kind in flight; startServer's clean-up and
// goleak see what is left behind.
func TestClientGone(t *testing.T) {
	g := newGate()
	d := newMemDevice(1 << 20)
	d.onTry = func(int64, int) bool { return false }
	d.onRead = func(ctx context.Context, _ int64, _ int) error { return g.pass(ctx) }
	d.onWrite = func(ctx context.Context, _ []WriteOp, _ bool) error { return g.pass(ctx) }
	d.onFlush = g.pass
	closed := make(chan string, 1)
	s := startServer(t, Options{
		Exports: oneExport(d), SlowReads: 2, InFlightBytes: 1 << 20,
		Metrics: Metrics{Closed: func(export string) { closed <- export }},
	}, ListenOptions{})
	r := s.raw()
	r.goDisk(true)
	r.sendBytes(append(request28(proto.CmdWrite, 0, 1, 0, 1<<19), make([]byte, 1<<19)...))
	r.sendBytes(request28(proto.CmdFlush, 0, 2, 0, 0))
	r.sendBytes(request28(proto.CmdRead, 0, 3, 0, 4096))
	r.sendBytes(append(request28(proto.CmdWrite, 0, 4, 0, 1<<19), make([]byte, 100)...)) // and no more
	within(t, "a request", g.entered)
	within(t, "another", g.entered)
	_ = r.Close()
	if got := within(t, "the end of the connection", closed); got != "disk" {
		t.Errorf("export %q closed", got)
	}
}

// TestClientThatReadsNoReplies sends requests and never takes a reply; the server must neither
// buffer without end nor hang when it goes.
func TestClientThatReadsNoReplies(t *testing.T) {
	d := newMemDevice(1 << 20)
	s := startServer(t, Options{Exports: oneExport(d), InFlightBytes: 1 << 20}, ListenOptions{})
	r := s.raw()
	r.goDisk(false)
	_ = r.SetWriteDeadline(time.Now().Add(time.Second))
	var sent int64
	for {
		n, err := r.Write(request28(proto.CmdRead, 0, 1, 0, 64<<10))
		sent += int64(n)
		if err != nil {
			break // the server has stopped reading
		}
		if sent > 8<<20 {
			t.Fatal("the server goes on reading")
		}
	}
	_ = r.Close()
}

func TestMetrics(t *testing.T) {
	var mu sync.Mutex
	got := map[string]int64{}
	opened := ""
	s := startServer(t, Options{Exports: oneExport(newMemDevice(1 << 16)), Metrics: Metrics{
		Opened: func(export string) { opened = export },
		Done: func(cmd proto.Cmd, bytes int64, took time.Duration, code proto.Errno) {
			mu.Lock()
			defer mu.Unlock()
			if took < 0 || took > testTimeout {
				t.Errorf("%s took %v", cmd, took)
			}
			key := cmd.String()
			if code != proto.OK {
				key += " " + strings.SplitN(code.Error(), ":", 2)[0]
			}
			got[key] += bytes
		},
	}}, ListenOptions{})
	c := s.client(nbdclient.Options{})
	p := make([]byte, 4096)
	err := errors.Join(c.WriteAt(bg, p, 0, false), c.ReadAt(bg, p, 0), c.ReadAt(bg, p, 0), c.Flush(bg), c.Trim(bg, 0, 8192, true),
		c.WriteZeroes(bg, 0, 100, 0))
	if err != nil {
		t.Fatal(err)
	}
	if err := c.ReadAt(bg, p, 1<<16); !errors.Is(err, proto.EINVAL) {
		t.Errorf("read beyond the end: %v", err)
	}
	mu.Lock()
	defer mu.Unlock()
	want := map[string]int64{"write": 4096, "read": 8192, "flush": 0, "trim": 8192, "write_zeroes": 100, "read EINVAL": 4096}
	for k, v := range want {
		if n, ok := got[k]; !ok || n != v {
			t.Errorf("%s: %d bytes (seen %v), want %d", k, n, ok, v)
		}
	}
	if len(got) != len(want) || opened != "disk" {
		t.Errorf("metrics %v, opened %q", got, opened)
	}
}

// loopConn is a client that sends the same request n times and drops the replies.
type loopConn struct {
	scriptConn
	request []byte
	n       int
}

func (l *loopConn) Read(p []byte) (int, error) {
	if l.in.Len() > 0 {
		return l.in.Read(p)
	}
	k := min(l.n, len(p)/len(l.request))
	if k == 0 {
		return 0, io.EOF
	}
	l.n -= k
	for i := range k {
		copy(p[i*len(l.request):], l.request)
	}
	return k * len(l.request), nil
}

func (l *loopConn) Write(p []byte) (int, error) { return len(p), nil }

// TestCachedReadsAllocateNothing compares the allocations of few and of many cached reads.
func TestCachedReadsAllocateNothing(t *testing.T) {
	exports := oneExport(newMemDevice(64 << 10))
	s, err := New(Options{Exports: exports})
	if err != nil {
		t.Fatal(err)
	}
	for style, request := range [][]byte{
		styleSimple:     request28(proto.CmdRead, 0, 1, 4096, 4096),
		styleStructured: request28(proto.CmdRead, 0, 1, 4096, 4096),
		styleExtended:   request32(proto.CmdRead, 0, 1, 4096, 4096),
	} {
		ask := []string{``, option(t, `00000008`, ``), option(t, `0000000b`, ``)}[style]
		mallocs := func(n int) float64 {
			return testing.AllocsPerRun(3, func() {
				l := &loopConn{request: request, n: n}
				l.in = bytes.NewReader(unhex(t, `00000003`+ask+`"IHAVEOPT" 00000007 0000000a 00000004 "disk" 0000`))
				newConn(bg, s, l, ListenOptions{}).serve()
			})
		}
		few, many := mallocs(1000), mallocs(21000)
		if per := (many - few) / 20000; per > 0.05 { // pools may be emptied now and then
			t.Errorf("style %d: %.3f allocations per cached read (%v for 1000, %v for 21000)", style, per, few, many)
		}
	}
}
