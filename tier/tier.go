// Package tier divides the local SSD into equal slots, the files in which the log and the cache
// keep their blocks. A slot is taken whole, filled, and given back whole.
//
//	       Take                    SetClean                  (oldest first)
//	free ────────► busy ─────────────────────────► clean ────────────────────► busy
//	  ▲             │ Free                           │ Free      Take: evicted
//	  └─────────────┴────────────────────────────────┘
//
// A busy slot holds bytes that exist nowhere else, or is being filled. A clean slot holds only bytes
// that can be had from the targets; Take may evict it, after telling the holder of its index and only
// while no reader has it pinned. A slot's file, slot-NNNNNN, is written over its full length once
// (Prewrite) and then reused in place, so that filling it changes no file-system metadata.
package tier

import (
	"errors"
	"fmt"
	"io/fs"
	"path"
	"sync"
	"sync/atomic"
	"time"

	"graindisk/block"
	"graindisk/internal/vfs"
)

// Place is one block on the tier: slot<<32 | block within the slot.
type Place uint64

// NewPlace names block blk of slot.
func NewPlace(slot int, blk uint32) Place { return Place(uint64(slot)<<32 | uint64(blk)) }

// Slot is the slot of the place.
func (p Place) Slot() int { return int(p >> 32) }

// Block is the block within the slot.
func (p Place) Block() uint32 { return uint32(p) }

// SlotsMax bounds the number of slots.
const SlotsMax = 1 << 20

// ErrNoSlot means that every slot is busy or pinned.
var ErrNoSlot = errors.New("no free slot on the tier")

// Options configure a Space.
type Options struct {
	FS        vfs.FS
	Dir       string // exists
	SlotBytes int64  // multiple of block.Size, at least 4 blocks
	Slots     int    // 4..SlotsMax
}

// Space is the slots of one tier. All methods are safe for concurrent use, except that bytes of one
// slot are written by its taker alone.
type Space struct {
	fs        vfs.FS
	dir       string
	slotBytes int64
	slots     []slot

	mu    sync.Mutex
	free  []int // stack
	clean []int // oldest first; entries whose slot is no longer clean are skipped
	state []state
	made  []bool    // the file exists and has its full length
	evict func(int) // told before a clean slot changes hands
	// retired holds, per slot, the files that Replace took away, for who still reads them.
	retired map[int][]vfs.File
}

type slot struct {
	mu   sync.Mutex // guards opening
	file atomic.Pointer[vfs.File]
	pins atomic.Int64 // readers; negative while the slot changes hands
}

type state uint8

const (
	stateFree state = iota
	stateBusy
	stateClean
)

// evicting is added to pins while a slot changes hands, so that no pin can succeed.
const evicting = -1 << 40

// Open lists the slots of a tier. Existing slot files count as free until SetBusy or SetClean claims
// them, which recovery does before the first Take. Files beyond Slots are left alone and unused.
func Open(o Options) (*Space, error) {
	if o.SlotBytes < 4*block.Size || o.SlotBytes%block.Size != 0 {
		return nil, fmt.Errorf("tier: slot size %d: must be a multiple of %d and at least %d", o.SlotBytes, block.Size, 4*block.Size)
	}
	if o.Slots < 4 || o.Slots > SlotsMax {
		return nil, fmt.Errorf("tier: %d slots: must be 4 to %d", o.Slots, SlotsMax)
	}
	names, err := o.FS.ReadDir(o.Dir)
	if err == nil {
		err = o.FS.SyncDir(o.Dir) // the last process may have died between making a file and this
	}
	if err != nil {
		return nil, fmt.Errorf("tier: %w", err)
	}
	n := o.Slots
	for _, e := range names {
		if i, ok := parseName(e.Name()); ok && i >= n && i < SlotsMax {
			n = i + 1 // a smaller tier than before: what lies beyond may still hold dirty blocks
		}
	}
	s := &Space{
		fs: o.FS, dir: o.Dir, slotBytes: o.SlotBytes,
		slots: make([]slot, n), state: make([]state, n), made: make([]bool, n),
		retired: map[int][]vfs.File{},
	}
	for _, e := range names {
		i, ok := parseName(e.Name())
		if !ok || i >= n {
			continue
		}
		f, err := s.file(i)
		if err != nil {
			return nil, err
		}
		size, err := f.Size()
		if err != nil {
			return nil, fmt.Errorf("tier: %w", err)
		}
		s.made[i] = size == s.slotBytes
	}
	for i := o.Slots - 1; i >= 0; i-- {
		s.free = append(s.free, i)
	}
	return s, nil
}

