package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/spf13/cobra"

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
		return noSuchPool(name, slices.Sorted(maps.Keys(cfg.Pools)), cfg.Source)
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
			if t.NeedsCare() {
				errs = append(errs, fmt.Errorf("pool %s: target %s: %s", p.Name, t.Name, t.Trouble(p.Name)))
			}
		}
		if e := p.Exposure; e.Over {
			err := fmt.Errorf("pool %s: %v unpublished, oldest %.0f s; the bound is %.0f s", p.Name, sized(p.UnpublishedBytes), p.UnpublishedAgeSeconds, e.BoundAgeSeconds)
			if e.BoundBytes > 0 {
				err = fmt.Errorf("%w and %v", err, sized(e.BoundBytes))
			}
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}
