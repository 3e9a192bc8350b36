package pool

import (
	"errors"
	"testing"

	"graindisk/backend"
	"graindisk/backend/backendtest"
)

// TestCountedStorePassesAbilitiesOn counts a batch as one request where the target has batches, and each key
// where it has none.
func TestCountedStorePassesAbilitiesOn(t *testing.T) {
	ctx, m := t.Context(), backendtest.NewMemory("m")
	for _, c := range []struct {
		store   backend.Store
		deletes int64
		copies  bool
	}{{m, 1, true}, {struct{ backend.Store }{m}, 3, false}} {
		for _, key := range []string{"seg/00/1", "seg/00/2"} {
			if _, err := m.Put(ctx, key, []byte(key), backend.Cond{}); err != nil {
				t.Fatal(err)
			}
		}
		s := countTargets([]Target{{Name: "a", Store: c.store}})[0].Store.(*countedStore)
		_, err := s.CopyFrom(ctx, "seg/00/3", s, "seg/00/1", backend.Cond{Absent: true})
		if (err == nil) != c.copies || !c.copies && !errors.Is(err, errors.ErrUnsupported) {
			t.Errorf("copy: %v", err)
		}
		if errs := backend.DeleteMany(ctx, s, []string{"seg/00/1", "seg/00/2", "seg/00/3"}); errs != nil || len(m.Keys()) != 0 {
			t.Errorf("delete: %v, left %v", errs, m.Keys())
		}
		if r := s.requests(); r.Other != c.deletes || r.ShardPuts > 1 || (r.ShardPuts == 1) != c.copies {
			t.Errorf("counted %+v", r)
		}
	}
}
