package probe

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"graindisk/backend"
	"graindisk/backend/backendtest"
)

// flawed is a store that breaks one promise.
type flawed struct {
	*backendtest.Memory
	flaw string

	mu   sync.Mutex
	gone map[string]bool // "forgets": what was asked for before it was there
	puts int

	racing atomic.Int32 // "decides before it writes": puts that have passed their condition
}

func (f *flawed) Put(ctx context.Context, key string, body []byte, c backend.Cond) (string, error) {
	switch f.flaw {
	case "ignores absent":
		c.Absent = false
	case "ignores match":
		c.Match = ""
	case "answers 200 and drops all":
		return f.lie(ctx, key)
	case "answers 200 and drops what has a condition":
		if c != (backend.Cond{}) {
			return f.lie(ctx, key)
		}
	case "answers 200 and drops what matches":
		if c.Match != "" {
			return f.lie(ctx, key)
		}
	case "answers 200 and drops some":
		f.mu.Lock()
		f.puts++
		drop := f.puts%5 == 0
		f.mu.Unlock()
		if drop {
			return f.lie(ctx, key)
		}
	case "answers 200 to what does not match":
		etag, err := f.Memory.Put(ctx, key, body, c)
		if errors.Is(err, backend.ErrPrecondition) {
			return f.lie(ctx, key)
		}
		return etag, err
	case "matches nothing":
		if _, err := f.Memory.Stat(ctx, key); errors.Is(err, backend.ErrNotFound) {
			c.Match = ""
		}
	case "decides before it writes":
		return f.late(ctx, key, body, c)
	case "no etags":
		_, err := f.Memory.Put(ctx, key, body, c)
		return "", err
	case "refuses absent":
		if c.Absent {
			return "", &backend.Error{Op: "put", Store: "m", Key: key, Class: backend.Permanent}
		}
	case "read only":
		return "", &backend.Error{Op: "put", Store: "m", Key: key, Class: backend.Auth}
	}
	return f.Memory.Put(ctx, key, body, c)
}

// lie answers a put that was not made as if it was.
func (f *flawed) lie(ctx context.Context, key string) (string, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.puts++
	if i, err := f.Memory.Stat(ctx, key); err == nil && f.flaw == "answers 200 and drops what matches" {
		return i.ETag, nil // consistent in its lies
	}
	return fmt.Sprintf("lie-%d", f.puts), nil
}

// late looks whether the condition holds, lets others do the same, and writes without it.
func (f *flawed) late(ctx context.Context, key string, body []byte, c backend.Cond) (string, error) {
	i, err := f.Memory.Stat(ctx, key)
	missing := errors.Is(err, backend.ErrNotFound)
	if err != nil && !missing {
		return "", err
	}
	if c.Absent && !missing || c.Match != "" && (missing || c.Match != i.ETag) {
		return "", &backend.Error{Op: "put", Store: "m", Key: key, Class: backend.Precondition}
	}
	f.racing.Add(1)
	for wait := 0; wait < 100 && f.racing.Load() < 2; wait++ {
		runtime.Gosched()
	}
	defer f.racing.Add(-1)
	return f.Memory.Put(ctx, key, body, backend.Cond{})
}

func (f *flawed) Stat(ctx context.Context, key string) (backend.Info, error) {
	i, err := f.Memory.Stat(ctx, key)
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.flaw == "remembers deletes" && strings.HasSuffix(key, "/delete") {
		return backend.Info{Key: key}, nil
	}
	if f.flaw == "forgets" && err != nil {
		f.gone[key] = true
	}
	return i, err
}

func (f *flawed) Get(ctx context.Context, key string, max int64) ([]byte, string, error) {
	f.mu.Lock()
	gone := f.gone[key]
	f.mu.Unlock()
	if gone {
		return nil, "", &backend.Error{Op: "get", Store: "m", Key: key, Class: backend.NotFound}
	}
	return f.Memory.Get(ctx, key, max)
}

