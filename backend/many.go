package backend

import (
	"context"
	"errors"
	"slices"
	"sync"
)

// DeleteBatchMax is how many objects one DeleteBatch may name: what every store takes in one request.
const DeleteBatchMax = 256

// BatchDeleter is a Store that can delete many objects by one request.
type BatchDeleter interface {
	// DeleteBatch removes up to DeleteBatchMax objects by one request, in no order; missing ones are not an
	// error. It returns nil if none of them is there any more, else one error for each key, in the order
	// of keys, nil for those that are gone. More keys are refused, each as Permanent. A store that turns out to know
	// no batches refuses each with errors.ErrUnsupported (Permanent), now and later: see NoBatches.
	DeleteBatch(ctx context.Context, keys []string) []error
}

// Copier is a Store that can copy an object of a store beside it without its bytes passing through here.
type Copier interface {
	// CopyFrom stores under key what from holds under fromKey, in one step, as Put would with the
	// condition c; a condition that cannot be kept for sure is not tried. It is errors.ErrUnsupported (Permanent) if
	// the two stores are not of one service, or the object is beyond what the service copies. NotFound means that
	// there is nothing to copy, Auth perhaps that this store's credentials may not read the other. from may be
	// wrapped (Wrapper). After other errors the outcome is as open as after Put's.
	CopyFrom(ctx context.Context, key string, from Store, fromKey string, c Cond) (etag string, err error)
}

// Wrapper is a Store round another one.
type Wrapper interface {
	Unwrap() Store
}

// Innermost is the driver inside s.
func Innermost(s Store) Store {
	for {
		w, ok := s.(Wrapper)
		if !ok {
			return s
		}
		s = w.Unwrap()
	}
}

const deletesAtOnce = 8 // where there are no batches

// DeleteMany removes any number of objects by as few requests as s allows. The result is like DeleteBatch's.
func DeleteMany(ctx context.Context, s Store, keys []string) []error {
	b, ok := s.(BatchDeleter)
	if !ok {
		return DeleteEach(ctx, s, keys)
	}
	var errs []error
	for from := 0; from < len(keys); from += DeleteBatchMax {
		part := keys[from:min(from+DeleteBatchMax, len(keys))]
		got := b.DeleteBatch(ctx, part)
		if NoBatches(got) {
			got = DeleteEach(ctx, s, part)
		}
		for i, err := range got {
			errs = SetError(errs, len(keys), from+i, err)
		}
	}
	return errs
}

// NoBatches tells from the answer of a BatchDeleter that its store knows no batches: its objects go by Delete, so that
// whoever stands between sees each request.
func NoBatches(errs []error) bool {
	return slices.ContainsFunc(errs, func(err error) bool { return errors.Is(err, errors.ErrUnsupported) })
}

// DeleteEach is DeleteMany without batches: some at a time.
func DeleteEach(ctx context.Context, s Store, keys []string) []error {
	var (
		wg   sync.WaitGroup
		mu   sync.Mutex
		next int
		errs []error
	)
	for range min(deletesAtOnce, len(keys)) {
		wg.Go(func() {
			for {
				mu.Lock()
				i := next
				next++
				mu.Unlock()
				if i >= len(keys) {
					return
				}
				if err := s.Delete(ctx, keys[i]); err != nil {
					mu.Lock()
					errs = SetError(errs, len(keys), i, err)
					mu.Unlock()
				}
			}
		})
	}
	wg.Wait()
	return errs
}

// SetError puts the i-th of n errors into errs, which stays nil while there are none.
func SetError(errs []error, n, i int, err error) []error {
	if err == nil {
		return errs
	}
	if errs == nil {
		errs = make([]error, n)
	}
	errs[i] = err
	return errs
}

// Copy stores under key of to what from holds under fromKey, by the service itself where it can, else
// through here; an object of more than max bytes is then refused. Conditions and errors are Put's and Get's.
func Copy(ctx context.Context, to Store, key string, from Store, fromKey string, max int64, c Cond) (string, error) {
	if copier, ok := to.(Copier); ok {
		etag, err := copier.CopyFrom(ctx, key, from, fromKey, c)
		if !errors.Is(err, errors.ErrUnsupported) && ClassOf(err) != Auth {
			return etag, err
		}
	}
	body, _, err := from.Get(ctx, fromKey, max)
	if err != nil {
		return "", err
	}
	return to.Put(ctx, key, body, c)
}
