package backendtest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"graindisk/backend"
)

// Run is the conformance suite. Every subtest asks newStore for a store of its own, which must be
// empty.
func Run(t *testing.T, newStore func(t *testing.T) backend.Store) {
	for _, c := range []struct {
		name string
		test func(t *testing.T, s backend.Store)
	}{
		{"put and get back", testPutGet},
		{"big object", testBig},
		{"get has a limit", testGetMax},
		{"missing object", testMissing},
		{"overwrite", testOverwrite},
		{"read ranges", testReadAt},
		{"stat", testStat},
		{"delete", testDelete},
		{"delete many", testDeleteMany},
		{"copy", testCopy},
		{"etags differ", testETags},
		{"put if absent", testAbsent},
		{"put if match", testMatch},
		{"racing put if absent", testAbsentRace},
		{"compare and set loses no update", testCounter},
		{"readers see whole objects", testWhole},
		{"list order", testListOrder},
		{"list prefixes", testListPrefix},
		{"list pages", testListPages},
		{"list while it changes", testListChanging},
		{"many objects", testMany},
		{"strange keys are refused", testBadKeys},
		{"longest key", testLongKey},
		{"buffers are not kept", testBuffers},
		{"ended context", testContext},
		{"has a name", testString},
	} {
		t.Run(c.name, func(t *testing.T) { c.test(t, newStore(t)) })
	}
}

// Body returns n bytes that look random and depend on the seed alone.
func Body(seed uint64, n int) []byte {
	var key [32]byte
	for i := range 8 {
		key[i] = byte(seed >> (8 * i))
	}
	p := make([]byte, n)
	_, _ = rand.NewChaCha8(key).Read(p) // never fails
	return p
}

func put(t *testing.T, s backend.Store, key string, body []byte, c backend.Cond) string {
	t.Helper()
	etag, err := s.Put(t.Context(), key, body, c)
	if err != nil {
		t.Fatalf("put %s: %v", key, err)
	}
	if etag == "" {
		t.Fatalf("put %s: no etag", key)
	}
	return etag
}

func expect(t *testing.T, s backend.Store, key string, want []byte) (etag string) {
	t.Helper()
	body, etag, err := s.Get(t.Context(), key, int64(len(want)))
	if err != nil {
		t.Fatalf("get %s: %v", key, err)
	}
	if !bytes.Equal(body, want) {
		t.Fatalf("get %s: %d bytes differ from the %d stored", key, len(body), len(want))
	}
	return etag
}

// expectClass fails the test unless err is the contract's error of one of the classes, with its place.
func expectClass(t *testing.T, err error, classes ...backend.Class) {
	t.Helper()
	var e *backend.Error
	if !errors.As(err, &e) {
		t.Fatalf("want a *backend.Error of class %v, got %v", classes, err)
	}
	if !slices.Contains(classes, e.Class) {
		t.Fatalf("want class %v, got %v: %v", classes, e.Class, err)
	}
	if e.Op == "" || e.Store == "" {
		t.Fatalf("an error without its place: %#v", e)
	}
	if strings.ContainsRune(err.Error(), '\n') {
		t.Fatalf("an error of several lines: %q", err)
	}
}

func testPutGet(t *testing.T, s backend.Store) {
	for i, size := range []int{0, 1, 511, 4096, 4097, 100_000} {
		key := fmt.Sprintf("a/b-%d/c.%d", i%2, size)
		body := Body(uint64(size), size)
		stored := put(t, s, key, body, backend.Cond{})
		if got := expect(t, s, key, body); got != stored {
			t.Errorf("%s: put said etag %s, get says %s", key, stored, got)
		}
	}
}

func testBig(t *testing.T, s backend.Store) {
	body := Body(9, 9<<20+1)
	put(t, s, "seg/01/1-1.0", body, backend.Cond{Absent: true})
	expect(t, s, "seg/01/1-1.0", body)
	p := make([]byte, 1<<20)
	if err := s.ReadAt(t.Context(), "seg/01/1-1.0", p, 8<<20+1); err != nil || !bytes.Equal(p, body[8<<20+1:]) {
		t.Errorf("last MiB: %v, or other bytes", err)
	}
}

