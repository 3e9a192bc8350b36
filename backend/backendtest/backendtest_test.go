package backendtest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"math/bits"
	"testing"

	"graindisk/backend"
)

func TestMemoryConforms(t *testing.T) {
	Run(t, func(t *testing.T) backend.Store { return NewMemory("memory") })
}

func TestFaultyWithoutFaultsConforms(t *testing.T) {
	Run(t, func(t *testing.T) backend.Store { return NewFaulty(NewMemory("memory"), 1) })
}

func TestMemoryWithWeakCASIgnoresConditions(t *testing.T) {
	m := NewMemory("memory")
	m.SetWeakCAS(true)
	put(t, m, "k", []byte("1"), backend.Cond{Match: "never"})
	put(t, m, "k", []byte("2"), backend.Cond{Absent: true})
	expect(t, m, "k", []byte("2"))
}

func TestMemoryListLags(t *testing.T) {
	m := NewMemory("memory")
	put(t, m, "a", nil, backend.Cond{})
	m.SetListLag(2)
	put(t, m, "b", nil, backend.Cond{})
	expectKeys(t, m, "", "", 10, false)
	put(t, m, "c", nil, backend.Cond{})
	expectKeys(t, m, "", "", 10, false, "a")
	if err := m.Delete(t.Context(), "a"); err != nil {
		t.Fatal(err)
	}
	expectKeys(t, m, "", "", 10, false, "a", "b") // deleted and still seen
	put(t, m, "d", nil, backend.Cond{})
	put(t, m, "e", nil, backend.Cond{})
	expectKeys(t, m, "", "", 10, false, "b", "c")
	m.SetListLag(0)
	expectKeys(t, m, "", "", 10, false, "b", "c", "d", "e")
}

func TestMemoryQuota(t *testing.T) {
	m := NewMemory("memory")
	m.SetQuota(100)
	put(t, m, "a", make([]byte, 60), backend.Cond{})
	_, err := m.Put(t.Context(), "b", make([]byte, 41), backend.Cond{})
	if expectClass(t, err, backend.Full); !errors.Is(err, backend.ErrFull) {
		t.Errorf("%v is not ErrFull", err)
	}
	put(t, m, "a", make([]byte, 100), backend.Cond{}) // in place of the old one
	if err := m.Delete(t.Context(), "a"); err != nil {
		t.Fatal(err)
	}
	put(t, m, "b", make([]byte, 100), backend.Cond{})
}

func TestMemoryDamageCloneAndWipe(t *testing.T) {
	m := NewMemory("memory")
	put(t, m, "a/k", []byte("body"), backend.Cond{})
	c := m.Clone()
	m.Damage("a/k", func(b []byte) []byte { return append(b[:2], "xx..."...) })
	expect(t, m, "a/k", []byte("boxx..."))
	expect(t, c, "a/k", []byte("body"))
	if m.Damage("none", func(b []byte) []byte { return b }) {
		t.Error("damaged what is not there")
	}
	m.Wipe()
	if len(m.Objects()) != 0 || len(c.Objects()) != 1 {
		t.Errorf("after the wipe: %v; the clone: %v", m.Objects(), c.Objects())
	}
	put(t, m, "a", nil, backend.Cond{}) // no longer a folder
	if _, err := c.Put(t.Context(), "a", nil, backend.Cond{}); backend.ClassOf(err) != backend.Permanent {
		t.Errorf("put over a folder: %v", err)
	}
	if _, err := m.Put(t.Context(), "a/k", nil, backend.Cond{}); backend.ClassOf(err) != backend.Permanent {
		t.Errorf("put below an object: %v", err)
	}
}

