package extent

import (
	"slices"
	"sort"

	"graindisk/block"
)

// chunkRows is how many segments share a chunk: 8 KiB, the cost of the first change after a snapshot.
const chunkRows = 128

// record is a row: 56 bytes.
type record struct {
	id      block.SegmentID
	epoch   uint64
	birth   int64
	detail  *detail // nil while all extents are whole or all are dead
	blocks  uint32
	live    uint32
	trapped uint32
	kind    uint32 // index into View.kinds
	extents uint16
	dead    uint16
	state   uint8
}

const (
	stateExceptions = 1 << iota
	stateCondemned
	stateDamaged
	stateKnown = 1<<iota - 1
)

// kind is what many segments have in common. It is never changed.
type kind struct {
	k, m    uint8
	targets []block.TargetID
}

func (a kind) equal(b kind) bool {
	return a.k == b.k && a.m == b.m && slices.Equal(a.targets, b.targets)
}

// detail is what a row has once its extents differ.
type detail struct {
	gen  uint64
	bits []uint64   // of the extents alive; nil while all or none are
	part []part     // extents that are partly mapped, by slot
	over []overflow // see Exceptions, by slot
}

type part struct{ slot, left uint16 }

type overflow struct {
	slot  uint16
	count int64
}

// kill clears the bit of a slot.
func (d *detail) kill(slot, extents int) {
	if d.bits == nil {
		d.bits = make([]uint64, (extents+63)/64)
		for i := range extents {
			d.bits[i/64] |= 1 << (i % 64)
		}
	}
	d.bits[slot/64] &^= 1 << (slot % 64)
}

func (r *record) alive(slot int) bool {
	switch {
	case slot >= int(r.extents) || r.dead == r.extents:
		return false
	case r.dead == 0:
		return true
	}
	return r.detail.bits[slot/64]>>(slot%64)&1 != 0
}

// isDead tells whether the segment could be deleted as far as this table knows.
func (r *record) isDead() bool { return r.dead == r.extents && r.state&stateDamaged == 0 }

// partly finds the slot among the extents that are partly mapped, or where it would be.
func (r *record) partly(slot int) (int, bool) {
	if r.detail == nil {
		return 0, false
	}
	ps := r.detail.part
	i := sort.Search(len(ps), func(i int) bool { return int(ps[i].slot) >= slot })
	return i, i < len(ps) && int(ps[i].slot) == slot
}

// whole is what left says of an extent with nothing lost; the table does not know its size.
const whole = 1<<16 - 1

// left is how many blocks of an alive extent are mapped, or whole; 0 for a dead one.
func (r *record) left(slot int) int {
	if !r.alive(slot) {
		return 0
	}
	if i, ok := r.partly(slot); ok {
		return int(r.detail.part[i].left)
	}
	return whole
}

// add adds the row n times.
func (t *Totals) add(r *record, n int) {
	t.Segments += n
	if r.isDead() {
		t.DeadSegments += n
	}
	if r.state&stateDamaged != 0 {
		t.Damaged += n
	}
	t.Blocks += uint64(n) * uint64(r.blocks)
	t.LiveBlocks += uint64(n) * uint64(r.live)
	t.TrappedBlocks += uint64(n) * uint64(r.trapped)
}

// chunk is rows by segment, never empty.
type chunk struct {
	gen  uint64
	rows []record
}

// View is a usage table that does not change any more. Safe for concurrent use.
type View struct {
	chunks []*chunk // by segment
	kinds  []kind   // only ever appended to
	sum    Totals
}

// where finds a segment: the chunk it is or would be in, its place there, and whether it is there.
func (v *View) where(id block.SegmentID) (c, i int, ok bool) {
	c = sort.Search(len(v.chunks), func(c int) bool { return v.chunks[c].rows[0].id > id })
	if c == 0 {
		return 0, 0, false
	}
	c--
	rows := v.chunks[c].rows
	i = sort.Search(len(rows), func(i int) bool { return rows[i].id >= id })
	return c, i, i < len(rows) && rows[i].id == id
}

// find is the row of a segment, for reading only; nil if there is none.
func (v *View) find(id block.SegmentID) *record {
	c, i, ok := v.where(id)
	if !ok {
		return nil
	}
	return &v.chunks[c].rows[i]
}

// each walks the rows by segment until fn returns false.
func (v *View) each(fn func(*record) bool) {
	for _, c := range v.chunks {
		for i := range c.rows {
			if !fn(&c.rows[i]) {
				return
			}
		}
	}
}

// chunkLocked is a chunk that may be changed.
func (u *Usage) chunkLocked(c int) *chunk {
	if old := u.v.chunks[c]; old.gen != u.gen {
		u.v.chunks[c] = &chunk{gen: u.gen, rows: slices.Clone(old.rows)}
	}
	return u.v.chunks[c]
}

// rowLocked is the row of a segment, for changing all but its detail; nil if there is none.
func (u *Usage) rowLocked(id block.SegmentID) *record {
	c, i, ok := u.v.where(id)
	if !ok {
		return nil
	}
	return &u.chunkLocked(c).rows[i]
}

// detailLocked is the detail of a row from rowLocked, for changing.
func (u *Usage) detailLocked(r *record) *detail {
	switch {
	case r.detail == nil:
		r.detail = &detail{gen: u.gen}
	case r.detail.gen != u.gen:
		d := r.detail
		r.detail = &detail{gen: u.gen, bits: slices.Clone(d.bits), part: slices.Clone(d.part), over: slices.Clone(d.over)}
	}
	return r.detail
}

// insertLocked puts in a row that is not there.
func (u *Usage) insertLocked(r record) {
	c, i, _ := u.v.where(r.id)
	last := len(u.v.chunks) - 1
	if last < 0 || c == last && i == chunkRows {
		u.v.chunks = append(u.v.chunks, &chunk{gen: u.gen, rows: []record{r}})
		return
	}
	k := u.chunkLocked(c)
	if len(k.rows) == chunkRows {
		half := &chunk{gen: u.gen, rows: slices.Clone(k.rows[chunkRows/2:])}
		k.rows = k.rows[:chunkRows/2]
		u.v.chunks = slices.Insert(u.v.chunks, c+1, half)
		if i > chunkRows/2 {
			k, i = half, i-chunkRows/2
		}
	}
	k.rows = slices.Insert(k.rows, i, r)
}

// deleteLocked takes out a row that is there.
func (u *Usage) deleteLocked(id block.SegmentID) {
	c, i, _ := u.v.where(id)
	k := u.chunkLocked(c)
	if k.rows = slices.Delete(k.rows, i, i+1); len(k.rows) == 0 {
		u.v.chunks = slices.Delete(u.v.chunks, c, c+1)
	}
}

// overflow finds the overflow count of a slot, or where it would be.
func (d *detail) overflow(slot int) (int, bool) {
	i := sort.Search(len(d.over), func(i int) bool { return int(d.over[i].slot) >= slot })
	return i, i < len(d.over) && int(d.over[i].slot) == slot
}
