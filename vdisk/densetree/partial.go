package densetree

import (
	"errors"
	"fmt"
	"io"
	"slices"

	"graindisk/internal/vfs"
)

// ErrAbsent means a page of a partial run that is not on the tier yet. Whoever has the run elsewhere
// brings it with Put, and asks again.
var ErrAbsent = errors.New("page of the map is not here yet")

// A partial run has its head in a file of the store, stable, and of its pages any or none: they are all
// stored elsewhere as well, as parts of the encoded run. Each page tells by its checksum whether it is
// there, so nothing notes which are, and a crash may take any of them.
//
//	AddPartial: head stable ──Put: single pages, for lookups──► some pages, not synced
//	                        └──────────────Bring──────────────► all written, synced, read back: complete
//
// Invariant: no merge reads a partial run. So a run leaves its tree by a merge only once its file is
// complete, and a local checkpoint that still names it needs no other copy then.

// HeadLen is the length of the head of a run of version 2 that is encoded in n bytes, pages and all; 0 if
// no such run has n bytes.
func HeadLen(n int64) int {
	pages := n / pageBytes
	if n%pageBytes != 0 || n <= 0 || pages > 2*runMax {
		return 0
	}
	for head := int64(1); head < pages; head++ { // one or two, but for the largest
		if h := headBytes(int(pages - head)); int64(h) == head*pageBytes {
			return h
		} else if int64(h) < head*pageBytes {
			return 0
		}
	}
	return 0
}

// DecodeHead reads the head of an encoded run, of HeadLen bytes. What it returns is good for
// Store.AddPartial and nothing else. Errors match ErrCorrupt or ErrNewer.
func DecodeHead(b []byte) (*Run, error) {
	err := checkStart(b)
	if err == nil && b[offVersion] == 1 {
		err = fmt.Errorf("%w: version 1 has no head", ErrCorrupt)
	}
	var r *Run
	if err == nil {
		r, err = decodeHead(b)
	}
	if err != nil {
		return nil, fmt.Errorf("densetree: decode head: %w", err)
	}
	return r, nil
}

// EncodedLen is the length of the run as Encode writes it.
func (r *Run) EncodedLen() int64 { return r.offset(len(r.firsts)) }

// PageRange is where n pages from page no on lie in the encoded run.
func (r *Run) PageRange(no, n int) (off, length int64) { return r.offset(no), int64(n) * pageBytes }

// Pages is the number of pages.
func (r *Run) Pages() int { return len(r.firsts) }

// Partial tells whether pages of the run may be missing in its file.
func (r *Run) Partial() bool { return r.partial.Load() }

// CheckPages checks that b is the pages from no on; the error matches ErrCorrupt.
func (r *Run) CheckPages(no int, b []byte) error {
	if len(b) == 0 || len(b)%pageBytes != 0 || no < 0 || no+len(b)/pageBytes > len(r.firsts) {
		return fmt.Errorf("densetree: run %d: %w: %d bytes as pages from %d on of %d", r.ID, ErrCorrupt, len(b), no, len(r.firsts))
	}
	for ; len(b) > 0; b, no = b[pageBytes:], no+1 {
		if _, err := checkPage(b[:pageBytes], r.ID, no, r.firsts[no]); err != nil {
			return fmt.Errorf("densetree: run %d: page %d: %w", r.ID, no, err)
		}
	}
	return nil
}

// AddPartial makes a partial run of a head: a file with nothing else in it, stable once Sync has returned.
func (s *Store) AddPartial(head *Run) (*Run, error) {
	s.mu.Lock()
	s.last++
	n := s.last
	s.mu.Unlock()
	r := &Run{ID: head.ID, Level: head.Level, First: head.First, Last: head.Last, count: head.count, firsts: head.firsts}
	if err := s.write(n, r); err != nil {
		s.discard(n)
		return nil, fmt.Errorf("densetree: write %s: %w", s.path(n), err)
	}
	r.store, r.file = s, n
	s.addPartial(r)
	return r, nil
}

// OpenPartial is Open of a run that is partial as far as its checkpoint knows.
func (s *Store) OpenPartial(n, id uint64) (*Run, error) {
	r, err := s.Open(n, id)
	if err == nil {
		s.addPartial(r)
	}
	return r, err
}

func (s *Store) addPartial(r *Run) {
	r.partial.Store(true)
	s.mu.Lock()
	s.partial[r.file] = r
	s.mu.Unlock()
}

// Partial lists the partial runs, in the order in which they came.
func (s *Store) Partial() []*Run {
	s.mu.Lock()
	defer s.mu.Unlock()
	list := make([]*Run, 0, len(s.partial))
	for _, r := range s.partial {
		list = append(list, r)
	}
	slices.SortFunc(list, func(a, b *Run) int { return int(int64(a.file) - int64(b.file)) })
	return list
}

