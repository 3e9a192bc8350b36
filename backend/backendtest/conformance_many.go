package backendtest

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"

	"graindisk/backend"
)

// testDeleteMany deletes by whatever the store has for it: more than one batch holds, some of them missing
// or named twice, some keys that are none.
func testDeleteMany(t *testing.T, s backend.Store) {
	ctx := t.Context()
	var keys, left []string
	for i := range backend.DeleteBatchMax + 20 {
		keys = append(keys, fmt.Sprintf("seg/%02x/%d", i%7, i))
	}
	left = append(left, "seg/00/0x", "seg/z")
	each(t, slices.Concat(keys, left), func(key string) error {
		_, err := s.Put(ctx, key, []byte(key), backend.Cond{Absent: true})
		return err
	})
	if errs := backend.DeleteMany(ctx, s, nil); errs != nil {
		t.Errorf("of nothing: %v", errs)
	}
	if errs := backend.DeleteMany(ctx, s, append(keys[:3:3], "never/was", "seg/00", keys[1])); errs != nil {
		t.Errorf("with missing ones: %v", errs)
	}
	if errs := backend.DeleteMany(ctx, s, keys); errs != nil {
		t.Errorf("%d keys: %v", len(keys), errors.Join(errs...))
	}
	expectKeys(t, s, "", "", 1000, false, left...)

	for _, bad := range []string{"", "a//b", "../seg/z", "seg/z/"} {
		put(t, s, "k1", nil, backend.Cond{})
		put(t, s, "k2", nil, backend.Cond{})
		errs := backend.DeleteMany(ctx, s, []string{"k1", bad, "k2"})
		if len(errs) != 3 || errs[0] != nil || errs[2] != nil {
			t.Fatalf("with the key %q: %v", bad, errs)
		}
		expectClass(t, errs[1], backend.Permanent)
	}
	expectKeys(t, s, "", "", 1000, false, left...)

	ended, cancel := context.WithCancel(ctx)
	cancel()
	errs := backend.DeleteMany(ended, s, left)
	if len(errs) != len(left) {
		t.Fatalf("with an ended context: %v", errs)
	}
	for _, err := range errs {
		expectClass(t, err, backend.Transient)
	}
	expectKeys(t, s, "", "", 1000, false, left...)
	testTooMany(t, s)
}

// testTooMany asks for more than a batch may name.
func testTooMany(t *testing.T, s backend.Store) {
	b, ok := s.(backend.BatchDeleter)
	if !ok {
		return
	}
	errs := b.DeleteBatch(t.Context(), slices.Repeat([]string{"none"}, backend.DeleteBatchMax+1))
	if len(errs) != backend.DeleteBatchMax+1 {
		t.Fatalf("%d errors", len(errs))
	}
	for _, err := range errs {
		expectClass(t, err, backend.Permanent)
	}
}

// testCopy copies by whatever the store has for it, from itself; conditions hold as for a put.
func testCopy(t *testing.T, s backend.Store) {
	ctx := t.Context()
	copyTo := func(key, from string, c backend.Cond) (string, error) {
		return backend.Copy(ctx, s, key, s, from, 1<<20, c)
	}
	body := Body(5, 300_000)
	put(t, s, "a/from", body, backend.Cond{})
	put(t, s, "a/empty", nil, backend.Cond{})
	for _, c := range []struct {
		from string
		want []byte
	}{{"a/from", body}, {"a/empty", nil}} {
		to := "b/of-" + c.from[2:]
		for _, cond := range []backend.Cond{{Absent: true}, {}} {
			etag, err := copyTo(to, c.from, cond)
			if err != nil {
				t.Fatalf("copy %s, %+v: %v", c.from, cond, err)
			}
			if got := expect(t, s, to, c.want); got != etag {
				t.Errorf("copy said etag %s, get says %s", etag, got)
			}
		}
		_, err := copyTo(to, "a/from", backend.Cond{Absent: true})
		expectClass(t, err, backend.Precondition)
		etag := expect(t, s, to, c.want)
		_, err = copyTo(to, "a/from", backend.Cond{Match: `"0123456789abcdef0123456789abcdef"`})
		expectClass(t, err, backend.Precondition)
		expect(t, s, to, c.want)
		_, err = copyTo("none", c.from, backend.Cond{Match: etag})
		expectClass(t, err, backend.Precondition, backend.NotFound)
		if _, err = copyTo(to, "a/from", backend.Cond{Match: etag}); err != nil {
			t.Fatalf("a copy that matches: %v", err)
		}
		expect(t, s, to, body)
		expect(t, s, c.from, c.want)
	}
	for _, c := range []backend.Cond{{}, {Absent: true}} {
		_, err := copyTo("none", "a/nothing", c)
		expectClass(t, err, backend.NotFound)
		_, err = copyTo("no//key", "a/from", c)
		expectClass(t, err, backend.Permanent)
	}
	_, err := copyTo("none", "a/from", backend.Cond{Absent: true, Match: "x"})
	expectClass(t, err, backend.Permanent)
	expectKeys(t, s, "", "", 10, false, "a/empty", "a/from", "b/of-empty", "b/of-from")
	testCopyRace(t, s)
	testCopyFromElsewhere(t, s)
}

// testCopyRace lets copies of different objects race for one name.
func testCopyRace(t *testing.T, s backend.Store) {
	ctx := t.Context()
	const racers = 8
	for i := range racers {
		put(t, s, fmt.Sprintf("race/%d", i), Body(uint64(i), 1000), backend.Cond{})
	}
	errs := race(racers, func(i int) error {
		for { // a store that is asked too much at once may say neither yes nor no
			_, err := backend.Copy(ctx, s, "winner", s, fmt.Sprintf("race/%d", i), 1<<20, backend.Cond{Absent: true})
			if c := backend.ClassOf(err); c != backend.Transient && c != backend.Throttled {
				return err
			}
		}
	})
	winner := -1
	for i, err := range errs {
		if err == nil && winner >= 0 {
			t.Fatalf("both %d and %d were copied", winner, i)
		} else if err == nil {
			winner = i
		} else {
			expectClass(t, err, backend.Precondition)
		}
	}
	if winner < 0 {
		t.Fatal("none was copied")
	}
	expect(t, s, "winner", Body(uint64(winner), 1000))
}

// foreign is a store of no service that any other knows.
type foreign struct{ backend.Store }

// testCopyFromElsewhere copies what no service can: the bytes go through here.
func testCopyFromElsewhere(t *testing.T, s backend.Store) {
	ctx, other := t.Context(), foreign{NewMemory("elsewhere")}
	body := Body(6, 10_000)
	put(t, other, "k", body, backend.Cond{})
	if copier, ok := s.(backend.Copier); ok {
		_, err := copier.CopyFrom(ctx, "copied", other, "k", backend.Cond{})
		if expectClass(t, err, backend.Permanent); !errors.Is(err, errors.ErrUnsupported) {
			t.Errorf("%v is not ErrUnsupported", err)
		}
	}
	if _, err := backend.Copy(ctx, s, "copied", other, "k", 10_000, backend.Cond{Absent: true}); err != nil {
		t.Fatal(err)
	}
	expect(t, s, "copied", body)
	_, err := backend.Copy(ctx, s, "copied2", other, "k", 9_999, backend.Cond{})
	expectClass(t, err, backend.Permanent)
}
