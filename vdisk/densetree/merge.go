package densetree

import (
	"errors"
	"fmt"
	"slices"

	"graindisk/block"
	"graindisk/internal/planted"
)

// levelMax is how many entries level i, from 1, may hold before it is merged down.
func (t *Tree) levelMax(i int) int {
	limit := t.o.Level0Max
	for range i {
		limit *= fanout
	}
	return limit
}

func (t *Tree) nextRunID() uint64 {
	if t.o.NextRunID != nil {
		return t.o.NextRunID()
	}
	return t.lastID.Add(1)
}

func (t *Tree) levels() int {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return len(t.rows.levels())
}

// row is level i, from 1. Only the merging goroutine changes it, so that one may keep it.
func (t *Tree) row(i int) []*Run {
	t.mu.RLock()
	defer t.mu.RUnlock()
	if i < len(t.rows.all) {
		return t.rows.all[i]
	}
	return nil
}

func (t *Tree) levelLen(i int) int { return rowLen(t.row(i)) }

// memoryRuns is the entries of l0 as runs of level 0.
func (t *Tree) memoryRuns(l0 level0, frozen bool) (runs []*Run) {
	w := runBuilder{}
	for _, c := range l0.chunks {
		for _, p := range c {
			if w.count == t.o.RunMax {
				runs = append(runs, w.finish(0, frozen))
				w = runBuilder{}
			}
			if w.count == 0 {
				w.id = t.nextRunID()
			}
			w.add(p)
		}
	}
	if w.count > 0 {
		runs = append(runs, w.finish(0, frozen))
	}
	return runs
}

// mergeFrozen merges the frozen level 0 into level 1.
func (t *Tree) mergeFrozen() error {
	frozen := t.row(0)
	if len(frozen) == 0 {
		return nil
	}
	m := merger{t: t, level: 1, from: frozen}
	if err := m.run(); err != nil {
		return err
	}
	return gone(frozen, t.row(0))
}

// gone tells whether the frozen level 0 gave way to nothing, or to the next one. If it were still there mergeLoop would
// merge it again at once, and again, while the writer waits: an error has it tried again when level 0 has grown.
func gone(merged, frozen []*Run) error {
	if len(frozen) > 0 && frozen[len(frozen)-1] == merged[len(merged)-1] {
		return errors.New("level 0 is still there though it was merged")
	}
	return nil
}

// mergeRun merges one run of level i into the one below, the runs taking turns.
func (t *Tree) mergeRun(i int) error {
	row := t.row(i)
	turn := firstRun(row, t.cursor[i])
	if turn == len(row) {
		turn = 0
	}
	m := merger{t: t, level: i + 1, from: row[turn : turn+1]}
	if err := m.run(); err != nil {
		return err
	}
	t.cursor[i] = m.from[0].Last + 1
	return nil
}

// merger lays the runs of from over a level. Of the level it rewrites the runs that hold something of
// from and some small ones beside them, the others stay. It reads and writes as it goes; when it has
// made some runs, or found many losses, it puts what is finished in place, takes that part of from away,
// and goes on. So no entry is ever on two levels, where a newer one would hide, and lose, it twice.
type merger struct {
	t     *Tree
	level int
	from  []*Run

	left  []*Run // what the tree still shows of from
	row   []*Run // the level as it was
	adds  []int  // entries of from between row[i-1] and row[i]
	done  []*Run // in place of the first runs of row
	fresh []*Run // those of done and left that are not installed yet
	lost  []Loss

	out     runBuilder
	outMax  int    // entries of a run in this stretch
	pending packed // not yet in out, as the next entry may continue it
	some    bool
}

// A merge installs what it has made when it has found so many losses, 1 MB of memory, or made
// Options.installRuns runs.
const mergeLostMax = 64 << 10

func (m *merger) run() error {
	m.left = m.from
	if m.level == 1 && planted.Bug("merge: level 0 gone before the runs hold it") {
		m.from = m.from[:len(m.from)-1]
	}
	for _, r := range m.from { // it is read to its end, though the tree lets go of it before
		r.refs.Add(1)
		defer r.release()
	}
	err := m.merge()
	for _, r := range m.fresh {
		if r.store != nil {
			r.store.discard(r.file)
		}
	}
	return err
}

