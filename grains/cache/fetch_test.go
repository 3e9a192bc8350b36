package cache

import (
	"bytes"
	"context"
	"errors"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"

	"go.uber.org/goleak"

	"graindisk/block"
)

func TestConcurrentMissesShareOneGet(t *testing.T) {
	r := newRig(t, 8)
	const callers = 20
	var gets atomic.Int64
	release := make(chan struct{})
	get := func(context.Context) (block.DiskID, []byte, error) {
		gets.Add(1)
		<-release
		return 1, extent(5, 0, 4), nil
	}
	var wg sync.WaitGroup
	for range callers {
		wg.Go(func() {
			p, err := r.Fetch(t.Context(), 5, 4, get)
			if err != nil || !bytes.Equal(p, extent(5, 0, 4)) {
				t.Errorf("fetch: %d bytes, %v", len(p), err)
			}
		})
	}
	for r.waiters(5) < callers {
		runtime.Gosched() // all callers are on their way; nothing else can happen before the release
	}
	close(release)
	wg.Wait()
	if gets.Load() != 1 {
		t.Errorf("%d gets, want 1", gets.Load())
	}
	r.wants(true, 5, 0, 4)
	if _, err := r.Fetch(t.Context(), 5, 4, get); err != nil || gets.Load() != 1 {
		t.Errorf("fetch of what is cached: %d gets, %v", gets.Load(), err)
	}
}

func (r *rig) waiters(id uint64) int {
	r.flights.mu.Lock()
	defer r.flights.mu.Unlock()
	for k, f := range r.flights.byID {
		if uint64(k) == id {
			return f.waiters
		}
	}
	return 0
}

func TestCancelledFirstCallerFailsNobodyElse(t *testing.T) {
	r := newRig(t, 8)
	type key struct{}
	ctx, cancel := context.WithCancel(context.WithValue(t.Context(), key{}, "first"))
	started, release := make(chan struct{}), make(chan struct{})
	get := func(ctx context.Context) (block.DiskID, []byte, error) {
		close(started)
		<-release
		if ctx.Value(key{}) != "first" {
			t.Error("the values of the first caller's context are gone")
		}
		return 1, extent(5, 0, 1), ctx.Err()
	}
	first, second := make(chan error), make(chan error)
	go func() { _, err := r.Fetch(ctx, 5, 1, get); first <- err }()
	<-started
	go func() { _, err := r.Fetch(t.Context(), 5, 1, get); second <- err }()
	for r.waiters(5) < 2 {
		runtime.Gosched()
	}
	cancel()
	if err := <-first; !errors.Is(err, context.Canceled) {
		t.Errorf("first caller: %v", err)
	}
	close(release)
	if err := <-second; err != nil {
		t.Errorf("second caller: %v", err)
	}
	if _, err := r.Fetch(ctx, 5, 1, get); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled before: %v", err)
	}
}

func TestGetEndsWhenNobodyWaits(t *testing.T) {
	r := newRig(t, 8)
	ctx, cancel := context.WithCancel(t.Context())
	started, ended := make(chan struct{}), make(chan struct{})
	go func() {
		<-started
		cancel()
	}()
	_, err := r.Fetch(ctx, 5, 1, func(ctx context.Context) (block.DiskID, []byte, error) {
		close(started)
		<-ctx.Done()
		close(ended)
		return 0, nil, ctx.Err()
	})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("fetch: %v", err)
	}
	<-ended
	// A later caller does not join the cancelled get.
	p, err := r.Fetch(t.Context(), 5, 1, func(context.Context) (block.DiskID, []byte, error) { return 1, extent(5, 0, 1), nil })
	if err != nil || !bytes.Equal(p, extent(5, 0, 1)) {
		t.Errorf("fetch after: %v", err)
	}
}

func TestFetchPassesErrorsOn(t *testing.T) {
	r := newRig(t, 8)
	if _, err := r.Fetch(t.Context(), 1, 1, func(context.Context) (block.DiskID, []byte, error) { return 0, nil, errIO }); !errors.Is(err, errIO) {
		t.Errorf("failed get: %v", err)
	}
	if _, err := r.Fetch(t.Context(), 1, 2, func(context.Context) (block.DiskID, []byte, error) { return 1, extent(1, 0, 1), nil }); err == nil {
		t.Error("a short get passed")
	}
	r.wants(false, 1, 0, 1)
}

func TestCloseEndsFetches(t *testing.T) {
	defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
	r := newRig(t, 8)
	started := make(chan struct{})
	result := make(chan error)
	go func() {
		_, err := r.Fetch(context.Background(), 5, 1, func(ctx context.Context) (block.DiskID, []byte, error) {
			close(started)
			<-ctx.Done()
			return 0, nil, ctx.Err()
		})
		result <- err
	}()
	<-started
	r.Close()
	if err := <-result; !errors.Is(err, ErrClosed) {
		t.Errorf("fetch under way: %v", err)
	}
	if _, err := r.Fetch(context.Background(), 5, 1, nil); !errors.Is(err, ErrClosed) {
		t.Errorf("later fetch: %v", err)
	}
}
