package extent

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"sync"
	"testing"

	"graindisk/block"
)

// memStorage keeps runs in memory; fail, if not nil, is asked before each call.
type memStorage struct {
	mu   sync.Mutex
	runs map[uint64][]byte
	fail func() error
}

func newMemStorage() *memStorage { return &memStorage{runs: map[uint64][]byte{}} }

func (m *memStorage) check() error {
	if m.fail == nil {
		return nil
	}
	return m.fail()
}

type memWriter struct {
	m  *memStorage
	id uint64
	b  bytes.Buffer
}

func (w *memWriter) Write(p []byte) (int, error) {
	if err := w.m.check(); err != nil {
		return 0, err
	}
	return w.b.Write(p)
}

func (w *memWriter) Close() error {
	w.m.mu.Lock()
	defer w.m.mu.Unlock()
	w.m.runs[w.id] = w.b.Bytes()
	return w.m.check()
}

func (m *memStorage) Create(id uint64) (io.WriteCloser, error) {
	return &memWriter{m: m, id: id}, m.check()
}

func (m *memStorage) Size(id uint64) (int64, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.runs[id] == nil {
		return 0, fmt.Errorf("no run %d", id)
	}
	return int64(len(m.runs[id])), m.check()
}

func (m *memStorage) ReadAt(id uint64, p []byte, off int64) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.check(); err != nil {
		return err
	}
	_, err := bytes.NewReader(m.runs[id]).ReadAt(p, off)
	return err
}

// aliveUsage has segments from 1 on with all of their extents alive.
func aliveUsage(t testing.TB, segments, extents int) *Usage {
	u := NewUsage()
	for id := range block.SegmentID(segments) {
		if err := u.Add(Segment{ID: id + 1, K: 1, Targets: []block.TargetID{1}, Extents: uint32(extents), Blocks: uint32(extents)}); err != nil {
			t.Fatal(err)
		}
	}
	return u
}

// excWorld is a table of exceptions with its usage table, its storage and a plain model.
type excWorld struct {
	t       *testing.T
	r       *rand.Rand
	u       *Usage
	e       *Exceptions
	storage *memStorage
	names   []block.ExtentID // may have several entries of the same name, so that some are hot
	model   map[block.ExtentID]State
	dead    map[block.ExtentID]bool
	log     []Record // since the last checkpoint, kept by restart
}

func (w *excWorld) state(n block.ExtentID) State {
	if s, ok := w.model[n]; ok {
		return s
	}
	return plain
}

func (w *excWorld) set(n block.ExtentID, s State) {
	if s == plain {
		delete(w.model, n)
	} else {
		w.model[n] = s
	}
}

// expect compares records with the changes the model makes, in order.
func (w *excWorld) expect(recs []Record, err error, want ...Record) {
	w.t.Helper()
	if err != nil || !slices.Equal(recs, want) {
		w.t.Fatalf("%v, %v; want %v", recs, err, want)
	}
	for _, r := range want {
		if r.New.Refs == 0 {
			w.dead[r.Name] = true
			w.set(r.Name, plain)
		} else {
			w.set(r.Name, r.New)
		}
	}
	w.log = append(w.log, recs...)
}

func (w *excWorld) refuse(err, want error) {
	w.t.Helper()
	if !errors.Is(err, want) {
		w.t.Fatalf("%v, want %v", err, want)
	}
}

func (w *excWorld) draw() block.ExtentID {
	for {
		n := w.names[w.r.IntN(len(w.names))]
		if w.r.IntN(3) == 0 {
			n = w.names[w.r.IntN(len(w.names)/50+1)] // hot ones
		}
		if !w.dead[n] {
			return n
		}
	}
}

