package root

import (
	"errors"
	"fmt"
	"strings"
)

// What callers branch on.
var (
	// ErrHeld means another log owns the pool and the claim did not carry consent to take it over.
	ErrHeld = errors.New("pool is held")
	// ErrFenced means another claim has won: this tenure is over and must stop.
	ErrFenced = errors.New("fenced by a newer owner of the pool")
	// ErrUnknown means no quorum was heard of in time: the value may be committed now, later or never.
	// The caller commits the same value again.
	ErrUnknown = errors.New("outcome of the commit is unknown")
	// ErrNoQuorum means too few copies of the root could be used.
	ErrNoQuorum = errors.New("no quorum of root copies")
	// ErrNotClaimed means a commit without a tenure: before a claim or after a release.
	ErrNotClaimed = errors.New("the pool is not claimed")
	// ErrExists means a target already holds a root.
	ErrExists = errors.New("a root exists")
	// ErrNotCreated means that every target answered and none holds a root.
	ErrNotCreated = errors.New("no target holds a root: the pool was never created here")
	// ErrMember means a member whose copy is gone: it comes back only as a new one, with another uuid.
	ErrMember = errors.New("the configuration names this member: a wiped target takes a new one")
	// ErrMissing means a target without a root copy.
	ErrMissing = errors.New("root copy is missing")
	// ErrForeign means a copy of another pool, or one member's copy seen at a second target.
	ErrForeign = errors.New("root copy does not belong here")
	// ErrDamaged means a copy that fails its checksum or makes no sense.
	ErrDamaged = errors.New("root copy is damaged")
	// ErrNewer means a copy written by a newer release.
	ErrNewer = errors.New("root copy has a newer format")
)

// HeldError says who holds the pool. It matches ErrHeld.
type HeldError struct {
	Epoch     uint64 // with Owner: what a Consent has to name
	Owner     string // log uuid
	OwnerName string // host
	Cut       uint64 // the newest cut found
	Horizon   uint64 // its log position
}

// Error is one line for people.
func (e *HeldError) Error() string {
	return fmt.Sprintf("held by %s (log %s, epoch %d, published through cut %d)", e.OwnerName, e.Owner, e.Epoch, e.Cut)
}

// Is matches ErrHeld.
func (e *HeldError) Is(target error) bool { return target == ErrHeld }

// QuorumError tells what each target answered when too few were of use. It matches ErrNoQuorum, the
// errors of its targets, and ErrNotCreated when every target answered that it holds nothing.
type QuorumError struct {
	Targets []TargetView
	Absent  []Member // members that no target holds, though every target answered
}

// Error is one line for people.
func (e *QuorumError) Error() string {
	var parts []string
	for _, t := range e.Targets {
		if t.Err != nil {
			parts = append(parts, fmt.Sprintf("target %s: %v", t.Name, t.Err))
		}
	}
	for _, m := range e.Absent {
		parts = append(parts, fmt.Sprintf("member %s (%s) not seen at any target", m.Name, m.UUID))
	}
	what := ErrNoQuorum
	if e.notCreated() {
		what = ErrNotCreated
	}
	if len(parts) == 0 {
		return what.Error()
	}
	return what.Error() + ": " + strings.Join(parts, "; ")
}

// Is matches the sentinels of the whole.
func (e *QuorumError) Is(target error) bool {
	return target == ErrNoQuorum || target == ErrNotCreated && e.notCreated()
}

// Unwrap gives the errors of the targets.
func (e *QuorumError) Unwrap() []error {
	var errs []error
	for _, t := range e.Targets {
		if t.Err != nil {
			errs = append(errs, t.Err)
		}
	}
	return errs
}

func (e *QuorumError) notCreated() bool {
	for _, t := range e.Targets {
		if t.State != Missing {
			return false
		}
	}
	return true
}