// SlotBytesOf is the slot size of the tier in dir, which stays what it was when the tier was made: the
// length of its longest slot file, or 0 if it has none.
func SlotBytesOf(fsys vfs.FS, dir string) (longest int64, err error) {
	names, err := fsys.ReadDir(dir)
	if err != nil {
		return 0, fmt.Errorf("tier: %w", err)
	}
	for _, e := range names {
		if _, ok := parseName(e.Name()); !ok {
			continue
		}
		f, err := fsys.Open(path.Join(dir, e.Name()))
		if err != nil {
			return 0, fmt.Errorf("tier: %w", err)
		}
		size, err := f.Size()
		if err = errors.Join(err, f.Close()); err != nil {
			return 0, fmt.Errorf("tier: %w", err)
		}
		longest = max(longest, size)
	}
	return longest, nil
}

// Name is the file name of a slot.
func Name(slot int) string { return fmt.Sprintf("slot-%06d", slot) }

func parseName(name string) (slot int, ok bool) {
	n, err := fmt.Sscanf(name, "slot-%06d", &slot)
	return slot, err == nil && n == 1 && Name(slot) == name
}

// SlotBytes is the length of a slot.
func (s *Space) SlotBytes() int64 { return s.slotBytes }

// SlotBlocks is the length of a slot in blocks.
func (s *Space) SlotBlocks() int { return int(s.slotBytes / block.Size) }

// Slots is how many slots there are, counting files that a larger tier left behind.
func (s *Space) Slots() int { return len(s.slots) }

// Exists tells whether the slot has a file of full length.
func (s *Space) Exists(slot int) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.made[slot]
}

// OnEvict registers the function told when a clean slot is about to change hands; after it returns,
// nobody may look for bytes in that slot. It is called without locks held, before the first Take.
func (s *Space) OnEvict(f func(slot int)) { s.evict = f }

// Counts reports how many slots are free, busy and clean.
func (s *Space) Counts() (free, busy, clean int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	free = len(s.free)
	for _, st := range s.state {
		switch st {
		case stateBusy:
			busy++
		case stateClean:
			clean++
		}
	}
	return free, busy, clean
}

// Busy tells whether a slot is busy.
func (s *Space) Busy(slot int) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.state[slot] == stateBusy
}

// Take hands out a free slot, or the oldest clean one that nobody reads, leaving at least reserve
// slots free or clean for others; ErrNoSlot if there is none.
func (s *Space) Take(reserve int) (int, error) {
	s.mu.Lock()
	if reserve > 0 && s.availableLocked() <= reserve {
		s.mu.Unlock()
		return 0, ErrNoSlot
	}
	if n := len(s.free); n > 0 {
		i := s.free[n-1]
		s.free = s.free[:n-1]
		s.state[i] = stateBusy
		s.mu.Unlock()
		s.closeRetired(i)
		return i, nil
	}
	victim := -1
	for at, i := range s.clean {
		if s.slots[i].pins.CompareAndSwap(0, evicting) {
			victim = i
			s.clean = append(s.clean[:at], s.clean[at+1:]...)
			break
		}
	}
	if victim < 0 {
		s.mu.Unlock()
		return 0, ErrNoSlot
	}
	s.state[victim] = stateBusy
	s.mu.Unlock()
	if s.evict != nil {
		s.evict(victim)
	}
	s.closeRetired(victim)
	s.slots[victim].pins.Add(-evicting)
	return victim, nil
}

func (s *Space) availableLocked() int { return len(s.free) + len(s.clean) }

// SetBusy claims a slot whose bytes must be kept. Recovery uses it; the slot may be free or clean.
func (s *Space) SetBusy(slot int) { s.set(slot, stateBusy) }

// SetClean says that a slot may be evicted; slots are evicted in the order of these calls.
func (s *Space) SetClean(slot int) { s.set(slot, stateClean) }

// Free gives a busy slot back. Its bytes are not looked for any more.
func (s *Space) Free(slot int) { s.set(slot, stateFree) }

func (s *Space) set(slot int, to state) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch s.state[slot] {
	case to:
		return
	case stateFree:
		s.free = without(s.free, slot)
	case stateClean:
		s.clean = without(s.clean, slot)
	}
	s.state[slot] = to
	switch to {
	case stateFree:
		s.free = append(s.free, slot)
	case stateClean:
		s.clean = append(s.clean, slot)
	}
}

