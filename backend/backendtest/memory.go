// Package backendtest holds what tests of and above the back ends need: Run, the conformance suite
// that every driver passes; Memory, a Store in memory; Faulty, a Store around another one whose
// calls fail by plan; and Slow, one whose calls take time. The real servers for tests are in miniotest and
// azuritetest. What may befall a call:
//
//	error on the i-th call   Inject(op, i, Refused or Throttled)     lost reply after effect   LostReply
//	delay, bandwidth         Delayed, Slow                           duplicate delivery        Twice
//	reset mid-body           Reset                                   412 after success         Echo
//	truncated body           Truncated                               stale list                Memory.SetListLag
//	flipped bit              Flipped                                 effect after the error    Late
//
// Nothing here but Slow sleeps or reads the clock. Given the same seed and the same order of calls, Memory and
// Faulty do the same again.
package backendtest

import (
	"bytes"
	"context"
	"fmt"
	"iter"
	"maps"
	"math"
	"slices"
	"strings"
	"sync"

	"graindisk/backend"
)

// Memory is a Store in memory. By default it does all that the contract asks; SetWeakCAS, SetListLag
// and SetQuota take that back in the ways of real stores. Safe for concurrent use.
type Memory struct {
	name string

	mu      sync.Mutex
	objects map[string]object
	folders map[string]int    // how many keys lie below a folder
	gone    map[string]object // deleted, but a lagging List still shows them
	clock   int64             // successful changes so far; also the next ETag
	weakCAS bool
	lag     int64 // changes
	quota   int64 // bytes, 0 for none
	used    int64 // bytes
}

type object struct {
	body    []byte
	etag    string
	created int64 // the clock when the key came into being
	deleted int64 // the clock when it was deleted, in gone
}

var (
	_ backend.Store        = (*Memory)(nil)
	_ backend.BatchDeleter = (*Memory)(nil)
	_ backend.Copier       = (*Memory)(nil)
)

// NewMemory returns an empty store. The name is what String says, to tell several ones apart.
func NewMemory(name string) *Memory {
	return &Memory{
		name: name, objects: make(map[string]object), folders: make(map[string]int), gone: make(map[string]object),
	}
}

// String is the name given to NewMemory.
func (m *Memory) String() string { return m.name }

// SetWeakCAS makes the store ignore the conditions of puts, as some S3 servers do.
func (m *Memory) SetWeakCAS(on bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.weakCAS = on
}

// SetListLag makes List show keys as they were so many changes of the store ago; 0 is the present.
func (m *Memory) SetListLag(changes int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.lag = int64(changes)
	clear(m.gone)
}

// SetQuota makes puts fail as Full when the bodies stored would pass bytes; 0 takes the quota away.
func (m *Memory) SetQuota(bytes int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.quota = bytes
}

// Objects returns a copy of everything stored, by key.
func (m *Memory) Objects() map[string][]byte {
	m.mu.Lock()
	defer m.mu.Unlock()
	all := make(map[string][]byte, len(m.objects))
	for key, o := range m.objects {
		all[key] = bytes.Clone(o.body)
	}
	return all
}

// Keys returns the keys of everything stored, sorted.
func (m *Memory) Keys() []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Sorted(maps.Keys(m.objects))
}

// Damage replaces the body of the object under key by what f makes of a copy of it, behind the
// back of everyone: the ETag stays. It returns false if there is no such object.
func (m *Memory) Damage(key string, f func(body []byte) []byte) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	o, ok := m.objects[key]
	if ok {
		m.used -= int64(len(o.body))
		o.body = bytes.Clone(f(bytes.Clone(o.body)))
		m.used += int64(len(o.body))
		m.objects[key] = o
	}
	return ok
}

// Wipe removes everything, as an operator or a provider may.
func (m *Memory) Wipe() {
	m.mu.Lock()
	defer m.mu.Unlock()
	clear(m.objects)
	clear(m.folders)
	clear(m.gone)
	m.used = 0
}

// Clone returns an independent copy of the store as it is now.
func (m *Memory) Clone() *Memory {
	m.mu.Lock()
	defer m.mu.Unlock()
	return &Memory{
		name: m.name, objects: maps.Clone(m.objects), // bodies never change in place
		folders: maps.Clone(m.folders), gone: maps.Clone(m.gone),
		clock: m.clock, weakCAS: m.weakCAS, lag: m.lag, quota: m.quota, used: m.used,
	}
}

// Put implements backend.Store.
func (m *Memory) Put(ctx context.Context, key string, body []byte, c backend.Cond) (string, error) {
	if err := m.begin(ctx, "put", key); err != nil {
		return "", err
	}
	if c.Absent && c.Match != "" {
		return "", m.fail("put", key, backend.Permanent, fmt.Errorf("both absent and matching"))
	}
	body = bytes.Clone(body)
	m.mu.Lock()
	defer m.mu.Unlock()
	old, exists := m.objects[key]
	if !m.weakCAS && (c.Absent && exists || c.Match != "" && (!exists || c.Match != old.etag)) {
		return "", m.fail("put", key, backend.Precondition, nil)
	}
	if m.hasNeighbourLocked(key) {
		return "", m.fail("put", key, backend.Permanent, fmt.Errorf("a key may not be the folder of another"))
	}
	used := m.used + int64(len(body)) - int64(len(old.body))
	if m.quota > 0 && used > m.quota {
		return "", m.fail("put", key, backend.Full, nil)
	}
	m.used = used
	m.clock++
	o := object{body: body, etag: fmt.Sprintf("\"%x\"", m.clock), created: m.clock}
	if exists {
		o.created = old.created
	} else {
		m.countLocked(key, 1)
	}
	m.objects[key] = o
	return o.etag, nil
}

