package extent

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"iter"
	"maps"
	"math/rand/v2"
	"runtime"
	"slices"
	"testing"
	"time"

	"graindisk/block"
)

// model is what a usage table should say, kept the plain way: for each extent, which blocks are mapped.
type model map[block.SegmentID]*modelSegment

type modelSegment struct {
	s       Segment
	extents [][]bool
}

func (m model) add(r *rand.Rand, id block.SegmentID, extents, blocksMax int) Segment {
	x := &modelSegment{s: Segment{
		ID: id, Epoch: 1 + uint64(r.IntN(3)), K: 2, M: 1, Birth: 1000 + int64(id), Extents: uint32(extents),
		Targets: []block.TargetID{1, block.TargetID(2 * r.IntN(2)), 3},
	}}
	for range extents {
		e := make([]bool, 1+r.IntN(blocksMax))
		for i := range e {
			e[i] = true
		}
		x.extents = append(x.extents, e)
		x.s.Blocks += uint32(len(e))
	}
	m[id] = x
	return x.s
}

func count(bs []bool) (n int) {
	for _, b := range bs {
		if b {
			n++
		}
	}
	return n
}

// lose takes some blocks of a random extent away; false if it drew a dead one.
func (m model) lose(r *rand.Rand, ids []block.SegmentID) (Loss, bool) {
	x := m[ids[r.IntN(len(ids))]]
	if len(x.extents) == 0 {
		return Loss{}, false
	}
	slot := r.IntN(len(x.extents))
	e := x.extents[slot]
	from := r.IntN(len(e))
	to := from + 1 + r.IntN(len(e)-from)
	if r.IntN(3) == 0 {
		from, to = 0, len(e)
	}
	n := count(e[from:to])
	clear(e[from:to])
	return Loss{Extent: block.NewExtentID(x.s.ID, slot), Orig: uint16(len(e)), Blocks: uint16(n)}, n > 0
}

func (x *modelSegment) usage() SegmentUsage {
	u := SegmentUsage{Segment: x.s}
	for _, e := range x.extents {
		switch n := count(e); {
		case n == 0:
			u.DeadExtents++
		default:
			u.LiveBlocks += uint32(n)
			u.TrappedBlocks += uint32(len(e) - n)
		}
	}
	return u
}

func (m model) check(t *testing.T, v View) {
	t.Helper()
	var sum Totals
	var dead []block.SegmentID
	for got := range v.All() {
		x := m[got.ID]
		if x == nil {
			t.Fatalf("segment %d is in the table", got.ID)
		}
		want := x.usage()
		if fmt.Sprint(got) != fmt.Sprint(want) {
			t.Fatalf("got  %+v\nwant %+v", got, want)
		}
		sum.Segments++
		sum.Blocks += uint64(want.Blocks)
		sum.LiveBlocks += uint64(want.LiveBlocks)
		sum.TrappedBlocks += uint64(want.TrappedBlocks)
		if want.DeadExtents == want.Extents {
			sum.DeadSegments++
			dead = append(dead, got.ID)
		}
	}
	if sum.Segments != len(m) || v.Totals() != sum || !slices.Equal(v.Dead(), dead) {
		t.Fatalf("totals %+v, want %+v of %d segments; dead %v, want %v", v.Totals(), sum, len(m), v.Dead(), dead)
	}
}

// mapped is what trees would say: the mapped blocks, in pieces, some of them twice.
func (m model) mapped(r *rand.Rand) iter.Seq[Mapped] {
	return func(yield func(Mapped) bool) {
		for _, id := range slices.Sorted(maps.Keys(m)) {
			for slot, e := range m[id].extents {
				for from := 0; from < len(e); from++ {
					to := from
					for to < len(e) && e[to] && (to == from || r.IntN(8) > 0) {
						to++
					}
					p := Mapped{Extent: block.NewExtentID(id, slot), Off: uint16(from), Blocks: uint16(to - from), Orig: uint16(len(e))}
					for p.Off > 0 && to > from && e[p.Off-1] && r.IntN(4) == 0 { // overlaps the one before
						p.Off--
						p.Blocks++
					}
					for n := 1 + r.IntN(8)/7; n > 0 && to > from; n-- {
						if !yield(p) {
							return
						}
					}
					from = max(from, to-1)
				}
			}
		}
	}
}

func (m model) segments() iter.Seq[Segment] {
	return func(yield func(Segment) bool) {
		for _, x := range m {
			if !yield(x.s) {
				return
			}
		}
	}
}

