package pool

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"graindisk/block"
	"graindisk/internal/crashtest"
	"graindisk/vdisk"
)

// client sends requests to the disks, one at a time.
type client struct {
	w       *world
	p       *Pool
	rng     *rand.Rand
	name    string
	creates bool // makes disks
	alone   bool // no other client is at work
}

// step sends one request. An error of a living process is wrong.
func (c *client) step(ctx context.Context) error {
	c.w.sched.Park(c.name)
	if ctx.Err() != nil { // else chance decides between what ends and what goes on
		return ctx.Err()
	}
	if c.rng.IntN(12) == 0 {
		time.Sleep(time.Duration(c.rng.Int64N(int64(30 * time.Millisecond))))
	}
	d := c.w.disks[c.rng.IntN(len(c.w.disks))]
	now, changing := d.view()
	if !d.created() && !changing { // one that is yet to be made, by the first client
		if c.creates {
			c.w.stats.inc("disks made in mid-life")
			return c.w.createMissing(ctx, 1)
		}
		return nil
	}
	if c.creates && c.rng.IntN(40) == 0 || c.creates && now.deleted {
		return c.operate(ctx, d)
	}
	if now.deleted || changing {
		return nil
	}
	vd, err := c.p.Disk(now.name)
	if err != nil && c.tolerable(d, err) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := c.ask(ctx, d, vd); err != nil && !c.tolerable(d, err) {
		return err
	}
	return nil
}

// ask sends a request to a disk.
func (c *client) ask(ctx context.Context, d *crashDisk, vd *vdisk.Disk) error {
	c.w.stats.ops.Add(1)
	switch n := c.rng.IntN(100); {
	case n < 6 && c.rng.IntN(3) == 0: // both at once
		done := make(chan error, 1)
		go func() { done <- c.checkpoint(ctx) }()
		err := c.publish(ctx)
		return errors.Join(err, <-done)
	case n < 6:
		return c.publish(ctx)
	case n < 16:
		mark := c.w.model.Mark()
		if err := vd.Flush(ctx); err != nil {
			return err
		}
		c.w.model.Flushed(d.id, mark)
		return nil
	case n < 20:
		return c.checkpoint(ctx)
	}
	var ops []vdisk.Op
	var ids []uint64
	for range 1 + c.rng.IntN(4)/3*c.rng.IntN(4) {
		op, issued := c.draw(d)
		ops, ids = append(ops, op), append(ids, issued...)
	}
	stable := c.rng.IntN(10) == 0
	if err := vd.Write(ctx, ops, stable); err != nil {
		return err
	}
	for _, id := range ids {
		if stable {
			c.w.model.Stable(id)
		} else {
			c.w.model.Acked(id)
		}
	}
	return nil
}

// draw makes up one write, trim or write of zeroes and issues it to the model. Every block is an
// operation of its own to the model, since the log may split a write between blocks.
func (c *client) draw(d *crashDisk) (vdisk.Op, []uint64) {
	now, _ := d.view()
	sectors := now.blocks * sectorsPerBlock
	kind := vdisk.OpWrite
	most := c.w.shape.writeBlocks * sectorsPerBlock
	switch n := c.rng.IntN(20); {
	case n < 2:
		kind, most = vdisk.OpTrim, 64*sectorsPerBlock
	case n < 4:
		kind = vdisk.OpZero
	case n < 8:
		most = 12
	}
	if c.rng.IntN(2) == 0 {
		most = min(most, sectorsPerBlock)
	}
	if c.w.hot > 0 && d.id == 1 && c.rng.IntN(2) == 0 {
		sectors = min(sectors, c.w.hot*sectorsPerBlock)
		most = min(most, [...]int{4, 2 * sectorsPerBlock}[c.rng.IntN(2)])
	}
	first := c.rng.IntN(sectors)
	count := 1 + c.rng.IntN(min(most, sectors-first))
	if c.rng.IntN(4) > 0 && kind == vdisk.OpWrite && most >= sectorsPerBlock { // whole blocks
		first -= first % sectorsPerBlock
		count = max(count-count%sectorsPerBlock, sectorsPerBlock)
	}
	op := vdisk.Op{Kind: kind, Off: int64(first) * crashtest.SectorSize, Len: int64(count) * crashtest.SectorSize}
	end := first + count
	if kind == vdisk.OpTrim {
		first = (first + sectorsPerBlock - 1) / sectorsPerBlock * sectorsPerBlock
		end -= end % sectorsPerBlock
	}
	if kind == vdisk.OpWrite {
		op.Data = make([]byte, op.Len)
	}
	var ids []uint64
	for from := first; from < end; {
		to := min(end, from/sectorsPerBlock*sectorsPerBlock+sectorsPerBlock)
		if kind != vdisk.OpWrite {
			ids = append(ids, c.w.model.IssueHole(d.id, block.LBA(from), to-from))
		} else {
			id, _ := c.w.model.IssueWrite(d.id, block.LBA(from), to-from)
			for s := from; s < to; s++ {
				stampSector(op.Data[(s-first)*crashtest.SectorSize:][:crashtest.SectorSize], id, d.id, block.LBA(s))
			}
			ids = append(ids, id)
		}
		from = to
	}
	return op, ids
}

