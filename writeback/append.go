package writeback

import (
	"context"
	"fmt"
	"slices"
	"time"

	"graindisk/block"
	"graindisk/internal/planted"
	"graindisk/tier"
)

// Record is one thing to append.
type Record struct {
	Kind   Kind
	Disk   block.DiskID
	LBA    block.LBA // Data, Unmap
	Blocks uint64    // Unmap: length of the range, at least 1
	// Data is whole blocks, at least one (Data), or up to 1 MiB of opaque bytes (Op). It is not
	// kept, and must not change before Append returns.
	Data []byte
}

// entryFor is the entry of n blocks of r's payload from block off on.
func (r *Record) entryFor(off, n int) entry {
	switch r.Kind {
	case Data:
		return entry{Data, r.Disk, uint64(r.LBA) + uint64(off), uint64(n)}
	case Unmap:
		return entry{Unmap, r.Disk, uint64(r.LBA), r.Blocks}
	}
	return entry{Op, r.Disk, uint64(len(r.Data)), uint64(n)}
}

func (r *Record) payloadBlocks() int {
	if r.Kind == Unmap {
		return 0
	}
	return blocksFor(len(r.Data))
}

func (l *Log) check(r *Record) error {
	blocks := r.Blocks
	switch r.Kind {
	case Data:
		if len(r.Data) == 0 || len(r.Data)%block.Size != 0 {
			return fmt.Errorf("append: data of %d bytes: want whole blocks", len(r.Data))
		}
		blocks = uint64(len(r.Data) / block.Size)
	case Unmap:
	case Op:
		if most := min(opBytesMax, (l.slotBlocks()-2)*block.Size); len(r.Data) > most {
			return fmt.Errorf("append: operation of %d bytes: at most %d", len(r.Data), most)
		}
		return nil
	default:
		return fmt.Errorf("append: record of %v", r.Kind)
	}
	if blocks == 0 || blocks > lbaMax || uint64(r.LBA) > lbaMax-blocks {
		return fmt.Errorf("append: %d blocks at %d of disk %d: out of range", blocks, r.LBA, r.Disk)
	}
	return nil
}

// waiter is one Append under way. Log.mu guards it, but for recs and crcs, which do not change.
type waiter struct {
	recs   []Record
	crcs   []uint32 // of all payload blocks in order
	urgent bool     // no Data: may use the reserve
	at     int      // records wholly taken into a batch
	off    int      // blocks of recs[at] taken
	crcAt  int      // crcs taken

	inFlight bool // part of it is in the batch being written
	lead     bool // it is to lead
	done     bool
	last     Seq
	err      error
	wake     chan struct{} // capacity 1; told when lead or done is set; nil while nobody waits
}

func (l *Log) newWaiter(recs []Record) (*waiter, error) {
	w := &waiter{recs: recs, urgent: true}
	n := 0
	for i := range recs {
		if err := l.check(&recs[i]); err != nil {
			return nil, err
		}
		n += recs[i].payloadBlocks()
		w.urgent = w.urgent && recs[i].Kind != Data
	}
	w.crcs = make([]uint32, 0, n)
	for i := range recs {
		if recs[i].Kind == Unmap {
			continue
		}
		for p := recs[i].Data; len(p) > 0; p = p[min(len(p), block.Size):] {
			c := block.CRC(p[:min(len(p), block.Size)])
			if len(p) < block.Size {
				c = crcSeeded(c, zeroBlock[:block.Size-len(p)])
			}
			w.crcs = append(w.crcs, c)
		}
	}
	return w, nil
}

func (w *waiter) finish(err error) {
	w.done, w.err = true, err
	w.notify()
}

func (w *waiter) notify() {
	if w.wake != nil {
		poke(w.wake)
	}
}

