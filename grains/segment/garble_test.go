package segment

import (
	"errors"
	"testing"
)

// TestAGarbledTransferIsNoDamage hurts single answers on their way while there is no shard to spare, and expects
// them to be asked for once more; what is hurt each time is damage.
func TestAGarbledTransferIsNoDamage(t *testing.T) {
	for _, c := range []struct {
		name         string
		k, m         uint8
		lost, garble int // shards; -1: none. They count from the one with slot 0.
		times        int
		damaged      bool
	}{
		{"the other one", 2, 1, 0, 1, 1, false},
		{"the one itself", 2, 1, 1, 0, 1, false},
		{"the one itself, nobody else", 1, 1, 1, 0, 1, false},
		{"the only one", 1, 0, -1, 0, 1, false},
		{"the only one, each time", 1, 0, -1, 0, 9, true},
		{"the other one, each time", 2, 1, 0, 1, 9, true},
	} {
		for _, slots := range [][]int{{0}, {0, 1}} {
			list := randomExtents(seeded(t), 12, 3)
			s := build(t, BuildOptions{ID: 9, Epoch: 3, K: c.k, M: c.m}, list, nil)
			stores := newTargets(s.Info.Shards())
			stores.put(s)
			at := func(n int) *memStore { return stores[(int(s.Index.Entries[0].Shard)+n)%len(stores)] }
			if c.lost >= 0 {
				clear(at(c.lost).objects)
			}
			at(c.garble).garble = c.times
			r := NewReader(ReaderOptions{Targets: stores.get})
			r.Remember(s.Info, s.Index)
			err := r.Extents(t.Context(), s.Info, slots, func(slot int, data []byte, e Entry) error {
				return list[slot].check(data, e)
			})
			if r.Close(); errors.Is(err, ErrDamaged) != c.damaged || err != nil && !c.damaged {
				t.Errorf("%s, slots %v: %v", c.name, slots, err)
			}
		}
	}
}
