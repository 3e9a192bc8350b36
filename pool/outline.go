package pool

import (
	"context"
	"errors"
	"fmt"
	"time"

	"graindisk/internal/vfs"
	"graindisk/pool/root"
	"graindisk/writeback"
)

// Outline is what the targets say of a pool that is not served by who asks: nothing is claimed or written.
type Outline struct {
	Name         string `json:"name"`
	State        string `json:"state"` // released or held, never what Status says
	UUID         string `json:"uuid"`
	Epoch        uint64 `json:"epoch"`
	PublishedCut uint64 `json:"published_cut"`
	Stripe       string `json:"stripe"`
	// Owner has or had the pool; empty if nobody ever did. Its log may be the one of the tier here.
	Owner     string `json:"owner_host,omitempty"`
	OwnerLog  string `json:"owner_log,omitempty"` // uuid
	OwnerHere bool   `json:"owner_here"`
	// Beat is the newest of this owner, if it left one. Its time is by the owner's clock.
	Beat *Beat `json:"beat,omitempty"`
	// Committed is false if the newest copy of the root may be of a commit that is under way, or never came to its end.
	Committed bool            `json:"committed"`
	Targets   []OutlineTarget `json:"targets"`
}

// OutlineTarget is a target of an Outline.
type OutlineTarget struct {
	Name      string `json:"name"`
	Where     string `json:"where"`
	Root      string `json:"root"` // ok, missing, foreign, damaged, newer or unreachable
	RootError string `json:"root_error,omitempty"`
}

// ReadOutline reads the copies of the root, and the beats. It fails with ErrNoPool if every target answers that it holds
// none, and with root.ErrNoQuorum if too few copies can be read to tell how the pool is. tierDir is where its log would be
// here.
func ReadOutline(ctx context.Context, name string, targets []Target, tierDir string) (*Outline, error) {
	reg, err := root.Open(root.Options{Targets: rootTargets(targets)})
	if err != nil {
		return nil, fmt.Errorf("pool %s: %w", name, err)
	}
	view, err := reg.Read(ctx)
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	if errors.Is(err, root.ErrNotCreated) {
		return nil, fmt.Errorf("pool %s: %w: none holds a root; make the pool with \"gateway pool create %s\", or if it lost its roots, see \"gateway pool rebuild --help\"", name, ErrNoPool, name)
	}
	if err == nil && !view.Quorum {
		err = view.Err()
	}
	if err != nil {
		return nil, fmt.Errorf("pool %s: how it is cannot be told: %w", name, err)
	}
	best, v := view.Best, view.Best.Val
	o := &Outline{
		Name: name, State: v.State, UUID: view.Pool, Epoch: best.Accepted.Epoch, PublishedCut: v.Cut,
		Stripe: fmt.Sprintf("%d+%d", v.Stripe.Data, v.Stripe.Parity),
		Owner:  v.OwnerName, OwnerLog: v.Owner, Committed: view.Committed,
	}
	if id, err := writeback.ReadIdentity(vfs.OS{}, tierDir); err == nil {
		o.OwnerHere = v.Owner == id.Log.String()
	}
	for i, t := range view.Targets {
		ot := OutlineTarget{Name: t.Name, Where: targets[i].Store.String(), Root: string(t.State)}
		if t.Err != nil {
			ot.RootError = t.Err.Error()
		}
		o.Targets = append(o.Targets, ot)
		b, _, err := readBeat(ctx, targets[i].Store) // for people only
		if err == nil && b != nil && b.Pool == o.UUID && b.Log == o.OwnerLog && b.Epoch == o.Epoch && b.newer(o.Beat) {
			o.Beat = b
		}
	}
	return o, nil
}

// String says in a line who has the pool, and what can be done.
func (o *Outline) String() string {
	switch {
	case o.State == root.Released && o.Owner == "":
		return fmt.Sprintf("released at cut %d, and not opened since it was made; \"gateway serve\" opens it", o.PublishedCut)
	case o.State == root.Released:
		return fmt.Sprintf("released at cut %d, epoch %d, by %s: everything is published, and any gateway can open it with \"gateway serve\"", o.PublishedCut, o.Epoch, o.Owner)
	case o.OwnerHere:
		return fmt.Sprintf("held by %s with the log on this tier (epoch %d, published through cut %d); \"gateway serve\" goes on from there", o.Owner, o.Epoch, o.PublishedCut)
	}
	return fmt.Sprintf("held by %s (log %s, epoch %d, published through cut %d)", o.Owner, o.OwnerLog, o.Epoch, o.PublishedCut)
}

// Dirty says in a line what the owner had not published at its last beat.
func (b *Beat) Dirty() string {
	at := fmt.Sprintf("at its last beat, %s by its clock, ", b.Time.UTC().Format(time.RFC3339))
	if b.DirtyBytes == 0 {
		return at + "all that it had acknowledged was published"
	}
	return fmt.Sprintf("%s%s were acknowledged and not published, the oldest %.0f s old", at, bytesText(b.DirtyBytes), b.OldestAgeSeconds)
}

// bytesText is a number of bytes with its unit, and what that is about where it is many.
func bytesText(n int64) string {
	switch {
	case n < 10<<20:
		return fmt.Sprintf("%d bytes", n)
	case n < 10<<30:
		return fmt.Sprintf("%d bytes (%.1f MiB)", n, float64(n)/(1<<20))
	}
	return fmt.Sprintf("%d bytes (%.1f GiB)", n, float64(n)/(1<<30))
}
