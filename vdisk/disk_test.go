package vdisk

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"

	"graindisk/block"
	"graindisk/internal/vfs"
	"graindisk/tier"
	"graindisk/vdisk/densetree"
	"graindisk/writeback"
)

// fakeExtents is a store of extents of 16 blocks, filled with their name; local says which of them
// need no target.
type fakeExtents struct {
	mu    sync.Mutex
	local map[block.ExtentID]bool
	reads int
	hook  func() // called by Read, once
}

func fill(p []byte, id block.ExtentID, off int) {
	for i := range p {
		p[i] = byte(int(id) + off + i/block.Size)
	}
}

func (f *fakeExtents) ReadCached(id block.ExtentID, off int, p []byte) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	fill(p, id, off)
	return f.local[id]
}

func (f *fakeExtents) Ahead(func() []Piece, func(int)) bool { return false }
func (f *fakeExtents) AheadMax() int64                      { return 1 << 20 }

func (f *fakeExtents) Read(_ context.Context, ps []Piece, ready func([]Done)) error {
	f.mu.Lock()
	f.reads++
	hook := f.hook
	f.hook = nil
	f.mu.Unlock()
	if hook != nil {
		hook()
	}
	if ready != nil {
		ready(nil)
	}
	for i, p := range ps {
		fill(p.Dst, p.ID, p.Off)
		if ready != nil {
			ready([]Done{{Piece: i}})
		}
	}
	return nil
}

const diskBytes = 64 * block.Size

func newDisk(t *testing.T) (*Disk, *fakeExtents) {
	t.Helper()
	space, err := tier.Open(tier.Options{FS: vfs.OS{}, Dir: t.TempDir(), SlotBytes: 1 << 20, Slots: 64})
	if err != nil {
		t.Fatal(err)
	}
	log, err := writeback.Create(writeback.Options{FS: vfs.OS{}, Dir: t.TempDir(), Space: space})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { log.Close(); space.Close() })
	x := &fakeExtents{local: map[block.ExtentID]bool{}}
	return New(Options{
		ID: 1, Name: "d", Size: diskBytes, Log: log, Extents: x, Gate: func() error { return nil },
		Tree: densetree.New(densetree.Options{}),
	}), x
}

func TestDiskEqualsItsBytesUnderRandomRequests(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 1))
	d, x := newDisk(t)
	model := make([]byte, diskBytes)
	for g := range 4 { // half of the disk is published, part of it not local
		id := block.NewExtentID(1, g)
		d.Tree().Put([]densetree.Entry{{LBA: block.LBA(16 * g), Blocks: 8, Kind: densetree.Data, Extent: id, Off: 4, Orig: 16}})
		fill(model[g*16*block.Size:][:8*block.Size], id, 4)
		x.local[id] = g%2 == 0
	}
	ctx := context.Background()
	for step := range 3000 {
		var ops []Op
		for range 1 + rng.IntN(3) {
			off := rng.Int64N(diskBytes)
			o := Op{Kind: OpKind(1 + rng.IntN(3)), Off: off, Len: rng.Int64N(min(diskBytes-off, 5*block.Size) + 1)}
			if rng.IntN(2) == 0 {
				o.Off, o.Len = o.Off/block.Size*block.Size, o.Len/block.Size*block.Size
			}
			p := model[o.Off : o.Off+o.Len]
			switch o.Kind {
			case OpWrite:
				o.Data = make([]byte, o.Len)
				for i := range o.Data {
					o.Data[i] = byte(rng.Uint32())
				}
				copy(p, o.Data)
			case OpZero:
				clear(p)
			case OpTrim:
				if lba, n := o.inner(); n > 0 {
					clear(model[int64(lba)*block.Size:][:int64(n)*block.Size])
				}
			}
			ops = append(ops, o)
		}
		if err := d.Write(ctx, ops, rng.IntN(20) == 0); err != nil {
			t.Fatalf("step %d: %v", step, err)
		}
		off := rng.Int64N(diskBytes)
		got := make([]byte, rng.Int64N(diskBytes-off)+1)
		if ok, err := d.TryRead(got, off); err != nil {
			t.Fatal(err)
		} else if !ok {
			if err := d.Read(ctx, got, off); err != nil {
				t.Fatal(err)
			}
		}
		if !bytes.Equal(got, model[off:][:len(got)]) {
			t.Fatalf("step %d: %d bytes at %d differ from the model", step, len(got), off)
		}
	}
}