// hasNeighbourLocked says whether key lies in a folder that is an object, or is itself a folder.
func (m *Memory) hasNeighbourLocked(key string) bool {
	for folder := range above(key) {
		if _, ok := m.objects[folder]; ok {
			return true
		}
	}
	return m.folders[key] > 0
}

// countLocked counts a key in (n = 1) or out (n = -1) of the folders above it.
func (m *Memory) countLocked(key string, n int) {
	for folder := range above(key) {
		m.folders[folder] += n
		if m.folders[folder] == 0 {
			delete(m.folders, folder)
		}
	}
}

// above gives the folders a key lies in.
func above(key string) iter.Seq[string] {
	return func(yield func(string) bool) {
		for i := range len(key) {
			if key[i] == '/' && !yield(key[:i]) {
				return
			}
		}
	}
}

// Get implements backend.Store.
func (m *Memory) Get(ctx context.Context, key string, max int64) ([]byte, string, error) {
	o, err := m.find(ctx, "get", key)
	if err != nil {
		return nil, "", err
	}
	if int64(len(o.body)) > max {
		return nil, "", m.fail("get", key, backend.Permanent,
			fmt.Errorf("it has %d bytes, at most %d were expected", len(o.body), max))
	}
	return append(make([]byte, 0, len(o.body)), o.body...), o.etag, nil
}

// ReadAt implements backend.Store.
func (m *Memory) ReadAt(ctx context.Context, key string, p []byte, off int64) error {
	if err := m.begin(ctx, "read", key); err != nil {
		return err
	}
	if off < 0 || off > math.MaxInt64-int64(len(p)) {
		return m.fail("read", key, backend.Permanent, fmt.Errorf("offset %d", off))
	}
	if len(p) == 0 {
		return nil
	}
	o, err := m.find(ctx, "read", key)
	if err != nil {
		return err
	}
	if off+int64(len(p)) > int64(len(o.body)) {
		return m.fail("read", key, backend.Short, nil)
	}
	copy(p, o.body[off:])
	return nil
}

// Stat implements backend.Store. Modified stays zero: there is no clock here.
func (m *Memory) Stat(ctx context.Context, key string) (backend.Info, error) {
	o, err := m.find(ctx, "stat", key)
	if err != nil {
		return backend.Info{}, err
	}
	return o.info(key), nil
}

// Delete implements backend.Store.
func (m *Memory) Delete(ctx context.Context, key string) error {
	if err := m.begin(ctx, "delete", key); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if o, ok := m.objects[key]; ok {
		m.clock++
		m.used -= int64(len(o.body))
		delete(m.objects, key)
		m.countLocked(key, -1)
		if m.lag > 0 {
			o.deleted = m.clock
			m.gone[key] = o
			maps.DeleteFunc(m.gone, func(_ string, o object) bool { return o.deleted <= m.clock-m.lag })
		}
	}
	return nil
}

// List implements backend.Store.
func (m *Memory) List(ctx context.Context, prefix, after string, max int) ([]backend.Info, bool, error) {
	if err := backend.CheckList(prefix, max); err != nil {
		return nil, false, m.fail("list", prefix, backend.Permanent, err)
	}
	if err := ctx.Err(); err != nil {
		return nil, false, m.fail("list", prefix, backend.Transient, err)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	var found []backend.Info
	for key, o := range m.listedLocked() {
		if strings.HasPrefix(key, prefix) && key > after {
			found = append(found, o.info(key))
		}
	}
	slices.SortFunc(found, func(a, b backend.Info) int { return strings.Compare(a.Key, b.Key) })
	more := len(found) > max
	return found[:min(len(found), max)], more, nil
}

// listedLocked is what List has to show, given its lag.
func (m *Memory) listedLocked() map[string]object {
	if m.lag == 0 {
		return m.objects
	}
	seen := make(map[string]object, len(m.objects))
	for key, o := range m.gone {
		if o.deleted > m.clock-m.lag && o.created <= m.clock-m.lag {
			seen[key] = o
		}
	}
	for key, o := range m.objects {
		if o.created <= m.clock-m.lag {
			seen[key] = o
		}
	}
	return seen
}

func (m *Memory) begin(ctx context.Context, op, key string) error {
	if err := backend.CheckKey(key); err != nil {
		return m.fail(op, key, backend.Permanent, err)
	}
	if err := ctx.Err(); err != nil {
		return m.fail(op, key, backend.Transient, err)
	}
	return nil
}

func (m *Memory) find(ctx context.Context, op, key string) (object, error) {
	if err := m.begin(ctx, op, key); err != nil {
		return object{}, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	o, ok := m.objects[key]
	if !ok {
		return object{}, m.fail(op, key, backend.NotFound, nil)
	}
	return o, nil
}

func (m *Memory) fail(op, key string, class backend.Class, cause error) error {
	return &backend.Error{Op: op, Store: m.name, Key: key, Class: class, Err: cause}
}

func (o object) info(key string) backend.Info {
	return backend.Info{Key: key, Size: int64(len(o.body)), ETag: o.etag}
}
