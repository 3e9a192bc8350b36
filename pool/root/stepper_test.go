package root

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"log/slog"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing/synctest"
	"time"

	"graindisk/backend"
)

// The exhaustive search needs to know what one contender does next when one thing happens to it. It asks
// the shipped register: a stepper runs it against stores that wait to be told what they answer, up to the
// situation in question, lets the one thing happen, and sees what it asks for next. A contender learns of
// the world through its answers alone, so a step found once holds wherever that contender, in the same
// situation, meets the same thing: it is looked up from then on. The search thus visits a million states of
// the whole after some ten thousand steps of the register.

const placesMax = 4 // targets of a scenario

// contentID names a copy's content, its nonce left out; 0: there is no copy.
type contentID int32

// content is a copy that was met.
type content struct {
	body   string // as first met
	c      Copy
	member uint   // its member's number
	vote   voteID // what it accepted; 0: nothing
}

// A stepper knows the situations a contender was found in and the steps between them.
type stepper struct {
	sc       *scenario
	contents []content
	byBody   map[string]contentID
	members  map[string]uint
	votes    []vote1
	byVote   map[string]voteID
	parent   map[uint32]uint32 // of value numbers, for all contenders

	nodes []*situation
	byKey map[string]int32
	steps int // that the register was run for

	mu sync.Mutex // taken by the register's goroutines, for contents, votes and a session's vote
}

func newStepper(sc *scenario) *stepper {
	return &stepper{
		sc: sc, contents: make([]content, 1), byBody: map[string]contentID{}, members: map[string]uint{}, parent: map[uint32]uint32{},
		votes: make([]vote1, 1), byVote: map[string]voteID{}, nodes: []*situation{{}}, byKey: map[string]int32{},
	}
}

// intern finds or adds the content of a body.
func (d *stepper) intern(body string) contentID {
	front, _, _ := strings.Cut(body, ",\n\"nonce\":")
	if id, ok := d.byBody[front]; ok {
		return id
	}
	c, err := Decode([]byte(body))
	if err != nil {
		panic(err)
	}
	k := content{body: body, c: c, vote: d.internVote(c)}
	if _, ok := d.members[c.Member]; !ok {
		d.members[c.Member] = uint(len(d.members))
	}
	k.member = d.members[c.Member]
	id := contentID(len(d.contents))
	d.contents = append(d.contents, k)
	d.byBody[front] = id
	return id
}

func (d *stepper) internCopy(c Copy) contentID {
	c.Nonce = "n"
	b, err := c.encode()
	if err != nil {
		panic(err)
	}
	return d.intern(string(b))
}

// kinds of what happens to a contender.
type happening uint8

const (
	hBegin   happening = iota // an operation, arg: which
	hGot                      // target answers a get with content arg
	hMissing                  // target answers a get: nothing there
	hPut                      // target took a put
	hRefused                  // target refuses a put: its condition does not hold
	hLost                     // no answer comes from target
	hLinger                   // the round has waited long enough
	hDeadline
	hCrash
)

// event is one thing that happens to a contender.
type event struct {
	kind   happening
	target uint8
	arg    int32 // contentID or choice
}

// choice is what a contender may do next.
type choice int32

const (
	doClaim choice = iota
	doCommit
	doRepeat
	doRelease
	doSeed
	doChange
	doFinish
	doJump // planted: to the new members in one step
	doBack // planted: from the joint configuration to the old one
)

func (c choice) String() string {
	return [...]string{"claim", "commit", "commit of the same value again", "release", "seed", "change of members", "end of the change", "change in one step", "change taken back"}[c]
}

// life is what a contender is about, apart from its register. All of it decides what it may do next.
type life struct {
	who, no                uint8 // contender, and which of its lives
	claims, commits, seeds uint8 // left
	above                  uint64
	consent                Consent
	tenure, unknown        bool
	seeded                 string // uuid
	made                   uint8  // values and seeds made in this life
}

// request is what a contender waits for at one target.
type asked struct {
	kind    uint8 // 0: nothing
	content contentID
}

const (
	askedNothing uint8 = iota
	askedGet
	askedPut  // on condition that the copy is the one it saw last
	askedSeed // on condition that there is none
)

// situation is where a contender stands between two happenings.
type situation struct {
	out     [placesMax]asked
	knows   uint8 // bit by target: it goes by the copy it saw there last
	linger  bool
	inOp    bool
	choices []choice
	epoch   uint64 // highest it ever used
	note    string // of the operation that ended here

	base  *ending
	path  []event // since base
	steps map[event]step
	twin  *situation // reached in another way, and taken for this one
}

// ending is a register between two operations.
type ending struct {
	life life
	reg  *Register
	val  Value // of the tenure
	tags [placesMax]int
	seen [placesMax]contentID
}

