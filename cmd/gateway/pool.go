package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"graindisk/api"
	"graindisk/config"
	"graindisk/pool"
)

func newPoolCmd(a *app) *cobra.Command {
	return newGroupCmd("pool", "Create pools, show how they are, and bring them back",
		newPoolCheckCmd(a),
		newPoolCreateCmd(a),
		newPoolRebuildCmd(a),
		newPoolScrubCmd(a),
		newPoolReleaseCmd(a),
		newPoolStatusCmd(a),
		newPoolFsckCmd(a),
		newPoolRepairCmd(a),
		newPoolReplaceTargetCmd(a),
		newPoolAddTargetCmd(a),
	)
}

func newPoolCreateCmd(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "create NAME",
		Short: "Create a configured pool on its targets, which must be empty",
		Long: `Create the pool NAME of the configuration: write its root to every target. Every target must be
empty below its prefix, and is proven by real requests to keep what a pool stands on: see "gateway pool check".
Nothing is served; start "gateway serve" afterwards.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error { return runPoolCreate(cmd.Context(), a, args[0]) },
	}
}

func runPoolCreate(ctx context.Context, a *app, name string) error {
	cfg, err := a.loadConfig(nil)
	if err != nil {
		return err
	}
	pc, ok := cfg.Pools[name]
	if !ok {
		return fmt.Errorf("pool %s: %w in %s", name, api.ErrNoPool, cfg.Source)
	}
	o, err := poolOptions(ctx, cfg, name, newLogger(a, false))
	if err != nil {
		return err
	}
	o.Probe = probeTarget
	if err := pool.Create(ctx, o); err != nil {
		return err
	}
	if a.json {
		return a.printJSON(map[string]any{"pool": name, "targets": len(pc.Targets), "stripe": pc.Stripe.String()})
	}
	fmt.Fprintf(a.stdout, "pool %s: created on %s, stripe %s\n", name, pc.CountTargets(), pc.Stripe)
	return nil
}

func newPoolStatusCmd(a *app) *cobra.Command {
	var check bool
	cmd := &cobra.Command{
		Use:   "status [NAME]",
		Short: "Show the pools of a running gateway: owner's epoch, what is not yet published, targets",
		Args:  cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			ps, err := runPoolStatus(cmd.Context(), a, args)
			if err != nil || !check {
				return err
			}
			return checkPools(ps)
		},
	}
	cmd.Flags().BoolVar(&check, "check", false, "exit with 1 if a pool no longer publishes, its tier takes no writes, its exposure is over its bound, or a target was emptied")
	return cmd
}

// checkPools says what is wrong with the pools, nil if nothing is.
func checkPools(ps []pool.Status) error {
	var errs []error
	for _, p := range ps {
		if p.Error != "" {
			errs = append(errs, fmt.Errorf("pool %s: %s", p.Name, p.Error))
		}
		if s := p.Log.Trouble(p.Tier.Dir); s != "" {
			errs = append(errs, fmt.Errorf("pool %s: %s", p.Name, s))
		}
		for _, t := range p.Targets {
			if t.Emptied() {
				errs = append(errs, fmt.Errorf("pool %s: target %s: %s", p.Name, t.Name, t.Trouble(p.Name)))
			}
		}
		if e := p.Exposure; e.Over {
			err := fmt.Errorf("pool %s: %v unpublished, oldest %.0f s; the bound is %.0f s", p.Name, config.Bytes(p.UnpublishedBytes), p.UnpublishedAgeSeconds, e.BoundAgeSeconds)
			if e.BoundBytes > 0 {
				err = fmt.Errorf("%w and %v", err, config.Bytes(e.BoundBytes))
			}
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

func runPoolStatus(ctx context.Context, a *app, names []string) ([]pool.Status, error) {
	c, err := a.client()
	if err != nil {
		return nil, err
	}
	var ps []pool.Status
	if len(names) == 0 {
		ps, err = c.Pools(ctx)
	} else {
		ps = make([]pool.Status, 1)
		ps[0], err = c.Pool(ctx, names[0])
	}
	switch {
	case err != nil:
		return nil, err
	case a.json && len(names) == 1:
		return ps, a.printJSON(ps[0])
	case a.json:
		return ps, a.printJSON(ps)
	}
	for _, p := range ps {
		fmt.Fprintf(a.stdout, "pool %s: %s, epoch %d, stripe %s, %d segments, cut %d\n", p.Name, p.State, p.Epoch, p.Stripe, p.Segments, p.PublishedCut)
		if p.Error != "" {
			fmt.Fprintf(a.stdout, "  error: %s\n", p.Error)
		}
		if s := p.Log.Trouble(p.Tier.Dir); s != "" {
			fmt.Fprintf(a.stdout, "  %s\n", s)
		}
		printOwner(a.stdout, p)
		fmt.Fprintf(a.stdout, "  unpublished: %s, oldest %.0f s\n", config.Bytes(p.UnpublishedBytes), p.UnpublishedAgeSeconds)
		switch e := p.Exposure; {
		case p.Log.Waits != "": // publishing would not help
		case e.WritesWaiting:
			fmt.Fprintf(a.stdout, "  new writes wait until some of it is published\n")
		case e.WriteDelaySeconds > 0:
			fmt.Fprintf(a.stdout, "  new writes are delayed by %.0f ms: the tier fills\n", 1000*e.WriteDelaySeconds)
		}
		fmt.Fprintf(a.stdout, "  stored: %s, of them %s live, %s trapped, %s dead; %d segments are dead\n", config.Bytes(p.Space.StoredBytes),
			config.Bytes(p.Space.LiveBytes), config.Bytes(p.Space.TrappedBytes), config.Bytes(p.Space.DeadBytes), p.Space.DeadSegments)
		if s := p.Space; s.DoomedSegments+s.ReclaimedSegments > 0 {
			fmt.Fprintf(a.stdout, "  reclaim: %d segments, %s, wait for the grace; %d, %s, deleted since the start\n",
				s.DoomedSegments, config.Bytes(s.DoomedBytes), s.ReclaimedSegments, config.Bytes(s.ReclaimedBytes))
		}
		printStrength(a, p)
		if p.Space.Error != "" {
			fmt.Fprintf(a.stdout, "  error: %d segments have wrong counts and are not cleaned: %s\n", p.Space.DamagedSegments, p.Space.Error)
		}
		printScrub(a.stdout, p.Scrub)
		fmt.Fprintf(a.stdout, "  tier: %d slots of %s: %d busy, %d cache, %d free\n", p.Tier.Busy+p.Tier.Clean+p.Tier.Free,
			config.Bytes(p.Tier.SlotBytes), p.Tier.Busy, p.Tier.Clean, p.Tier.Free)
		for _, t := range p.Targets {
			state := "ok"
			switch {
			case t.Avoided:
				state = "failing"
			case t.Root == "":
				state = "not asked yet"
			}
			if s := t.Trouble(p.Name); s != "" {
				state = s
			}
			if h := t.Health; h != nil && h.State != "ok" {
				state += fmt.Sprintf(", %s since %s, %d requests at a time", h.State, h.Since.Local().Format(time.TimeOnly), h.Concurrency)
			}
			holds := fmt.Sprintf("%d shards", t.Shards)
			if t.Witness {
				holds = "a witness: no shards"
			}
			fmt.Fprintf(a.stdout, "  target %s: %s, %s, %s\n", t.Name, state, t.Where, holds)
		}
	}
	return ps, nil
}
