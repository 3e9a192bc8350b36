package densetree

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"

	"graindisk/internal/vfs"
)

// StoreOptions configure a Store.
type StoreOptions struct {
	FS    vfs.FS
	Dir   string     // exists
	Cache *PageCache // default 16 MiB of its own
	// Level0Total is how many entries all trees may have in their levels 0 before those with more than
	// their share are merged early; default 1 Mi, some 27 MB.
	Level0Total int
}

// Store keeps the runs of all trees of a pool, each in a file of its own: run-<number>. Runs are a few
// hundred KiB and live and die one by one, so that a file per run needs no cleaning of its own, and a
// checkpoint can name runs without copying them. A number is not used twice while the process lives,
// nor while a file bears it. Safe for concurrent use.
//
//	made by a merge, stable ──► in a tree ──► in none, named by ──────► removed
//	                                          a local checkpoint
type Store struct {
	o       StoreOptions
	level0  atomic.Int64  // entries in all levels 0
	trees   atomic.Int64  // open
	merging chan struct{} // holds a token while a merge runs: one at a time bounds memory

	mu      sync.Mutex
	last    uint64              // highest number so far
	found   map[uint64]struct{} // at open; what is not opened are orphans
	kept    map[uint64]struct{} // named by the newest local checkpoint
	dead    map[uint64]struct{} // in no tree any more
	partial map[uint64]*Run     // by number of the file; see AddPartial
}

const (
	pageCacheDefault   = 16 << 20
	level0TotalDefault = 1 << 20
)

// OpenStore lists the run files in o.Dir. They count as orphans until Open has asked for them.
func OpenStore(o StoreOptions) (*Store, error) {
	if o.Cache == nil {
		o.Cache = NewPageCache(pageCacheDefault)
	}
	if o.Level0Total == 0 {
		o.Level0Total = level0TotalDefault
	}
	s := &Store{o: o, merging: make(chan struct{}, 1), found: map[uint64]struct{}{}, kept: map[uint64]struct{}{}, dead: map[uint64]struct{}{}, partial: map[uint64]*Run{}}
	names, err := o.FS.ReadDir(o.Dir)
	if err != nil {
		return nil, fmt.Errorf("densetree: runs: %w", err)
	}
	for _, e := range names {
		if n, ok := parseFileName(e.Name()); ok {
			s.found[n] = struct{}{}
			s.last = max(s.last, n)
		}
	}
	return s, nil
}

// filePrefix begins the name of a run's file.
const filePrefix = "run-"

func parseFileName(name string) (uint64, bool) {
	digits, ok := strings.CutPrefix(name, filePrefix)
	n, err := strconv.ParseUint(digits, 10, 64)
	return n, ok && err == nil && name == fileName(n)
}

func fileName(n uint64) string { return fmt.Sprintf("%s%06d", filePrefix, n) }

func (s *Store) path(n uint64) string { return path.Join(s.o.Dir, fileName(n)) }

// Open reads the index of the run in file number n. Its ID must be id. Errors match ErrCorrupt if the
// file is missing or damaged.
func (s *Store) Open(n, id uint64) (*Run, error) {
	r, err := s.open(n)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, io.EOF) {
		err = fmt.Errorf("%w: %w", ErrCorrupt, err)
	}
	if err == nil && r.ID != id {
		err = fmt.Errorf("%w: it holds run %d", ErrCorrupt, r.ID)
	}
	if err != nil {
		return nil, fmt.Errorf("densetree: run %d in %s: %w", id, s.path(n), err)
	}
	s.mu.Lock()
	delete(s.found, n)
	s.kept[n] = struct{}{} // whoever opens it has it from a checkpoint
	s.mu.Unlock()
	return r, nil
}

func (s *Store) open(n uint64) (r *Run, err error) {
	f, err := s.o.FS.Open(s.path(n))
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	b := make([]byte, pageBytes)
	if _, err := f.ReadAt(b, 0); err != nil {
		return nil, err
	}
	if err := checkStart(b); err != nil {
		return nil, err
	}
	if all := headBytes(int(min(runMax, binary.LittleEndian.Uint32(b[offPages:])))); all > len(b) {
		b = make([]byte, all)
		if _, err := f.ReadAt(b, 0); err != nil {
			return nil, err
		}
	}
	if r, err = decodeHead(b); err != nil {
		return nil, err
	}
	r.store, r.file = s, n
	return r, nil
}

// add writes a run that is in memory to a file of its own, stable but for its name: see syncNames.
func (s *Store) add(r *Run) (*Run, error) {
	s.mu.Lock()
	s.last++
	n := s.last
	s.mu.Unlock()
	if err := s.write(n, r); err != nil {
		s.discard(n)
		return nil, fmt.Errorf("densetree: write %s: %w", s.path(n), err)
	}
	stored := &Run{ID: r.ID, Level: r.Level, First: r.First, Last: r.Last, count: r.count, firsts: r.firsts, store: s, file: n}
	return stored, nil
}

func (s *Store) write(n uint64, r *Run) (err error) {
	f, err := s.o.FS.Create(s.path(n))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if err := f.WritevAt([][]byte{r.head(), r.mem}, 0); err != nil {
		return err
	}
	return f.Sync()
}

// Adopt moves a run of a lower level, in memory and in no tree, to a file: stable once Sync has returned.
// Runs of level 0 stay as they are.
func (s *Store) Adopt(r *Run) (*Run, error) {
	if r.store != nil || r.Level == 0 {
		return r, nil
	}
	return s.add(r)
}

// Sync makes the names of all adopted runs stable.
func (s *Store) Sync() error { return s.syncNames() }