func TestFaultBeforeAndAfterTheEffect(t *testing.T) {
	for _, c := range []struct {
		fault Fault
		class backend.Class
		there bool
	}{
		{Refused, backend.Transient, false},
		{Throttled, backend.Throttled, false},
		{LostReply, backend.Transient, true},
		{Late, backend.Transient, false},
		{Echo, backend.Precondition, true},
	} {
		m := NewMemory("memory")
		f := NewFaulty(m, 1)
		f.Inject("put", 2, c.fault)
		put(t, f, "first", nil, backend.Cond{})
		_, err := f.Put(t.Context(), "k", []byte("body"), backend.Cond{Absent: true})
		if expectClass(t, err, c.class); !errors.Is(err, ErrInjected) {
			t.Errorf("%v is not ErrInjected", err)
		}
		if _, there := m.Objects()["k"]; there != c.there {
			t.Errorf("%v: the object is there: %v", c.fault, there)
		}
		put(t, f, "last", nil, backend.Cond{})
		if got := f.Injected(); !maps.Equal(got, map[Fault]int{c.fault: 1}) {
			t.Errorf("injected %v", got)
		}
		if got := f.Counts(); !maps.Equal(got, map[string]int{"put": 3}) {
			t.Errorf("counts %v", got)
		}
	}
}

func TestLateCallsTakeEffectWithinTheirBound(t *testing.T) {
	for seed := range uint64(20) {
		m := NewMemory("memory")
		f := NewFaulty(m, seed)
		f.Inject("put", 1, Late)
		body := []byte("late")
		if _, err := f.Put(t.Context(), "k", body, backend.Cond{Absent: true}); err == nil {
			t.Fatal("no error")
		}
		clear(body)
		for range lateMax {
			_, _ = f.Stat(t.Context(), "other")
		}
		if got := m.Objects()["k"]; string(got) != "late" {
			t.Errorf("seed %d: after %d calls: %q", seed, lateMax, got)
		}
	}
	m := NewMemory("memory")
	f := NewFaulty(m, 1)
	put(t, f, "k", []byte("body"), backend.Cond{})
	f.Inject("delete", 1, Late)
	if err := f.Delete(t.Context(), "k"); err == nil {
		t.Fatal("no error")
	}
	if f.Settle(); len(m.Objects()) != 0 {
		t.Error("settled, and the delete has not happened")
	}
}

// TestTwiceArrivesAgain has a put arrive after what it stored was deleted, and one that must not.
func TestTwiceArrivesAgain(t *testing.T) {
	m := NewMemory("memory")
	f := NewFaulty(m, 1)
	f.Inject("put", 1, Twice)
	put(t, f, "k", []byte("one"), backend.Cond{Absent: true})
	if err := m.Delete(t.Context(), "k"); err != nil {
		t.Fatal(err)
	}
	f.Settle()
	expect(t, f, "k", []byte("one"))
	f.Inject("put", 1, Twice)
	etag := put(t, f, "k", []byte("two"), backend.Cond{})
	put(t, m, "k", []byte("three"), backend.Cond{Match: etag})
	f.Settle()
	expect(t, f, "k", []byte("two"))
	f.Inject("put", 1, Echo) // has no condition to be refused by
	put(t, f, "k", []byte("four"), backend.Cond{})
	if n := f.Injected()[Echo]; n != 0 {
		t.Errorf("%d echoes", n)
	}
}

// TestHurtOnce has every answer hurt that may be, and expects the second one of each object to be right.
func TestHurtOnce(t *testing.T) {
	for _, fault := range []Fault{Flipped, Truncated} {
		f := NewFaulty(NewMemory("memory"), 1)
		f.HurtOnce()
		for _, key := range []string{"a", "b"} {
			put(t, f, key, Body(1, 100), backend.Cond{})
		}
		f.SetRates(Rates{fault: 1})
		for _, key := range []string{"a", "b"} {
			for i, p := 0, make([]byte, 50); i < 3; i++ {
				err := f.ReadAt(t.Context(), key, p, 50)
				if good := err == nil && distance(p, Body(1, 100)[50:]) == 0; good != (i > 0) {
					t.Errorf("%v: read %d of %s is right: %v", fault, i, key, good)
				}
			}
			if b, _, err := f.Get(t.Context(), key, 100); err != nil || distance(b, Body(1, 100)) != 0 {
				t.Errorf("%v: %s comes back wrong: %v", fault, key, err)
			}
		}
	}
}

