package densetree

import (
	"sort"

	"graindisk/block"
)

// pieces hands what a lookup finds to fn, neighbours that continue each other in one piece.
type pieces struct {
	fn   func(Entry) bool
	last packed // not yet handed on, if some
	some bool
	err  error // why the lookup could not go on; nil if fn wanted no more
}

// add takes the next piece; false means that fn wants no more.
func (s *pieces) add(p packed) bool {
	if s.some && s.last.continues(p) {
		s.last = s.last.join(p)
		return true
	}
	ok := s.flush()
	s.last, s.some = p, true
	return ok
}

func (s *pieces) flush() bool {
	return !s.some || s.fn(s.last.entry())
}

// resolve tells fn what [lba, end) is made of, given the hits of level 0 in it and the rows below.
func resolve(hits []packed, rows [][]*Run, lba, end block.LBA, fn func(Entry) bool) error {
	if lba == end {
		return nil
	}
	s := pieces{fn: fn}
	for _, p := range hits {
		if p.start() > lba && !s.below(rows, lba, p.start()) {
			return s.err
		}
		p = p.clip(lba, end)
		if !s.add(p) {
			return nil
		}
		lba = p.end()
	}
	if s.below(rows, lba, end) {
		s.flush()
	}
	return s.err
}

// below adds what the rows say about [lba, end): the first of them, its gaps from the others.
func (s *pieces) below(rows [][]*Run, lba, end block.LBA) bool {
	if lba >= end {
		return true
	}
	if len(rows) == 0 {
		return s.add(pack(Entry{LBA: lba, Blocks: uint64(end - lba), Kind: None}))
	}
	row := rows[0]
	for i := firstRun(row, lba); i < len(row) && row[i].First < end; i++ {
		c := cursor{run: row[i]}
		for c.seek(lba); c.ok && c.p.start() < end; c.next() {
			if !s.below(rows[1:], lba, c.p.start()) {
				return false
			}
			p := c.p.clip(lba, end)
			if !s.add(p) {
				return false
			}
			lba = p.end()
		}
		if c.err != nil {
			s.err = c.err
			return false
		}
	}
	return s.below(rows[1:], lba, end)
}

// firstRun is the index of the first run that ends at or behind lba.
func firstRun(row []*Run, lba block.LBA) int {
	return sort.Search(len(row), func(i int) bool { return row[i].Last >= lba })
}

// cursor walks the entries of a run through the page cache.
type cursor struct {
	run *Run
	no  int // page under in
	in  pageCursor
	p   packed // where it stands; valid while ok
	ok  bool
	err error
}

// seek goes to the first entry that ends behind lba.
func (c *cursor) seek(lba block.LBA) {
	c.no = c.run.pageOf(lba)
	pg, err := c.run.page(c.no)
	if err != nil {
		c.ok, c.err = false, err
		return
	}
	c.in = pg.seek(lba)
	for c.next(); c.ok && c.p.end() <= lba; c.next() {
	}
}

func (c *cursor) next() {
	c.p, c.ok, c.err = c.in.next()
	for !c.ok && c.err == nil && c.no+1 < len(c.run.firsts) {
		c.no++
		pg, err := c.run.page(c.no)
		if err != nil {
			c.err = err
			return
		}
		c.in = pg.seek(0)
		c.p, c.ok, c.err = c.in.next()
	}
	if c.err != nil && c.run.store != nil {
		c.err = c.run.pageError(c.no, c.err)
	}
}
