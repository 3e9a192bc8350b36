package main

import (
	"context"
	"slices"
	"time"
)

// dirt is how many bytes were unpublished while a write row ran. Counts is the rule; the peaks tell
// whether a row that misses it caught the end of a cut at half time and its middle at the end.
type dirt struct {
	Half         int64   `json:"unpublished_at_half_time"`
	End          int64   `json:"unpublished_at_end"`
	PeakToHalf   int64   `json:"peak_of_first_half"`
	PeakFromHalf int64   `json:"peak_of_second_half"`
	Seconds      float64 `json:"seconds"`
	Counts       bool    `json:"counts"`
}

const writeTimeMin = time.Minute // of a write row that counts

// dirtWatch samples what is unpublished, once a second.
type dirtWatch struct {
	gw    *gateway
	start time.Time
	ran   time.Duration // until finish
	quit  chan struct{}
	done  chan error
	bytes []int64
	at    []time.Duration
}

func watchDirt(ctx context.Context, g *gateway) *dirtWatch {
	w := &dirtWatch{gw: g, start: time.Now(), quit: make(chan struct{}), done: make(chan error, 1)}
	go func() {
		tick := time.NewTicker(time.Second)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
			case <-w.quit:
				w.done <- nil
				return
			}
			if err := w.sample(ctx); err != nil {
				w.done <- err
				return
			}
		}
	}()
	return w
}

func (w *dirtWatch) sample(ctx context.Context) error {
	n, err := w.gw.unpublished(ctx)
	w.bytes, w.at = append(w.bytes, n), append(w.at, time.Since(w.start))
	return err
}

// finish takes the last sample, when the load has ended.
func (w *dirtWatch) finish(ctx context.Context) error {
	w.ran = time.Since(w.start)
	close(w.quit)
	if err := <-w.done; err != nil {
		return err
	}
	return w.sample(ctx)
}

// judge says what the samples mean; finish has succeeded.
func (w *dirtWatch) judge() *dirt {
	half, _ := slices.BinarySearch(w.at, w.ran/2)
	half = min(half, len(w.at)-1)
	d := &dirt{
		Half: w.bytes[half], End: w.bytes[len(w.bytes)-1], Seconds: w.ran.Seconds(),
		PeakToHalf: slices.Max(w.bytes[:half+1]), PeakFromHalf: slices.Max(w.bytes[half:]),
	}
	d.Counts = w.ran >= writeTimeMin && d.End <= d.Half
	return d
}
