package backendtest

import (
	"context"
	"errors"
	"fmt"

	"graindisk/backend"
)

// DeleteBatch implements backend.BatchDeleter.
func (m *Memory) DeleteBatch(ctx context.Context, keys []string) []error {
	var errs []error
	for i, key := range keys {
		err := m.Delete(ctx, key)
		if len(keys) > backend.DeleteBatchMax {
			err = m.fail("delete", key, backend.Permanent, fmt.Errorf("one of %d keys", len(keys)))
		}
		errs = backend.SetError(errs, len(keys), i, err)
	}
	return errs
}

// CopyFrom implements backend.Copier, between stores in memory.
func (m *Memory) CopyFrom(ctx context.Context, key string, from backend.Store, fromKey string, c backend.Cond) (string, error) {
	src, ok := backend.Innermost(from).(*Memory)
	if !ok {
		return "", m.fail("copy", key, backend.Permanent, fmt.Errorf("from %s: %w", from, errors.ErrUnsupported))
	}
	o, err := src.find(ctx, "copy", fromKey)
	if err != nil {
		return "", err
	}
	etag, err := m.Put(ctx, key, o.body, c)
	var e *backend.Error
	if errors.As(err, &e) {
		e.Op = "copy"
	}
	return etag, err
}
