package backendtest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"

	"graindisk/backend"
)

// Fault is one way for a call to go wrong.
type Fault uint8

// The faults. One that cannot befall a call's operation (a flipped bit in a Delete) leaves it alone.
const (
	None      Fault = iota
	Refused         // Transient, and nothing happened
	Throttled       // Throttled, and nothing happened
	LostReply       // Transient, though the call took effect
	Late            // put and delete: Transient, and the call takes effect some calls later, if it still can
	Delayed         // the Delay hook is called first
	Truncated       // get: part of the body and no error; read: Short
	Flipped         // get, read: one bit is wrong, and no error
	Reset           // get, read: Transient after part of the body has come
	Twice           // put and delete: it arrives once more, some calls later, and nobody hears of that
	Echo            // put with a condition: it takes effect, and the answer is that of a second one: Precondition
	faults          // how many there are
)

// String is the fault's name.
func (f Fault) String() string {
	names := [faults]string{
		"none", "refused", "throttled", "lost reply", "late", "delayed", "truncated", "flipped",
		"reset", "twice", "echo",
	}
	if f < faults {
		return names[f]
	}
	return fmt.Sprintf("fault %d", uint8(f))
}

// lateMax is how many calls later a Late one takes effect, at most, and the second of a Twice.
const lateMax = 8

// Rates are the probabilities of faults in each call, in [0, 1], together at most 1.
type Rates map[Fault]float64

// Faulty is a Store whose calls fail by plan: by Rates, by Inject for single calls, and all of them
// after SetOffline. Which calls fail depends on the seed and the order of the calls alone. Errors
// are of the contract's type; those of a fault match ErrInjected. Safe for concurrent use.
type Faulty struct {
	inner backend.Store

	// Before, if set, is called at the start of every call, and its error ends the call uncounted. Delay
	// is called for a Delayed fault, for example to wait for a channel or a fake clock. Both are set
	// before the first call.
	Before func(op, key string) error
	Delay  func(ctx context.Context, op, key string) error

	mu       sync.Mutex
	rng      *rand.Rand
	rates    Rates
	planned  []plan
	offline  bool
	late     []lateCall
	hurtOnce bool
	hurt     map[string]bool // keys whose bytes have arrived wrong
	calls    map[string]int
	injected map[Fault]int
}

type plan struct {
	op    string
	after int // matching calls to let pass
	fault Fault
}

type lateCall struct {
	after int // calls to let pass
	do    func()
}

// ErrInjected is in the chain of every error that a fault made.
var ErrInjected = errors.New("injected fault")

var (
	_ backend.Store        = (*Faulty)(nil)
	_ backend.BatchDeleter = (*Faulty)(nil)
	_ backend.Copier       = (*Faulty)(nil)
	_ backend.Wrapper      = (*Faulty)(nil)
)

// NewFaulty returns inner with no faults planned yet.
func NewFaulty(inner backend.Store, seed uint64) *Faulty {
	return &Faulty{
		inner: inner, rng: rand.New(rand.NewPCG(seed, 0)), hurt: make(map[string]bool),
		calls: make(map[string]int), injected: make(map[Fault]int),
	}
}

// SetRates sets the probabilities of faults from now on.
func (f *Faulty) SetRates(r Rates) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.rates = maps.Clone(r)
}

// HurtOnce has Rates spare what has arrived wrong once: Truncated and Flipped befall an object no more then.
func (f *Faulty) HurtOnce() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.hurtOnce = true
}

// Inject plans one fault for the n-th call of op from now on, 1 being the next. Op "" means all
// operations. The call counts as met even if the fault cannot befall it.
func (f *Faulty) Inject(op string, n int, fault Fault) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.planned = append(f.planned, plan{op: op, after: n - 1, fault: fault})
}

// SetOffline makes every call fail as Refused, or ends that. Late calls wait until it is over.
func (f *Faulty) SetOffline(off bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.offline = off
}

// Settle lets all late calls take effect now.
func (f *Faulty) Settle() {
	f.mu.Lock()
	due := f.late
	f.late = nil
	f.mu.Unlock()
	for _, l := range due {
		l.do()
	}
}

// Counts is how many calls of each operation were made, failed ones included.
func (f *Faulty) Counts() map[string]int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return maps.Clone(f.calls)
}

// Injected is how many faults of each kind befell a call.
func (f *Faulty) Injected() map[Fault]int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return maps.Clone(f.injected)
}

