package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"graindisk/api"
	"graindisk/config"
	"graindisk/pool"
	"graindisk/pool/root"
	"graindisk/vdisk"
)

// releaseDrain bounds the wait for answers to requests that were read when a pool is released.
const releaseDrain = 30 * time.Second

func newPoolReleaseCmd(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "release NAME",
		Short: "Publish everything of a pool and let go of it, so that another gateway can open it",
		Long: `Release the pool NAME, so that another gateway opens it without --takeover and without losing anything.

If a gateway runs on this data directory, it publishes while clients go on, then answers what they have
asked, closes their connections, publishes the rest and gives the pool up; its other pools are not touched. Its
disks are no longer there then: a client that connects again is told that there is no such export. If the
targets do not take everything, nothing changes: the gateway goes on serving. When it is started again it
opens the pool again, unless another gateway holds it then: take it out of the configuration.

If none runs, the pool is opened from its log here, published and released, and nobody is served. A pool that is
released already stays so. It ends with 11 if another gateway holds the pool, or has taken it over from this one.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error { return runPoolRelease(cmd.Context(), a, args[0]) },
	}
}

func runPoolRelease(ctx context.Context, a *app, name string) error {
	cfg, err := a.loadConfig(nil)
	if err != nil {
		return err
	}
	if _, ok := cfg.Pools[name]; !ok {
		return noSuchPool(name, slices.Sorted(maps.Keys(cfg.Pools)), cfg.Source)
	}
	var st pool.Status
	data, err := lockData(ctx, cfg.Data, 0)
	switch {
	case err == nil:
		defer data.unlock()
		o, err := poolOptions(ctx, cfg, name, newLogger(a, false))
		if err != nil {
			return err
		}
		if st, err = pool.Release(ctx, o, cfg.ShutdownTimeout); err != nil {
			return err
		}
	case errors.Is(err, errBusy):
		c, err := a.client()
		if err != nil {
			return err
		}
		st, err = c.ReleasePool(ctx, name)
		if errors.Is(err, api.ErrNoPool) {
			return releasedBefore(ctx, a, cfg, name)
		}
		if err != nil {
			return err
		}
	default:
		return err
	}
	if a.json {
		return a.printJSON(st)
	}
	fmt.Fprintf(a.stdout, "pool %s: released at cut %d, epoch %d: everything is published, and any gateway can open it\n", name, st.PublishedCut, st.Epoch)
	return nil
}

// releasedBefore is the outcome for a configured pool that the gateway which runs here does not serve.
func releasedBefore(ctx context.Context, a *app, cfg *config.Config, name string) error {
	o, err := outlineOf(ctx, a, cfg, name)
	switch {
	case err != nil:
		return err
	case o.State != root.Released:
		return poolStatus{outline: o}.notServed()
	case a.json:
		return a.printJSON(o)
	}
	fmt.Fprintf(a.stdout, "pool %s: was not served here; it is %s\n", name, o)
	return nil
}

// ReleasePool implements api.Gateway.
func (g *gateway) ReleasePool(ctx context.Context, name string) (pool.Status, error) {
	g.onDrop.Lock()
	defer g.onDrop.Unlock()
	p, err := g.poolOf(name)
	if err != nil {
		return pool.Status{}, err
	}
	// What can fail is tried first, while clients go on. After that the caller's leaving stops nothing: half a
	// release would leave a pool that is held and not served.
	if err := p.Publish(ctx); err != nil {
		if errors.Is(err, vdisk.ErrFenced) || errors.Is(err, root.ErrFenced) {
			return pool.Status{}, fmt.Errorf("release pool %s: %w", name, fencedBy(ctx, p, err))
		}
		return pool.Status{}, fmt.Errorf("release pool %s: nothing has changed here: %w", name, err)
	}
	ctx = context.WithoutCancel(ctx)
	disks := map[string]bool{}
	rest := maps.Clone(g.all())
	delete(rest, name)
	g.pools.Store(&rest)
	for _, d := range p.Disks() {
		disks[d.Name] = true
	}
	dctx, cancel := context.WithTimeout(ctx, releaseDrain)
	defer cancel()
	if err := g.drop(dctx, func(export string) bool { return disks[export] }); err != nil && !errors.Is(err, context.DeadlineExceeded) {
		return pool.Status{}, err
	}
	cctx, cancelClose := context.WithTimeout(ctx, g.closeTimeout)
	defer cancelClose()
	if err := p.Close(cctx); err != nil {
		return pool.Status{}, fmt.Errorf("release pool %s: it is no longer served here, and may still be held; start the gateway again to go on, or release it again then: %w", name, err)
	}
	return p.Status(), nil
}

// fencedError says who has taken a pool over. It matches vdisk.ErrFenced.
type fencedError struct{ *pool.Fence }

func (e *fencedError) Error() string        { return e.Fence.String() }
func (e *fencedError) Is(target error) bool { return target == vdisk.ErrFenced }

// fencedBy is err with who has fenced the pool, as soon as that is known.
func fencedBy(ctx context.Context, p *pool.Pool, err error) error {
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for range 100 {
		if f := p.Status().Fenced; f != nil {
			return &fencedError{f}
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return err
		}
	}
	return err
}

// printOwner prints the lines of a pool's status about who owns it.
func printOwner(w io.Writer, p pool.Status) {
	o := p.Owner
	fmt.Fprintf(w, "  owner: %s, log %s", o.Host, o.Log)
	for _, at := range []struct {
		what string
		t    *time.Time
	}{{"held since", o.HeldSince}, {"last commit", o.LastCommit}, {"last beat", o.LastBeat}} {
		if at.t != nil {
			fmt.Fprintf(w, ", %s %s", at.what, clock(*at.t))
		}
	}
	fmt.Fprintln(w)
	if p.Fenced != nil {
		fmt.Fprintf(w, "  %s\n", p.Fenced)
	}
	for _, q := range p.Quarantines {
		what := "nothing that was not published"
		switch {
		case q.Error != "":
			what = q.Error
		case q.Lost != nil:
			what = fmt.Sprintf("%s in %d ranges, of epoch %d", sized(q.Lost.Bytes), q.Lost.Ranges, q.Lost.Epoch)
		}
		fmt.Fprintf(w, "  quarantine %s: %s\n", q.Dir, what)
	}
	if p.RequestCost > 0 {
		fmt.Fprintf(w, "  requests: %d, cost %.4f by the configured prices\n", p.Requests.Total(), p.RequestCost)
	}
}
