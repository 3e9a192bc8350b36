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

// The row repair: the targets of row scrub, of which the slowest is replaced by an empty one. What it held is read from the
// two others and stored on it. In the background that goes on so slowly that a round has to itself what it asks for.
const (
	repairDisk  = 256 << 20
	repairRate  = 64 << 10 // bytes per second, in the background
	repairReads = 200      // beside nothing, and as many writes
)

const repairConfig = `data: %[1]s
listen: {nbd: ["unix://%[1]s/nbd.sock"]}
tier: {dir: %[1]s/tier, size: 1GiB}
pools:
  main:
    stripe: {data: 2, parity: 1}
    scrub_period: 0
    repair_rate: %[4]d
    targets:
      - {name: a, s3: {endpoint: %[2]q, bucket: bucket-a, path_style: true, access_key_id: k, secret_access_key: s}}
      - {name: b, s3: {endpoint: %[2]q, bucket: bucket-b, path_style: true, access_key_id: k, secret_access_key: s}}
      - {name: c, s3: {endpoint: %[2]q, bucket: bucket-c, path_style: true, access_key_id: k, secret_access_key: s}}
    disks:
      - {name: d, size: %[3]d}
`

// repair measures how much of the slowest target's bandwidth a repair uses, and what it costs reads and writes beside it.
func (b *bench) repair(ctx context.Context) (err error) {
	store, err := startS3()
	if err != nil {
		return err
	}
	defer store.close()
	gw := &gateway{bin: b.bin, dir: filepath.Join(b.dir, "repair")}
	defer func() {
		if gw.proc != nil {
			gw.proc.kill()
		}
		err = errors.Join(err, os.RemoveAll(gw.dir))
	}()
	if err := os.MkdirAll(gw.dir, 0o700); err != nil {
		return err
	}
	config := fmt.Appendf(nil, repairConfig, gw.dir, store.url, int64(repairDisk), repairRate)
	if err := os.WriteFile(gw.config(), config, 0o600); err != nil {
		return err
	}
	if _, err := gw.command(ctx, "pool", "create", "main"); err != nil {
		return err
	}
	if err := errors.Join(gw.start(), fillNoise(ctx, gw, repairDisk)); err != nil {
		return err
	}
	used := row{Name: "bandwidth of the slowest target / a repair's of it", Unit: times, Target: 1.67}
	reads := row{Name: "p99 of 4 KiB read, tier dropped, repair beside / idle", Unit: times, Target: 1.5}
	writes := row{Name: "p99 of 4 KiB write, repair beside / idle", Unit: times, Target: 1.5}
	for range b.o.rounds {
		one, err := repairRound(ctx, gw, store)
		if err != nil {
			return err
		}
		used.Values = append(used.Values, one.line/one.rate)
		reads.Values = append(reads.Values, one.beside.read/one.idle.read)
		writes.Values = append(writes.Values, one.beside.write/one.idle.write)
		used.Note += fmt.Sprintf("%.1f of %.1f MB/s, beside requests %.1f; ", one.rate/1e6, one.line/1e6, one.rateBeside/1e6)
		reads.Note += fmt.Sprintf("%.1f and %.1f ms; ", one.beside.read, one.idle.read)
		writes.Note += fmt.Sprintf("%.2f and %.2f ms; ", one.beside.write, one.idle.write)
	}
	b.report.add(used)
	b.report.add(reads)
	b.report.add(writes)
	return nil
}

// tails are the p99 of requests, in ms.
type tails struct{ read, write float64 }

// repaired is what one round measures; rates are of restored bytes per second, and that of plain puts to the target.
type repaired struct {
	line             float64
	rate, rateBeside float64
	idle, beside     tails
}

// repairRound replaces the slowest target twice: what it held is restored with no requests beside, then with some.
func repairRound(ctx context.Context, gw *gateway, store *s3Server) (r repaired, err error) {
	if err := replaceSlowest(ctx, gw, store); err != nil {
		return r, err
	}
	if r.line, err = store.putRate(ctx, "bucket-c"); err != nil {
		return r, err
	}
	if r.rate, err = repairOnce(ctx, gw); err != nil {
		return r, err
	}
	if err := replaceSlowest(ctx, gw, store); err != nil {
		return r, err
	}
	c, err := nbdclient.Dial(ctx, gw.uri, nbdclient.Options{})
	if err != nil {
		return r, err
	}
	defer c.Close()
	client := &grainClient{c: c, left: rand.Perm(repairDisk / scrubGrain)}
	if r.idle, err = client.requests(ctx, repairReads, nil); err != nil {
		return r, err
	}
	stop, ended := make(chan struct{}), make(chan error, 1)
	go func() {
		var err error
		r.rateBeside, err = repairOnce(ctx, gw)
		close(stop)
		ended <- err
	}()
	r.beside, err = client.requests(ctx, len(client.left), stop)
	return r, errors.Join(err, <-ended)
}

