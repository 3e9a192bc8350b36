package nbd

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"graindisk/frontend/nbd/nbdclient"
	"graindisk/frontend/nbd/proto"
	"graindisk/vdisk"
)

// pieceDevice is a memDevice whose reads all miss and come in batches of parts as plan says.
type pieceDevice struct {
	*memDevice
	plan   func(ctx context.Context, n int, ready func([]Part)) error
	pieces atomic.Int64 // calls of ReadPieces
}

func newPieceDevice(size int) *pieceDevice {
	d := &pieceDevice{memDevice: newMemDevice(size)}
	for i := range d.data {
		d.data[i] = byte(i*7 + i>>12)
	}
	d.onTry = func(int64, int) bool { return false }
	return d
}

func (d *pieceDevice) ReadPieces(ctx context.Context, p []byte, off int64, ready func([]Part)) error {
	d.pieces.Add(1)
	return d.plan(ctx, len(p), func(parts []Part) {
		for _, a := range parts {
			switch {
			case a.Hole:
				clear(p[a.From:a.To])
			case a.Err == nil:
				copy(p[a.From:a.To], d.data[off+int64(a.From):])
			}
		}
		ready(parts)
	})
}

// planOf tells batches of parts one after the other.
func planOf(batches ...[]Part) func(context.Context, int, func([]Part)) error {
	return func(_ context.Context, _ int, ready func([]Part)) error {
		for _, parts := range batches {
			ready(parts)
		}
		return nil
	}
}

const grain = 64 << 10

// TestWhatIsThereLeavesAtOnce holds the last of 16 grains back and then lets it fail: the 15 must have
// arrived before, and the error stands exactly where it belongs.
func TestWhatIsThereLeavesAtOnce(t *testing.T) {
	for _, fail := range []bool{false, true} {
		t.Run(fmt.Sprintf("the last fails: %v", fail), func(t *testing.T) {
			d := newPieceDevice(2 << 20)
			held := newGate()
			d.plan = func(ctx context.Context, n int, ready func([]Part)) error {
				ready([]Part{{To: 15 * grain}})
				last := Part{From: 15 * grain, To: n}
				if err := held.pass(ctx); err != nil {
					return err
				}
				if fail {
					last.Err = vdisk.ErrDamaged
				}
				ready([]Part{last})
				return nil
			}
			c := startServer(t, Options{Exports: oneExport(d)}, ListenOptions{}).client(nbdclient.Options{})
			chunks := make(chan nbdclient.Chunk, 100)
			p := make([]byte, 16*grain)
			ended := make(chan error, 1)
			const off = 128 << 10
			go func() { ended <- c.ReadChunks(bg, p, off, false, func(a nbdclient.Chunk) { chunks <- a }) }()
			if a := within(t, "the first chunk", chunks); a != (nbdclient.Chunk{To: 15 * grain}) {
				t.Fatalf("first chunk %+v", a)
			}
			select {
			case err := <-ended:
				t.Fatalf("the read ended early: %v", err)
			default:
			}
			close(held.open)
			want := nbdclient.Chunk{From: 15 * grain, To: 16 * grain}
			if fail {
				want = nbdclient.Chunk{From: 15 * grain, To: 15 * grain, Err: proto.EIO}
			}
			if a := within(t, "the last chunk", chunks); a != want {
				t.Errorf("last chunk %+v, want %+v", a, want)
			}
			err := within(t, "the end", ended)
			if fail != errors.Is(err, proto.EIO) || !fail && err != nil {
				t.Error(err)
			}
			good := 16 * grain
			if fail {
				good = 15 * grain
			}
			if !bytes.Equal(p[:good], d.data[off:][:good]) {
				t.Error("wrong bytes")
			}
		})
	}
}

