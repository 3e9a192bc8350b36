package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"slices"

	"github.com/spf13/cobra"

	"graindisk/api"
	"graindisk/config"
	"graindisk/pool"
	"graindisk/pool/root"
)

func newPoolStatusCmd(a *app) *cobra.Command {
	var check bool
	cmd := &cobra.Command{
		Use:   "status [NAME]",
		Short: "Show how pools are: owner, what is not yet published, targets",
		Long: `Show how the pool NAME is, or every configured pool. The gateway that runs here is asked, and asks the targets. A
pool that it does not serve, or all of them if none runs, is looked up on the targets: who holds it, or that
it is released, and as of which cut.

It exits with 0 once it has shown that, 10 if there is no such pool, and 1 if neither the gateway nor enough
targets answer. With --check it also exits with 1 if a pool is not served here, no longer publishes, its tier
takes no writes, its exposure is over its bound, or a target was emptied or its place is gone; with 11 if another gateway holds
the pool.`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error { return runPoolStatus(cmd.Context(), a, args, check) },
	}
	cmd.Flags().BoolVar(&check, "check", false, "say by the exit code whether all is well")
	return cmd
}

// poolStatus is one pool: served, or as the targets show it.
type poolStatus struct {
	served   *pool.Status
	outline  *pool.Outline
	noServer error // why it is not served: no gateway runs, or it does not serve this pool
}

func runPoolStatus(ctx context.Context, a *app, names []string, check bool) error {
	cfg, err := a.loadConfig(nil)
	if err != nil {
		return err
	}
	all, err := poolStatuses(ctx, a, cfg, names)
	if err != nil {
		return err
	}
	objects, served := []any{}, []pool.Status{}
	var errs []error
	for _, s := range all {
		if s.served == nil {
			objects = append(objects, s.outline)
			errs = append(errs, s.notServed())
			continue
		}
		objects, served = append(objects, s.served), append(served, *s.served)
	}
	switch {
	case a.json && len(names) == 1:
		err = a.printJSON(objects[0])
	case a.json:
		err = a.printJSON(objects)
	default:
		for _, s := range all {
			s.print(a)
		}
	}
	if err != nil || !check {
		return err
	}
	err = errors.Join(append(errs, checkPools(served))...)
	if err != nil && a.json {
		return &reportedError{err}
	}
	return err
}

// poolStatuses asks the gateway, and the targets about what it does not serve.
func poolStatuses(ctx context.Context, a *app, cfg *config.Config, names []string) ([]poolStatus, error) {
	if len(names) == 0 {
		names = slices.Sorted(maps.Keys(cfg.Pools))
	}
	noServer := error(api.ErrNoPool)
	served := map[string]*pool.Status{}
	ps, err := api.NewClient(cfg.AdminSocket()).Pools(ctx)
	switch {
	case errors.Is(err, api.ErrNoGateway):
		noServer = err
	case err != nil:
		return nil, err
	}
	for i := range ps {
		served[ps[i].Name] = &ps[i]
	}
	var all []poolStatus
	for _, name := range names {
		if s := served[name]; s != nil {
			all = append(all, poolStatus{served: s})
			continue
		}
		if _, ok := cfg.Pools[name]; !ok {
			return nil, noSuchPool(name, slices.Sorted(maps.Keys(cfg.Pools)), cfg.Source)
		}
		o, err := outlineOf(ctx, a, cfg, name)
		if err != nil {
			return nil, err
		}
		all = append(all, poolStatus{outline: o, noServer: noServer})
	}
	return all, nil
}

// outlineOf reads on the targets how a pool is, and leaves no trace there.
func outlineOf(ctx context.Context, a *app, cfg *config.Config, name string) (*pool.Outline, error) {
	log := newLogger(a, false)
	var targets []pool.Target
	var away []pool.OutlineTarget
	var errs []error
	for _, t := range cfg.Pools[name].Targets {
		s, err := openReadOnly(ctx, t, log)
		if err != nil {
			away = append(away, pool.OutlineTarget{Name: t.Name, Root: string(root.Unreachable), RootError: err.Error()})
			errs = append(errs, fmt.Errorf("target %s: %w", t.Name, err))
			continue
		}
		targets = append(targets, pool.Target{Name: t.Name, Store: adapt(s, t, log)})
	}
	if len(targets) == 0 {
		return nil, fmt.Errorf("pool %s: how it is cannot be told: %w", name, errors.Join(errs...))
	}
	ctx, cancel := context.WithTimeoutCause(ctx, api.AskPatience, errors.New("the targets do not answer in time"))
	defer cancel()
	o, err := pool.ReadOutline(ctx, name, targets, filepath.Join(cfg.Tier.Dir, name))
	if err != nil {
		if c := context.Cause(ctx); c != nil && !errors.Is(c, context.Canceled) {
			err = fmt.Errorf("pool %s: %w", name, c)
		}
		return nil, errors.Join(append([]error{err}, errs...)...)
	}
	o.Targets = append(o.Targets, away...)
	return o, nil
}

