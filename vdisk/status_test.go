package vdisk

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"testing"

	"graindisk/block"
	"graindisk/vdisk/densetree"
)

// TestStatusEqualsTheModel changes a disk at random and asks for the status of random ranges: the extents
// lie side by side from the offset on, neighbours differ, and each block is a hole exactly if nothing was
// stored since it was unmapped.
func TestStatusEqualsTheModel(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 1))
	d, _ := newDisk(t)
	ctx := context.Background()
	stored := make([]bool, diskBytes/block.Size)
	put := func(lba, n int, e densetree.Entry, is bool) {
		e.LBA, e.Blocks = block.LBA(lba), uint64(n)
		d.Tree().Put([]densetree.Entry{e})
		for i := range n {
			stored[lba+i] = is
		}
	}
	for g := range 4 {
		put(16*g, 8, densetree.Entry{Kind: densetree.Data, Extent: block.NewExtentID(1, g), Off: 4, Orig: 16}, true)
	}
	put(4, 2, densetree.Entry{Kind: densetree.Hole}, false)
	put(60, 2, densetree.Entry{Kind: densetree.Base}, true)
	for step := range 500 {
		if step%100 == 99 {
			d.o.Log.Freeze()
		}
		op := Op{Kind: OpKind(1 + rng.IntN(3)), Off: rng.Int64N(diskBytes - 1)}
		op.Len = 1 + rng.Int64N(min(diskBytes-op.Off, 4*block.Size))
		op.Data = make([]byte, op.Len)
		if err := d.Write(ctx, []Op{op}, false); err != nil {
			t.Fatal(err)
		}
		lba, n := op.inner()
		for i := range n {
			stored[uint64(lba)+i] = op.Kind == OpWrite
		}
		if op.partial() { // its edges are stored
			if op.Off%block.Size != 0 {
				stored[op.Off/block.Size] = true
			}
			if end := op.Off + op.Len; end%block.Size != 0 {
				stored[end/block.Size] = true
			}
		}
		off := rng.Int64N(diskBytes - 1)
		size, limit := 1+rng.Int64N(diskBytes-off), 1+rng.IntN(70)
		es, err := d.Status(ctx, off, size, limit)
		if err != nil || len(es) == 0 || len(es) > limit {
			t.Fatalf("step %d: %d extents, limit %d: %v", step, len(es), limit, err)
		}
		at := off
		for i, e := range es {
			if e.Len <= 0 || i > 0 && e.Hole == es[i-1].Hole {
				t.Fatalf("step %d: extent %d of %v", step, i, es)
			}
			for b := at / block.Size; b*block.Size < at+e.Len; b++ {
				if stored[b] == e.Hole {
					t.Fatalf("step %d: %d bytes at %d: block %d is told to be a hole: %v", step, size, off, b, e.Hole)
				}
			}
			at += e.Len
		}
		if at > off+size || len(es) < limit && at != off+size {
			t.Fatalf("step %d: extents reach %d, asked up to %d", step, at, off+size)
		}
	}
	if _, err := d.Status(ctx, diskBytes, 1, 1); !errors.Is(err, ErrRange) {
		t.Errorf("beyond the end: %v", err)
	}
	cancelled, cancel := context.WithCancel(ctx)
	cancel()
	if _, err := d.Status(cancelled, 0, 1, 1); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

// keeping is a store whose extents are local once they have been read.
type keeping struct {
	*fakeExtents
	asked int // bytes
}

func (k *keeping) Read(ctx context.Context, ps []Piece, ready func([]Done)) error {
	for _, p := range ps {
		k.asked += len(p.Dst)
		k.local[p.ID] = true
	}
	return k.fakeExtents.Read(ctx, ps, ready)
}

