package root

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing/synctest"
	"time"

	"graindisk/backend"
	"graindisk/block"
)

// A world is a pool's targets under a scheduler: every request of every register waits until the
// scheduler says what becomes of it. It runs inside a synctest bubble, where "everybody waits" can be
// told, so that a seed decides the whole schedule.
type world struct {
	rng     *rand.Rand
	members []Member
	chk     *checker
	planted plantedFault

	mu      sync.Mutex // guards what follows between the scheduler and the registers
	objects []string   // the copy at each target; its ETag is its content; empty: none
	reqs    []*request
	timers  map[int][]chan time.Time // by register
	quiet   bool                     // requests are served at once and faultlessly
	serial  int
	wiped   int
	trace   strings.Builder
	verbose bool
}

// plantedFault is a fault put into the register, or nothing.
type plantedFault struct {
	name        string
	change      func(*rules)
	emptyCopies bool // a missing copy is taken for one that promised nothing
}

type request struct {
	who, target, serial int
	put                 bool
	body, match         string
	reply               chan result // of capacity 1
	live                bool        // somebody waits for the reply
}

type result struct {
	body, etag string
	err        error
}

func lost(op string) error {
	return &backend.Error{Op: op, Key: Key, Store: "model", Class: backend.Transient, Err: errors.New("planned")}
}

func newWorld(seed uint64, p plantedFault) *world {
	w := &world{rng: rand.New(rand.NewPCG(seed, 17)), planted: p, timers: map[int][]chan time.Time{}}
	n := 1 + w.rng.IntN(3)
	for i := range n {
		w.members = append(w.members, Member{ID: block.TargetID(i + 1), UUID: fmt.Sprintf("member-%d", i), Name: fmt.Sprintf("t%d", i)})
	}
	w.chk = newChecker(w.members)
	for i := range n {
		w.objects = append(w.objects, w.initial(i))
	}
	return w
}

func (w *world) initial(target int) string {
	v := Value{Format: ValueFormat, Cfg: Config{Members: w.members}, State: Released}
	b, err := Copy{Pool: "pool", Member: w.members[target].UUID, Ver: 1, Val: v, Nonce: "created"}.encode()
	if err != nil {
		panic(err)
	}
	return string(b)
}

// port is one register's way to one target.
type port struct {
	w           *world
	who, target int
}

func (p port) Get(ctx context.Context, _ string, _ int64) ([]byte, string, error) {
	r := p.w.submit(ctx, &request{who: p.who, target: p.target})
	return []byte(r.body), r.etag, r.err
}

func (p port) Put(ctx context.Context, _ string, body []byte, c backend.Cond) (string, error) {
	r := p.w.submit(ctx, &request{who: p.who, target: p.target, put: true, body: string(body), match: c.Match})
	return r.etag, r.err
}

func (w *world) submit(ctx context.Context, q *request) result {
	if ctx.Err() != nil {
		return result{err: ctx.Err()}
	}
	w.mu.Lock()
	if w.quiet {
		defer w.mu.Unlock()
		return w.serveLocked(q)
	}
	w.serial++
	q.serial, q.live, q.reply = w.serial, true, make(chan result, 1)
	w.reqs = append(w.reqs, q)
	w.mu.Unlock()
	select {
	case r := <-q.reply:
		return r
	case <-ctx.Done():
		w.mu.Lock()
		defer w.mu.Unlock()
		q.live = false // a put may still arrive
		return result{err: ctx.Err()}
	}
}

// serveLocked lets a request take effect at its target.
func (w *world) serveLocked(q *request) result {
	have := w.objects[q.target]
	if have == "" && w.planted.emptyCopies {
		have = w.initial(q.target)
	}
	switch {
	case have == "":
		return result{err: &backend.Error{Op: "get", Key: Key, Store: "model", Class: backend.NotFound}}
	case !q.put:
		return result{body: have, etag: have}
	case q.match != have:
		return result{err: &backend.Error{Op: "put", Key: Key, Store: "model", Class: backend.Precondition}}
	}
	w.objects[q.target] = q.body
	w.chk.put(q.target, q.body)
	return result{etag: q.body}
}

func (w *world) after(who int, d time.Duration) <-chan time.Time {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.quiet {
		return time.After(d) // the bubble's clock: passes when nothing else can happen
	}
	c := make(chan time.Time)
	w.timers[who] = append(w.timers[who], c)
	return c
}

func (w *world) register(who int) *Register {
	after := func(d time.Duration) <-chan time.Time { return w.after(who, d) }
	o := Options{Pool: "pool", After: after, Rand: rand.NewChaCha8([32]byte{byte(who), byte(who >> 8), byte(w.rng.Uint32())})}
	for i, m := range w.members {
		o.Targets = append(o.Targets, Target{Name: m.Name, Store: port{w, who, i}})
	}
	r, err := Open(o)
	if err != nil {
		panic(err)
	}
	if w.planted.change != nil {
		w.planted.change(&r.rules)
	}
	return r
}

func (w *world) logf(format string, args ...any) {
	if w.verbose {
		fmt.Fprintf(&w.trace, format+"\n", args...)
	}
}

