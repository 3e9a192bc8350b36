package vdisk

import (
	"math/rand/v2"
	"testing"
)

// reads drives a stream table over a disk of 1 TiB that a store of bound bytes of window serves, and
// remembers what was read ahead of each stream.
type reads struct {
	s       streams
	bound   int64
	bytes   int64 // read ahead
	calls   int
	largest int64
	fetched map[int64]bool // grains
}

const testSize = 1 << 40

// read reads n bytes at off and reports whether all of it had been read ahead.
func (r *reads) read(off, n int64, missed bool) (hit bool) {
	hit = true
	for g := off / aheadAlign; g <= (off+n-1)/aheadAlign; g++ {
		hit = hit && r.fetched[g]
	}
	_, from, to := r.s.advance(off, n, missed && !hit, testSize, func() int64 { return r.bound })
	if from < to {
		r.bytes += to - from
		r.calls++
		r.largest = max(r.largest, to-from)
		for g := from / aheadAlign; g < to/aheadAlign; g++ {
			r.fetched[g] = true
		}
	}
	return hit
}

func newReads(bound int64) *reads { return &reads{bound: bound, fetched: map[int64]bool{}} }

// TestAStreamIsReadAheadInGrowingWindows reads 64 MiB in order and expects few misses, no byte twice and
// windows that double up to the bound.
func TestAStreamIsReadAheadInGrowingWindows(t *testing.T) {
	for _, size := range []int64{4 << 10, 64 << 10, 1 << 20} {
		r := newReads(8 << 20)
		const from, length = 5 << 30, 64 << 20
		hits := int64(0)
		for off := int64(from); off < from+length; off += size {
			if r.read(off, size, true) {
				hits += size
			}
			r.s.advance(off, size, true, testSize, func() int64 { return r.bound }) // the same read once more changes nothing
		}
		x := &r.s.table[0]
		for i := range r.s.table {
			if r.s.table[i].hits > x.hits {
				x = &r.s.table[i]
			}
		}
		if x.window != r.bound || r.largest < r.bound/2 || r.largest > 3*r.bound/2 {
			t.Errorf("reads of %d: window %d, largest fetch %d, bound %d", size, x.window, r.largest, r.bound)
		}
		if missed := length - hits; missed > (streamHits+1)*size+aheadAlign {
			t.Errorf("reads of %d: %d bytes of the stream were not read ahead", size, missed)
		}
		if int64(len(r.fetched))*aheadAlign != r.bytes {
			t.Errorf("reads of %d: %d bytes read ahead, %d of them different", size, r.bytes, len(r.fetched)*aheadAlign)
		}
		if ahead := x.ahead - r.s.next[x.i]; ahead < r.bound/2 || ahead > 3*r.bound/2 {
			t.Errorf("reads of %d: %d bytes ahead at the end", size, ahead)
		}
	}
}

// TestStreamsSurviveEachOther interleaves four streams with as many random reads.
func TestStreamsSurviveEachOther(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	r := newReads(8 << 20)
	var at [4]int64
	for i := range at {
		at[i] = int64(i+1) << 36
	}
	hits, total := 0, 0
	for range 4000 {
		r.read(rng.Int64N(1<<23)<<12, 4<<10, true)
		i := rng.IntN(len(at))
		if r.read(at[i], 64<<10, true) {
			hits++
		}
		total++
		at[i] += 64 << 10
	}
	if hits < total*99/100 {
		t.Errorf("%d of %d reads of the streams were read ahead", hits, total)
	}
	for i := range r.s.table {
		if x := &r.s.table[i]; x.hits > 100 && x.window > r.bound/4 {
			t.Errorf("four streams, a window of %d for one: more than its share of %d", x.window, r.bound)
		}
	}
}

// TestRequestsThatOvertakeEachOtherAreAStream shuffles neighbours, as a queue of requests does.
func TestRequestsThatOvertakeEachOtherAreAStream(t *testing.T) {
	r := newReads(8 << 20)
	hits := 0
	for i := int64(0); i < 1000; i += 4 {
		for _, j := range rand.Perm(4) {
			if r.read((i+int64(j))<<16, 64<<10, true) {
				hits++
			}
		}
	}
	if hits < 950 {
		t.Errorf("%d of 1000 reads were read ahead", hits)
	}
}

// TestRandomReadsCauseNoReadahead counts the extra bytes of a random trace, on a large and a small disk.
func TestRandomReadsCauseNoReadahead(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	for _, disk := range []int64{64 << 20, 1 << 30, 1 << 40} {
		for _, size := range []int64{4 << 10, 64 << 10} {
			r := newReads(8 << 20)
			const count = 50000
			for range count {
				clear(r.fetched) // nothing ever helps
				r.read(rng.Int64N(disk/size)*size, size, true)
			}
			if extra := float64(r.bytes) / float64(count*size); extra > 0.01 {
				t.Errorf("%d reads of %d in %d bytes: %.2f %% read ahead in vain", count, size, disk, 100*extra)
			}
		}
	}
}

// TestWhatIsLocalIsNotReadAhead reads a stream of which all is local, then meets a hole in the cache,
// then finds all local again.
func TestWhatIsLocalIsNotReadAhead(t *testing.T) {
	r := newReads(8 << 20)
	at := int64(0)
	read := func(n int, missed bool) {
		for range n {
			_, from, to := r.s.advance(at, 64<<10, missed, testSize, func() int64 { return r.bound })
			if from < to {
				r.calls++
				if !missed {
					r.s.rest(&r.s.table[r.index()], to) // all of it was on the tier
				}
			}
			at += 64 << 10
		}
	}
	read(1000, false)
	if r.calls != 0 {
		t.Errorf("a local stream was read ahead %d times", r.calls)
	}
	read(10, true)
	if r.calls == 0 {
		t.Error("a miss started nothing")
	}
	r.calls = 0
	read(1000, false)
	if r.calls > 1 {
		t.Errorf("read ahead %d times after all was local", r.calls)
	}
}

func (r *reads) index() int {
	for i := range r.s.table {
		if r.s.table[i].used == r.s.clock {
			return i
		}
	}
	return 0
}

// BenchmarkObserve is what every read pays for the detection of streams.
func BenchmarkObserve(b *testing.B) {
	var s streams
	rng := rand.New(rand.NewPCG(1, 1))
	for b.Loop() {
		s.mu.Lock()
		s.advance(rng.Int64N(1<<20)<<12, 4<<10, false, testSize, nil)
		s.mu.Unlock()
	}
}