func (m *merger) merge() error {
	m.row = m.t.row(m.level)
	if err := complete(m.from); err != nil {
		return err
	}
	rewrite, err := m.plan()
	if err != nil {
		return err
	}
	for i, r := range m.row {
		if rewrite[i] {
			if err := complete(m.row[i : i+1]); err != nil {
				return fmt.Errorf("merge needs run %d: %w", r.ID, err)
			}
		}
	}
	in := newRowReader(m.from)
	defer in.close()
	src, err := newStream(in)
	if err != nil {
		return err
	}
	for i := 0; ; i++ {
		j := i
		for j < len(m.row) && rewrite[j] {
			j++
		}
		if err := m.stretch(src, i, j); err != nil {
			return err
		}
		if j == len(m.row) {
			return m.install(j, EndMax)
		}
		m.done = append(m.done, m.row[j])
		i = j
	}
}

// stretch lays src over row[i:j], the runs to rewrite between two that stay. It may be empty.
func (m *merger) stretch(src *stream, i, j int) error {
	end := EndMax
	if j < len(m.row) {
		end = m.row[j].First
	}
	if i == j && (!src.ok || src.p.start() >= end) {
		return nil
	}
	n := rowLen(m.row[i:j])
	for _, a := range m.adds[i : j+1] {
		n += a
	}
	m.outMax = m.t.o.RunMax
	if runs := (n + m.outMax - 1) / m.outMax; runs > 1 {
		m.outMax = (n + runs - 1) / runs // rather two halves than a whole and a bit
	}
	for k := i; ; k++ {
		to := end
		if k+1 < j {
			to = m.row[k+1].First
		}
		if err := m.window(src, m.row[k:min(k+1, j)], to); err != nil {
			return err
		}
		if k+1 >= j {
			return m.cut()
		}
		if len(m.fresh) >= m.t.o.installRuns || len(m.lost) >= mergeLostMax {
			if err := m.cut(); err != nil {
				return err
			}
			if err := m.install(k+1, to); err != nil {
				return err
			}
		}
	}
}

// window lays the part of src below end over older, one run or none.
func (m *merger) window(src *stream, older []*Run, end block.LBA) error {
	if m.t.bg.closing.Load() {
		return ErrClosed
	}
	in := newRowReader(older)
	defer in.close()
	old, err := newStream(in)
	if err != nil {
		return err
	}
	lose := func(old, newer packed) {
		if !planted.Bug("merge: losses not told") {
			m.lost = appendLoss(m.lost, old, newer)
		}
	}
	return overlay(src, old, end, m.emit, lose)
}

func (m *merger) emit(p packed) error {
	if m.some && m.pending.continues(p) {
		m.pending = m.pending.join(p)
		return nil
	}
	if m.some {
		m.add(m.pending)
		if m.out.count >= m.outMax {
			m.some = false
			if err := m.cut(); err != nil {
				return err
			}
		}
	}
	m.pending, m.some = p, true
	return nil
}

func (m *merger) add(p packed) {
	if m.out.count == 0 {
		m.out = runBuilder{id: m.t.nextRunID()}
	}
	m.out.add(p)
}

// cut ends the run that is being made.
func (m *merger) cut() error {
	if m.some {
		m.add(m.pending)
		m.some = false
	}
	if m.out.count == 0 {
		return nil
	}
	r, err := m.store(m.out.finish(m.level, false))
	if err != nil {
		return err
	}
	m.out = runBuilder{}
	m.done = append(m.done, r)
	return nil
}

// store moves a run that was made to where runs of its level are.
func (m *merger) store(r *Run) (*Run, error) {
	m.t.stats.merged.Add(uint64(r.count))
	m.t.stats.mergedBytes.Add(uint64(headBytes(len(r.firsts)) + len(r.mem)))
	if s := m.t.o.Store; s != nil && r.Level > 0 {
		var err error
		if r, err = s.add(r); err != nil {
			return nil, err
		}
	}
	m.fresh = append(m.fresh, r)
	return r, nil
}