func newRand(t testing.TB) *rand.Rand {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	return rand.New(rand.NewPCG(seed, 0))
}

func reload(t testing.TB, v View, size int) *Usage {
	t.Helper()
	u := NewUsage()
	for b := range v.Blobs(size) {
		if err := u.Load(b); err != nil {
			t.Fatal(err)
		}
	}
	return u
}

// TestUsageMatchesModel adds, loses, condemns and removes at random, and holds every row, the sums, older
// snapshots, what encodes and decodes, and a recount against a plain model.
func TestUsageMatchesModel(t *testing.T) {
	r := newRand(t)
	u, m := NewUsage(), model{}
	type past struct {
		v    View
		want string
	}
	var snaps []past
	var ids []block.SegmentID
	rounds := 300
	if raceEnabled {
		rounds = 100
	}
	for round := range rounds {
		for range 1 + r.IntN(8) {
			id := block.SegmentID(1 + r.IntN(1<<12))
			if m[id] != nil {
				if err := u.Add(m[id].s); !errors.Is(err, ErrDamaged) {
					t.Fatalf("added twice: %v", err)
				}
				continue
			}
			if err := u.Add(m.add(r, id, r.IntN(70), 1+r.IntN(17))); err != nil {
				t.Fatal(err)
			}
			ids = append(ids, id)
		}
		var ls []Loss
		for range r.IntN(3000) {
			if l, ok := m.lose(r, ids); ok {
				ls = append(ls, l)
			}
		}
		if err := u.Lost(ls); err != nil {
			t.Fatal(err)
		}
		for _, id := range u.Dead() {
			if r.IntN(3) > 0 {
				continue
			}
			if err := errors.Join(u.Condemn(id), u.Remove(id)); err != nil {
				t.Fatal(err)
			}
			delete(m, id)
			ids = slices.DeleteFunc(ids, func(x block.SegmentID) bool { return x == id })
		}
		m.check(t, u.Snapshot())
		if round%10 == 0 {
			v := u.Snapshot()
			snaps = append(snaps, past{v, fmt.Sprint(slices.Collect(v.All()), slices.Collect(v.Blobs(1000)))})
		}
		if round%30 == 29 {
			again := reload(t, u.Snapshot(), 1+r.IntN(5000))
			m.check(t, again.Snapshot())
			re, err := Recount(m.segments(), m.mapped(r))
			if err != nil {
				t.Fatal(err)
			}
			m.check(t, re.Snapshot())
			if rep := Compare(u.Snapshot(), re.Snapshot()); len(rep.Leaks)+len(rep.Low) > 0 {
				t.Fatalf("recount differs: %+v", rep)
			}
			if r.IntN(2) == 0 {
				u = again // go on with what was loaded
			} else {
				u = re
			}
		}
	}
	for i, s := range snaps {
		if got := fmt.Sprint(slices.Collect(s.v.All()), slices.Collect(s.v.Blobs(1000))); got != s.want {
			t.Fatalf("snapshot %d of %d has changed", i, len(snaps))
		}
	}
	t.Logf("%d segments at the end, %+v", len(m), u.Totals())
}

