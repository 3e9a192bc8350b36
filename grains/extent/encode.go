package extent

import (
	"encoding/binary"
	"fmt"
	"io"
	"iter"
	"slices"

	"graindisk/block"
)

// The header of a blob; offsets as drawn in the package comment.
const (
	usageMagic   = "GDUS"
	usageVersion = 1
	offVersion   = 4
	offFlags     = 6
	offIncompat  = 8
	offRows      = 16
	offKinds     = 20
	offBody      = 24
	headerLen    = 28
	crcLen       = 4

	rowBytesMin  = 12 // all numbers below 128, nothing dead
	kindBytesMin = 3
)

// Blobs is the table in its stored form, blob by blob, each little longer than size at most: a row of
// 32 768 extents takes up to 100 KiB.
func (v View) Blobs(size int) iter.Seq[[]byte] {
	return func(yield func([]byte) bool) {
		e := newEncoder()
		more := true
		v.each(func(r *record) bool {
			e.row(r, v.kinds[r.kind])
			if len(e.body) >= size {
				more = yield(e.seal())
				e = newEncoder()
			}
			return more
		})
		if more && e.rows > 0 {
			yield(e.seal())
		}
	}
}

// encoder fills one blob.
type encoder struct {
	kinds []kind
	body  []byte
	rows  uint32
	prev  record
}

func newEncoder() *encoder { return new(encoder) }

func (e *encoder) kind(k kind) uint64 {
	i := slices.IndexFunc(e.kinds, k.equal)
	if i < 0 {
		i, e.kinds = len(e.kinds), append(e.kinds, k)
	}
	return uint64(i)
}

func (e *encoder) row(r *record, k kind) {
	b := e.body
	gap := uint64(r.id)
	if e.rows > 0 {
		gap -= uint64(e.prev.id) + 1
	}
	b = binary.AppendUvarint(b, gap)
	b = binary.AppendVarint(b, int64(r.epoch-e.prev.epoch))
	b = binary.AppendVarint(b, r.birth-e.prev.birth)
	b = binary.AppendUvarint(b, e.kind(k))
	b = append(b, r.state)
	for _, n := range []uint32{uint32(r.extents), r.blocks, uint32(r.dead), r.live, r.trapped} {
		b = binary.AppendUvarint(b, uint64(n))
	}
	var d detail
	if r.detail != nil {
		d = *r.detail
	}
	if 0 < r.dead && r.dead < r.extents {
		for i := range (int(r.extents) + 7) / 8 {
			b = append(b, byte(d.bits[i/8]>>(i%8*8)))
		}
	}
	b = binary.AppendUvarint(b, uint64(len(d.part)))
	next := uint16(0)
	for _, p := range d.part {
		b = binary.AppendUvarint(b, uint64(p.slot-next))
		b = binary.AppendUvarint(b, uint64(p.left))
		next = p.slot + 1
	}
	b = binary.AppendUvarint(b, uint64(len(d.over)))
	next = 0
	for _, o := range d.over {
		b = binary.AppendUvarint(b, uint64(o.slot-next))
		b = binary.AppendVarint(b, o.count)
		next = o.slot + 1
	}
	e.body, e.prev, e.rows = b, *r, e.rows+1
}

func (e *encoder) seal() []byte {
	b := make([]byte, headerLen, headerLen+len(e.kinds)*(2+2*(dataMax+parityMax))+len(e.body)+crcLen)
	copy(b, usageMagic)
	le := binary.LittleEndian
	le.PutUint16(b[offVersion:], usageVersion)
	le.PutUint32(b[offRows:], e.rows)
	le.PutUint32(b[offKinds:], uint32(len(e.kinds)))
	for _, k := range e.kinds {
		b = append(b, k.k, k.m)
		for _, t := range k.targets {
			b = binary.AppendUvarint(b, uint64(t))
		}
	}
	b = append(b, e.body...)
	le.PutUint32(b[offBody:], uint32(len(b)-headerLen))
	return le.AppendUint32(b, block.CRC(b))
}

// IsBlob tells whether b begins like a blob of a usage table.
func IsBlob(b []byte) bool { return len(b) >= offVersion && string(b[:offVersion]) == usageMagic }