// rest is what left holds from lba on; the run across it is made anew.
func (m *merger) rest(lba block.LBA) ([]*Run, error) {
	var rest []*Run
	for _, r := range m.left {
		switch {
		case r.First >= lba:
			rest = append(rest, r)
		case r.Last >= lba:
			r, err := m.trim(r, lba)
			if err != nil {
				return nil, err
			}
			rest = append(rest, r)
		}
	}
	return rest, nil
}

// trim is r from lba on.
func (m *merger) trim(r *Run, lba block.LBA) (*Run, error) {
	in := newRowReader([]*Run{r})
	defer in.close()
	in.no = r.pageOf(lba)
	w := runBuilder{id: m.t.nextRunID()}
	for {
		p, ok, err := in.next()
		if err != nil {
			return nil, err
		}
		if !ok {
			return m.store(w.finish(r.Level, r.Frozen))
		}
		if p.end() > lba {
			w.add(p.clip(max(p.start(), lba), p.end()))
		}
	}
}

// install puts done in place of the first n runs of the level, whose content from end on is still to
// come, as that of from.
func (m *merger) install(n int, end block.LBA) error {
	t := m.t
	left, err := m.rest(end)
	if err != nil {
		return err
	}
	if len(m.fresh) > 0 && t.o.Store != nil {
		if err := t.o.Store.syncNames(); err != nil {
			return err
		}
	}
	row := slices.Concat(m.done, m.row[n:])
	t.o.Guard.Lock()
	t.mu.Lock()
	old := t.rows
	frozen, levels := old.frozen(), slices.Clone(old.levels())
	for len(levels) < m.level {
		levels = append(levels, nil)
	}
	levels[m.level-1] = row
	switch {
	case len(m.left) == 0: // nothing of from is there; the frozen level 0 may be the next one by now
	case m.level == 1:
		frozen = left
	default:
		above := slices.Clone(levels[m.level-2])
		i := slices.Index(above, m.left[0])
		levels[m.level-2] = slices.Replace(above, i, i+1, left...)
	}
	t.rows = newRows(frozen, levels)
	t.below.Store(int64(t.rows.len()))
	t.mu.Unlock()
	if len(m.lost) > 0 {
		t.o.Lost(m.lost)
	}
	t.o.Guard.Unlock()
	old.release()
	m.left, m.fresh, m.lost = left, nil, nil
	return nil
}

// plan says which runs of row are rewritten: those that entries of from overlap; a small one beside
// entries that fall between two runs; and small ones beside another that is rewritten. So small runs
// do not pile up.
func (m *merger) plan() ([]bool, error) {
	row := m.row
	rewrite := make([]bool, len(row))
	m.adds = make([]int, len(row)+1)
	small := func(i int) bool { return i >= 0 && i < len(row) && row[i].count < m.t.o.RunMax/2 }
	in := newRowReader(m.from)
	defer in.close()
	i := 0 // first run that ends at or behind the entry
	for {
		p, ok, err := in.next()
		if err != nil {
			return nil, err
		}
		if !ok {
			break
		}
		for i < len(row) && row[i].Last < p.start() {
			i++
		}
		if i == len(row) || row[i].First >= p.end() { // between runs i-1 and i
			m.adds[i]++
			if small(i - 1) {
				rewrite[i-1] = true
			} else if small(i) {
				rewrite[i] = true
			}
			continue
		}
		for k := i; k < len(row) && row[k].First < p.end(); k++ {
			rewrite[k] = true
		}
	}
	for i := 1; i < len(row); i++ {
		rewrite[i] = rewrite[i] || rewrite[i-1] && small(i)
	}
	for i := len(row) - 2; i >= 0; i-- {
		rewrite[i] = rewrite[i] || rewrite[i+1] && small(i)
	}
	return rewrite, nil
}