// TestPieceBytes checks the wire: coalesced data, a hole, an error, DONE on the last chunk only; and that
// DF and simple replies are answered whole.
func TestPieceBytes(t *testing.T) {
	d := newPieceDevice(1 << 20)
	copy(d.data, "abcdefgh")
	d.plan = func(_ context.Context, n int, ready func([]Part)) error {
		ready([]Part{{From: 2, To: 4}, {From: 6, To: 7, Hole: true}})
		ready([]Part{{From: 0, To: 2, Err: vdisk.ErrDamaged}})
		ready([]Part{{From: 4, To: 6}, {From: 7, To: n}})
		return nil
	}
	const (
		cookie = `00000000000000aa`
		read   = `0000 ` + cookie + ` 0000000000000000 00000008`
		whole  = `00000010 0000000000000000 "abcdefgh"`
		eio    = `"EIO: input/output error"`
	)
	r := startServer(t, Options{Exports: oneExport(d)}, ListenOptions{}).raw()
	r.goDisk(true)
	r.send(hexRequest + `0000 ` + read)
	r.expect(hexChunk + `0000 0001` + cookie + `0000000a 0000000000000002 "cd"`)
	r.expect(hexChunk + `0000 0002` + cookie + `0000000c 0000000000000006 00000001`)
	r.expect(hexChunk + `0000 8002` + cookie + `00000025 00000005 0017` + eio + `0000000000000000`)
	r.expect(hexChunk + `0000 0001` + cookie + `0000000a 0000000000000004 "ef"`)
	r.expect(hexChunk + `0001 0001` + cookie + `00000009 0000000000000007 "h"`)
	r.send(hexRequest + `0004 ` + read) // DF
	r.expect(hexChunk + `0001 0001` + cookie + whole)
	d.plan = func(_ context.Context, n int, ready func([]Part)) error {
		ready([]Part{{To: n}})
		return nil
	}
	r.send(hexRequest + `0000 ` + read) // all together: one chunk
	r.expect(hexChunk + `0001 0001` + cookie + whole)
	d.plan = func(context.Context, int, func([]Part)) error { return vdisk.ErrRange }
	r.send(hexRequest + `0000 ` + read)
	r.expect(hexChunk + `0001 8001` + cookie + `0000001d 00000016 0017 "EINVAL: invalid request"`)
	s := startServer(t, Options{Exports: oneExport(d)}, ListenOptions{}).raw()
	s.goDisk(false)
	s.send(hexRequest + `0000 ` + read)
	s.expect(hexSimple + `00000000` + cookie + `"abcdefgh"`)
}

// TestPiecesUnderLoad reads random ranges at depth, cut into random parts in random order, and compares.
func TestPiecesUnderLoad(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	d := newPieceDevice(4 << 20)
	var mu sync.Mutex
	rng := rand.New(rand.NewPCG(seed, 0))
	d.plan = func(_ context.Context, n int, ready func([]Part)) error {
		mu.Lock()
		cuts := []int{0, n}
		for range rng.IntN(8) {
			cuts = append(cuts, rng.IntN(n))
		}
		slices.Sort(cuts)
		cuts = slices.Compact(cuts)
		var parts []Part
		for i := range cuts[1:] {
			parts = append(parts, Part{From: cuts[i], To: cuts[i+1]})
		}
		rng.Shuffle(len(parts), func(i, j int) { parts[i], parts[j] = parts[j], parts[i] })
		mu.Unlock()
		for len(parts) > 0 {
			k := 1 + len(parts)/2
			ready(parts[:k])
			parts = parts[k:]
		}
		return nil
	}
	c := startServer(t, Options{Exports: oneExport(d), InFlightBytes: 1 << 20}, ListenOptions{}).client(nbdclient.Options{})
	var wg sync.WaitGroup
	for w := range 16 {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(seed, uint64(w+1)))
			for range 200 {
				p := make([]byte, 1+rng.IntN(200<<10))
				off := rng.IntN(len(d.data) - len(p))
				told := 0
				err := c.ReadChunks(bg, p, int64(off), false, func(a nbdclient.Chunk) { told += a.To - a.From })
				if err != nil || told != len(p) || !bytes.Equal(p, d.data[off:][:len(p)]) {
					t.Errorf("%d bytes at %d, %d told: %v", len(p), off, told, err)
					return
				}
			}
		})
	}
	wg.Wait()
}

// TestPiecesForAClientThatReadsNone asks for much more than the budget in many small parts and reads
// nothing: the device is asked for no more than the budget holds.
func TestPiecesForAClientThatReadsNone(t *testing.T) {
	d := newPieceDevice(1 << 20)
	d.plan = func(_ context.Context, n int, ready func([]Part)) error {
		for at := 0; at < n; at += 4096 {
			ready([]Part{{From: at, To: at + 4096}})
		}
		return nil
	}
	const budget, size = 4 << 20, 256 << 10
	s := startServer(t, Options{Exports: oneExport(d), InFlightBytes: budget}, ListenOptions{})
	r := s.raw()
	r.goDisk(true)
	var conn *conn
	s.Server.mu.Lock()
	for conn = range s.Server.conns {
	}
	s.Server.mu.Unlock()
	var all []byte
	for i := range 100 {
		all = append(all, request28(proto.CmdRead, 0, uint64(i), 0, size)...)
	}
	r.sendBytes(all)
	// Until the reader stops: the budget is spent, or was for a moment, and what is ready waits for room in the socket.
	still, since := int64(0), time.Now()
	for time.Since(since) < 2*time.Second {
		conn.reads.mu.Lock()
		used := conn.reads.used
		conn.reads.mu.Unlock()
		if used > budget {
			t.Fatalf("%d bytes held, budget %d", used, budget)
		}
		if used == budget {
			break
		}
		if used != still {
			still, since = used, time.Now()
		}
		time.Sleep(time.Millisecond)
	}
	if n := d.pieces.Load(); n > 2*budget/size {
		t.Errorf("the device was asked %d times", n)
	}
	_ = r.Close() // with all of it in flight
}
