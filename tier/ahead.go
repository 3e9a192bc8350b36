package tier

import (
	"time"

	"graindisk/internal/vfs"
)

const (
	aheadStep     = 1 << 20 // bytes filled at once
	aheadPauseMax = 20 * time.Millisecond
)

// PrewriteAhead is Prewrite for a slot that is not needed yet: as long as hurry says false it leaves the
// device alone for as long as each step took, so that it gets in the way of other I/O half as often.
func (s *Space) PrewriteAhead(slot int, hurry func() bool) error {
	return s.prewrite(slot, func(took time.Duration) {
		if !hurry() {
			time.Sleep(min(took, aheadPauseMax))
		}
	})
}

// fill writes zeroes over a slot's file, telling after each step how long it took.
func (s *Space) fill(f vfs.File, pace func(took time.Duration)) error {
	zeroer, ok := f.(vfs.Zeroer)
	var zero []byte
	if !ok {
		zero = make([]byte, min(s.slotBytes, aheadStep))
	}
	for off := int64(0); off < s.slotBytes; off += aheadStep {
		n := min(aheadStep, s.slotBytes-off)
		start := time.Now()
		var err error
		if ok {
			err = zeroer.WriteZeroes(off, n)
		} else {
			_, err = f.WriteAt(zero[:n], off)
		}
		if err != nil {
			return err
		}
		pace(time.Since(start))
	}
	return nil
}