// Append writes records in their order and returns the sequence of the last when all are written:
// visible to Lookup, and safe from the death of the process; Sync makes them stable. Concurrent
// appends go out together. Data too large for a batch is split. Without space, appends with Data
// wait until a slot is free or ctx ends. After an error part of the records may have been written.
func (l *Log) Append(ctx context.Context, recs []Record) (Seq, error) {
	if len(recs) == 0 {
		return l.Written(), nil
	}
	w, err := l.newWaiter(recs)
	if err != nil {
		return 0, err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.err != nil {
		return 0, l.err
	}
	l.replay, l.settling = nil, false
	l.queue = append(l.queue, w)
	if !l.writing {
		l.writing, w.lead = true, true
	}
	for !w.done {
		if w.lead {
			w.lead = false
			l.leadLocked()
			continue
		}
		l.waitLocked(ctx, w)
	}
	if w.lead { // told to lead, but finished by an error first
		l.passLeadLocked()
	}
	return w.last, w.err
}

// Admit waits while appends with Data wait for a slot. A caller that holds locks during Append calls
// it first, so that hardly ever a lock is held for as long as the tier is full.
func (l *Log) Admit(ctx context.Context) error {
	for {
		l.mu.Lock()
		starved, err := l.starved, l.err
		l.mu.Unlock()
		if err != nil || !starved {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(slotPoll):
		}
	}
}

// Roomy tells whether an append of so many blocks of data would most likely go straight into the
// current file, without waiting for a slot. It is a hint: other appends may come first.
func (l *Log) Roomy(blocks int) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.err == nil && !l.starved && len(l.queue) == 0 && l.cur != nil && !l.cur.reserved &&
		l.slotBlocks()-int(l.cur.end) >= 2*blocks+64
}

// waitLocked waits until w is told something, or takes it out of the queue when ctx ends.
func (l *Log) waitLocked(ctx context.Context, w *waiter) {
	if w.wake == nil {
		w.wake = make(chan struct{}, 1)
	}
	l.mu.Unlock()
	select {
	case <-w.wake:
		l.mu.Lock()
		return
	case <-ctx.Done():
	}
	l.mu.Lock()
	switch {
	case w.done:
	case w.inFlight: // the write under way ends soon, for better or worse
		l.mu.Unlock()
		<-w.wake
		l.mu.Lock()
	default:
		l.queue = slices.DeleteFunc(l.queue, func(x *waiter) bool { return x == w })
		w.finish(fmt.Errorf("append: %w", context.Cause(ctx)))
	}
}

// batch is what a leader writes in one go. The log has one, used by whoever leads.
type batch struct {
	file   *logFile
	header batchHeader
	pieces []piece // one per record, in order
	blocks int     // of payload
	buf    []byte
	iov    [][]byte
}

// piece is a record, or part of a Data record, in a batch.
type piece struct {
	w    *waiter
	rec  *Record
	off  int // first block
	n    int // blocks of payload
	crcs []uint32
}

// leadLocked writes one batch of what waits and passes the lead on. The caller leads.
func (l *Log) leadLocked() {
	b := &l.batch
	if l.err == nil && l.takeLocked(b) {
		stable := l.stable
		for i := 0; planted.Bug("log: acknowledged before it is written") && i < len(b.pieces); i++ {
			if p := b.pieces[i]; p.w.at == len(p.w.recs) {
				p.w.finish(nil)
			}
		}
		l.mu.Unlock()
		err := l.write(b, stable)
		l.mu.Lock()
		if err != nil {
			l.failLocked(fmt.Errorf("%w: %w", ErrFailed, err))
		}
		for i, p := range b.pieces {
			p.w.inFlight = false
			p.w.last = b.header.first + Seq(i)
			if l.err != nil {
				p.w.finish(l.err)
			} else if p.w.at == len(p.w.recs) {
				p.w.finish(nil)
			} else {
				p.w.notify() // it may want to leave
			}
		}
		clear(b.pieces)
	}
	l.passLeadLocked()
}

// passLeadLocked ends a lead; the first that waits gets it, unless the queue waits for a slot.
func (l *Log) passLeadLocked() {
	if l.err == nil && !l.starved && len(l.queue) > 0 {
		l.queue[0].lead = true
		l.queue[0].notify()
		return
	}
	l.writing = false
	l.idle.Broadcast()
}

// slotCameLocked wakes a queue that waited for a slot.
func (l *Log) slotCameLocked() {
	l.starved, l.urgent = false, false
	if !l.writing {
		l.writing = true
		l.passLeadLocked()
	}
}

// takeLocked gathers a batch; false if nothing waits or what waits must wait for a slot.
func (l *Log) takeLocked(b *batch) bool {
	l.starved, l.urgent = false, false
	for len(l.queue) > 0 {
		urgent := slices.ContainsFunc(l.queue, func(w *waiter) bool { return w.urgent })
		if l.cur != nil {
			l.fillLocked(b)
			if len(b.pieces) > 0 {
				return true
			}
		}
		if len(l.ready) == 0 || !urgent && (l.ready[0].reserved || l.cur != nil && l.cur.reserved) {
			l.starved, l.urgent = true, urgent
			poke(l.kick)
			return false
		}
		l.nextFileLocked()
	}
	return false
}

