package extent

import (
	"errors"
	"fmt"
	"slices"
	"sync"

	"graindisk/block"
)

var (
	// ErrDamaged means counts that contradict each other or what was reported, or bytes that no table
	// has written.
	ErrDamaged = errors.New("damaged extent counts")
	// ErrNewer means a table written by a newer version of the format.
	ErrNewer = errors.New("usage table is newer than this program")
	// ErrInUse means that a segment cannot be condemned or removed, because something needs it.
	ErrInUse = errors.New("segment in use")
)

// Bounds of a stripe.
const (
	dataMax   = 16
	parityMax = 4
)

// Segment is what never changes about a stored segment, but for a repair of its targets.
type Segment struct {
	ID      block.SegmentID
	Epoch   uint64
	K, M    uint8            // data and parity shards: 1..16, 0..4
	Targets []block.TargetID // k+m; 0 = that shard is not stored
	Birth   int64            // when it was published, seconds since 1970; 0 = unknown
	Extents uint32           // at most block.ExtentsMax
	Blocks  uint32           // of all extents
}

func (s Segment) validate() error {
	switch {
	case s.ID == 0 || s.ID >= block.SegmentMax:
		return fmt.Errorf("segment number %d out of range", s.ID)
	case s.K < 1 || s.K > dataMax || s.M > parityMax || len(s.Targets) != int(s.K)+int(s.M):
		return fmt.Errorf("segment %d: %d targets for profile %d+%d", s.ID, len(s.Targets), s.K, s.M)
	case s.Extents > block.ExtentsMax || s.Blocks < s.Extents || uint64(s.Blocks) > uint64(s.Extents)*(1<<16-1):
		return fmt.Errorf("segment %d: %d blocks in %d extents", s.ID, s.Blocks, s.Extents)
	}
	return nil
}

// SegmentUsage is one row of the table. Blocks - LiveBlocks - TrappedBlocks of it are dead.
type SegmentUsage struct {
	Segment
	LiveBlocks    uint32
	TrappedBlocks uint32
	DeadExtents   uint32
	Exceptions    bool // some extent of it has an entry in the table of exceptions
	Condemned     bool // about to be deleted: nothing may refer to it any more
	Damaged       bool // its counts contradicted what was reported
}

// Loss is blocks of an extent that no tree entry maps any longer.
type Loss struct {
	Extent block.ExtentID
	Orig   uint16 // blocks of the whole extent when it was stored
	Blocks uint16 // at least 1
}

// Totals are sums over all segments. Blocks - LiveBlocks - TrappedBlocks are dead.
type Totals struct {
	Segments      int
	DeadSegments  int // with nothing alive; damaged ones do not count
	Damaged       int
	Blocks        uint64
	LiveBlocks    uint64
	TrappedBlocks uint64
}

// Usage is the segment usage table. All methods are safe for concurrent use.
type Usage struct {
	mu  sync.RWMutex
	v   View
	gen uint64 // chunks and details of an older one may be shared with a View
}

// NewUsage makes an empty table.
func NewUsage() *Usage { return &Usage{gen: 1} }

// Add takes in a segment, all of it alive. It fails with ErrDamaged if the table has the segment
// already or s makes no sense.
func (u *Usage) Add(s Segment) error {
	return u.add(s, record{live: s.Blocks})
}

// add takes in a segment with the counts of r.
func (u *Usage) add(s Segment, r record) error {
	if err := s.validate(); err != nil {
		return fmt.Errorf("usage: add: %w: %w", ErrDamaged, err)
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.v.find(s.ID) != nil {
		return fmt.Errorf("usage: add: segment %d is there already: %w", s.ID, ErrDamaged)
	}
	r.id, r.epoch, r.birth, r.extents, r.blocks = s.ID, s.Epoch, s.Birth, uint16(s.Extents), s.Blocks
	r.kind = u.internLocked(kind{s.K, s.M, s.Targets})
	u.insertLocked(r)
	u.v.sum.add(&r, 1)
	return nil
}

// internLocked is the number of a kind; segments share few.
func (u *Usage) internLocked(k kind) uint32 {
	for i := len(u.v.kinds) - 1; i >= 0; i-- {
		if u.v.kinds[i].equal(k) {
			return uint32(i)
		}
	}
	k.targets = slices.Clone(k.targets)
	u.v.kinds = append(u.v.kinds, k)
	return uint32(len(u.v.kinds) - 1)
}

// SetTargets notes where a segment's shards are after a repair. It fails with ErrDamaged if there is no
// such segment or targets are not as many as it has shards.
func (u *Usage) SetTargets(id block.SegmentID, targets []block.TargetID) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	r := u.rowLocked(id)
	if r == nil || len(targets) != len(u.v.kinds[r.kind].targets) {
		return fmt.Errorf("usage: %d targets for segment %d: %w", len(targets), id, ErrDamaged)
	}
	k := u.v.kinds[r.kind]
	r.kind = u.internLocked(kind{k.k, k.m, targets})
	return nil
}

