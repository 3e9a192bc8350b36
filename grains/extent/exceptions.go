package extent

import (
	"errors"
	"fmt"
	"sync"

	"graindisk/block"
)

// ErrConflict means that an extent is not as the caller saw it, or not alive any more: look again.
var ErrConflict = errors.New("extent has changed")

// Kind says where an extent is.
type Kind uint8

const (
	Plain Kind = iota // where its name says
	Moved             // at To
	Same              // its content is that of the extent named To, wherever that is
)

// State is what the table says of a name. A name without an entry is Plain with one reference.
type State struct {
	Kind Kind
	// Canonical means that a Same name points here, or did: the name may not become Same itself.
	Canonical bool
	To        block.ExtentID // place or canonical name; 0 if Plain
	// Refs is the number of references to the name, at least 1 while it is in the table; a Same name
	// holds one to its canonical name. 0 in a Record: the last one has gone.
	Refs int64
}

var plain = State{Refs: 1}

// Record is a change of one name, with both states whole. A log of them can be replayed from any point
// before a checkpoint, any number of times.
type Record struct {
	Name     block.ExtentID
	Old, New State
}

// shards bound how much is rehashed at a time: a 64th.
const shards = 64

// Exceptions is the table of the extents that are not where their name says, or have more than one
// reference. Lookups may be called by any number of goroutines; changes take turns, as the pool has one
// committer of metadata. A change marks the name's segment in the usage table; Resolve reads runs only for
// names of marked segments and of those that are gone. Blocks are not its business: who drops the last reference
// tells the usage table.
//
// References are counted in the delta of a slot, ±63; what exceeds that goes to the overflow count
// beside the segment in the usage table, and the delta begins again at 0. While the slot's overflow bit
// is 0 nobody looks there.
type Exceptions struct {
	usage   *Usage
	storage Storage

	mu      sync.RWMutex // taken before usage.mu
	shards  [shards]shard
	orphans map[block.ExtentID]int64 // overflow counts of names whose segment is gone
	runs    []*run                   // spilled entries, newest first
	nextRun uint64
	stats   ExceptionStats
}

// ExceptionStats are counts of one moment.
type ExceptionStats struct {
	Entries         int    // in memory
	Bytes           int64  // of memory, filters and page indexes of the runs included
	Spilled         uint64 // entries in runs; some are superseded
	Runs            int
	OverflowUpdates uint64 // since the table was made
}

// NewExceptions makes an empty table beside a usage table. storage may be nil: then nothing is spilled.
func NewExceptions(u *Usage, storage Storage) *Exceptions {
	return &Exceptions{usage: u, storage: storage, orphans: map[block.ExtentID]int64{}, nextRun: 1}
}

func (e *Exceptions) shard(name block.ExtentID) (*shard, uint64) {
	h := mix(uint64(name))
	return &e.shards[h%shards], h
}

// Get is the state of a name. It fails only if a run cannot be read.
func (e *Exceptions) Get(name block.ExtentID) (State, error) {
	e.mu.RLock()
	defer e.mu.RUnlock()
	return e.stateLocked(name)
}

// Resolve is the place of an extent, by at most two lookups: Same, then Moved.
func (e *Exceptions) Resolve(name block.ExtentID) (block.ExtentID, error) {
	e.mu.RLock()
	defer e.mu.RUnlock()
	s, ok := e.memoryLocked(name)
	if !ok && len(e.runs) > 0 {
		if marked, there := e.usage.exceptional(name.Segment()); marked || !there {
			var err error
			if s, err = e.stateLocked(name); err != nil {
				return 0, err
			}
		}
	}
	return e.placeLocked(name, s)
}

func (e *Exceptions) placeLocked(name block.ExtentID, s State) (block.ExtentID, error) {
	if s.Kind == Same {
		name = s.To
		var err error
		if s, err = e.stateLocked(name); err != nil {
			return 0, err
		}
		if s.Kind == Same {
			return 0, fmt.Errorf("exceptions: canonical extent %v is %v itself: %w", name, s.To, ErrDamaged)
		}
	}
	if s.Kind == Moved {
		return s.To, nil
	}
	return name, nil
}

// stateLocked is Get with e.mu held, for reading at least.
func (e *Exceptions) stateLocked(name block.ExtentID) (State, error) {
	if st, ok := e.memoryLocked(name); ok {
		return st, nil
	}
	for _, r := range e.runs {
		if st, ok, err := r.get(e.storage, name); ok || err != nil {
			return st, err
		}
	}
	return plain, nil
}