func testGetMax(t *testing.T, s backend.Store) {
	put(t, s, "k", Body(1, 1000), backend.Cond{})
	expect(t, s, "k", Body(1, 1000)) // exactly the limit
	for _, max := range []int64{999, 1, 0} {
		body, _, err := s.Get(t.Context(), "k", max)
		expectClass(t, err, backend.Permanent)
		if body != nil {
			t.Errorf("max %d: bytes with an error", max)
		}
	}
	if _, _, err := s.Get(t.Context(), "k", math.MaxInt64); err != nil {
		t.Errorf("without a limit: %v", err)
	}
	put(t, s, "empty", nil, backend.Cond{})
	expect(t, s, "empty", nil)
}

func testMissing(t *testing.T, s backend.Store) {
	put(t, s, "folder/object", []byte("x"), backend.Cond{})
	for _, key := range []string{"nothing", "folder/nothing", "folder", "none/at/all", "folder/object/x"} {
		_, _, err := s.Get(t.Context(), key, 100)
		expectClass(t, err, backend.NotFound)
		expectClass(t, s.ReadAt(t.Context(), key, make([]byte, 1), 0), backend.NotFound)
		_, err = s.Stat(t.Context(), key)
		expectClass(t, err, backend.NotFound)
		if !errors.Is(err, backend.ErrNotFound) {
			t.Errorf("%v is not ErrNotFound", err)
		}
	}
}

func testOverwrite(t *testing.T, s backend.Store) {
	for i := range 5 {
		body := Body(uint64(i), 3000-500*i) // shorter each time
		put(t, s, "k", body, backend.Cond{})
		expect(t, s, "k", body)
	}
}

func testReadAt(t *testing.T, s backend.Store) {
	const size = 10_000
	body := Body(7, size)
	put(t, s, "k", body, backend.Cond{})
	for _, r := range []struct{ off, n int }{
		{0, size}, {0, 1}, {size - 1, 1}, {1, size - 1}, {4096, 4096}, {5000, 0}, {size, 0}, {size + 5, 0},
	} {
		p := make([]byte, r.n)
		if err := s.ReadAt(t.Context(), "k", p, int64(r.off)); err != nil || !bytes.Equal(p, body[min(r.off, size):min(r.off+r.n, size)]) {
			t.Errorf("read [%d, +%d): %v, or other bytes", r.off, r.n, err)
		}
	}
	for _, r := range []struct{ off, n int64 }{
		{0, size + 1}, {size, 1}, {size - 1, 2}, {size + 1, 1}, {1 << 40, 1}, {math.MaxInt64 - 1, 1},
	} {
		err := s.ReadAt(t.Context(), "k", make([]byte, r.n), r.off)
		if expectClass(t, err, backend.Short); !errors.Is(err, backend.ErrShort) {
			t.Errorf("%v is not ErrShort", err)
		}
	}
	put(t, s, "empty", nil, backend.Cond{})
	expectClass(t, s.ReadAt(t.Context(), "empty", make([]byte, 1), 0), backend.Short)
	expectClass(t, s.ReadAt(t.Context(), "k", make([]byte, 1), -1), backend.Permanent)
	expectClass(t, s.ReadAt(t.Context(), "k", make([]byte, 2), math.MaxInt64), backend.Permanent)
}

func testStat(t *testing.T, s backend.Store) {
	etag := put(t, s, "a/k", Body(1, 12345), backend.Cond{})
	info, err := s.Stat(t.Context(), "a/k")
	if err != nil {
		t.Fatal(err)
	}
	if info.Key != "a/k" || info.Size != 12345 || info.ETag != etag {
		t.Errorf("stat says %+v; put said etag %s", info, etag)
	}
}

func testDelete(t *testing.T, s backend.Store) {
	put(t, s, "a/b/k", []byte("x"), backend.Cond{})
	put(t, s, "a/other", []byte("y"), backend.Cond{})
	for _, key := range []string{"a/b/k", "a/b/k", "never/was", "a/b", "a"} { // twice, a missing one, folders
		if err := s.Delete(t.Context(), key); err != nil {
			t.Errorf("delete %s: %v", key, err)
		}
	}
	_, err := s.Stat(t.Context(), "a/b/k")
	expectClass(t, err, backend.NotFound)
	expect(t, s, "a/other", []byte("y"))
	put(t, s, "a/b/k", []byte("z"), backend.Cond{Absent: true})
	expect(t, s, "a/b/k", []byte("z"))
}

func testETags(t *testing.T, s backend.Store) {
	seen := map[string]int{}
	for i := range 100 { // same size, as fast as can be: times and inodes repeat
		etag := put(t, s, "k", []byte(fmt.Sprintf("%08d", i)), backend.Cond{})
		if before, ok := seen[etag]; ok {
			t.Fatalf("puts %d and %d of different bytes have the same etag %s", before, i, etag)
		}
		seen[etag] = i
	}
}

