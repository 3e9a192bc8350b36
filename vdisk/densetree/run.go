package densetree

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"sort"
	"sync"
	"sync/atomic"

	"graindisk/block"
)

var (
	// ErrCorrupt means bytes or a set of runs that no tree has written.
	ErrCorrupt = errors.New("damaged run")
	// ErrNewer means a run written by a newer version of the format.
	ErrNewer = errors.New("run format is newer than this program")
)

// Run is an immutable sorted row of entries on one level, never empty. Its ID names its content
// within the tree. Its pages are in memory or in a file of a Store; the index of pages is in memory.
type Run struct {
	ID     uint64
	Level  int       // 0 only in memory: level 0 of a Snapshot, or a frozen one
	Frozen bool      // a level 0 that waits to be merged; newer than all levels, older than level 0
	First  block.LBA // first block covered
	Last   block.LBA // last block covered

	count  int
	firsts []block.LBA         // per page
	mem    []byte              // the pages, if they are in memory
	store  *Store              // else where they are
	file   uint64              // number of the file there
	refs   atomic.Int64        // rows that hold the run
	mended atomic.Pointer[Run] // the same in memory, once the file proved damaged

	partial atomic.Bool // the file may lack pages
	spare   sync.Map    // of a partial run: pages that the file did not take, by number
}

// Len is the number of entries.
func (r *Run) Len() int { return r.count }

// File is the number of the store's file that holds the run, by which Store.Open finds it again; 0 if
// the run is in memory.
func (r *Run) File() uint64 { return r.file }

// Each tells fn the entries in LBA order until it returns false.
func (r *Run) Each(fn func(Entry) bool) error {
	in := newRowReader([]*Run{r})
	defer in.close()
	for {
		p, ok, err := in.next()
		if err != nil || !ok || !fn(p.entry()) {
			return err
		}
	}
}

// page is one checked page.
func (r *Run) page(no int) (page, error) {
	if p := r.inMemory(no); p != nil {
		return p, nil
	}
	return r.store.page(r, no)
}

// inMemory is a page of a run that is in memory, else nil.
func (r *Run) inMemory(no int) page {
	if m := r.mended.Load(); m != nil {
		r = m
	}
	if r.mem == nil {
		if r.partial.Load() {
			p, _ := r.spare.Load(no)
			spare, _ := p.(page)
			return spare
		}
		return nil
	}
	return r.mem[no*pageBytes:][:pageBytes]
}

// PageError is a page that cannot be read. It matches what was wrong with it.
type PageError struct {
	ID   uint64 // of the run
	Page int
	File string
	Err  error
	run  *Run
}

// Error implements error.
func (e *PageError) Error() string {
	return fmt.Sprintf("densetree: run %d: page %d of %s: %v", e.ID, e.Page, e.File, e.Err)
}

// Unwrap is what was wrong.
func (e *PageError) Unwrap() error { return e.Err }

// Mend has the run be read from memory, from a copy of it that was found elsewhere, for as long as it
// lives. It refuses another run.
func (e *PageError) Mend(from *Run) error {
	r := e.run
	if from.mem == nil || from.ID != r.ID || from.count != r.count || from.First != r.First || from.Last != r.Last || !slices.Equal(from.firsts, r.firsts) {
		return fmt.Errorf("densetree: mend run %d: %w: the copy is another run, %d", r.ID, ErrCorrupt, from.ID)
	}
	r.mended.Store(from)
	return nil
}

// pageOf is the number of the page in which an entry that covers lba would be.
func (r *Run) pageOf(lba block.LBA) int {
	return max(0, sort.Search(len(r.firsts), func(i int) bool { return r.firsts[i] > lba })-1)
}

// runBuilder makes a run of entries that are added in order.
type runBuilder struct {
	id     uint64
	count  int
	first  block.LBA
	end    block.LBA
	page   pageBuilder
	firsts []block.LBA
	pages  []byte
}

func (w *runBuilder) add(p packed) {
	if !w.page.add(p) {
		w.flush()
		w.page.add(p)
	}
	if w.count == 0 {
		w.first = p.start()
	}
	w.end = p.end()
	w.count++
}

func (w *runBuilder) flush() {
	w.pages = w.page.appendTo(w.pages, w.id, len(w.firsts))
	w.firsts = append(w.firsts, w.page.first)
}

