package pool

import (
	"context"
	"errors"
	"sync/atomic"

	"graindisk/backend"
)

// cutOff is a store that one host cannot reach while off is set; others can.
type cutOff struct {
	backend.Store
	off *atomic.Bool
}

func (s cutOff) fail(op, key string) error {
	if !s.off.Load() {
		return nil
	}
	return &backend.Error{Op: op, Store: s.String(), Key: key, Class: backend.Transient, Err: errors.New("no route to host")}
}

func (s cutOff) Put(ctx context.Context, key string, body []byte, c backend.Cond) (string, error) {
	if err := s.fail("put", key); err != nil {
		return "", err
	}
	return s.Store.Put(ctx, key, body, c)
}

func (s cutOff) Get(ctx context.Context, key string, max int64) ([]byte, string, error) {
	if err := s.fail("get", key); err != nil {
		return nil, "", err
	}
	return s.Store.Get(ctx, key, max)
}

func (s cutOff) ReadAt(ctx context.Context, key string, p []byte, off int64) error {
	if err := s.fail("read", key); err != nil {
		return err
	}
	return s.Store.ReadAt(ctx, key, p, off)
}