// damagesMax is how many errors one call of Lost names.
const damagesMax = 8

// Lost counts blocks out. All of ls is counted that can be; what would bring a count below zero, or kill
// an extent twice, is left out, marks the segment as damaged and is reported once per segment, as an
// ErrDamaged.
func (u *Usage) Lost(ls []Loss) error {
	_, err := u.Lose(ls)
	return err
}

// Lose is Lost that also tells which extents died of it, each by the loss of its last block: nothing
// maps any of their blocks from here on.
func (u *Usage) Lose(ls []Loss) (dead []Loss, err error) {
	var errs []error
	u.mu.Lock()
	defer u.mu.Unlock()
	for _, l := range ls {
		died, err := u.loseLocked(l)
		if err != nil && len(errs) < damagesMax {
			errs = append(errs, err)
		}
		if died {
			dead = append(dead, l)
		}
	}
	return dead, errors.Join(errs...)
}

func (u *Usage) loseLocked(l Loss) (died bool, err error) {
	r := u.rowLocked(l.Extent.Segment())
	if r == nil {
		return false, fmt.Errorf("usage: %d blocks of extent %v lost: no such segment: %w", l.Blocks, l.Extent, ErrDamaged)
	}
	was := *r
	err = u.countOutLocked(r, l)
	if err != nil && was.state&stateDamaged == 0 {
		r.state |= stateDamaged
	}
	u.v.sum.add(&was, -1)
	u.v.sum.add(r, 1)
	if err == nil || was.state&stateDamaged != 0 {
		return r.dead > was.dead, nil // an error was reported when it was found
	}
	return false, fmt.Errorf("usage: %d of %d blocks of extent %v lost: %w: %w", l.Blocks, l.Orig, l.Extent, ErrDamaged, err)
}

// countOutLocked applies a loss to its row, or says why it cannot be.
func (u *Usage) countOutLocked(r *record, l Loss) error {
	slot := l.Extent.Slot()
	if slot >= int(r.extents) || l.Blocks == 0 || l.Blocks > l.Orig {
		return fmt.Errorf("the segment has %d extents", r.extents)
	}
	if !r.alive(slot) {
		return errors.New("it was dead already")
	}
	left, trapped := l.Orig, uint16(0)
	i, partly := r.partly(slot)
	if partly {
		left = r.detail.part[i].left
		trapped = l.Orig - left
	}
	switch {
	case partly && left >= l.Orig:
		return fmt.Errorf("it had %d blocks left", left)
	case l.Blocks > left || uint32(l.Blocks) > r.live:
		return fmt.Errorf("it had %d blocks left, its segment %d", left, r.live)
	case uint32(trapped) > r.trapped:
		return fmt.Errorf("%d of its blocks are trapped, %d of its segment", trapped, r.trapped)
	}
	dies := l.Blocks == left
	extents, live := uint32(r.extents-r.dead), r.live-uint32(l.Blocks) // alive after this
	if dies {
		extents--
	}
	if live < extents || extents == 0 && live > 0 {
		return fmt.Errorf("that leaves %d blocks in %d extents", live, extents)
	}
	r.live -= uint32(l.Blocks)
	d := u.detailLocked(r)
	switch {
	case dies:
		r.trapped -= uint32(trapped)
		r.dead++
		if partly {
			d.part = slices.Delete(d.part, i, i+1)
		}
		d.kill(slot, int(r.extents))
		if r.dead == r.extents && len(d.over) == 0 {
			r.detail = nil
		}
	case partly:
		d.part[i].left -= l.Blocks
		r.trapped += uint32(l.Blocks)
	default:
		d.part = slices.Insert(d.part, i, part{slot: uint16(slot), left: left - l.Blocks})
		r.trapped += uint32(l.Blocks)
	}
	return nil
}

// Distrust marks a segment's row as damaged: it is neither dead nor a candidate from here on.
func (u *Usage) Distrust(id block.SegmentID) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if r := u.rowLocked(id); r != nil {
		u.v.sum.add(r, -1)
		r.state |= stateDamaged
		u.v.sum.add(r, 1)
	}
}

