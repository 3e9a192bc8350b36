package adaptive

import (
	"cmp"
	"context"
	"errors"
	"slices"

	"graindisk/backend"
)

var (
	_ backend.BatchDeleter = (*Store)(nil)
	_ backend.Copier       = (*Store)(nil)
	_ backend.Wrapper      = (*Store)(nil)
)

// copyBytes is what a copied object is taken for when its time is set: a shard and more.
const copyBytes = 64 << 20

// Unwrap implements backend.Wrapper.
func (s *Store) Unwrap() backend.Store { return s.inner }

// DeleteBatch implements backend.BatchDeleter; it counts as one delete. Only what was not deleted for a
// passing reason is tried again. Where the store knows no batches each key is a call of its own.
func (s *Store) DeleteBatch(ctx context.Context, keys []string) []error {
	inner, ok := s.inner.(backend.BatchDeleter)
	if !ok || len(keys) == 0 || s.noBatches.Load() {
		return backend.DeleteEach(ctx, s, keys)
	}
	b := newBatch(keys)
	err := s.do(ctx, call{Delete, keys[0], 0, true}, func(ctx context.Context) (int64, error) {
		return 0, b.note(inner.DeleteBatch(ctx, b.left))
	})
	if backend.NoBatches(b.errs) {
		s.noBatches.Store(true)
		return backend.DeleteEach(ctx, s, keys)
	}
	for i, j := range b.at { // the call may have ended before it reached the store
		if b.errs[j] == nil && err != nil {
			b.errs[j] = s.fail(call{op: Delete, key: b.left[i]}, errors.Unwrap(err)) // err names the first key
		}
	}
	if !slices.ContainsFunc(b.errs, func(err error) bool { return err != nil }) {
		return nil
	}
	return b.errs // what is not worth trying again may have failed in an earlier attempt than the last
}

// batch is what is left to do of a batch.
type batch struct {
	errs []error // of each key, so far
	left []string
	at   []int // left[i] is the key of errs[at[i]]
}

func newBatch(keys []string) *batch {
	b := &batch{errs: make([]error, len(keys)), left: keys, at: make([]int, len(keys))}
	for i := range b.at {
		b.at[i] = i
	}
	return b
}

// note learns what came of an attempt on what is left: of that stays what may succeed yet, what was refused
// included, as the next attempt may have other credentials. It returns the error that says most of another attempt:
// that the store wants less before that it failed, and either before what another attempt does not change.
func (b *batch) note(got []error) error {
	var left []string
	var at []int
	var throttled, transient, refused, other error
	for i, j := range b.at {
		b.errs[j] = nil
		if got != nil {
			b.errs[j] = got[i]
		}
		switch backend.ClassOf(b.errs[j]) {
		case 0:
		case backend.Throttled:
			left, at, throttled = append(left, b.left[i]), append(at, j), b.errs[j]
		case backend.Transient:
			left, at, transient = append(left, b.left[i]), append(at, j), b.errs[j]
		case backend.Auth:
			left, at, refused = append(left, b.left[i]), append(at, j), b.errs[j]
		default:
			other = b.errs[j]
		}
	}
	b.left, b.at = left, at
	return cmp.Or(throttled, transient, refused, other)
}

// CopyFrom implements backend.Copier, if the inner store does.
func (s *Store) CopyFrom(ctx context.Context, key string, from backend.Store, fromKey string, c backend.Cond) (etag string, err error) {
	copier, ok := s.inner.(backend.Copier)
	if !ok {
		return "", &backend.Error{Op: Copy.String(), Store: s.String(), Key: key, Class: backend.Permanent, Err: errors.ErrUnsupported}
	}
	err = s.do(ctx, call{Copy, key, 0, c == backend.Cond{}}, func(ctx context.Context) (_ int64, err error) {
		etag, err = copier.CopyFrom(ctx, key, from, fromKey, c)
		return 0, err
	})
	return etag, err
}
