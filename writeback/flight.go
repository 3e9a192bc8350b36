package writeback

import (
	"slices"

	"graindisk/block"
	"graindisk/tier"
)

// A batch on its way. Batches are built one after the other, by whoever leads, since each states the
// checksum of the one before; they are written at the same time, each by its leader, and shown in order:
//
//	leader of N     build ─ write ────────────── landed ─ show N, N+1
//	leader of N+1           build ─ write ─ landed
//
// Shown means visible, acknowledged and counted written. Until then a failure of N takes N+1 with it:
// see mend.go.

// batch is what a leader writes in one go.
type batch struct {
	file   *logFile
	at     tier.Place
	header batchHeader
	first  []byte   // the file's header, if this is its first batch
	buf    []byte   // the batch's header, encoded
	pieces []piece  // one per record, in order
	ops    [][]byte // one per record, of OP records the payload
	blocks int      // of payload
	iov    [][]byte
	own    []byte // all of it, once it must be written again

	// Log.mu guards these.
	landed bool
	err    error // of the write

	again bool // the mender's: it must be written again
}

// piece is a record, or part of a Data record, in a batch.
type piece struct {
	w    *waiter
	rec  *Record // not to be used once w may have left
	off  int     // first block
	n    int     // blocks of payload
	crcs []uint32
}

// tip is the end of what was built.
type tip struct {
	seq Seq
	crc uint32
}

// spareLocked returns an empty batch.
func (l *Log) spareLocked() *batch {
	if n := len(l.spare); n > 0 {
		b := l.spare[n-1]
		l.spare = l.spare[:n-1]
		return b
	}
	return &batch{}
}

// build encodes the batch to follow at. Only the leader is here, without locks.
func (l *Log) build(b *batch, at tip, stable Seq) {
	f, h := b.file, &b.header
	now := l.opts.Now().UnixNano()
	offset, prevCRC := f.takenEnd, at.crc
	b.at = tier.NewPlace(f.slot, offset)
	if offset == 0 {
		fh := fileHeader{log: l.id, term: l.term, file: f.file, slot: uint32(f.slot),
			slotBlocks: uint32(l.slotBlocks()), first: f.first, stable: stable, prevCRC: prevCRC}
		b.first = fh.encode()
		offset, prevCRC, f.time = 1, fh.crc, now
	}
	*h = batchHeader{log: l.id, term: l.term, file: f.file, offset: offset, first: at.seq + 1,
		stable: stable, prevCRC: prevCRC, time: now, entries: h.entries[:0], crcs: h.crcs[:0]}
	for _, p := range b.pieces {
		h.entries = append(h.entries, p.rec.entryFor(p.off, p.n))
		h.crcs = append(h.crcs, p.crcs...)
		var op []byte
		if p.rec.Kind == Op {
			op = slices.Clone(p.rec.Data)
		}
		b.ops = append(b.ops, op)
	}
	b.buf = h.encode(b.buf)
}

// buffers lists what is to be written at b.at, in order.
func (b *batch) buffers() [][]byte {
	b.iov = b.iov[:0]
	if b.first != nil {
		b.iov = append(b.iov, b.first)
	}
	b.iov = append(b.iov, b.buf)
	for _, p := range b.pieces {
		b.iov = p.appendTo(b.iov)
	}
	return b.iov
}

// blocksAll is how many blocks buffers lists.
func (b *batch) blocksAll() uint32 { return b.header.blocksAll() + uint32(len(b.first)/block.Size) }

// appendTo adds the payload's buffers to iov.
func (p *piece) appendTo(iov [][]byte) [][]byte {
	if p.n == 0 {
		return iov
	}
	data := p.rec.Data[p.off*block.Size : min(len(p.rec.Data), (p.off+p.n)*block.Size)]
	iov = append(iov, data)
	if pad := p.n*block.Size - len(data); pad > 0 {
		iov = append(iov, zeroBlock[:pad])
	}
	return iov
}

// landLocked ends the write of a batch.
func (l *Log) landLocked(b *batch, err error) {
	b.landed, b.err = true, err
	if err != nil && l.err == nil {
		l.hurtLocked()
		if !refused(err) {
			b.file.bad = err
		}
	}
	l.showLandedLocked()
	if !l.leading {
		l.passLeadLocked()
	}
}

// showLandedLocked shows the batches that have landed with all before them, and tells who waited. If
// the log has stopped, it tells them so.
func (l *Log) showLandedLocked() {
	if l.showing || l.mending {
		return // whoever does it goes on
	}
	l.showing = true
	for len(l.flight) > 0 && l.flight[0].landed && (l.err != nil || !l.hurt) {
		b := l.flight[0]
		if l.err == nil {
			l.mu.Unlock()
			l.show(b)
			l.mu.Lock()
		}
		l.flight = slices.Delete(l.flight, 0, 1)
		l.tellLocked(b)
		b.clear()
		l.spare = append(l.spare, b)
	}
	l.showing = false
	if len(l.flight) == 0 {
		l.idle.Broadcast()
	}
	l.restLocked()
}

// tellLocked tells those with records in the batch what became of it.
func (l *Log) tellLocked(b *batch) {
	for i, p := range b.pieces {
		w := p.w
		w.last = b.header.first + Seq(i)
		if i+1 < len(b.pieces) && b.pieces[i+1].w == w {
			continue
		}
		w.flying--
		switch {
		case w.done: // it has left
		case w.flying > 0:
		case l.err != nil:
			w.finish(l.err)
		case w.at == len(w.recs):
			w.finish(nil)
		default:
			w.notify() // it may want to leave
		}
	}
}

// clear forgets what the batch held, but keeps its memory for the next.
func (b *batch) clear() {
	clear(b.pieces)
	clear(b.ops)
	clear(b.iov[:cap(b.iov)])
	*b = batch{header: b.header, buf: b.buf, pieces: b.pieces[:0], ops: b.ops[:0], iov: b.iov[:0]}
}

// show makes a landed batch visible and counts it as written, in one step for a freeze.
func (l *Log) show(b *batch) {
	f, h := b.file, &b.header
	place := tier.NewPlace(f.slot, h.offset+h.headerBlocks)
	l.idx.Lock()
	defer l.idx.Unlock()
	g := l.gens[len(l.gens)-1]
	for i, p := range b.pieces {
		if h.entries[i].kind == Data {
			l.crcs.put(place, p.crcs)
		}
		g.apply(h.first+Seq(i), h.time, h.entries[i], place, b.ops[i])
		place += tier.Place(p.n)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	f.entries = h.appendSealed(f.entries, func(i int) []byte { return b.ops[i] })
	f.end = h.offset + h.blocksAll()
	f.last = h.last()
	f.prevCRC, l.prevCRC = h.crc, h.crc
	l.written = f.last
	if f.full {
		poke(l.toSeal)
	}
}
