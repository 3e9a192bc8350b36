package segment

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"testing"

	"graindisk/block"
)

// sampleGone names cuts and segments in runs of every kind.
func sampleGone() *Gone {
	return &Gone{
		Cuts:     []CutGap{{First: 1, Last: 4}, {First: 6, Last: 6, PrevCRC: 0xabad1dea}, {First: 9, Last: 11, PrevCRC: 7}},
		Segments: []SegmentRun{{1, 17}, {19, 19}, {1 << 40, block.SegmentMax - 1}},
	}
}

// TestCutRecordWithGone compares a record that says what is gone with its golden file, and one that is gone by
// halves, and refuses what no writer writes.
func TestCutRecordWithGone(t *testing.T) {
	r := sampleCut(6)
	r.Gone = sampleGone()
	b := r.Append(nil)
	file := filepath.Join("testdata", "cut-gone")
	if *update {
		if err := os.WriteFile(file, b, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(b, want) {
		t.Error("a record with what is gone is written otherwise today")
	}
	for name, g := range map[string]*Gone{
		"all": sampleGone(), "cuts": {Cuts: sampleGone().Cuts}, "segments": {Segments: sampleGone().Segments}, "none": nil,
	} {
		r.Gone = g
		if got, err := DecodeCutRecord(r.Append(nil)); err != nil || !reflect.DeepEqual(got, r) {
			t.Errorf("%s: decodes to %+v, %v", name, got, err)
		}
	}
	for name, bad := range map[string]func(g *Gone){
		"nothing":             func(g *Gone) { *g = Gone{} },
		"cut 0":               func(g *Gone) { g.Cuts[0].First = 0 },
		"checksum of cut 0":   func(g *Gone) { g.Cuts[0].PrevCRC = 1 },
		"the cut itself":      func(g *Gone) { g.Cuts[2].Last = 12 },
		"gaps that touch":     func(g *Gone) { g.Cuts[1].First = 5 },
		"gap that ends early": func(g *Gone) { g.Cuts[2].Last = 8 },
		"segment 0":           func(g *Gone) { g.Segments[0].First = 0 },
		"runs that touch":     func(g *Gone) { g.Segments[0].Last = 18 },
		"run that ends early": func(g *Gone) { g.Segments[1].Last = 18 },
		"no such segment":     func(g *Gone) { g.Segments[2].Last = block.SegmentMax },
	} {
		r.Gone = sampleGone()
		bad(r.Gone)
		if _, err := DecodeCutRecord(r.Append(nil)); !errors.Is(err, ErrDamaged) {
			t.Errorf("%s: %v", name, err)
		}
		if err := r.validate(); err == nil {
			t.Errorf("%s: would be sealed", name)
		}
	}
}

// TestGoneCuts takes cuts in, in any order, and compares with a plain set and with the checksums that they had.
func TestGoneCuts(t *testing.T) {
	rng := seeded(t)
	crc := func(cut uint64) uint32 { // of the record of the cut before
		if cut == 1 {
			return 0
		}
		return uint32(cut) * 2654435761
	}
	for range 200 {
		g, set := &Gone{}, map[uint64]bool{}
		for range rng.IntN(60) {
			cut := 1 + rng.Uint64N(40)
			set[cut] = true
			g.AddCut(cut, crc(cut))
		}
		if len(set) > 0 {
			if err := g.validate(41); err != nil {
				t.Fatal(err)
			}
		}
		for cut := uint64(0); cut < 45; cut++ {
			gap, ok := g.Cut(cut)
			first := cut
			for first > 1 && set[first-1] {
				first--
			}
			if ok != set[cut] || ok && (gap.First != first || gap.PrevCRC != crc(first) || gap.Last < cut || set[gap.Last+1]) {
				t.Fatalf("cut %d is gone %v (%v), in %+v of %+v", cut, set[cut], ok, gap, g)
			}
		}
	}
	g := sampleGone()
	for id, want := range map[block.SegmentID]bool{1: true, 17: true, 18: false, 19: true, 20: false, 1<<40 - 1: false, 1 << 40: true, block.SegmentMax - 1: true} {
		if g.Segment(id) != want {
			t.Errorf("segment %d is gone: %v", id, !want)
		}
	}
	if g = nil; g.Segment(1) {
		t.Error("nothing is gone, but segment 1 is")
	}
	if _, ok := g.Cut(1); ok {
		t.Error("nothing is gone, but cut 1 is")
	}
}

// TestReadTail reads index and record from one shard of a segment whose other shards are lost.
func TestReadTail(t *testing.T) {
	ctx := t.Context()
	s := build(t, BuildOptions{ID: 20, Epoch: 2, K: 2, M: 1}, randomExtents(seeded(t), 6, 2), sampleCut(2))
	stores := newTargets(3)
	stores.put(s)
	for shard, st := range stores {
		key := s.Info.Key(shard)
		tr, err := ReadTrailer(ctx, st, key, s.Info.ObjectBytes())
		if err != nil {
			t.Fatal(err)
		}
		x, cut, err := ReadTail(ctx, st, key, tr)
		if err != nil || !reflect.DeepEqual(cut, sampleCut(2)) || len(x.Entries) != 6 {
			t.Errorf("shard %d: %+v, %v", shard, cut, err)
		}
		stores.flip(s.Info, shard, s.Info.cutOffset()+20)
		if _, _, err := ReadTail(ctx, st, key, tr); !errors.Is(err, ErrDamaged) {
			t.Errorf("shard %d, flipped: %v", shard, err)
		}
	}
}