// BlobLen is the length of the blob at the head of b, for blobs that lie back to back.
func BlobLen(b []byte) (int, error) {
	if len(b) < headerLen || !IsBlob(b) {
		return 0, fmt.Errorf("usage: no blob here: %w", ErrDamaged)
	}
	n := headerLen + int64(binary.LittleEndian.Uint32(b[offBody:])) + crcLen
	if n > int64(len(b)) {
		return 0, fmt.Errorf("usage: blob of %d bytes in %d: %w", n, len(b), ErrDamaged)
	}
	return int(n), nil
}

// Load adds the rows of a blob, which must lie behind all rows there are; b is not kept. After an error,
// that matches ErrDamaged or ErrNewer, the table holds some of them.
func (u *Usage) Load(b []byte) error {
	rows, in, err := openBlob(b)
	if err != nil {
		return fmt.Errorf("usage: %w", err)
	}
	d := decoder{in: in}
	kinds := d.kinds(int(binary.LittleEndian.Uint32(b[offKinds:])))
	u.mu.Lock()
	defer u.mu.Unlock()
	for i := range rows {
		r := d.row(i == 0)
		if n := len(u.v.chunks); !d.bad && n > 0 {
			last := u.v.chunks[n-1].rows
			d.check(last[len(last)-1].id < r.id)
		}
		if d.check(int64(r.kind) < int64(len(kinds))); d.bad {
			return fmt.Errorf("usage: row %d after segment %d: %w", i, d.prev.id, ErrDamaged)
		}
		k := kinds[r.kind]
		s := Segment{ID: r.id, K: k.k, M: k.m, Targets: k.targets, Extents: uint32(r.extents), Blocks: r.blocks}
		if err := s.validate(); err != nil {
			return fmt.Errorf("usage: %w: %w", ErrDamaged, err)
		}
		d.prev = r
		r.kind = u.internLocked(k)
		if r.detail != nil {
			r.detail.gen = u.gen
		}
		u.insertLocked(r)
		u.v.sum.add(&r, 1)
	}
	if len(d.in) > 0 {
		return fmt.Errorf("usage: %d bytes behind the last row: %w", len(d.in), ErrDamaged)
	}
	return nil
}

// openBlob checks all of b that can be checked without reading the rows, and returns their number and
// what is behind the header.
func openBlob(b []byte) (rows uint32, body []byte, err error) {
	le := binary.LittleEndian
	if len(b) < headerLen+crcLen || !IsBlob(b) {
		return 0, nil, fmt.Errorf("%w: not a usage table", ErrDamaged)
	}
	if v, inc := le.Uint16(b[offVersion:]), le.Uint64(b[offIncompat:]); v > usageVersion || inc != 0 {
		return 0, nil, fmt.Errorf("%w: version %d, incompat bits %#x", ErrNewer, v, inc)
	}
	all := b[:len(b)-crcLen]
	if got, want := block.CRC(all), le.Uint32(b[len(all):]); got != want {
		return 0, nil, fmt.Errorf("%w: crc %08x, stored %08x", ErrDamaged, got, want)
	}
	rows, body = le.Uint32(b[offRows:]), all[headerLen:]
	kinds := le.Uint32(b[offKinds:])
	if le.Uint16(b[offVersion:]) != usageVersion || le.Uint16(b[offFlags:]) != 0 || int64(le.Uint32(b[offBody:])) != int64(len(body)) ||
		int64(rows)*rowBytesMin+int64(kinds)*kindBytesMin > int64(len(body)) {
		return 0, nil, fmt.Errorf("%w: header", ErrDamaged)
	}
	return rows, body, nil
}

// decoder takes values off the front of in; bad is set once they make no sense.
type decoder struct {
	in   []byte
	bad  bool
	prev record
}

func (d *decoder) check(ok bool) { d.bad = d.bad || !ok }

func (d *decoder) u8() uint8 {
	if d.bad || len(d.in) == 0 {
		d.bad = true
		return 0
	}
	c := d.in[0]
	d.in = d.in[1:]
	return c
}

func (d *decoder) uint(limit uint64) uint64 {
	v, n := binary.Uvarint(d.in)
	if d.bad || n <= 0 || v > limit {
		d.bad = true
		return 0
	}
	d.in = d.in[n:]
	return v
}

func (d *decoder) int() int64 {
	v, n := binary.Varint(d.in)
	if d.bad || n <= 0 {
		d.bad = true
		return 0
	}
	d.in = d.in[n:]
	return v
}

func (d *decoder) kinds(n int) []kind {
	var ks []kind
	for range n {
		k := kind{k: d.u8(), m: d.u8()}
		d.check(k.k >= 1 && k.k <= dataMax && k.m <= parityMax)
		if d.bad {
			return nil
		}
		for range int(k.k) + int(k.m) {
			k.targets = append(k.targets, block.TargetID(d.uint(1<<16-1)))
		}
		ks = append(ks, k)
	}
	return ks
}

