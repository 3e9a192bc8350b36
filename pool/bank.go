package pool

import (
	"context"
	"errors"
	"fmt"

	"graindisk/block"
	"graindisk/grains/segment"
	"graindisk/tier"
	"graindisk/writeback"
)

// banksMax is how many banks there are: one is being filled while the others are stored. The memory of
// publishing is banksMax × SegmentBytes × (k+m)/k and what indexes and alignment add, with one bank more
// while one is laid out anew, and stageBytes if extents are packed; the number of disks does not matter.
const (
	banksMax   = 3
	stageBytes = 16 << 20 // plain data read from the log before it is packed
)

// An extentPlan is blocks of one grain of one disk that become one extent.
type extentPlan struct {
	disk   block.DiskID
	blocks []writeback.Block // consecutive LBAs
}

func (e extentPlan) bytes() int64 { return int64(len(e.blocks)) * block.Size }

// crc is the checksum of the extent's data, from those that the log has of its blocks.
func (e extentPlan) crc() (c uint32) {
	for _, b := range e.blocks {
		c = block.JoinCRC(c, b.CRC, block.Size)
	}
	return c
}

// planExtents cuts the frozen blocks, sorted by disk and LBA, into extents that do not cross a grain.
func planExtents(f *writeback.Frozen) (plan []extentPlan) {
	for _, disk := range f.Disks() {
		bs := f.Blocks(disk)
		for len(bs) > 0 {
			n := 1
			for n < len(bs) && bs[n].LBA == bs[0].LBA+block.LBA(n) && bs[n].LBA%grainBlocks != 0 {
				n++
			}
			plan = append(plan, extentPlan{disk, bs[:n]})
			bs = bs[n:]
		}
	}
	return plan
}

func planBytes(plan []extentPlan) (sum int64) {
	for _, e := range plan {
		sum += e.bytes()
	}
	return sum
}

// bank is a segment being filled, with the targets it is meant for.
type bank struct {
	plan    []extentPlan
	seq     writeback.Seq // the newest a write in it can be: the cut's horizon
	id      block.SegmentID
	epoch   uint64
	builder *segment.Builder
	targets []block.TargetID
}

// fillBank takes as many extents from the head of plan as a segment holds, reads their blocks back from
// the log and puts them in place, packed if the pool packs. It returns the bank and the rest of the plan;
// an empty plan makes an empty bank. With fewer than m+1 targets it waits. It fails only when ctx ends,
// another owner has claimed the pool, or the log cannot be read.
func (p *Pool) fillBank(ctx context.Context, plan []extentPlan, seq writeback.Seq) (*bank, []extentPlan, error) {
	room := p.value().SegmentBytes
	if p.o.Compression == segment.CodecNone {
		n, bytes := 0, int64(0)
		for n < len(plan) && n < block.ExtentsMax && (n == 0 || bytes+plan[n].bytes() <= room) {
			bytes += plan[n].bytes()
			n++
		}
		b, err := p.newBank(ctx, plan[:n], bytes, bytes, seq)
		if err != nil {
			return nil, nil, err
		}
		return b, plan[n:], p.place(b)
	}
	left := planBytes(plan)
	b, err := p.newBank(ctx, plan, left, min(max(room, GrainBytes), left), seq)
	if err != nil {
		return nil, nil, err
	}
	n, err := p.pack(b)
	b.plan = plan[:n]
	return b, plan[n:], err
}

// refill makes a bank anew under another number, for the targets that live now.
func (p *Pool) refill(ctx context.Context, old *bank) (*bank, error) {
	bytes := planBytes(old.plan)
	b, err := p.newBank(ctx, old.plan, bytes, bytes, old.seq)
	if err != nil {
		return nil, err
	}
	if p.o.Compression == segment.CodecNone {
		return b, p.place(b)
	}
	n, err := p.pack(b)
	if err == nil && n != len(b.plan) {
		err = fmt.Errorf("segment %d packed again: %d of %d extents fit", b.id, n, len(b.plan)) // room is for all unpacked
	}
	return b, err
}

