package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/spf13/cobra"

	"graindisk/backend/probe"
	"graindisk/config"
	"graindisk/pool"
)

func newPoolCheckCmd(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "check [NAME]",
		Short: "Prove by real requests that the targets keep what a pool stands on, and how fast they are",
		Long: `Try every target of the pool NAME, or of all pools of the configuration: conditional writes that race each
other, ranged reads, reading and listing what was just written, deleting, the clock, latency and
throughput; and look at settings of the bucket that would delete, lock or archive objects. It writes small
objects and one of 8 MiB below probe/ and removes them. The pool may be in use.

It ends with 1 if a target cannot be reached or lacks what a pool needs; what is dangerous is only said.`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error { return runPoolCheck(cmd.Context(), a, args) },
	}
}

// targetReport is what was found of one target.
type targetReport struct {
	Pool   string        `json:"pool"`
	Target string        `json:"target"`
	Error  string        `json:"error,omitempty"` // it could not be probed
	Report *probe.Report `json:"report,omitempty"`
}

func runPoolCheck(ctx context.Context, a *app, names []string) error {
	cfg, err := a.loadConfig(nil)
	if err != nil {
		return err
	}
	if len(names) == 0 {
		names = slices.Sorted(maps.Keys(cfg.Pools))
	}
	var all []targetReport
	unfit := 0
	for _, name := range names {
		pc, ok := cfg.Pools[name]
		if !ok {
			return noSuchPool(name, slices.Sorted(maps.Keys(cfg.Pools)), cfg.Source)
		}
		for _, t := range pc.Targets {
			r, err := checkTarget(ctx, a, name, t)
			if err != nil {
				return err
			}
			all = append(all, r)
			if r.Report == nil || !r.Report.Usable() {
				unfit++
			}
			if !a.json {
				printTargetReport(a, r)
			}
		}
	}
	if a.json {
		if err := a.printJSON(all); err != nil {
			return err
		}
	}
	if unfit > 0 {
		return fmt.Errorf("%d of %d targets cannot hold a pool", unfit, len(all))
	}
	return nil
}

// checkTarget probes a target. Its error is that ctx ended.
func checkTarget(ctx context.Context, a *app, poolName string, t config.Target) (targetReport, error) {
	r := targetReport{Pool: poolName, Target: t.Name}
	s, err := openStore(ctx, t, false, 0, newLogger(a, false))
	if err == nil {
		r.Report, err = probe.Run(ctx, s)
	}
	if err != nil {
		r.Error = err.Error()
	}
	if errors.Is(ctx.Err(), context.Canceled) {
		return r, ctx.Err()
	}
	return r, nil
}

// probeTarget is the pool.Options.Probe of a pool that is being created.
func probeTarget(ctx context.Context, t pool.Target) error {
	r, err := probe.Contract(ctx, t.Store)
	if err != nil {
		return err
	}
	return r.Err()
}

func printTargetReport(a *app, r targetReport) {
	if r.Report == nil {
		fmt.Fprintf(a.stdout, "pool %s, target %s: %s\n", r.Pool, r.Target, r.Error)
		return
	}
	fmt.Fprintf(a.stdout, "pool %s, target %s: %s\n", r.Pool, r.Target, r.Report.Store)
	for _, c := range r.Report.Checks {
		fmt.Fprintf(a.stdout, "  %-9s  %s", c.Result, c.Name)
		if c.Text != "" {
			fmt.Fprintf(a.stdout, ": %s", c.Text)
		}
		if c.Advice != "" {
			fmt.Fprintf(a.stdout, "\n             %s", c.Advice)
		}
		fmt.Fprintln(a.stdout)
	}
	fmt.Fprintf(a.stdout, "  4 KiB: put %.1f ms, read %.1f ms; 8 MiB: put %.1f MB/s, read %.1f MB/s\n",
		1000*r.Report.PutSeconds, 1000*r.Report.ReadSeconds, r.Report.PutPerSecond/1e6, r.Report.ReadPerSecond/1e6)
}