func testAbsent(t *testing.T, s backend.Store) {
	absent := backend.Cond{Absent: true}
	etag := put(t, s, "a/k", []byte("first"), absent)
	for _, body := range []string{"second", "first"} {
		_, err := s.Put(t.Context(), "a/k", []byte(body), absent)
		if expectClass(t, err, backend.Precondition); !errors.Is(err, backend.ErrPrecondition) {
			t.Errorf("%v is not ErrPrecondition", err)
		}
	}
	if got := expect(t, s, "a/k", []byte("first")); got != etag {
		t.Errorf("a refused put changed the etag from %s to %s", etag, got)
	}
}

func testMatch(t *testing.T, s backend.Store) {
	first := put(t, s, "k", []byte("1"), backend.Cond{})
	second := put(t, s, "k", []byte("2"), backend.Cond{Match: first})
	if first == second {
		t.Fatalf("etag %s did not change", first)
	}
	_, err := s.Put(t.Context(), "k", []byte("3"), backend.Cond{Match: first})
	expectClass(t, err, backend.Precondition)
	expect(t, s, "k", []byte("2"))
	_, err = s.Put(t.Context(), "none", []byte("3"), backend.Cond{Match: second})
	expectClass(t, err, backend.Precondition, backend.NotFound)
	_, err = s.Stat(t.Context(), "none")
	expectClass(t, err, backend.NotFound)
	_, err = s.Put(t.Context(), "k", []byte("3"), backend.Cond{Match: second, Absent: true})
	expectClass(t, err, backend.Permanent)
	if err := s.Delete(t.Context(), "k"); err != nil {
		t.Fatal(err)
	}
	_, err = s.Put(t.Context(), "k", []byte("3"), backend.Cond{Match: second})
	expectClass(t, err, backend.Precondition, backend.NotFound)
}

// race runs f in n goroutines at once and returns their errors.
func race(n int, f func(i int) error) []error {
	errs, start, done := make([]error, n), make(chan struct{}), make(chan struct{})
	for i := range n {
		go func() {
			<-start
			errs[i] = f(i)
			done <- struct{}{}
		}()
	}
	close(start)
	for range n {
		<-done
	}
	return errs
}

func testAbsentRace(t *testing.T, s backend.Store) {
	ctx := t.Context()
	for round := range 3 {
		key := fmt.Sprintf("race/%d", round)
		errs := race(32, func(i int) error {
			for { // a store that is asked too much at once may say neither yes nor no
				_, err := s.Put(ctx, key, []byte(fmt.Sprint(i)), backend.Cond{Absent: true})
				if c := backend.ClassOf(err); c != backend.Transient && c != backend.Throttled {
					return err
				}
			}
		})
		winner := -1
		for i, err := range errs {
			switch {
			case err == nil && winner >= 0:
				t.Fatalf("%s: both %d and %d created it", key, winner, i)
			case err == nil:
				winner = i
			default:
				expectClass(t, err, backend.Precondition)
			}
		}
		if winner < 0 {
			t.Fatalf("%s: nobody created it", key)
		}
		expect(t, s, key, []byte(fmt.Sprint(winner)))
	}
}

// testCounter lets 8 writers count one object up 10 times each. Each adds its own letter, so that a
// lost update shows even if the sum should be right.
func testCounter(t *testing.T, s backend.Store) {
	const writers, times = 8, 10
	ctx := t.Context()
	put(t, s, "counter", nil, backend.Cond{Absent: true})
	errs := race(writers, func(i int) error {
		for done := 0; done < times; {
			body, etag, err := s.Get(ctx, "counter", 1000)
			if err != nil {
				return err
			}
			_, err = s.Put(ctx, "counter", append(body, byte('a'+i)), backend.Cond{Match: etag})
			switch backend.ClassOf(err) {
			case 0:
				done++
			case backend.Precondition:
			default:
				return err
			}
		}
		return nil
	})
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
	body, _, err := s.Get(ctx, "counter", 1000)
	if err != nil {
		t.Fatal(err)
	}
	for i := range writers {
		if n := bytes.Count(body, []byte{byte('a' + i)}); n != times {
			t.Errorf("writer %d was told of %d updates, %d are there", i, times, n)
		}
	}
}