// newBank begins a segment with room for so many stored bytes, when there are targets for it; payload is
// what there is to store, before packing.
func (p *Pool) newBank(ctx context.Context, plan []extentPlan, payload, room int64, seq writeback.Seq) (*bank, error) {
	var k, m uint8
	b := &bank{plan: plan, seq: seq, epoch: p.epoch.Load()}
	for wait := backoff(0); ; wait = wait.next() {
		if k, m, b.targets = p.placement(payload); b.targets != nil {
			break
		}
		p.o.Log.Warn("too few targets to publish, waiting", "pool", p.o.Name, "need", p.value().Stripe.Parity+1)
		if err := wait.sleep(ctx); err != nil {
			return nil, err
		}
	}
	var err error
	if b.id, err = p.segmentNumber(ctx); err != nil {
		return nil, err
	}
	b.targets = rotate(b.targets, int(b.id))[:int(k)+int(m)]
	b.builder, err = segment.NewBuilder(segment.BuildOptions{
		Pool: p.uuid, ID: b.id, Epoch: b.epoch, K: k, M: m, PayloadBytes: room, ExtentBytesMax: GrainBytes,
		Codec: p.o.Compression, Buffers: p.buffers,
	})
	return b, err
}

// place reads the bank's blocks straight to where they are stored.
func (p *Pool) place(b *bank) error {
	var wants []writeback.Want
	for _, e := range b.plan {
		dst, err := b.builder.AddSummed(e.disk, e.blocks[0].LBA, len(e.blocks), uint64(b.seq), e.crc())
		if err != nil {
			return err
		}
		wants = appendWants(wants, e, dst)
	}
	return p.log.Gather(wants)
}

// appendWants cuts an extent into runs that lie together in the log.
func appendWants(wants []writeback.Want, e extentPlan, dst []byte) []writeback.Want {
	for bs := e.blocks; len(bs) > 0; {
		n := 1
		for n < len(bs) && bs[n].Place == bs[0].Place+tier.Place(n) {
			n++
		}
		wants = append(wants, writeback.Want{Disk: e.disk, Blocks: bs[:n], Dst: dst[:n*block.Size]})
		bs, dst = bs[n:], dst[n*block.Size:]
	}
	return wants
}

// pack reads extents of the bank's plan into a stage, as many as may fit, and from there packs them into the
// bank until it is full; it tells how many are in it.
func (p *Pool) pack(b *bank) (int, error) {
	stage := p.buffers.Get(min(stageBytes, max(planBytes(b.plan), 1)))
	defer p.buffers.Put(stage, true)
	done := 0
	var plain int64 // of those done
	for done < len(b.plan) && b.builder.Room() >= block.Size {
		fit := b.builder.Room()
		if stored := b.builder.StoredBytes(); stored > 0 {
			fit = int64(float64(fit) * float64(plain) / float64(stored)) // if it goes on as it went
		}
		n, at := 0, int64(0)
		var wants []writeback.Want
		for ; done+n < len(b.plan); n++ {
			e := b.plan[done+n]
			if n > 0 && at+e.bytes() > min(fit, int64(cap(stage))) {
				break
			}
			wants = appendWants(wants, e, stage[at:at+e.bytes():at+e.bytes()])
			at += e.bytes()
		}
		if err := p.log.Gather(wants); err != nil {
			return 0, err
		}
		at = 0
		for _, e := range b.plan[done : done+n] {
			err := b.builder.AddData(e.disk, e.blocks[0].LBA, stage[at:at+e.bytes()], uint64(b.seq))
			if errors.Is(err, segment.ErrFull) {
				return done, nil
			}
			if err != nil {
				return 0, err
			}
			at += e.bytes()
			done, plain = done+1, plain+e.bytes()
		}
	}
	return done, nil
}
