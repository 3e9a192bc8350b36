package nbd

import (
	"encoding/binary"
	"fmt"
	"math"
	"time"

	"graindisk/block"
	"graindisk/frontend/nbd/proto"
)

// request is the header of one request.
type request struct {
	cmd    proto.Cmd
	flags  uint16
	cookie uint64
	offset uint64
	length uint64
	start  time.Time // set only if somebody wants to know
}

// flagsOf is which flags each request may carry; FUA is allowed on all of them, as known
// clients set it where it means nothing.
func (c *conn) flagsOf(cmd proto.Cmd) uint16 {
	allowed := proto.CmdFlagFUA
	switch {
	case cmd == proto.CmdRead && c.structured:
		allowed |= proto.CmdFlagDF
	case cmd == proto.CmdWrite && c.extended:
		allowed |= proto.CmdFlagPayloadLen
	case cmd == proto.CmdBlockStatus:
		allowed |= proto.CmdFlagReqOne
	case cmd == proto.CmdWriteZeroes:
		allowed |= proto.CmdFlagNoHole
		if c.fastZero {
			allowed |= proto.CmdFlagFastZero
		}
	}
	return allowed
}

// transmit reads and starts requests until the connection ends, and returns why.
func (c *conn) transmit() error {
	c.in.settle = c.settle
	size, want := proto.RequestLen, proto.MagicRequest
	if c.extended {
		size, want = proto.ExtendedRequestLen, proto.MagicExtendedRequest
	}
	for {
		h, err := c.in.next(size)
		if err != nil {
			return err
		}
		if magic := binary.BigEndian.Uint32(h); magic != want {
			return fmt.Errorf("bad request magic %#08x", magic)
		}
		q := request{
			flags:  binary.BigEndian.Uint16(h[4:]),
			cmd:    proto.Cmd(binary.BigEndian.Uint16(h[6:])),
			cookie: binary.BigEndian.Uint64(h[8:]),
			offset: binary.BigEndian.Uint64(h[16:]),
		}
		if c.extended {
			q.length = binary.BigEndian.Uint64(h[24:])
		} else {
			q.length = uint64(binary.BigEndian.Uint32(h[24:]))
		}
		if c.srv.opt.Metrics.Done != nil {
			q.start = time.Now()
		}
		if err := c.start(q); err != nil {
			return err
		}
		if c.ready.bytes >= inbufBytes {
			c.settle()
		}
	}
}

// start answers q or hands it on. An error ends the connection.
func (c *conn) start(q request) error {
	if q.cmd == proto.CmdDisc {
		return errBye
	}
	if code := c.check(q); code != proto.OK {
		if err := c.skipPayload(q); err != nil {
			return err
		}
		c.putResult(&c.ready, q, code)
		return nil
	}
	switch q.cmd {
	case proto.CmdFlush:
		c.settleWrites()
		if c.lanesIdle() && c.flush.inline(q) {
			return nil
		}
		c.flush.put(q)
		return nil
	case proto.CmdRead:
		if q.length > 0 {
			return c.read(q)
		}
	case proto.CmdBlockStatus:
		return c.blockStatus(q)
	case proto.CmdCache:
		if q.length > 0 {
			return c.cache(q)
		}
	default:
		if q.length > 0 {
			return c.change(q)
		}
	}
	c.putResult(&c.ready, q, proto.OK) // of nothing
	return nil
}

// skipPayload drops the data of a request that is refused, or ends the connection if they are too long
// for that: with compact headers from 64 MiB on, as a client need not know the limit, else from 32 MiB.
func (c *conn) skipPayload(q request) error {
	limit := uint64(2 * payloadMax)
	if c.extended {
		if q.flags&proto.CmdFlagPayloadLen == 0 {
			return nil
		}
		limit = payloadMax
	} else if q.cmd != proto.CmdWrite {
		return nil
	}
	if q.length > limit {
		return fmt.Errorf("%s with %d bytes of data", q.cmd, q.length)
	}
	return c.in.discard(int64(q.length))
}

