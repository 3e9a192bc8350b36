package root

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"math/bits"
	"slices"
	"strings"

	"github.com/zeebo/xxh3"

	"graindisk/block"
)

// scenario is what a search explores: who wants what, and what may go wrong how often.
type scenario struct {
	name       string
	places     int   // targets
	first      []int // those that hold the first members' copies
	contenders int
	oneLog     bool // all contenders act for one log, as a host and its clone would

	claims, commits uint8 // each contender's, at most
	release         bool  // a commit may release the pool
	joint           []int // if set: a change to members at these places is under way from the start
	retake          bool  // a claim may follow while commits are left
	seeds           uint8 // each contender's attempts to put a new member at place
	place           int
	next            func(old []Member, m Member) []Member // the members after the change

	faults, crashes, wipes int8   // of all together
	inOrder                bool   // a contender's requests are answered one after another, that to the target of its own number first
	patience               bool   // a round that does not wait for all counts as a fault
	switches               int8   // how often another contender goes on; <0: as often as it likes
	epochMax               uint64 // nobody goes on above it

	planted plantedFault
	jump    bool // planted: members change in one step
	back    bool // planted: a change may be taken back
	oldSeed bool // planted: a seed shows the uuid of the member it replaces
}

// log is the log of a contender.
func (sc *scenario) log(who uint8) string {
	if sc.oneLog {
		return "log"
	}
	return fmt.Sprint("log-", who)
}

// newcomer is the member with that uuid: member-<place>, or s<contender>.<life>.<nth> of that life.
func newcomer(uuid string) Member {
	var a, b, c int
	if n, _ := fmt.Sscanf(uuid, "s%d.%d.%d", &a, &b, &c); n == 3 {
		return Member{ID: block.TargetID(100 + 64*a + 8*b + c), UUID: uuid, Name: uuid}
	}
	if n, _ := fmt.Sscanf(uuid, "member-%d", &a); n != 1 {
		panic("unknown member " + uuid)
	}
	return Member{ID: block.TargetID(a + 1), UUID: uuid, Name: uuid}
}

// choices are what a contender may do after an operation.
func (sc *scenario) choices(e *ending) (cs []choice) {
	l := e.life
	if !l.tenure {
		if l.claims > 0 {
			cs = append(cs, doClaim)
		}
		return cs
	}
	if l.commits > 0 {
		cs = append(cs, doCommit)
		if l.unknown {
			cs = append(cs, doRepeat)
		}
		if sc.release {
			cs = append(cs, doRelease)
		}
	}
	if sc.next != nil && !l.unknown {
		switch joint := len(e.val.Cfg.Next) > 0; {
		case joint:
			cs = append(cs, doFinish)
			if sc.back {
				cs = append(cs, doBack)
			}
		case l.seeded == "" && l.seeds > 0:
			cs = append(cs, doSeed)
		case l.seeded == "":
		default:
			if _, is := e.val.Cfg.Member(l.seeded); is {
				break
			}
			if sc.jump {
				cs = append(cs, doJump)
			} else {
				cs = append(cs, doChange)
			}
		}
	}
	if l.claims > 0 && (l.commits == 0 || sc.retake) {
		cs = append(cs, doClaim)
	}
	return cs
}

// config is the configuration of a commit.
func (sc *scenario) config(op choice, c Config, l life) Config {
	switch op {
	case doChange:
		return c.Change(sc.next(c.Members, newcomer(l.seeded)))
	case doJump:
		return Config{No: c.No + 1, Members: sc.next(c.Members, newcomer(l.seeded))}
	case doFinish:
		return c.Finish()
	case doBack:
		return Config{No: c.No + 1, Members: c.Members}
	}
	return c
}

const (
	contendersMax = 3
	straysMax     = 6
)

// state is a state of the whole. Which ETags there are does not matter, since none comes back: a
// contender that goes by a copy goes by the one that is there, or by one that is no more.
type state struct {
	at       [placesMax]contentID
	who      [contendersMax]standing
	strays   [straysMax]stray // in order; puts nobody waits for, whose condition still holds
	history  int32
	last     int8 // the contender that moved last
	faults   int8
	crashes  int8
	wipes    int8
	switches int8
}

// standing is a contender's part of the state.
type standing struct {
	node  int32 // its situation; 0: it is through
	tip   uint32
	epoch uint8 // with tip: the newest reported when its operation began
	fresh uint8 // bit by target: the copy it goes by is the one that is there

	claims, commits uint8 // that succeeded; told at the end, and no part of the state
}

