package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"time"

	"graindisk/block"
	"graindisk/frontend/nbd/nbdclient"
)

// The rows outage and wear: a pool whose targets are in another process, this one, and a tier of which every
// slot was used once, so that none is prepared any more.
const (
	farTier  = 1 << 30
	farDisk  = 512 << 20
	farFill  = farTier + farTier/4
	farQuiet = 2 * time.Second // for what the gateway does behind a fill

	outageBefore = 5 * time.Second
	outageAway   = 10 * time.Second
	wearBig      = 256 << 20 // bytes, in writes of 64 KiB
	wearSmall    = 8 << 10   // writes of 4 KiB
)

const farConfig = `data: %[1]s
listen: {nbd: ["unix://%[1]s/nbd.sock"]}
tier: {dir: %[1]s/tier, size: %[2]d}
pools:
  main:
    stripe: {data: 2, parity: 1}
    max_dirty_age: %[3]s
    targets:
      - {name: a, s3: {endpoint: %[4]q, bucket: bucket-a, path_style: true, access_key_id: k, secret_access_key: s}}
      - {name: b, s3: {endpoint: %[4]q, bucket: bucket-b, path_style: true, access_key_id: k, secret_access_key: s}}
      - {name: c, s3: {endpoint: %[4]q, bucket: bucket-c, path_style: true, access_key_id: k, secret_access_key: s}}
    disks:
      - {name: d, size: %[5]d}
`

// farSite is a gateway, its store, and a client at depth one.
type farSite struct {
	gw     *gateway
	store  *s3Server
	client *nbdclient.Client
	rng    *rand.ChaCha8
	buf    []byte
}

// withFar runs use on a new site whose tier is full and whose disk is published.
func (b *bench) withFar(ctx context.Context, name string, use func(*farSite) error) (err error) {
	s := &farSite{rng: rand.NewChaCha8([32]byte{1}), buf: make([]byte, 1<<20)}
	if s.store, err = startS3(); err != nil {
		return err
	}
	defer s.store.close()
	s.gw = &gateway{bin: b.bin, dir: filepath.Join(b.dir, name)}
	defer func() {
		if s.gw.proc != nil {
			s.gw.proc.kill()
		}
		err = errors.Join(err, os.RemoveAll(s.gw.dir))
	}()
	if err := os.MkdirAll(s.gw.dir, 0o700); err != nil {
		return err
	}
	text := fmt.Sprintf(farConfig, s.gw.dir, int64(farTier), b.o.dirtyAge, s.store.url, int64(farDisk))
	if err := os.WriteFile(s.gw.config(), []byte(text), 0o600); err != nil {
		return err
	}
	if _, err := s.gw.command(ctx, "pool", "create", "main"); err != nil {
		return err
	}
	if err := s.gw.start(); err != nil {
		return err
	}
	if s.client, err = nbdclient.Dial(ctx, s.gw.uri, nbdclient.Options{}); err != nil {
		return err
	}
	defer s.client.Close()
	if err := s.write(ctx, farFill, 1<<20); err != nil {
		return err
	}
	if err := s.gw.settle(ctx); err != nil {
		return err
	}
	time.Sleep(farQuiet)
	return use(s)
}

// write sends n bytes of noise in writes of size, over the disk from its beginning, again and again.
func (s *farSite) write(ctx context.Context, n int64, size int) error {
	for at := int64(0); at < n; at += int64(size) {
		p := s.buf[:size]
		_, _ = s.rng.Read(p) // never fails
		if err := s.client.WriteAt(ctx, p, at%farDisk, false); err != nil {
			return err
		}
	}
	return nil
}

// writeDurable sends a block to a place of its own choice, flushes, and returns how long both took.
func (s *farSite) writeDurable(ctx context.Context) (time.Duration, error) {
	p := s.buf[:block.Size]
	_, _ = s.rng.Read(p) // never fails
	off := int64(s.rng.Uint64()%(farDisk/block.Size)) * block.Size
	start := time.Now()
	err := s.client.WriteAt(ctx, p, off, false)
	if err == nil {
		err = s.client.Flush(ctx)
	}
	return time.Since(start), err
}

