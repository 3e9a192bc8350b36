package vdisk

import (
	"cmp"
	"context"
	"errors"
	"slices"

	"graindisk/block"
)

// Part is a range of a read whose outcome is known.
type Part struct {
	From, To int   // bytes of what was asked for
	Hole     bool  // zeroes that are not stored; they are in the buffer too
	Err      error // the range cannot be read and the buffer is undefined there
}

// span is a range of bytes.
type span struct{ from, to int }

// addSpan adds a range that lies behind all others.
func addSpan(list *[]span, from, to int) {
	if n := len(*list); n > 0 && (*list)[n-1].to == from {
		(*list)[n-1].to = to
		return
	}
	*list = append(*list, span{from, to})
}

// ReadPieces fills p from off and calls ready, in the caller's goroutine, as parts of it come: what is
// local at once, the rest as targets answer. Each call has what came together, in order of place,
// neighbours of one kind joined; all calls together cover p exactly. A part fails alone. An error is
// returned, and ready not called, when the request as a whole cannot be served.
func (d *Disk) ReadPieces(ctx context.Context, p []byte, off int64, ready func([]Part)) error {
	if err := d.check(off, int64(len(p))); err != nil || len(p) == 0 {
		return err
	}
	head := int(off % block.Size)
	lba := block.LBA(off / block.Size)
	q := p
	if n := (head + len(p) + block.Size - 1) / block.Size * block.Size; n != len(p) {
		buf := getBuffer(n)
		defer putBuffer(buf)
		q = *buf
	}
	var holes []span
	missing, err := d.readMending(ctx, lba, q, &holes)
	if err != nil {
		return err
	}
	d.observe(off, int64(len(p)), len(missing) > 0)
	tell := func(parts []Part) {
		for i := range parts {
			a := &parts[i]
			if len(q) != len(p) {
				from, to := max(0, a.From-head), min(len(p), a.To-head)
				if a.Err == nil {
					copy(p[from:to], q[from+head:])
				}
				a.From, a.To = from, to
			}
		}
		if parts = joinParts(parts); len(parts) > 0 {
			ready(parts)
		}
	}
	local := localParts(len(q), missing, holes)
	if len(missing) == 0 {
		tell(local)
		return nil
	}
	told := make([]bool, len(missing))
	parts := make([]Part, 0, len(missing))
	err = d.o.Extents.Read(ctx, missing, func(done []Done) {
		parts = append(parts[:0], local...) // at the first call, and never again
		local = nil
		for _, x := range done {
			if errors.Is(x.Err, ErrMoved) {
				continue
			}
			told[x.Piece] = true
			parts = append(parts, missing[x.Piece].part(x.Err))
		}
		tell(parts)
	})
	parts = append(parts[:0], local...)
	for i := range missing {
		if !told[i] {
			pieceErr := err
			if err == nil { // it moved: the map is looked up again
				m := &missing[i]
				pieceErr = d.Read(ctx, m.Dst, (int64(lba)*block.Size)+int64(m.at))
			}
			parts = append(parts, missing[i].part(pieceErr))
		}
	}
	tell(parts)
	return nil
}

func (p Piece) part(err error) Part { return Part{From: p.at, To: p.at + len(p.Dst), Err: err} }

// localParts is what is left of n bytes without the missing pieces, which are in order.
func localParts(n int, missing []Piece, holes []span) []Part {
	var parts []Part
	add := func(from, to int) { // a range without missing pieces
		for len(holes) > 0 && holes[0].to <= to { // holes and pieces do not overlap
			h := holes[0]
			holes = holes[1:]
			if from < h.from {
				parts = append(parts, Part{From: from, To: h.from})
			}
			parts = append(parts, Part{From: h.from, To: h.to, Hole: true})
			from = h.to
		}
		if from < to {
			parts = append(parts, Part{From: from, To: to})
		}
	}
	at := 0
	for _, m := range missing {
		add(at, m.at)
		at = m.at + len(m.Dst)
	}
	add(at, n)
	return parts
}

// holeMin is the least hole that is told from data: 64 KiB, below which a part of its own costs more
// than the zeroes.
const holeMin = 64 << 10

// joinParts sorts parts and joins neighbours of one kind.
func joinParts(parts []Part) []Part {
	slices.SortFunc(parts, func(a, b Part) int { return cmp.Compare(a.From, b.From) })
	out := parts[:0]
	for _, a := range parts {
		if a.Hole && a.To-a.From < holeMin {
			a.Hole = false
		}
		if n := len(out); n > 0 && out[n-1].To == a.From && out[n-1].Hole == a.Hole && (out[n-1].Err == nil) == (a.Err == nil) {
			out[n-1].To = a.To
			continue
		}
		out = append(out, a)
	}
	return out
}