// Discard gives up adopted runs that no tree will have.
func (s *Store) Discard(runs []*Run) {
	for _, r := range runs {
		if r.store == s {
			s.discard(r.file)
		}
	}
	s.sweep()
}

// syncNames makes the names of all files stable that add has made.
func (s *Store) syncNames() error {
	if err := s.o.FS.SyncDir(s.o.Dir); err != nil {
		return fmt.Errorf("densetree: %w", err)
	}
	return nil
}

// page reads one page through the cache.
func (s *Store) page(r *Run, no int) (page, error) {
	key := pageKey{r.file, no}
	if p := s.o.Cache.get(key); p != nil {
		return p, nil
	}
	partial := r.Partial() // before the read: from then on all that Bring writes is there
	f, err := s.o.FS.Open(s.path(r.file))
	if err != nil {
		return nil, r.pageError(no, err)
	}
	b := make([]byte, pageBytes)
	_, err = f.ReadAt(b, r.offset(no))
	if err = errors.Join(err, f.Close()); err != nil {
		return nil, r.absent(partial, no, err)
	}
	p, err := checkPage(b, r.ID, no, r.firsts[no])
	if err != nil {
		return nil, r.absent(partial, no, err)
	}
	s.o.Cache.put(key, p)
	return p, nil
}

func (r *Run) offset(no int) int64 { return int64(headBytes(len(r.firsts)) + no*pageBytes) }

func (r *Run) pageError(no int, err error) error {
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, io.EOF) {
		err = fmt.Errorf("%w: %w", ErrCorrupt, err)
	}
	return &PageError{ID: r.ID, Page: no, File: r.store.path(r.file), Err: err, run: r}
}

// Keep says which files the newest local checkpoint names: those stay, also when no tree needs them any
// more, until the next call; what neither needs is removed. also is true while it is not known whether
// that checkpoint or the one before will be found: then both keep theirs.
func (s *Store) Keep(runs []*Run, also bool) {
	s.mu.Lock()
	if !also {
		s.kept = map[uint64]struct{}{}
	}
	for _, r := range runs {
		if r.store == s {
			s.kept[r.file] = struct{}{}
		}
	}
	s.mu.Unlock()
	s.sweep()
}

// RemoveOrphans removes the files that were there at OpenStore and that Open has not asked for.
func (s *Store) RemoveOrphans() {
	s.mu.Lock()
	for n := range s.found {
		s.dead[n] = struct{}{}
	}
	s.found = nil
	s.mu.Unlock()
	s.sweep()
}

// discard gives up a file that no tree has or will have.
func (s *Store) discard(n uint64) {
	s.mu.Lock()
	s.dead[n] = struct{}{}
	delete(s.partial, n)
	s.mu.Unlock()
}

// sweep removes dead files. One that cannot be removed is an orphan at the next open.
func (s *Store) sweep() {
	s.mu.Lock()
	var gone []uint64
	for n := range s.dead {
		if _, ok := s.kept[n]; !ok {
			gone = append(gone, n)
			delete(s.dead, n)
		}
	}
	s.mu.Unlock()
	slices.Sort(gone)
	for _, n := range gone {
		_ = s.o.FS.Remove(s.path(n))
	}
}

// readAhead is how many pages a merge reads at a time.
const readAhead = 32

// rowReader is the entries of a row of runs as a source. It reads files past the cache, a few pages at
// a time, and must be closed.
type rowReader struct {
	runs []*Run
	no   int // page of runs[0] behind the one under c
	c    pageCursor

	of   *Run // whose pages buf holds, from page from on
	f    vfs.File
	buf  []byte
	from int
}

func newRowReader(runs []*Run) *rowReader { return &rowReader{runs: runs} }

func (in *rowReader) next() (p packed, ok bool, err error) {
	for {
		if p, ok, err = in.c.next(); ok || err != nil {
			return p, ok, err
		}
		if len(in.runs) > 0 && in.no == len(in.runs[0].firsts) {
			in.runs, in.no = in.runs[1:], 0
		}
		if len(in.runs) == 0 {
			return p, false, nil
		}
		pg, err := in.page(in.runs[0], in.no)
		if err != nil {
			return p, false, err
		}
		in.c = pg.seek(0)
		in.no++
	}
}

func (in *rowReader) page(r *Run, no int) (page, error) {
	if p := r.inMemory(no); p != nil {
		return p, nil
	}
	partial := r.Partial()
	if in.of != r {
		in.close()
		f, err := r.store.o.FS.Open(r.store.path(r.file))
		if err != nil {
			return nil, r.pageError(no, err)
		}
		in.of, in.f, in.buf = r, f, in.buf[:0]
	}
	if no < in.from || no >= in.from+len(in.buf)/pageBytes {
		in.buf = append(in.buf[:0], make([]byte, min(readAhead, len(r.firsts)-no)*pageBytes)...)
		in.from = no
		if _, err := in.f.ReadAt(in.buf, r.offset(no)); err != nil {
			in.buf = in.buf[:0]
			return nil, r.absent(partial, no, err)
		}
	}
	p, err := checkPage(in.buf[(no-in.from)*pageBytes:][:pageBytes], r.ID, no, r.firsts[no])
	if err != nil {
		in.buf = in.buf[:0] // what was missing may come
		return nil, r.absent(partial, no, err)
	}
	return p, nil
}

// close closes the file that is open; nothing was written to it.
func (in *rowReader) close() {
	if in.f != nil {
		_ = in.f.Close()
	}
	in.of, in.f = nil, nil
}
