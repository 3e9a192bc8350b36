package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/spf13/cobra"

	"graindisk/api"
	"graindisk/grains/segment"
	"graindisk/internal/jobs"
	"graindisk/pool"
)

type repairOptions struct {
	rate   string
	detach bool
}

func newPoolRepairCmd(a *app) *cobra.Command {
	var o repairOptions
	cmd := &cobra.Command{
		Use:   "repair [NAME]",
		Short: "Restore what segments lack, on a running gateway",
		Long: `Restore the shards that the segments of the pool NAME, or of all pools, lack: those that a target did not
take, and those that were on a target which was replaced. The gateway does that by itself, slowly
(repair_rate); this command does it now. Guests go first. Ctrl-C cancels it; what is restored stays so.

It ends with 1 if something could not be restored for now, or a target does not answer or was emptied, and with 3
if segments have too few intact shards left.`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error { return runPoolRepair(cmd.Context(), a, o, args) },
	}
	f := cmd.Flags()
	f.StringVar(&o.rate, "rate", "", "restore at most so many bytes per second, for example 50MiB; at least 64KiB (default: as fast as the targets go)")
	f.BoolVar(&o.detach, "detach", false, "return once the job has begun; see \"gateway job list\"")
	return cmd
}

// repaired is what --json prints for a pool.
type repaired struct {
	Pool string `json:"pool"`
	Job  string `json:"job"`
	pool.RepairReport
}

func runPoolRepair(ctx context.Context, a *app, o repairOptions, names []string) error {
	rate, err := rateFlag(o.rate)
	if err != nil {
		return err
	}
	c, err := a.client()
	if err != nil {
		return err
	}
	if names, err = namesOrAll(ctx, c, names); err != nil {
		return err
	}
	done := []repaired{}
	var errs []error
	for _, name := range names {
		j, err := c.StartRepair(ctx, name, api.RepairRequest{BytesPerSecond: rate})
		if err != nil {
			return err
		}
		r := repaired{Pool: name, Job: j.ID}
		if o.detach {
			done = append(done, r)
			a.printDetached(name, j)
			continue
		}
		if j, err = a.follow(ctx, c, j); err == nil {
			err = outcome(j, &r.RepairReport)
		}
		if err != nil {
			return fmt.Errorf("pool %s: repair: %w", name, err)
		}
		errs = append(errs, r.trouble())
		if done = append(done, r); !a.json {
			fmt.Fprintf(a.stdout, "pool %s: %d shards of %d segments restored, %v\n", r.Pool, r.Restored, r.Segments, sized(r.RestoredBytes))
		}
	}
	err = errors.Join(errs...)
	if !a.json {
		return err
	}
	if perr := a.printJSON(done); perr != nil || err == nil {
		return perr
	}
	return &reportedError{err}
}

// trouble is what a repair could not do.
func (r repaired) trouble() error {
	switch {
	case r.Unreadable > 0:
		return fmt.Errorf("pool %s: %d segments have too few intact shards left, among them %v: %s: %w", r.Pool, r.Unreadable, r.UnreadableIDs, r.Error, segment.ErrDamaged)
	case r.Failed > 0:
		return fmt.Errorf("pool %s: %d shards could not be restored for now: %s", r.Pool, r.Failed, r.Error)
	case r.Waiting > 0:
		return fmt.Errorf("pool %s: %d segments lack shards that no target can take: see \"gateway pool status\" for targets that do not answer, and \"gateway pool replace-target --help\" for those that are lost", r.Pool, r.Waiting)
	case len(r.Away) > 0:
		var errs []error
		for _, t := range r.Away {
			errs = append(errs, fmt.Errorf("target %s, %d shards: %s", t.Target, t.Shards, t.Error))
		}
		return fmt.Errorf("pool %s: not at full strength: %w", r.Pool, errors.Join(errs...))
	}
	return nil
}

func newPoolReplaceTargetCmd(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "replace-target POOL TARGET",
		Short: "Take a target whose place was emptied, or is another now, as a new one",
		Long: `Make the place that the configuration names TARGET a new target of the pool, in the stead of the one that was
lost there: its disk was replaced, its bucket is a new one. The place must answer and be empty; a
directory must be there, and may have been removed and made anew while the gateway runs. What the
old one held counts as lost from then on, and is restored from the others in the background; "gateway
pool repair" does it at once. Whether the new one is a witness the configuration says that the gateway was
started with.

A target that was merely away needs none of this: it is used again when it answers.`,
		Args: cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			return runReplaceTarget(cmd.Context(), a, args[0], args[1], false)
		},
	}
}

