// Package tier divides the local SSD into equal slots, the files in which the log and the cache
// keep their blocks. A slot is taken whole, filled, and given back whole.
//
//	       Take              SetClean, SetKept             Take: the oldest clean one,
//	free ────────► busy ─────────────────────────► clean ────────────────────► busy
//	  ▲             │ Free                           │       then the oldest kept one
//	  └─────────────┴────────────────────────────────┘ Free, Evict
//
// A busy slot holds bytes that exist nowhere else, or is being filled. A clean slot holds only bytes
// that can be had from the targets; it may be evicted, after telling the holder of its index and only
// while no reader has it pinned. A kept slot is a clean one that goes last. Whoever holds the index
// should evict in time, by his own judgement, so that Take finds free slots: OnTake tells him.
//
// A slot's file, slot-NNNNNN, is written over its full length once (Prewrite) and then reused in
// place, so that filling it changes no file-system metadata. Reclaim gives the space of surplus free
// slots back to the file system: their files are cut to nothing, and prewritten again before use.
//
// What the slots of an existing tier hold, only recovery knows. Until Claimed says that it has claimed all
// it needs, no slot changes hands and no file shrinks: an open that fails leaves the tier as it was.
//
// A tier that was larger at the last start has files beyond Slots. Those that recovery claims stay
// until they are clean or free; then they, and at once all others, are evicted, and Reclaim removes
// their files. They are never taken.
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

	usable int // slots below it are taken, those above are what a larger tier left

	evict func(int) // told before a clean slot changes hands
	taken func(int) // told how many slots are free, after each Take

	mu    sync.Mutex
	free  []int // stack, of usable slots
	clean []int // oldest first
	kept  []int // oldest first
	busy  int
	// claimed says that slots which are neither busy nor clean hold nothing that anybody needs.
	claimed bool
	state   []state
	made    []bool // the file exists and has its full length
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
	stateKept
)

// evicting is added to pins while a slot changes hands, so that no pin can succeed.
const evicting = -1 << 40

// Open lists the slots of a tier. Existing slot files count as free until SetBusy or SetClean claims
// them, which recovery does; until it calls Claimed, Take finds no slot, Evict and Reclaim do nothing.
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
		fs: o.FS, dir: o.Dir, slotBytes: o.SlotBytes, usable: o.Slots,
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

// Usable is how many slots may be taken: those that Options asked for.
func (s *Space) Usable() int { return s.usable }

// Exists tells whether the slot has a file of full length.
func (s *Space) Exists(slot int) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.made[slot]
}

// OnEvict registers the function told when a clean slot is about to change hands; after it returns,
// nobody may look for bytes in that slot. It is called without locks held. Register before the first Take.
func (s *Space) OnEvict(f func(slot int)) { s.evict = f }

// OnTake registers the function told after each Take how many slots are still free. It is called
// without locks held and must not wait. Register before the first Take.
func (s *Space) OnTake(f func(free int)) { s.taken = f }

// Counts reports how many usable slots are free, how many slots are busy, and how many usable ones are
// clean, the kept ones among these.
func (s *Space) Counts() (free, busy, clean int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.free), s.busy, len(s.clean) + len(s.kept)
}

// Kept reports how many slots are kept.
func (s *Space) Kept() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.kept)
}

// Busy tells whether a slot is busy.
func (s *Space) Busy(slot int) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.state[slot] == stateBusy
}

// Clean tells whether a slot is clean or kept.
func (s *Space) Clean(slot int) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.state[slot] == stateClean || s.state[slot] == stateKept
}

// Take hands out a free slot, or the oldest clean one that nobody reads, or the oldest such kept one,
// leaving at least reserve slots free or clean for others; ErrNoSlot if there is none.
func (s *Space) Take(reserve int) (int, error) {
	s.mu.Lock()
	if !s.spareLocked(reserve) {
		s.mu.Unlock()
		return 0, ErrNoSlot
	}
	i, evicted := s.takeLocked()
	free := len(s.free)
	s.mu.Unlock()
	if i < 0 {
		return 0, ErrNoSlot
	}
	if evicted {
		s.leave(i)
	} else {
		s.closeRetired(i)
	}
	if s.taken != nil {
		s.taken(free)
	}
	return i, nil
}

// spareLocked tells whether a slot may be taken such that reserve are left.
func (s *Space) spareLocked(reserve int) bool {
	return s.claimed && (reserve <= 0 || len(s.free)+len(s.clean)+len(s.kept) > reserve)
}

// takeLocked makes a slot busy; -1 if there is none. An evicted one is still to leave.
func (s *Space) takeLocked() (slot int, evicted bool) {
	if n := len(s.free); n > 0 {
		i := s.free[n-1]
		s.setLocked(i, stateBusy)
		return i, false
	}
	for _, list := range [][]int{s.clean, s.kept} {
		for _, i := range list {
			if s.slots[i].pins.CompareAndSwap(0, evicting) {
				s.setLocked(i, stateBusy)
				return i, true
			}
		}
	}
	return -1, false
}

// leave ends the tenure of a slot that was marked as evicting.
func (s *Space) leave(slot int) {
	if s.evict != nil {
		s.evict(slot)
	}
	s.closeRetired(slot)
	s.slots[slot].pins.Add(-evicting)
}

// Oldest is the slot that is clean, or kept, for the longest time; false if there is none.
func (s *Space) Oldest(kept bool) (slot int, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	list := s.clean
	if kept {
		list = s.kept
	}
	if len(list) == 0 {
		return 0, false
	}
	return list[0], true
}

