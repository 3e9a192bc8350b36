package nbd

import (
	"context"
	"errors"
	"sync"
	"time"

	"graindisk/frontend/nbd/proto"
	"graindisk/vdisk"
)

const (
	batchOpsMax   = 128
	batchBytesMax = 4 << 20 // of data; a single larger write is a batch of its own
	// writeCharge is what a change costs the write budget besides its data, so that requests
	// without data are bounded too.
	writeCharge = 4 << 10
	// flushPatience is how long a FLUSH lets earlier writes of its connection go first.
	flushPatience = 20 * time.Millisecond
)

// batch is what one Device.Write applies.
type batch struct {
	stable bool
	ops    []WriteOp
	reqs   []request // of each op
	bufs   []*buf    // memory of the ops' data
	bytes  int64     // of data
	done   chan struct{}
}

var batchPool = sync.Pool{New: func() any { return new(batch) }}

// takes reports whether a change of n bytes of data and that stability may still join.
func (b *batch) takes(ops int, n int64, stable bool) bool {
	return b.stable == stable && len(b.ops)+ops <= batchOpsMax && b.bytes+n <= batchBytesMax
}

func (b *batch) add(op WriteOp, q request, data *buf) {
	b.ops = append(b.ops, op)
	b.reqs = append(b.reqs, q)
	if data != nil {
		b.bufs = append(b.bufs, data)
		b.bytes += op.Len
	}
}

// merge moves everything of x into b and recycles x, which nobody else has seen.
func (b *batch) merge(x *batch) {
	b.ops = append(b.ops, x.ops...)
	b.reqs = append(b.reqs, x.reqs...)
	b.bufs = append(b.bufs, x.bufs...)
	b.bytes += x.bytes
	x.bufs = x.bufs[:0]
	x.recycle()
}

// recycle gives the memory back.
func (b *batch) recycle() {
	for _, d := range b.bufs {
		d.free()
	}
	clear(b.ops)
	clear(b.bufs)
	*b = batch{ops: b.ops[:0], reqs: b.reqs[:0], bufs: b.bufs[:0]}
	batchPool.Put(b)
}

// lane applies batches one at a time, in order, in a goroutine that lives while there are any.
type lane struct {
	c     *conn
	reply replies // of the batch being applied

	mu      sync.Mutex
	queue   []*batch
	current *batch // being applied
	running bool
}

// put hands b over to the lane, joined to the last batch that still waits if it fits.
func (l *lane) put(b *batch) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if k := len(l.queue); k > 0 && l.queue[k-1].takes(len(b.ops), b.bytes, b.stable) {
		l.queue[k-1].merge(b)
		return
	}
	l.queue = append(l.queue, b)
	if !l.running {
		l.running = true
		l.c.wg.Go(l.run)
	}
}