// TestDamageIsReportedAndNeverWraps reports losses that cannot be.
func TestDamageIsReportedAndNeverWraps(t *testing.T) {
	two := Segment{ID: 5, Epoch: 1, K: 1, Targets: []block.TargetID{1}, Extents: 2, Blocks: 20} // 16 and 4 blocks
	e0, e1 := block.NewExtentID(5, 0), block.NewExtentID(5, 1)
	for name, tt := range map[string]struct {
		before []Loss
		bad    Loss
	}{
		"more than an extent has left":        {[]Loss{{e0, 16, 10}}, Loss{e0, 16, 7}},
		"more than the extent":                {nil, Loss{e0, 16, 17}},
		"nothing":                             {nil, Loss{e0, 16, 0}},
		"an extent twice":                     {[]Loss{{e0, 16, 16}}, Loss{e0, 16, 16}},
		"an extent twice, the last":           {[]Loss{{e0, 16, 16}, {e1, 4, 4}}, Loss{e1, 4, 1}},
		"a slot that is not there":            {nil, Loss{block.NewExtentID(5, 2), 1, 1}},
		"more than the segment has":           {nil, Loss{e0, 30, 30}},
		"all blocks, with an extent alive":    {nil, Loss{e0, 20, 20}},
		"one extent with a block for another": {nil, Loss{e0, 25, 19}},
		"the last extent, too small":          {[]Loss{{e0, 16, 16}}, Loss{e1, 3, 3}},
		"a rest, with the extent grown":       {[]Loss{{e0, 16, 12}}, Loss{e0, 19, 4}},
		"a rest, with the extent shrunk":      {[]Loss{{e0, 16, 12}}, Loss{e0, 4, 4}},
	} {
		t.Run(name, func(t *testing.T) {
			u := NewUsage()
			if err := errors.Join(u.Add(two), u.Lost(tt.before)); err != nil {
				t.Fatal(err)
			}
			before, _ := u.Segment(5)
			if err := u.Lost([]Loss{tt.bad}); !errors.Is(err, ErrDamaged) {
				t.Fatalf("the loss %+v: %v", tt.bad, err)
			}
			after, _ := u.Segment(5)
			before.Damaged = true
			if fmt.Sprint(after) != fmt.Sprint(before) {
				t.Errorf("the counts went from %+v to %+v", before, after)
			}
			if err := u.Lost([]Loss{tt.bad}); err != nil {
				t.Errorf("said twice: %v", err)
			}
			u.Lost([]Loss{{e0, 16, 16}, {e1, 4, 4}}) // what of it is possible
			if len(u.Dead()) > 0 || u.Condemn(5) == nil || u.Totals().Damaged != 1 || u.Totals().DeadSegments != 0 {
				t.Error("a damaged segment may be deleted")
			}
			if got := u.Snapshot().Candidates(1, 9); len(got) > 0 {
				t.Errorf("a damaged segment is a candidate: %v", got)
			}
			reload(t, u.Snapshot(), 1)
		})
	}
	if err := NewUsage().Lost([]Loss{{e0, 1, 1}}); !errors.Is(err, ErrDamaged) {
		t.Errorf("a segment that is not there: %v", err)
	}
}

func TestCondemnedOnlyWhenDeadAndRemovedOnlyWhenCondemned(t *testing.T) {
	u := NewUsage()
	if err := u.Add(Segment{ID: 5, K: 1, Targets: []block.TargetID{1}, Extents: 1, Blocks: 2}); err != nil {
		t.Fatal(err)
	}
	for _, l := range []uint16{1, 1} {
		if err := errors.Join(u.Condemn(5), u.Remove(5)); !errors.Is(err, ErrInUse) || u.Totals().Segments != 1 {
			t.Fatalf("%d blocks to go: %v", l, err)
		}
		if err := u.Lost([]Loss{{block.NewExtentID(5, 0), 2, l}}); err != nil {
			t.Fatal(err)
		}
	}
	if err := u.Remove(5); !errors.Is(err, ErrInUse) {
		t.Fatalf("removed without being condemned: %v", err)
	}
	if err := errors.Join(u.Condemn(5), u.Remove(5)); err != nil || u.Totals() != (Totals{}) {
		t.Errorf("%v, %+v", err, u.Totals())
	}
	if !errors.Is(u.Remove(5), ErrInUse) {
		t.Error("removed twice")
	}
}

// TestCandidates expects the order of (1-u)*age/(1+u), with trapped blocks counted as space to gain.
func TestCandidates(t *testing.T) {
	r := newRand(t)
	u, m := NewUsage(), model{}
	var ids []block.SegmentID
	for id := range block.SegmentID(2000) {
		ids = append(ids, id+1)
		if err := u.Add(m.add(r, id+1, 1+r.IntN(20), 16)); err != nil {
			t.Fatal(err)
		}
	}
	for range 40_000 {
		if l, ok := m.lose(r, ids); ok {
			if err := u.Lost([]Loss{l}); err != nil {
				t.Fatal(err)
			}
		}
	}
	const now = 5000
	score := func(s SegmentUsage) float64 {
		used := float64(s.LiveBlocks) / float64(s.Blocks)
		return (1 - used) * float64(now-s.Birth) / (1 + used)
	}
	var want []SegmentUsage
	for _, x := range m {
		if s := x.usage(); s.LiveBlocks > 0 && s.LiveBlocks < s.Blocks {
			want = append(want, s)
		}
	}
	slices.SortFunc(want, func(a, b SegmentUsage) int {
		return cmp.Or(cmp.Compare(score(b), score(a)), cmp.Compare(a.ID, b.ID))
	})
	for _, n := range []int{0, 1, 50, len(want), 5000} {
		got := u.Snapshot().Candidates(now, n)
		if len(got) != min(n, len(want)) {
			t.Fatalf("%d candidates of %d, want %d", len(got), len(want), n)
		}
		for i, c := range got {
			if c.Segment != want[i].ID || c.Score != score(want[i]) {
				t.Fatalf("candidate %d of %d is %+v, want segment %d with %v", i, n, c, want[i].ID, score(want[i]))
			}
		}
	}
}

