package densetree

import (
	"github.com/tidwall/btree"

	"graindisk/block"
	"graindisk/internal/planted"
)

// newLevel0 makes an empty level 0: entries by LBA, never overlapping. Its lock is the tree's.
func newLevel0() *btree.BTreeG[packed] {
	byLBA := func(a, b packed) bool { return a.start() < b.start() }
	return btree.NewBTreeGOptions(byLBA, btree.Options{NoLocks: true})
}

// at is a pivot for searching level 0.
func at(lba block.LBA) packed { return packed{key: uint64(lba) << 2} }

// overlapping appends to hits the entries of level 0 that reach into [lba, end), in order.
func overlapping(l0 *btree.BTreeG[packed], lba, end block.LBA, hits []packed) []packed {
	l0.Descend(at(lba), func(p packed) bool {
		if p.start() < lba && p.end() > lba {
			hits = append(hits, p)
		}
		return false // if it starts at lba, the one before it ends there
	})
	l0.Ascend(at(lba), func(p packed) bool {
		if p.start() >= end {
			return false
		}
		hits = append(hits, p)
		return true
	})
	return hits
}

// insert stores p as the newest, cuts what it covers and appends what is lost by that.
func insert(l0 *btree.BTreeG[packed], p packed, lost []loss) []loss {
	var buf [16]packed
	for _, old := range overlapping(l0, p.start(), p.end(), buf[:0]) {
		if lost = appendLoss(lost, old, p); planted.Bug("map: a loss told twice") {
			lost = appendLoss(lost, old, p)
		}
		if old.start() < p.start() {
			l0.Set(old.clip(old.start(), p.start())) // replaces old, which starts there
		} else if old.start() > p.start() {
			l0.Delete(old) // at p's own start it is replaced below
		}
		if old.end() > p.end() {
			l0.Set(old.clip(p.end(), old.end()))
		}
	}
	l0.Set(p)
	return lost
}

// level0Entries are all entries of level 0 in order, neighbours that continue each other joined.
func level0Entries(l0 *btree.BTreeG[packed]) []packed {
	es := make([]packed, 0, l0.Len())
	l0.Scan(func(p packed) bool {
		es = appendJoined(es, p)
		return true
	})
	return es
}

// appendJoined appends p, or lengthens the last entry if p continues it.
func appendJoined(es []packed, p packed) []packed {
	if n := len(es); n > 0 && es[n-1].continues(p) {
		es[n-1] = es[n-1].join(p)
		return es
	}
	return append(es, p)
}
