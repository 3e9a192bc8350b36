package root

// verdict is what a rule makes of a copy.
type verdict uint8

const (
	pending verdict = iota // no answer yet
	change                 // the copy returned is to be put
	done                   // the copy already says so, for good
	refused                // a higher ballot was promised, for good
	down                   // no answer, or no copy to edit
)

// rules are the decisions on which the register's safety stands, in one place: tests replace them
// one at a time and expect the checker to notice.
type rules struct {
	promise func(o Copy, b Ballot) (Copy, verdict)
	accept  func(o Copy, b Ballot, ver uint64, val Value) (Copy, verdict)
	// recheck judges the adopted copy after the promises, as admit judged the surveyed one before.
	recheck func(admit func(Copy) error, w Copy) error
	// version numbers the next value of a tenure that last used ver. unknown: that value's outcome was
	// never learnt; same: the next value is that one again.
	version func(ver uint64, unknown, same bool) uint64
	// follows reports how the configuration c may not follow old.
	follows func(c, old Config) error
	// quorum reports whether those for which has is true decide on a value with configuration c in a
	// tenure whose last committed one was old. In a claim both are those of the value it would adopt.
	quorum func(old, c Config, has func(uuid string) bool) bool
}

var safeRules = rules{
	promise: promise, accept: accept, recheck: recheck, version: version, follows: follows, quorum: quorum,
}

func promise(o Copy, b Ballot) (Copy, verdict) {
	switch c := o.Promised.Compare(b); {
	case c > 0:
		return o, refused
	case c == 0:
		return o, done
	}
	o.Promised = b
	return o, change
}

func accept(o Copy, b Ballot, ver uint64, val Value) (Copy, verdict) {
	switch {
	case o.Promised.Compare(b) > 0:
		return o, refused
	case o.compareAccepted(b, ver) >= 0:
		return o, done
	}
	o.Promised, o.Accepted, o.Ver, o.Val = b, b, ver, val
	return o, change
}

func follows(c, old Config) error { return c.checkSuccessor(old) }

func quorum(old, c Config, has func(uuid string) bool) bool { return old.Quorum(has) && c.Quorum(has) }

func recheck(admit func(Copy) error, w Copy) error { return admit(w) }

// version gives every value a number of its own; only the repetition of a value whose outcome is
// unknown keeps its number. A value that was committed is committed again under a new one, so that
// a commit that returned nil has always reached a quorum after it was called.
func version(ver uint64, unknown, same bool) uint64 {
	if unknown && same {
		return ver
	}
	return ver + 1
}
