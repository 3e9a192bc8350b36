package extent

import "sync/atomic"

// shard is a cuckoo hash of names: buckets of four slots, two buckets per name, and a small stash for
// what finds no room below the load at which it grows. A slot is 17 bytes in three arrays:
//
//	key   name, its free bit 15 = canonical; 0 = empty
//	val   place or canonical name, bit 15 = it is a canonical name; 0 = neither
//	meta  overflow bit 7, sign bit 6, magnitude of the delta bits 0-5
//
// and a bit in hot, set when it is used and cleared by the hand of a spill.
type shard struct {
	keys, vals []uint64
	metas      []uint8
	hot        []atomic.Uint32
	buckets    uint64
	n          int // slots in use
	stashed    int // of them in the stash
}

const (
	bucketSlots = 4
	stashSlots  = 8 // behind the buckets
	bucketsMin  = 2
	searchMax   = 256 // buckets looked at for a chain of moves
	loadMax     = 93  // percent of the buckets' slots

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
	for _, at := range [2]uint64{a * bucketSlots, b * bucketSlots} {
		ks := s.keys[at : at+bucketSlots : at+bucketSlots]
		for j, k := range ks {
			if k&^flagBit == name {
				return int(at) + j
			}
		}
	}
	if s.stashed > 0 {
		for i := int(s.buckets) * bucketSlots; i < len(s.keys); i++ {
			if s.keys[i]&^flagBit == name {
				return i
			}
		}
	}
	return -1
}

func (s *shard) get(i int) slot { return slot{s.keys[i], s.vals[i], s.metas[i]} }

func (s *shard) put(i int, x slot) { s.keys[i], s.vals[i], s.metas[i] = x.key, x.val, x.meta }

// touch marks a slot as used lately.
func (s *shard) touch(i int) {
	if w := &s.hot[i/32]; w.Load()>>(i%32)&1 == 0 {
		w.Or(1 << (i % 32))
	}
}

// insert puts in a name that is not there.
func (s *shard) insert(x slot) {
	if uint64(s.n+1)*100 > s.buckets*bucketSlots*loadMax {
		s.resize(max(bucketsMin, s.buckets+s.buckets/8+1))
	}
	for !s.place(x) {
		s.resize(s.buckets + s.buckets/8 + 1)
	}
	s.n++
}

// place finds a slot for x, moving others if need be; false if there is none.
func (s *shard) place(x slot) bool {
	a, b := s.pair(mix(x.key &^ flagBit))
	i, ok := s.free(a, b)
	if !ok {
		for i = int(s.buckets) * bucketSlots; i < len(s.keys) && s.keys[i] != 0; i++ {
		}
		if i == len(s.keys) {
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
			if s.keys[at+j] == 0 {
				return s.shift(queue[:], head, at+j), true
			}
		}
		for j := 0; j < bucketSlots && tail < searchMax; j++ {
			x, y := s.pair(mix(s.keys[at+j] &^ flagBit))
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
		s.keys[from] = 0
		i = from
	}
	return i
}

// remove empties a slot.
func (s *shard) remove(i int) {
	s.keys[i] = 0
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
	for ; ; buckets += buckets/8 + 1 {
		slots := int(buckets)*bucketSlots + stashSlots
		*s = shard{
			keys: make([]uint64, slots), vals: make([]uint64, slots), metas: make([]uint8, slots),
			hot: make([]atomic.Uint32, (slots+31)/32), buckets: buckets, n: old.n,
		}
		if s.take(&old) {
			return
		}
	}
}

func (s *shard) take(old *shard) bool {
	for i, k := range old.keys {
		if k != 0 && !s.place(old.get(i)) {
			return false
		}
	}
	return true
}

// bytes is what the arrays take.
func (s *shard) bytes() int64 { return int64(len(s.keys))*17 + int64(len(s.hot))*4 }
