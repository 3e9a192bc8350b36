package main

import (
	"context"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"graindisk/pool"
)

type rebuildOptions struct {
	dryRun, yes bool
	cut         uint64
}

func newPoolRebuildCmd(a *app) *cobra.Command {
	var o rebuildOptions
	cmd := &cobra.Command{
		Use:   "rebuild NAME",
		Short: "Make the lost root of a pool anew from its shards alone",
		Long: `Rebuild is for a pool whose root is lost on every target, with or without its checkpoints. It lists the
shards, reads the records that every cut left in them, and restores all disks, with their names, sizes and
trims, as of the newest cut that is complete. Then it writes a checkpoint and a new root, released, to all
configured targets; no shard is changed or deleted. Start "gateway serve" afterwards.

All targets must answer; take one that is gone for good out of the configuration first. It refuses if any
target still holds a root: such a pool is opened, not rebuilt. No gateway may run on the pool meanwhile. A
tier whose log the lost root named is not used, and "serve" will say what it holds that was never published.

If something is missing that the newest cut needs, nothing is written, the exit code is 3, and the message
names the newest cut that is whole; --cut restores that one and gives up all that was written later.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error { return runPoolRebuild(cmd.Context(), a, args[0], o) },
	}
	f := cmd.Flags()
	f.BoolVar(&o.dryRun, "dry-run", false, "tell what would be restored and write nothing")
	f.BoolVar(&o.yes, "yes", false, "write the checkpoint and the root")
	f.Uint64Var(&o.cut, "cut", 0, "restore as of this cut instead of the newest")
	return cmd
}

func runPoolRebuild(ctx context.Context, a *app, name string, o rebuildOptions) error {
	if o.dryRun == o.yes {
		return usagef("pool rebuild needs either --dry-run, to see what would be restored, or --yes, to do it")
	}
	cfg, err := a.loadConfig(nil)
	if err != nil {
		return err
	}
	if _, ok := cfg.Pools[name]; !ok {
		return noSuchPool(name, slices.Sorted(maps.Keys(cfg.Pools)), cfg.Source)
	}
	if o.yes {
		data, err := lockData(ctx, cfg.Data, 0)
		if err != nil {
			return err
		}
		defer data.unlock()
	}
	po, err := poolOptions(ctx, cfg, name, newLogger(a, false))
	if err != nil {
		return err
	}
	ro := pool.RebuildOptions{Cut: o.cut, DryRun: o.dryRun, Scratch: filepath.Clean(po.TierDir) + ".rebuild"}
	show := a.newCounter()
	ro.Progress = func(p pool.RebuildProgress) { show.tell(p.Phase, p.Done, p.Total) }
	rep, err := pool.Rebuild(ctx, po, ro)
	show.end()
	if o.yes {
		_ = os.Remove(ro.Scratch) // it is empty, or was never made
	}
	if err != nil {
		return err
	}
	if a.json {
		return a.printJSON(rep)
	}
	printRebuilt(a.stdout, rep)
	return nil
}

func printRebuilt(w io.Writer, r *pool.RebuildReport) {
	done := "would be restored; nothing was written"
	if r.Restored {
		done = "restored"
	}
	fmt.Fprintf(w, "pool %s (%s): %s\n", r.Name, r.UUID, done)
	fmt.Fprintf(w, "  cut %d of epoch %d", r.Cut, r.CutEpoch)
	if !r.CutTime.IsZero() {
		fmt.Fprintf(w, ", written %s", clock(r.CutTime))
	}
	fmt.Fprintf(w, "; stripe %s, new epoch %d\n", r.Stripe, r.Epoch)
	for _, n := range r.Notes {
		fmt.Fprintf(w, "  note: %s\n", n)
	}
	for _, d := range r.Disks {
		fmt.Fprintf(w, "  disk %s: %s\n", d.Name, sized(d.SizeBytes))
	}
	fmt.Fprintf(w, "  %d segments of %d cuts; %d segments below strength, %d others found, %d unreadable shards met\n",
		r.Segments, r.Cuts, r.BelowStrength, r.OtherSegments, r.UnreadableShards)
	for _, t := range r.Targets {
		if t.Witness {
			fmt.Fprintf(w, "  target %s: number %d, a witness\n", t.Name, t.ID)
			continue
		}
		fmt.Fprintf(w, "  target %s: number %d, shards of %d segments\n", t.Name, t.ID, t.Shards)
	}
	if r.BelowStrength > 0 {
		fmt.Fprintf(w, "  some segments have lost shards: they survive fewer losses until they are repaired\n")
	}
}

// counter shows on a terminal's stderr how many things of a phase are done, in one line.
type counter struct {
	w     io.Writer // nil: nowhere
	phase string
	last  time.Time
}

func (a *app) newCounter() *counter {
	if a.json || !isTerminal(a.stderr) {
		return &counter{}
	}
	return &counter{w: a.stderr}
}

func (c *counter) tell(phase string, done, total int) {
	if c.w == nil || phase == c.phase && done < total && time.Since(c.last) < 200*time.Millisecond {
		return
	}
	c.phase, c.last = phase, time.Now()
	if total == 0 {
		fmt.Fprintf(c.w, "\r%s: %d segments\x1b[K", phase, done)
		return
	}
	fmt.Fprintf(c.w, "\r%s: %d of %d segments (%d %%)\x1b[K", phase, done, total, 100*done/total)
}

func (c *counter) end() {
	if c.w != nil && c.phase != "" {
		fmt.Fprint(c.w, "\r\x1b[K")
	}
}