// Put implements backend.Store.
func (f *Faulty) Put(ctx context.Context, key string, body []byte, c backend.Cond) (etag string, err error) {
	later := func() func() {
		kept := bytes.Clone(body)
		return func() { _, _ = f.inner.Put(context.Background(), key, kept, c) } // nobody hears of it
	}
	r := request{op: "put", key: key, conditional: c != backend.Cond{}, later: later}
	hit, err := f.serve(ctx, r, func() (err error) {
		etag, err = f.inner.Put(ctx, key, body, c)
		return err
	})
	if err == nil && hit.fault == Echo {
		err = f.fail("put", key, backend.Precondition, Echo)
	}
	if err != nil {
		return "", err
	}
	return etag, nil
}

// Get implements backend.Store.
func (f *Faulty) Get(ctx context.Context, key string, max int64) (body []byte, etag string, err error) {
	hit, err := f.run(ctx, "get", key, nil, func() (err error) {
		body, etag, err = f.inner.Get(ctx, key, max)
		return err
	})
	if err != nil {
		return nil, "", err
	}
	switch hit.fault {
	case Truncated:
		body = body[:hit.pick(len(body))]
	case Flipped:
		hit.flip(body)
	case Reset:
		return nil, "", f.fail("get", key, backend.Transient, Reset)
	}
	return body, etag, nil
}

// ReadAt implements backend.Store.
func (f *Faulty) ReadAt(ctx context.Context, key string, p []byte, off int64) error {
	hit, err := f.run(ctx, "read", key, nil, func() error { return f.inner.ReadAt(ctx, key, p, off) })
	if err != nil {
		return err
	}
	switch hit.fault {
	case Truncated:
		clear(p[hit.pick(len(p)):])
		return f.fail("read", key, backend.Short, Truncated)
	case Reset:
		clear(p[hit.pick(len(p)):])
		return f.fail("read", key, backend.Transient, Reset)
	case Flipped:
		hit.flip(p)
	}
	return nil
}

// Stat implements backend.Store.
func (f *Faulty) Stat(ctx context.Context, key string) (info backend.Info, err error) {
	_, err = f.run(ctx, "stat", key, nil, func() (err error) {
		info, err = f.inner.Stat(ctx, key)
		return err
	})
	if err != nil {
		return backend.Info{}, err
	}
	return info, nil
}

// Delete implements backend.Store.
func (f *Faulty) Delete(ctx context.Context, key string) error {
	later := func() func() {
		return func() { _ = f.inner.Delete(context.Background(), key) } // nobody hears of it
	}
	_, err := f.run(ctx, "delete", key, later, func() error { return f.inner.Delete(ctx, key) })
	return err
}

// List implements backend.Store.
func (f *Faulty) List(ctx context.Context, prefix, after string, max int) (found []backend.Info, more bool, err error) {
	_, err = f.run(ctx, "list", prefix, nil, func() (err error) {
		found, more, err = f.inner.List(ctx, prefix, after, max)
		return err
	})
	if err != nil {
		return nil, false, err
	}
	return found, more, nil
}

// Unwrap implements backend.Wrapper.
func (f *Faulty) Unwrap() backend.Store { return f.inner }

// DeleteBatch implements backend.BatchDeleter, as one call; without batches in the inner store it is a Delete
// of each. Of a batch that is refused or throttled a first part may have been deleted.
func (f *Faulty) DeleteBatch(ctx context.Context, keys []string) []error {
	if _, ok := f.inner.(backend.BatchDeleter); !ok {
		return backend.DeleteEach(ctx, f, keys)
	}
	if len(keys) == 0 {
		return nil
	}
	later := func() func() {
		kept := slices.Clone(keys)
		return func() { _ = backend.DeleteMany(context.Background(), f.inner, kept) } // nobody hears of it
	}
	var got []error
	hit, err := f.run(ctx, "delete", keys[0], later, func() error {
		got = f.inner.(backend.BatchDeleter).DeleteBatch(ctx, keys)
		return nil
	})
	if err == nil {
		return got
	}
	first := 0
	if hit.fault == Refused || hit.fault == Throttled {
		first = hit.pick(len(keys))
		got = f.inner.(backend.BatchDeleter).DeleteBatch(ctx, keys[:first])
	}
	errs := make([]error, len(keys))
	copy(errs, got)
	for i := first; i < len(keys); i++ {
		errs[i] = &backend.Error{Op: "delete", Store: f.String(), Key: keys[i], Class: backend.ClassOf(err), Err: err}
	}
	return errs
}

// CopyFrom implements backend.Copier, if the inner store does.
func (f *Faulty) CopyFrom(ctx context.Context, key string, from backend.Store, fromKey string, c backend.Cond) (etag string, err error) {
	copier, ok := f.inner.(backend.Copier)
	if !ok {
		return "", &backend.Error{Op: "copy", Store: f.String(), Key: key, Class: backend.Permanent, Err: errors.ErrUnsupported}
	}
	_, err = f.run(ctx, "copy", key, nil, func() (err error) {
		etag, err = copier.CopyFrom(ctx, key, from, fromKey, c)
		return err
	})
	if err != nil {
		return "", err
	}
	return etag, nil
}

