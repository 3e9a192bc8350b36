package segment

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"slices"

	"graindisk/block"
)

// Exam is what became of comparing the objects of one stripe with what they must be. That follows from the
// index, which any shard may give: it has a checksum of every extent, zeroes lie between them, parity is
// that of the data, and header and trailer say nothing that is not known by then. So a shard whose checksums
// are right is found all the same if it is not what its stripe needs, and bytes of shards that are damaged
// in different places still serve each other.
//
//	index ──► extents that pass ──────────────────────┬──► areas ──► parity ──► objects ──► compared
//	          others: the same range of k other shards ┘                    └──► Object
//	          nor so: Lost
type Exam struct {
	// Bad says by shard what is wrong with the object that was given; nil if nothing is, or none was given.
	Bad []error
	// Index is the stripe's, or nil if no shard has it intact and none was known.
	Index *Index
	// Lost are the slots whose bytes no choice of the objects gives, ascending.
	Lost []int
	// Err is why Object gives nothing; nil if it does.
	Err error

	info    Info
	trailer Trailer
	tail    []byte   // index and cut record
	areas   [][]byte // by shard, as they must be; nil for parity that was not asked for yet
	crcs    []uint32 // of them
}

// RecordLost tells whether the stripe had a cut's record that no object has intact.
func (x *Exam) RecordLost() bool { return x.info.CutBytes > 0 && x.tail == nil }

// Examine compares the objects of the stripe that info locates, by shard, nil = not at hand. They may be of any length: what
// is there serves the others. known is the stripe's index if the caller has it, else nil; it tells what is lost if no
// object has one. Objects are only read, and are aliased by the result.
func Examine(info Info, pool [16]byte, objects [][]byte, known *Index) *Exam {
	var best *Exam
	for _, t := range tails(info, pool, objects) {
		x := &Exam{Bad: make([]error, len(objects)), Index: t.index, info: info, trailer: t.trailer, tail: t.bytes}
		x.solve(objects)
		if best == nil || len(x.Lost) < len(best.Lost) {
			best = x
		}
		if len(best.Lost) == 0 {
			return best
		}
	}
	if best == nil {
		best = &Exam{Bad: make([]error, len(objects)), Index: known, info: info}
		best.Err = fmt.Errorf("segment %d: no shard has an intact index and trailer: %w", info.ID, ErrDamaged)
		if known != nil {
			best.restoreData(objects)
		}
	}
	for n, b := range objects { // each by itself
		if b != nil {
			best.Bad[n] = best.alone(b, pool, n)
		}
	}
	return best
}

// tail is what follows the extents area in every shard of a stripe, the trailer being that of one of them.
type tail struct {
	bytes   []byte // without the trailer
	index   *Index
	trailer Trailer
	votes   int
}

// tails are those that the objects have intact, the most frequent one first. There is one, unless somebody
// used a segment's name twice.
func tails(info Info, pool [16]byte, objects [][]byte) []*tail {
	var all []*tail
next:
	for _, b := range objects {
		if int64(len(b)) != info.ObjectBytes() {
			continue
		}
		trailer, err := DecodeTrailer(b)
		if err != nil || trailer.Pool != pool {
			continue
		}
		trailer.Shard, trailer.AreaCRC = 0, 0 // a shard's own
		between := b[info.indexOffset():info.trailerOffset()]
		for _, t := range all {
			if bytes.Equal(t.bytes, between) && bytes.Equal(t.trailer.append(nil), trailer.append(nil)) {
				t.votes++
				continue next
			}
		}
		if x, _, err := decodeTail(b[info.indexOffset():], info); err == nil {
			all = append(all, &tail{between, x, trailer, 1})
		}
	}
	slices.SortStableFunc(all, func(a, b *tail) int { return cmp.Compare(b.votes, a.votes) })
	return all
}

// alone judges an object without the others.
func (x *Exam) alone(b []byte, pool [16]byte, shard int) error {
	s, err := OpenShard(b)
	if err != nil {
		return err
	}
	if int(s.Trailer.Shard) != shard || s.Trailer.Pool != pool {
		return fmt.Errorf("it is shard %d of pool %x: %w", s.Trailer.Shard, s.Trailer.Pool, ErrDamaged)
	}
	return s.Index.describes(x.info)
}

