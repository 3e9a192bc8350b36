package pool

import (
	"context"
	"errors"
	"fmt"
	"path"
	"time"

	"graindisk/block"
	"graindisk/pool/root"
	"graindisk/vdisk"
	"graindisk/writeback"
)

// A pool finds that it has another owner at its next commit, at a beat (beat.go), or when it reads the root after a
// pause (pulse.go). From that moment on nothing is acknowledged; then the list of what was acknowledged and is
// not published is made:
//
//	found ─► gate shut: every request fails with ErrFenced, every reply not yet sent is dropped (hold)
//	          └─► the root is read: by whom, and whether the last cut went through
//	               └─► LOST.json on the tier, the log, the status
//	next start ─► refused, or with --takeover the log goes to quarantine-<log>/, with the list made anew

// fencePatience is how long the root is asked for who it was.
const fencePatience = 10 * time.Second

// Fence is the end of a tenure by another owner.
type Fence struct {
	Lost LostSummary `json:"lost"`
	List string      `json:"list,omitempty"` // the file with its ranges
}

// isFenced tells whether the gate is shut because of another owner.
func (p *Pool) isFenced() bool { return errors.Is(p.gate(), vdisk.ErrFenced) }

// noteFence lists what a fenced pool has lost. It is called once, by the goroutine that was the publisher, or once that has
// ended.
func (p *Pool) noteFence() {
	ctx, cancel := context.WithTimeout(context.Background(), fencePatience)
	defer cancel()
	cut, horizon, sure := p.pub.cut, p.pub.horizon, false
	view, err := p.lookAtRoot(ctx)
	known := err == nil && view.Quorum
	if known {
		cut, horizon, sure = p.publishedThrough(ctx, view.Best.Val)
	}
	lost := p.listLost(horizon, p.diskNames())
	lost.ThroughCut, lost.Sure = cut, sure
	if known {
		lost.by(view.Best)
	}
	f := &Fence{Lost: lost.LostSummary, List: path.Join(p.o.TierDir, lostName)}
	if err := p.writeLost(lost); err != nil {
		f.List = ""
		p.o.Log.Error("list of lost writes not written; the log itself holds them", "pool", p.o.Name, "err", err)
	}
	p.fence.Store(f)
	p.o.Log.Error("fenced: another owner has taken this pool over, and nothing more is acknowledged here",
		"pool", p.o.Name, "by", lost.ByHost, "by_log", lost.ByLog, "by_epoch", lost.ByEpoch, "epoch", lost.Epoch, "published_cut", lost.ThroughCut,
		"lost", lost.String(), "list", f.List)
}

// diskNames are the names of all disks by number.
func (p *Pool) diskNames() map[block.DiskID]string {
	p.mu.Lock()
	defer p.mu.Unlock()
	names := map[block.DiskID]string{}
	for name, d := range p.disks {
		names[d.ID()] = name
	}
	return names
}

// String is a fenced pool's line for people.
func (f *Fence) String() string {
	l := f.Lost
	s := fmt.Sprintf("fenced by %s (epoch %d, log %s); acknowledged here and not published: %d bytes in %d ranges", l.ByHost, l.ByEpoch, l.ByLog, l.Bytes, l.Ranges)
	if f.List != "" {
		s += fmt.Sprintf("; \"gateway inspect quarantine %s\" lists them", path.Dir(f.List))
	}
	return s
}

// listAside writes the list of what the log on the tier holds beyond what the pool's new owner c has, before the log is set
// aside.
func (p *Pool) listAside(ctx context.Context, rec *writeback.Recovered, c *root.Copy) error {
	ctx, cancel := context.WithTimeout(ctx, fencePatience)
	defer cancel()
	cut, horizon, sure := p.publishedThrough(ctx, c.Val)
	names := map[block.DiskID]string{}
	for id, m := range p.pub.disks {
		names[id] = m.Name
	}
	for _, o := range rec.Ops {
		if m, err := decodeOp(o.Payload); err == nil {
			names[o.Disk] = m.Name
		}
	}
	lost := p.listLost(horizon, names)
	lost.ThroughCut, lost.Sure = cut, sure
	lost.by(c)
	p.o.Log.Warn("log goes to quarantine with what was acknowledged and never published", "pool", p.o.Name, "log", lost.Log, "lost", lost.String())
	return p.writeLost(lost)
}

// noteCommit notes a sign of life.
func (p *Pool) noteCommit() {
	now := time.Now().UTC()
	p.committed.Store(&now)
}

// noteClaim notes the begin of a tenure.
func (p *Pool) noteClaim() {
	p.noteCommit()
	p.claimedAt.Store(p.committed.Load())
}