func TestRecountRefusesWhatIsNotStored(t *testing.T) {
	m := model{}
	m[5] = &modelSegment{s: Segment{ID: 5, K: 1, Targets: []block.TargetID{1}, Extents: 2, Blocks: 20}}
	for name, ms := range map[string][]Mapped{
		"another segment":              {{block.NewExtentID(6, 0), 0, 1, 1}},
		"a slot too high":              {{block.NewExtentID(5, 2), 0, 1, 1}},
		"blocks behind the extent":     {{block.NewExtentID(5, 0), 10, 7, 16}},
		"no blocks":                    {{block.NewExtentID(5, 0), 10, 0, 16}},
		"two sizes of one extent":      {{block.NewExtentID(5, 0), 0, 1, 16}, {block.NewExtentID(5, 0), 4, 1, 15}},
		"more than the segment has":    {{block.NewExtentID(5, 0), 0, 16, 16}, {block.NewExtentID(5, 1), 0, 16, 16}},
		"all extents and not the sum":  {{block.NewExtentID(5, 0), 0, 16, 16}, {block.NewExtentID(5, 1), 0, 3, 3}},
		"partly more than the segment": {{block.NewExtentID(5, 0), 0, 16, 16}, {block.NewExtentID(5, 1), 0, 3, 5}},
	} {
		if _, err := Recount(m.segments(), slices.Values(ms)); !errors.Is(err, ErrDamaged) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestCompareTellsLeaksFromLosses turns one count after the other.
func TestCompareTellsLeaksFromLosses(t *testing.T) {
	seg := Segment{ID: 5, K: 1, Targets: []block.TargetID{1}, Extents: 3, Blocks: 24}
	build := func(ls ...Loss) View {
		u := NewUsage()
		if err := errors.Join(u.Add(seg), u.Lost(ls)); err != nil {
			t.Fatal(err)
		}
		return u.Snapshot()
	}
	id := func(slot int) block.ExtentID { return block.NewExtentID(5, slot) }
	full, part, more, dead := build(), build(Loss{id(1), 8, 3}), build(Loss{id(1), 8, 4}), build(Loss{id(1), 8, 8})
	other := build(Loss{id(2), 8, 3})
	none := NewUsage().Snapshot()
	for _, tt := range []struct {
		name           string
		table, recount View
		leaks, low     int
	}{
		{"equal", part, part, 0, 0},
		{"whole, partly mapped", full, part, 1, 0},
		{"partly mapped, less so", part, more, 1, 0},
		{"partly mapped, dead", part, dead, 1, 0},
		{"whole, dead", full, dead, 1, 0},
		{"one leak cannot hide one loss", part, other, 0, 1},
		{"dead, mapped", dead, part, 0, 1},
		{"less, more", more, part, 0, 1},
		{"partly, wholly mapped", part, full, 0, 1},
		{"a segment too many", full, none, 1, 0},
		{"a segment too few", none, full, 0, 1},
	} {
		rep := Compare(tt.table, tt.recount)
		if len(rep.Leaks) != tt.leaks || len(rep.Low) != tt.low {
			t.Errorf("%s: %+v", tt.name, rep)
		}
		for _, d := range append(rep.Leaks, rep.Low...) {
			if d.Segment != 5 || d.String() == "" {
				t.Errorf("%s: %v", tt.name, d)
			}
		}
	}
}

func heap() uint64 {
	runtime.GC()
	runtime.GC()
	var s runtime.MemStats
	runtime.ReadMemStats(&s)
	return s.HeapAlloc
}

// TestUsageMemory measures the table on the heap: segments of 32 MiB in extents of 64 KiB and of 4 KiB.
func TestUsageMemory(t *testing.T) {
	for _, tt := range []struct {
		name                      string
		segments, extents, blocks int
		lose                      func(slot int) (blocks int)
		most                      float64
	}{
		{"64 KiB extents, everything alive", 5000, 512, 16, func(int) int { return 0 }, 128},
		{"64 KiB extents, every other dead", 2000, 512, 16, func(s int) int { return s % 2 * 16 }, 320},
		{"64 KiB extents, all partly mapped", 1000, 512, 16, func(int) int { return 5 }, 3 << 10},
		{"4 KiB extents, everything alive", 2000, 8192, 1, func(int) int { return 0 }, 128},
		{"4 KiB extents, every other dead", 500, 8192, 1, func(s int) int { return s % 2 }, 10 << 10},
		{"8 KiB extents, all partly mapped", 100, 4096, 2, func(int) int { return 1 }, 24 << 10},
		{"everything dead", 1000, 512, 16, func(int) int { return 16 }, 128},
	} {
		before := heap()
		u := NewUsage()
		for id := range tt.segments {
			s := Segment{ID: block.SegmentID(id + 1), Epoch: 1, K: 4, M: 2, Extents: uint32(tt.extents), Blocks: uint32(tt.extents * tt.blocks)}
			for i := range 6 {
				s.Targets = append(s.Targets, block.TargetID((i+id)%6+1))
			}
			if err := u.Add(s); err != nil {
				t.Fatal(err)
			}
			var ls []Loss
			for slot := range tt.extents {
				if n := tt.lose(slot); n > 0 {
					ls = append(ls, Loss{block.NewExtentID(s.ID, slot), uint16(tt.blocks), uint16(n)})
				}
			}
			if err := u.Lost(ls); err != nil {
				t.Fatal(err)
			}
		}
		each := float64(heap()-before) / float64(tt.segments)
		stored := 0
		for b := range u.Snapshot().Blobs(1 << 20) {
			stored += len(b)
		}
		t.Logf("COUNT %s: %.0f bytes of memory per segment, %.1f stored", tt.name, each, float64(stored)/float64(tt.segments))
		if each > tt.most {
			t.Errorf("%s: %.0f bytes per segment, at most %.0f are allowed", tt.name, each, tt.most)
		}
		runtime.KeepAlive(u)
	}
}

func TestLoadRefusesDamage(t *testing.T) {
	r := newRand(t)
	u, m := NewUsage(), model{}
	var ids []block.SegmentID
	for id := range block.SegmentID(5) {
		ids = append(ids, id+1)
		if err := u.Add(m.add(r, id+1, 1+r.IntN(20), 16)); err != nil {
			t.Fatal(err)
		}
	}
	for range 40 {
		if l, ok := m.lose(r, ids); ok {
			if err := u.Lost([]Loss{l}); err != nil {
				t.Fatal(err)
			}
		}
	}
	b := slices.Collect(u.Snapshot().Blobs(1 << 20))[0]
	for i := range b {
		bad := bytes.Clone(b)
		bad[i] ^= 1 << (i % 8)
		if err := NewUsage().Load(bad); !errors.Is(err, ErrDamaged) && !errors.Is(err, ErrNewer) {
			t.Errorf("a flipped bit in byte %d: %v", i, err)
		}
		if err := NewUsage().Load(b[:i]); !errors.Is(err, ErrDamaged) {
			t.Errorf("cut at %d: %v", i, err)
		}
	}
	v := NewUsage()
	if err := v.Load(b); err != nil {
		t.Fatal(err)
	}
	if err := v.Load(b); !errors.Is(err, ErrDamaged) {
		t.Errorf("the same segments twice: %v", err)
	}
	newer := bytes.Clone(b)
	newer[offVersion]++
	if err := NewUsage().Load(newer); !errors.Is(err, ErrNewer) {
		t.Errorf("a newer version: %v", err)
	}
	if n, err := BlobLen(append(bytes.Clone(b), 1, 2, 3)); n != len(b) || err != nil {
		t.Errorf("length %d, want %d: %v", n, len(b), err)
	}
}

// reseal makes the checksum and the length of a blob right again.
func reseal(b []byte) []byte {
	if len(b) < headerLen+crcLen {
		return b
	}
	b = bytes.Clone(b)
	binary.LittleEndian.PutUint32(b[offBody:], uint32(len(b)-headerLen-crcLen))
	all := b[:len(b)-crcLen]
	return binary.LittleEndian.AppendUint32(all, block.CRC(all))
}

func BenchmarkLost(b *testing.B) {
	const segments, extents = 10_000, 512
	r := rand.New(rand.NewPCG(1, 1))
	var u *Usage
	var order []Loss
	for b.Loop() {
		if len(order) == 0 {
			b.StopTimer()
			u = NewUsage()
			for id := range block.SegmentID(segments) {
				if err := u.Add(Segment{ID: id + 1, K: 1, Targets: []block.TargetID{1}, Extents: extents, Blocks: extents * 16}); err != nil {
					b.Fatal(err)
				}
				for slot := range extents {
					order = append(order, Loss{block.NewExtentID(id+1, slot), 16, 16})
				}
			}
			r.Shuffle(len(order), func(i, j int) { order[i], order[j] = order[j], order[i] })
			b.StartTimer()
		}
		if err := u.Lost(order[:1]); err != nil {
			b.Fatal(err)
		}
		order = order[1:]
	}
}

// BenchmarkCheckpoint is for 1 TiB in extents of 64 KiB, half of them overwritten in part: one operation
// is the whole table.
func BenchmarkCheckpoint(b *testing.B) {
	const segments, extents = 32_768, 512
	u := NewUsage()
	var ls []Loss
	for id := range block.SegmentID(segments) {
		if err := u.Add(Segment{ID: id + 1, K: 1, Targets: []block.TargetID{1}, Extents: extents, Blocks: extents * 16}); err != nil {
			b.Fatal(err)
		}
		ls = ls[:0]
		for slot := 0; slot < extents; slot += 2 {
			ls = append(ls, Loss{block.NewExtentID(id+1, slot), 16, 5})
		}
		if err := u.Lost(ls); err != nil {
			b.Fatal(err)
		}
	}
	b.Run("snapshot", func(b *testing.B) {
		for b.Loop() {
			u.Snapshot()
		}
	})
	v := u.Snapshot()
	b.Run("encode", func(b *testing.B) {
		for b.Loop() {
			n := 0
			for blob := range v.Blobs(1 << 20) {
				n += len(blob)
			}
			b.SetBytes(int64(n))
		}
	})
	blobs := slices.Collect(v.Blobs(1 << 20))
	b.Run("load", func(b *testing.B) {
		for b.Loop() {
			u := NewUsage()
			for _, blob := range blobs {
				if err := u.Load(blob); err != nil {
					b.Fatal(err)
				}
			}
		}
	})
	b.Run("recount", func(b *testing.B) {
		mapped := func(yield func(Mapped) bool) {
			for id := range block.SegmentID(segments) {
				for slot := range extents {
					if !yield(Mapped{block.NewExtentID(id+1, slot), 0, 16 - uint16((slot+1)%2*5), 16}) {
						return
					}
				}
			}
		}
		segs := func(yield func(Segment) bool) {
			for s := range v.All() {
				if !yield(s.Segment) {
					return
				}
			}
		}
		for b.Loop() {
			re, err := Recount(segs, mapped)
			if err != nil {
				b.Fatal(err)
			}
			if rep := Compare(v, re.Snapshot()); len(rep.Leaks)+len(rep.Low) > 0 {
				b.Fatal(rep)
			}
		}
	})
}

// TestLoseTellsWhatDied loses extents piece by piece: each is named once, with the loss of its last block,
// and what is refused kills nothing.
func TestLoseTellsWhatDied(t *testing.T) {
	u := NewUsage()
	e := func(i int) block.ExtentID { return block.NewExtentID(1, i) }
	if err := u.Add(Segment{ID: 1, Epoch: 1, K: 1, Targets: []block.TargetID{1}, Extents: 3, Blocks: 21}); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		ls   []Loss
		want []Loss
		bad  bool
	}{
		{ls: []Loss{{e(0), 16, 10}, {e(1), 4, 1}}},
		{ls: []Loss{{e(0), 16, 6}, {e(1), 4, 2}}, want: []Loss{{e(0), 16, 6}}},
		{ls: []Loss{{e(0), 16, 1}, {e(2), 1, 1}}, want: []Loss{{e(2), 1, 1}}, bad: true},
		{ls: []Loss{{e(1), 4, 1}, {e(1), 4, 1}}, want: []Loss{{e(1), 4, 1}}},
	} {
		got, err := u.Lose(c.ls)
		if !slices.Equal(got, c.want) || (err != nil) != c.bad {
			t.Errorf("lost %v: %v died, %v; want %v", c.ls, got, err, c.want)
		}
		for _, l := range got {
			if u.Alive(l.Extent) {
				t.Errorf("extent %v is told dead and counts as alive", l.Extent)
			}
		}
	}
}
