package densetree

import (
	"encoding/binary"
	"fmt"
	"sort"

	"graindisk/block"
)

// The layout of a page; drawn in the package comment.
const (
	pageBytes    = 4096
	pageID       = 0
	pageFirst    = 8
	pageNo       = 16
	pageCount    = 20
	pageRestarts = 22
	pageHead     = 24
	pageEnd      = pageBytes - crcLen
	restartEvery = 16 // entries between two from which decoding can start
)

// pageBuilder makes one page.
type pageBuilder struct {
	b     [pageBytes + entryBytesMax]byte
	end   int // of the entries
	n     int
	first block.LBA
	at    []uint16 // restarts
	d     delta
}

// entryBytesMax is the most an encoded entry takes: a tag, 4 varints of up to 10 bytes and one of up to 3.
const entryBytesMax = 44

// add appends p and reports whether the page had room for it.
func (w *pageBuilder) add(p packed) bool {
	if w.n == 0 {
		w.first, w.end, w.at = p.start(), pageHead, w.at[:0]
	}
	d, restarts := w.d, len(w.at)
	if w.n%restartEvery == 0 {
		d, restarts = delta{lba: w.first}, restarts+1
	}
	end := len(d.append(w.b[:w.end], p))
	if end+2*restarts > pageEnd {
		return false
	}
	if restarts > len(w.at) {
		w.at = append(w.at, uint16(w.end))
	}
	w.d, w.end = d, end
	w.n++
	return true
}

// appendTo appends the page, which has at least one entry, to b and starts the next.
func (w *pageBuilder) appendTo(b []byte, id uint64, no int) []byte {
	le := binary.LittleEndian
	clear(w.b[w.end:])
	le.PutUint64(w.b[pageID:], id)
	le.PutUint64(w.b[pageFirst:], uint64(w.first))
	le.PutUint32(w.b[pageNo:], uint32(no))
	le.PutUint16(w.b[pageCount:], uint16(w.n))
	le.PutUint16(w.b[pageRestarts:], uint16(len(w.at)))
	for i, at := range w.at {
		le.PutUint16(w.b[pageEnd-2*(i+1):], at)
	}
	le.PutUint32(w.b[pageEnd:], block.CRC(w.b[:pageEnd]))
	w.n = 0
	return append(b, w.b[:pageBytes]...)
}

// page is one page of a run, checked by checkPage.
type page []byte

func (p page) count() int          { return int(binary.LittleEndian.Uint16(p[pageCount:])) }
func (p page) first() block.LBA    { return block.LBA(binary.LittleEndian.Uint64(p[pageFirst:])) }
func (p page) restarts() int       { return int(binary.LittleEndian.Uint16(p[pageRestarts:])) }
func (p page) restart(i int) int   { return int(binary.LittleEndian.Uint16(p[pageEnd-2*(i+1):])) }
func (p page) limit() int          { return pageEnd - 2*p.restarts() } // the entries end before it
func (p page) rest(at int) varints { return varints{b: p[at:p.limit()]} }

// checkPage checks that b is page no of run id and that its restarts lie within it, so that reading
// entries cannot leave it.
func checkPage(b []byte, id uint64, no int, first block.LBA) (page, error) {
	le := binary.LittleEndian
	if got, want := block.CRC(b[:pageEnd]), le.Uint32(b[pageEnd:]); got != want {
		return nil, fmt.Errorf("%w: crc %08x, stored %08x", ErrCorrupt, got, want)
	}
	p := page(b)
	if le.Uint64(b[pageID:]) != id || int(le.Uint32(b[pageNo:])) != no || p.first() != first {
		return nil, fmt.Errorf("%w: it is page %d of run %d", ErrCorrupt, le.Uint32(b[pageNo:]), le.Uint64(b[pageID:]))
	}
	n := p.restarts()
	if p.count() == 0 || n != (p.count()+restartEvery-1)/restartEvery || p.limit() < pageHead {
		return nil, fmt.Errorf("%w: %d entries with %d restarts", ErrCorrupt, p.count(), n)
	}
	for i, at := 0, pageHead; i < n; i++ {
		r := p.restart(i)
		if r < at || r >= p.limit() || i == 0 && r != pageHead {
			return nil, fmt.Errorf("%w: restart %d at %d", ErrCorrupt, i, r)
		}
		at = r + 1
	}
	return p, nil
}

// restartLBA is where the first entry behind restart i starts; EndMax if that cannot be read.
func (p page) restartLBA(i int) block.LBA {
	in := p.rest(p.restart(i))
	lba := p.first()
	if in.byte()&tagGap != 0 {
		lba += block.LBA(in.uint(uint64(EndMax)))
	}
	if in.bad {
		return EndMax
	}
	return lba
}

// pageCursor reads a page's entries in order.
type pageCursor struct {
	in   varints
	d    delta
	page page
	n    int // entries read
}

// seek is a cursor at the last restart that is not behind lba.
func (p page) seek(lba block.LBA) pageCursor {
	i := 0
	if p.restarts() > 1 {
		i = max(0, sort.Search(p.restarts(), func(i int) bool { return p.restartLBA(i) > lba })-1)
	}
	return pageCursor{in: p.rest(p.restart(i)), page: p, n: i * restartEvery}
}

// next reads the next entry; ok is false behind the last.
func (c *pageCursor) next() (p packed, ok bool, err error) {
	if c.page == nil || c.n == c.page.count() {
		return p, false, nil
	}
	if c.n%restartEvery == 0 {
		c.d = delta{lba: c.page.first()}
	}
	c.n++
	p, err = c.d.read(&c.in)
	return p, err == nil, err
}