func (w *excWorld) step() {
	n := w.draw()
	s := w.state(n)
	switch k := w.r.IntN(100); {
	case k < 55:
		add := int64(1 + w.r.IntN(3)*w.r.IntN(40))
		to := s
		to.Refs += add
		recs, err := w.e.Ref(n, add)
		w.expect(recs, err, Record{n, s, to})
	case k < 88:
		take := min(s.Refs, int64(1+w.r.IntN(3)*w.r.IntN(40)))
		if take == s.Refs && w.r.IntN(50) > 0 {
			take-- // few die
		}
		to := s
		to.Refs -= take
		want := []Record{{n, s, to}}
		if to.Refs == 0 {
			want[0].New = State{}
			if s.Kind == Same {
				c := w.state(s.To)
				less := c
				if less.Refs--; less.Refs == 0 {
					less = State{}
				}
				want = append(want, Record{s.To, c, less})
			}
		}
		if take == 0 {
			return
		}
		recs, err := w.e.Ref(n, -take)
		w.expect(recs, err, want...)
	case k < 90:
		_, err := w.e.Ref(n, -s.Refs-1)
		w.refuse(err, ErrDamaged)
	case k < 95:
		place := block.NewExtentID(block.SegmentID(1+w.r.IntN(50)), 99)
		rec, err := w.e.Move(n, s, place)
		if s.Kind == Same {
			w.refuse(err, ErrConflict)
			return
		}
		to := s
		to.Kind, to.To = Moved, place
		w.expect([]Record{rec}, err, Record{n, s, to})
		if s.To != place {
			_, err = w.e.Move(n, s, place) // it has moved since it was seen
			w.refuse(err, ErrConflict)
		}
	default:
		c := w.draw()
		cs := w.state(c)
		recs, err := w.e.Same(n, c, s, cs)
		if n == c || s.Kind == Same || s.Canonical || cs.Kind == Same {
			w.refuse(err, ErrConflict)
			return
		}
		to, more := s, cs
		to.Kind, to.To = Same, c
		more.Canonical = true
		more.Refs++
		w.expect(recs, err, Record{c, cs, more}, Record{n, s, to})
	}
}

func (w *excWorld) check() {
	w.t.Helper()
	for _, n := range w.names {
		got, err := w.e.Get(n)
		if want := w.state(n); err != nil || got != want {
			w.t.Fatalf("extent %v is %+v, %v; want %+v", n, got, err, want)
		}
		want, s := n, w.state(n)
		if s.Kind == Same {
			want, s = s.To, w.state(s.To)
		}
		if s.Kind == Moved {
			want = s.To
		}
		if place, err := w.e.Resolve(n); err != nil || place != want {
			w.t.Fatalf("extent %v is at %v, %v; want %v", n, place, err, want)
		}
	}
}

// restart loads a checkpoint, with a usage table of before or after it, and replays the log from a point
// before it, some of it twice.
func (w *excWorld) restart() {
	w.t.Helper()
	var saved bytes.Buffer
	early := w.r.IntN(2) == 0
	usage := slices.Collect(w.u.Snapshot().Blobs(1000))
	runs, err := w.e.Save(&saved)
	if err != nil {
		w.t.Fatal(err)
	}
	for range w.r.IntN(2000) {
		w.step()
	}
	if !early {
		usage = slices.Collect(w.u.Snapshot().Blobs(1000))
	}
	w.u = NewUsage()
	for _, b := range usage {
		if err := w.u.Load(b); err != nil {
			w.t.Fatal(err)
		}
	}
	w.e = NewExceptions(w.u, w.storage)
	if err := w.e.Load(saved.Bytes(), runs); err != nil {
		w.t.Fatal(err)
	}
	for range 1 + w.r.IntN(2) {
		for _, rec := range w.log {
			b := rec.Append(nil)
			rec, rest, err := DecodeRecord(b)
			if err != nil || len(rest) > 0 {
				w.t.Fatal(err)
			}
			if err := w.e.Apply(rec); err != nil {
				w.t.Fatal(err)
			}
		}
	}
	w.log = nil
	w.check()
}

