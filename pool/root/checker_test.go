package root

import (
	"fmt"
	"slices"
	"sync"
)

// checker watches what takes effect at the targets and what the registers report. Every value carries
// a number of its own (LastCRC) and the checker knows which value each was made from.
type checker struct {
	mu        sync.Mutex
	cfg       Config
	clock     int
	violation string

	parent  map[uint32]uint32 // by value number; 0 is the first value
	copies  []Copy            // at each target
	votes   []*vote           // every (ballot, version) ever accepted, in order
	ballots map[Ballot]*Consent
	ops     []op // that succeeded
}

// vote is a (ballot, version) and who accepted it.
type vote struct {
	c      Copy // its accepted part
	by     map[string]bool
	chosen bool
}

// op is a successful claim or commit.
type op struct {
	start, end int
	value      uint32
	claim      bool
	ballot     Ballot
}

func newChecker(ms []Member) *checker {
	return &checker{
		cfg: Config{Members: ms}, parent: map[uint32]uint32{}, copies: make([]Copy, len(ms)), ballots: map[Ballot]*Consent{},
	}
}

func (k *checker) fail(format string, args ...any) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.failLocked(format, args...)
}

func (k *checker) failLocked(format string, args ...any) {
	if k.violation == "" {
		k.violation = fmt.Sprintf(format, args...)
	}
}

// child makes a new value from v.
func (k *checker) child(v Value) Value {
	k.mu.Lock()
	defer k.mu.Unlock()
	id := uint32(len(k.parent) + 1)
	k.parent[id] = v.LastCRC
	v.LastCRC = id
	v.Cut++
	return v
}

func (k *checker) ballot(b Ballot, c *Consent) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if _, twice := k.ballots[b]; twice {
		k.failLocked("ballot %v is used twice", b)
	}
	k.ballots[b] = c
}

func (k *checker) wipe(target int) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.copies[target] = Copy{}
}

// put sees a copy take effect.
func (k *checker) put(target int, body string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	c, err := Decode([]byte(body))
	if err != nil {
		k.failLocked("put at %d: %v", target, err)
		return
	}
	old := k.copies[target]
	if c.Promised.Compare(old.Promised) < 0 {
		k.failLocked("the promise at %d falls from %v to %v", target, old.Promised, c.Promised)
	}
	if c.compareAccepted(old.Accepted, old.Ver) < 0 {
		k.failLocked("what %d accepted falls from %v/%d to %v/%d", target, old.Accepted, old.Ver, c.Accepted, c.Ver)
	}
	k.copies[target] = c
	i, known := slices.BinarySearchFunc(k.votes, c, func(v *vote, c Copy) int { return v.c.compareAccepted(c.Accepted, c.Ver) })
	if !known {
		k.votes = slices.Insert(k.votes, i, &vote{c: c, by: map[string]bool{}})
	}
	v := k.votes[i]
	if a, b := v.c.Val, c.Val; a.LastCRC != b.LastCRC || a.Owner != b.Owner || a.State != b.State {
		k.failLocked("%v/%d has two values: %d and %d", c.Accepted, c.Ver, a.LastCRC, b.LastCRC)
	}
	v.by[c.Member] = true
	if !v.chosen && k.cfg.Quorum(func(m string) bool { return v.by[m] }) {
		v.chosen = true
		k.chosenLocked(i)
	}
}

// chosenLocked checks vote i, just chosen, against those chosen next below and above it.
func (k *checker) chosenLocked(i int) {
	for below := i - 1; below >= 0; below-- {
		if k.votes[below].chosen {
			k.followsLocked(below, i)
			break
		}
	}
	for above := i + 1; above < len(k.votes); above++ {
		if k.votes[above].chosen {
			k.followsLocked(i, above)
			break
		}
	}
}

// followsLocked checks that the chosen vote j may follow the chosen vote i: its value is made from i's,
// and if it changes the owner, then with consent to end the tenure it found.
func (k *checker) followsLocked(i, j int) {
	p, n := k.votes[i].c, k.votes[j].c
	if !k.madeFromLocked(n.Val.LastCRC, p.Val.LastCRC) {
		k.failLocked("value %d (%v/%d) was chosen and lost: %d (%v/%d) is not made from it",
			p.Val.LastCRC, p.Accepted, p.Ver, n.Val.LastCRC, n.Accepted, n.Ver)
	}
	if n.Accepted != p.Accepted && n.Accepted.Epoch <= p.Accepted.Epoch {
		k.failLocked("epoch does not rise: %v after %v", n.Accepted, p.Accepted)
	}
	if p.Val.State == Released || p.Val.Owner == n.Val.Owner {
		return
	}
	consent := k.ballots[n.Accepted]
	for _, q := range k.votes[i:j] { // it may have adopted any of these
		a := q.c
		if a.Val.State == Released || a.Val.Owner == n.Val.Owner || consent != nil && *consent == (Consent{a.Accepted.Epoch, a.Val.Owner}) {
			return
		}
	}
	k.failLocked("%v of %s follows %v of %s without consent: %v", n.Accepted, n.Val.Owner, p.Accepted, p.Val.Owner, consent)
}

func (k *checker) madeFromLocked(v, from uint32) bool {
	for v != from {
		if v == 0 {
			return false
		}
		v = k.parent[v]
	}
	return true
}

func (k *checker) start() int {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.clock++
	return k.clock
}

func (k *checker) claimed(start int, b Ballot, v Value) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.succeededLocked(op{start: start, value: v.LastCRC, claim: true, ballot: b})
}

func (k *checker) committed(start int, b Ballot, v Value) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if !slices.ContainsFunc(k.votes, func(o *vote) bool { return o.chosen && o.c.Val.LastCRC == v.LastCRC }) {
		k.failLocked("value %d is reported and was never chosen", v.LastCRC)
	}
	k.succeededLocked(op{start: start, value: v.LastCRC, ballot: b})
}

// succeededLocked checks a report against all earlier ones: values follow real time, a tenure that was
// outbid before the call reports nothing, epochs rise.
func (k *checker) succeededLocked(n op) {
	k.clock++
	n.end = k.clock
	for _, o := range k.ops {
		before := o.end < n.start
		switch {
		case before && !k.madeFromLocked(n.value, o.value):
			k.failLocked("value %d was reported, then %d, which is not made from it", o.value, n.value)
		case !k.madeFromLocked(n.value, o.value) && !k.madeFromLocked(o.value, n.value):
			k.failLocked("values %d and %d are both reported, neither made from the other", o.value, n.value)
		case n.claim && o.claim && o.ballot.Epoch == n.ballot.Epoch:
			k.failLocked("epoch %d was claimed twice", n.ballot.Epoch)
		case before && o.claim && o.ballot.Epoch > n.ballot.Epoch && n.ballot.Epoch > 0:
			k.failLocked("epoch %d reports success after epoch %d was claimed", n.ballot.Epoch, o.ballot.Epoch)
		}
	}
	k.ops = append(k.ops, n)
}