// finish is the run of what was added, at least one entry, in memory.
func (w *runBuilder) finish(level int, frozen bool) *Run {
	w.flush()
	return &Run{
		ID: w.id, Level: level, Frozen: frozen, First: w.first, Last: w.end - 1, count: w.count,
		firsts: slices.Clone(w.firsts), mem: slices.Clip(w.pages),
	}
}

// The encoded head; offsets as drawn in the package comment.
const (
	runMagic   = "GDRN"
	runVersion = 2
	offVersion = 4
	offFlags   = 6
	offIncomp  = 8
	offID      = 16
	offLevel   = 24
	offCount   = 28
	offFirst   = 32
	offLast    = 40
	offBody    = 48
	offPages   = 52
	offIndex   = 56
	crcLen     = 4

	flagFrozen = 1
)

// headBytes is the length of the head of a run of so many pages, padding included.
func headBytes(pages int) int {
	return (offIndex + 8*pages + crcLen + pageBytes - 1) / pageBytes * pageBytes
}

func (r *Run) head() []byte {
	b := make([]byte, headBytes(len(r.firsts)))
	le := binary.LittleEndian
	copy(b, runMagic)
	le.PutUint16(b[offVersion:], runVersion)
	if r.Frozen {
		le.PutUint16(b[offFlags:], flagFrozen)
	}
	le.PutUint64(b[offID:], r.ID)
	le.PutUint32(b[offLevel:], uint32(r.Level))
	le.PutUint32(b[offCount:], uint32(r.count))
	le.PutUint64(b[offFirst:], uint64(r.First))
	le.PutUint64(b[offLast:], uint64(r.Last))
	le.PutUint32(b[offBody:], uint32(len(r.firsts)*pageBytes))
	le.PutUint32(b[offPages:], uint32(len(r.firsts)))
	for i, f := range r.firsts {
		le.PutUint64(b[offIndex+8*i:], uint64(f))
	}
	end := offIndex + 8*len(r.firsts)
	le.PutUint32(b[end:], block.CRC(b[:end]))
	return b
}

// Encode is the run in its stored form. It reads, and checks, the pages of a run that is not in memory.
func (r *Run) Encode() ([]byte, error) {
	b := r.head()
	if r.mem != nil {
		return append(b, r.mem...), nil
	}
	in := newRowReader([]*Run{r})
	defer in.close()
	for no := range r.firsts {
		p, err := in.page(r, no)
		if err != nil {
			return nil, err
		}
		b = append(b, p...)
	}
	return b, nil
}

// startLen is how much of a run must be at hand for checkStart.
const startLen = offIndex

// checkStart checks the magic and what says whether we can read the rest.
func checkStart(b []byte) error {
	if len(b) < startLen || string(b[:offVersion]) != runMagic {
		return fmt.Errorf("%w: not a run", ErrCorrupt)
	}
	if v := binary.LittleEndian.Uint16(b[offVersion:]); v > runVersion {
		return fmt.Errorf("%w: version %d", ErrNewer, v)
	} else if v == 0 {
		return fmt.Errorf("%w: version 0", ErrCorrupt)
	}
	if bits := binary.LittleEndian.Uint64(b[offIncomp:]); bits != 0 {
		return fmt.Errorf("%w: incompat bits %#x", ErrNewer, bits)
	}
	return nil
}

// RunLen is the length of the encoded run at the head of b, for runs that lie back to back.
func RunLen(b []byte) (int, error) {
	if err := checkStart(b); err != nil {
		return 0, fmt.Errorf("densetree: no run here: %w", err)
	}
	n := int64(binary.LittleEndian.Uint32(b[offBody:]))
	if binary.LittleEndian.Uint16(b[offVersion:]) == 1 {
		n += headerLenV1 + crcLen
	} else {
		n += int64(headBytes(int(n / pageBytes)))
	}
	if n > int64(len(b)) {
		return 0, fmt.Errorf("densetree: run of %d bytes in %d: %w", n, len(b), ErrCorrupt)
	}
	return int(n), nil
}

