package fetch

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"graindisk/block"
)

// fake is a source and a cache. Extents are filled with their name; by default every call answers at once.
type fake struct {
	mu     sync.Mutex
	calls  [][]block.ExtentID
	cached map[block.ExtentID][]byte
	full   bool                                                   // the cache takes nothing
	gate   func(ctx context.Context, id block.ExtentID) error     // before each extent
	start  func(ctx context.Context, ids []block.ExtentID, n int) // before each call
	now    int                                                    // calls under way
	most   int                                                    // at a time
}

func content(w Want) []byte {
	p := make([]byte, w.Blocks*block.Size)
	for i := range p {
		p[i] = byte(uint64(w.ID)>>(8*(i%8))) + byte(i/block.Size)
	}
	return p
}

func (s *fake) source(ctx context.Context, seg block.SegmentID, wants []Want, got func(int, []byte, error)) {
	var ids []block.ExtentID
	n := 0
	for _, w := range wants {
		if w.ID.Segment() != seg {
			panic("a want of another segment")
		}
		ids = append(ids, w.ID)
		n += w.Blocks * block.Size
	}
	s.mu.Lock()
	s.calls = append(s.calls, ids)
	s.now++
	s.most = max(s.most, s.now)
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		s.now--
		s.mu.Unlock()
	}()
	if s.start != nil {
		s.start(ctx, ids, n)
	}
	for i, w := range wants {
		var err error
		if s.gate != nil {
			err = s.gate(ctx, w.ID)
		}
		if err == nil {
			err = ctx.Err()
		}
		if err != nil {
			got(i, nil, err)
			continue
		}
		got(i, content(w), nil)
	}
}

func (s *fake) Has(id block.ExtentID, blocks int) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.cached[id]) == blocks*block.Size
}

func (s *fake) Read(id block.ExtentID, off, blocks int, p []byte) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	b, ok := s.cached[id]
	if ok {
		copy(p, b[off*block.Size:])
	}
	return ok
}

func (s *fake) Fill(_ block.DiskID, id block.ExtentID, data []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.full {
		s.cached[id] = slices.Clone(data)
	}
}

// bubble runs f over a fake in a bubble of synctest and checks that nothing is left behind.
func bubble(t *testing.T, o Options, f func(t *testing.T, s *fake, x *Fetcher)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		s := &fake{cached: map[block.ExtentID][]byte{}}
		o.Source, o.Cache = s.source, s
		x := New(o)
		f(t, s, x)
		synctest.Wait()
		x.mu.Lock()
		held := int64(0)
		for _, fl := range x.flights {
			if !fl.ahead || !fl.settled {
				t.Errorf("flight of %v is left", fl.ID)
			}
			held += fl.bytes()
		}
		if x.used != 0 || len(x.rounds) != 0 || len(x.queues) != 0 || len(x.waiting) != 0 {
			t.Errorf("left: %d bytes, %d rounds, %d queues, %d waiting", x.used, len(x.rounds), len(x.queues), len(x.waiting))
		}
		if x.ahead.used != held || x.landed.Load() != int64(len(x.flights)) || x.ahead.rounds != 0 {
			t.Errorf("readahead counts %d bytes of %d, %d landed of %d", x.ahead.used, held, x.landed.Load(), len(x.flights))
		}
		x.mu.Unlock()
		x.Close()
	})
}

func want(seg, slot int) Want {
	return Want{ID: block.NewExtentID(block.SegmentID(seg), slot), Blocks: 2}
}

// get fetches and checks every byte; errors of single wants are joined.
func get(ctx context.Context, x *Fetcher, wants ...Want) error {
	var errs []error
	told := map[int]int{}
	err := x.Get(ctx, wants, func(rs []Result) {
		for _, r := range rs {
			told[r.I]++
			if r.Err != nil {
				errs = append(errs, r.Err)
			} else if !bytes.Equal(r.Data, content(wants[r.I])) {
				errs = append(errs, fmt.Errorf("wrong bytes for want %d", r.I))
			}
		}
	})
	if err != nil {
		return err
	}
	for i := range wants {
		if told[i] != 1 {
			errs = append(errs, fmt.Errorf("want %d was told %d times", i, told[i]))
		}
	}
	return errors.Join(errs...)
}

