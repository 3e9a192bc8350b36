package extent

import (
	"bytes"
	"cmp"
	"fmt"
	"io"
	"slices"

	"graindisk/block"
)

// runsMax is how many runs there may be before a spill merges them into one.
const runsMax = 4

// Spill moves the entries that were not used since the last call to a run on the storage, and merges the
// runs when they have become many. Lookups and changes go on meanwhile; calls of Spill and Save take
// turns by the caller's hand. Runs that are not needed any more are not deleted: a checkpoint may name
// them. It fails if the storage does, and has changed nothing then.
func (e *Exceptions) Spill() error {
	e.mu.Lock()
	cold := e.coldLocked()
	id := e.nextRun
	e.nextRun++
	e.mu.Unlock()
	if len(cold) > 0 {
		r, err := e.writeRun(id, uint64(len(cold)), func(add func(named)) error {
			for _, x := range cold {
				add(x)
			}
			return nil
		})
		if err != nil {
			return err
		}
		e.mu.Lock()
		e.dropLocked(cold)
		e.runs = append([]*run{r}, e.runs...)
		e.mu.Unlock()
	}
	if len(e.runs) > runsMax {
		return e.merge()
	}
	return nil
}

// coldLocked is the entries that were not used since the last time, by name.
func (e *Exceptions) coldLocked() []named {
	var cold []named
	for i := range e.shards {
		s := &e.shards[i]
		for at := range s.slots() {
			if x := s.get(at); x.key != 0 && !s.isHot(at) {
				name := block.ExtentID(x.key &^ flagBit)
				cold = append(cold, named{name, e.unpackLocked(name, x)})
			}
		}
		for b := range s.b {
			s.b[b].hot.Store(0)
		}
	}
	slices.SortFunc(cold, func(a, b named) int { return cmp.Compare(a.name, b.name) })
	return cold
}

// dropLocked removes from memory what is as it was spilled. The rest goes on superseding the run.
func (e *Exceptions) dropLocked(spilled []named) {
	for _, x := range spilled {
		s, h := e.shard(x.name)
		if i := s.find(uint64(x.name), h); i >= 0 && e.unpackLocked(x.name, s.get(i)) == x.st {
			e.addOverflowLocked(x.name, -e.overflowLocked(x.name))
			s.remove(i)
		}
	}
}

func (e *Exceptions) writeRun(id, entries uint64, fill func(add func(named)) error) (*run, error) {
	f, err := e.storage.Create(id)
	if err != nil {
		return nil, fmt.Errorf("exceptions: spill run %d: %w", id, err)
	}
	w := newRunWriter(f, entries)
	err = fill(w.add)
	r, werr := w.end(id)
	if err = cmp.Or(err, werr); err != nil {
		_ = f.Close() // what it holds is of no use
	} else {
		err = f.Close()
	}
	if err != nil {
		return nil, fmt.Errorf("exceptions: spill run %d: %w", id, err)
	}
	return r, nil
}

// merge makes one run of all, without the entries that say nothing: below it there is nothing left that
// they supersede. Only Spill changes e.runs, so it reads them without the lock.
func (e *Exceptions) merge() error {
	e.mu.Lock()
	id := e.nextRun
	e.nextRun++
	e.mu.Unlock()
	var entries uint64
	var walks []*walk
	for _, r := range e.runs {
		entries += r.entries
		walks = append(walks, &walk{r: r, s: e.storage})
	}
	merged, err := e.writeRun(id, entries, func(add func(named)) error {
		for {
			x, ok, err := newest(walks)
			if !ok || err != nil {
				return err
			}
			if x.st != plain {
				add(x)
			}
		}
	})
	if err != nil {
		return err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.runs = []*run{merged}; merged.entries == 0 {
		e.runs = nil
	}
	return nil
}

// walk reads a run from end to end, a page at a time.
type walk struct {
	r    *run
	s    Storage
	next int // page
	es   []named
}

// fill makes the next entry es[0], if there is one.
func (w *walk) fill() error {
	for len(w.es) == 0 && w.next < len(w.r.pages) {
		w.next++
		if err := w.r.page(w.s, w.next-1, func(x named) bool { w.es = append(w.es, x); return true }); err != nil {
			return err
		}
	}
	return nil
}

// newest takes the lowest name off the walks, as the first of them that has it says.
func newest(walks []*walk) (x named, ok bool, err error) {
	for _, w := range walks {
		if err := w.fill(); err != nil {
			return x, false, err
		}
		if len(w.es) > 0 && (!ok || w.es[0].name < x.name) {
			x, ok = w.es[0], true
		}
	}
	for _, w := range walks {
		if len(w.es) > 0 && w.es[0].name == x.name {
			w.es = w.es[1:]
		}
	}
	return x, ok, nil
}

// Save writes the entries in memory to w, in the form of a run, and returns the numbers of the runs that
// hold the rest, newest first: a checkpoint of the table. Entries carry whole counts, so that the usage
// table need not be of the same moment.
func (e *Exceptions) Save(w io.Writer) (runs []uint64, err error) {
	e.mu.RLock()
	defer e.mu.RUnlock()
	var es []named
	for i := range e.shards {
		s := &e.shards[i]
		for at := range s.slots() {
			if x := s.get(at); x.key != 0 {
				name := block.ExtentID(x.key &^ flagBit)
				es = append(es, named{name, e.unpackLocked(name, x)})
			}
		}
	}
	slices.SortFunc(es, func(a, b named) int { return cmp.Compare(a.name, b.name) })
	rw := newRunWriter(w, uint64(len(es)))
	for _, x := range es {
		rw.add(x)
	}
	if _, err := rw.end(0); err != nil {
		return nil, fmt.Errorf("exceptions: save: %w", err)
	}
	for _, r := range e.runs {
		runs = append(runs, r.id)
	}
	return runs, nil
}

// Load makes an empty table what Save saw: saved is what it wrote, runs what it returned. Errors of the
// bytes match ErrDamaged or ErrNewer.
func (e *Exceptions) Load(saved []byte, runs []uint64) error {
	top, err := openRun(0, int64(len(saved)), readerOf(saved))
	if err != nil {
		return fmt.Errorf("exceptions: saved: %w", err)
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, id := range runs {
		size, err := e.storage.Size(id)
		if err != nil {
			return fmt.Errorf("exceptions: run %d: %w", id, err)
		}
		r, err := openRun(id, size, func(p []byte, off int64) error { return e.storage.ReadAt(id, p, off) })
		if err != nil {
			return fmt.Errorf("exceptions: %w", err)
		}
		e.runs = append(e.runs, r)
		e.nextRun = max(e.nextRun, id+1)
	}
	for i, p := range top.pages {
		err := decodePage(saved[p.off:p.off+int64(p.len)], p.first, func(x named) bool {
			e.setLocked(x.name, plain, x.st)
			return true
		})
		if err != nil {
			return fmt.Errorf("exceptions: saved: page %d: %w", i, err)
		}
	}
	return nil
}

func readerOf(b []byte) func(p []byte, off int64) error {
	r := bytes.NewReader(b)
	return func(p []byte, off int64) error {
		_, err := r.ReadAt(p, off)
		return err
	}
}
