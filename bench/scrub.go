package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"time"

	"graindisk/block"
	"graindisk/frontend/nbd/nbdclient"
)

// The row scrub: three targets behind lines of their own, one of them half as fast as the others, and reads of
// blocks that are not on the tier.
const (
	scrubDisk    = 256 << 20
	scrubLatency = 10 * time.Millisecond
	scrubSlow    = 25e6 // bytes per second of the slowest target
	scrubReads   = 200  // beside nothing
	scrubGrain   = 64 << 10
)

const scrubConfig = `data: %[1]s
listen: {nbd: ["unix://%[1]s/nbd.sock"]}
tier: {dir: %[1]s/tier, size: 1GiB}
pools:
  main:
    stripe: {data: 2, parity: 1}
    scrub_period: 0
    targets:
      - {name: a, s3: {endpoint: %[2]q, bucket: bucket-a, path_style: true, access_key_id: k, secret_access_key: s}}
      - {name: b, s3: {endpoint: %[2]q, bucket: bucket-b, path_style: true, access_key_id: k, secret_access_key: s}}
      - {name: c, s3: {endpoint: %[2]q, bucket: bucket-c, path_style: true, access_key_id: k, secret_access_key: s}}
    disks:
      - {name: d, size: %[3]d}
`

// scrub measures how much of the slowest target's bandwidth a scrub uses, and what it costs reads beside it.
func (b *bench) scrub(ctx context.Context) (err error) {
	store, err := startS3()
	if err != nil {
		return err
	}
	defer store.close()
	gw := &gateway{bin: b.bin, dir: filepath.Join(b.dir, "scrub")}
	defer func() {
		if gw.proc != nil {
			gw.proc.kill()
		}
		err = errors.Join(err, os.RemoveAll(gw.dir))
	}()
	if err := os.MkdirAll(gw.dir, 0o700); err != nil {
		return err
	}
	if err := os.WriteFile(gw.config(), fmt.Appendf(nil, scrubConfig, gw.dir, store.url, int64(scrubDisk)), 0o600); err != nil {
		return err
	}
	if _, err := gw.command(ctx, "pool", "create", "main"); err != nil {
		return err
	}
	if err := errors.Join(gw.start(), fillNoise(ctx, gw, scrubDisk)); err != nil {
		return err
	}
	used := row{Name: "bandwidth of the slowest target / a scrub's of it", Unit: times, Target: 1.67}
	tail := row{Name: "p99 of 4 KiB read, tier dropped, scrub beside / idle", Unit: times, Target: 1.5}
	var idle, beside []float64
	for range b.o.rounds {
		one, err := scrubRound(ctx, gw, store)
		if err != nil {
			return err
		}
		used.Values = append(used.Values, scrubSlow/one.rate)
		tail.Values = append(tail.Values, one.beside/one.idle)
		idle, beside = append(idle, one.idle), append(beside, one.beside)
		used.Note += fmt.Sprintf("%.1f MB/s, beside reads %.1f; ", one.rate/1e6, one.rateBeside/1e6)
	}
	tail.Note = fmt.Sprintf("ms idle %.1f, beside %.1f", idle, beside)
	b.report.add(used)
	b.report.add(tail)
	return nil
}

// fillNoise writes the disk once and waits until it is published.
func fillNoise(ctx context.Context, gw *gateway, size int64) error {
	c, err := nbdclient.Dial(ctx, gw.uri, nbdclient.Options{})
	if err != nil {
		return err
	}
	defer c.Close()
	rng, p := rand.NewChaCha8([32]byte{2}), make([]byte, 1<<20)
	for off := int64(0); off < size; off += int64(len(p)) {
		_, _ = rng.Read(p) // never fails
		if err := c.WriteAt(ctx, p, off, false); err != nil {
			return err
		}
	}
	return gw.settle(ctx)
}

// scrubbed is what one round measures: p99 in ms, bytes per second of each target.
type scrubbed struct{ idle, beside, rate, rateBeside float64 }

// scrubRound starts from an empty tier.
func scrubRound(ctx context.Context, gw *gateway, store *s3Server) (s scrubbed, err error) {
	store.setLines(nil)
	if err := errors.Join(gw.proc.stop(), os.RemoveAll(filepath.Join(gw.dir, "tier")), gw.start()); err != nil {
		return s, err
	}
	c, err := nbdclient.Dial(ctx, gw.uri, nbdclient.Options{})
	if err != nil {
		return s, err
	}
	defer c.Close()
	store.setLines(map[string]*line{
		"bucket-a": {latency: scrubLatency, rate: 2 * scrubSlow},
		"bucket-b": {latency: scrubLatency, rate: 2 * scrubSlow},
		"bucket-c": {latency: scrubLatency, rate: scrubSlow},
	})
	grains := rand.Perm(scrubDisk / scrubGrain)
	// read reads one block of each of the next n grains, or until stop is closed.
	read := func(n int, stop <-chan struct{}) (took []time.Duration, err error) {
		p := make([]byte, block.Size)
		for ; n > 0 && len(grains) > 0; n-- {
			select {
			case <-stop:
				return took, nil
			default:
			}
			start := time.Now()
			if err := c.ReadAt(ctx, p, int64(grains[0])*scrubGrain); err != nil {
				return took, err
			}
			took, grains = append(took, time.Since(start)), grains[1:]
		}
		return took, nil
	}
	took, err := read(scrubReads, nil)
	if err != nil {
		return s, err
	}
	s.idle = quantile(took, 0.99)
	if s.rate, err = scrubOnce(ctx, gw); err != nil {
		return s, err
	}
	stop, ended := make(chan struct{}), make(chan error, 1)
	go func() {
		var err error
		s.rateBeside, err = scrubOnce(ctx, gw)
		close(stop)
		ended <- err
	}()
	took, err = read(len(grains), stop)
	err = errors.Join(err, <-ended)
	s.beside = quantile(took, 0.99)
	return s, err
}

// scrubOnce runs a scrub and returns the bytes per second that it read of each target.
func scrubOnce(ctx context.Context, gw *gateway) (float64, error) {
	out, err := gw.command(ctx, "pool", "scrub", "main", "--json")
	if err != nil {
		return 0, err
	}
	var r []struct {
		Started, Ended time.Time
		Bytes          int64
	}
	if err := json.Unmarshal(out, &r); err != nil || len(r) != 1 || r[0].Bytes < scrubDisk {
		return 0, fmt.Errorf("scrub says %s: %w", out, err)
	}
	return float64(r[0].Bytes) / 3 / r[0].Ended.Sub(r[0].Started).Seconds(), nil
}