// run lets the contenders contend for at most steps events, then ends them and claims once more, with
// nobody and nothing in the way: what was ever reported as committed must be there.
func (w *world) run(steps int) {
	cs := make([]*contender, 2+w.rng.IntN(2))
	for i := range cs {
		cs[i] = &contender{w: w, log: fmt.Sprintf("log-%d", i), recorded: map[Ballot]bool{}}
		cs[i].start(w.rng)
	}
	for range steps {
		synctest.Wait()
		if w.chk.violation != "" || !w.event(cs) {
			break
		}
	}
	for _, c := range cs {
		synctest.Wait()
		c.crash()
	}
	synctest.Wait()
	w.mu.Lock()
	defer w.mu.Unlock()
	w.quiet = true
	w.sortLocked()
	for _, q := range w.reqs {
		if q.put && w.rng.IntN(2) == 0 {
			w.serveLocked(q)
		}
	}
	if w.chk.violation == "" {
		w.mu.Unlock()
		w.lastClaim()
		w.mu.Lock()
	}
}

func (w *world) lastClaim() {
	c := &contender{w: w, log: "log-last", recorded: map[Ballot]bool{}, rng: w.rng}
	c.reg = w.register(1000)
	c.ctx = context.Background()
	var held *HeldError
	_, err := c.claim(nil)
	if errors.As(err, &held) {
		_, err = c.claim(&Consent{held.Epoch, held.Owner})
	}
	if err != nil && w.chk.violation == "" {
		w.chk.fail("the last claim, undisturbed, failed: %v", err)
	}
}

// event makes one thing happen. It reports false when nothing is left to happen.
func (w *world) event(cs []*contender) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	var live, stray []*request
	for _, c := range cs {
		if c.again {
			c.again = false
			c.start(w.rng)
			return true
		}
	}
	w.sortLocked()
	for _, q := range w.reqs {
		if q.live {
			live = append(live, q)
		} else {
			stray = append(stray, q)
		}
	}
	running := slices.DeleteFunc(slices.Clone(cs), func(c *contender) bool { return c.finished() })
	if len(running) == 0 {
		return false
	}
	switch roll := w.rng.IntN(100); {
	case roll < 8 && len(stray) > 0:
		w.arriveLocked(stray[w.rng.IntN(len(stray))])
	case roll < 14 && w.fireLocked(running[w.rng.IntN(len(running))]):
	case roll < 17:
		running[w.rng.IntN(len(running))].deadline()
	case roll < 19:
		c := running[w.rng.IntN(len(running))]
		w.logf("%s crashes", c.log)
		c.crash()
		if w.rng.IntN(3) > 0 {
			c.again = true
		}
	case roll < 22 && w.wiped < (len(w.members)-1)/2:
		t := w.rng.IntN(len(w.members))
		w.logf("target %d is wiped", t)
		w.objects[t] = ""
		w.wiped++
		w.chk.wipe(t)
	case len(live) > 0:
		w.decideLocked(live[w.rng.IntN(len(live))])
	case slices.ContainsFunc(running, w.fireLocked):
	default:
		running[w.rng.IntN(len(running))].deadline()
	}
	return true
}

// sortLocked brings the requests into an order that depends on the seed alone, which that of their
// arrival does not: the goroutines of a round start together.
func (w *world) sortLocked() {
	w.reqs = slices.DeleteFunc(w.reqs, func(q *request) bool { return !q.live && !q.put })
	slices.SortFunc(w.reqs, func(a, b *request) int {
		return cmp.Or(cmp.Compare(a.who, b.who), cmp.Compare(a.target, b.target), cmp.Compare(a.serial, b.serial))
	})
}

// fireLocked lets the oldest pause of c end, and reports whether there was one. Timers that nobody waits
// for are dropped: whether they were ever set may be a matter of chance.
func (w *world) fireLocked(c *contender) bool {
	for ts := w.timers[c.who]; len(ts) > 0; ts = w.timers[c.who] {
		w.timers[c.who] = ts[1:]
		select {
		case ts[0] <- time.Time{}:
			return true
		default:
		}
	}
	return false
}

// decideLocked settles what becomes of a request somebody waits for.
func (w *world) decideLocked(q *request) {
	op := "get"
	if q.put {
		op = "put"
	}
	roll := w.rng.IntN(100)
	q.live = false
	switch {
	case roll < 6: // lost on the way there
		w.logf("%d: %s at %d is lost", q.who, op, q.target)
		w.dropLocked(q)
		q.reply <- result{err: lost(op)}
	case roll < 14 && q.put: // lost on the way back
		r := w.serveLocked(q)
		w.logf("%d: %s at %d: reply lost (%v)", q.who, op, q.target, r.err)
		w.dropLocked(q)
		q.reply <- result{err: lost(op)}
	case roll < 20 && q.put: // given up, and still on its way
		w.logf("%d: %s at %d is late", q.who, op, q.target)
		q.reply <- result{err: lost(op)}
	default:
		r := w.serveLocked(q)
		w.logf("%d: %s at %d: %v", q.who, op, q.target, r.err)
		w.dropLocked(q)
		q.reply <- r
	}
}

// arriveLocked lets a put arrive for which nobody waits any more, perhaps not for the last time.
func (w *world) arriveLocked(q *request) {
	r := w.serveLocked(q)
	w.logf("%d: late put at %d: %v", q.who, q.target, r.err)
	if w.rng.IntN(4) > 0 {
		w.dropLocked(q)
	}
}

func (w *world) dropLocked(q *request) {
	w.reqs = slices.DeleteFunc(w.reqs, func(o *request) bool { return o == q })
}
