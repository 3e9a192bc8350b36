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

// TestAGarbledIndexIsNoDamage is the same for indexes and cut records: a single garbled answer of each shard that is there
// must not count as damage, be it the only one, as in a mirror that lacks its other half.
func TestAGarbledIndexIsNoDamage(t *testing.T) {
	for _, c := range []struct {
		name         string
		k, m         uint8
		never, gone  int // a shard that was not stored, and one that was and is not there; -1: none
		times, asked int // answers of each shard that are hurt, requests that takes
		damaged      bool
	}{
		{"half a mirror", 1, 1, 1, -1, 1, 2, false},
		{"the other half", 1, 1, 0, -1, 1, 2, false},
		{"half a mirror, the other gone", 1, 1, -1, 1, 1, 3, false},
		{"half a mirror, each time", 1, 1, 1, -1, 9, 2, true},
		{"no parity", 1, 0, -1, -1, 1, 2, false},
		{"no parity, each time", 1, 0, -1, -1, 9, 2, true},
		{"all of a stripe", 2, 1, -1, -1, 1, 4, false},
		{"all of a stripe, each time", 2, 1, -1, -1, 9, 6, true},
	} {
		s := build(t, BuildOptions{ID: 9, Epoch: 5, K: c.k, M: c.m}, randomExtents(seeded(t), 12, 3), sampleCut(5))
		stores := newTargets(s.Info.Shards())
		stores.put(s)
		if c.never >= 0 {
			s.Info.Targets[c.never] = 0
		}
		if c.gone >= 0 {
			clear(stores[c.gone].objects)
		}
		read := func(what string, get func() error) {
			for _, m := range stores {
				m.garble = c.times
			}
			stores.reads()
			err := get()
			if errors.Is(err, ErrDamaged) != c.damaged || err != nil && !c.damaged {
				t.Errorf("%s, %s: %v", c.name, what, err)
			}
			if n := stores.reads(); n != c.asked {
				t.Errorf("%s, %s: %d requests, want %d", c.name, what, n, c.asked)
			}
		}
		r := NewReader(ReaderOptions{Targets: stores.get})
		read("index", func() error {
			_, err := r.Index(t.Context(), s.Info)
			return err
		})
		r.Close()
		read("cut record", func() error {
			_, _, err := ReadCut(t.Context(), stores.get, s.Info)
			return err
		})
	}
}