// solve works out what every object must be, as far as it can, and compares.
func (x *Exam) solve(objects [][]byte) {
	x.restoreData(objects)
	if len(x.Lost) > 0 {
		x.Err = fmt.Errorf("segment %d: %d of its %d extents cannot be had from what is left of its shards: %w",
			x.info.ID, len(x.Lost), len(x.Index.Entries), ErrDamaged)
		return
	}
	x.crcs = x.Index.areaCRCs(x.areas[:x.info.K])
	x.crcs = append(x.crcs, make([]uint32, x.info.M)...)
	same := x.compareParity(objects)
	for n, b := range objects {
		if b != nil {
			x.Bad[n] = x.compare(n, b, same)
		}
	}
}

// rawArea is the extents area as the object has it, filled up with zeroes if that is cut short; nil if there
// is no object.
func (x *Exam) rawArea(b []byte) []byte {
	if b == nil {
		return nil
	}
	if int64(len(b)) >= x.info.indexOffset() {
		return b[HeaderBytes:x.info.indexOffset()]
	}
	area := make([]byte, x.info.ShardBytes)
	copy(area, b[min(HeaderBytes, len(b)):])
	return area
}

// restoreData fills in the data areas as they must be. Those of objects that are right alias them.
func (x *Exam) restoreData(objects [][]byte) {
	raw := make([][]byte, len(objects))
	for n, b := range objects {
		raw[n] = x.rawArea(b)
	}
	k := int(x.info.K)
	x.areas = make([][]byte, len(objects))
	copy(x.areas, raw[:k])
	own := make([]bool, k) // the area is a copy
	copyOf := func(n int) []byte {
		if !own[n] {
			x.areas[n], own[n] = make([]byte, x.info.ShardBytes), true
			copy(x.areas[n], raw[n])
		}
		return x.areas[n]
	}
	m := mender{x: x, raw: raw}
	ends := make([]uint32, k)
	for slot, e := range x.Index.Entries {
		x.clearGap(int(e.Shard), ends[e.Shard], e.Offset, copyOf)
		ends[e.Shard] = e.Offset + e.Stored
		if raw[e.Shard] != nil && x.Index.Verify(slot, raw[e.Shard][e.Offset:e.Offset+e.Stored]) {
			continue
		}
		if p := m.mend(slot, e); p != nil {
			copy(copyOf(int(e.Shard))[e.Offset:], p)
		} else {
			x.Lost = append(x.Lost, slot)
		}
	}
	for n := range k {
		x.clearGap(n, ends[n], x.info.ShardBytes, copyOf)
	}
}

// clearGap sees to it that there are zeroes where no extent lies.
func (x *Exam) clearGap(n int, from, to uint32, copyOf func(int) []byte) {
	if x.areas[n] == nil {
		copyOf(n)
	}
	for _, v := range x.areas[n][from:to] {
		if v != 0 {
			clear(copyOf(n)[from:to])
			return
		}
	}
}

// mender rebuilds extents from other shards.
type mender struct {
	x    *Exam
	raw  [][]byte
	last []int // the choice that served last
}

// mend gives the stored bytes of an extent from the same range of k shards, whichever choice gives what
// passes; nil if none does.
func (m *mender) mend(slot int, e Entry) []byte {
	k := int(m.x.info.K)
	var others []int
	for n, a := range m.raw {
		if a != nil && n != int(e.Shard) {
			others = append(others, n)
		}
	}
	if len(others) < k {
		return nil
	}
	if m.last != nil && !slices.Contains(m.last, int(e.Shard)) {
		if p := m.try(slot, e, m.last); p != nil {
			return p
		}
	}
	for set := uint32(1)<<k - 1; set < 1<<len(others); set = nextSubset(set) {
		from := pick(others, set)
		if p := m.try(slot, e, from); p != nil {
			m.last = from
			return p
		}
	}
	return nil
}

func (m *mender) try(slot int, e Entry, from []int) []byte {
	pieces := make([][]byte, len(m.raw))
	for _, n := range from {
		pieces[n] = m.raw[n][e.Offset : e.Offset+e.Stored]
	}
	p, err := reconstruct(m.x.info.K, m.x.info.M, pieces, int(e.Shard))
	if err != nil || !m.x.Index.Verify(slot, p) {
		return nil
	}
	return p
}

