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
	"graindisk/pool"
)

func newPoolScrubCmd(a *app) *cobra.Command {
	var rate string
	var q api.ScrubRequest
	cmd := &cobra.Command{
		Use:   "scrub [NAME]",
		Short: "Read everything that a pool has on its targets, check it, and repair what is damaged or missing",
		Long: `Scrub has the running gateway read every shard of every segment of the pool NAME (default: of every pool),
every part of the published checkpoints and every copy of the root. What is damaged or missing is stored anew where it was,
byte for byte, from the other shards or copies. Requests of guests go first. The gateway scrubs by itself, too, slowly:
see scrub_period; "gateway pool status" shows how far it is.

It exits with 0 if all is well, or was repaired; with 3 if damage is left, and names each object, and what of which disk
is lost; with 1 if some targets did not answer. Ctrl-C ends it; what was repaired stays.`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if rate != "" {
				b, err := config.ParseSize(rate)
				if err != nil || b <= 0 {
					return usagef("--rate %q: must be a size a second, such as 50MiB", rate)
				}
				q.BytesPerSecond = int64(b)
			}
			return runPoolScrub(cmd.Context(), a, args, q)
		},
	}
	cmd.Flags().StringVar(&rate, "rate", "", "bytes to read a second at most, such as 50MiB (default as fast as the targets give them)")
	cmd.Flags().BoolVar(&q.DryRun, "dry-run", false, "only report; repair nothing")
	return cmd
}

// poolScrub is what --json prints for each pool.
type poolScrub struct {
	Pool string `json:"pool"`
	pool.ScrubReport
}

func runPoolScrub(ctx context.Context, a *app, names []string, q api.ScrubRequest) error {
	c, err := a.client()
	if err != nil {
		return err
	}
	if len(names) == 0 {
		ps, err := c.Pools(ctx)
		if err != nil {
			return err
		}
		for _, p := range ps {
			names = append(names, p.Name)
		}
	}
	reports := []poolScrub{}
	var errs []error
	for _, name := range names {
		r, err := scrubPool(ctx, a, c, name, q)
		if ctx.Err() != nil {
			return fmt.Errorf("pool %s: scrub stopped before its end; what was repaired stays: %w", name, context.Canceled)
		}
		if err != nil {
			return err
		}
		reports = append(reports, poolScrub{name, r})
		if !a.json {
			printScrubReport(a.stdout, name, r)
		}
		if err := r.Err(); err != nil {
			errs = append(errs, fmt.Errorf("pool %s: %w", name, err))
		}
	}
	err = errors.Join(errs...)
	if !a.json {
		return err
	}
	if perr := a.printJSON(reports); perr != nil {
		return perr
	}
	if err != nil {
		return &reportedError{err}
	}
	return nil
}

// progressGap is the time between two lines that tell how far a long command is.
const progressGap = 5 * time.Second

// scrubPool waits for the scrub of one pool, and tells a person how far it is.
func scrubPool(ctx context.Context, a *app, c *api.Client, name string, q api.ScrubRequest) (pool.ScrubReport, error) {
	pctx, stop := context.WithCancel(ctx)
	var wg sync.WaitGroup
	if isTerminal(a.stderr) && !a.json {
		wg.Go(func() {
			tick := time.NewTicker(progressGap)
			defer tick.Stop()
			for {
				select {
				case <-tick.C:
				case <-pctx.Done():
					return
				}
				if s, err := c.Pool(pctx, name); err == nil && s.Scrub.Running != nil {
					r := s.Scrub.Running
					took := max(time.Since(r.Started).Seconds(), 1)
					fmt.Fprintf(a.stderr, "pool %s: %d of %d segments, %v read, %v/s\n", name, r.Segments, r.SegmentsTotal,
						config.Bytes(r.Bytes), config.Bytes(float64(r.Bytes)/took))
				}
			}
		})
	}
	r, err := c.Scrub(ctx, name, q)
	stop()
	wg.Wait()
	return r, err
}

func printScrubReport(w io.Writer, name string, r pool.ScrubReport) {
	fmt.Fprintf(w, "pool %s: %d segments, %d objects, %v read in %v\n", name, r.Segments, r.Objects, config.Bytes(r.Bytes), r.Ended.Sub(r.Started).Round(time.Millisecond))
	fmt.Fprintf(w, "  %s\n", foundText(r.ScrubCounts))
	if r.Lacking > 0 {
		fmt.Fprintf(w, "  %d shards are not stored: their segments are below strength\n", r.Lacking)
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
		fmt.Fprintf(w, "  scrub round since %s: %d of %d segments; %s\n", r.Started.Local().Format(time.DateTime), r.Segments, r.SegmentsTotal, foundText(r.ScrubCounts))
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

// Scrub implements api.Scrubber.
func (g *gateway) Scrub(ctx context.Context, name string, q api.ScrubRequest) (pool.ScrubReport, error) {
	p := g.all()[name]
	if p == nil {
		return pool.ScrubReport{}, fmt.Errorf("pool %s: %w", name, api.ErrNoPool)
	}
	return p.Scrub(ctx, pool.ScrubOptions{BytesPerSecond: q.BytesPerSecond, DryRun: q.DryRun})
}
