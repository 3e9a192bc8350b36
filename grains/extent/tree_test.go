package extent_test

import (
	"math/rand/v2"
	"os"
	"sync"
	"testing"
	"time"

	"graindisk/block"
	"graindisk/grains/extent"
	"graindisk/vdisk/densetree"
)

// TestTrappedEqualsFlatOracle feeds the table from real trees: random overlapping writes and unmaps in
// cuts of one segment, on two disks, against a flat array that holds each block's extent. After every
// cut no count may be below the oracle's, and once the trees are compacted live, trapped and dead are
// equal for every segment.
func TestTrappedEqualsFlatOracle(t *testing.T) {
	const disks, blocks, grain = 2, 1 << 16, 16
	cuts, each := 100, 1000
	if os.Getenv("GRAINDISK_SOAK") != "" {
		cuts, each = 2500, 4000 // ten million
	}
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	u := extent.NewUsage()
	var guard sync.RWMutex
	var trees [disks]*densetree.Tree
	var flat [disks][]block.ExtentID
	for i := range trees {
		flat[i] = make([]block.ExtentID, blocks)
		trees[i] = densetree.New(densetree.Options{Level0Max: 500, RunMax: 500, Guard: guard.RLocker(), Lost: func(ls []densetree.Loss) {
			out := make([]extent.Loss, len(ls))
			for i, l := range ls {
				out[i] = extent.Loss(l)
			}
			if err := u.Lost(out); err != nil {
				t.Error(err)
			}
		}})
	}
	orig := map[block.SegmentID][]uint16{}
	check := func(exact bool) {
		t.Helper()
		live := map[block.ExtentID]uint32{}
		for _, d := range flat {
			for _, e := range d {
				if e != 0 {
					live[e]++
				}
			}
		}
		trapped := uint64(0)
		for s := range u.Snapshot().All() {
			want := extent.SegmentUsage{}
			for slot, n := range orig[s.ID] {
				switch l := live[block.NewExtentID(s.ID, slot)]; {
				case l == 0:
					want.DeadExtents++
				default:
					want.LiveBlocks += l
					want.TrappedBlocks += uint32(n) - l
				}
			}
			trapped += uint64(want.TrappedBlocks)
			if exact && (s.LiveBlocks != want.LiveBlocks || s.TrappedBlocks != want.TrappedBlocks || s.DeadExtents != want.DeadExtents) ||
				s.LiveBlocks < want.LiveBlocks || s.DeadExtents > want.DeadExtents {
				t.Fatalf("segment %d: the table has %d live, %d trapped, %d extents dead; the disks %d, %d, %d", s.ID,
					s.LiveBlocks, s.TrappedBlocks, s.DeadExtents, want.LiveBlocks, want.TrappedBlocks, want.DeadExtents)
			}
		}
		if exact {
			t.Logf("COUNT %d writes and unmaps, %d segments, %d blocks trapped: %+v", cuts*each, len(orig), trapped, u.Totals())
		}
	}
	for c := range cuts {
		id := block.SegmentID(c + 1)
		seg := extent.Segment{ID: id, K: 1, Targets: []block.TargetID{1}}
		var puts [disks][]densetree.Entry
		for range each {
			d := r.IntN(disks)
			if r.IntN(20) == 0 { // an unmap, in a cut of its own order
				l := block.LBA(r.IntN(blocks - 200))
				n := 1 + r.IntN(200)
				trees[d].Put([]densetree.Entry{{LBA: l, Blocks: uint64(n), Kind: densetree.Hole}})
				clear(flat[d][l:][:n])
				continue
			}
			l := r.IntN(blocks)
			if r.IntN(3) > 0 {
				l = r.IntN(blocks / 20)
			}
			n := 1 + r.IntN(grain-l%grain)
			slot := len(orig[id])
			orig[id] = append(orig[id], uint16(n))
			seg.Extents++
			seg.Blocks += uint32(n)
			puts[d] = append(puts[d], densetree.Entry{LBA: block.LBA(l), Blocks: uint64(n), Kind: densetree.Data, Extent: block.NewExtentID(id, slot), Orig: uint16(n)})
		}
		if err := u.Add(seg); err != nil {
			t.Fatal(err)
		}
		for d, es := range puts {
			for _, e := range es { // one by one: they overlap each other
				trees[d].Put([]densetree.Entry{e})
				for b := range e.Blocks {
					flat[d][uint64(e.LBA)+b] = e.Extent
				}
			}
		}
		if c%(cuts/10) == 0 {
			check(false)
		}
	}
	for _, tree := range trees {
		tree.Compact()
	}
	check(true)
}