type stray struct {
	content contentID
	target  uint8
	seed    bool
}

func (s *state) hash() uint64 {
	var b [placesMax*4 + contendersMax*10 + straysMax*6 + 9]byte
	p := b[:0]
	for _, c := range s.at {
		p = binary.LittleEndian.AppendUint32(p, uint32(c))
	}
	for _, w := range s.who {
		p = binary.LittleEndian.AppendUint32(p, uint32(w.node))
		p = binary.LittleEndian.AppendUint32(p, w.tip)
		p = append(p, w.epoch, w.fresh)
	}
	for _, y := range s.strays {
		p = binary.LittleEndian.AppendUint32(p, uint32(y.content))
		p = append(p, y.target)
		if y.seed {
			p = append(p, 1)
		} else {
			p = append(p, 0)
		}
	}
	p = binary.LittleEndian.AppendUint32(p, uint32(s.history))
	p = append(p, byte(s.last), byte(s.faults), byte(s.crashes), byte(s.wipes), byte(s.switches))
	return xxh3.Hash(p)
}

// search visits the states of a scenario, those reached by fewer events first.
type search struct {
	sc   *scenario
	d    *stepper
	past *historian

	visited map[uint64]struct{}
	parents []parent // by state, in the order of discovery
	next    []state

	events   int
	depth    int  // every state within so many events of the start was visited
	complete bool // there are no others
	pruned   int  // events not explored, since an epoch above the highest would come of them
	far      int  // states in which every contender had completed 2 claims and 2 commits
	dropped  int  // strays not kept, for want of room
	bad      string
	badAt    parent

	// of the expansion under way
	from     int32
	ordinal  uint16
	describe func(string) // set while a trace is made:
	want     uint16       // of the event wanted,
	found    state        // which led here
}

type parent struct {
	state   int32
	ordinal uint16 // which of its events
}

func newSearch(sc scenario) *search {
	x := &search{sc: &sc, visited: map[uint64]struct{}{}}
	x.d = newStepper(x.sc)
	x.past = &historian{d: x.d, byKey: map[string]int32{}, next: map[[2]int32]int32{}}
	return x
}

// start is the first state: a pool just created, contenders that know nothing.
func (x *search) start() state {
	member := func(p int) Member { return newcomer(fmt.Sprint("member-", p)) }
	v := Value{Format: ValueFormat, State: Released}
	for _, p := range x.sc.first {
		v.Cfg.Members = append(v.Cfg.Members, member(p))
	}
	for _, p := range x.sc.joint {
		v.Cfg.Next = append(v.Cfg.Next, member(p))
	}
	s := state{faults: x.sc.faults, crashes: x.sc.crashes, wipes: x.sc.wipes, switches: x.sc.switches, last: -1}
	var by uint32
	var vote voteID
	for _, p := range slices.Concat(x.sc.first, x.sc.joint) {
		s.at[p] = x.d.internCopy(Copy{Pool: "pool", Member: member(p).UUID, Ver: 1, Val: v})
		c := x.d.contents[s.at[p]]
		by, vote = by|1<<c.member, c.vote
	}
	s.history = x.past.intern(history{seen: []seenVote{{vote, by, true}}})
	for i := range x.sc.contenders {
		s.who[i].node = x.d.born(life{who: uint8(i), claims: x.sc.claims, commits: x.sc.commits, seeds: x.sc.seeds})
	}
	return s
}

// run visits at most max states, and ends at the first violation.
func (x *search) run(max int) {
	x.add(x.start())
	first := int32(0) // the number of the layer's first state
	for layer := x.next; len(layer) > 0; layer = x.next {
		x.next = nil
		for i := range layer {
			x.from, x.ordinal = first+int32(i), 0
			x.expand(&layer[i])
			if x.bad != "" || len(x.parents) >= max {
				return
			}
		}
		first += int32(len(layer))
		x.depth++
	}
	x.complete = true
}

func (x *search) add(s state) {
	h := s.hash()
	if _, old := x.visited[h]; old {
		return
	}
	x.visited[h] = struct{}{}
	most := [2]uint8{255, 255}
	for _, w := range s.who[:x.sc.contenders] {
		most = [2]uint8{min(most[0], w.claims), min(most[1], w.commits)}
	}
	if most[0] >= 2 && most[1] >= 2 {
		x.far++
	}
	x.parents = append(x.parents, parent{x.from, x.ordinal})
	x.next = append(x.next, s)
}

