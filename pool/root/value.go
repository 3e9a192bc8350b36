package root

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"

	"graindisk/block"
)

// Limits of a value.
const (
	CutsMax        = 256 // cuts since the checkpoint; then a checkpoint is forced
	CheckpointsMax = 2
	MembersMax     = 32
)

// The states of a pool.
const (
	Held     = "held"     // an owner may have acknowledged writes that are not published
	Released = "released" // closed cleanly: everything acknowledged is published
)

// Member is one target that holds a copy of the root. A wiped or replaced target is a new member.
type Member struct {
	ID      block.TargetID `json:"id"`
	UUID    string         `json:"uuid"`
	Name    string         `json:"name"`
	Witness bool           `json:"witness,omitempty"` // holds the root and no shards
}

// Config is the set of members. While Next is set, a quorum takes a majority of both sets.
type Config struct {
	No      uint64   `json:"no"` // rises by one with each change
	Members []Member `json:"members"`
	Next    []Member `json:"next,omitempty"`
}

// Quorum reports whether the members for which has is true decide for the whole.
func (c Config) Quorum(has func(uuid string) bool) bool { return c.reachable(has, 0) }

// reachable reports whether has could be a quorum if spare more members joined it.
func (c Config) reachable(has func(uuid string) bool, spare int) bool {
	majority := func(ms []Member) bool {
		n := spare
		for _, m := range ms {
			if has(m.UUID) {
				n++
			}
		}
		return n > len(ms)/2
	}
	return majority(c.Members) && (len(c.Next) == 0 || majority(c.Next))
}

// Member finds a member, of Members or Next, by its uuid.
func (c Config) Member(uuid string) (Member, bool) {
	for _, ms := range [][]Member{c.Members, c.Next} {
		for _, m := range ms {
			if m.UUID == uuid {
				return m, true
			}
		}
	}
	return Member{}, false
}

// Ballot numbers a claim. Ballots are totally ordered; none is used twice.
type Ballot struct {
	Epoch    uint64 `json:"epoch"`
	Claimant string `json:"claimant"` // uuid of the claiming process
}

// Compare orders ballots by epoch, then by claimant.
func (b Ballot) Compare(o Ballot) int {
	return cmp.Or(cmp.Compare(b.Epoch, o.Epoch), strings.Compare(b.Claimant, o.Claimant))
}

// Stripe is the profile of new segments: data and parity shards.
type Stripe struct {
	Data   int `json:"data"`
	Parity int `json:"parity"`
}

// SegmentRef locates a cut's last segment, the one that holds the cut's record.
type SegmentRef struct {
	ID          block.SegmentID  `json:"id"`
	Epoch       uint64           `json:"epoch"`
	K           uint8            `json:"k"`
	M           uint8            `json:"m"`
	Targets     []block.TargetID `json:"targets"` // k+m; 0: that shard is not stored
	ShardBytes  uint32           `json:"shard_bytes"`
	IndexBytes  uint32           `json:"index_bytes"`
	RecordBytes uint32           `json:"record_bytes"`
	Extents     uint32           `json:"extents"`       // how many
	Payload     uint64           `json:"payload_bytes"` // stored bytes of all extents
	CRC         uint32           `json:"crc"`           // of the cut record
}

// CutRef names a published cut.
type CutRef struct {
	Cut     uint64     `json:"cut"`
	Segment SegmentRef `json:"segment"`
}

// CheckpointRef names a published checkpoint, ckpt/<epoch>/<n>/….
type CheckpointRef struct {
	Epoch   uint64           `json:"epoch"`
	N       uint64           `json:"n"`
	Cut     uint64           `json:"cut"` // it holds everything through this cut
	K       uint8            `json:"k"`
	M       uint8            `json:"m"`
	Targets []block.TargetID `json:"targets"`
	Bytes   int64            `json:"bytes"` // of the manifest
	CRC     uint32           `json:"crc"`   // of the manifest
}

// Value is what the register holds.
type Value struct {
	Format       int             `json:"format"` // ValueFormat
	Cfg          Config          `json:"cfg"`
	Owner        string          `json:"owner"`      // log uuid; empty before the first claim
	OwnerName    string          `json:"owner_name"` // host, for messages
	State        string          `json:"state"`      // Held or Released
	SegLimit     uint64          `json:"seg_limit"`  // segment numbers below it may be in use
	Cut          uint64          `json:"cut"`        // the newest cut; 0 before the first
	Horizon      uint64          `json:"horizon"`    // log sequence it publishes through
	LastCRC      uint32          `json:"last_crc"`   // of the newest cut's record
	Cuts         []CutRef        `json:"cuts,omitempty"`
	Checkpoints  []CheckpointRef `json:"checkpoints,omitempty"`
	Stripe       Stripe          `json:"stripe"`
	GrainBytes   int             `json:"grain_bytes"` // fixed at creation
	SegmentBytes int64           `json:"segment_bytes"`
	Params       json.RawMessage `json:"params,omitempty"`
}

