package backendtest

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"testing"

	"golang.org/x/sync/errgroup"

	"graindisk/backend"
)

const manyAtOnce = 32

// manyObjects is how many objects there are: fewer under the race detector, which finds no more in more.
func manyObjects() int {
	if os.Getenv("GRAINDISK_RACE") == "1" {
		return 2_500
	}
	return 10_000
}

// testMany stores more objects than any page of a list holds, lists them by full pages, deletes all but every
// hundredth, most of them by batches where there are any, and lists what is left by small pages.
func testMany(t *testing.T, s backend.Store) {
	keys := make([]string, manyObjects())
	for i := range keys {
		keys[i] = fmt.Sprintf("seg/%02x/%d", i%256, i)
	}
	each(t, keys, func(key string) error { return putOnce(t, s, key) })
	slices.Sort(keys)
	if got := listAll(t, s, 1000); !slices.Equal(got, keys) {
		t.Fatalf("%d objects are listed, of %d, or in another order", len(got), len(keys))
	}
	var left, gone, batched []string
	for i, key := range keys {
		switch {
		case i%100 == 0:
			left = append(left, key)
		case i%100 < 10:
			gone = append(gone, key)
		default:
			batched = append(batched, key)
		}
	}
	each(t, gone, func(key string) error { return deleteTries(t, s, key) })
	if errs := backend.DeleteMany(t.Context(), s, batched); errs != nil {
		t.Fatal(errors.Join(errs...))
	}
	if got := listAll(t, s, 7); !slices.Equal(got, left) {
		t.Errorf("%d objects are left, want %d: %v", len(got), len(left), got)
	}
}

// putOnce stores an object that nobody else stores. A busy server may close a connection under a request, and a
// put with a condition is sent once: what then came of it is for the caller to find out.
func putOnce(t *testing.T, s backend.Store, key string) (err error) {
	for attempt := range 5 {
		_, err = s.Put(t.Context(), key, []byte(key), backend.Cond{Absent: true})
		if attempt > 0 && errors.Is(err, backend.ErrPrecondition) {
			return nil
		}
		if backend.ClassOf(err) != backend.Transient {
			return err
		}
	}
	return err
}

// deleteTries deletes an object of a server that may be too busy to answer.
func deleteTries(t *testing.T, s backend.Store, key string) (err error) {
	for range 5 {
		if err = s.Delete(t.Context(), key); backend.ClassOf(err) != backend.Transient {
			return err
		}
	}
	return err
}

// each calls do for every key, several at a time.
func each(t *testing.T, keys []string, do func(key string) error) {
	t.Helper()
	var g errgroup.Group
	g.SetLimit(manyAtOnce)
	for _, key := range keys {
		g.Go(func() error { return do(key) })
	}
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}
}

func listAll(t *testing.T, s backend.Store, page int) (keys []string) {
	t.Helper()
	for after, more := "", true; more; {
		objs, m, err := s.List(t.Context(), "seg/", after, page)
		if err != nil {
			t.Fatal(err)
		}
		if len(objs) > page {
			t.Fatalf("a page of %d objects, at most %d were asked for", len(objs), page)
		}
		for _, o := range objs {
			keys, after = append(keys, o.Key), o.Key
		}
		more = m
	}
	return keys
}