// TestNeighbouringSectorsAreNotLost writes the eight sectors of each block from eight goroutines.
func TestNeighbouringSectorsAreNotLost(t *testing.T) {
	d, x := newDisk(t)
	d.Tree().Put([]densetree.Entry{{LBA: 0, Blocks: 16, Kind: densetree.Data, Extent: block.NewExtentID(1, 0), Orig: 16}})
	var wg sync.WaitGroup
	for s := range 8 {
		wg.Go(func() {
			for round := range 50 {
				for blk := range 4 {
					sector := bytes.Repeat([]byte{byte(s*50 + round)}, 512)
					err := d.Write(context.Background(), []Op{{Kind: OpWrite, Off: int64(blk*block.Size + s*512), Len: 512, Data: sector}}, false)
					if err != nil {
						t.Error(err)
					}
				}
			}
		})
	}
	wg.Wait()
	p := make([]byte, 4*block.Size)
	if ok, err := d.TryRead(p, 0); !ok || err != nil {
		t.Fatal(ok, err)
	}
	for i := range p {
		if want := byte(i/512%8*50 + 49); p[i] != want {
			t.Fatalf("byte %d is %d, want %d: a neighbour's write was lost", i, p[i], want)
		}
	}
	if x.reads == 0 {
		t.Error("no partial write had to fetch its block: the test tests less than it says")
	}
}

// TestAPartialWriteSeesWhatCameWhileItFetched has a whole-block write arrive while a partial one
// waits for the target; the partial one must build on it and not on what it fetched.
func TestAPartialWriteSeesWhatCameWhileItFetched(t *testing.T) {
	d, x := newDisk(t)
	ctx := context.Background()
	d.Tree().Put([]densetree.Entry{{LBA: 0, Blocks: 16, Kind: densetree.Data, Extent: block.NewExtentID(1, 0), Orig: 16}})
	whole := bytes.Repeat([]byte{9}, block.Size)
	x.hook = func() {
		if err := d.Write(ctx, []Op{{Kind: OpWrite, Len: block.Size, Data: whole}}, false); err != nil {
			t.Error(err)
		}
	}
	if err := d.Write(ctx, []Op{{Kind: OpWrite, Off: 512, Len: 512, Data: bytes.Repeat([]byte{7}, 512)}}, false); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, block.Size)
	if ok, err := d.TryRead(got, 0); !ok || err != nil {
		t.Fatal(ok, err)
	}
	copy(whole[512:], bytes.Repeat([]byte{7}, 512))
	if !bytes.Equal(got, whole) {
		t.Fatal("the write that came meanwhile is gone")
	}
}

func TestRequestsBeyondTheEndAreRefused(t *testing.T) {
	d, _ := newDisk(t)
	ctx := context.Background()
	for _, r := range [][2]int64{{diskBytes, 1}, {diskBytes - 1, 2}, {-1, 1}, {1 << 62, 1 << 62}} {
		t.Run(fmt.Sprint(r), func(t *testing.T) {
			if err := d.Write(ctx, []Op{{Kind: OpTrim, Off: r[0], Len: r[1]}}, false); !errors.Is(err, ErrRange) {
				t.Errorf("trim: %v", err)
			}
		})
	}
	if _, err := d.TryRead(make([]byte, 2), diskBytes-1); !errors.Is(err, ErrRange) {
		t.Errorf("read: %v", err)
	}
	gone := errors.New("gone")
	d.o.Gate = func() error { return gone }
	if err := d.Flush(ctx); !errors.Is(err, gone) {
		t.Errorf("flush through a closed gate: %v", err)
	}
}

// TestAPartialWriteOverTwoColdExtentsEnds has head and tail in extents that no cache keeps.
func TestAPartialWriteOverTwoColdExtentsEnds(t *testing.T) {
	d, x := newDisk(t)
	for g := range 2 {
		d.Tree().Put([]densetree.Entry{{LBA: block.LBA(16 * g), Blocks: 16, Kind: densetree.Data, Extent: block.NewExtentID(1, g), Orig: 16}})
	}
	p := bytes.Repeat([]byte{7}, 2*block.Size)
	if err := d.Write(context.Background(), []Op{{Kind: OpWrite, Off: 15*block.Size - 512, Len: int64(len(p)), Data: p}}, false); err != nil {
		t.Fatal(err)
	}
	if x.reads > 2 {
		t.Errorf("%d fetches for two blocks", x.reads)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := d.Write(ctx, []Op{{Kind: OpWrite, Off: 512, Len: 1, Data: p[:1]}}, false); !errors.Is(err, context.Canceled) {
		t.Errorf("after its client left: %v", err)
	}
}
