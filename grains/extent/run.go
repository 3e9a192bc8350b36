package extent

import (
	"encoding/binary"
	"fmt"
	"io"
	"math/bits"
	"sort"

	"graindisk/block"
)

// Storage keeps spilled runs. Numbers are never used twice in the life of a table.
type Storage interface {
	// Create begins a run. Closing the writer makes it stable.
	Create(id uint64) (io.WriteCloser, error)
	// Size is the length of a run in bytes.
	Size(id uint64) (int64, error)
	// ReadAt fills p or fails. Safe for concurrent use.
	ReadAt(id uint64, p []byte, off int64) error
}

// The end of an encoded run; as drawn in the package comment.
const (
	runMagic      = "GDXR"
	runVersion    = 1
	runOffFlags   = 6
	runOffIncomp  = 8
	runOffEntries = 16
	runOffPages   = 24
	runOffIndex   = 28
	runOffFilter  = 32
	runOffCRC     = 36
	runTrailerLen = 40

	pageBytes     = 1024 // where a page ends: a lookup decodes half of one, some 50 entries
	pageBytesMax  = pageBytes + entryBytesMax + crcLen
	entryBytesMax = 32
	entryBytesMin = 2
	filterBits    = 10 // per entry: 1 % false positives
	filterHashes  = 5
)

// The tag of an entry.
const (
	tagKind      = 3
	tagCanonical = 1 << 2
	tagRefs      = 1 << 3
	tagKnown     = 1<<4 - 1
)

// run is a stored row of entries by name: the pages on the storage, the rest in memory.
type run struct {
	id      uint64
	entries uint64
	pages   []page
	filter  filter
}

// page is where entries from the name first on are. It ends where the next begins.
type page struct {
	first block.ExtentID
	off   int64
	len   int
}

func (r *run) bytes() int64 { return int64(len(r.pages))*24 + int64(len(r.filter))*8 }

// filter is a Bloom filter; an empty one has everything.
type filter []uint64

func newFilter(entries uint64) filter { return make(filter, (entries*filterBits+63)/64) }

func (f filter) each(name block.ExtentID, fn func(word int, bit uint64) bool) bool {
	a, n := mix(uint64(name)+1), uint64(len(f))*64
	b := mix(a) | 1
	for range filterHashes {
		i, _ := bits.Mul64(a, n)
		if !fn(int(i/64), 1<<(i%64)) {
			return false
		}
		a += b
	}
	return true
}

func (f filter) add(name block.ExtentID) {
	f.each(name, func(w int, bit uint64) bool { f[w] |= bit; return true })
}

func (f filter) has(name block.ExtentID) bool {
	return f.each(name, func(w int, bit uint64) bool { return f[w]&bit != 0 })
}

// named is an entry of a run.
type named struct {
	name block.ExtentID
	st   State
}

// runWriter encodes entries, names ascending, to w.
type runWriter struct {
	w      io.Writer
	filter filter
	run    run
	page   []byte
	off    int64
	prev   block.ExtentID
	err    error
}

// newRunWriter begins a run of at most entries.
func newRunWriter(w io.Writer, entries uint64) *runWriter {
	return &runWriter{w: w, filter: newFilter(max(entries, 1))}
}

func (w *runWriter) add(x named) {
	if len(w.page) == 0 {
		w.run.pages = append(w.run.pages, page{first: x.name, off: w.off})
		w.prev = x.name - 1
	}
	w.page = appendEntry(w.page, w.prev, x)
	w.prev = x.name
	w.filter.add(x.name)
	w.run.entries++
	if len(w.page) >= pageBytes {
		w.endPage()
	}
}

func (w *runWriter) endPage() {
	if len(w.page) == 0 {
		return
	}
	b := binary.LittleEndian.AppendUint32(w.page, block.CRC(w.page))
	w.run.pages[len(w.run.pages)-1].len = len(b)
	w.off += int64(len(b))
	w.write(b)
	w.page = w.page[:0]
}

func (w *runWriter) write(b []byte) {
	if w.err == nil {
		_, w.err = w.w.Write(b)
	}
}