// row reads what encoder.row wrote and checks that the counts fit each other.
func (d *decoder) row(first bool) record {
	var r record
	r.id = block.SegmentID(d.uint(uint64(block.SegmentMax - 1)))
	if !first {
		r.id += d.prev.id + 1
	}
	r.epoch = d.prev.epoch + uint64(d.int())
	r.birth = d.prev.birth + d.int()
	r.kind = uint32(d.uint(1<<32 - 1))
	r.state = d.u8()
	r.extents = uint16(d.uint(block.ExtentsMax))
	r.blocks = uint32(d.uint(1<<32 - 1))
	r.dead = uint16(d.uint(uint64(r.extents)))
	r.live = uint32(d.uint(uint64(r.blocks)))
	r.trapped = uint32(d.uint(uint64(r.blocks - r.live)))
	var t detail
	if 0 < r.dead && r.dead < r.extents {
		d.bits(&r, &t)
	}
	d.parts(&r, &t)
	d.overflows(&r, &t)
	alive := uint32(r.extents - r.dead)
	d.check(r.state&^stateKnown == 0 && (r.state&stateCondemned == 0 || alive == 0))
	// A damaged row has counts that cannot be trusted, but fit each other as far as this.
	d.check(r.live >= alive && (alive > 0 || r.live == 0 && r.trapped == 0))
	d.check(r.dead > 0 || r.live+r.trapped == r.blocks)
	if t.bits != nil || t.part != nil || t.over != nil {
		r.detail = &t
	}
	return r
}

func (d *decoder) bits(r *record, t *detail) {
	n := (int(r.extents) + 7) / 8
	if d.check(len(d.in) >= n); d.bad {
		return
	}
	t.bits = make([]uint64, (int(r.extents)+63)/64)
	alive := 0
	for slot := range n * 8 {
		if d.in[slot/8]>>(slot%8)&1 != 0 {
			d.check(slot < int(r.extents))
			t.bits[slot/64] |= 1 << (slot % 64)
			alive++
		}
	}
	d.check(alive == int(r.extents-r.dead))
	d.in = d.in[n:]
}

func (d *decoder) parts(r *record, t *detail) {
	n := d.uint(min(uint64(r.extents-r.dead), uint64(len(d.in)/2)))
	for next := uint64(0); n > 0 && !d.bad; n-- {
		slot := next + d.uint(block.ExtentsMax)
		left := d.uint(whole - 1)
		if d.check(left > 0 && slot < uint64(r.extents)); d.bad {
			return
		}
		d.check(r.dead == 0 || t.bits[slot/64]>>(slot%64)&1 != 0)
		t.part = append(t.part, part{uint16(slot), uint16(left)})
		next = slot + 1
	}
	d.check((len(t.part) > 0) == (r.trapped > 0) && int64(len(t.part)) <= int64(r.trapped))
}

func (d *decoder) overflows(r *record, t *detail) {
	n := d.uint(min(uint64(r.extents), uint64(len(d.in)/2)))
	for next := uint64(0); n > 0 && !d.bad; n-- {
		slot := next + d.uint(block.ExtentsMax)
		count := d.int()
		if d.check(count != 0 && slot < uint64(r.extents)); d.bad {
			return
		}
		t.over = append(t.over, overflow{uint16(slot), count})
		next = slot + 1
	}
}

// DescribeBlob prints the rows of a blob. It fails with the errors of Load, after printing what it could
// read.
func DescribeBlob(w io.Writer, b []byte) error {
	u := NewUsage()
	err := u.Load(b)
	for s := range u.Snapshot().All() {
		fmt.Fprintf(w, "usage        segment %d-%d, %d+%d on targets %v, born %d: %d of %d blocks live, %d trapped, %d of %d extents dead",
			s.ID, s.Epoch, s.K, s.M, s.Targets, s.Birth, s.LiveBlocks, s.Blocks, s.TrappedBlocks, s.DeadExtents, s.Extents)
		for _, f := range []struct {
			is   bool
			name string
		}{{s.Exceptions, "exceptions"}, {s.Condemned, "condemned"}, {s.Damaged, "damaged"}} {
			if f.is {
				fmt.Fprintf(w, ", %s", f.name)
			}
		}
		fmt.Fprintln(w)
	}
	return err
}