func newPoolAddTargetCmd(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "add-target POOL TARGET",
		Short: "Take a target that was added to the configuration into the pool",
		Long: `Make the place that the configuration names TARGET a further target of the pool. The gateway must have been
started with it in its configuration, and the place must be empty. New stripes use it; what is stored
already stays where it is.`,
		Args: cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			return runReplaceTarget(cmd.Context(), a, args[0], args[1], true)
		},
	}
}

func runReplaceTarget(ctx context.Context, a *app, name, target string, add bool) error {
	c, err := a.client()
	if err != nil {
		return err
	}
	t, err := c.ReplaceTarget(ctx, name, target, add)
	if err != nil {
		return err
	}
	switch {
	case a.json:
		return a.printJSON(t)
	case add && t.Witness:
		fmt.Fprintf(a.stdout, "pool %s: target %s is number %d, a witness\n", name, target, t.New)
	case add:
		fmt.Fprintf(a.stdout, "pool %s: target %s is number %d\n", name, target, t.New)
	case t.Witness:
		fmt.Fprintf(a.stdout, "pool %s: target %s is number %d now, a witness\n", name, target, t.New)
	default:
		fmt.Fprintf(a.stdout, "pool %s: target %s is number %d now; what was on number %d is being restored\n", name, target, t.New, t.Old)
	}
	return nil
}

// StartRepair implements api.Worker.
func (g *gateway) StartRepair(name string, r api.RepairRequest) (jobs.Job, error) {
	p, err := g.poolOf(name)
	if err != nil {
		return jobs.Job{}, err
	}
	return g.work.Start("repair", name, func(ctx context.Context, tell func(jobs.Progress)) (any, error) {
		rep, err := p.Repair(ctx, pool.RepairOptions{BytesPerSecond: r.BytesPerSecond, Progress: func(s pool.RepairProgress) {
			tell(jobs.Progress{
				ItemsDone: int64(s.SegmentsDone), ItemsTotal: int64(s.SegmentsTotal),
				BytesDone: s.BytesDone, BytesTotal: s.BytesTotal, BytesPerSecond: s.BytesPerSecond,
			})
		}})
		rep.Away = p.AwayTargets(ctx)
		return rep, err
	})
}

// ReplaceTarget implements api.Worker.
func (g *gateway) ReplaceTarget(ctx context.Context, name, target string, add bool) (pool.TargetChange, error) {
	p, err := g.poolOf(name)
	if err != nil {
		return pool.TargetChange{}, err
	}
	if add {
		return p.AddTarget(ctx, target)
	}
	return p.ReplaceTarget(ctx, target)
}

// Jobs implements api.Worker.
func (g *gateway) Jobs() []jobs.Job { return g.work.List() }

// Job implements api.Worker.
func (g *gateway) Job(id string) (jobs.Job, error) { return g.work.Get(id) }

// CancelJob implements api.Worker.
func (g *gateway) CancelJob(id string) (jobs.Job, error) { return g.work.Cancel(id) }

// poolOf finds a pool.
func (g *gateway) poolOf(name string) (*pool.Pool, error) {
	if p := g.all()[name]; p != nil {
		return p, nil
	}
	return nil, noSuchPool(name, slices.Sorted(maps.Keys(g.all())), "this gateway")
}

// printStrength says what segments lack, if anything.
func printStrength(a *app, p pool.Status) {
	s := p.Strength
	if s.Below == 0 {
		return
	}
	fmt.Fprintf(a.stdout, "  strength: %d segments whole, %d below: %d shards were not taken, %d were on former targets, %d on emptied ones; %v to restore\n",
		s.Whole, s.Below, s.MissingShards, s.LostShards, s.EmptiedShards, sized(s.LackingBytes))
	if s.Unreadable > 0 {
		fmt.Fprintf(a.stdout, "  error: %d segments have too few shards left\n", s.Unreadable)
	}
	switch r := p.Repair; {
	case r.Running:
		fmt.Fprintf(a.stdout, "  repair: %d of %d segments, %v of %v, %v/s\n", r.SegmentsDone, r.SegmentsTotal,
			sized(r.BytesDone), sized(r.BytesTotal), sized(r.BytesPerSecond))
	case r.Error != "":
		fmt.Fprintf(a.stdout, "  repair: %s\n", r.Error)
	}
}
