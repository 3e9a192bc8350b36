package vdisk

import (
	"context"
	"errors"
	"fmt"
	"math/bits"
	"sync"

	"graindisk/block"
	"graindisk/internal/planted"
	"graindisk/writeback"
)

// OpKind says what an Op does.
type OpKind uint8

// The kinds of Op.
const (
	OpWrite OpKind = iota + 1 // Data replaces [Off, Off+Len)
	OpTrim                    // the whole blocks within [Off, Off+Len) read as zeroes
	OpZero                    // exactly [Off, Off+Len) reads as zeroes
)

// Op is one change of a disk.
type Op struct {
	Kind     OpKind
	Off, Len int64  // bytes
	Data     []byte // OpWrite: Len bytes, not kept after the call
}

// Write applies ops in their order. When it returns nil, all of them survive the death of the
// process; with stable, also a power cut. On error any prefix of them may have been applied.
func (d *Disk) Write(ctx context.Context, ops []Op, stable bool) error {
	for i := range ops {
		if err := d.check(ops[i].Off, ops[i].Len); err != nil {
			return err
		}
	}
	for len(ops) > 0 {
		n, err := d.writeSome(ctx, ops)
		if err != nil {
			return fmt.Errorf("write to disk %s: %w", d.Name(), err)
		}
		ops = ops[n:]
	}
	if stable {
		return d.Flush(ctx)
	}
	return nil
}

// Prompt tells whether Write of ops would most likely wait neither for room in the log nor for a
// target: they cover whole blocks and fit the log's current file. It is a hint.
func (d *Disk) Prompt(ops []Op) bool {
	blocks := 0
	for i := range ops {
		if ops[i].Kind != OpWrite || ops[i].partial() {
			return false
		}
		blocks += int(ops[i].Len / block.Size)
	}
	return d.o.Log.Roomy(blocks)
}

// writeSome applies the first op if it covers blocks partly, else all leading ops that do not.
func (d *Disk) writeSome(ctx context.Context, ops []Op) (int, error) {
	if ops[0].partial() {
		if err := d.o.Log.Admit(ctx, int(ops[0].dataBytes())); err != nil {
			return 0, err
		}
		return 1, d.writePartial(ctx, ops[0])
	}
	n := 0
	bytes := int64(0)
	for ; n < len(ops) && !ops[n].partial(); n++ {
		if n > 0 && bytes == 0 && ops[n].Kind == OpWrite {
			break // what needs no space does not wait with what does
		}
		bytes += ops[n].dataBytes()
	}
	if bytes > 0 {
		if err := d.o.Log.Admit(ctx, int(bytes)); err != nil {
			return 0, err
		}
	}
	var locks lockSet
	recs := make([]writeback.Record, 0, 8)
	for _, op := range ops[:n] {
		lba, blocks := op.inner()
		if blocks == 0 {
			continue
		}
		locks.add(lba, blocks)
		recs = append(recs, d.record(op.Kind, lba, blocks, op.Data))
	}
	if len(recs) == 0 {
		return n, nil
	}
	d.lock(locks, false)
	defer d.unlock(locks, false)
	if err := d.unchanged(ops[:n]); err != nil {
		return 0, err
	}
	_, err := d.o.Log.Append(ctx, recs)
	return n, err
}

func (d *Disk) record(kind OpKind, lba block.LBA, blocks uint64, data []byte) writeback.Record {
	if kind == OpWrite {
		return writeback.Record{Kind: writeback.Data, Disk: d.o.ID, LBA: lba, Data: data}
	}
	return writeback.Record{Kind: writeback.Unmap, Disk: d.o.ID, LBA: lba, Blocks: blocks}
}

// writePartial applies an op whose first or last block is covered partly.
func (d *Disk) writePartial(ctx context.Context, op Op) error {
	var locks lockSet
	first := block.LBA(op.Off / block.Size)
	end := block.LBA((op.Off + op.Len + block.Size - 1) / block.Size)
	locks.add(first, uint64(end-first))
	edges := getBuffer(2 * block.Size)
	defer putBuffer(edges)
	have, moved := map[block.ExtentID][]byte{}, map[block.ExtentID]bool{}
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		missing, err := d.tryPartial(ctx, op, locks, *edges, have)
		if pe := d.mendable(err); pe != nil && d.o.MendMap(ctx, pe) == nil {
			continue
		}
		if err != nil && ctx.Err() != nil { // it waited for targets
			return ctx.Err()
		}
		if err != nil || len(missing) == 0 {
			return err
		}
		// The blocks are fetched without the lock and offered to the next try, which takes them
		// only if the map still names the same extents; those never change.
		for _, m := range missing {
			buf := make([]byte, m.Orig*block.Size)
			err := d.o.Extents.Read(ctx, []Piece{{Disk: d.o.ID, ID: m.ID, Orig: m.Orig, Dst: buf}}, nil)
			if errors.Is(err, ErrMoved) && !moved[m.ID] {
				moved[m.ID] = true // the next try looks the map up again
				continue
			}
			if err != nil {
				return err
			}
			have[m.ID] = buf
		}
	}
}

