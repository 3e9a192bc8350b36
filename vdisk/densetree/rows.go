package densetree

import "sync/atomic"

// rows is what lies below level 0. It never changes; a merge makes a new one. Whoever reads it holds a
// reference, so that no file goes away under a reader.
type rows struct {
	all  [][]*Run // all[0] is the frozen level 0, all[i] is level i; each in LBA order
	refs atomic.Int64
}

// newRows makes rows with one reference, its maker's.
func newRows(frozen []*Run, levels [][]*Run) *rows {
	w := &rows{all: append([][]*Run{frozen}, levels...)}
	w.refs.Store(1)
	for _, row := range w.all {
		for _, r := range row {
			r.refs.Add(1)
		}
	}
	return w
}

func (w *rows) frozen() []*Run   { return w.all[0] }
func (w *rows) levels() [][]*Run { return w.all[1:] }

// release gives a reference back. Files are not removed here, by a reader, but at the next sweep.
func (w *rows) release() {
	if w.refs.Add(-1) > 0 {
		return
	}
	for _, row := range w.all {
		for _, r := range row {
			r.release()
		}
	}
}

func (r *Run) release() {
	if r.refs.Add(-1) == 0 && r.store != nil {
		r.store.discard(r.file)
	}
}

// len is the number of entries of all levels.
func (w *rows) len() (n int) {
	for _, row := range w.levels() {
		n += rowLen(row)
	}
	return n
}

func rowLen(row []*Run) int {
	n := 0
	for _, r := range row {
		n += r.count
	}
	return n
}
