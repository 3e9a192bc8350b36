package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spf13/cobra"

	"graindisk/api"
	"graindisk/block"
	"graindisk/config"
	"graindisk/internal/jobs"
	"graindisk/pool"
)

type scrubOptions struct {
	rate           string
	dryRun, detach bool
}

func newPoolScrubCmd(a *app) *cobra.Command {
	var o scrubOptions
	cmd := &cobra.Command{
		Use:   "scrub [NAME]",
		Short: "Read everything that a pool has on its targets, check it, and repair what is damaged or missing",
		Long: `Scrub has the running gateway read every shard of every segment of the pool NAME (default: of every pool),
every part of the published checkpoints and every copy of the root. What is damaged or missing is stored anew where it was,
byte for byte, from the other shards or copies. Requests of guests go first. The gateway scrubs by itself, too, slowly:
see scrub_period; "gateway pool status" shows how far it is.

It exits with 0 if all is well, or was repaired, or is damaged only where nothing needs it any more; with 3 if other damage
is left, and names each object, and what of which disk is lost; with 1 if some targets did not answer. Ctrl-C cancels it;
what was repaired stays.`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error { return runPoolScrub(cmd.Context(), a, o, args) },
	}
	f := cmd.Flags()
	f.StringVar(&o.rate, "rate", "", "read at most so many bytes per second, for example 50MiB; at least 64KiB (default: as fast as the targets go)")
	f.BoolVar(&o.dryRun, "dry-run", false, "only report; repair nothing")
	f.BoolVar(&o.detach, "detach", false, "return once the job has begun; see \"gateway job list\"")
	return cmd
}

// rateFlag is the value of --rate in bytes per second; 0 if it was not given.
func rateFlag(text string) (int64, error) {
	if text == "" {
		return 0, nil
	}
	rate, err := config.ParseSize(text)
	switch {
	case err != nil:
		return 0, usagef("--rate: %w; it is bytes per second, for example 50MiB", err)
	case rate < api.RateMin:
		return 0, usagef("--rate %s: that is %d bytes per second; want at least %v, for example 50MiB", text, int64(rate), config.Bytes(api.RateMin))
	}
	return int64(rate), nil
}

// poolScrub is what --json prints for each pool.
type poolScrub struct {
	Pool              string `json:"pool"`
	Job               string `json:"job"`
	*pool.ScrubReport        // nil with --detach
}

func runPoolScrub(ctx context.Context, a *app, o scrubOptions, names []string) error {
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
	reports := []poolScrub{}
	var errs []error
	for _, name := range names {
		j, err := c.StartScrub(ctx, name, api.ScrubRequest{BytesPerSecond: rate, DryRun: o.dryRun})
		if err != nil {
			return err
		}
		r := poolScrub{Pool: name, Job: j.ID}
		if o.detach {
			reports = append(reports, r)
			a.printDetached(name, j)
			continue
		}
		r.ScrubReport = new(pool.ScrubReport)
		if j, err = a.follow(ctx, c, j); err == nil {
			err = outcome(j, r.ScrubReport)
		}
		if err != nil {
			return fmt.Errorf("pool %s: scrub: %w", name, err)
		}
		if reports = append(reports, r); !a.json {
			printScrubReport(a.stdout, name, *r.ScrubReport)
		}
		if err := r.Err(); err != nil {
			errs = append(errs, fmt.Errorf("pool %s: scrub: %w", name, err))
		}
	}
	err = errors.Join(errs...)
	if !a.json {
		return err
	}
	if perr := a.printJSON(reports); perr != nil || err == nil {
		return perr
	}
	return &reportedError{err}
}

func printScrubReport(w io.Writer, name string, r pool.ScrubReport) {
	fmt.Fprintf(w, "pool %s: %d segments, %d objects, %v read in %v\n", name, r.Segments, r.Objects, sized(r.Bytes), r.Ended.Sub(r.Started).Round(time.Millisecond))
	fmt.Fprintf(w, "  %s\n", foundText(r.ScrubCounts))
	if r.Lacking > 0 {
		fmt.Fprintf(w, "  %d shards are not stored: their segments are below strength\n", r.Lacking)
	}
	if r.Dead > 0 {
		fmt.Fprintf(w, "  %d objects of segments that nothing needs any more are damaged or missing\n", r.Dead)
	}
	for _, p := range r.Problems {
		fmt.Fprintf(w, "  target %s: %s: %s: %s\n", p.Target, p.Object, p.Problem, p.Outcome)
	}
	for _, l := range r.Lost {
		fmt.Fprintf(w, "  LOST: disk %s, bytes %d to %d (%d blocks from block %d on)\n", l.Disk, int64(l.LBA)*block.Size,
			(int64(l.LBA)+int64(l.Blocks))*block.Size-1, l.Blocks, l.LBA)
	}
}

