package backendtest

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"graindisk/backend"
)

// expectKeys lists once and compares.
func expectKeys(t *testing.T, s backend.Store, prefix, after string, max int, more bool, want ...string) {
	t.Helper()
	found, gotMore, err := s.List(t.Context(), prefix, after, max)
	if err != nil {
		t.Fatalf("list %q after %q: %v", prefix, after, err)
	}
	if got := keysOf(found); !slices.Equal(got, want) || gotMore != more {
		t.Fatalf("list %q after %q, max %d: got %q, more %v\nwant %q, more %v", prefix, after, max, got, gotMore, want, more)
	}
}

func keysOf(infos []backend.Info) []string {
	var keys []string
	for _, i := range infos {
		keys = append(keys, i.Key)
	}
	return keys
}

// listKeys are in byte order, which is not the order of a walk through folders: '-' and '.' sort
// before the slash, digits and letters after it.
var listKeys = []string{
	"A", "a-b", "a.b/x", "a/0", "a/b-c", "a/b/c", "a/b/d/e", "a/b0", "a/c", "a0", "aa", "b", "ckpt/1/2/3.0", "root", "seg/00/1-1.0",
	"seg/00/1-1.1", "seg/01/1-1.0", "seg/ff/1", "seg0", "z/z",
}

func putAll(t *testing.T, s backend.Store, keys []string) {
	t.Helper()
	for _, i := range rand.New(rand.NewPCG(1, 2)).Perm(len(keys)) {
		put(t, s, keys[i], []byte(keys[i]), backend.Cond{Absent: true})
	}
}

func testListOrder(t *testing.T, s backend.Store) {
	expectKeys(t, s, "", "", 1000, false)
	if !slices.IsSorted(listKeys) {
		t.Fatal("the test's keys are not in order")
	}
	putAll(t, s, listKeys)
	expectKeys(t, s, "", "", 1000, false, listKeys...)
	found, _, err := s.List(t.Context(), "", "", 1000)
	if err != nil {
		t.Fatal(err)
	}
	for _, info := range found {
		st, err := s.Stat(t.Context(), info.Key)
		if err != nil {
			t.Fatal(err)
		}
		if info.Size != int64(len(info.Key)) || info.ETag != "" && info.ETag != st.ETag {
			t.Errorf("list says %+v, stat %+v", info, st)
		}
	}
}

func testListPrefix(t *testing.T, s backend.Store) {
	putAll(t, s, listKeys)
	prefixes := []string{"", "a", "a/", "a/b", "a/b/", "a/b/d/e", "a/b/d/e/", "s", "se", "seg", "seg/", "seg/0", "x", "zz", ".x", "-"}
	afters := []string{"", "0", "a-b", "a.", "a/", "a/b-c", "a/b/", "a/b/c", "a/b/zz", "a0", "seg/00", "seg/00/1-1.1", "z/z", "~"}
	for _, prefix := range prefixes {
		for _, after := range afters {
			var want []string
			for _, key := range listKeys {
				if strings.HasPrefix(key, prefix) && key > after {
					want = append(want, key)
				}
			}
			expectKeys(t, s, prefix, after, 100, false, want...)
		}
	}
}

func testListPages(t *testing.T, s backend.Store) {
	putAll(t, s, listKeys)
	for _, max := range []int{1, 2, 3, len(listKeys) - 1, len(listKeys), len(listKeys) + 1} {
		var got []string
		for more := true; more; {
			after := ""
			if len(got) > 0 {
				after = got[len(got)-1]
			}
			var page []backend.Info
			var err error
			page, more, err = s.List(t.Context(), "", after, max)
			if err != nil {
				t.Fatal(err)
			}
			if len(page) > max || more && len(page) == 0 {
				t.Fatalf("max %d: a page of %d, more %v", max, len(page), more)
			}
			got = append(got, keysOf(page)...)
		}
		if !slices.Equal(got, listKeys) {
			t.Errorf("pages of %d give %q", max, got)
		}
	}
}

// testListChanging lists while objects come and go: those that stay must be in every list.
func testListChanging(t *testing.T, s backend.Store) {
	ctx := t.Context()
	putAll(t, s, listKeys)
	stop := make(chan struct{})
	errs := race(2, func(i int) error {
		if i == 0 {
			defer close(stop)
			for n := range 30 {
				key := fmt.Sprintf("seg/%02x/tmp", n%3)
				if _, err := s.Put(ctx, key, nil, backend.Cond{}); err != nil {
					return err
				}
				if err := s.Delete(ctx, key); err != nil {
					return err
				}
			}
			return nil
		}
		for {
			found, _, err := s.List(ctx, "", "", 1000)
			if err != nil {
				return err
			}
			keys := keysOf(found)
			for _, key := range listKeys {
				if !slices.Contains(keys, key) {
					return fmt.Errorf("%s is missing", key)
				}
			}
			select {
			case <-stop:
				return nil
			default:
			}
		}
	})
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
}