// testWhole reads an object while it is replaced again and again: every read must see one whole version
// under that version's own etag.
func testWhole(t *testing.T, s backend.Store) {
	ctx := t.Context()
	body := func(v int) []byte { return bytes.Repeat([]byte{byte(v)}, 200_000-v) }
	put(t, s, "k", body(0), backend.Cond{})
	stop := make(chan struct{})
	errs := race(4, func(i int) error {
		if i == 0 {
			defer close(stop)
			for v := range 20 {
				if _, err := s.Put(ctx, "k", body(v), backend.Cond{}); err != nil {
					return err
				}
			}
			return nil
		}
		seen := map[string]int{}
		for {
			got, etag, err := s.Get(ctx, "k", 200_000)
			if err != nil {
				return err
			}
			v := 200_000 - len(got)
			if !bytes.Equal(got, body(v)) {
				return fmt.Errorf("a mixture of versions, %d bytes", len(got))
			}
			if before, ok := seen[etag]; ok && before != v {
				return fmt.Errorf("etag %s names versions %d and %d", etag, before, v)
			}
			seen[etag] = v
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

func testBadKeys(t *testing.T, s backend.Store) {
	ctx := t.Context()
	for _, key := range []string{
		"", "/", "/abs", "a/", "a//b", ".", "..", "../up", "a/../b", "a/./b", ".tmp/x", "a/.tmp/x", "sp ace", "a\\b",
		"ü", "nul\x00", "a\nb", "a?b", "a%2fb", strings.Repeat("x", 256), strings.Repeat("x/", 256) + "x",
	} {
		_, err := s.Put(ctx, key, []byte("x"), backend.Cond{})
		expectClass(t, err, backend.Permanent)
		_, _, err = s.Get(ctx, key, 10)
		expectClass(t, err, backend.Permanent)
		expectClass(t, s.ReadAt(ctx, key, make([]byte, 1), 0), backend.Permanent)
		_, err = s.Stat(ctx, key)
		expectClass(t, err, backend.Permanent)
		expectClass(t, s.Delete(ctx, key), backend.Permanent)
	}
	for _, prefix := range []string{"/", ".", "..", "../", "a/../", "a//", "sp ace", ".tmp/"} {
		_, _, err := s.List(ctx, prefix, "", 10)
		expectClass(t, err, backend.Permanent)
	}
	for _, max := range []int{-1, 0, 1001} {
		_, _, err := s.List(ctx, "", "", max)
		expectClass(t, err, backend.Permanent)
	}
	expectKeys(t, s, "", "", 10, false)
}

func testLongKey(t *testing.T, s backend.Store) {
	key := strings.Repeat("x", 255) + "/" + strings.Repeat("-", 100) + "/" + strings.Repeat("y", 155)
	put(t, s, key, []byte("x"), backend.Cond{Absent: true})
	expect(t, s, key, []byte("x"))
	expectKeys(t, s, key, "", 10, false, key)
}

func testBuffers(t *testing.T, s backend.Store) {
	want := Body(3, 5000)
	body := bytes.Clone(want)
	put(t, s, "k", body, backend.Cond{})
	clear(body)
	expect(t, s, "k", want)
	got, _, err := s.Get(t.Context(), "k", 5000)
	if err != nil {
		t.Fatal(err)
	}
	clear(got) // belongs to the caller
	expect(t, s, "k", want)
}

func testContext(t *testing.T, s backend.Store) {
	put(t, s, "k", []byte("before"), backend.Cond{})
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := s.Put(ctx, "k", []byte("after"), backend.Cond{})
	expectClass(t, err, backend.Transient)
	if !errors.Is(err, context.Canceled) {
		t.Errorf("%v does not say that the context was cancelled", err)
	}
	_, _, err = s.Get(ctx, "k", 10)
	expectClass(t, err, backend.Transient)
	expectClass(t, s.ReadAt(ctx, "k", make([]byte, 1), 0), backend.Transient)
	_, err = s.Stat(ctx, "k")
	expectClass(t, err, backend.Transient)
	expectClass(t, s.Delete(ctx, "k"), backend.Transient)
	_, _, err = s.List(ctx, "", "", 10)
	expectClass(t, err, backend.Transient)
	expect(t, s, "k", []byte("before"))
}

func testString(t *testing.T, s backend.Store) {
	if s.String() == "" {
		t.Error("no name")
	}
	_, err := s.Stat(t.Context(), "nothing")
	if !strings.Contains(fmt.Sprint(err), s.String()) || !strings.Contains(fmt.Sprint(err), "nothing") {
		t.Errorf("%q names not the store and the key", err)
	}
}
