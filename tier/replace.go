package tier

import (
	"errors"
	"fmt"
	"path"
	"slices"

	"graindisk/internal/vfs"
)

// Replace puts the file of slot by in the place of that of slot, so that what by's taker wrote and
// synced is from now on found at slot's places, and stably so when it returns nil. The caller took both.
// The file that slot had is read by those who are at it, and let go when the slot changes hands;
// nothing is written to it any more. by is left without a file, to be freed.
//
// If the rename fails nothing has changed. If only the folder's sync fails, the files have changed
// places, but a power cut may bring the old one back: replace it again.
func (s *Space) Replace(slot, by int) error {
	from, to := path.Join(s.dir, Name(by)), path.Join(s.dir, Name(slot))
	f, err := s.file(by)
	if err != nil {
		return err
	}
	if err := s.fs.Rename(from, to); err != nil {
		return fmt.Errorf("tier: replace %s: %w", to, err)
	}
	old := s.slots[slot].file.Swap(&f)
	s.slots[by].file.Store(nil)
	s.mu.Lock()
	s.made[by] = false
	if old != nil {
		s.retired[slot] = append(s.retired[slot], *old)
	}
	s.mu.Unlock()
	if err := s.fs.SyncDir(s.dir); err != nil {
		return fmt.Errorf("tier: replace %s: %w", to, err)
	}
	return nil
}

// closeRetired lets go of the files that slot had before. Nobody reads the slot.
func (s *Space) closeRetired(slot int) {
	s.mu.Lock()
	list := s.retired[slot]
	delete(s.retired, slot)
	s.mu.Unlock()
	closeAll(list) // read only since it was replaced: nothing is lost with it
}

func closeAll(list []vfs.File) error {
	var errs []error
	for _, f := range list {
		errs = append(errs, f.Close())
	}
	return errors.Join(errs...)
}

// Shun gives back a taken slot with which something went wrong: it is the last free one to be taken
// again. If its file has not its full length, the space it takes up is given back.
func (s *Space) Shun(slot int) {
	if !s.Exists(slot) {
		if f, err := s.file(slot); err == nil {
			_ = f.Truncate(0) // of no use at any length: the next Prewrite starts over
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.setLocked(slot, stateFree)
	if n := len(s.free); n > 0 && s.free[n-1] == slot {
		s.free = append([]int{slot}, s.free[:n-1]...)
	}
}

// TakeMade is Take for when the file system has no room: it hands out only slots whose files have
// their full length already.
func (s *Space) TakeMade(reserve int) (int, error) {
	s.mu.Lock()
	if !s.spareLocked(reserve) {
		s.mu.Unlock()
		return 0, ErrNoSlot
	}
	for _, i := range slices.Backward(s.free) {
		if s.made[i] {
			s.setLocked(i, stateBusy)
			s.mu.Unlock()
			s.closeRetired(i)
			return i, nil
		}
	}
	for _, list := range [][]int{s.clean, s.kept} {
		for _, i := range list {
			if s.made[i] && s.slots[i].pins.CompareAndSwap(0, evicting) {
				s.setLocked(i, stateBusy)
				s.mu.Unlock()
				s.leave(i)
				return i, nil
			}
		}
	}
	s.mu.Unlock()
	return 0, ErrNoSlot
}
