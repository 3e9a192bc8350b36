package extent

import "sync/atomic"

// shard is a cuckoo hash of names: buckets of four slots, two buckets per name, and a small stash for
// what finds no room below the load at which it grows.
type shard struct {
	b       []bucket // the last ones are the stash
	buckets uint64   // without the stash
	n       int      // slots in use
	stashed int      // of them in the stash
}

// bucket is four slots in 72 bytes. A bit of hot is set when its slot is used, and cleared by a spill.
//
//	key   name, its free bit 15 = canonical; 0 = empty
//	val   place or canonical name, bit 15 = it is a canonical name; 0 = neither
//	meta  overflow bit 7, sign bit 6, magnitude of the delta bits 0-5
type bucket struct {
	keys, vals [bucketSlots]uint64
	metas      [bucketSlots]uint8
	hot        atomic.Uint32
}

const (
	bucketSlots  = 4
	bucketBytes  = 72
	bucketsMin   = 2
	stashBuckets = 2
	searchMax    = 256 // buckets looked at for a chain of moves
	loadMax      = 93  // percent of the buckets' slots
	growth       = 16  // a shard grows by a 16th

	flagBit = 1 << 15 // of key and val; slots of names are below it
)

type slot struct {
	key, val uint64
	meta     uint8
}

// mix is the finalizer of splitmix64: every bit of x reaches every bit of the result.
func mix(x uint64) uint64 {
	x ^= x >> 30
	x *= 0xbf58476d1ce4e5b9
	x ^= x >> 27
	x *= 0x94d049bb133111eb
	return x ^ x>>31
}

// pair is the two buckets of a name whose hash is h. They differ.
func (s *shard) pair(h uint64) (a, b uint64) {
	a = h >> 32 * s.buckets >> 32
	b = mix(h) >> 32 * s.buckets >> 32
	if a == b {
		if b++; b == s.buckets {
			b = 0
		}
	}
	return a, b
}

// find is where a name is, or -1.
func (s *shard) find(name, h uint64) int {
	if s.n == 0 {
		return -1
	}
	a, b := s.pair(h)
	if i := s.findIn(a, name); i >= 0 {
		return i
	}
	if i := s.findIn(b, name); i >= 0 {
		return i
	}
	for x := s.buckets; s.stashed > 0 && x < uint64(len(s.b)); x++ {
		if i := s.findIn(x, name); i >= 0 {
			return i
		}
	}
	return -1
}

func (s *shard) findIn(b, name uint64) int {
	for j, k := range &s.b[b].keys {
		if k&^flagBit == name {
			return int(b)*bucketSlots + j
		}
	}
	return -1
}

func (s *shard) key(i int) uint64 { return s.b[i/bucketSlots].keys[i%bucketSlots] }

func (s *shard) get(i int) slot {
	b, j := &s.b[i/bucketSlots], i%bucketSlots
	return slot{b.keys[j], b.vals[j], b.metas[j]}
}

func (s *shard) put(i int, x slot) {
	b, j := &s.b[i/bucketSlots], i%bucketSlots
	b.keys[j], b.vals[j], b.metas[j] = x.key, x.val, x.meta
}

// slots is how many slots there are, empty ones and the stash included.
func (s *shard) slots() int { return len(s.b) * bucketSlots }

// touch marks a slot as used lately.
func (s *shard) touch(i int) {
	if w, j := &s.b[i/bucketSlots].hot, i%bucketSlots; w.Load()>>j&1 == 0 {
		w.Or(1 << j)
	}
}

func (s *shard) isHot(i int) bool { return s.b[i/bucketSlots].hot.Load()>>(i%bucketSlots)&1 != 0 }

// insert puts in a name that is not there.
func (s *shard) insert(x slot) {
	if uint64(s.n+1)*100 > s.buckets*bucketSlots*loadMax {
		s.resize(max(bucketsMin, s.buckets+s.buckets/growth+1))
	}
	for !s.place(x) {
		s.resize(s.buckets + s.buckets/growth + 1)
	}
	s.n++
}

// place finds a slot for x, moving others if need be; false if there is none.
func (s *shard) place(x slot) bool {
	a, b := s.pair(mix(x.key &^ flagBit))
	i, ok := s.free(a, b)
	if !ok {
		for i = int(s.buckets) * bucketSlots; i < s.slots() && s.key(i) != 0; i++ {
		}
		if i == s.slots() {
			return false
		}
		s.stashed++
	}
	s.put(i, x)
	s.touch(i)
	return true
}

// step is a bucket reached by moving what is in a slot of the one before.
type step struct {
	bucket uint64
	from   int // of the step before; -1 at the start
	slot   int // there
}

// free makes a slot of a or b free by the shortest chain of moves, and returns it.
func (s *shard) free(a, b uint64) (int, bool) {
	var queue [searchMax]step
	queue[0], queue[1] = step{a, -1, 0}, step{b, -1, 0}
	for head, tail := 0, 2; head < tail; head++ {
		at := int(queue[head].bucket) * bucketSlots
		for j := range bucketSlots {
			if s.key(at+j) == 0 {
				return s.shift(queue[:], head, at+j), true
			}
		}
		for j := 0; j < bucketSlots && tail < searchMax; j++ {
			x, y := s.pair(mix(s.key(at+j) &^ flagBit))
			other := x + y - queue[head].bucket
			if !visited(queue[:tail], other) {
				queue[tail] = step{other, head, at + j}
				tail++
			}
		}
	}
	return 0, false
}

func visited(q []step, bucket uint64) bool {
	for i := range q {
		if q[i].bucket == bucket {
			return true
		}
	}
	return false
}

// shift moves along the chain that ends in the empty slot i of queue[n], and returns the slot that is
// empty then, in the bucket where the chain starts.
func (s *shard) shift(queue []step, n, i int) int {
	for ; queue[n].from >= 0; n = queue[n].from {
		from := queue[n].slot
		s.put(i, s.get(from))
		s.touch(i) // it may not have been hot: one round longer in memory does no harm
		s.put(from, slot{})
		i = from
	}
	return i
}

// remove empties a slot.
func (s *shard) remove(i int) {
	s.put(i, slot{})
	if i >= int(s.buckets)*bucketSlots {
		s.stashed--
	}
	s.n--
	if s.buckets > bucketsMin && uint64(s.n) < s.buckets*bucketSlots/3 {
		s.resize(max(bucketsMin, uint64(s.n)/bucketSlots*3/2))
	}
}

// resize makes buckets of them, or a few more if that leaves someone without a slot.
func (s *shard) resize(buckets uint64) {
	old := *s
	for ; ; buckets += buckets/growth + 1 {
		*s = shard{b: make([]bucket, buckets+stashBuckets), buckets: buckets, n: old.n}
		if s.take(&old) {
			return
		}
	}
}

func (s *shard) take(old *shard) bool {
	for i := range old.slots() {
		if x := old.get(i); x.key != 0 && !s.place(x) {
			return false
		}
	}
	return true
}

// bytes is what the buckets take.
func (s *shard) bytes() int64 { return int64(len(s.b)) * bucketBytes }