// inline applies b at once in the reader's goroutine, if the lane has nothing else to do and the
// device promises not to wait; the reader alone puts batches, so none can come meanwhile.
func (l *lane) inline(b *batch) bool {
	if l.c.prompter == nil || b.stable && l.c.in.buffered() > 0 {
		return false
	}
	l.mu.Lock()
	if l.running {
		l.mu.Unlock()
		return false
	}
	l.running, l.current = true, b
	l.mu.Unlock()
	prompt := l.c.prompter.Prompt(b.ops)
	if prompt {
		l.apply(b)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.running = false
	if prompt {
		l.finishLocked()
	} else {
		l.current = nil
	}
	return prompt
}

// finishLocked ends the batch that was applied.
func (l *lane) finishLocked() {
	b := l.current
	if b.done != nil {
		close(b.done)
	}
	l.current = nil
	b.recycle()
}

func (l *lane) run() {
	for {
		l.mu.Lock()
		if l.current != nil {
			l.finishLocked()
		}
		if len(l.queue) == 0 {
			l.running = false
			l.mu.Unlock()
			return
		}
		b := l.queue[0]
		l.queue = l.queue[:copy(l.queue, l.queue[1:])]
		l.current = b
		l.mu.Unlock()
		l.apply(b)
	}
}

// tail returns a channel that is closed when all batches now in the lane are applied, or nil
// if there are none.
func (l *lane) tail() <-chan struct{} {
	l.mu.Lock()
	defer l.mu.Unlock()
	b := l.current
	if k := len(l.queue); k > 0 {
		b = l.queue[k-1]
	}
	if b == nil {
		return nil
	}
	if b.done == nil {
		b.done = make(chan struct{})
	}
	return b.done
}

// apply applies b and answers its requests. A batch that fails is applied again one by one, so
// that an error stays with the request it belongs to: no outcome but success was announced yet,
// and applying an operation twice is the same as once.
func (l *lane) apply(b *batch) {
	c := l.c
	defer c.writes.release(int64(len(b.ops))*writeCharge + b.bytes)
	if c.ctx.Err() != nil {
		return
	}
	err := c.dev.Write(c.ctx, b.ops, b.stable)
	single := len(b.ops) > 1 && worthRetrying(err)
	for i, q := range b.reqs {
		if single {
			err = c.dev.Write(c.ctx, b.ops[i:i+1], b.stable)
		}
		code, ok := c.verdict(q, err)
		if !ok {
			return
		}
		c.putResult(&l.reply, q, code)
	}
	c.send(&l.reply)
	if c.beginner != nil && !b.stable {
		c.beginner.BeginFlush()
	}
}

// worthRetrying reports whether err may concern only some of a batch.
func worthRetrying(err error) bool {
	if err == nil {
		return false
	}
	for _, all := range []error{vdisk.ErrClosed, vdisk.ErrFenced, vdisk.ErrFull, vdisk.ErrReadOnly, context.Canceled} {
		if errors.Is(err, all) {
			return false
		}
	}
	return true
}

// flusher answers FLUSH requests: those that come while one is under way share the next.
type flusher struct {
	c     *conn
	reply replies

	mu      sync.Mutex
	waiting []request
	running bool
}

func (f *flusher) put(q request) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.waiting = append(f.waiting, q)
	if !f.running {
		f.running = true
		f.c.wg.Go(f.run)
	}
}

// inline answers q in the reader's goroutine if nothing else of the connection is under way: the
// client waits for this reply alone.
func (f *flusher) inline(q request) bool {
	if f.c.prompter == nil || f.c.in.buffered() > 0 {
		return false
	}
	f.mu.Lock()
	if f.running {
		f.mu.Unlock()
		return false
	}
	f.running = true
	f.waiting = append(f.waiting, q)
	f.mu.Unlock()
	f.run()
	return true
}

func (f *flusher) run() {
	c := f.c
	for {
		f.mu.Lock()
		now := f.waiting
		f.waiting = nil
		if len(now) == 0 {
			f.running = false
			f.mu.Unlock()
			return
		}
		f.mu.Unlock()
		c.letWritesGoFirst()
		err := c.dev.Flush(c.ctx)
		for _, q := range now {
			code, ok := c.verdict(q, err)
			if !ok {
				return
			}
			c.putResult(&f.reply, q, code)
		}
		c.send(&f.reply)
	}
}

// letWritesGoFirst waits, for at most flushPatience, until the lanes have applied what they hold.
func (c *conn) letWritesGoFirst() {
	var patience <-chan time.Time
	for i := range c.lanes {
		tail := c.lanes[i].tail()
		if tail == nil {
			continue
		}
		if patience == nil {
			timer := time.NewTimer(flushPatience)
			defer timer.Stop()
			patience = timer.C
		}
		select {
		case <-tail:
		case <-patience:
			return
		case <-c.ctx.Done():
			return
		}
	}
}

// verdict turns a device's error into the code to answer; ok is false if the connection was
// ended instead.
func (c *conn) verdict(q request, err error) (code proto.Errno, ok bool) {
	if err == nil {
		return proto.OK, true
	}
	if c.ctx.Err() != nil {
		return 0, false
	}
	if code, ok = errnoOf(q.cmd, err); !ok {
		c.fail(err)
		return 0, false
	}
	c.log.Warn("request failed", "op", q.cmd.String(), "error", err, "code", uint32(code))
	return code, true
}