func (s *farSite) writeDurableFor(ctx context.Context, d time.Duration) (took []time.Duration, err error) {
	for start := time.Now(); time.Since(start) < d; {
		one, err := s.writeDurable(ctx)
		if err != nil {
			return nil, err
		}
		took = append(took, one)
	}
	return took, nil
}

// quantile of some durations, in ms; it sorts them.
func quantile(ds []time.Duration, q float64) float64 {
	if len(ds) == 0 {
		return 0
	}
	slices.Sort(ds)
	return ds[min(len(ds)-1, int(q*float64(len(ds))))].Seconds() * 1e3
}

// outage compares durable writes while the store answers with those while it does not, several times, so
// that what the machine does besides shows.
func (b *bench) outage(ctx context.Context) error {
	p50 := row{Name: "p50 of 4 KiB write + FLUSH, store away / before", Unit: times}
	p99 := row{Name: "p99 of 4 KiB write + FLUSH, store away / before", Unit: times, Target: 1.3}
	var at [4][]float64
	err := b.withFar(ctx, "outage", func(s *farSite) error {
		for range b.o.rounds {
			before, err := s.writeDurableFor(ctx, outageBefore)
			if err != nil {
				return err
			}
			s.store.setNetwork(netCut)
			away, err := s.writeDurableFor(ctx, outageAway)
			s.store.setNetwork(netUp)
			if err != nil {
				return err
			}
			for i, v := range []float64{quantile(before, 0.5), quantile(away, 0.5), quantile(before, 0.99), quantile(away, 0.99)} {
				at[i] = append(at[i], v)
			}
			p50.Values = append(p50.Values, quantile(away, 0.5)/quantile(before, 0.5))
			p99.Values = append(p99.Values, quantile(away, 0.99)/quantile(before, 0.99))
			if err := s.gw.settle(ctx); err != nil {
				return err
			}
		}
		return nil
	})
	p50.Note = fmt.Sprintf("ms before %.2f, away %.2f; ratios %.2f", at[0], at[1], p50.Values)
	p99.Note = fmt.Sprintf("ms before %.2f, away %.2f; ratios %.2f", at[2], at[3], p99.Values)
	b.report.add(p50)
	b.report.add(p99)
	return err
}

// wear counts what the gateway writes to its SSD for each byte that a client writes, everything included.
func (b *bench) wear(ctx context.Context) error {
	big := row{Name: "SSD bytes per byte, 64 KiB writes", Unit: times, Target: 1.15}
	small := row{Name: "SSD bytes per byte, 4 KiB writes, each flushed", Unit: times, Target: 2.2}
	err := b.withFar(ctx, "wear", func(s *farSite) error {
		count := func(r *row, bytes int64, write func() error) error {
			disk0, err0 := s.gw.proc.writtenBytes()
			cpu0, err1 := s.gw.proc.cpu()
			asked0, err2 := s.gw.requests(ctx)
			err := errors.Join(err0, err1, err2, write(), s.gw.settle(ctx))
			disk1, err0 := s.gw.proc.writtenBytes()
			cpu1, err1 := s.gw.proc.cpu()
			asked1, err2 := s.gw.requests(ctx)
			gib := float64(bytes) / (1 << 30)
			r.Values = append(r.Values, float64(disk1-disk0)/float64(bytes))
			r.Note = fmt.Sprintf("%.2f CPU s/GiB, %.0f requests/GiB", (cpu1-cpu0).Seconds()/gib, float64(asked1-asked0)/gib)
			return errors.Join(err, err0, err1, err2)
		}
		for range b.o.rounds {
			err := count(&big, wearBig, func() error { return s.write(ctx, wearBig, 64<<10) })
			if err != nil {
				return err
			}
			err = count(&small, wearSmall*block.Size, func() error {
				for range wearSmall {
					if _, err := s.writeDurable(ctx); err != nil {
						return err
					}
				}
				return nil
			})
			if err != nil {
				return err
			}
		}
		return nil
	})
	b.report.add(big)
	b.report.add(small)
	return err
}
