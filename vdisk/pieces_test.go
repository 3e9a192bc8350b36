package vdisk

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"slices"
	"testing"

	"graindisk/block"
	"graindisk/vdisk/densetree"
)

// shuffled are extents that come in random order and batches, some of them damaged.
type shuffled struct {
	*fakeExtents
	rng     *rand.Rand
	damaged map[block.ExtentID]bool
	giveUp  bool // end half way
}

func (s *shuffled) Read(_ context.Context, ps []Piece, ready func([]Done)) error {
	ready(nil)
	order := s.rng.Perm(len(ps))
	if s.giveUp {
		order = order[:len(order)/2]
	}
	for len(order) > 0 {
		n := 1 + s.rng.IntN(len(order))
		var done []Done
		for _, i := range order[:n] {
			d := Done{Piece: i}
			if s.damaged[ps[i].ID] {
				d.Err = ErrDamaged
			} else {
				fill(ps[i].Dst, ps[i].ID, ps[i].Off)
			}
			done = append(done, d)
		}
		order = order[n:]
		ready(done)
	}
	if s.giveUp {
		return context.Canceled
	}
	return nil
}

// TestPiecesCoverWhatWasAsked reads random ranges of a disk of log blocks, cached, missing and damaged
// extents and holes, and checks that each byte is told once, with the right outcome.
func TestPiecesCoverWhatWasAsked(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 1))
	d, fx := newDisk(t)
	x := &shuffled{fakeExtents: fx, rng: rng, damaged: map[block.ExtentID]bool{}}
	d.o.Extents = x
	model := make([]byte, diskBytes)
	bad, remote, hole := make([]bool, diskBytes), make([]bool, diskBytes), make([]bool, diskBytes)
	for i := range hole {
		hole[i] = true
	}
	mark := func(set []bool, lba, blocks int, v bool) {
		for i := range blocks * block.Size {
			set[lba*block.Size+i] = v
		}
	}
	for g := range 12 { // 4 blocks each; the last 16 blocks, 64 KiB, were never written
		id := block.NewExtentID(1, g)
		d.Tree().Put([]densetree.Entry{{LBA: block.LBA(4 * g), Blocks: 4, Kind: densetree.Data, Extent: id, Off: 3, Orig: 16}})
		fill(model[g*4*block.Size:][:4*block.Size], id, 3)
		mark(hole, 4*g, 4, false)
		x.local[id] = g%3 == 0
		x.damaged[id] = g%5 == 4
		mark(remote, 4*g, 4, !x.local[id])
		mark(bad, 4*g, 4, x.damaged[id] && !x.local[id])
	}
	ctx := context.Background()
	write := Op{Kind: OpWrite, Off: 9 * block.Size, Len: block.Size, Data: bytes.Repeat([]byte{0xee}, block.Size)}
	trim := Op{Kind: OpTrim, Off: 21 * block.Size, Len: 2 * block.Size}
	if err := d.Write(ctx, []Op{write, trim}, false); err != nil {
		t.Fatal(err)
	}
	copy(model[write.Off:], write.Data)
	clear(model[trim.Off:][:trim.Len])
	mark(remote, 9, 1, false)
	mark(bad, 9, 1, false)
	mark(remote, 21, 2, false)
	mark(bad, 21, 2, false)
	for step := range 1000 {
		off := rng.IntN(diskBytes)
		p := make([]byte, 1+rng.IntN(diskBytes-off))
		if rng.IntN(2) == 0 {
			off, p = off/block.Size*block.Size, make([]byte, (len(p)+block.Size-1)/block.Size*block.Size)
		}
		x.giveUp = rng.IntN(10) == 0
		var told []Part
		calls := 0
		err := d.ReadPieces(ctx, p, int64(off), func(parts []Part) {
			if len(parts) == 0 || !slices.IsSortedFunc(parts, func(a, b Part) int { return a.From - b.From }) {
				t.Fatalf("step %d: parts %v", step, parts)
			}
			for _, a := range parts {
				if a.Err == nil && !bytes.Equal(p[a.From:a.To], model[off+a.From:off+a.To]) {
					t.Fatalf("step %d: wrong bytes in %+v at the time they were told of", step, a)
				}
				if calls == 0 && slices.Contains(remote[off+a.From:off+a.To], true) && slices.Contains(remote[off:off+len(p)], false) {
					t.Fatalf("step %d: what is local did not come first", step)
				}
				if a.Hole && (a.To-a.From < holeMin || slices.Contains(hole[off+a.From:off+a.To], false)) {
					t.Fatalf("step %d: %+v is no hole", step, a)
				}
			}
			calls++
			told = append(told, parts...)
		})
		if err != nil {
			t.Fatal(err)
		}
		slices.SortFunc(told, func(a, b Part) int { return a.From - b.From })
		at := 0
		for _, a := range told {
			if a.From != at || a.To <= a.From {
				t.Fatalf("step %d: %v leave a gap or overlap at %d", step, told, at)
			}
			at = a.To
			failed, any := slices.Contains(bad[off+a.From:off+a.To], true), slices.Contains(remote[off+a.From:off+a.To], true)
			if (a.Err != nil) != failed && !(x.giveUp && any) || errors.Is(a.Err, ErrDamaged) && slices.Contains(bad[off+a.From:off+a.To], false) {
				t.Fatalf("step %d: %+v: %v", step, a, a.Err)
			}
		}
		if at != len(p) {
			t.Fatalf("step %d: %d of %d bytes told", step, at, len(p))
		}
	}
	if err := d.ReadPieces(ctx, make([]byte, 2), diskBytes-1, nil); !errors.Is(err, ErrRange) {
		t.Error(err)
	}
}