func (f *flawed) ReadAt(ctx context.Context, key string, p []byte, off int64) error {
	if f.flaw == "short ranges" && off > 0 {
		clear(p)
		return nil
	}
	return f.Memory.ReadAt(ctx, key, p, off)
}

func (f *flawed) List(ctx context.Context, prefix, after string, max int) ([]backend.Info, bool, error) {
	objs, more, err := f.Memory.List(ctx, prefix, after, max)
	if f.flaw == "lists late" && len(objs) > 0 && !more {
		objs = objs[:len(objs)-1]
	}
	return objs, more, err
}

func (f *flawed) Inspect(context.Context) ([]backend.Finding, error) {
	if f.flaw == "expires" {
		return []backend.Finding{{Name: "lifecycle", Dangerous: true, Text: "objects are deleted after 30 days"}}, nil
	}
	return nil, nil
}

// TestFlawsAreFound gives stores that break one promise each, and expects the check that must notice.
func TestFlawsAreFound(t *testing.T) {
	for flaw, check := range map[string]string{
		"":               "",
		"ignores absent": "put if absent",
		"refuses absent": "put if absent",
		"ignores match":  "put if match",

		"answers 200 and drops all":                  "read after write",
		"answers 200 and drops some":                 "read after write",
		"answers 200 and drops what has a condition": "put if absent",
		"answers 200 and drops what matches":         "put if match",
		"answers 200 to what does not match":         "put if match",
		"matches nothing":                            "put if match",
		"decides before it writes":                   "racing puts if match",
		"no etags":                                   "overwrite",
		"forgets":                                    "read after write",
		"short ranges":                               "ranged reads",
		"lists late":                                 "list after write, in order",
		"remembers deletes":                          "delete",
	} {
		m := backendtest.NewMemory("m")
		r, err := Run(t.Context(), &flawed{Memory: m, flaw: flaw, gone: map[string]bool{}})
		if err != nil {
			t.Fatal(err)
		}
		result := map[string]string{}
		for _, c := range r.Checks {
			result[c.Name] = c.Result
		}
		if flaw == "" {
			for name, res := range result {
				if res != OK {
					t.Errorf("a good store: %s is %s", name, res)
				}
			}
		} else if result[check] != Missing {
			t.Errorf("a store that %s: %v", flaw, r.Checks)
		}
		if r.Usable() != (flaw == "") || (r.Err() == nil) != (flaw == "") {
			t.Errorf("a store that %s: usable %v", flaw, r.Usable())
		}
		if flaw != "" && (!strings.Contains(r.Err().Error(), check+": ") || !strings.Contains(r.Err().Error(), "use ")) {
			t.Errorf("a store that %s: nobody is told what to do: %v", flaw, r.Err())
		}
		if c, err := Contract(t.Context(), &flawed{Memory: m, flaw: flaw, gone: map[string]bool{}}); err != nil || c.Usable() != (flaw == "") {
			t.Errorf("a store that %s: by its contract alone: %+v, %v", flaw, c, err)
		}
		if objs, _, err := m.List(t.Context(), "", "", 1000); err != nil || len(objs) > 0 {
			t.Errorf("%d objects are left, %v", len(objs), err)
		}
	}
}

func TestDangerIsReported(t *testing.T) {
	r, err := Run(t.Context(), &flawed{Memory: backendtest.NewMemory("m"), flaw: "expires"})
	if err != nil || !r.Usable() {
		t.Fatal(r, err)
	}
	if got := r.Checks[len(r.Checks)-1]; got != (Check{Name: "lifecycle", Result: Dangerous, Text: "objects are deleted after 30 days"}) {
		t.Errorf("last check %+v", got)
	}
}

func TestNoAccess(t *testing.T) {
	if _, err := Run(t.Context(), &flawed{Memory: backendtest.NewMemory("m"), flaw: "read only"}); backend.ClassOf(err) != backend.Auth {
		t.Errorf("%v", err)
	}
}