func TestDamagedReads(t *testing.T) {
	want := Body(1, 1000)
	for seed := range uint64(50) {
		f := NewFaulty(NewMemory("memory"), seed)
		put(t, f, "k", want, backend.Cond{})

		f.Inject("get", 1, Flipped)
		got, _, err := f.Get(t.Context(), "k", 1000)
		if err != nil || distance(got, want) != 1 {
			t.Errorf("seed %d: a flipped get: %d bits differ, %v", seed, distance(got, want), err)
		}
		f.Inject("get", 1, Truncated)
		got, _, err = f.Get(t.Context(), "k", 1000)
		if err != nil || len(got) >= len(want) || !bytes.HasPrefix(want, got) {
			t.Errorf("seed %d: a truncated get: %d bytes, %v", seed, len(got), err)
		}
		f.Inject("read", 1, Flipped)
		p := make([]byte, 500)
		if err := f.ReadAt(t.Context(), "k", p, 500); err != nil || distance(p, want[500:]) != 1 {
			t.Errorf("seed %d: a flipped read: %d bits differ, %v", seed, distance(p, want[500:]), err)
		}
		f.Inject("read", 1, Truncated)
		expectClass(t, f.ReadAt(t.Context(), "k", p, 500), backend.Short)
		f.Inject("read", 1, Reset)
		expectClass(t, f.ReadAt(t.Context(), "k", p, 500), backend.Transient)
		f.Inject("get", 1, Reset)
		_, _, err = f.Get(t.Context(), "k", 1000)
		expectClass(t, err, backend.Transient)
		expect(t, f, "k", want) // the store itself is sound
	}
}

// distance is the number of bits that differ, -1 if the lengths do.
func distance(a, b []byte) int {
	if len(a) != len(b) {
		return -1
	}
	n := 0
	for i := range a {
		n += bits.OnesCount8(a[i] ^ b[i])
	}
	return n
}

func TestOffline(t *testing.T) {
	m := NewMemory("memory")
	f := NewFaulty(m, 1)
	put(t, f, "k", []byte("body"), backend.Cond{})
	f.SetOffline(true)
	_, err := f.Put(t.Context(), "k2", nil, backend.Cond{})
	expectClass(t, err, backend.Transient)
	_, _, err = f.Get(t.Context(), "k", 10)
	expectClass(t, err, backend.Transient)
	expectClass(t, f.ReadAt(t.Context(), "k", make([]byte, 1), 0), backend.Transient)
	_, err = f.Stat(t.Context(), "k")
	expectClass(t, err, backend.Transient)
	expectClass(t, f.Delete(t.Context(), "k"), backend.Transient)
	_, _, err = f.List(t.Context(), "", "", 10)
	expectClass(t, err, backend.Transient)
	f.SetOffline(false)
	expectKeys(t, f, "", "", 10, false, "k")
}

func TestHooks(t *testing.T) {
	f := NewFaulty(NewMemory("memory"), 1)
	stop := errors.New("stop")
	var calls []string
	f.Before = func(op, key string) error {
		calls = append(calls, op+" "+key)
		if key == "forbidden" {
			return stop
		}
		return nil
	}
	f.Delay = func(_ context.Context, op, key string) error {
		calls = append(calls, "delay "+op)
		return nil
	}
	f.Inject("", 2, Delayed)
	put(t, f, "k", nil, backend.Cond{})
	expect(t, f, "k", nil)
	if err := f.Delete(t.Context(), "forbidden"); !errors.Is(err, stop) {
		t.Errorf("delete gives %v", err)
	}
	if got, want := fmt.Sprint(calls), "[put k get k delay get delete forbidden]"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	if got := f.Counts(); !maps.Equal(got, map[string]int{"put": 1, "get": 1}) {
		t.Errorf("counts %v", got)
	}
}

