package densetree

import (
	"slices"
	"sort"

	"graindisk/block"
	"graindisk/internal/planted"
)

// level0 is the newest entries, in memory: sorted chunks of packed entries, none of them empty. Neither
// the row of chunks nor a chunk is ever changed, so that a copy of the value is a snapshot; a put makes
// new chunks where it has something to say and shares the others.
type level0 struct {
	chunks [][]packed
	n      int // entries
}

// chunkMax is the most entries of a chunk: 3 KiB to copy for a put of one entry.
const chunkMax = 128

// chunkAt is the index of the first chunk from i on that can hold lba: the last that starts at or before it.
func (l level0) chunkAt(i int, lba block.LBA) int {
	k := sort.Search(len(l.chunks)-i, func(k int) bool { return l.chunks[i+k][0].start() > lba })
	return i + max(k-1, 0)
}

// put lays es, which is sorted and not empty, over l and appends to lost what disappears by that.
func (l level0) put(es []packed, lost []Loss) (level0, []Loss) {
	out := level0{chunks: make([][]packed, 0, len(l.chunks)+2*len(es)/chunkMax+2)}
	lose := func(old, newer packed) {
		if lost = appendLoss(lost, old, newer); planted.Bug("map: a loss told twice") {
			lost = appendLoss(lost, old, newer)
		}
	}
	var merged []packed
	i := 0
	for len(es) > 0 {
		k := l.chunkAt(i, es[0].start())
		out.keep(l.chunks[i:min(k, len(l.chunks))])
		j, m := l.group(k, es)
		older := make(entries, 0, (j-k)*chunkMax)
		for _, c := range l.chunks[min(k, j):j] {
			older = append(older, c...)
		}
		newer := entries(es[:m])
		merged = merged[:0]
		emit := func(p packed) error { merged = appendJoined(merged, p); return nil }
		a, _ := newStream(&newer) // a source in memory has no errors
		b, _ := newStream(&older)
		_ = overlay(a, b, EndMax, emit, lose)
		if len(merged) < chunkMax/4 && j < len(l.chunks) { // small chunks must not pile up
			if c := l.chunks[j]; m == len(es) || es[m].start() >= c[len(c)-1].end() {
				merged = append(merged, c...)
				j++
			}
		}
		out.cut(merged)
		es, i = es[m:], j
	}
	out.keep(l.chunks[i:])
	return out, lost
}

// group finds the chunks [k, j) and the first m of es that must be laid over each other, so that no
// entry of either side reaches out.
func (l level0) group(k int, es []packed) (j, m int) {
	for j = min(k+1, len(l.chunks)); ; j++ {
		hi := EndMax
		if j < len(l.chunks) {
			hi = l.chunks[j][0].start()
		}
		for m < len(es) && es[m].start() < hi {
			m++
		}
		if m == 0 || es[m-1].end() <= hi {
			return j, m
		}
	}
}

func (l *level0) keep(chunks [][]packed) {
	l.chunks = append(l.chunks, chunks...)
	for _, c := range chunks {
		l.n += len(c)
	}
}

// cut appends a copy of es as chunks of about the same length.
func (l *level0) cut(es []packed) {
	l.n += len(es)
	for n := (len(es) + chunkMax - 1) / chunkMax; n > 0; n-- {
		size := len(es) / n
		l.chunks = append(l.chunks, slices.Clone(es[:size:size]))
		es = es[size:]
	}
}

// overlapping appends to hits the entries that reach into [lba, end), in order.
func (l level0) overlapping(lba, end block.LBA, hits []packed) []packed {
	if l.n == 0 {
		return hits
	}
	for i := l.chunkAt(0, lba); i < len(l.chunks); i++ {
		c := l.chunks[i]
		for j := sort.Search(len(c), func(j int) bool { return c[j].end() > lba }); j < len(c); j++ {
			if c[j].start() >= end {
				return hits
			}
			hits = append(hits, c[j])
		}
	}
	return hits
}