// Put hands a partial run the pages from no on, after CheckPages, for lookups that wait for them. They need not
// become stable; if the file takes them not, they stay in memory until the run is complete.
func (r *Run) Put(no int, b []byte) error {
	if err := r.CheckPages(no, b); err != nil {
		return err
	}
	if !r.Partial() {
		return nil
	}
	f, err := r.store.o.FS.Open(r.store.path(r.file))
	if err == nil {
		_, err = f.WriteAt(b, r.offset(no))
		err = errors.Join(err, f.Close())
	}
	for ; len(b) > 0; b, no = b[pageBytes:], no+1 {
		p := page(slices.Clone(b[:pageBytes]))
		if err != nil {
			r.spare.Store(no, p)
		}
		r.store.o.Cache.put(pageKey{r.file, no}, p)
	}
	return nil
}

// bringBytes is how much of a run is at hand at a time while it is brought.
const bringBytes = 1 << 20

// Bring makes a partial run complete. fetch returns pages from no on, of which it has been told that the file
// does not have the first and the last; it is called from this goroutine. Everything is written anew, pages
// that were there as well: what an earlier process wrote and could not sync counts as clean to the kernel.
func (r *Run) Bring(fetch func(no, n int) ([]byte, error)) error {
	if !r.Partial() {
		return nil
	}
	if err := r.bring(fetch); err != nil {
		return fmt.Errorf("densetree: bring run %d to %s: %w", r.ID, r.store.path(r.file), err)
	}
	s := r.store
	s.mu.Lock()
	delete(s.partial, r.file)
	s.mu.Unlock()
	r.partial.Store(false)
	r.spare.Clear()
	return nil
}

func (r *Run) bring(fetch func(no, n int) ([]byte, error)) (err error) {
	f, err := r.store.o.FS.Open(r.store.path(r.file))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	step := bringBytes / pageBytes
	for no := 0; no < len(r.firsts); no += step {
		b, there, err := r.readPages(f, no, min(step, len(r.firsts)-no))
		if err != nil {
			return err
		}
		if first := slices.Index(there, false); first >= 0 {
			last := len(there) - 1
			for there[last] {
				last--
			}
			got, err := fetch(no+first, last-first+1)
			if err == nil && len(got) != (last-first+1)*pageBytes {
				err = fmt.Errorf("%w: %d bytes for %d pages", ErrCorrupt, len(got), last-first+1)
			}
			if err == nil {
				err = r.CheckPages(no+first, got)
			}
			if err != nil {
				return err
			}
			copy(b[first*pageBytes:], got)
		}
		if _, err := f.WriteAt(b, r.offset(no)); err != nil {
			return err
		}
	}
	if err := f.Sync(); err != nil {
		return err
	}
	for no := 0; no < len(r.firsts); no += step {
		_, there, err := r.readPages(f, no, min(step, len(r.firsts)-no))
		if err != nil {
			return err
		}
		if i := slices.Index(there, false); i >= 0 {
			return fmt.Errorf("%w: page %d, just written", ErrCorrupt, no+i)
		}
	}
	return nil
}

// readPages reads n pages and says which of them are there.
func (r *Run) readPages(f vfs.File, no, n int) (b []byte, there []bool, err error) {
	b, there = make([]byte, n*pageBytes), make([]bool, n)
	size, err := f.Size()
	if err != nil {
		return nil, nil, err
	}
	if have := min(int64(len(b)), size-r.offset(no)); have > 0 {
		if _, err := f.ReadAt(b[:have], r.offset(no)); err != nil && !errors.Is(err, io.EOF) {
			return nil, nil, err
		}
	}
	for i := range there {
		_, err := checkPage(b[i*pageBytes:][:pageBytes], r.ID, no+i, r.firsts[no+i])
		there[i] = err == nil
	}
	return b, there, nil
}

// Partial is the run of the page if that is one of a partial run, so that it may be had elsewhere; else nil.
func (e *PageError) Partial() *Run {
	if errors.Is(e.Err, ErrAbsent) {
		return e.run
	}
	return nil
}

// Retry tries a merge again that has failed, for runs that were partial then. It does not wait for it.
func (t *Tree) Retry() {
	b := &t.bg
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.err != nil {
		t.startLocked()
	}
}

// absent is pageError of a page that could not be read, or not as what it should be, of a run that was partial
// before that.
func (r *Run) absent(partial bool, no int, err error) error {
	if partial && (errors.Is(err, ErrCorrupt) || errors.Is(err, io.EOF)) {
		err = fmt.Errorf("%w: %w", ErrAbsent, err)
	}
	return r.pageError(no, err)
}

// complete fails if some of runs is partial.
func complete(runs []*Run) error {
	for _, r := range runs {
		if r.Partial() {
			return r.pageError(0, ErrAbsent)
		}
	}
	return nil
}
