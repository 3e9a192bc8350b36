package nbd

import (
	"encoding/binary"

	"graindisk/frontend/nbd/proto"
)

// A READ whose parts come at different times is answered by chunks, one per part:
//
//	b, reply header and p as for a whole reply     heads, of the chunks of one batch
//	+------+--------+------+--------+              +----+----+----+
//	| head | part 0 | hole | part 2 |              | h0 | h1 | h2 |
//	+------+--------+------+--------+              +----+----+----+
//	           │ view          │ view                 │ view each
//	           └───────────────┴──────────────────────┴──► outbox: h0, part 0, h1, h2, part 2
//
// Invariants:
//   - the last chunk alone carries DONE, and chunks cover the request without overlap;
//   - b stays charged to the read budget until its last view is on the socket;
//   - only parts that the device has handed over as good are ever sent.

// pieceReply is the reply to one READ in the making.
type pieceReply struct {
	c    *conn
	q    request
	b    *buf // data from head on
	head int
	left int         // bytes without outcome
	code proto.Errno // the first failure
	gone bool        // the connection was ended
	out  []*buf
}

// slowPieces answers q from the device through b, which has the length of the whole reply, in as
// many chunks as the device hands over at different times.
func (c *conn) slowPieces(q request, b *buf) {
	defer c.slow.release(1)
	b.charge = int64(q.length)
	b.shares.Store(1)
	r := pieceReply{c: c, q: q, b: b, head: c.readHeaderLen(), left: int(q.length)}
	err := c.piecer.ReadPieces(c.ctx, b.b[r.head:], int64(q.offset), r.put)
	if err != nil {
		c.fails(q, err)
	}
	if n := b.done(); n > 0 {
		c.reads.release(n)
	}
}

// put sends the parts that came together.
func (r *pieceReply) put(parts []Part) {
	if r.gone || r.c.ctx.Err() != nil {
		r.gone = true
		return
	}
	if len(parts) == 1 && parts[0].To-parts[0].From == int(r.q.length) && parts[0].Err == nil && !parts[0].Hole {
		r.left = 0
		r.c.putData(r.b.b, r.q.cookie, r.q.offset, int(r.q.length))
		r.c.done(r.q, proto.OK)
		r.c.box.send(r.b.view(0, len(r.b.b)))
		return
	}
	const headMax = proto.ExtendedReplyLen + 14 + errorTextMax
	heads := getBuf(len(parts) * headMax)
	heads.b = heads.b[:len(parts)*headMax]
	heads.shares.Store(1)
	r.out = r.out[:0]
	at := 0
	for _, a := range parts {
		r.left -= a.To - a.From
		n := r.putHead(heads.b[at:], a)
		if r.gone {
			break
		}
		r.out = append(r.out, heads.view(at, at+n))
		if a.Err == nil && !a.Hole {
			r.out = append(r.out, r.b.view(r.head+a.From, r.head+a.To))
		}
		at += n
	}
	if !r.gone && r.left == 0 {
		r.c.done(r.q, r.code)
	}
	r.c.box.send(r.out...)
	heads.done()
}

// errorTextMax bounds the text of an error chunk.
const errorTextMax = 64

// putHead encodes all of a part's chunk but its data, and returns its length.
func (r *pieceReply) putHead(p []byte, a Part) int {
	h := r.c.chunkHeaderLen()
	var flags uint16
	if r.left == 0 {
		flags = proto.ReplyFlagDone
	}
	put := func(typ uint16, n int) { r.c.putChunk(p, flags, typ, r.q.cookie, r.q.offset, n) }
	off, size := r.q.offset+uint64(a.From), a.To-a.From
	switch {
	case a.Err != nil:
		code, ok := r.c.verdict(r.q, a.Err)
		if !ok {
			r.gone = true
			return 0
		}
		if r.code == proto.OK {
			r.code = code
		}
		text := code.Error()
		text = text[:min(len(text), errorTextMax)]
		n := 6 + len(text) + 8
		put(proto.ReplyTypeErrorOffset, n)
		binary.BigEndian.PutUint32(p[h:], uint32(code))
		binary.BigEndian.PutUint16(p[h+4:], uint16(len(text)))
		copy(p[h+6:], text)
		binary.BigEndian.PutUint64(p[h+6+len(text):], off)
		return h + n
	case a.Hole:
		put(proto.ReplyTypeOffsetHole, 12)
		binary.BigEndian.PutUint64(p[h:], off)
		binary.BigEndian.PutUint32(p[h+8:], uint32(size))
		return h + 12
	}
	put(proto.ReplyTypeOffsetData, 8+size)
	binary.BigEndian.PutUint64(p[h:], off)
	return h + 8
}
