package root

import (
	"encoding/binary"
	"fmt"
	"slices"
)

// voteID names a vote1; 0: none.
type voteID int32

// vote1 is a value under a ballot and version.
type vote1 struct {
	accepted Ballot
	ver      uint64
	value    uint32 // its number
	owner    string
	state    string
	cfg      Config
	consent  string // of its tenure's claim
}

func (v *vote1) String() string {
	return fmt.Sprintf("%d/%s/%d (value %08x of %s, %s, config %d)", v.accepted.Epoch, v.accepted.Claimant, v.ver, v.value, v.owner, v.state, v.cfg.No)
}

func (v *vote1) compare(o *vote1) int {
	return Copy{Accepted: v.accepted, Ver: v.ver}.compareAccepted(o.accepted, o.ver)
}

// internVote finds or adds what c accepted.
func (d *stepper) internVote(c Copy) voteID {
	if c.Seeded() {
		return 0
	}
	v := vote1{c.Accepted, c.Ver, c.Val.LastCRC, c.Val.Owner, c.Val.State, c.Val.Cfg, c.Val.OwnerName}
	key := fmt.Sprint(v.accepted, v.ver, v.value, v.owner, v.state, v.cfg, v.consent)
	id, ok := d.byVote[key]
	if !ok {
		id = voteID(len(d.votes))
		d.votes = append(d.votes, v)
		d.byVote[key] = id
	}
	return id
}

// history is all of the past that later judgements need: who ever accepted what, and what was reported.
type history struct {
	seen    []seenVote // in order of ballot and version
	tip     uint32     // the newest value reported
	claimed uint64     // bit by epoch: a claim was reported
}

type seenVote struct {
	vote   voteID
	by     uint32 // bit by member number
	chosen bool   // a quorum of its own configuration accepted it
}

// historian judges histories and gives them numbers.
type historian struct {
	d     *stepper
	all   []history
	byKey map[string]int32
	next  map[[2]int32]int32 // what becomes of a history when a content is put
}

func (k *historian) intern(h history) int32 {
	key := make([]byte, 0, 128)
	for _, s := range h.seen {
		key = binary.LittleEndian.AppendUint32(key, uint32(s.vote))
		key = binary.LittleEndian.AppendUint32(key, s.by)
	}
	key = binary.LittleEndian.AppendUint32(key, h.tip)
	key = binary.LittleEndian.AppendUint64(key, h.claimed)
	if id, ok := k.byKey[string(key)]; ok {
		return id
	}
	id := int32(len(k.all))
	k.all = append(k.all, h)
	k.byKey[string(key)] = id
	return id
}

// put is h after content c took the place of content old at a target; bad says what must not be.
func (k *historian) put(h int32, old, c contentID) (after int32, bad string) {
	now := &k.d.contents[c]
	if old != 0 {
		was := &k.d.contents[old].c
		switch {
		case was.Member != now.c.Member: // a new member's seed
		case now.c.Promised.Compare(was.Promised) < 0:
			return h, fmt.Sprintf("the promise of %s falls from %v to %v", was.Member, was.Promised, now.c.Promised)
		case now.c.compareAccepted(was.Accepted, was.Ver) < 0:
			return h, fmt.Sprintf("what %s accepted falls from %v/%d to %v/%d", was.Member, was.Accepted, was.Ver, now.c.Accepted, now.c.Ver)
		}
	}
	if now.vote == 0 {
		return h, ""
	}
	if id, ok := k.next[[2]int32{h, int32(c)}]; ok {
		return id, ""
	}
	n := history{slices.Clone(k.all[h].seen), k.all[h].tip, k.all[h].claimed}
	votes, v := k.d.votes, &k.d.votes[now.vote]
	i, known := slices.BinarySearchFunc(n.seen, v, func(s seenVote, v *vote1) int { return votes[s.vote].compare(v) })
	if known && n.seen[i].vote != now.vote {
		return h, fmt.Sprintf("two values under one version: %v and %v", &votes[n.seen[i].vote], v)
	}
	if !known {
		n.seen = slices.Insert(n.seen, i, seenVote{vote: now.vote})
	}
	s := &n.seen[i]
	s.by |= 1 << now.member
	if !s.chosen && v.cfg.Quorum(func(m string) bool { return k.accepted(s.by, m) }) {
		s.chosen = true
		if bad = k.chosen(n, i); bad != "" {
			return h, bad
		}
	}
	after = k.intern(n)
	k.next[[2]int32{h, int32(c)}] = after
	return after, ""
}

