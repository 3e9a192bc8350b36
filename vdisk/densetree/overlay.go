package densetree

import (
	"graindisk/block"
	"graindisk/internal/planted"
)

// source gives entries in LBA order, not overlapping; ok is false behind the last.
type source interface {
	next() (p packed, ok bool, err error)
}

// stream stands on one entry of a source, which its user may shorten from the left.
type stream struct {
	src source
	p   packed // valid while ok
	ok  bool
}

// newStream stands on the first entry of src.
func newStream(src source) (*stream, error) {
	s := &stream{src: src}
	return s, s.next()
}

func (s *stream) next() (err error) {
	s.p, s.ok, err = s.src.next()
	return err
}

// entries is a source of entries in memory.
type entries []packed

func (e *entries) next() (p packed, ok bool, err error) {
	if len(*e) == 0 {
		return p, false, nil
	}
	p, *e = (*e)[0], (*e)[1:]
	return p, true, nil
}

// overlay lays newer over older below end: it hands what results to emit, in order, and every pair of
// an older entry and the newer one that hides blocks of it to lose. An entry of newer that reaches
// beyond end is cut there, the rest stays in the stream; one of older must not.
func overlay(newer, older *stream, end block.LBA, emit func(packed) error, lose func(old, newer packed)) error {
	for newer.ok && newer.p.start() < end {
		p := newer.p
		if p.end() > end {
			p, newer.p = p.clip(p.start(), end), p.clip(end, p.end())
		} else if err := newer.next(); err != nil {
			return err
		}
		if planted.Bug("merge: the older entry wins") && older.ok && older.p.start() <= p.start() && p.end() <= older.p.end() {
			continue
		}
		for older.ok && older.p.end() <= p.start() {
			if err := emit(older.p); err != nil {
				return err
			}
			if err := older.next(); err != nil {
				return err
			}
		}
		if older.ok && older.p.start() < p.start() {
			if err := emit(older.p.clip(older.p.start(), p.start())); err != nil {
				return err
			}
			older.p = older.p.clip(p.start(), older.p.end())
		}
		if err := emit(p); err != nil {
			return err
		}
		for older.ok && older.p.start() < p.end() {
			lose(older.p, p)
			if older.p.end() > p.end() {
				older.p = older.p.clip(p.end(), older.p.end())
				break
			}
			if err := older.next(); err != nil {
				return err
			}
		}
	}
	for older.ok && older.p.start() < end {
		if err := emit(older.p); err != nil {
			return err
		}
		if err := older.next(); err != nil {
			return err
		}
	}
	return nil
}

// appendJoined appends p, or lengthens the last entry if p continues it.
func appendJoined(es []packed, p packed) []packed {
	if n := len(es); n > 0 && es[n-1].continues(p) {
		es[n-1] = es[n-1].join(p)
		return es
	}
	return append(es, p)
}