// event is one event of the expansion under way: f makes it happen to a copy of the state.
func (x *search) event(s *state, who int, f func(n *state), format string, args ...any) {
	if x.bad != "" {
		return
	}
	n := *s
	if who >= 0 && int(s.last) != who && x.sc.switches >= 0 {
		if s.last >= 0 {
			if n.switches == 0 {
				return
			}
			n.switches--
		}
		n.last = int8(who)
	}
	x.ordinal++
	if x.describe != nil {
		if x.ordinal == x.want {
			x.describe(fmt.Sprintf(format, args...))
			f(&n)
			x.found = n
		}
		return
	}
	x.events++
	f(&n)
	if x.bad != "" {
		x.badAt = parent{x.from, x.ordinal}
		return
	}
	x.add(n)
}

func (x *search) fail(format string, args ...any) {
	if x.bad == "" {
		x.bad = fmt.Sprintf(format, args...)
	}
}

// expand visits all states that one event makes of s.
func (x *search) expand(s *state) {
	for i := range x.sc.contenders {
		w := &s.who[i]
		if w.node == 0 {
			continue
		}
		at := x.d.nodes[w.node]
		if at.epoch > x.sc.epochMax {
			x.pruned++
			continue
		}
		for _, c := range at.choices {
			x.event(s, i, func(n *state) {
				h := &x.past.all[n.history]
				n.who[i].tip, n.who[i].epoch = h.tip, uint8(max(bits.Len64(h.claimed), 1)-1)
				x.step(n, i, event{kind: hBegin, arg: int32(c)})
			}, "%d: begins a %v", i, c)
		}
		for j := range x.sc.places {
			t := (i + j) % x.sc.places
			x.answers(s, i, t, at.out[t])
			if x.sc.inOrder && at.out[t].kind != askedNothing {
				break
			}
		}
		if at.linger && (s.faults > 0 || !x.sc.patience) {
			x.event(s, i, func(n *state) {
				if x.sc.patience {
					n.faults--
				}
				x.step(n, i, event{kind: hLinger})
			}, "%d: has waited long enough", i)
		}
		if at.inOp && s.faults > 0 {
			x.event(s, i, func(n *state) { n.faults--; x.step(n, i, event{kind: hDeadline}) }, "%d: its time is up", i)
		}
		if s.crashes > 0 {
			x.event(s, i, func(n *state) { n.crashes--; x.step(n, i, event{kind: hCrash}) }, "%d: crashes", i)
		}
	}
	for j, y := range s.strays {
		if y.content != 0 && (j == 0 || y != s.strays[j-1]) {
			x.event(s, -1, func(n *state) { x.put(n, int(y.target), y.content, y.seed) }, "a late put of %d arrives at %d", y.content, y.target)
		}
	}
	if s.wipes > 0 {
		for t := range x.sc.places {
			if s.at[t] != 0 {
				x.event(s, -1, func(n *state) { x.wipe(n, t) }, "target %d is wiped", t)
			}
		}
	}
}

// answers are the events that end what contender i waits for at target t.
func (x *search) answers(s *state, i, t int, out asked) {
	lose := func(n *state) {
		n.faults--
		x.step(n, i, event{kind: hLost, target: uint8(t)})
	}
	holds := out.kind == askedPut && s.at[t] != 0 && s.who[i].fresh&(1<<t) != 0 || out.kind == askedSeed && s.at[t] == 0
	switch {
	case out.kind == askedNothing:
		return
	case out.kind == askedGet && s.at[t] == 0:
		x.event(s, i, func(n *state) { x.step(n, i, event{kind: hMissing, target: uint8(t)}) }, "%d: finds nothing at %d", i, t)
	case out.kind == askedGet:
		x.event(s, i, func(n *state) {
			n.who[i].fresh |= 1 << t
			x.step(n, i, event{kind: hGot, target: uint8(t), arg: int32(s.at[t])})
		}, "%d: gets %d at %d", i, s.at[t], t)
	case holds:
		x.event(s, i, func(n *state) {
			x.put(n, t, out.content, out.kind == askedSeed)
			n.who[i].fresh |= 1 << t
			x.step(n, i, event{kind: hPut, target: uint8(t)})
		}, "%d: puts %d at %d", i, out.content, t)
		if s.faults == 0 {
			return
		}
		x.event(s, i, func(n *state) { // it arrives twice, and the second time is answered
			x.put(n, t, out.content, out.kind == askedSeed)
			n.faults--
			x.step(n, i, event{kind: hRefused, target: uint8(t)})
		}, "%d: puts %d at %d twice, and hears of the second time", i, out.content, t)
		x.event(s, i, func(n *state) {
			x.put(n, t, out.content, out.kind == askedSeed)
			lose(n)
		}, "%d: puts %d at %d, and the reply is lost", i, out.content, t)
		x.event(s, i, func(n *state) {
			x.late(n, t, out)
			lose(n)
		}, "%d: puts %d at %d, which is late", i, out.content, t)
		return
	default:
		x.event(s, i, func(n *state) { x.step(n, i, event{kind: hRefused, target: uint8(t)}) }, "%d: puts %d at %d, whose condition fails", i, out.content, t)
	}
	if s.faults > 0 {
		x.event(s, i, lose, "%d: hears nothing from %d", i, t)
	}
}