// String is the inner store's name.
func (f *Faulty) String() string { return f.inner.String() }

// hit is the fault that befell a call, with a random number of its own.
type hit struct {
	fault Fault
	place uint64
}

// pick is a place within n bytes; 0 if there are none.
func (h hit) pick(n int) int { return int(h.place % uint64(max(n, 1))) }

func (h hit) flip(p []byte) {
	if len(p) > 0 {
		p[h.pick(len(p))] ^= 1 << (h.place >> 61)
	}
}

// request is one call. later, of puts and deletes, prepares the call to be made after its caller has gone.
type request struct {
	op, key     string
	later       func() func()
	conditional bool
}

// run serves a request without a condition.
func (f *Faulty) run(ctx context.Context, op, key string, later func() func(), call func() error) (hit, error) {
	return f.serve(ctx, request{op: op, key: key, later: later}, call)
}

// serve makes one call with whatever is planned for it.
func (f *Faulty) serve(ctx context.Context, r request, call func() error) (hit, error) {
	op, key := r.op, r.key
	if f.Before != nil {
		if err := f.Before(op, key); err != nil {
			return hit{}, err
		}
	}
	h, due := f.next(r)
	for _, l := range due {
		l.do()
	}
	switch h.fault {
	case Refused:
		return h, f.fail(op, key, backend.Transient, h.fault)
	case Throttled:
		return h, f.fail(op, key, backend.Throttled, h.fault)
	case Late:
		return h, f.fail(op, key, backend.Transient, h.fault)
	case LostReply:
		_ = call() // its outcome is what gets lost
		return h, f.fail(op, key, backend.Transient, h.fault)
	case Delayed:
		if f.Delay != nil {
			if err := f.Delay(ctx, op, key); err != nil {
				return h, err
			}
		}
	}
	return h, call()
}

// next counts a call, decides on its fault, and takes out the late calls whose time has come.
func (f *Faulty) next(r request) (hit, []lateCall) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.calls[r.op]++
	h := hit{fault: f.drawLocked(), place: f.rng.Uint64()} // drawn even when not used: the order decides alone
	if (h.fault == Truncated || h.fault == Flipped) && f.hurtOnce && f.hurt[r.key] {
		h.fault = None
	}
	f.plannedLocked(r.op, &h)
	if f.offline {
		h = hit{fault: Refused} // of a batch nothing arrives
		f.injected[h.fault]++
		return h, nil
	}
	var due, waiting []lateCall
	for _, l := range f.late {
		if l.after--; l.after < 0 {
			due = append(due, l)
		} else {
			waiting = append(waiting, l)
		}
	}
	f.late = waiting
	if !h.fault.befalls(r) {
		h.fault = None
	}
	if h.fault == Late || h.fault == Twice {
		f.late = append(f.late, lateCall{after: h.pick(lateMax), do: r.later()})
	}
	if h.fault != None {
		f.injected[h.fault]++
	}
	if h.fault == Truncated || h.fault == Flipped {
		f.hurt[r.key] = true
	}
	return h, due
}

// drawLocked draws a fault by the rates, in the order of the faults' numbers.
func (f *Faulty) drawLocked() Fault {
	x := f.rng.Float64()
	for fault := Refused; fault < faults; fault++ {
		if x -= f.rates[fault]; x < 0 {
			return fault
		}
	}
	return None
}

// plannedLocked lets the oldest fault injected for this call, if any, take the place of the drawn one.
func (f *Faulty) plannedLocked(op string, h *hit) {
	var rest []plan
	met := false
	for _, p := range f.planned {
		if p.op == op || p.op == "" {
			if p.after == 0 && !met {
				h.fault, met = p.fault, true
				continue
			}
			p.after = max(p.after-1, 0)
		}
		rest = append(rest, p)
	}
	f.planned = rest
}

func (f Fault) befalls(r request) bool {
	switch f {
	case Late, Twice:
		return r.later != nil
	case Truncated, Flipped, Reset:
		return r.op == "get" || r.op == "read"
	case Echo:
		return r.conditional
	}
	return true
}

func (f *Faulty) fail(op, key string, class backend.Class, fault Fault) error {
	cause := fmt.Errorf("%w: %v", ErrInjected, fault)
	return &backend.Error{Op: op, Store: f.inner.String(), Key: key, Class: class, Err: cause}
}