// TestExceptionsMatchModel runs random references, moves and dedups against a map, over spills, merges,
// restarts and replays: exact at every step.
func TestExceptionsMatchModel(t *testing.T) {
	const segments, extents = 200, 100
	steps := 500_000
	switch {
	case os.Getenv("GRAINDISK_SOAK") != "":
		steps = 10_000_000
	case raceEnabled:
		steps = 30_000
	}
	w := &excWorld{t: t, r: newRand(t), storage: newMemStorage(), model: map[block.ExtentID]State{}, dead: map[block.ExtentID]bool{}}
	w.u = aliveUsage(t, segments, extents)
	w.e = NewExceptions(w.u, w.storage)
	for s := range segments {
		for i := range extents - 1 { // the last slot is where others move to
			w.names = append(w.names, block.NewExtentID(block.SegmentID(s+1), i))
		}
	}
	w.r.Shuffle(len(w.names), func(i, j int) { w.names[i], w.names[j] = w.names[j], w.names[i] })
	spills, restarts, merges, overflows := 0, 0, 0, uint64(0)
	for i := range steps {
		w.step()
		switch {
		case w.r.IntN(min(steps/100, 5000)) == 0:
			before := w.e.Stats().Runs
			if err := w.e.Spill(); err != nil {
				t.Fatal(err)
			}
			spills++
			if w.e.Stats().Runs < before {
				merges++
			}
		case i%min(steps/8, 50_000) == 1:
			overflows += w.e.Stats().OverflowUpdates
			w.restart()
			restarts++
		}
		if i%(steps/4) == 0 {
			w.check()
		}
	}
	w.check()
	st := w.e.Stats()
	t.Logf("COUNT %d steps, %d spills, %d merges, %d restarts; %d names are exceptions, %d dead; %+v, %d overflow updates before",
		steps, spills, merges, restarts, len(w.model), len(w.dead), st, overflows)
	if merges == 0 || restarts == 0 || st.OverflowUpdates+overflows == 0 || len(w.dead) == 0 || st.Spilled == 0 {
		t.Error("the steps do not reach what they are for")
	}
}

// TestFailedSpillChangesNothing fails each call of a spill in turn.
func TestFailedSpillChangesNothing(t *testing.T) {
	storage := newMemStorage()
	e := NewExceptions(aliveUsage(t, 10, 200), storage)
	want := map[block.ExtentID]State{}
	add := func(n int64) {
		for i := range 2000 {
			name := block.NewExtentID(block.SegmentID(1+i/200), i%200)
			if i%3 == 0 {
				if _, err := e.Ref(name, n); err != nil {
					t.Fatal(err)
				}
				want[name], _ = e.Get(name)
			}
		}
	}
	check := func() {
		t.Helper()
		for n, s := range want {
			if got, err := e.Get(n); err != nil || got != s {
				t.Fatalf("extent %v is %+v, %v; want %+v", n, got, err, s)
			}
		}
	}
	boom := errors.New("boom")
	failed := 0
	for round := range 12 {
		add(int64(1 + round*20))
		if err := e.Spill(); err != nil { // now all are cold
			t.Fatal(err)
		}
		for at := 0; ; at++ {
			n := 0
			storage.fail = func() error {
				if n++; n == at+1 {
					return boom
				}
				return nil
			}
			before := e.Stats()
			err := e.Spill()
			storage.fail = nil
			if err == nil {
				break
			}
			failed++
			after := e.Stats()
			if !errors.Is(err, boom) || before.Entries > 0 && after.Entries == 0 && after.Runs == 0 {
				t.Fatalf("%v: from %+v to %+v", err, before, after)
			}
			check()
			if err := e.Spill(); err != nil && !errors.Is(err, boom) {
				t.Fatal(err)
			}
		}
		check()
	}
	if failed < 12 {
		t.Errorf("%d spills failed", failed)
	}
}

// TestChangesDuringSpill changes entries that are just being spilled: the change is not lost.
func TestChangesDuringSpill(t *testing.T) {
	storage := newMemStorage()
	e := NewExceptions(aliveUsage(t, 1, 300), storage)
	for i := range 300 {
		if _, err := e.Ref(block.NewExtentID(1, i), 1); err != nil {
			t.Fatal(err)
		}
	}
	if err := e.Spill(); err != nil {
		t.Fatal(err)
	}
	next := 0
	storage.fail = func() error {
		if next < 300 {
			_, err := e.Ref(block.NewExtentID(1, next), 100)
			next += 3
			return err
		}
		return nil
	}
	if err := e.Spill(); err != nil || next < 9 {
		t.Fatal(err, next)
	}
	storage.fail = nil
	for i := range 300 {
		want := int64(2)
		if i < next && i%3 == 0 {
			want = 102
		}
		if s, err := e.Get(block.NewExtentID(1, i)); err != nil || s.Refs != want {
			t.Errorf("extent %d has %d references, %v; want %d", i, s.Refs, err, want)
		}
	}
}