// TestOneFetchHoweverRequestsOverlap has 50 callers ask for random overlapping sets at once.
func TestOneFetchHoweverRequestsOverlap(t *testing.T) {
	bubble(t, Options{}, func(t *testing.T, s *fake, x *Fetcher) {
		s.gate = func(ctx context.Context, _ block.ExtentID) error { time.Sleep(time.Millisecond); return nil }
		var wg sync.WaitGroup
		for range 50 {
			wg.Go(func() {
				var ws []Want
				for range 1 + rand.IntN(10) {
					ws = append(ws, want(1+rand.IntN(3), rand.IntN(20)))
				}
				if err := get(t.Context(), x, ws...); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		seen := map[block.ExtentID]bool{}
		for _, c := range s.calls {
			for _, id := range c {
				if seen[id] {
					t.Errorf("extent %v was fetched twice", id)
				}
				seen[id] = true
			}
		}
	})
}

// TestWhatWasFilledMeanwhileIsNotFetched asks for what came into the cache after the caller looked.
func TestWhatWasFilledMeanwhileIsNotFetched(t *testing.T) {
	bubble(t, Options{}, func(t *testing.T, s *fake, x *Fetcher) {
		s.Fill(1, want(1, 1).ID, content(want(1, 1)))
		if err := get(t.Context(), x, want(1, 0), want(1, 1)); err != nil {
			t.Error(err)
		}
		if len(s.calls) != 1 || len(s.calls[0]) != 1 {
			t.Errorf("fetched %v", s.calls)
		}
	})
}

// TestWhatWaitsGoesTogether blocks all rounds of a segment and then asks for 16 neighbours one by one.
func TestWhatWaitsGoesTogether(t *testing.T) {
	bubble(t, Options{RoundsMax: 2}, func(t *testing.T, s *fake, x *Fetcher) {
		release := make(chan struct{})
		s.start = func(context.Context, []block.ExtentID, int) { <-release }
		var wg sync.WaitGroup
		ask := func(ws ...Want) {
			wg.Go(func() {
				if err := get(t.Context(), x, ws...); err != nil {
					t.Error(err)
				}
			})
			synctest.Wait()
		}
		ask(want(1, 100), want(1, 101))
		ask(want(1, 102))
		for i := range 16 {
			ask(want(1, i))
		}
		ask(want(2, 0)) // another segment waits for none of them
		if len(s.calls) != 3 {
			t.Errorf("%d rounds under way, want 3", len(s.calls))
		}
		close(release)
		wg.Wait()
		if len(s.calls) != 4 || len(s.calls[3]) != 16 {
			t.Errorf("rounds %v: the 16 that waited did not go together", s.calls)
		}
	})
}

// TestPiecesComeAsTheyArrive holds the last of three back.
func TestPiecesComeAsTheyArrive(t *testing.T) {
	bubble(t, Options{}, func(t *testing.T, s *fake, x *Fetcher) {
		bad := errors.New("bad")
		s.gate = func(_ context.Context, id block.ExtentID) error {
			switch id.Slot() {
			case 1:
				return bad
			case 2:
				time.Sleep(time.Hour)
			}
			return nil
		}
		start := time.Now()
		err := x.Get(t.Context(), []Want{want(1, 0), want(1, 1), want(1, 2)}, func(rs []Result) {
			for _, r := range rs {
				if late := time.Since(start) > 0; late != (r.I == 2) || (r.Err != nil) != (r.I == 1) {
					t.Errorf("want %d after %v: %v", r.I, time.Since(start), r.Err)
				}
			}
			p := make([]byte, block.Size) // others need not wait for the round either
			if len(rs) > 0 && time.Since(start) == 0 && (!x.Landed(want(1, 0).ID, 1, p) || !bytes.Equal(p, content(want(1, 0))[block.Size:])) {
				t.Error("what arrived cannot be read")
			}
		})
		synctest.Wait() // the cache is filled after the last result was handed out
		if err != nil || !s.Has(want(1, 0).ID, 2) || s.Has(want(1, 1).ID, 2) {
			t.Error("the cache was not filled with what came", err)
		}
		s.gate = nil
		if err := get(t.Context(), x, want(1, 1)); err != nil { // a failure is not kept
			t.Error(err)
		}
	})
}

// TestWhoGivesUpHoldsNobody cancels callers before, during and beside others.
func TestWhoGivesUpHoldsNobody(t *testing.T) {
	bubble(t, Options{RoundsMax: 1}, func(t *testing.T, s *fake, x *Fetcher) {
		s.gate = func(ctx context.Context, _ block.ExtentID) error {
			select {
			case <-time.After(time.Second):
				return nil
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		reason := errors.New("client left")
		ctx, cancel := context.WithCancelCause(t.Context())
		var wg sync.WaitGroup
		gone := func(ws ...Want) {
			wg.Go(func() {
				if err := get(ctx, x, ws...); !errors.Is(err, reason) {
					t.Errorf("cancelled: %v", err)
				}
			})
			synctest.Wait()
		}
		stays := func(ws ...Want) {
			wg.Go(func() {
				if err := get(t.Context(), x, ws...); err != nil {
					t.Error(err)
				}
			})
			synctest.Wait()
		}
		gone(want(1, 0), want(1, 1)) // under way, and cancelled whole
		gone(want(2, 0), want(2, 1)) // under way, one of them shared
		stays(want(2, 1))
		gone(want(2, 5)) // queued
		gone(want(2, 6)) // queued, shared
		stays(want(2, 6))
		cancel(reason)
		synctest.Wait()
		stays(want(1, 0)) // not joined to the cancelled one
		wg.Wait()
		for _, c := range s.calls {
			if slices.Contains(c, want(2, 5).ID) {
				t.Error("what nobody wanted any more was fetched")
			}
		}
		if err := get(ctx, x, want(1, 0)); !errors.Is(err, reason) {
			t.Error(err)
		}
	})
}

// TestARoundWhoseLastWaiterIsServedEnds cancels one caller of a round before the other's part is there.
func TestARoundWhoseLastWaiterIsServedEnds(t *testing.T) {
	bubble(t, Options{}, func(t *testing.T, s *fake, x *Fetcher) {
		s.gate = func(ctx context.Context, id block.ExtentID) error {
			wait := time.Second
			if id.Slot() == 1 {
				wait = time.Hour
			}
			select {
			case <-time.After(wait):
				return nil
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		wg.Go(func() { _ = get(ctx, x, want(1, 0), want(1, 1)) })
		synctest.Wait()
		wg.Go(func() {
			if err := get(t.Context(), x, want(1, 0)); err != nil {
				t.Error(err)
			}
		})
		synctest.Wait()
		cancel()
		start := time.Now()
		wg.Wait()
		synctest.Wait()
		if len(x.rounds) > 0 || time.Since(start) > time.Minute {
			t.Error("the round goes on for nobody")
		}
	})
}

// TestBytesUnderWayAreBounded asks for far more than the budget.
func TestBytesUnderWayAreBounded(t *testing.T) {
	const budget = 10 * (2*block.Size + GapMax)
	bubble(t, Options{BytesMax: budget, RoundsMax: 100}, func(t *testing.T, s *fake, x *Fetcher) {
		s.start = func(context.Context, []block.ExtentID, int) {
			x.mu.Lock()
			if x.used > budget && x.used != 1000*block.Size+GapMax { // the big one, alone
				t.Errorf("%d bytes under way, budget %d", x.used, budget)
			}
			x.mu.Unlock()
			time.Sleep(time.Millisecond)
		}
		var wg sync.WaitGroup
		for i := range 200 {
			wg.Go(func() {
				if err := get(t.Context(), x, want(1+i%7, i), want(1+i%5, i)); err != nil {
					t.Error(err)
				}
			})
		}
		big := Want{ID: block.NewExtentID(9, 0), Blocks: 1000} // larger than all of it
		if err := get(t.Context(), x, big); err != nil {
			t.Error(err)
		}
		wg.Wait()
	})
}

// TestReadaheadIsSharedKeptAndBounded covers the life of what is read ahead, with a cache that takes nothing.
func TestReadaheadIsSharedKeptAndBounded(t *testing.T) {
	const size = 2 * block.Size
	bubble(t, Options{AheadMax: 8 * size}, func(t *testing.T, s *fake, x *Fetcher) {
		s.full = true
		var ws []Want
		for i := range 12 {
			ws = append(ws, want(1, i))
		}
		s.start = func(context.Context, []block.ExtentID, int) { time.Sleep(time.Second) }
		if n := x.Ahead(ws); n != 12 || x.Stats().Ahead != 8 {
			t.Errorf("%d worth it, %+v", n, x.Stats())
		}
		synctest.Wait()
		if err := get(t.Context(), x, ws[0]); err != nil || len(s.calls) != 1 { // under way: shared
			t.Error(err, s.calls)
		}
		synctest.Wait()
		p := make([]byte, block.Size)
		for i := range 2 { // read to the end in two parts
			if !x.Landed(ws[1].ID, i, p) || !bytes.Equal(p, content(ws[1])[i*block.Size:][:block.Size]) {
				t.Error("what landed cannot be read")
			}
		}
		if !x.Landed(ws[1].ID, 0, p) {
			t.Error("what was passed cannot be read again")
		}
		x.Passed(ws[6].ID, 2)
		x.Passed(ws[7].ID, 1) // not to its end
		x.Ahead(ws[8:])       // 1 and 6 go first, then the oldest, 0 and 2
		synctest.Wait()
		time.Sleep(time.Minute)
		for i, kept := range []bool{false, false, false, true, true, true, false, true, true, true, true, true} {
			if x.Landed(ws[i].ID, 0, p) != kept {
				t.Errorf("extent %d: kept should be %v", i, kept)
			}
		}
		if st := x.Stats(); st.Ahead != 12 || st.AheadUnread != 2 || st.AheadUsed != 10 || st.AheadBytes != 8*size {
			t.Errorf("%+v", st)
		}
		s.full = false
		s.Fill(1, ws[0].ID, content(ws[0]))
		if n := x.Ahead(ws[:1]); n != 0 {
			t.Error("what is cached was read ahead")
		}
	})
}

// TestReadaheadNeverHoldsForeground queues readahead and then wants the last of it.
func TestReadaheadNeverHoldsForeground(t *testing.T) {
	bubble(t, Options{}, func(t *testing.T, s *fake, x *Fetcher) {
		release := make(chan struct{})
		s.start = func(ctx context.Context, ids []block.ExtentID, _ int) {
			if ids[0].Segment() != 99 {
				<-release
			}
		}
		for seg := range aheadRoundsMax {
			x.Ahead([]Want{want(1+seg, 0)})
		}
		x.Ahead([]Want{want(99, 0), want(99, 1)}) // no room for a round
		synctest.Wait()
		if err := get(t.Context(), x, want(99, 1)); err != nil {
			t.Error(err)
		}
		if len(s.calls) != aheadRoundsMax+1 {
			t.Errorf("%d rounds", len(s.calls))
		}
		close(release)
		synctest.Wait()
		if s.most > aheadRoundsMax+1 {
			t.Errorf("%d rounds at a time", s.most)
		}
	})
}

// TestCloseTellsWhoWaits closes with rounds under way and others queued.
func TestCloseTellsWhoWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &fake{cached: map[block.ExtentID][]byte{}}
		s.start = func(ctx context.Context, _ []block.ExtentID, _ int) { <-ctx.Done() }
		x := New(Options{Source: s.source, Cache: s, RoundsMax: 1})
		var wg sync.WaitGroup
		for i := range 5 {
			wg.Go(func() {
				if err := get(t.Context(), x, want(1, i)); !errors.Is(err, ErrClosed) {
					t.Errorf("caller %d: %v", i, err)
				}
			})
		}
		x.Ahead([]Want{want(3, 3)})
		synctest.Wait()
		x.Close()
		wg.Wait()
		if err := get(t.Context(), x, want(1, 1)); !errors.Is(err, ErrClosed) {
			t.Error(err)
		}
	})
}

// TestWindowFollowsTheStore gives a store 30 ms per request and 100 MB/s and expects the window to grow to
// what keeps it busy, and no further than its bound.
func TestWindowFollowsTheStore(t *testing.T) {
	bubble(t, Options{}, func(t *testing.T, s *fake, x *Fetcher) {
		if x.Window() != windowMin {
			t.Errorf("window %d before anything is known", x.Window())
		}
		s.full = true
		line := make(chan struct{}, 1) // one wire
		s.start = func(_ context.Context, _ []block.ExtentID, n int) {
			time.Sleep(30 * time.Millisecond)
			line <- struct{}{}
			time.Sleep(time.Duration(n) * time.Second / 100e6)
			<-line
		}
		slot := 0
		for range 60 { // a reader that keeps the window under way
			if x.Window() >= 100e6*0.030 && x.Window() > windowMin {
				break
			}
			var ws []Want
			for range x.Window() / (16 * block.Size) {
				ws = append(ws, Want{ID: block.NewExtentID(1, slot), Blocks: 16})
				slot++
			}
			x.Ahead(ws)
			p := make([]byte, 16*block.Size)
			for _, w := range ws {
				if err := get(t.Context(), x, w); err != nil {
					t.Fatal(err)
				}
				x.Landed(w.ID, 0, p)
			}
		}
		if w, full := x.Window(), int64(100e6*0.030); w < full || w > x.o.AheadMax*3/4 {
			t.Errorf("window %d, bandwidth × delay %d", w, full)
		}
	})
}
