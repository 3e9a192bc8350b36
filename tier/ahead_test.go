package tier_test

import (
	"testing"
	"testing/synctest"
	"time"

	"graindisk/block"
	"graindisk/internal/crashtest"
	"graindisk/internal/vfs"
	"graindisk/tier"
)

// slowFS takes 3 ms, and for the second write of a file a minute.
type slowFS struct{ vfs.FS }

type slowFile struct {
	vfs.File
	writes int
}

func (f slowFS) Create(name string) (vfs.File, error) {
	h, err := f.FS.Create(name)
	return &slowFile{File: h}, err
}

func (f *slowFile) WriteAt(p []byte, off int64) (int, error) {
	if f.writes++; f.writes == 2 {
		time.Sleep(time.Minute)
	} else {
		time.Sleep(3 * time.Millisecond)
	}
	return f.File.WriteAt(p, off)
}

func TestPrewriteAheadLeavesTheDeviceAlone(t *testing.T) {
	const writes = time.Minute + 3*3*time.Millisecond // of the four steps
	for hurry, pauses := range map[bool]time.Duration{true: 0, false: 3*3*time.Millisecond + 20*time.Millisecond} {
		synctest.Test(t, func(t *testing.T) {
			s, err := tier.Open(tier.Options{FS: slowFS{crashtest.NewFS(crashtest.Options{})}, Dir: "/", SlotBytes: 4 << 20, Slots: 4})
			if err != nil {
				t.Fatal(err)
			}
			s.Claimed()
			slot, err := s.Take(0)
			if err != nil {
				t.Fatal(err)
			}
			start := time.Now()
			if err := s.PrewriteAhead(slot, func() bool { return hurry }); err != nil {
				t.Fatal(err)
			}
			if got := time.Since(start); got != writes+pauses {
				t.Errorf("hurry %v: took %v, want %v", hurry, got, writes+pauses)
			}
			b := make([]byte, block.Size)
			if err := s.ReadAt(tier.NewPlace(slot, 1023), b); err != nil || !s.Exists(slot) {
				t.Errorf("the slot is not whole: %v", err)
			}
		})
	}
}