// end writes the index, the filter and the trailer, and returns the run.
func (w *runWriter) end(id uint64) (*run, error) {
	w.endPage()
	le := binary.LittleEndian
	var b []byte
	next := block.ExtentID(0)
	for _, p := range w.run.pages {
		b = binary.AppendUvarint(b, uint64(p.first-next))
		b = binary.AppendUvarint(b, uint64(p.len))
		next = p.first
	}
	index := len(b)
	for _, word := range w.filter {
		b = le.AppendUint64(b, word)
	}
	t := make([]byte, runTrailerLen)
	copy(t, runMagic)
	le.PutUint16(t[offVersion:], runVersion)
	le.PutUint64(t[runOffEntries:], w.run.entries)
	le.PutUint32(t[runOffPages:], uint32(len(w.run.pages)))
	le.PutUint32(t[runOffIndex:], uint32(index))
	le.PutUint32(t[runOffFilter:], uint32(len(b)-index))
	b = append(b, t...)
	le.PutUint32(b[len(b)-4:], block.CRC(b[:len(b)-4]))
	w.write(b)
	w.run.id, w.run.filter = id, w.filter
	return &w.run, w.err
}

func appendEntry(b []byte, prev block.ExtentID, x named) []byte {
	b = binary.AppendUvarint(b, uint64(x.name-prev-1))
	tag := byte(x.st.Kind)
	if x.st.Canonical {
		tag |= tagCanonical
	}
	if x.st.Refs != 1 {
		tag |= tagRefs
	}
	b = append(b, tag)
	if x.st.Kind != Plain {
		b = binary.AppendVarint(b, int64(x.st.To-x.name))
	}
	if x.st.Refs != 1 {
		b = binary.AppendVarint(b, x.st.Refs-1)
	}
	return b
}

// entry reads what appendEntry wrote.
func (d *decoder) entry(prev block.ExtentID) named {
	x := named{name: prev + 1 + block.ExtentID(d.uint(1<<64-1)), st: plain}
	tag := d.u8()
	x.st.Kind, x.st.Canonical = Kind(tag&tagKind), tag&tagCanonical != 0
	d.check(tag&^tagKnown == 0 && x.st.Kind <= Same && validName(x.name) && x.name > prev)
	if x.st.Kind != Plain {
		x.st.To = x.name + block.ExtentID(d.int())
		d.check(validName(x.st.To) && x.st.To != x.name)
	}
	if tag&tagRefs != 0 {
		x.st.Refs += d.int()
		d.check(x.st.Refs > 1)
	}
	d.check(!x.st.Canonical || x.st.Kind != Same)
	return x
}

func validName(n block.ExtentID) bool { return n.Segment() > 0 && n.Slot() < block.ExtentsMax }

func (d *decoder) entries(first block.ExtentID, fn func(named) bool) error {
	prev := first
	for len(d.in) > 0 {
		x := d.entry(prev)
		if d.bad {
			return fmt.Errorf("page: entry after %v: %w", prev, ErrDamaged)
		}
		if !fn(x) {
			return nil
		}
		prev = x.name
	}
	return nil
}

// openRun reads all of a run but its pages, with read over its size bytes.
func openRun(id uint64, size int64, read func(p []byte, off int64) error) (*run, error) {
	var t [runTrailerLen]byte
	if size < runTrailerLen {
		return nil, fmt.Errorf("run %d of %d bytes: %w", id, size, ErrDamaged)
	}
	if err := read(t[:], size-runTrailerLen); err != nil {
		return nil, err
	}
	le := binary.LittleEndian
	if string(t[:offVersion]) != runMagic {
		return nil, fmt.Errorf("run %d: magic: %w", id, ErrDamaged)
	}
	if v, inc := le.Uint16(t[offVersion:]), le.Uint64(t[runOffIncomp:]); v > runVersion || inc != 0 {
		return nil, fmt.Errorf("run %d: version %d, incompat bits %#x: %w", id, v, inc, ErrNewer)
	}
	index, words := int64(le.Uint32(t[runOffIndex:])), int64(le.Uint32(t[runOffFilter:]))
	if le.Uint16(t[offVersion:]) != runVersion || le.Uint16(t[runOffFlags:]) != 0 || words%8 != 0 || words == 0 || index+words+runTrailerLen > size {
		return nil, fmt.Errorf("run %d: trailer: %w", id, ErrDamaged)
	}
	b := make([]byte, index+words+runTrailerLen)
	if err := read(b, size-int64(len(b))); err != nil {
		return nil, err
	}
	if block.CRC(b[:len(b)-4]) != le.Uint32(b[len(b)-4:]) {
		return nil, fmt.Errorf("run %d: checksum: %w", id, ErrDamaged)
	}
	r := &run{id: id, entries: le.Uint64(t[runOffEntries:]), filter: make(filter, words/8)}
	for i := range r.filter {
		r.filter[i] = le.Uint64(b[index+int64(i)*8:])
	}
	if err := r.decodeIndex(b[:index], int(le.Uint32(t[runOffPages:])), size-int64(len(b))); err != nil {
		return nil, fmt.Errorf("run %d: %w", id, err)
	}
	return r, nil
}