func (k *historian) accepted(by uint32, member string) bool {
	n, ok := k.d.members[member]
	return ok && by&(1<<n) != 0
}

// chosen judges vote i, just chosen, against those chosen next below and next above it.
func (k *historian) chosen(h history, i int) string {
	for j := i - 1; j >= 0; j-- {
		if h.seen[j].chosen {
			if bad := k.follows(h, j, i); bad != "" {
				return bad
			}
			break
		}
	}
	for j := i + 1; j < len(h.seen); j++ {
		if h.seen[j].chosen {
			return k.follows(h, i, j)
		}
	}
	return ""
}

// follows judges whether the chosen vote j may follow the chosen vote i: its value is made from i's, and
// if it changes the owner, then with consent to end the tenure it found.
func (k *historian) follows(h history, i, j int) string {
	p, n := &k.d.votes[h.seen[i].vote], &k.d.votes[h.seen[j].vote]
	if !k.madeFrom(n.value, p.value) {
		return fmt.Sprintf("%v was chosen and lost: %v was chosen, and is not made from it", p, n)
	}
	if n.accepted != p.accepted && n.accepted.Epoch <= p.accepted.Epoch {
		return fmt.Sprintf("the epoch does not rise: %v after %v", n, p)
	}
	if p.state == Released || p.owner == n.owner {
		return ""
	}
	for _, s := range h.seen[i:j] { // it may have adopted any of these
		a := &k.d.votes[s.vote]
		if a.state == Released || a.owner == n.owner || n.consent == consentName(&Consent{a.accepted.Epoch, a.owner}) {
			return ""
		}
	}
	return fmt.Sprintf("%v follows %v without consent (%q)", n, p, n.consent)
}

func (k *historian) madeFrom(v, from uint32) bool {
	for v != from {
		if v == 0 {
			return false
		}
		v = k.d.parent[v]
	}
	return true
}

// report is h after an operation succeeded that began when value tip and claimed epochs were reported.
func (k *historian) report(h int32, r report, tip uint32, epoch uint8) (after int32, bad string) {
	n := k.all[h]
	chosen := func(s seenVote) bool { return s.chosen && k.d.votes[s.vote].value == r.value }
	switch {
	case r.epoch >= 64:
		panic("epochs are bounded below 64")
	case !slices.ContainsFunc(n.seen, chosen):
		return h, fmt.Sprintf("value %08x is reported and was never chosen", r.value)
	case !k.madeFrom(r.value, tip):
		return h, fmt.Sprintf("value %08x was reported, then %08x, which is not made from it", tip, r.value)
	case !k.madeFrom(r.value, n.tip) && !k.madeFrom(n.tip, r.value):
		return h, fmt.Sprintf("values %08x and %08x are both reported, neither made from the other", n.tip, r.value)
	case r.claim && n.claimed&(1<<r.epoch) != 0:
		return h, fmt.Sprintf("epoch %d was claimed twice", r.epoch)
	case uint64(epoch) > r.epoch && r.epoch > 0: // a release has no epoch left to tell
		return h, fmt.Sprintf("epoch %d reports success after epoch %d was claimed", r.epoch, epoch)
	}
	if k.madeFrom(r.value, n.tip) {
		n.tip = r.value
	}
	if r.claim {
		n.claimed |= 1 << r.epoch
	}
	return k.intern(n), ""
}