// step is what comes of an event.
type step struct {
	to     int32
	cut    [placesMax]asked // puts that nobody waits for any more, still on their way
	report report
	bad    string // what should not have been, seen from inside
}

// report is an operation's success.
type report struct {
	claim, commit bool
	epoch         uint64
	value         uint32
}

// session is a register under the stepper's hands.
type session struct {
	d    *stepper
	base *ending
	life life
	reg  *Register
	val  Value

	ctx    context.Context
	cancel context.CancelFunc
	over   bool // no pause ends by itself any more
	op     choice
	result chan error
	ended  bool
	err    error
	tried  Value
	got    Value

	live   [placesMax]*waiting
	linger chan time.Time
	tags   [placesMax]int
	seen   [placesMax]contentID
	round  string
	vote   voteID // of an accept round
	fails  [placesMax]int
	last   [placesMax]happening
}

type waiting struct {
	asked
	reply chan result
}

// counting is a source of nonces: their order is a matter of chance, and they are left out of contents.
type counting struct{ rng *rand.ChaCha8 }

func (c counting) Read(p []byte) (int, error) { return c.rng.Read(p) }

// step looks up what comes of e in situation n, or has the register show it.
func (d *stepper) step(n int32, e event) step {
	from := d.nodes[n]
	st, ok := from.steps[e]
	if !ok {
		st = d.run(from.base, from.path, e)
		from.steps[e] = st
	}
	return st
}

// run has the register show what comes of e after path.
func (d *stepper) run(base *ending, path []event, e event) step {
	d.steps++
	s := d.session(base)
	for _, e := range path {
		s.happen(e)
	}
	before := s.live
	if e.kind == hGot || e.kind == hMissing || e.kind == hPut || e.kind == hRefused || e.kind == hLost {
		before[e.target] = nil
	}
	s.happen(e)
	var st step
	for t, w := range before {
		if w != nil && w != s.live[t] && w.kind != askedGet {
			st.cut[t] = w.asked
		}
	}
	path = append(slices.Clone(path), e)
	var note string
	if e.kind == hCrash {
		base, path = d.reborn(s.life), nil
	} else if s.ended {
		st.report, st.bad, note = s.conclude()
		base, path = &ending{life: s.life, reg: s.reg, val: s.val, tags: s.tags, seen: s.seen}, nil
		s.reg = nil
	}
	st.to = d.node(s, base, path, note)
	s.end()
	return st
}

// node finds or adds the situation that s is in.
func (d *stepper) node(s *session, base *ending, path []event, note string) int32 {
	n := &situation{base: base, path: path, inOp: len(path) > 0, steps: map[event]step{}, note: note}
	reg := base.reg
	if n.inOp {
		reg = s.reg
		n.linger = s.linger != nil
		for t, w := range s.live {
			if w != nil {
				n.out[t] = w.asked
			}
		}
	} else if n.choices = d.sc.choices(base); len(n.choices) == 0 {
		return 0
	}
	n.epoch = reg.used
	var key bytes.Buffer
	seen := base.seen
	l := base.life
	if n.inOp {
		seen, l = s.seen, s.life
		fmt.Fprintf(&key, "op %v %v %v %s %d ", s.op, n.out, n.linger, s.round, s.vote)
		if s.op == doSeed {
			fmt.Fprint(&key, path)
		}
	}
	fmt.Fprintf(&key, "%+v %d %q %d\n", l, reg.used, reg.claimant, base.val.LastCRC)
	fmt.Fprintf(&key, "%v %s\n", base.val.Cfg, base.val.State)
	if t := reg.tenure; t != nil {
		fmt.Fprintf(&key, "%v %d %s %v %v\n", t.ballot, t.ver, t.enc, t.unknown, t.cfg)
	}
	for i, t := range reg.targets {
		if t.etag != "" || n.out[i].kind == askedPut {
			n.knows |= 1 << i
			fmt.Fprintf(&key, "knows %d ", seen[i])
		}
		if n.inOp {
			fmt.Fprintf(&key, "fails %d last %d ", s.fails[i], s.last[i])
		}
	}
	if id, ok := d.byKey[key.String()]; ok {
		if o := d.nodes[id]; o.twin == nil && (o.base != base || !slices.Equal(o.path, path)) {
			o.twin = n
		}
		return id
	}
	id := int32(len(d.nodes))
	d.nodes = append(d.nodes, n)
	d.byKey[key.String()] = id
	return id
}

// born makes a contender's first situation.
func (d *stepper) born(l life) int32 { return d.node(nil, d.reborn(l), nil, "") }