// TestMergeLeavesOutWhatSaysNothing spills entries and the ends of some of them, and expects the merged
// run to hold the others alone.
func TestMergeLeavesOutWhatSaysNothing(t *testing.T) {
	e := NewExceptions(aliveUsage(t, 2, 300), newMemStorage())
	spill := func(segment block.SegmentID, by int64, runs int, spilled uint64) {
		t.Helper()
		for i := range 300 {
			if _, err := e.Ref(block.NewExtentID(segment, i), by); err != nil {
				t.Fatal(err)
			}
		}
		if err := errors.Join(e.Spill(), e.Spill()); err != nil {
			t.Fatal(err)
		}
		if st := e.Stats(); st.Runs != runs || st.Spilled != spilled || st.Entries != 0 {
			t.Fatalf("%d runs with %d entries are expected, it is %+v", runs, spilled, st)
		}
	}
	spill(2, 1, 1, 300)
	spill(1, 1, 2, 600)
	spill(1, -1, 3, 900)
	spill(1, 1, 4, 1200)
	spill(1, -1, 1, 300)
	for i := range 300 {
		a, err := e.Get(block.NewExtentID(1, i))
		b, err2 := e.Get(block.NewExtentID(2, i))
		if a != plain || b.Refs != 2 || errors.Join(err, err2) != nil {
			t.Errorf("extent %d is %+v and %+v, %v, %v", i, a, b, err, err2)
		}
	}
	spill(2, -1, 2, 600)
	for want := 3; want <= 4; want++ {
		spill(1, 1, want, uint64(want)*300)
	}
	spill(1, -2, 0, 0)
}