// TestSameSeedSameFaults makes the same calls twice for each seed.
func TestSameSeedSameFaults(t *testing.T) {
	run := func(seed uint64) (trace string, injected map[Fault]int) {
		m := NewMemory("memory")
		f := NewFaulty(m, seed)
		f.SetRates(Rates{Refused: .1, Throttled: .1, LostReply: .1, Late: .1, Delayed: .1, Truncated: .05, Flipped: .05,
			Reset: .05, Twice: .05, Echo: .05})
		for i := range 300 {
			key := fmt.Sprintf("k%d", i%7)
			_, err := f.Put(t.Context(), key, Body(uint64(i), 100), backend.Cond{Absent: i%3 == 0})
			body, _, err2 := f.Get(t.Context(), key, 100)
			err3 := f.Delete(t.Context(), fmt.Sprintf("k%d", i%5))
			trace += fmt.Sprintln(err, body, err2, err3)
		}
		f.Settle()
		return trace + fmt.Sprint(m.Objects()), f.Injected()
	}
	seen := map[string]bool{}
	for seed := range uint64(3) {
		trace, injected := run(seed)
		again, _ := run(seed)
		if trace != again {
			t.Errorf("seed %d: another course the second time", seed)
		}
		if len(injected) != int(faults)-1 {
			t.Errorf("seed %d: only %v", seed, injected)
		}
		seen[trace] = true
	}
	if len(seen) != 3 {
		t.Errorf("3 seeds give %d courses", len(seen))
	}
}

// TestFaultyBatches deletes four objects by a batch with each of the faults, and says what may be left.
func TestFaultyBatches(t *testing.T) {
	keys := []string{"a", "b", "c", "d"}
	for fault, left := range map[Fault]func(n int) bool{
		None:      func(n int) bool { return n == 0 },
		Refused:   func(n int) bool { return n > 0 }, // a first part may be gone
		Throttled: func(n int) bool { return n > 0 },
		LostReply: func(n int) bool { return n == 0 },
		Late:      func(n int) bool { return n == 4 },
	} {
		partly := false
		for seed := range uint64(20) {
			m := NewMemory("memory")
			f := NewFaulty(m, seed)
			for _, key := range keys {
				put(t, m, key, nil, backend.Cond{})
			}
			f.Inject("delete", 1, fault)
			errs := backend.DeleteMany(t.Context(), f, keys)
			there := m.Objects()
			if !left(len(there)) || (errs == nil) != (fault == None) {
				t.Fatalf("%v, seed %d: %d are left, %v", fault, seed, len(there), errs)
			}
			partly = partly || len(there) < len(keys)
			for i, err := range errs {
				if _, ok := there[keys[i]]; err == nil && ok {
					t.Errorf("%v, seed %d: %s is said to be gone", fault, seed, keys[i])
				}
				if err != nil && !errors.Is(err, ErrInjected) {
					t.Errorf("%v is not ErrInjected", err)
				}
			}
			if f.Settle(); fault == Late && len(m.Objects()) != 0 {
				t.Error("settled, and nothing is deleted")
			}
		}
		if partly != (fault != Late) {
			t.Errorf("%v: parts were deleted: %v", fault, partly)
		}
	}
}

func TestFaultyCopies(t *testing.T) {
	for fault, there := range map[Fault]bool{None: true, Refused: false, LostReply: true} {
		m := NewMemory("memory")
		f := NewFaulty(m, 1)
		put(t, f, "from", []byte("body"), backend.Cond{})
		f.Inject("copy", 1, fault)
		_, err := backend.Copy(t.Context(), f, "to", f, "from", 10, backend.Cond{Absent: true})
		if (err == nil) != (fault == None) || err != nil && !errors.Is(err, ErrInjected) {
			t.Errorf("%v: %v", fault, err)
		}
		if _, ok := m.Objects()["to"]; ok != there {
			t.Errorf("%v: it is there: %v", fault, ok)
		}
	}
}

// TestManyObjectsOnABusyServer loses replies and requests of the suite's own puts.
func TestManyObjectsOnABusyServer(t *testing.T) {
	f := NewFaulty(NewMemory("memory"), 1)
	for n := range 20 {
		f.Inject("put", 1+100*n, []Fault{LostReply, Refused}[n%2])
	}
	testMany(t, f)
	if got := f.Injected(); got[LostReply] != 10 || got[Refused] != 10 {
		t.Errorf("injected %v", got)
	}
}