// decodeHead reads the head of a run of version 2, all of it and nothing else.
func decodeHead(b []byte) (*Run, error) {
	le := binary.LittleEndian
	pages := int(le.Uint32(b[offPages:]))
	if pages > runMax || len(b) != headBytes(pages) {
		return nil, fmt.Errorf("%w: head of %d bytes for %d pages", ErrCorrupt, len(b), pages)
	}
	end := offIndex + 8*pages
	if got, want := block.CRC(b[:end]), le.Uint32(b[end:]); got != want {
		return nil, fmt.Errorf("%w: crc %08x, stored %08x", ErrCorrupt, got, want)
	}
	r := &Run{
		ID: le.Uint64(b[offID:]), Level: int(int32(le.Uint32(b[offLevel:]))), Frozen: le.Uint16(b[offFlags:]) == flagFrozen,
		First: block.LBA(le.Uint64(b[offFirst:])), Last: block.LBA(le.Uint64(b[offLast:])),
		count: int(le.Uint32(b[offCount:])), firsts: make([]block.LBA, pages),
	}
	for i := range r.firsts {
		r.firsts[i] = block.LBA(le.Uint64(b[offIndex+8*i:]))
		if i > 0 && r.firsts[i] <= r.firsts[i-1] {
			return nil, fmt.Errorf("run %d: %w: page %d starts at %d", r.ID, ErrCorrupt, i, r.firsts[i])
		}
	}
	if le.Uint16(b[offFlags:]) > flagFrozen || r.Level < 0 || r.Level > levelsMax || r.Frozen && r.Level > 0 ||
		pages == 0 || r.count < pages || r.count > runMax || int(le.Uint32(b[offBody:])) != pages*pageBytes ||
		r.First != r.firsts[0] || r.Last < r.firsts[pages-1] || r.Last >= EndMax || !isZero(b[end+crcLen:]) {
		return nil, fmt.Errorf("run %d: %w: head", r.ID, ErrCorrupt)
	}
	return r, nil
}

func isZero(b []byte) bool {
	return !slices.ContainsFunc(b, func(c byte) bool { return c != 0 })
}

// DecodeRun reads what Encode wrote, this release's or an older one's, into memory and checks every
// entry; b is not kept. Errors match ErrCorrupt or ErrNewer.
func DecodeRun(b []byte) (*Run, error) {
	r, err := decodeRun(b)
	if err != nil {
		return nil, fmt.Errorf("densetree: decode run: %w", err)
	}
	return r, nil
}

func decodeRun(b []byte) (*Run, error) {
	if err := checkStart(b); err != nil {
		return nil, err
	}
	if binary.LittleEndian.Uint16(b[offVersion:]) == 1 {
		return decodeV1(b)
	}
	n := headBytes(int(min(runMax, binary.LittleEndian.Uint32(b[offPages:]))))
	if n > len(b) {
		return nil, fmt.Errorf("%w: head of %d bytes in %d", ErrCorrupt, n, len(b))
	}
	r, err := decodeHead(b[:n])
	if err != nil {
		return nil, err
	}
	if len(b) != n+len(r.firsts)*pageBytes {
		return nil, fmt.Errorf("run %d: %w: %d bytes for %d pages", r.ID, ErrCorrupt, len(b), len(r.firsts))
	}
	r.mem = slices.Clone(b[n:])
	return r, r.verify()
}

// verify reads all of a run in memory and checks that its head tells the truth.
func (r *Run) verify() error {
	count, end := 0, r.First
	for no, first := range r.firsts {
		p, err := checkPage(r.mem[no*pageBytes:][:pageBytes], r.ID, no, first)
		if err != nil {
			return fmt.Errorf("run %d: page %d: %w", r.ID, no, err)
		}
		c := p.seek(0)
		for i := 0; ; i++ {
			if i%restartEvery == 0 && i < p.count() && len(c.in.b) != p.limit()-p.restart(i/restartEvery) {
				return fmt.Errorf("run %d: page %d: %w: restart at entry %d", r.ID, no, ErrCorrupt, i)
			}
			e, ok, err := c.next()
			if err != nil {
				return fmt.Errorf("run %d: page %d: entry %d: %w", r.ID, no, i, err)
			}
			if !ok {
				break
			}
			if e.start() < end || i == 0 && e.start() != first {
				return fmt.Errorf("run %d: page %d: %w: entry %d starts at %d", r.ID, no, ErrCorrupt, i, e.start())
			}
			end = e.end()
			count++
		}
		if !isZero(c.in.b) {
			return fmt.Errorf("run %d: page %d: %w: bytes behind the last entry", r.ID, no, ErrCorrupt)
		}
	}
	if count != r.count || end-1 != r.Last {
		return fmt.Errorf("run %d: %w: %d entries up to %d", r.ID, ErrCorrupt, count, end)
	}
	return nil
}
