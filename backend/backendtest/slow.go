package backendtest

import (
	"context"
	"sync"
	"time"

	"graindisk/backend"
)

// Slow is a Store at the end of a Line. It is what sleeps in this package: a test of whose time nobody
// should wait runs it in a synctest bubble. Safe for concurrent use.
type Slow struct {
	backend.Store
	line *Line
}

// Line is a way to stores that takes time: every call waits for Latency, then the bytes that it carries pass
// at BytesPerSecond, those of one call after those of another. 0 is no wait. The fields may be changed by Set.
type Line struct {
	mu             sync.Mutex
	latency        time.Duration
	bytesPerSecond float64
	free           time.Time // when the last bytes admitted will have passed
}

// NewLine returns a line; several stores may be at its end.
func NewLine(latency time.Duration, bytesPerSecond float64) *Line {
	return &Line{latency: latency, bytesPerSecond: bytesPerSecond}
}

// Set changes the line for calls from now on.
func (l *Line) Set(latency time.Duration, bytesPerSecond float64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.latency, l.bytesPerSecond, l.free = latency, bytesPerSecond, time.Time{}
}

// NewSlow puts inner at the end of a line.
func NewSlow(inner backend.Store, l *Line) *Slow { return &Slow{inner, l} }

// pass waits until a call that carries n bytes has gone over the line, or fails as Transient with ctx.
func (s *Slow) pass(ctx context.Context, op, key string, n int) error {
	t := time.NewTimer(s.line.admit(n))
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return &backend.Error{Op: op, Store: s.String(), Key: key, Class: backend.Transient, Err: context.Cause(ctx)}
	}
}

// admit queues n bytes and says how long they take from now.
func (l *Line) admit(n int) time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.bytesPerSecond == 0 {
		return l.latency
	}
	now := time.Now()
	if l.free.Before(now) {
		l.free = now
	}
	l.free = l.free.Add(time.Duration(float64(n) / l.bytesPerSecond * float64(time.Second)))
	return l.latency + l.free.Sub(now)
}

// Put implements backend.Store.
func (s *Slow) Put(ctx context.Context, key string, body []byte, c backend.Cond) (string, error) {
	if err := s.pass(ctx, "put", key, len(body)); err != nil {
		return "", err
	}
	return s.Store.Put(ctx, key, body, c)
}

// Get implements backend.Store.
func (s *Slow) Get(ctx context.Context, key string, max int64) ([]byte, string, error) {
	body, etag, err := s.Store.Get(ctx, key, max)
	if perr := s.pass(ctx, "get", key, len(body)); perr != nil {
		return nil, "", perr
	}
	return body, etag, err
}

// ReadAt implements backend.Store.
func (s *Slow) ReadAt(ctx context.Context, key string, p []byte, off int64) error {
	if len(p) > 0 {
		if err := s.pass(ctx, "read", key, len(p)); err != nil {
			return err
		}
	}
	return s.Store.ReadAt(ctx, key, p, off)
}

// Stat implements backend.Store.
func (s *Slow) Stat(ctx context.Context, key string) (backend.Info, error) {
	if err := s.pass(ctx, "stat", key, 0); err != nil {
		return backend.Info{}, err
	}
	return s.Store.Stat(ctx, key)
}

// Delete implements backend.Store.
func (s *Slow) Delete(ctx context.Context, key string) error {
	if err := s.pass(ctx, "delete", key, 0); err != nil {
		return err
	}
	return s.Store.Delete(ctx, key)
}

// List implements backend.Store.
func (s *Slow) List(ctx context.Context, prefix, after string, max int) ([]backend.Info, bool, error) {
	if err := s.pass(ctx, "list", prefix, 0); err != nil {
		return nil, false, err
	}
	return s.Store.List(ctx, prefix, after, max)
}