func (r *run) decodeIndex(b []byte, pages int, end int64) error {
	d := decoder{in: b}
	off, prev := int64(0), block.ExtentID(0)
	if d.check(pages <= len(b)/2); !d.bad {
		r.pages = make([]page, pages)
	}
	for i := range r.pages {
		p := page{first: prev + block.ExtentID(d.uint(1<<64-1)), off: off, len: int(d.uint(pageBytesMax))}
		d.check(p.first > prev && validName(p.first) && p.len > crcLen)
		r.pages[i], prev = p, p.first
		off += int64(p.len)
	}
	if d.check(len(d.in) == 0 && off == end && r.entries <= uint64(end)/entryBytesMin); d.bad {
		return fmt.Errorf("index of %d pages: %w", pages, ErrDamaged)
	}
	return nil
}

// get looks for a name in the run.
func (r *run) get(s Storage, name block.ExtentID) (st State, ok bool, err error) {
	if !r.filter.has(name) {
		return st, false, nil
	}
	i := sort.Search(len(r.pages), func(i int) bool { return r.pages[i].first > name }) - 1
	if i < 0 {
		return st, false, nil
	}
	err = r.page(s, i, func(x named) bool {
		if x.name == name {
			st, ok = x.st, true
		}
		return x.name < name
	})
	return st, ok, err
}

// page calls fn with the entries of page i.
func (r *run) page(s Storage, i int, fn func(named) bool) error {
	p := r.pages[i]
	b := make([]byte, p.len)
	err := s.ReadAt(r.id, b, p.off)
	if err == nil {
		err = decodePage(b, p.first, fn)
	}
	if err != nil {
		return fmt.Errorf("exceptions: run %d, page %d at %d: %w", r.id, i, p.off, err)
	}
	return nil
}

// decodePage calls fn with the entries of a page that begins with the name first, until it returns false.
func decodePage(b []byte, first block.ExtentID, fn func(named) bool) error {
	if len(b) < crcLen || block.CRC(b[:len(b)-crcLen]) != binary.LittleEndian.Uint32(b[len(b)-crcLen:]) {
		return fmt.Errorf("checksum: %w", ErrDamaged)
	}
	d := decoder{in: b[:len(b)-crcLen]}
	return d.entries(first-1, fn)
}

// DescribeRun prints the entries of an encoded run. It fails with ErrDamaged or ErrNewer, after printing
// what it could read.
func DescribeRun(w io.Writer, b []byte) error {
	r, err := openRun(0, int64(len(b)), readerOf(b))
	if err != nil {
		return err
	}
	fmt.Fprintf(w, "exceptions   %d in %d pages\n", r.entries, len(r.pages))
	for i, p := range r.pages {
		err := decodePage(b[p.off:p.off+int64(p.len)], p.first, func(x named) bool {
			fmt.Fprintf(w, "extent       %v %s", x.name, [...]string{"plain", "moved to", "same as"}[x.st.Kind])
			if x.st.Kind != Plain {
				fmt.Fprintf(w, " %v", x.st.To)
			}
			if x.st.Canonical {
				fmt.Fprint(w, ", canonical")
			}
			fmt.Fprintf(w, ", %d references\n", x.st.Refs)
			return true
		})
		if err != nil {
			return fmt.Errorf("exceptions: page %d: %w", i, err)
		}
	}
	return nil
}
