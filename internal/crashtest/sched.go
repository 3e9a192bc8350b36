package crashtest

import (
	"cmp"
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/zeebo/xxh3"
)

// Sched decides in which order calls take effect. Every call of a fake file system or store waits in
// Park; once nothing else can go on, the scheduler lets one go, chosen by seed:
//
//	goroutine A ── Park("write slot-000003") ──┐
//	goroutine B ── Park("put t1 seg/…") ───────┼──► nobody runs ──► choose one by seed ──► it goes on
//	goroutine C ── waits for a lock of A ──────┘
//
// It runs inside a synctest bubble, so that time passes only when no call is parked: back-offs, tickers and
// time-outs cost nothing. It needs GOMAXPROCS 1: synctest.Wait does not return while a goroutine
// waits for a mutex, so that nobody runs is told instead by the scheduler itself yielding many times
// without a new call coming in. What runs between two choices is then in the order of one thread. A
// seed therefore decides the whole history, as long as nothing draws from another source of chance: the
// order of a map, a select with several cases ready, timers of the same moment, a sync.Mutex that is held over
// a call (after a millisecond of real time it is handed over in another order). What is left is that the
// runtime puts who runs for 10 ms of real time behind the others.
//
// A mutex must not be held by someone who waits for time to pass while another waits for the mutex: time
// stands still then.
type Sched struct {
	moves atomic.Uint64 // calls that came in

	mu     sync.Mutex
	rng    *rand.Rand
	parked []*parkedCall
	serial uint64
	wake   chan struct{} // capacity 1: something is parked, or it is over
	over   bool
	hash   uint64 // of all choices so far
	steps  uint64
	log    func(string)

	// How to choose, for a while.
	policy uint64
	salt   uint64
	left   uint64
}

type parkedCall struct {
	label  string
	serial uint64
	goOn   chan struct{}
}

// NewSched starts a scheduler. It must be called inside a synctest bubble with GOMAXPROCS 1, and
// stopped before the bubble ends. log, if not nil, is told of every choice.
func NewSched(seed uint64, log func(label string)) *Sched {
	s := &Sched{rng: rand.New(rand.NewPCG(seed, 3)), wake: make(chan struct{}, 1), hash: seed, log: log}
	go s.run()
	return s
}

// Park waits until it is the call's turn. Calls that may be parked at the same time should have different
// labels; the first word tells their class. A nil scheduler lets everything pass.
func (s *Sched) Park(label string) {
	if s == nil {
		return
	}
	s.mu.Lock()
	if s.over {
		s.mu.Unlock()
		return
	}
	s.serial++
	c := &parkedCall{label, s.serial, make(chan struct{})}
	s.parked = append(s.parked, c)
	s.mu.Unlock()
	s.moves.Add(1)
	s.poke()
	<-c.goOn
}

// Stop lets everything pass from now on, unscheduled.
func (s *Sched) Stop() {
	if s == nil {
		return
	}
	s.mu.Lock()
	s.over = true
	for _, c := range s.parked {
		close(c.goOn)
	}
	s.parked = nil
	s.mu.Unlock()
	s.poke()
}

// Hash tells histories apart: it is made of all choices so far and of how many there were to choose from.
func (s *Sched) Hash() (hash, steps uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.hash, s.steps
}

// Moves counts the calls that came in so far. Unlike the other methods it may be called from outside the
// bubble, to see whether anything still happens there.
func (s *Sched) Moves() uint64 { return s.moves.Load() }

func (s *Sched) poke() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

func (s *Sched) run() {
	for {
		s.settle()
		s.mu.Lock()
		if s.over {
			s.mu.Unlock()
			return
		}
		if len(s.parked) == 0 {
			s.mu.Unlock()
			<-s.wake // meanwhile time passes
			continue
		}
		c := s.chooseLocked()
		log := s.log
		s.mu.Unlock()
		if log != nil {
			log(c.label)
		}
		close(c.goOn)
	}
}

// passes is how often in a row the scheduler must yield in vain before it believes that nobody runs.
const passes = 24

func (s *Sched) settle() {
	for n := 0; n < passes; n++ {
		before := s.moves.Load()
		runtime.Gosched()
		if s.moves.Load() != before {
			n = 0
		}
	}
}

// chooseLocked takes one of the parked calls out. For some while each the choice is even, or some classes of
// calls go only when no other can, or all classes have a rank: so one client, one target or one file
// falls far behind the rest, which even choices hardly ever do.
func (s *Sched) chooseLocked() *parkedCall {
	slices.SortFunc(s.parked, func(a, b *parkedCall) int {
		return cmp.Or(strings.Compare(a.label, b.label), cmp.Compare(a.serial, b.serial))
	})
	if s.left == 0 {
		s.policy, s.salt, s.left = s.rng.Uint64N(4), s.rng.Uint64(), 16+s.rng.Uint64N(400)
	}
	s.left--
	best := ^uint64(0)
	var from []int
	for i, c := range s.parked {
		if r := s.rank(c.label); r <= best {
			if r < best {
				best, from = r, from[:0]
			}
			from = append(from, i)
		}
	}
	i := from[s.rng.IntN(len(from))]
	c := s.parked[i]
	s.hash = mix(s.hash, hashString(c.label), uint64(len(s.parked)))
	s.steps++
	s.parked = slices.Delete(s.parked, i, i+1)
	return c
}

// rank is low for calls that go first.
func (s *Sched) rank(label string) uint64 {
	class, _, _ := strings.Cut(label, " ")
	switch s.policy {
	case 0, 1:
		return 0
	case 2: // slow classes
		if mix(s.salt, hashString(class))%3 == 0 {
			return 1
		}
		return 0
	}
	return mix(s.salt, hashString(class)) % 8
}

func hashString(x string) uint64 {
	return xxh3.HashString(x)
}

// SetGate makes every call on the FS and its files pass the scheduler first, as "op:kind of file ...",
// and every Sync once more before it returns. Nil ends that.
func (f *FS) SetGate(s *Sched) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.gate = s
}

// OnPowerCut has fn called once when the power goes. It must not call the FS.
func (f *FS) OnPowerCut(fn func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.onCut = fn
}

// park lets the scheduler decide when a call goes on.
func (f *FS) park(op string, p string, off int64) {
	f.mu.Lock()
	gate := f.gate
	if f.dead != nil {
		gate = nil
	}
	f.mu.Unlock()
	if gate == nil {
		return
	}
	gate.Park(fmt.Sprintf("%s:%s %s @%d", op, kindOf(p), p, off))
}

// kindOf is the path's last element without the digits: the class of a file.
func kindOf(p string) string {
	return strings.TrimRight(p[strings.LastIndexByte(p, '/')+1:], "0123456789")
}