func foundText(c pool.ScrubCounts) string {
	return fmt.Sprintf("damaged %d, missing %d, repaired %d, unrepairable %d, not read %d", c.Damaged, c.Missing, c.Repaired, c.Unrepairable, c.Unread)
}

// printScrub is a pool's scrub in its status.
func printScrub(w io.Writer, s pool.ScrubStatus) {
	if r := s.Running; r != nil {
		fmt.Fprintf(w, "  scrub under way: %d of %d segments; %s\n", r.Segments, r.SegmentsTotal, foundText(r.ScrubCounts))
	}
	if r := s.Round; r != nil {
		fmt.Fprintf(w, "  scrub round since %s: %d of %d segments; %s\n", clock(r.Started), r.Segments, r.SegmentsTotal, foundText(r.ScrubCounts))
	}
	if s.Found.Unrepairable > 0 || s.Found.LostBytes > 0 || s.Found.Damaged+s.Found.Missing > s.Found.Repaired {
		fmt.Fprintf(w, "  error: damage found since the start: %s; see \"gateway pool scrub\"\n", foundText(s.Found))
	}
}

var (
	descScrubBytes = prometheus.NewDesc("gateway_scrub_read_bytes_total", "Bytes that scrubs read from the targets, damage that reads met included.", []string{"pool"}, nil)
	descScrubFound = prometheus.NewDesc("gateway_scrub_objects_total", "Objects that scrubs found: damaged, missing, of these repaired and unrepairable; unread ones, whose targets did not answer.", []string{"pool", "what"}, nil)
	descScrubLost  = prometheus.NewDesc("gateway_scrub_lost_bytes_total", "Bytes of disks that scrubs found lost.", []string{"pool"}, nil)
	descScrubRound = prometheus.NewDesc("gateway_scrub_round_segments", "Segments looked at in the round that goes on by itself, and all there are.", []string{"pool", "which"}, nil)
	descScrubQueue = prometheus.NewDesc("gateway_scrub_queue_segments", "Segments in which reads met damage, not examined yet.", []string{"pool"}, nil)
)

// collectScrub reports what scrubs found.
func collectScrub(ch chan<- prometheus.Metric, s pool.ScrubStatus, name string) {
	send := func(kind prometheus.ValueType, d *prometheus.Desc, v int64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, kind, float64(v), append([]string{name}, labels...)...)
	}
	send(prometheus.CounterValue, descScrubBytes, s.ReadBytes)
	send(prometheus.CounterValue, descScrubLost, s.Found.LostBytes)
	send(prometheus.GaugeValue, descScrubQueue, int64(s.Queue))
	for what, n := range map[string]int64{
		"damaged": s.Found.Damaged, "missing": s.Found.Missing, "repaired": s.Found.Repaired,
		"unrepairable": s.Found.Unrepairable, "unread": s.Found.Unread,
	} {
		send(prometheus.CounterValue, descScrubFound, n, what)
	}
	if r := s.Round; r != nil {
		send(prometheus.GaugeValue, descScrubRound, int64(r.Segments), "done")
		send(prometheus.GaugeValue, descScrubRound, int64(r.SegmentsTotal), "all")
	}
}

// scrubTold is how often a scrub tells how far it is.
const scrubTold = 300 * time.Millisecond

// StartScrub implements api.Worker.
func (g *gateway) StartScrub(name string, q api.ScrubRequest) (jobs.Job, error) {
	p, err := g.poolOf(name)
	if err != nil {
		return jobs.Job{}, err
	}
	return g.work.Start("scrub", name, func(ctx context.Context, tell func(jobs.Progress)) (any, error) {
		wctx, stop := context.WithCancel(ctx)
		var wg sync.WaitGroup
		wg.Go(func() {
			tick := time.NewTicker(scrubTold)
			defer tick.Stop()
			for {
				select {
				case <-tick.C:
				case <-wctx.Done():
					return
				}
				if s := p.ScrubRunning(); s != nil {
					tell(scrubProgress(s.Segments, s.SegmentsTotal, s.Bytes, time.Since(s.Started)))
				}
			}
		})
		r, err := p.Scrub(ctx, pool.ScrubOptions{BytesPerSecond: q.BytesPerSecond, DryRun: q.DryRun})
		stop()
		wg.Wait()
		tell(scrubProgress(r.Segments, r.SegmentsTotal, r.Bytes, r.Ended.Sub(r.Started)))
		return r, err
	})
}

// scrubProgress is how far a scrub is that has read so many bytes in a time.
func scrubProgress(done, total int, bytes int64, took time.Duration) jobs.Progress {
	p := jobs.Progress{ItemsDone: int64(done), ItemsTotal: int64(total), BytesDone: bytes}
	if took > 0 {
		p.BytesPerSecond = float64(bytes) / took.Seconds()
	}
	return p
}