// Condemn marks a segment as about to be deleted: from here on nothing may come to refer to it. It fails
// with ErrInUse while an extent of it is alive or its row is damaged.
func (u *Usage) Condemn(id block.SegmentID) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	r := u.rowLocked(id)
	if r == nil || !r.isDead() {
		return fmt.Errorf("usage: condemn segment %d: %w", id, ErrInUse)
	}
	r.state |= stateCondemned
	return nil
}

// Remove forgets a condemned segment, once its shards are deleted. It fails with ErrInUse for any other,
// and while the row has overflow counts: see Exceptions.Leave.
func (u *Usage) Remove(id block.SegmentID) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	r := u.v.find(id)
	if r == nil || r.state&stateCondemned == 0 || r.detail != nil && len(r.detail.over) > 0 {
		return fmt.Errorf("usage: remove segment %d: %w", id, ErrInUse)
	}
	u.v.sum.add(r, -1)
	u.deleteLocked(id)
	return nil
}

// SetExceptions says whether some extent of a segment has an entry in the table of exceptions. A segment
// that is not there needs no mark: its names are looked up always.
func (u *Usage) SetExceptions(id block.SegmentID, yes bool) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if r := u.v.find(id); r == nil || r.state&stateExceptions != 0 == yes {
		return
	}
	u.rowLocked(id).state ^= stateExceptions
}

// Segment is the row of one segment.
func (u *Usage) Segment(id block.SegmentID) (SegmentUsage, bool) {
	u.mu.RLock()
	defer u.mu.RUnlock()
	return u.v.Segment(id)
}

// Alive tells whether some block of the extent stored in a place is mapped.
func (u *Usage) Alive(place block.ExtentID) bool {
	u.mu.RLock()
	defer u.mu.RUnlock()
	return u.v.Alive(place)
}

// Totals sums up the table.
func (u *Usage) Totals() Totals {
	u.mu.RLock()
	defer u.mu.RUnlock()
	return u.v.sum
}

// Dead lists the segments with nothing alive in them, ascending. Damaged rows are not among them.
func (u *Usage) Dead() []block.SegmentID {
	u.mu.RLock()
	defer u.mu.RUnlock()
	return u.v.Dead()
}

// Snapshot is the table of this moment. It costs a pointer per 128 segments.
func (u *Usage) Snapshot() View {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.gen++
	v := u.v
	v.chunks = slices.Clone(v.chunks)
	return v
}

// overflowOf is the overflow count of an extent name, kept beside the segment it was born in; 0 if there
// is none, or no such segment.
func (u *Usage) overflowOf(name block.ExtentID) int64 {
	u.mu.RLock()
	defer u.mu.RUnlock()
	r := u.v.find(name.Segment())
	if r == nil || r.detail == nil {
		return 0
	}
	i, ok := r.detail.overflow(name.Slot())
	if !ok {
		return 0
	}
	return r.detail.over[i].count
}

// addOverflow adds n to the overflow count of a name; false if its segment is not there.
func (u *Usage) addOverflow(name block.ExtentID, n int64) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	r := u.rowLocked(name.Segment())
	if r == nil || name.Slot() >= int(r.extents) {
		return false
	}
	d := u.detailLocked(r)
	i, ok := d.overflow(name.Slot())
	if !ok {
		d.over = slices.Insert(d.over, i, overflow{slot: uint16(name.Slot())})
	}
	if d.over[i].count += n; d.over[i].count == 0 {
		d.over = slices.Delete(d.over, i, i+1)
	}
	if len(d.over)+len(d.part) == 0 && (r.dead == 0 || r.dead == r.extents) {
		r.detail = nil
	}
	return true
}

// exceptional tells whether a segment is marked as having exceptions, and whether it is there.
func (u *Usage) exceptional(id block.SegmentID) (marked, ok bool) {
	u.mu.RLock()
	defer u.mu.RUnlock()
	r := u.v.find(id)
	return r != nil && r.state&stateExceptions != 0, r != nil
}

// takeOverflows removes the overflow counts of a segment and returns them.
func (u *Usage) takeOverflows(id block.SegmentID) []overflow {
	u.mu.Lock()
	defer u.mu.Unlock()
	r := u.rowLocked(id)
	if r == nil || r.detail == nil {
		return nil
	}
	d := u.detailLocked(r)
	over := d.over
	d.over = nil
	return over
}