// memoryLocked is the state of a name that has an entry in memory.
func (e *Exceptions) memoryLocked(name block.ExtentID) (State, bool) {
	s, h := e.shard(name)
	i := s.find(uint64(name), h)
	if i < 0 {
		return plain, false
	}
	s.touch(i)
	return e.unpackLocked(name, s.get(i)), true
}

func (e *Exceptions) unpackLocked(name block.ExtentID, x slot) State {
	st := State{Canonical: x.key&flagBit != 0, To: block.ExtentID(x.val &^ flagBit), Refs: 1 + delta(x.meta)}
	switch {
	case x.val == 0:
	case x.val&flagBit != 0:
		st.Kind = Same
	default:
		st.Kind = Moved
	}
	if x.meta&metaOverflow != 0 {
		st.Refs += e.overflowLocked(name)
	}
	return st
}

// Bits of a slot's meta.
const (
	deltaMax     = 1<<6 - 1
	metaSign     = 1 << 6
	metaOverflow = 1 << 7
)

func delta(meta uint8) int64 {
	d := int64(meta & deltaMax)
	if meta&metaSign != 0 {
		return -d
	}
	return d
}

func metaOf(d int64, overflow bool) uint8 {
	m := uint8(0)
	if d < 0 {
		d, m = -d, metaSign
	}
	if overflow {
		m |= metaOverflow
	}
	return m | uint8(d)
}

func (e *Exceptions) overflowLocked(name block.ExtentID) int64 {
	if n, ok := e.orphans[name]; ok {
		return n
	}
	return e.usage.overflowOf(name)
}

func (e *Exceptions) addOverflowLocked(name block.ExtentID, n int64) {
	if n == 0 {
		return
	}
	e.stats.OverflowUpdates++
	if _, ok := e.orphans[name]; !ok && e.usage.addOverflow(name, n) {
		return
	}
	if e.orphans[name] += n; e.orphans[name] == 0 {
		delete(e.orphans, name)
	}
}

// setLocked brings a name from its present state to another.
func (e *Exceptions) setLocked(name block.ExtentID, from, to State) {
	s, h := e.shard(name)
	i := s.find(uint64(name), h)
	if to == plain || to.Refs == 0 {
		to = plain
		if !e.spilledLocked(name) {
			if i >= 0 {
				e.addOverflowLocked(name, -e.overflowLocked(name))
				s.remove(i)
			}
			return
		}
	}
	x := slot{key: uint64(name), val: uint64(to.To)}
	if to.Canonical {
		x.key |= flagBit
	}
	if to.Kind == Same {
		x.val |= flagBit
	}
	d, over := to.Refs-1, int64(0)
	if i >= 0 {
		x.meta = s.get(i).meta
		d = delta(x.meta) + to.Refs - from.Refs
		if x.meta&metaOverflow != 0 {
			over = e.overflowLocked(name)
		}
	} else {
		e.addOverflowLocked(name, -e.overflowLocked(name)) // what an older checkpoint left
	}
	if d > deltaMax || d < -deltaMax {
		e.addOverflowLocked(name, d)
		over, d = over+d, 0
	}
	x.meta = metaOf(d, over != 0)
	if i >= 0 {
		s.put(i, x)
		s.touch(i)
	} else {
		s.insert(x)
	}
	e.usage.SetExceptions(name.Segment(), true)
}

// spilledLocked tells whether a run may say something of a name.
func (e *Exceptions) spilledLocked(name block.ExtentID) bool {
	for _, r := range e.runs {
		if r.filter.has(name) {
			return true
		}
	}
	return false
}

// aliveLocked is the present state of a name that something maps. It fails with ErrConflict if nothing
// does; then its segment may be condemned.
func (e *Exceptions) aliveLocked(name block.ExtentID) (State, error) {
	s, err := e.stateLocked(name)
	if err != nil {
		return s, err
	}
	place, err := e.placeLocked(name, s)
	if err != nil {
		return s, err
	}
	if !e.usage.Alive(place) {
		return s, fmt.Errorf("exceptions: extent %v at %v is dead: %w", name, place, ErrConflict)
	}
	return s, nil
}

// seenLocked is aliveLocked for a name that must be where it was seen.
func (e *Exceptions) seenLocked(name block.ExtentID, seen State) (State, error) {
	now, err := e.aliveLocked(name)
	if err == nil && (now.Kind != seen.Kind || now.To != seen.To) {
		err = fmt.Errorf("exceptions: extent %v is %+v, not %+v: %w", name, now, seen, ErrConflict)
	}
	return now, err
}

