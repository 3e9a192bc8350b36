package nbd

import (
	"encoding/binary"

	"graindisk/frontend/nbd/proto"
)

const (
	statusMax   = 2048           // extents in one reply
	statusBytes = statusMax * 16 // what a BLOCK_STATUS holds in the budget of replies
	cachesMax   = 4              // CACHE requests under way on one connection; others wait
)

// blockStatus leaves a BLOCK_STATUS to a goroutine, since maps lie in files and a damaged one is mended from
// the store.
func (c *conn) blockStatus(q request) error {
	if err := c.acquire(&c.reads, statusBytes); err != nil {
		return err
	}
	if err := c.acquire(&c.slow, 1); err != nil {
		c.reads.release(statusBytes)
		return err
	}
	c.wg.Go(func() { c.slowStatus(q) })
	return nil
}

func (c *conn) slowStatus(q request) {
	defer c.slow.release(1)
	limit := statusMax
	if q.flags&proto.CmdFlagReqOne != 0 {
		limit = 1
	}
	es, err := c.statuser.Status(c.ctx, int64(q.offset), int64(q.length), limit)
	if err != nil {
		c.reads.release(statusBytes)
		c.fails(q, err)
		return
	}
	b := getBuf(proto.ExtendedReplyLen + 8 + 16*len(es))
	b.b, b.charge = c.putStatus(b.b, q, es), statusBytes
	c.done(q, proto.OK)
	c.box.send(b)
}

// putStatus appends the whole reply: the number of the context and a descriptor for each extent, with
// extended headers a longer one and the count of them before.
func (c *conn) putStatus(p []byte, q request, es []Extent) []byte {
	typ, n := proto.ReplyTypeBlockStatus, 4+8*len(es)
	if c.extended {
		typ, n = proto.ReplyTypeBlockStatusExt, 8+16*len(es)
	}
	p = p[:c.chunkHeaderLen()]
	c.putChunk(p, proto.ReplyFlagDone, typ, q.cookie, q.offset, n)
	p = binary.BigEndian.AppendUint32(p, allocationID)
	if c.extended {
		p = binary.BigEndian.AppendUint32(p, uint32(len(es)))
	}
	for _, e := range es {
		state := uint32(0)
		if e.Hole {
			state = proto.StateHole | proto.StateZero
		}
		if c.extended {
			p = binary.BigEndian.AppendUint64(p, uint64(e.Len))
			p = binary.BigEndian.AppendUint64(p, uint64(state))
		} else {
			p = binary.BigEndian.AppendUint32(p, uint32(e.Len)) // at most the request's length
			p = binary.BigEndian.AppendUint32(p, state)
		}
	}
	return p
}

// cache leaves a CACHE to a goroutine. It is answered when the bytes are there.
func (c *conn) cache(q request) error {
	if err := c.acquire(&c.slow, 1); err != nil {
		return err
	}
	c.wg.Go(func() {
		defer c.slow.release(1)
		select {
		case c.caches <- struct{}{}:
		case <-c.ctx.Done():
			return
		}
		err := c.prefetcher.Prefetch(c.ctx, int64(q.offset), int64(q.length))
		<-c.caches
		if err != nil {
			c.fails(q, err)
			return
		}
		c.answer(q, proto.OK)
	})
	return nil
}

// fails answers q, from a goroutine of its own, with what err means.
func (c *conn) fails(q request, err error) {
	if code, ok := c.verdict(q, err); ok {
		c.answer(q, code)
	}
}

// answer sends the result of a request without data from a goroutine of its own.
func (c *conn) answer(q request, code proto.Errno) {
	var r replies
	c.putResult(&r, q, code)
	c.send(&r)
}