// tryPartial reads the partly covered blocks, changes them and appends, all under the block locks;
// or it returns the pieces that must be fetched first.
func (d *Disk) tryPartial(ctx context.Context, op Op, locks lockSet, edges []byte, have map[block.ExtentID][]byte) ([]Piece, error) {
	if planted.Bug("write: read-modify-write without the lock") {
		locks = 0
	}
	d.lock(locks, true)
	defer d.unlock(locks, true)
	if err := d.unchanged([]Op{op}); err != nil {
		return nil, err
	}
	recs := make([]writeback.Record, 0, 3)
	edge := func(lba block.LBA, buf []byte) ([]Piece, error) {
		missing, err := d.readLocal(lba, buf, have, nil)
		if err != nil || len(missing) > 0 {
			return missing, err
		}
		at := int64(lba) * block.Size
		from, to := max(op.Off, at), min(op.Off+op.Len, at+block.Size)
		if op.Kind == OpWrite {
			copy(buf[from-at:], op.Data[from-op.Off:to-op.Off])
		} else {
			clear(buf[from-at : to-at])
		}
		recs = append(recs, d.record(OpWrite, lba, 1, buf))
		return nil, nil
	}
	lba, blocks := op.inner()
	head, tail := op.Off%block.Size, (op.Off+op.Len)%block.Size
	first, last := block.LBA(op.Off/block.Size), block.LBA((op.Off+op.Len)/block.Size)
	if head != 0 {
		if missing, err := edge(first, edges[:block.Size]); err != nil || len(missing) > 0 {
			return missing, err
		}
	}
	if blocks > 0 {
		var data []byte
		if op.Kind == OpWrite {
			at := int64(lba)*block.Size - op.Off
			data = op.Data[at : at+int64(blocks)*block.Size]
		}
		recs = append(recs, d.record(op.Kind, lba, blocks, data))
	}
	if tail != 0 && (head == 0 || last != first) {
		if missing, err := edge(last, edges[block.Size:]); err != nil || len(missing) > 0 {
			return missing, err
		}
	}
	_, err := d.o.Log.Append(ctx, recs)
	return nil, err
}

// partial tells whether the op changes a block without covering it.
func (o Op) partial() bool {
	return o.Kind != OpTrim && o.Len > 0 && (o.Off%block.Size != 0 || o.Len%block.Size != 0)
}

// dataBytes is about how much data the op brings to the log.
func (o Op) dataBytes() int64 {
	switch {
	case o.Kind == OpWrite:
		return o.Len
	case o.partial():
		return block.Size
	}
	return 0
}

// inner is the whole blocks within the op's range.
func (o Op) inner() (block.LBA, uint64) {
	first := (o.Off + block.Size - 1) / block.Size
	end := (o.Off + o.Len) / block.Size
	if end <= first {
		return 0, 0
	}
	return block.LBA(first), uint64(end - first)
}

// A lockSet is a set of lock stripes, one bit each. A stripe stands for every 64th group of 16
// blocks. A write of whole blocks holds its stripes shared, a partial one exclusively; both take
// them in ascending order, so they cannot wait for each other in a circle.
type lockSet uint64

const (
	lockStripes = 64
	lockBlocks  = 16
)

func (s *lockSet) add(lba block.LBA, blocks uint64) {
	first := uint64(lba) / lockBlocks
	n := (uint64(lba)+blocks-1)/lockBlocks - first + 1
	if n >= lockStripes {
		*s = ^lockSet(0)
		return
	}
	for g := first; g < first+n; g++ {
		*s |= 1 << (g % lockStripes)
	}
}

func (d *Disk) lock(s lockSet, exclusive bool) {
	for ; s != 0; s &= s - 1 {
		m := &d.locks[bits.TrailingZeros64(uint64(s))]
		if exclusive {
			m.Lock()
		} else {
			m.RLock()
		}
	}
}

func (d *Disk) unlock(s lockSet, exclusive bool) {
	for ; s != 0; s &= s - 1 {
		m := &d.locks[bits.TrailingZeros64(uint64(s))]
		if exclusive {
			m.Unlock()
		} else {
			m.RUnlock()
		}
	}
}

var bufferPool = sync.Pool{New: func() any { return new([]byte) }}

// getBuffer returns a pooled buffer of n bytes with any content.
func getBuffer(n int) *[]byte {
	b := bufferPool.Get().(*[]byte)
	if cap(*b) < n {
		*b = make([]byte, n)
	}
	*b = (*b)[:n]
	return b
}

func putBuffer(b *[]byte) { bufferPool.Put(b) }