// reborn makes a register for a new life of l.
func (d *stepper) reborn(l life) *ending {
	l.no++
	l.tenure, l.unknown, l.seeded, l.made = false, false, "", 0
	o := Options{Pool: "pool", Rand: counting{rand.NewChaCha8([32]byte{l.who, l.no})}}
	for i := range d.sc.places {
		o.Targets = append(o.Targets, Target{Name: "t" + strconv.Itoa(i)})
	}
	reg, err := Open(o)
	if err != nil {
		panic(err)
	}
	reg.claimant = fmt.Sprintf("c%d.%d", l.who, l.no)
	if d.sc.planted.change != nil {
		d.sc.planted.change(&reg.rules)
	}
	return &ending{life: l, reg: reg}
}

// session puts a register that stands at base into new hands.
func (d *stepper) session(base *ending) *session {
	s := &session{d: d, base: base, life: base.life, val: base.val, tags: base.tags, seen: base.seen}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	r := base.reg
	o := r.o
	o.After, o.Log = s.after, slog.New(listener{s})
	s.reg = &Register{
		o: o, rules: r.rules, claimant: r.claimant, used: r.used, lost: r.lost,
		pool: r.pool, ballot: r.ballot, rand: r.rand, seenAt: map[string]*target{},
	}
	if r.tenure != nil {
		t := *r.tenure
		s.reg.tenure = &t
	}
	for i, t := range r.targets {
		n := &target{Target: Target{Name: t.Name, Store: hand{s, i}}, copy: t.copy, etag: t.etag, down: t.down}
		s.reg.targets = append(s.reg.targets, n)
		for m, at := range r.seenAt {
			if at == t {
				s.reg.seenAt[m] = n
			}
		}
	}
	return s
}

// end lets what still runs come to its end.
func (s *session) end() {
	s.over = true
	s.cancel()
	synctest.Wait()
}

// listener hears of the rounds.
type listener struct{ s *session }

func (listener) Enabled(_ context.Context, l slog.Level) bool { return l == slog.LevelDebug }
func (l listener) WithAttrs([]slog.Attr) slog.Handler         { return l }
func (l listener) WithGroup(string) slog.Handler              { return l }
func (l listener) Handle(_ context.Context, r slog.Record) error {
	if r.Message == roundStarts {
		r.Attrs(func(a slog.Attr) bool { l.s.round = a.Value.String(); return true })
		l.s.vote, l.s.fails, l.s.last, l.s.linger = 0, [placesMax]int{}, [placesMax]happening{}, nil
	}
	return nil
}

// after lets pauses pass at once: the next request waits anyhow. The linger waits to be told.
func (s *session) after(d time.Duration) <-chan time.Time {
	switch {
	case s.over:
		return nil
	case d == s.reg.o.Linger:
		s.linger = make(chan time.Time, 1)
		return s.linger
	}
	c := make(chan time.Time, 1)
	c <- time.Time{}
	return c
}

// hand is a register's way to a target, held by the stepper. Each target is asked by one goroutine at a time.
type hand struct {
	s      *session
	target int
}

func (h hand) Get(ctx context.Context, _ string, _ int64) ([]byte, string, error) {
	r := h.s.submit(ctx, h.target, asked{kind: askedGet})
	return []byte(r.body), r.etag, r.err
}

func (h hand) Put(ctx context.Context, _ string, body []byte, c backend.Cond) (string, error) {
	a := asked{kind: askedPut, content: h.s.intern(string(body))}
	if c.Absent {
		a.kind = askedSeed
	} else if c.Match != h.s.tag(h.target) {
		panic(fmt.Sprintf("put on condition of %q, seen last: %q", c.Match, h.s.tag(h.target)))
	}
	r := h.s.submit(ctx, h.target, a)
	return r.etag, r.err
}

// intern names the body of a put. All puts of a round that asks to accept carry one value.
func (s *session) intern(body string) contentID {
	s.d.mu.Lock()
	defer s.d.mu.Unlock()
	id := s.d.intern(body)
	if s.round == "accept" {
		s.vote = s.d.contents[id].vote
	}
	return id
}

func (s *session) tag(target int) string { return strconv.Itoa(s.tags[target]) }

func (s *session) submit(ctx context.Context, target int, a asked) result {
	if ctx.Err() != nil {
		return result{err: ctx.Err()}
	}
	w := &waiting{asked: a, reply: make(chan result, 1)}
	s.live[target] = w
	select {
	case r := <-w.reply:
		return r
	case <-ctx.Done():
		s.live[target] = nil
		return result{err: ctx.Err()}
	}
}