// notServed is what --check says of a pool that is not served here.
func (s poolStatus) notServed() error {
	o := s.outline
	if o.State == root.Held && !o.OwnerHere {
		return fmt.Errorf("pool %s: not served here: %w", o.Name, &root.HeldError{Epoch: o.Epoch, Owner: o.OwnerLog, OwnerName: o.Owner, Cut: o.PublishedCut})
	}
	return fmt.Errorf("pool %s: not served here: %s", o.Name, o)
}

func (s poolStatus) print(a *app) {
	if s.served != nil {
		printPool(a, *s.served)
		return
	}
	o := s.outline
	fmt.Fprintf(a.stdout, "pool %s: %s\n", o.Name, o)
	if errors.Is(s.noServer, api.ErrNoGateway) {
		fmt.Fprintf(a.stdout, "  not served here: no gateway runs\n")
	} else {
		fmt.Fprintf(a.stdout, "  not served here: the gateway that runs has released it, or was started without it\n")
	}
	if o.Beat != nil && o.State == root.Held {
		fmt.Fprintf(a.stdout, "  %s\n", o.Beat.Dirty())
	}
	if !o.Committed {
		fmt.Fprintf(a.stdout, "  the newest copy of the root may be of a commit that is under way\n")
	}
	for _, t := range o.Targets {
		fmt.Fprintf(a.stdout, "  target %s: copy of the root %s, %s\n", t.Name, t.Root, orElse(t.RootError, t.Where))
	}
}

func orElse(s, other string) string {
	if s != "" {
		return s
	}
	return other
}

// printPool shows a pool that is served.
func printPool(a *app, p pool.Status) {
	fmt.Fprintf(a.stdout, "pool %s: %s, epoch %d, stripe %s, %d segments, cut %d\n", p.Name, p.State, p.Epoch, p.Stripe, p.Segments, p.PublishedCut)
	if p.Error != "" {
		fmt.Fprintf(a.stdout, "  error: %s\n", p.Error)
	}
	if s := p.Log.Trouble(p.Tier.Dir); s != "" {
		fmt.Fprintf(a.stdout, "  %s\n", s)
	}
	printOwner(a.stdout, p)
	fmt.Fprintf(a.stdout, "  unpublished: %s, oldest %.0f s\n", sized(p.UnpublishedBytes), p.UnpublishedAgeSeconds)
	switch e := p.Exposure; {
	case p.Log.Waits != "": // publishing would not help
	case e.WritesWaiting:
		fmt.Fprintf(a.stdout, "  new writes wait until some of it is published\n")
	case e.WriteDelaySeconds > 0:
		fmt.Fprintf(a.stdout, "  new writes are delayed by %.0f ms: the tier fills\n", 1000*e.WriteDelaySeconds)
	}
	fmt.Fprintf(a.stdout, "  stored: %s, of them %s live, %s trapped, %s dead; %d segments are dead\n", sized(p.Space.StoredBytes),
		sized(p.Space.LiveBytes), sized(p.Space.TrappedBytes), sized(p.Space.DeadBytes), p.Space.DeadSegments)
	if s := p.Space; s.DoomedSegments+s.ReclaimedSegments > 0 {
		fmt.Fprintf(a.stdout, "  reclaim: %d segments, %s, wait for the grace; %d, %s, deleted since the start\n",
			s.DoomedSegments, sized(s.DoomedBytes), s.ReclaimedSegments, sized(s.ReclaimedBytes))
	}
	printStrength(a, p)
	if p.Space.Error != "" {
		fmt.Fprintf(a.stdout, "  error: %d segments have wrong counts and are not cleaned: %s\n", p.Space.DamagedSegments, p.Space.Error)
	}
	printScrub(a.stdout, p.Scrub)
	fmt.Fprintf(a.stdout, "  tier: %d slots of %s: %d busy, %d cache, %d free\n", p.Tier.Busy+p.Tier.Clean+p.Tier.Free,
		sized(p.Tier.SlotBytes), p.Tier.Busy, p.Tier.Clean, p.Tier.Free)
	for _, t := range p.Targets {
		printTarget(a, p.Name, t)
	}
}

func printTarget(a *app, poolName string, t pool.TargetStatus) {
	state := "ok"
	switch {
	case t.Avoided:
		state = "failing"
	case t.Root == "":
		state = "not asked yet"
	case t.Root != "ok":
		state = t.Root
		if t.Emptied() {
			state = "emptied"
		}
	}
	if h := t.Health; h != nil && h.State != "ok" {
		state += fmt.Sprintf(", %s since %s, %d requests at a time", h.State, clock(h.Since), h.Concurrency)
	}
	holds := fmt.Sprintf("%d shards", t.Shards)
	if t.Witness {
		holds = "a witness: no shards"
	}
	fmt.Fprintf(a.stdout, "  target %s: %s, %s, %s\n", t.Name, state, t.Where, holds)
	if s := t.Trouble(poolName); s != "" {
		fmt.Fprintf(a.stdout, "    %s\n", s)
	}
}

// noSuchPool refuses a name that is none of those in a place.
func noSuchPool(name string, there []string, where string) error {
	what := fmt.Sprintf("pool %s", name)
	if name == "" {
		what = "a pool without a name"
	}
	if len(there) == 0 {
		return fmt.Errorf("%s: %w: %s has none", what, api.ErrNoPool, where)
	}
	return fmt.Errorf("%s: %w in %s, which has %s", what, api.ErrNoPool, where, list(there))
}