// replaceSlowest starts the gateway anew without its tier, has target c replaced by an empty place, and waits until the
// repair in the background has done its first shard, and so waits.
func replaceSlowest(ctx context.Context, gw *gateway, store *s3Server) error {
	store.setLines(nil)
	if err := errors.Join(gw.proc.stop(), os.RemoveAll(filepath.Join(gw.dir, "tier")), gw.start()); err != nil {
		return err
	}
	store.empty("bucket-c")
	if _, err := gw.command(ctx, "pool", "replace-target", "main", "c"); err != nil {
		return err
	}
	wctx, cancel := context.WithTimeout(ctx, settleLimit)
	defer cancel()
	for {
		out, err := gw.command(wctx, "pool", "status", "main", "--json")
		if err != nil {
			return err
		}
		var s struct {
			Segments int
			Strength struct {
				Lost int `json:"lost_shards"`
			}
		}
		if err := json.Unmarshal(out, &s); err != nil {
			return fmt.Errorf("pool status printed %q: %w", out, err)
		}
		if s.Strength.Lost > 0 && s.Strength.Lost < s.Segments {
			break
		}
		select {
		case <-time.After(100 * time.Millisecond):
		case <-wctx.Done():
			return fmt.Errorf("no shard was restored in the background: %s", out)
		}
	}
	store.setLines(map[string]*line{
		"bucket-a": {latency: scrubLatency, rate: 2 * scrubSlow},
		"bucket-b": {latency: scrubLatency, rate: 2 * scrubSlow},
		"bucket-c": {latency: scrubLatency, rate: scrubSlow},
	})
	return nil
}

// repairOnce runs a repair to full strength and returns the bytes per second that it restored.
func repairOnce(ctx context.Context, gw *gateway) (float64, error) {
	out, err := gw.command(ctx, "pool", "repair", "main", "--json")
	if err != nil {
		return 0, err
	}
	var r []struct {
		Job   string
		Bytes int64 `json:"restored_bytes"`
	}
	if err := json.Unmarshal(out, &r); err != nil || len(r) != 1 || r[0].Bytes < repairDisk/4 {
		return 0, fmt.Errorf("repair says %s: %w", out, err)
	}
	if out, err = gw.command(ctx, "job", "list", "--json"); err != nil {
		return 0, err
	}
	var jobs []struct {
		ID             string
		Started, Ended time.Time
	}
	if err := json.Unmarshal(out, &jobs); err != nil {
		return 0, fmt.Errorf("job list says %s: %w", out, err)
	}
	for _, j := range jobs {
		if j.ID == r[0].Job {
			return float64(r[0].Bytes) / j.Ended.Sub(j.Started).Seconds(), nil
		}
	}
	return 0, fmt.Errorf("job %s is not among %s", r[0].Job, out)
}

// grainClient reads one block of each grain once, so that every read misses the tier.
type grainClient struct {
	c    *nbdclient.Client
	left []int // grains
}

// requests reads a block of each of the next n grains, or until stop is closed, and overwrites one after each read.
func (g *grainClient) requests(ctx context.Context, n int, stop <-chan struct{}) (t tails, err error) {
	p := make([]byte, block.Size)
	var reads, writes []time.Duration
	for ; n > 0 && len(g.left) > 0; n-- {
		select {
		case <-stop:
			n = 0
			continue
		default:
		}
		start := time.Now()
		if err := g.c.ReadAt(ctx, p, int64(g.left[0])*scrubGrain); err != nil {
			return t, err
		}
		reads = append(reads, time.Since(start))
		start = time.Now()
		if err := g.c.WriteAt(ctx, p, int64(g.left[0])*scrubGrain, false); err != nil {
			return t, err
		}
		writes, g.left = append(writes, time.Since(start)), g.left[1:]
	}
	if len(reads) == 0 {
		return t, errors.New("the repair ended before the first request")
	}
	return tails{quantile(reads, 0.99), quantile(writes, 0.99)}, nil
}