// nextFileLocked retires the current file and starts one in the first ready slot.
func (l *Log) nextFileLocked() {
	f := &logFile{
		slot: l.ready[0].slot, reserved: l.ready[0].reserved,
		file: l.nextFile, term: l.term, first: l.written + 1, last: l.written, prevCRC: l.prevCRC,
	}
	l.nextFile++
	l.ready = slices.Delete(l.ready, 0, 1)
	if l.cur != nil {
		l.cur.full = true
		poke(l.toSeal)
	}
	l.cur = f
	l.files = append(l.files, f)
	poke(l.kick)
}

// fillLocked moves from the queue into b what fits the current file, and nothing if nothing fits.
func (l *Log) fillLocked(b *batch) {
	b.file, b.blocks, b.pieces = l.cur, 0, b.pieces[:0]
	room := min(l.slotBlocks()-max(1, int(l.cur.end)), batchBlocks+headerBlocks(batchBlocks, batchBlocks))
	keep := l.queue[:0]
	full := false
	for _, w := range l.queue {
		if !full && (w.urgent || !l.cur.reserved) {
			full = !b.take(w, room)
		}
		if w.at < len(w.recs) {
			keep = append(keep, w)
		}
	}
	clear(l.queue[len(keep):])
	l.queue = keep
}

// take adds w's records as far as they fit into room blocks; false if not all did.
func (b *batch) take(w *waiter, room int) bool {
	for w.at < len(w.recs) {
		r := &w.recs[w.at]
		left := r.payloadBlocks() - w.off
		n := min(left, max(room-b.blocks, 0))
		for n >= 0 && headerBlocks(len(b.pieces)+1, b.blocks+n)+b.blocks+n > room {
			n--
		}
		if n < left && (r.Kind != Data || n < 1) {
			return false
		}
		b.pieces = append(b.pieces, piece{w, r, w.off, n, w.crcs[w.crcAt : w.crcAt+n]})
		b.blocks += n
		w.inFlight = true
		w.crcAt += n
		w.off += n
		if n < left {
			return false
		}
		w.at, w.off = w.at+1, 0
	}
	return true
}

// write writes the batch, makes it visible and counts it. Only the leader is here, without locks.
func (l *Log) write(b *batch, stable Seq) error {
	f, h := b.file, &b.header
	now := l.opts.Now().UnixNano()
	b.iov = b.iov[:0]
	at, offset := tier.NewPlace(f.slot, f.end), max(1, f.end)
	if f.end == 0 {
		fh := fileHeader{log: l.id, term: l.term, file: f.file, slot: uint32(f.slot),
			slotBlocks: uint32(l.slotBlocks()), first: f.first, stable: stable, prevCRC: f.prevCRC}
		b.iov = append(b.iov, fh.encode())
		f.prevCRC, f.time = fh.crc, now
	}
	*h = batchHeader{log: l.id, term: l.term, file: f.file, offset: offset, first: f.last + 1,
		stable: stable, prevCRC: f.prevCRC, time: now, entries: h.entries[:0], crcs: h.crcs[:0]}
	for _, p := range b.pieces {
		h.entries = append(h.entries, p.rec.entryFor(p.off, p.n))
		h.crcs = append(h.crcs, p.crcs...)
	}
	b.buf = h.encode(b.buf)
	b.iov = append(b.iov, b.buf)
	for _, p := range b.pieces {
		b.iov = p.appendTo(b.iov)
	}
	if err := l.space.WriteAt(at, b.iov); err != nil {
		return err
	}
	clear(b.iov)
	f.entries = h.appendSealed(f.entries, func(i int) []byte { return b.pieces[i].rec.Data })
	l.show(b, now)
	return nil
}

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

// show makes a written batch visible and counts it as written, in one step for a freeze.
func (l *Log) show(b *batch, now int64) {
	f, h := b.file, &b.header
	place := tier.NewPlace(f.slot, h.offset+h.headerBlocks)
	l.idx.Lock()
	defer l.idx.Unlock()
	g := l.gens[len(l.gens)-1]
	for i, p := range b.pieces {
		var payload []byte
		if h.entries[i].kind == Op {
			payload = slices.Clone(p.rec.Data)
		}
		g.apply(h.first+Seq(i), now, h.entries[i], place, p.crcs, payload)
		place += tier.Place(p.n)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	f.end = h.offset + h.blocksAll()
	f.last = h.last()
	f.prevCRC, l.prevCRC = h.crc, h.crc
	l.written = f.last
}