// check is what can be said against q without asking the device.
func (c *conn) check(q request) proto.Errno {
	switch q.cmd {
	case proto.CmdRead, proto.CmdWrite:
		if q.length > payloadMax || c.extended && q.cmd == proto.CmdWrite && q.flags&proto.CmdFlagPayloadLen == 0 {
			return proto.EINVAL
		}
	case proto.CmdFlush:
		if q.offset != 0 || q.length != 0 {
			return proto.EINVAL
		}
	case proto.CmdTrim, proto.CmdWriteZeroes:
	case proto.CmdCache:
		if c.prefetcher == nil {
			return proto.EINVAL
		}
	case proto.CmdBlockStatus:
		if !c.allocation() || q.length == 0 {
			return proto.EINVAL
		}
	default:
		return proto.EINVAL
	}
	if q.flags&^c.flagsOf(q.cmd) != 0 {
		return proto.EINVAL
	}
	if q.changes() && c.readOnly() {
		return proto.EPERM
	}
	if q.length > math.MaxInt64 || q.offset > math.MaxInt64-q.length {
		return proto.EINVAL
	}
	if int64(q.offset)+int64(q.length) > c.dev.Size() {
		return rangeErrno(q.cmd)
	}
	if q.flags&proto.CmdFlagFastZero != 0 && (q.offset|q.length)%block.Size != 0 {
		return proto.ENOTSUP // part of a block waits for what a WRITE would
	}
	return proto.OK
}

// changes tells whether q is of a kind that changes the device.
func (q request) changes() bool {
	return q.cmd == proto.CmdWrite || q.cmd == proto.CmdTrim || q.cmd == proto.CmdWriteZeroes
}

// allocation tells whether the client has chosen base:allocation for the export it then opened.
func (c *conn) allocation() bool { return c.contexts.allocation && c.contexts.export == c.export }

// read answers a READ in place if the device has the bytes at hand, and otherwise leaves it to
// a goroutine.
func (c *conn) read(q request) error {
	n := int64(q.length)
	if err := c.acquire(&c.reads, n); err != nil {
		return err
	}
	head := c.readHeaderLen()
	size := head + int(q.length)
	p := c.ready.reserve(size)
	hit, err := c.dev.TryRead(p[head:], int64(q.offset))
	if hit && err == nil {
		c.putData(p, q.cookie, q.offset, int(q.length))
		c.ready.charge(n)
		c.done(q, proto.OK)
		return nil
	}
	b := c.ready.takeBack(size)
	if err != nil {
		b.free()
		c.reads.release(n)
		if code, ok := c.verdict(q, err); ok {
			c.putResult(&c.ready, q, code)
		}
		return nil // a connection that was ended shows at the next read of the socket
	}
	if err := c.acquire(&c.slow, 1); err != nil {
		b.free()
		c.reads.release(n)
		return err
	}
	slow := c.slowRead
	if c.piecer != nil && c.structured && q.flags&proto.CmdFlagDF == 0 {
		slow = c.slowPieces
	}
	c.wg.Go(func() { slow(q, b) })
	return nil
}

// slowRead answers q from the device through b, which has the length of the whole reply.
func (c *conn) slowRead(q request, b *buf) {
	defer c.slow.release(1)
	head := c.readHeaderLen()
	err := c.dev.Read(c.ctx, b.b[head:], int64(q.offset))
	if err == nil {
		c.putData(b.b, q.cookie, q.offset, int(q.length))
		b.charge = int64(q.length)
		c.done(q, proto.OK)
		c.box.send(b)
		return
	}
	b.free()
	c.reads.release(int64(q.length))
	c.fails(q, err)
}

// change reads the payload of a WRITE and adds q, WRITE, TRIM or WRITE_ZEROES, to the batch
// being gathered.
func (c *conn) change(q request) error {
	op := WriteOp{Off: int64(q.offset), Len: int64(q.length)}
	lane, bytes := laneUnmap, int64(0)
	switch q.cmd {
	case proto.CmdWrite:
		op.Kind, lane, bytes = OpWrite, laneData, op.Len
	case proto.CmdTrim:
		op.Kind = OpTrim
	case proto.CmdWriteZeroes:
		op.Kind = OpZero
		if (op.Off|op.Len)%block.Size != 0 {
			lane = laneData // zeroes part of a block, so it stores data
		}
	}
	if err := c.acquire(&c.writes, writeCharge+bytes); err != nil {
		return err
	}
	var data *buf
	if q.cmd == proto.CmdWrite {
		data = getBuf(int(q.length))
		data.b = data.b[:q.length]
		if err := c.in.full(data.b); err != nil {
			data.free()
			c.writes.release(writeCharge + bytes)
			return err
		}
		op.Data = data.b
	}
	stable := c.listen.AckStable || q.flags&proto.CmdFlagFUA != 0
	b := c.pending[lane]
	if b != nil && !b.takes(1, bytes, stable) {
		c.pending[lane] = nil
		c.lanes[lane].put(b)
		b = nil
	}
	if b == nil {
		b = batchPool.Get().(*batch)
		b.stable = stable
		c.pending[lane] = b
	}
	b.add(op, q, data)
	return nil
}