// TestPrefetchBringsWhatIsMissing asks for a range with holes, data in the log, and local and remote
// extents: only the last are read, and afterwards the range needs no target.
func TestPrefetchBringsWhatIsMissing(t *testing.T) {
	d, fx := newDisk(t)
	x := &keeping{fakeExtents: fx}
	d.o.Extents = x
	ctx := context.Background()
	for g := range 4 {
		id := block.NewExtentID(1, g)
		d.Tree().Put([]densetree.Entry{{LBA: block.LBA(16 * g), Blocks: 8, Kind: densetree.Data, Extent: id, Off: 4, Orig: 16}})
		x.local[id] = g == 1
	}
	data := bytes.Repeat([]byte{7}, 8*block.Size)
	if err := d.Write(ctx, []Op{{Kind: OpWrite, Off: 32 * block.Size, Len: int64(len(data)), Data: data}}, false); err != nil {
		t.Fatal(err)
	}
	if err := d.Prefetch(ctx, 100, 40*block.Size); err != nil {
		t.Fatal(err)
	}
	if x.reads != 1 || x.asked != 8*block.Size {
		t.Errorf("%d reads of %d bytes for one missing extent", x.reads, x.asked)
	}
	if ok, err := d.TryRead(make([]byte, 40*block.Size), 100); !ok || err != nil {
		t.Errorf("still missing: %v", err)
	}
	if ok, _ := d.TryRead(make([]byte, block.Size), 48*block.Size); ok {
		t.Error("what was not asked for is there")
	}
	if err := errors.Join(d.Prefetch(ctx, 0, diskBytes), d.Prefetch(ctx, 0, diskBytes)); err != nil {
		t.Fatal(err)
	}
	if x.reads != 2 {
		t.Errorf("%d reads", x.reads)
	}
	if err := d.Prefetch(ctx, diskBytes-1, 2); !errors.Is(err, ErrRange) {
		t.Errorf("beyond the end: %v", err)
	}
}

// forgetful is a store that keeps nothing of what is read.
type forgetful struct {
	*fakeExtents
	asked int64 // bytes
}

func (*forgetful) ReadCached(block.ExtentID, int, []byte) bool { return false }

func (f *forgetful) Read(_ context.Context, ps []Piece, _ func([]Done)) error {
	for _, p := range ps {
		if p.Off+len(p.Dst)/block.Size > p.Orig {
			return ErrDamaged
		}
		f.asked += int64(len(p.Dst))
	}
	return nil
}

// TestPrefetchEnds asks for far more than one request may bring, in extents that do not fit a window.
func TestPrefetchEnds(t *testing.T) {
	d, fx := newDisk(t)
	d.size.Store(16 << 30)
	x := &forgetful{fakeExtents: fx}
	d.o.Extents = x
	const n = 65_000 // blocks
	for g := range 50 {
		d.Tree().Put([]densetree.Entry{{LBA: block.LBA(n * g), Blocks: n, Kind: densetree.Data, Extent: block.NewExtentID(1, g), Orig: n}})
	}
	if err := d.Prefetch(context.Background(), 0, 50*n*block.Size); err != nil {
		t.Fatal(err)
	}
	if x.asked != prefetchMax {
		t.Errorf("%d bytes asked for", x.asked)
	}
	x.asked = 0
	if err := d.Prefetch(context.Background(), 3*block.Size, 3*n*block.Size); err != nil || x.asked != 3*n*block.Size {
		t.Errorf("%d bytes asked for, want %d: %v", x.asked, 3*n*block.Size, err)
	}
}

// TestStatusIsBounded asks about more pieces of the map than one call looks at, all of them data.
func TestStatusIsBounded(t *testing.T) {
	d, _ := newDisk(t)
	d.size.Store(1 << 40)
	es := make([]densetree.Entry, 2*statusSteps)
	for i := range es {
		es[i] = densetree.Entry{LBA: block.LBA(i), Blocks: 1, Kind: densetree.Data, Extent: block.NewExtentID(1, 2*(i%1000)), Orig: 1}
	}
	d.Tree().Put(es)
	got, err := d.Status(context.Background(), 0, 1<<40, 10)
	if err != nil || len(got) != 1 || got[0] != (Extent{Len: statusSteps * block.Size}) {
		t.Errorf("%v, %v", got, err)
	}
}