func without(list []int, v int) []int {
	for i, x := range list {
		if x == v {
			return append(list[:i], list[i+1:]...)
		}
	}
	return list
}

// Prewrite gives a slot's file its full length in written, stable bytes; it returns at once when the
// file has it already. On failure the file may be left short and the slot must be freed.
func (s *Space) Prewrite(slot int) error {
	return s.prewrite(slot, func(time.Duration) {})
}

func (s *Space) prewrite(slot int, pace func(took time.Duration)) error {
	if s.Exists(slot) {
		return nil
	}
	f, err := s.create(slot)
	if err != nil {
		return fmt.Errorf("tier: create %s: %w", path.Join(s.dir, Name(slot)), err)
	}
	if err := s.fill(f, pace); err != nil {
		return fmt.Errorf("tier: fill %s: %w", path.Join(s.dir, Name(slot)), err)
	}
	if err := errors.Join(f.Sync(), s.fs.SyncDir(s.dir)); err != nil {
		return fmt.Errorf("tier: sync %s: %w", path.Join(s.dir, Name(slot)), err)
	}
	s.mu.Lock()
	s.made[slot] = true
	s.mu.Unlock()
	return nil
}

// create returns the slot's file, made if it is missing and kept if it is there: readers of a short
// file left by a smaller slot size do not exist, and its name is already stable.
func (s *Space) create(slot int) (vfs.File, error) {
	f, err := s.file(slot)
	if !errors.Is(err, fs.ErrNotExist) {
		return f, err
	}
	sl := &s.slots[slot]
	sl.mu.Lock()
	defer sl.mu.Unlock()
	f, err = s.fs.Create(path.Join(s.dir, Name(slot)))
	if err != nil {
		return nil, err
	}
	sl.file.Store(&f)
	return f, nil
}

func (s *Space) file(slot int) (vfs.File, error) {
	sl := &s.slots[slot]
	if f := sl.file.Load(); f != nil {
		return *f, nil
	}
	sl.mu.Lock()
	defer sl.mu.Unlock()
	if f := sl.file.Load(); f != nil {
		return *f, nil
	}
	f, err := s.fs.Open(path.Join(s.dir, Name(slot)))
	if err != nil {
		return nil, fmt.Errorf("tier: %w", err)
	}
	sl.file.Store(&f)
	return f, nil
}

// Pin keeps a slot from being evicted until Unpin; false while it is changing hands.
func (s *Space) Pin(slot int) bool {
	p := &s.slots[slot].pins
	for {
		v := p.Load()
		if v < 0 {
			return false
		}
		if p.CompareAndSwap(v, v+1) {
			return true
		}
	}
}

// Unpin undoes one Pin.
func (s *Space) Unpin(slot int) { s.slots[slot].pins.Add(-1) }

// ReadAt fills p, whole blocks, from the place on. The caller holds a pin or owns the slot, and
// checks what it gets.
func (s *Space) ReadAt(at Place, p []byte) error {
	f, err := s.file(at.Slot())
	if err != nil {
		return err
	}
	if _, err := f.ReadAt(p, int64(at.Block())*block.Size); err != nil {
		return fmt.Errorf("tier: read %s block %d: %w", Name(at.Slot()), at.Block(), err)
	}
	return nil
}

// WriteAt writes the buffers back to back from the place on; the caller took the slot and stays
// within it. The slice of buffers may be modified.
func (s *Space) WriteAt(at Place, bufs [][]byte) error {
	f, err := s.file(at.Slot())
	if err != nil {
		return err
	}
	if err := f.WritevAt(bufs, int64(at.Block())*block.Size); err != nil {
		return fmt.Errorf("tier: write %s block %d: %w", Name(at.Slot()), at.Block(), err)
	}
	return nil
}

// Sync makes what was written to the slot stable.
func (s *Space) Sync(slot int) error {
	f, err := s.file(slot)
	if err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return fmt.Errorf("tier: sync %s: %w", Name(slot), err)
	}
	return nil
}

// Close closes the files. No other call may be under way.
func (s *Space) Close() error {
	var errs []error
	for i := range s.slots {
		if f := s.slots[i].file.Load(); f != nil {
			errs = append(errs, (*f).Close())
		}
		errs = append(errs, closeAll(s.retired[i]))
	}
	return errors.Join(errs...)
}
