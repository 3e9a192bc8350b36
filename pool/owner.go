package pool

import (
	"context"
	"time"

	"graindisk/pool/root"
)

// OwnerStatus says who owns a pool, as this process knows it.
type OwnerStatus struct {
	Host string `json:"host"`
	Log  string `json:"log"` // uuid
	// HeldSince is when this process claimed the pool; absent before it has.
	HeldSince *time.Time `json:"held_since,omitempty"`
	// LastCommit is when the root was changed last, and LastBeat when a beat was written, by this process.
	LastCommit *time.Time `json:"last_commit,omitempty"`
	LastBeat   *time.Time `json:"last_beat,omitempty"`
	Horizon    uint64     `json:"published_horizon"` // the sequence in the log through which all is published
}

// ownerStatus is the owner by the root v as last committed or read, or, once that is known, by who has fenced us.
func (p *Pool) ownerStatus(v root.Value) OwnerStatus {
	s := OwnerStatus{Host: p.o.Host, Log: p.logID.String(), HeldSince: p.claimedAt.Load(), LastCommit: p.committed.Load(), Horizon: v.Horizon}
	if b := p.lastBeat.Load(); b != nil {
		s.LastBeat = &b.Time
	}
	if f := p.fence.Load(); f != nil {
		s.Host, s.Log, s.HeldSince = f.Lost.ByHost, f.Lost.ByLog, nil
	}
	return s
}

// Release opens the pool on the tier in o, publishes what its log holds, releases it, and reports how it is then. A pool
// that is released already stays so. It fails as Open does, and with ErrShutdown if the targets do not take everything
// within that time, or before ctx ends; the log is intact then and the pool held.
func Release(ctx context.Context, o Options, within time.Duration) (Status, error) {
	o.CreateEmpty, o.Takeover = false, false
	p, err := Open(ctx, o)
	if err != nil {
		return Status{}, err
	}
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	err = p.Close(ctx)
	return p.Status(), err
}