// publish asks for a cut. With nobody else at work the cut is known to the byte.
func (c *client) publish(ctx context.Context) error {
	w := c.w
	mark, acked := w.model.Mark(), w.acked()
	if err := c.p.Publish(ctx); err != nil {
		return err
	}
	cut := c.p.pubCut()
	w.model.Published(cut, mark)
	w.saidPublished(cut)
	w.stats.published.Add(1)
	w.rowsPublished(acked)
	if !c.alone {
		return nil
	}
	if all, err := w.content(c.p); err == nil {
		w.exact[cut] = all
	}
	return nil
}

// checkpoint writes a local checkpoint between cuts, as a pool does whose targets are away.
func (c *client) checkpoint(ctx context.Context) error {
	err := c.p.checkpointHere(ctx)
	if c.w.life.hurt.Load() && c.p.log.Failed() == nil {
		return nil // the one before holds
	}
	c.w.stats.inc("local checkpoints between cuts")
	return err
}

// saidPublished notes that the pool said so of a cut.
func (w *world) saidPublished(cut uint64) {
	for was := w.newest.Load(); was < cut && !w.newest.CompareAndSwap(was, cut); was = w.newest.Load() {
	}
}

// createMissing makes disks that are not there, in their order, at most so many.
func (w *world) createMissing(ctx context.Context, most int) error {
	for _, d := range w.disks {
		if d.created() {
			continue
		}
		if most--; most < 0 {
			return nil
		}
		d.issue(diskVersion{name: d.name(), blocks: d.blocks})
		p := w.p
		err := w.unlessDead(ctx, func() error {
			vd, err := p.CreateDisk(ctx, d.name(), int64(d.blocks)*block.Size)
			if err == nil && vd.ID() != d.id {
				err = fmt.Errorf("disk %s was made as number %d, not %d", d.name(), vd.ID(), d.id)
			}
			return err
		})
		if err != nil {
			return err
		}
		d.settle()
	}
	return nil
}

// stampSector fills a sector with what tells operation op on it from any other.
//
//	0    8      16     24    28
//	+----+------+------+-----+------------+
//	| op | disk | lba  | crc | filling... |
//	+----+------+------+-----+------------+
func stampSector(b []byte, op uint64, disk block.DiskID, sector block.LBA) {
	le := binary.LittleEndian
	le.PutUint64(b, op)
	le.PutUint64(b[8:], uint64(disk))
	le.PutUint64(b[16:], uint64(sector))
	x := op*0x9e3779b97f4a7c15 ^ uint64(sector)
	for i := 28; i < crashtest.SectorSize; i += 4 {
		x = x*6364136223846793005 + 1442695040888963407
		le.PutUint32(b[i:], uint32(x>>32))
	}
	le.PutUint32(b[24:], block.CRC(b[:24])^block.CRC(b[28:]))
}

var zeroSector [crashtest.SectorSize]byte

func parseSector(b []byte) (crashtest.Stamp, error) {
	if bytes.Equal(b, zeroSector[:]) {
		return crashtest.Stamp{}, nil
	}
	le := binary.LittleEndian
	if le.Uint32(b[24:]) != block.CRC(b[:24])^block.CRC(b[28:]) {
		return crashtest.Stamp{}, fmt.Errorf("%w: %x...", crashtest.ErrNotStamped, b[:28])
	}
	return crashtest.Stamp{Op: le.Uint64(b), Disk: block.DiskID(le.Uint64(b[8:])), LBA: block.LBA(le.Uint64(b[16:]))}, nil
}