// Evict makes a clean or kept slot free; false if it is neither, or pinned, or nothing changes hands yet.
func (s *Space) Evict(slot int) bool {
	s.mu.Lock()
	if st := s.state[slot]; !s.claimed || st != stateClean && st != stateKept || !s.slots[slot].pins.CompareAndSwap(0, evicting) {
		s.mu.Unlock()
		return false
	}
	s.setLocked(slot, stateBusy) // nobody may take it yet
	s.mu.Unlock()
	s.leave(slot)
	s.Free(slot)
	return true
}

// Reclaim gives space back to the file system: of up to n free slots, as long as more than keep of the
// free ones are prewritten, and of all slots beyond Usable that are not busy, whose files it removes.
func (s *Space) Reclaim(n, keep int) error {
	for {
		slot, beyond, ok := s.nextToReclaim(n > 0, keep)
		if !ok {
			return nil
		}
		if err := s.shrink(slot); err != nil {
			return err
		}
		if !beyond {
			n--
		}
	}
}

// nextToReclaim takes a slot whose file is to shrink: it is busy until shrink ends.
func (s *Space) nextToReclaim(any bool, keep int) (slot int, beyond, ok bool) {
	s.mu.Lock()
	if !s.claimed {
		s.mu.Unlock()
		return 0, false, false
	}
	for i := s.usable; i < len(s.slots); i++ {
		if s.slots[i].file.Load() == nil || s.state[i] == stateBusy || !s.slots[i].pins.CompareAndSwap(0, evicting) {
			continue
		}
		s.setLocked(i, stateBusy)
		s.mu.Unlock()
		s.leave(i)
		return i, true, true
	}
	defer s.mu.Unlock()
	slot, made := -1, 0
	for _, i := range s.free {
		if s.made[i] {
			made++
			slot = max(slot, i)
		}
	}
	if !any || made <= keep {
		return 0, false, false
	}
	s.setLocked(slot, stateBusy)
	return slot, false, true
}

// shrink gives up a slot's space and frees the slot.
func (s *Space) shrink(slot int) error {
	defer s.Free(slot)
	s.mu.Lock()
	s.made[slot] = false // whatever comes of it: Prewrite writes what is there over
	s.mu.Unlock()
	name := path.Join(s.dir, Name(slot))
	if slot < s.usable {
		f, err := s.file(slot)
		if err == nil {
			err = f.Truncate(0)
		}
		if err != nil {
			return fmt.Errorf("tier: give up the space of %s: %w", name, err)
		}
		return nil
	}
	sl := &s.slots[slot]
	sl.mu.Lock()
	defer sl.mu.Unlock()
	var err error
	if f := sl.file.Swap(nil); f != nil {
		err = (*f).Close()
	}
	if err = errors.Join(err, s.fs.Remove(name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("tier: remove %s: %w", name, err)
	}
	return nil
}

// Claimed says that every slot whose bytes must be kept has been claimed by SetBusy. From then on the others
// may change hands.
func (s *Space) Claimed() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.claimed = true
}

// SetBusy claims a slot whose bytes must be kept. Recovery uses it; the slot may be free or clean.
func (s *Space) SetBusy(slot int) { s.set(slot, stateBusy) }

// SetClean says that a slot may be evicted; slots are evicted in the order of these calls.
func (s *Space) SetClean(slot int) { s.set(slot, stateClean) }

// SetKept is SetClean for a slot that is evicted after those that are merely clean.
func (s *Space) SetKept(slot int) { s.set(slot, stateKept) }

// Free gives a busy slot back. Its bytes are not looked for any more.
func (s *Space) Free(slot int) { s.set(slot, stateFree) }

func (s *Space) set(slot int, to state) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.setLocked(slot, to)
}

func (s *Space) setLocked(slot int, to state) {
	if s.state[slot] == to {
		return
	}
	if list := s.listLocked(slot); list != nil {
		*list = without(*list, slot)
	} else if s.state[slot] == stateBusy {
		s.busy--
	}
	s.state[slot] = to
	if list := s.listLocked(slot); list != nil {
		*list = append(*list, slot)
	} else if to == stateBusy {
		s.busy++
	}
}

// listLocked is the list that a slot in its state is in; nil for none.
func (s *Space) listLocked(slot int) *[]int {
	switch st := s.state[slot]; {
	case slot >= s.usable:
		return nil // nobody takes it any more
	case st == stateFree:
		return &s.free
	case st == stateClean:
		return &s.clean
	case st == stateKept:
		return &s.kept
	}
	return nil
}

func without(list []int, v int) []int {
	if n := len(list); n > 0 && list[n-1] == v {
		return list[:n-1]
	}
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

// forget drops what the page cache has of a slot that is about to be written over. Left there, pages that
// were read or written in large pieces are large folios, and a sync after each small write to one walks, and
// by the kernel's count writes, all of it.
func (s *Space) forget(slot int) {
	if f, err := s.file(slot); err == nil {
		if g, ok := f.(vfs.Forgetter); ok {
			g.Forget()
		}
	}
}

func (s *Space) prewrite(slot int, pace func(took time.Duration)) error {
	if s.Exists(slot) {
		s.forget(slot)
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

// Start has the device begin with n bytes written from the place on, if the file system can do that, so that
// the next Sync of the slot has less to wait for. It does not wait, and it does no harm if the slot has changed
// hands.
func (s *Space) Start(at Place, n int64) {
	f, err := s.file(at.Slot())
	if err != nil {
		return // Sync will tell
	}
	if f, ok := f.(vfs.Starter); ok {
		f.Start(int64(at.Block())*block.Size, n)
	}
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