// TestDamagedRunIsAnError flips every bit of a run's file in turn: what is read is right, or an error.
func TestDamagedRunIsAnError(t *testing.T) {
	storage := newMemStorage()
	u := aliveUsage(t, 3, 50)
	e := NewExceptions(u, storage)
	for i := range 20 {
		if _, err := e.Ref(block.NewExtentID(2, i*2), int64(i*i+1)); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(e.Spill(), e.Spill()); err != nil || e.Stats().Entries != 0 || e.Stats().Spilled != 20 {
		t.Fatalf("%v %+v", err, e.Stats())
	}
	var saved bytes.Buffer
	runs, err := e.Save(&saved)
	if err != nil || len(runs) != 1 {
		t.Fatal(runs, err)
	}
	good := storage.runs[runs[0]]
	for i := range good {
		storage.runs[runs[0]] = bytes.Clone(good)
		storage.runs[runs[0]][i] ^= 1 << (i % 8)
		f := NewExceptions(u, storage)
		err := f.Load(saved.Bytes(), runs)
		for s := 0; err == nil && s < 40; s += 2 {
			_, err = f.Get(block.NewExtentID(2, s))
		}
		if !errors.Is(err, ErrDamaged) && !errors.Is(err, ErrNewer) {
			t.Errorf("a flipped bit in byte %d of %d: %v", i, len(good), err)
		}
	}
	for i := range saved.Len() {
		bad := bytes.Clone(saved.Bytes())
		bad[i] ^= 1 << (i % 8)
		if err := NewExceptions(u, storage).Load(bad, nil); !errors.Is(err, ErrDamaged) && !errors.Is(err, ErrNewer) {
			t.Errorf("a flipped bit in byte %d of what was saved: %v", i, err)
		}
	}
}

// TestDeadExtentsTakeNoExceptions condemns one of two segments: nothing may come to point into it.
func TestDeadExtentsTakeNoExceptions(t *testing.T) {
	u := aliveUsage(t, 3, 1)
	e := NewExceptions(u, nil)
	a, b, c := block.NewExtentID(1, 0), block.NewExtentID(2, 0), block.NewExtentID(3, 0)
	if err := errors.Join(u.Lost([]Loss{{b, 1, 1}}), u.Condemn(2)); err != nil {
		t.Fatal(err)
	}
	refused := func(what string, err error) {
		t.Helper()
		if !errors.Is(err, ErrConflict) {
			t.Errorf("%s: %v", what, err)
		}
	}
	_, err := e.Move(a, plain, b)
	refused("moved into it", err)
	_, err = e.Move(b, plain, a)
	refused("moved out of it", err)
	_, err = e.Same(a, b, plain, plain)
	refused("same as one in it", err)
	_, err = e.Same(b, a, plain, plain)
	refused("one in it the same", err)
	_, err = e.Ref(b, 1)
	refused("a reference to it", err)
	if st := e.Stats(); st.Entries != 0 {
		t.Errorf("%+v", st)
	}
	if _, err := e.Same(a, c, plain, plain); err != nil {
		t.Error(err)
	}
	if place, err := e.Resolve(a); place != c || err != nil {
		t.Errorf("resolves to %v, %v", place, err)
	}
}

// TestCountsOutliveTheSegment moves a name with a large count away and removes the segment it was born in.
func TestCountsOutliveTheSegment(t *testing.T) {
	u := aliveUsage(t, 2, 2)
	e := NewExceptions(u, nil)
	a, to := block.NewExtentID(1, 0), block.NewExtentID(2, 1)
	_, err := e.Ref(a, 1000)
	if err == nil {
		_, err = e.Move(a, State{}, to)
	}
	if err = errors.Join(err, u.Lost([]Loss{{a, 1, 1}, {block.NewExtentID(1, 1), 1, 1}}), u.Condemn(1)); err != nil {
		t.Fatal(err)
	}
	if err := u.Remove(1); !errors.Is(err, ErrInUse) {
		t.Fatalf("removed with its counts: %v", err)
	}
	e.Leave(1)
	if err := u.Remove(1); err != nil {
		t.Fatal(err)
	}
	want := State{Kind: Moved, To: to, Refs: 1001}
	for range 2 {
		got, err := e.Get(a)
		if place, perr := e.Resolve(a); got != want || place != to || errors.Join(err, perr) != nil {
			t.Fatalf("%+v at %v, %v %v", got, place, err, perr)
		}
		var saved bytes.Buffer
		if _, err := e.Save(&saved); err != nil {
			t.Fatal(err)
		}
		e = NewExceptions(u, nil)
		if err := e.Load(saved.Bytes(), nil); err != nil {
			t.Fatal(err)
		}
	}
	if recs, err := e.Ref(a, -1001); err != nil || recs[0].New.Refs != 0 || e.Stats().Entries != 0 || len(e.orphans) > 0 {
		t.Errorf("%+v, %v, %+v, %v", recs, err, e.Stats(), e.orphans)
	}
}

// TestCuckooHoldsItsLoad fills one shard to its load without growing it, and finds everything.
func TestCuckooHoldsItsLoad(t *testing.T) {
	r := newRand(t)
	for _, buckets := range []uint64{2, 16, 1000, 20_000} {
		var s shard
		s.resize(buckets)
		have := map[uint64]uint64{}
		for uint64(len(have)+1)*100 <= buckets*bucketSlots*loadMax {
			n := uint64(block.NewExtentID(block.SegmentID(1+r.Uint64N(1<<30)), r.IntN(512)))
			if _, ok := have[n]; ok {
				continue
			}
			have[n] = r.Uint64()
			s.insert(slot{key: n, val: have[n]})
		}
		if s.buckets != buckets && buckets > 16 {
			t.Errorf("%d buckets became %d at %d entries", buckets, s.buckets, len(have))
		}
		for n, v := range have {
			if i := s.find(n, mix(n)); i < 0 || s.get(i).val != v {
				t.Fatalf("%x is at %d", n, i)
			}
		}
		t.Logf("%d entries in %d slots, %d in the stash", s.n, buckets*bucketSlots, s.stashed)
		for _, n := range slices.Sorted(maps.Keys(have)) {
			s.remove(s.find(n, mix(n)))
			delete(have, n)
			if r.IntN(max(1, len(have)/20)) == 0 {
				for n, v := range have {
					if i := s.find(n, mix(n)); i < 0 || s.get(i).val != v {
						t.Fatalf("%x is at %d after removals", n, i)
					}
				}
			}
		}
		if s.n != 0 || s.stashed != 0 || s.buckets > bucketsMin {
			t.Errorf("empty, it has %d entries, %d in the stash, %d buckets", s.n, s.stashed, s.buckets)
		}
	}
}

// TestStash fills two buckets and the stash behind them.
func TestStash(t *testing.T) {
	var s shard
	s.resize(2) // both buckets are everyone's
	for n := uint64(1); n <= 16; n++ {
		if !s.place(slot{key: n << 16, val: n}) {
			t.Fatalf("no room for %d", n)
		}
		s.n++
	}
	if s.place(slot{key: 17 << 16}) || s.stashed != 8 {
		t.Fatalf("%d in the stash", s.stashed)
	}
	for n := uint64(16); n >= 1; n-- {
		i := s.find(n<<16, mix(n<<16))
		if i < 0 || s.get(i).val != n {
			t.Fatalf("%d is at %d", n, i)
		}
		s.remove(i)
	}
	if s.n != 0 || s.stashed != 0 {
		t.Errorf("%+v", s)
	}
}

// TestLookupsDuringChanges is for the race detector: readers against one committer and a spiller.
func TestLookupsDuringChanges(t *testing.T) {
	u := aliveUsage(t, 20, 100)
	e := NewExceptions(u, newMemStorage())
	done := make(chan struct{})
	var wg sync.WaitGroup
	for seed := range uint64(2) {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(seed, 0))
			for {
				select {
				case <-done:
					return
				default:
				}
				n := block.NewExtentID(block.SegmentID(1+r.IntN(20)), r.IntN(100))
				s, err := e.Get(n)
				place, err2 := e.Resolve(n)
				if err := errors.Join(err, err2); err != nil || s.Refs < 1 || place != n {
					t.Errorf("%v: %+v, %v, %v", n, s, place, err)
					return
				}
			}
		})
	}
	for i := range 20_000 {
		if _, err := e.Ref(block.NewExtentID(block.SegmentID(1+i%20), i*7%100), 3); err != nil {
			t.Fatal(err)
		}
		if i%1000 == 0 {
			if err := e.Spill(); err != nil {
				t.Fatal(err)
			}
		}
	}
	close(done)
	wg.Wait()
}