// compareParity computes the parity of the data, piece by piece, and its checksums, and tells which objects have it.
func (x *Exam) compareParity(objects [][]byte) (same []bool) {
	k, m, size := int(x.info.K), int(x.info.M), int(x.info.ShardBytes)
	same = make([]bool, k+m)
	for n := range same {
		same[n] = n < k || int64(len(objects[n])) >= x.info.indexOffset()
	}
	if m == 0 || size == 0 {
		return same
	}
	scratch := make([]byte, m*min(verifyStep, size))
	pieces := make([][]byte, k+m)
	for at := 0; at < size; at += verifyStep {
		n := min(verifyStep, size-at)
		for i := range pieces {
			if i < k {
				pieces[i] = x.areas[i][at : at+n]
			} else {
				pieces[i] = scratch[(i-k)*n:][:n]
			}
		}
		x.encode(pieces)
		for i := k; i < k+m; i++ {
			x.crcs[i] = block.MoreCRC(x.crcs[i], pieces[i])
			same[i] = same[i] && bytes.Equal(pieces[i], objects[i][HeaderBytes+at:][:n])
		}
	}
	return same
}

// encode cannot fail: the profile was checked with the index, and all pieces have one length.
func (x *Exam) encode(pieces [][]byte) {
	c, err := coder(x.info.K, x.info.M)
	if err == nil {
		err = c.Encode(pieces)
	}
	if err != nil {
		panic(err)
	}
}

// compare says how an object differs from what it must be.
func (x *Exam) compare(n int, b []byte, sameParity []bool) error {
	i := x.info
	if int64(len(b)) != i.ObjectBytes() {
		return fmt.Errorf("%d bytes, %d expected: %w", len(b), i.ObjectBytes(), ErrDamaged)
	}
	var parts []error
	part := func(what string, same bool) {
		if !same {
			parts = append(parts, errors.New(what))
		}
	}
	part("header", bytes.Equal(b[:HeaderBytes], x.header(n)))
	if n < int(i.K) {
		part("extents area", bytes.Equal(b[HeaderBytes:i.indexOffset()], x.areas[n]))
	} else {
		part("parity", sameParity[n])
	}
	part("index", bytes.Equal(b[i.indexOffset():i.cutOffset()], x.tail[:i.IndexBytes]))
	part("cut record", bytes.Equal(b[i.cutOffset():i.trailerOffset()], x.tail[i.IndexBytes:]))
	part("trailer", bytes.Equal(b[i.trailerOffset():], x.trailerOf(n)))
	if len(parts) == 0 {
		return nil
	}
	if h, err := DecodeHeader(b); err == nil && (h.ID != i.ID || h.Epoch != i.Epoch || int(h.Shard) != n) {
		return fmt.Errorf("it is shard %d of segment %d epoch %d: %w", h.Shard, h.ID, h.Epoch, ErrDamaged)
	}
	return fmt.Errorf("not what was stored: %w: %w", errors.Join(parts...), ErrDamaged)
}

func (x *Exam) header(n int) []byte {
	h := Header{Pool: x.Index.Pool, ID: x.info.ID, Epoch: x.info.Epoch, Salt: x.Index.Salt, KeyID: x.trailer.KeyID,
		K: x.info.K, M: x.info.M, Shard: uint8(n)}
	return h.append(make([]byte, 0, HeaderBytes))
}

func (x *Exam) trailerOf(n int) []byte {
	t := x.trailer
	t.Shard, t.AreaCRC = uint8(n), x.crcs[n]
	return t.append(make([]byte, 0, TrailerBytes))
}

// Object is what shard n must be, byte for byte as it was sealed; nil if Err is set.
func (x *Exam) Object(n int) []byte {
	if x.Err != nil {
		return nil
	}
	if x.areas[n] == nil {
		for i := range x.areas {
			if x.areas[i] == nil {
				x.areas[i] = make([]byte, x.info.ShardBytes)
			}
		}
		if x.info.ShardBytes > 0 {
			x.encode(x.areas)
		}
	}
	b := append(make([]byte, 0, x.info.ObjectBytes()), x.header(n)...)
	b = append(append(b, x.areas[n]...), x.tail...)
	return append(b, x.trailerOf(n)...)
}
