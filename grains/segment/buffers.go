package segment

import (
	"cmp"
	"slices"
	"sync"
)

// Buffers lends the memory that shards are built in and takes it back when they are stored, so that a
// stream of segments leaves nothing to the collector. What it lends is not zeroed. It is safe for
// concurrent use; a nil *Buffers lends fresh memory and takes nothing back.
type Buffers struct {
	keepBytes int64

	mu    sync.Mutex
	free  [][]byte // ascending by capacity
	stats BufferStats
}

// BufferStats tells how much memory segments take. All in bytes.
type BufferStats struct {
	Lent int64 `json:"lent"` // to segments that are being built or stored
	Peak int64 `json:"peak"` // the most that was lent
	Idle int64 `json:"idle"` // waiting to be lent again
}

// NewBuffers keeps at most keepBytes of idle memory.
func NewBuffers(keepBytes int64) *Buffers { return &Buffers{keepBytes: keepBytes} }

// Stats reports on the memory.
func (p *Buffers) Stats() BufferStats {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.stats
}

// Drop leaves idle memory to the collector.
func (p *Buffers) Drop() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.free, p.stats.Idle = nil, 0
}

// bufferUnit rounds sizes up, so that segments of nearly one size share buffers.
const bufferUnit = 64 << 10

// Get lends a slice of length 0 and at least n bytes of capacity: the smallest there is, unless it is
// more than four times too large.
func (p *Buffers) Get(n int64) []byte {
	if p == nil {
		return make([]byte, 0, n)
	}
	n = up(n, bufferUnit)
	b := p.find(n)
	if b == nil {
		b = make([]byte, 0, n)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.stats.Lent += int64(cap(b))
	p.stats.Peak = max(p.stats.Peak, p.stats.Lent)
	return b
}

func (p *Buffers) find(n int64) []byte {
	p.mu.Lock()
	defer p.mu.Unlock()
	at, _ := slices.BinarySearchFunc(p.free, n, func(b []byte, n int64) int { return cmp.Compare(int64(cap(b)), n) })
	if at == len(p.free) || int64(cap(p.free[at])) > 4*n {
		return nil
	}
	b := p.free[at]
	p.free = slices.Delete(p.free, at, at+1)
	p.stats.Idle -= int64(cap(b))
	return b
}

// Put takes back what Get lent. Without reuse it is left to the collector: somebody may still read it.
func (p *Buffers) Put(b []byte, reuse bool) {
	if p == nil || cap(b) == 0 {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	n := int64(cap(b))
	p.stats.Lent -= n
	if !reuse {
		return
	}
	for p.stats.Idle+n > p.keepBytes && len(p.free) > 0 && int64(cap(p.free[0])) < n { // larger ones serve better
		p.stats.Idle -= int64(cap(p.free[0]))
		p.free = slices.Delete(p.free, 0, 1)
	}
	if p.stats.Idle+n > p.keepBytes {
		return
	}
	at, _ := slices.BinarySearchFunc(p.free, n, func(b []byte, n int64) int { return cmp.Compare(int64(cap(b)), n) })
	p.free = slices.Insert(p.free, at, b[:0])
	p.stats.Idle += n
}
