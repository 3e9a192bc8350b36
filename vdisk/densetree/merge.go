package densetree

import (
	"slices"

	"graindisk/internal/planted"
)

// levelMax is how many entries level i+1 may hold before it is merged down.
func (t *Tree) levelMax(i int) int {
	limit := t.o.Level0Max
	for ; i >= 0; i-- {
		limit *= fanout
	}
	return limit
}

func (t *Tree) nextRunID() uint64 {
	if t.o.NextRunID != nil {
		return t.o.NextRunID()
	}
	t.lastID++
	return t.lastID
}

// flush merges level 0 into level 1, then each level that has become too large into the next.
// Readers go on with the old content until the new one is complete.
func (t *Tree) flush() {
	if es := level0Entries(t.c.level0); len(es) > 0 {
		if planted.Bug("merge: level 0 gone before the runs hold it") {
			es = es[:len(es)-1]
		}
		levels, lost := t.mergeInto(es, t.c.levels, 0)
		t.swap(content{level0: newLevel0(), levels: levels}, lost)
	}
	for i := 0; i < min(len(t.c.levels), levelsMax-1); i++ {
		for rowLen(t.c.levels[i]) > t.levelMax(i) {
			t.mergeRun(i)
		}
	}
}

// mergeRun merges one run of levels[i] into the level below it, the runs taking turns.
func (t *Tree) mergeRun(i int) {
	for len(t.cursor) <= i {
		t.cursor = append(t.cursor, 0)
	}
	row := t.c.levels[i]
	turn := firstRun(row, t.cursor[i])
	if turn == len(row) {
		turn = 0
	}
	t.cursor[i] = row[turn].Last + 1
	levels, lost := t.mergeInto(row[turn].es, t.c.levels, i+1)
	levels[i] = slices.Delete(slices.Clone(row), turn, turn+1)
	t.swap(content{level0: t.c.level0, levels: levels}, lost)
}

// swap makes c what readers see, then reports what was lost on the way.
func (t *Tree) swap(c content, lost []loss) {
	t.mu.Lock()
	t.c = c
	t.mu.Unlock()
	t.report(lost)
}

// mergeInto returns new levels in which es, newer than levels[i], is part of levels[i].
func (t *Tree) mergeInto(es []packed, levels [][]*Run, i int) ([][]*Run, []loss) {
	levels = slices.Clone(levels)
	for len(levels) <= i {
		levels = append(levels, nil)
	}
	row := levels[i]
	rewrite := t.plan(es, row)
	var merged []*Run
	var lost []loss
	for len(es) > 0 || len(row) > 0 {
		// Between two kept runs lie runs to rewrite, entries of es, both or neither.
		n := slices.Index(rewrite, false)
		if n < 0 {
			n = len(row)
		}
		mine := es
		if n < len(row) {
			mine = es[:firstEntry(es, row[n].First)] // es does not reach into a kept run
		}
		var out []packed
		out, lost = mergeEntries(mine, row[:n], lost)
		t.merged.Add(uint64(len(out)))
		merged = append(merged, cutRuns(out, t.o.RunMax, i+1, t.nextRunID)...)
		es = es[len(mine):]
		if n < len(row) {
			merged = append(merged, row[n])
			n++
		}
		row, rewrite = row[n:], rewrite[n:]
	}
	levels[i] = merged
	return levels, lost
}

// plan says which runs of row a merge with es rewrites: those that es overlaps; a small one beside
// entries that fall between two runs; and small ones beside another that is rewritten. So small
// runs do not pile up.
func (t *Tree) plan(es []packed, row []*Run) []bool {
	rewrite := make([]bool, len(row))
	small := func(i int) bool { return i >= 0 && i < len(row) && row[i].Len() < t.o.RunMax/2 }
	for _, p := range es {
		i := firstRun(row, p.start())
		if i == len(row) || row[i].First >= p.end() { // between runs i-1 and i
			if small(i - 1) {
				rewrite[i-1] = true
			} else if small(i) {
				rewrite[i] = true
			}
			continue
		}
		for ; i < len(row) && row[i].First < p.end(); i++ {
			rewrite[i] = true
		}
	}
	for i := 1; i < len(row); i++ {
		rewrite[i] = rewrite[i] || rewrite[i-1] && small(i)
	}
	for i := len(row) - 2; i >= 0; i-- {
		rewrite[i] = rewrite[i] || rewrite[i+1] && small(i)
	}
	return rewrite
}

// mergeEntries lays es over the runs and appends to lost what it hides of them.
func mergeEntries(es []packed, runs []*Run, lost []loss) ([]packed, []loss) {
	out := make([]packed, 0, len(es)+rowLen(runs))
	old := cursor{runs: runs}
	old.next()
	for _, p := range es {
		if planted.Bug("merge: the older entry wins") && old.ok && old.p.start() <= p.start() && p.end() <= old.p.end() {
			continue
		}
		for old.ok && old.p.end() <= p.start() {
			out = appendJoined(out, old.p)
			old.next()
		}
		if old.ok && old.p.start() < p.start() {
			out = appendJoined(out, old.p.clip(old.p.start(), p.start()))
			old.p = old.p.clip(p.start(), old.p.end())
		}
		out = appendJoined(out, p)
		for old.ok && old.p.start() < p.end() {
			if !planted.Bug("merge: losses not told") {
				lost = appendLoss(lost, old.p, p)
			}
			if old.p.end() > p.end() {
				old.p = old.p.clip(p.end(), old.p.end())
				break
			}
			old.next()
		}
	}
	for ; old.ok; old.next() {
		out = appendJoined(out, old.p)
	}
	return out, lost
}

// cursor walks the entries of a row of runs.
type cursor struct {
	runs []*Run
	i    int    // of the entry behind p in runs[0]
	p    packed // where it stands; valid while ok
	ok   bool
}

func (c *cursor) next() {
	for len(c.runs) > 0 && c.i == c.runs[0].Len() {
		c.runs, c.i = c.runs[1:], 0
	}
	if c.ok = len(c.runs) > 0; c.ok {
		c.p = c.runs[0].es[c.i]
		c.i++
	}
}

// runsFor is how many runs n entries make.
func runsFor(n, max int) int { return (n + max - 1) / max }

// cutRuns makes runs of es, all about as long, each with memory of its own.
func cutRuns(es []packed, max, level int, id func() uint64) []*Run {
	var runs []*Run
	for n := runsFor(len(es), max); n > 0; n-- {
		size := len(es) / n
		runs = append(runs, newRun(id(), level, slices.Clone(es[:size:size])))
		es = es[size:]
	}
	return runs
}

func rowLen(row []*Run) int {
	n := 0
	for _, r := range row {
		n += r.Len()
	}
	return n
}