// TestOverflowCountsAreRarelyTouched takes and drops single references, skewed as dedup does: nearly all
// cancel out in the deltas. A hot name that only gains goes there once in 64 times.
func TestOverflowCountsAreRarelyTouched(t *testing.T) {
	const names = 20_000
	updates := 400_000
	if raceEnabled {
		updates = 100_000
	}
	r := newRand(t)
	zipf := rand.NewZipf(r, 1.2, 5, names-1)
	e := NewExceptions(aliveUsage(t, names/100, 100), nil)
	refs := map[block.ExtentID]int64{}
	for range updates {
		i := int(zipf.Uint64())
		n := block.NewExtentID(block.SegmentID(1+i/100), i%100)
		by := int64(1)
		if refs[n] > 0 && r.IntN(2) == 0 {
			by = -1
		}
		refs[n] += by
		if _, err := e.Ref(n, by); err != nil {
			t.Fatal(err)
		}
	}
	for n, more := range refs {
		if s, err := e.Get(n); err != nil || s.Refs != 1+more {
			t.Fatalf("extent %v has %d references, %v; want %d", n, s.Refs, err, 1+more)
		}
	}
	got := e.Stats().OverflowUpdates
	t.Logf("COUNT %d updates of the overflow counts in %d changes", got, updates)
	if got > uint64(updates)/1000 {
		t.Errorf("%d updates of the overflow counts in %d changes", got, updates)
	}
	before := e.Stats().OverflowUpdates
	for range 6400 {
		if _, err := e.Ref(block.NewExtentID(1, 1), 1); err != nil {
			t.Fatal(err)
		}
	}
	if got := e.Stats().OverflowUpdates - before; got < 99 || got > 101 {
		t.Errorf("%d updates of the overflow count for 6400 references", got)
	}
}

func BenchmarkResolve(b *testing.B) {
	for _, n := range []int{10_000, 4_000_000} {
		b.Run(fmt.Sprintf("entries=%d", n), func(b *testing.B) {
			r := rand.New(rand.NewPCG(1, 1))
			u := aliveUsage(b, (n+511)/512, 512)
			before := heap()
			e := NewExceptions(u, nil)
			names := make([]block.ExtentID, 0, n)
			for i := range n {
				name := block.NewExtentID(block.SegmentID(1+i/512), i%512)
				names = append(names, name)
				if _, err := e.Move(name, State{}, names[r.IntN(len(names))]); err != nil {
					b.Fatal(err)
				}
			}
			each := float64(heap()-before-uint64(n)*8) / float64(n)
			r.Shuffle(n, func(i, j int) { names[i], names[j] = names[j], names[i] })
			i := 0
			for b.Loop() {
				if _, err := e.Resolve(names[i]); err != nil {
					b.Fatal(err)
				}
				if i++; i == n {
					i = 0
				}
			}
			b.ReportMetric(each, "B/entry")
		})
	}
}