// happen lets e happen, and everything that follows from it by itself.
func (s *session) happen(e event) {
	t := int(e.target)
	reply := func(r result) {
		w := s.live[t]
		s.live[t] = nil
		w.reply <- r
	}
	s.last[t] = e.kind
	switch e.kind {
	case hBegin:
		s.begin(choice(e.arg))
	case hGot:
		s.tags[t]++
		s.seen[t] = contentID(e.arg)
		reply(result{body: s.d.contents[e.arg].body, etag: s.tag(t)})
	case hMissing:
		reply(result{err: &backend.Error{Op: "get", Key: Key, Store: "model", Class: backend.NotFound}})
	case hPut:
		s.tags[t]++
		s.seen[t] = s.live[t].content
		reply(result{etag: s.tag(t)})
	case hRefused:
		s.fails[t]++
		reply(result{err: &backend.Error{Op: "put", Key: Key, Store: "model", Class: backend.Precondition}})
	case hLost:
		s.fails[t]++
		reply(result{err: lost("call")})
	case hLinger:
		s.linger <- time.Time{}
	case hDeadline, hCrash:
		s.over = true
		s.cancel()
	}
	synctest.Wait()
	if s.linger != nil && e.kind == hLinger {
		s.linger = nil
	}
	select {
	case s.err = <-s.result:
		s.ended = true
	default:
	}
}

// begin starts an operation.
func (s *session) begin(op choice) {
	s.op, s.round, s.result = op, "", make(chan error, 1)
	l := &s.life
	s.tried = s.val
	var f func() error
	switch op {
	case doClaim:
		l.claims--
		consent := &l.consent
		if consent.Epoch == 0 {
			consent = nil
		}
		o := ClaimOptions{
			Owner: s.d.sc.log(l.who), OwnerName: consentName(consent), Consent: consent, Above: l.above,
			Epoch: func(b Ballot) error { s.life.above = max(s.life.above, b.Epoch); return nil },
		}
		f = func() (err error) { s.got, err = s.reg.Claim(s.ctx, o); return err }
	case doSeed:
		l.seeds--
		l.made++
		l.seeded = fmt.Sprintf("s%d.%d.%d", l.who, l.no, l.made)
		m := newcomer(l.seeded)
		f = func() error { return s.reg.Seed(s.ctx, "t"+strconv.Itoa(s.d.sc.place), m) }
	default:
		v := &s.tried
		v.Cfg = s.d.sc.config(op, v.Cfg, *l)
		if op == doCommit || op == doRelease || op == doRepeat {
			l.commits--
		}
		if op == doRelease {
			v.State = Released
		}
		if op != doRepeat {
			l.made++
			s.d.child(v, *l)
		}
		if s.reg.onEpoch == nil { // a reclaim reports to the life that began it
			s.reg.onEpoch = func(b Ballot) error { s.life.above = max(s.life.above, b.Epoch); return nil }
		}
		f = func() error { return s.reg.Commit(s.ctx, *v) }
	}
	go func() { s.result <- f() }()
}

// child makes v a new value, made from what it was. Its number tells who made it, when, and from what.
func (d *stepper) child(v *Value, l life) {
	h := fnv.New32a()
	fmt.Fprint(h, v.LastCRC, l.who, l.no, l.made)
	id := h.Sum32() | 1
	if p, ok := d.parent[id]; ok && p != v.LastCRC {
		panic("two values drew one number")
	}
	d.parent[id] = v.LastCRC
	v.LastCRC = id
	v.Cut++
}

// conclude judges the end of an operation and makes the life ready for the next.
func (s *session) conclude() (r report, bad, note string) {
	l, err := &s.life, s.err
	defer func() {
		if !l.tenure {
			l.unknown, l.seeded, s.val = false, "", Value{}
		}
	}()
	note = fmt.Sprintf("%v: %v", s.op, err)
	var held *HeldError
	switch {
	case s.op == doSeed:
		if err != nil {
			l.seeded = ""
		}
	case s.op == doClaim && err == nil:
		l.tenure, l.unknown, s.val = true, false, s.got
		return report{claim: true, epoch: s.reg.Ballot().Epoch, value: s.val.LastCRC}, "", note
	case s.op == doClaim:
		l.tenure = false
		if errors.As(err, &held) {
			l.consent = Consent{held.Epoch, held.Owner}
		} else if !errors.Is(err, ErrNoQuorum) {
			bad = note
		}
	case err == nil:
		s.val, l.unknown, l.tenure = s.tried, false, s.tried.State != Released
		return report{commit: true, epoch: s.reg.Ballot().Epoch, value: s.val.LastCRC}, "", note
	case errors.Is(err, ErrFenced):
		l.tenure = false
	case errors.Is(err, ErrUnknown):
		s.val, l.unknown = s.tried, true
	default:
		bad = note
	}
	return report{}, bad, note
}

// consentName carries a claim's consent into the values of its tenure, where the checker finds it.
func consentName(c *Consent) string {
	if c == nil {
		return ""
	}
	return fmt.Sprint(c.Epoch, " ", c.Owner)
}
