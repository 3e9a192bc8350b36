package writeback

import (
	"context"
	"fmt"
	"slices"

	"graindisk/block"
	"graindisk/internal/planted"
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

	flying int  // batches in flight with a part of it
	lead   bool // it is to lead
	done   bool
	last   Seq
	err    error
	wake   chan struct{} // capacity 1; told when lead or done is set; nil while nobody waits
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
// wait until a slot is free or ctx ends; while the tier takes no writes, all do. After an error part of
// the records may have been written, or may yet be.
func (l *Log) Append(ctx context.Context, recs []Record) (Seq, error) {
	if len(recs) == 0 {
		return l.Written(), nil
	}
	w, err := l.newWaiter(recs)
	if err != nil {
		return 0, err
	}
	l.ensureIndex()
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.err != nil {
		return 0, l.err
	}
	l.settling = false
	l.queue = append(l.queue, w)
	l.waiting += len(w.crcs)
	if l.mayLeadLocked() {
		l.leading, w.lead = true, true
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
	case w.flying > 0 && !l.kept: // what is under way ends soon, for better or worse
		l.mu.Unlock()
		<-w.wake
		l.mu.Lock()
	default:
		if at := slices.Index(l.queue, w); at >= 0 {
			l.queue = slices.Delete(l.queue, at, at+1)
			l.waiting -= len(w.crcs) - w.crcAt
		}
		w.finish(fmt.Errorf("append: %w", context.Cause(ctx)))
	}
}

// mayLeadLocked tells whether one more batch may be built now.
func (l *Log) mayLeadLocked() bool {
	return !l.leading && !l.hurt &&
		(len(l.flight) == 0 || len(l.flight) < flightMost && l.waiting >= l.beside)
}

// leadLocked builds a batch of what waits, passes the lead on, and writes it. The caller leads.
func (l *Log) leadLocked() {
	if len(l.flight) == 0 {
		l.tip = tip{l.written, l.prevCRC}
	}
	b := l.spareLocked()
	if l.err != nil || l.hurt || !l.takeLocked(b) {
		l.spare = append(l.spare, b)
		l.passLeadLocked()
		return
	}
	at, stable := l.tip, l.stable
	l.mu.Unlock()
	l.build(b, at, stable)
	l.mu.Lock()
	h := &b.header
	l.tip = tip{h.last(), h.crc}
	b.file.taken, b.file.takenEnd = h.last(), h.offset+h.blocksAll()
	l.flight = append(l.flight, b)
	for i := 0; planted.Bug("log: acknowledged before it is written") && i < len(b.pieces); i++ {
		if w := b.pieces[i].w; w.at == len(w.recs) {
			w.last = h.first + Seq(i)
			w.finish(nil)
		}
	}
	l.passLeadLocked()
	l.mu.Unlock()
	err := l.space.WriteAt(b.at, b.buffers())
	l.mu.Lock()
	if err == nil {
		l.early.wrote(b.at, b.blocksAll())
	}
	l.landLocked(b, err)
}

// passLeadLocked ends a lead; the first that waits gets it, unless the queue waits for something.
func (l *Log) passLeadLocked() {
	l.leading = false
	if l.err == nil && !l.starved && len(l.queue) > 0 && l.mayLeadLocked() {
		l.leading, l.queue[0].lead = true, true
		l.queue[0].notify()
		return
	}
	l.idle.Broadcast()
	l.restLocked()
}

// slotCameLocked wakes a queue that waited for a slot.
func (l *Log) slotCameLocked() {
	l.starved, l.urgent = false, false
	if !l.leading {
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
		file: l.nextFile, term: l.term, first: l.tip.seq + 1, last: l.tip.seq, taken: l.tip.seq,
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
	room := min(l.slotBlocks()-max(1, int(l.cur.takenEnd)), batchBlocks+headerBlocks(batchBlocks, batchBlocks))
	keep := l.queue[:0]
	full := false
	for _, w := range l.queue {
		if !full && (w.urgent || !l.cur.reserved) {
			before := len(b.pieces)
			full = !b.take(w, room)
			if len(b.pieces) > before {
				w.flying++
			}
		}
		if w.at < len(w.recs) {
			keep = append(keep, w)
		}
	}
	clear(l.queue[len(keep):])
	l.queue = keep
	l.waiting -= b.blocks
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
		w.crcAt += n
		w.off += n
		if n < left {
			return false
		}
		w.at, w.off = w.at+1, 0
	}
	return true
}
