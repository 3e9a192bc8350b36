package tier_test

import (
	"bytes"
	"errors"
	"testing"

	"graindisk/block"
	"graindisk/internal/crashtest"
	"graindisk/tier"
)

func newSpace(t *testing.T) (*crashtest.FS, *tier.Space) {
	t.Helper()
	fsys := crashtest.NewFS(crashtest.Options{})
	if err := errors.Join(fsys.MkdirAll("d"), fsys.SyncDir(".")); err != nil {
		t.Fatal(err)
	}
	s, err := tier.Open(tier.Options{FS: fsys, Dir: "d", SlotBytes: 4 * block.Size, Slots: 4})
	if err != nil {
		t.Fatal(err)
	}
	s.Claimed()
	return fsys, s
}

// take hands out a slot filled with one byte, stably.
func take(t *testing.T, s *tier.Space, fill byte) int {
	t.Helper()
	slot, err := s.Take(0)
	if err == nil {
		err = s.Prewrite(slot)
	}
	if err == nil {
		err = errors.Join(s.WriteAt(tier.NewPlace(slot, 0), [][]byte{bytes.Repeat([]byte{fill}, 4*block.Size)}), s.Sync(slot))
	}
	if err != nil {
		t.Fatal(err)
	}
	return slot
}

func firstByte(t *testing.T, s *tier.Space, slot int) byte {
	t.Helper()
	b := make([]byte, block.Size)
	if err := s.ReadAt(tier.NewPlace(slot, 3), b); err != nil {
		t.Fatal(err)
	}
	return b[0]
}

func TestReplaceIsStableAndFreesTheOther(t *testing.T) {
	fsys, s := newSpace(t)
	slot, by := take(t, s, 1), take(t, s, 2)
	if err := s.Replace(slot, by); err != nil {
		t.Fatal(err)
	}
	s.Free(by)
	if got := firstByte(t, s, slot); got != 2 {
		t.Errorf("reads %d", got)
	}
	if s.Exists(by) {
		t.Error("the other slot still counts as written")
	}
	after := fsys.Peek(1, crashtest.KeepNone)
	s2, err := tier.Open(tier.Options{FS: after, Dir: "d", SlotBytes: 4 * block.Size, Slots: 4})
	if err != nil {
		t.Fatal(err)
	}
	if got := firstByte(t, s2, slot); got != 2 {
		t.Errorf("after a power cut: %d", got)
	}
	for range 3 { // all others can be taken, the one without a file among them
		take(t, s, 3)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}

func TestReplaceThatFailsLeavesTheFile(t *testing.T) {
	fsys, s := newSpace(t)
	slot, by := take(t, s, 1), take(t, s, 2)
	fsys.Inject(crashtest.Fault{Op: crashtest.OpRename, Count: 1})
	if err := s.Replace(slot, by); err == nil {
		t.Fatal("no error")
	}
	if a, b := firstByte(t, s, slot), firstByte(t, s, by); a != 1 || b != 2 {
		t.Errorf("slots read %d and %d", a, b)
	}
}

func TestShunnedSlotComesLast(t *testing.T) {
	_, s := newSpace(t)
	bad := take(t, s, 1)
	s.Shun(bad)
	for i := range 4 {
		if got := take(t, s, 2); (got == bad) != (i == 3) {
			t.Errorf("take %d is slot %d, %d was shunned", i, got, bad)
		}
	}
}

func TestTakeMadeWantsAWholeFile(t *testing.T) {
	_, s := newSpace(t)
	if _, err := s.TakeMade(0); !errors.Is(err, tier.ErrNoSlot) {
		t.Errorf("a slot without a file: %v", err)
	}
	free, clean := take(t, s, 1), take(t, s, 2)
	s.Free(free)
	s.SetClean(clean)
	for _, want := range []int{free, clean} {
		if got, err := s.TakeMade(0); err != nil || got != want {
			t.Errorf("took %d (%v), want %d", got, err, want)
		}
	}
}
