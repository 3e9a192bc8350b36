package cache

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"graindisk/block"
)

// ErrClosed means a fetch from a cache that has been closed.
var ErrClosed = errors.New("cache is closed")

// flights are the fetches under way, one per extent.
type flights struct {
	mu     sync.Mutex
	byID   map[block.ExtentID]*flight
	closed bool
	wg     sync.WaitGroup
}

// flight is one get for all who miss the extent meanwhile.
type flight struct {
	cancel  context.CancelCauseFunc
	waiters int           // guarded by flights.mu; at 0 nobody may join any more
	done    chan struct{} // closed when data and err are set
	data    []byte
	err     error
}

func (f *flights) init() { f.byID = make(map[block.ExtentID]*flight) }

// Get gets a whole extent from its target, checked, and tells the disk that wrote it.
type Get func(context.Context) (block.DiskID, []byte, error)

// Fetch returns the extent's blocks from the cache or, after a miss, from get, and fills the cache with
// them. Callers that miss the same extent at the same time share one get, which goes on as long as
// any of them waits; its context has the values of the first caller's. The bytes are shared: they must
// not be changed. get must return blocks times block.Size bytes that have been checked.
func (c *Cache) Fetch(ctx context.Context, id block.ExtentID, blocks int, get Get) ([]byte, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	fl, err := c.join(ctx, id, blocks, get)
	if err != nil {
		return nil, err
	}
	select {
	case <-fl.done:
		return fl.data, fl.err
	case <-ctx.Done():
		c.flights.leave(id, fl)
		return nil, ctx.Err()
	}
}

// join adds a waiter to the flight of an extent, starting it if there is none.
func (c *Cache) join(ctx context.Context, id block.ExtentID, blocks int, get Get) (*flight, error) {
	f := &c.flights
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		return nil, ErrClosed
	}
	if fl := f.byID[id]; fl != nil {
		fl.waiters++
		c.counters.shared.Add(1)
		return fl, nil
	}
	ctx, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	fl := &flight{cancel: cancel, waiters: 1, done: make(chan struct{})}
	f.byID[id] = fl
	f.wg.Go(func() {
		fl.data, fl.err = c.fetch(ctx, id, blocks, get)
		f.remove(id, fl) // only now: who misses later finds the cache filled
		close(fl.done)
		cancel(nil)
	})
	return fl, nil
}

// fetch looks once more, since another flight may have ended just before this one, then gets.
func (c *Cache) fetch(ctx context.Context, id block.ExtentID, blocks int, get Get) ([]byte, error) {
	if c.has(id, blocks) {
		if data := make([]byte, blocks*block.Size); c.read(id, 0, blocks, data) {
			return data, nil
		}
	}
	c.counters.fetches.Add(1)
	disk, data, err := get(ctx)
	if errors.Is(context.Cause(ctx), ErrClosed) {
		return nil, ErrClosed
	}
	if err != nil {
		return nil, err
	}
	if len(data) != blocks*block.Size {
		return nil, fmt.Errorf("cache: fetch extent %v: got %d bytes for %d blocks", id, len(data), blocks)
	}
	c.Fill(disk, id, data)
	return data, nil
}

// leave takes a waiter out who gave up; with the last one the flight is cancelled and cannot be joined.
func (f *flights) leave(id block.ExtentID, fl *flight) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if fl.waiters--; fl.waiters == 0 {
		fl.cancel(nil)
		f.removeLocked(id, fl)
	}
}

func (f *flights) remove(id block.ExtentID, fl *flight) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.removeLocked(id, fl)
}

func (f *flights) removeLocked(id block.ExtentID, fl *flight) {
	if f.byID[id] == fl { // else a later flight has taken its place
		delete(f.byID, id)
	}
}

// close cancels the flights and waits for them; later fetches fail.
func (f *flights) close() {
	f.mu.Lock()
	f.closed = true
	for _, fl := range f.byID {
		fl.cancel(ErrClosed)
	}
	f.mu.Unlock()
	f.wg.Wait()
}