// step moves contender i on by e.
func (x *search) step(n *state, i int, e event) {
	w := &n.who[i]
	st := x.d.step(w.node, e)
	for t, cut := range st.cut {
		if cut.kind == askedPut && w.fresh&(1<<t) != 0 && n.at[t] != 0 || cut.kind == askedSeed && n.at[t] == 0 {
			x.late(n, t, cut)
		}
	}
	if st.bad != "" {
		x.fail("%d: %s", i, st.bad)
	}
	if st.report.claim || st.report.commit {
		if st.report.claim {
			w.claims++
		} else {
			w.commits++
		}
		var bad string
		if n.history, bad = x.past.report(n.history, st.report, w.tip, w.epoch); bad != "" {
			x.fail("%s", bad)
		}
	}
	to := x.d.nodes[st.to]
	if x.describe != nil && to.note != "" {
		x.describe("    " + to.note)
	}
	w.node = st.to
	w.fresh &= to.knows
	if !to.inOp {
		w.tip, w.epoch = 0, 0
	}
}

// put lets a put take effect: whoever goes by the copy before it goes by one that is no more.
func (x *search) put(n *state, t int, c contentID, seed bool) {
	if seed && x.sc.oldSeed {
		k := x.d.contents[c].c
		k.Member = fmt.Sprint("member-", t)
		c = x.d.internCopy(k)
	}
	var bad string
	if n.history, bad = x.past.put(n.history, n.at[t], c); bad != "" {
		x.fail("%s", bad)
	}
	n.at[t] = c
	x.forget(n, t)
}

// wipe empties a target. What is under way to it goes with it.
func (x *search) wipe(n *state, t int) {
	n.wipes--
	n.at[t] = 0
	if x.sc.planted.emptyCopies {
		n.at[t] = x.start().at[t]
	}
	x.forget(n, t)
}

func (x *search) forget(n *state, t int) {
	for i := range n.who {
		n.who[i].fresh &^= 1 << t
	}
	kept := n.strays
	n.strays = [straysMax]stray{}
	j := 0
	for _, y := range kept {
		if y.content != 0 && int(y.target) != t {
			n.strays[j] = y
			j++
		}
	}
}

// late leaves a put on its way.
func (x *search) late(n *state, t int, out asked) {
	if n.strays[straysMax-1].content != 0 {
		x.dropped++
		return
	}
	n.strays[straysMax-1] = stray{out.content, uint8(t), out.kind == askedSeed}
	slices.SortFunc(n.strays[:], func(a, b stray) int { // none come last
		return cmp.Or(-cmp.Compare(a.content, b.content), cmp.Compare(a.target, b.target))
	})
}

// trace tells the events that led to the violation.
func (x *search) trace() string {
	var path []uint16
	for p := x.badAt; p.ordinal > 0; p = x.parents[p.state] {
		path = append(path, p.ordinal)
	}
	slices.Reverse(path)
	var b strings.Builder
	y := &search{sc: x.sc, d: x.d, past: x.past, describe: func(line string) { b.WriteString(line + "\n") }}
	s := x.start()
	for _, o := range path {
		y.ordinal, y.want = 0, o
		y.expand(&s)
		s = y.found
	}
	return b.String() + x.bad
}