// Ref adds n references to a name, which must be alive (ErrConflict), or takes -n away. Taking the last
// one ends its entry, and takes away the reference that a Same name holds to its canonical name: that is
// the second record then. Taking more than there are is ErrDamaged and changes nothing.
func (e *Exceptions) Ref(name block.ExtentID, n int64) ([]Record, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	var s State
	var err error
	if n > 0 {
		s, err = e.aliveLocked(name)
	} else {
		s, err = e.stateLocked(name)
	}
	if err != nil {
		return nil, err
	}
	to := s
	if to.Refs += n; to.Refs < 0 {
		return nil, fmt.Errorf("exceptions: %d references taken from extent %v, which has %d: %w", -n, name, s.Refs, ErrDamaged)
	}
	recs := []Record{{name, s, to}}
	if to.Refs == 0 {
		recs[0].New = State{}
		if s.Kind == Same {
			c, err := e.stateLocked(s.To)
			if err != nil {
				return nil, err
			}
			less := c
			if less.Refs--; less.Refs == 0 {
				less = State{}
			}
			recs = append(recs, Record{s.To, c, less})
		}
	}
	e.applyLocked(recs)
	return recs, nil
}

func (e *Exceptions) applyLocked(recs []Record) {
	for _, r := range recs {
		e.setLocked(r.Name, r.Old, r.New)
	}
}

// Move notes that the extent of a name, whose state was seen, now lies at to. It fails with ErrConflict
// if the name was moved or became Same since, is dead, or if nothing is alive at to.
func (e *Exceptions) Move(name block.ExtentID, seen State, to block.ExtentID) (Record, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	old, err := e.seenLocked(name, seen)
	if err != nil {
		return Record{}, err
	}
	if old.Kind == Same || !e.usage.Alive(to) {
		return Record{}, fmt.Errorf("exceptions: extent %v cannot move to %v: %w", name, to, ErrConflict)
	}
	r := Record{name, old, old}
	if r.New.Kind, r.New.To = Moved, to; to == name {
		r.New.Kind, r.New.To = Plain, 0
	}
	e.applyLocked([]Record{r})
	return r, nil
}

// Same notes that the content of name is that of canonical; both states were seen. The records are the
// canonical name's, which gains a reference, and then the name's. It fails with ErrConflict if one of
// them was moved or became Same since, or is dead; or if name is Same or canonical itself, or canonical
// is Same.
func (e *Exceptions) Same(name, canonical block.ExtentID, seenName, seenCanonical State) ([]Record, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	a, err := e.seenLocked(name, seenName)
	if err != nil {
		return nil, err
	}
	c, err := e.seenLocked(canonical, seenCanonical)
	if err != nil {
		return nil, err
	}
	if name == canonical || a.Kind == Same || a.Canonical || c.Kind == Same {
		return nil, fmt.Errorf("exceptions: extent %v cannot be the same as %v: %w", name, canonical, ErrConflict)
	}
	recs := []Record{{canonical, c, c}, {name, a, a}}
	recs[0].New.Canonical = true
	recs[0].New.Refs++
	recs[1].New.Kind, recs[1].New.To = Same, canonical
	e.applyLocked(recs)
	return recs, nil
}

// Apply replays a record: whatever the state of the name, it then is r.New.
func (e *Exceptions) Apply(r Record) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	now, err := e.stateLocked(r.Name)
	if err != nil {
		return err
	}
	e.setLocked(r.Name, now, r.New)
	return nil
}

// Leave takes over the overflow counts of a segment, which is about to be removed from the usage table
// though names of it live on elsewhere.
func (e *Exceptions) Leave(id block.SegmentID) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, o := range e.usage.takeOverflows(id) {
		e.orphans[block.NewExtentID(id, int(o.slot))] += o.count
	}
}

// Stats counts.
func (e *Exceptions) Stats() ExceptionStats {
	e.mu.RLock()
	defer e.mu.RUnlock()
	s := e.stats
	for i := range e.shards {
		s.Entries += e.shards[i].n
		s.Bytes += e.shards[i].bytes()
	}
	for _, r := range e.runs {
		s.Spilled += r.entries
		s.Bytes += r.bytes()
	}
	s.Runs = len(e.runs)
	return s
}
