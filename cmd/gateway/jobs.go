package main

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"graindisk/api"
	"graindisk/internal/jobs"
)

func newJobCmd(a *app) *cobra.Command {
	return newGroupCmd("job", "Look after the long work of a running gateway",
		newJobListCmd(a),
		newJobCancelCmd(a),
	)
}

func newJobListCmd(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "list",
		Short: "List the jobs under way and those that ended lately",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			js, err := c.Jobs(cmd.Context())
			if err != nil {
				return err
			}
			if a.json {
				return a.printJSON(js)
			}
			if len(js) == 0 {
				fmt.Fprintln(a.stdout, "no jobs since the gateway was started")
			}
			for _, j := range js {
				fmt.Fprintln(a.stdout, jobText(j))
			}
			return nil
		},
	}
}

func newJobCancelCmd(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "cancel ID",
		Short: "End a job; what it has done stays done",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			j, err := c.CancelJob(cmd.Context(), args[0])
			switch {
			case err != nil:
				return err
			case a.json:
				return a.printJSON(j)
			case j.State == jobs.Running:
				fmt.Fprintf(a.stdout, "%s: is being cancelled; what it has done stays done\n", j.ID)
			default:
				fmt.Fprintf(a.stdout, "%s: was %s already\n", j.ID, j.State)
			}
			return nil
		},
	}
}

// jobText is a job in a line.
func jobText(j api.Job) string {
	s := fmt.Sprintf("%s: %s of pool %s, begun %s, %s", j.ID, j.Kind, j.Subject, clock(j.Started), j.State)
	if j.Ended != nil {
		s += " " + clock(*j.Ended)
	}
	if s += ": " + progressText(j.Progress); j.Error != "" {
		s += ": " + j.Error
	}
	return s
}

func progressText(p jobs.Progress) string {
	s := fmt.Sprintf("%d", p.ItemsDone)
	if p.ItemsTotal > 0 {
		s += fmt.Sprintf(" of %d", p.ItemsTotal)
	}
	s += fmt.Sprintf(" segments, %v", sized(p.BytesDone))
	if p.BytesTotal > 0 {
		s += fmt.Sprintf(" of %v", sized(p.BytesTotal))
	}
	return s + fmt.Sprintf(", %v/s", sized(p.BytesPerSecond))
}

// namesOrAll are the pools that a command is for: those named, or all that the gateway serves.
func namesOrAll(ctx context.Context, c *api.Client, names []string) ([]string, error) {
	if len(names) > 0 {
		return names, nil
	}
	ps, err := c.Pools(ctx)
	if err != nil {
		return nil, err
	}
	for _, p := range ps {
		names = append(names, p.Name)
	}
	if len(names) == 0 {
		return nil, fmt.Errorf("%w: the gateway serves none; see \"gateway pool status\"", api.ErrNoPool)
	}
	return names, nil
}

// printDetached names a job that nobody waits for.
func (a *app) printDetached(pool string, j api.Job) {
	if !a.json {
		fmt.Fprintf(a.stdout, "pool %s: job %s has begun; \"gateway job list\" tells how far it is\n", pool, j.ID)
	}
}

// jobPoll is how often a job is looked at that somebody waits for.
const jobPoll = 300 * time.Millisecond

// follow waits for a job to end, with its progress on a terminal, and gives it as it ended. If ctx ends first the
// job is cancelled.
func (a *app) follow(ctx context.Context, c *api.Client, j api.Job) (api.Job, error) {
	show := !a.json && isTerminal(a.stderr)
	tick := time.NewTicker(jobPoll)
	defer tick.Stop()
	for j.State == jobs.Running {
		if show {
			fmt.Fprintf(a.stderr, "\r\x1b[K%s of %s: %s", j.Kind, j.Subject, progressText(j.Progress))
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			cctx, stop := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
			defer stop()
			if _, err := c.CancelJob(cctx, j.ID); err != nil {
				return j, fmt.Errorf("%w; job %s goes on: %w", ctx.Err(), j.ID, err)
			}
			return j, fmt.Errorf("job %s: %w; what it has done stays done", j.ID, ctx.Err())
		}
		next, err := c.Job(ctx, j.ID)
		if err != nil && ctx.Err() == nil {
			return j, fmt.Errorf("job %s: %w", j.ID, err)
		}
		if err == nil {
			j = next
		}
	}
	if show {
		fmt.Fprint(a.stderr, "\r\x1b[K")
	}
	return j, nil
}

// outcome is the report of a job that ended, decoded into report, or the error that ended it.
func outcome(j api.Job, report any) error {
	if len(j.Report) > 0 {
		if err := json.Unmarshal(j.Report, report); err != nil {
			return fmt.Errorf("job %s: report: %w", j.ID, err)
		}
	}
	switch j.State {
	case jobs.Failed:
		return fmt.Errorf("job %s: %s", j.ID, j.Error)
	case jobs.Cancelled:
		return fmt.Errorf("job %s was cancelled: %w", j.ID, context.Canceled)
	}
	return nil
}
