package nbd

import (
	"io"
	"math/bits"
	"net"
	"sync"
	"sync/atomic"
)

const (
	bufClassMin = 4 << 10 // smallest pooled payload, bytes
	bufClasses  = 14      // 4 KiB ... 32 MiB
	bufSlack    = 64      // room for the reply header before a payload of a power of two
)

var bufPools [bufClasses]sync.Pool

// buf is a pooled piece of memory. Its user appends to b within cap(b). A view is a part of another
// buf's memory, which stays until its owner and all its views are done.
type buf struct {
	b      []byte
	class  int
	charge int64        // bytes held in the connection's read budget until all of it is sent
	whole  *buf         // of a view: whose memory it is
	shares atomic.Int32 // views, and the owner while there may be more; 0 if it was never shared
}

// getBuf returns an empty buffer with room for n bytes, at most 32 MiB + bufSlack.
func getBuf(n int) *buf {
	class := 0
	if n > bufClassMin+bufSlack {
		class = bits.Len(uint(n-bufSlack-1)) - bits.Len(uint(bufClassMin-1))
	}
	if v := bufPools[class].Get(); v != nil {
		return v.(*buf)
	}
	return &buf{b: make([]byte, 0, bufClassMin<<class+bufSlack), class: class}
}

var viewPool = sync.Pool{New: func() any { return new(buf) }}

// view returns b[from:to] as a buf to send. The owner has set shares to 1 and calls done itself.
func (b *buf) view(from, to int) *buf {
	b.shares.Add(1)
	v := viewPool.Get().(*buf)
	v.b, v.whole = b.b[from:to], b
	return v
}

// done ends the use of b by one who sent or owned it, frees what nobody else uses, and returns the bytes
// to give back to the read budget.
func (b *buf) done() int64 {
	if w := b.whole; w != nil {
		b.b, b.whole = nil, nil
		viewPool.Put(b)
		b = w
	}
	if b.shares.Load() > 0 && b.shares.Add(-1) > 0 {
		return 0
	}
	n := b.charge
	b.free()
	return n
}

// free returns b to its pool.
func (b *buf) free() {
	b.b, b.charge = b.b[:0], 0
	bufPools[b.class].Put(b)
}

// budget counts something a connection holds, so that it stays bounded.
type budget struct {
	mu     sync.Mutex
	freed  sync.Cond
	used   int64
	max    int64
	closed bool
}

func (g *budget) init(max int64) { g.max, g.freed.L = max, &g.mu }

// tryAcquire takes n if that stays within the budget. A spender alone may exceed it, so that
// a single request larger than the budget passes.
func (g *budget) tryAcquire(n int64) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.tryLocked(n)
}

func (g *budget) tryLocked(n int64) bool {
	if g.closed || g.used > 0 && g.used+n > g.max {
		return false
	}
	g.used += n
	return true
}

// acquire waits until n may be taken; it reports false when the connection has failed.
func (g *budget) acquire(n int64) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	for !g.tryLocked(n) {
		if g.closed {
			return false
		}
		g.freed.Wait()
	}
	return true
}

func (g *budget) release(n int64) {
	g.mu.Lock()
	g.used -= n
	g.mu.Unlock()
	g.freed.Signal() // only the connection's reader waits
}

// close makes every acquire fail.
func (g *budget) close() {
	g.mu.Lock()
	g.closed = true
	g.mu.Unlock()
	g.freed.Broadcast()
}

const (
	inbufBytes = 256 << 10
	// directMin is where the rest of a payload is read into its place instead of through the
	// buffer: the copy of 16 KiB costs about as much as the system call it may save.
	directMin = 16 << 10
)

// inbuf reads a connection through a buffer and calls settle before every read of the socket.
type inbuf struct {
	sock   net.Conn
	settle func()
	b      []byte
	r, w   int // unread bytes are b[r:w]
}

// next returns the next n bytes, n far below inbufBytes, valid until the next call.
func (in *inbuf) next(n int) ([]byte, error) {
	if in.w-in.r < n {
		in.w = copy(in.b, in.b[in.r:in.w]) // fewer than n bytes
		in.r = 0
		for in.w-in.r < n {
			if err := in.fill(); err != nil {
				return nil, in.cut(err, in.w > in.r)
			}
		}
	}
	p := in.b[in.r : in.r+n]
	in.r += n
	return p, nil
}

// buffered is how many bytes have been read from the socket and not yet taken.
func (in *inbuf) buffered() int { return in.w - in.r }

// fill reads once from the socket into the free end of the buffer.
func (in *inbuf) fill() error {
	in.settle()
	n, err := in.sock.Read(in.b[in.w:])
	in.w += n
	if n > 0 {
		return nil
	}
	return err
}

// full fills p.
func (in *inbuf) full(p []byte) error {
	for {
		n := copy(p, in.b[in.r:in.w])
		in.r += n
		if p = p[n:]; len(p) == 0 {
			return nil
		}
		in.r, in.w = 0, 0
		if len(p) >= directMin {
			in.settle()
			_, err := io.ReadFull(in.sock, p)
			return in.cut(err, true)
		}
		if err := in.fill(); err != nil {
			return in.cut(err, true)
		}
	}
}

// discard drops the next n bytes.
func (in *inbuf) discard(n int64) error {
	for n > 0 {
		if in.r == in.w {
			in.r, in.w = 0, 0
			if err := in.fill(); err != nil {
				return in.cut(err, true)
			}
		}
		k := min(n, int64(in.w-in.r))
		in.r += int(k)
		n -= k
	}
	return nil
}

// cut tells an end of stream within a message from one between messages.
func (in *inbuf) cut(err error, within bool) error {
	if err == io.EOF && within {
		return io.ErrUnexpectedEOF
	}
	return err
}

// replies gathers encoded replies in pooled buffers. It has one owner at a time.
type replies struct {
	unit  int // usual size of a buffer; a larger reply gets one to itself
	bufs  []*buf
	bytes int
}

// reserve returns n more bytes to fill at the end of the gathered replies.
func (r *replies) reserve(n int) []byte {
	k := len(r.bufs)
	if k == 0 || cap(r.bufs[k-1].b)-len(r.bufs[k-1].b) < n {
		r.bufs = append(r.bufs, getBuf(max(n, r.unit)))
		k++
	}
	last := r.bufs[k-1]
	at := len(last.b)
	last.b = last.b[:at+n]
	r.bytes += n
	return last.b[at:]
}

// takeBack undoes the last reserve(n) and returns a buffer of length n to fill later.
func (r *replies) takeBack(n int) *buf {
	k := len(r.bufs) - 1
	last := r.bufs[k]
	r.bytes -= n
	if len(last.b) == n {
		r.bufs = r.bufs[:k]
		return last
	}
	last.b = last.b[:len(last.b)-n]
	own := getBuf(n)
	own.b = own.b[:n]
	return own
}

// charge makes the sending of the last reservation give n bytes back to the read budget.
func (r *replies) charge(n int64) { r.bufs[len(r.bufs)-1].charge += n }