// ValueFormat is the format of the values this release writes.
const ValueFormat = 1

// validate reports every way in which v makes no sense.
func (v Value) validate() error {
	if v.Format > ValueFormat {
		return fmt.Errorf("%w: value format %d, this release knows %d; upgrade this gateway", ErrNewer, v.Format, ValueFormat)
	}
	var errs []error
	bad := func(wrong bool, format string, args ...any) {
		if wrong {
			errs = append(errs, fmt.Errorf(format, args...))
		}
	}
	bad(v.Format < 1, "value format is %d", v.Format)
	bad(v.State != Held && v.State != Released, "state is %q", v.State)
	bad(v.State == Held && v.Owner == "", "held by nobody")
	bad(len(v.Cuts) > CutsMax, "%d cuts, at most %d", len(v.Cuts), CutsMax)
	bad(len(v.Checkpoints) > CheckpointsMax, "%d checkpoints, at most %d", len(v.Checkpoints), CheckpointsMax)
	bad(len(v.Params) > 0 && !json.Valid(v.Params), "params are not JSON")
	bad(len(v.Cfg.Members) == 0, "no members")
	errs = append(errs, checkMembers(v.Cfg.Members), checkMembers(v.Cfg.Next))
	return errors.Join(errs...)
}

func checkMembers(ms []Member) error {
	if len(ms) > MembersMax {
		return fmt.Errorf("%d members, at most %d", len(ms), MembersMax)
	}
	for i, m := range ms {
		if m.UUID == "" || m.ID == 0 {
			return fmt.Errorf("member %q has no uuid or no id", m.Name)
		}
		for _, o := range ms[:i] {
			if o.UUID == m.UUID || o.ID == m.ID {
				return fmt.Errorf("members %q and %q share a uuid or an id", o.Name, m.Name)
			}
		}
	}
	return nil
}

// checkSuccessor reports how v may not follow old: what only rises fell, or what is fixed changed.
func (v Value) checkSuccessor(old Value) error {
	var errs []error
	bad := func(wrong bool, format string, args ...any) {
		if wrong {
			errs = append(errs, fmt.Errorf(format, args...))
		}
	}
	bad(v.Owner != old.Owner, "owner changes from %q to %q", old.Owner, v.Owner)
	bad(v.SegLimit < old.SegLimit, "segment limit falls from %d to %d", old.SegLimit, v.SegLimit)
	bad(v.Cut < old.Cut, "cut falls from %d to %d", old.Cut, v.Cut)
	bad(v.Horizon < old.Horizon, "horizon falls from %d to %d", old.Horizon, v.Horizon)
	bad(v.GrainBytes != old.GrainBytes, "grain size changes from %d to %d", old.GrainBytes, v.GrainBytes)
	return errors.Join(errs...)
}

// checkSuccessor reports how c may not follow old: members change one set at a time, by way of a
// config that holds both sets. That one is followed by the new set, or by the old one again. Two tenures
// may try one each: the later of them has first committed the joint config under its own ballot, to a
// majority of both sets, and what the earlier one tried is no longer the highest in any quorum of either.
func (c Config) checkSuccessor(old Config) error {
	same := slices.Equal(c.Members, old.Members)
	ok := false
	switch {
	case c.No == old.No:
		ok = same && slices.Equal(c.Next, old.Next)
	case c.No != old.No+1:
	case len(old.Next) == 0:
		ok = same && len(c.Next) > 0
	default:
		ok = len(c.Next) == 0 && (same || slices.Equal(c.Members, old.Next))
	}
	if !ok {
		return fmt.Errorf("config %d may not follow config %d with these members", c.No, old.No)
	}
	for _, n := range c.Next {
		for _, m := range c.Members {
			if (n.UUID == m.UUID) != (n.ID == m.ID) {
				return fmt.Errorf("member %q and its successor %q share a uuid or an id, not both", m.Name, n.Name)
			}
		}
	}
	return nil
}
