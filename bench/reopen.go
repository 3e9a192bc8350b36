package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"graindisk/block"
	"graindisk/frontend/nbd/nbdclient"
)

// The row reopen: a disk, part of it published, and then so much written with the targets cut off.
const (
	reopenDisk      = 16 << 30
	reopenPublished = 256 << 20
	reopenTier      = 14 << 30
	reopenTail      = 100 << 20 // one of the tier's slots and a half, written again and again
	reopenLimit     = time.Minute
)

// reopen fills the log behind targets that do not answer, kills the gateway, and times its return from
// exec to the first block read by a client. Two ways back: the targets answer for their roots, or still
// not at all. Nothing can be published in either, so that every run finds the same. The least of the runs
// counts: the work is the same each time, and whatever else the machine does only adds to it.
func (b *bench) reopen(ctx context.Context) error {
	b.dropGateway()
	for _, write := range []struct {
		name, bs string
	}{{"4 KiB random", "4k"}, {"64 KiB random", "64k"}} {
		g, s, err := b.reopenSite(ctx, write.name)
		if err != nil {
			return err
		}
		err = b.reopenSizes(ctx, g, s, write.name, write.bs)
		s.close()
		g.proc.kill()
		if err := errors.Join(err, os.RemoveAll(g.dir)); err != nil {
			return err
		}
	}
	return nil
}

const reopenConfig = `data: %[1]s
listen: {nbd: ["unix://%[1]s/nbd.sock"]}
tier: {dir: %[1]s/tier, size: %[2]d}
pools:
  main:
    stripe: {data: 2, parity: 1}
    max_dirty_age: 5s
    targets:
      - {name: a, s3: {endpoint: %[3]q, bucket: bucket-a, path_style: true, access_key_id: k, secret_access_key: s}}
      - {name: b, s3: {endpoint: %[3]q, bucket: bucket-b, path_style: true, access_key_id: k, secret_access_key: s}}
      - {name: c, s3: {endpoint: %[3]q, bucket: bucket-c, path_style: true, access_key_id: k, secret_access_key: s}}
    disks:
      - {name: d, size: %[4]d}
`

// reopenSite makes a pool on three buckets, its disk partly written and published.
func (b *bench) reopenSite(ctx context.Context, name string) (*gateway, *s3Server, error) {
	s, err := startS3()
	if err != nil {
		return nil, nil, err
	}
	g := &gateway{bin: b.bin, dir: filepath.Join(b.dir, "reopen-"+strings.Fields(name)[0])}
	err = func() error {
		if err := os.MkdirAll(g.dir, 0o700); err != nil {
			return err
		}
		text := fmt.Sprintf(reopenConfig, g.dir, int64(reopenTier), s.url, int64(reopenDisk))
		if err := os.WriteFile(g.config(), []byte(text), 0o600); err != nil {
			return err
		}
		if _, err := g.command(ctx, "pool", "create", "main"); err != nil {
			return err
		}
		if err := g.start(); err != nil {
			return err
		}
		if _, err := b.fio(ctx, g.proc, g.uri, load{rw: "randwrite", bs: "4k", depth: 32, pass: reopenPublished}); err != nil {
			return err
		}
		return g.settle(ctx)
	}()
	if err != nil {
		s.close()
		if g.proc != nil {
			g.proc.kill()
		}
		return nil, nil, err
	}
	return g, s, nil
}

// reopenSizes measures at 1, 2 and 4 GiB unpublished.
func (b *bench) reopenSizes(ctx context.Context, g *gateway, s *s3Server, name, bs string) error {
	s.setNetwork(netCut)
	last := int64(0)
	for _, gib := range []int64{1, 2, 4} {
		l := load{rw: "randwrite", bs: bs, depth: 32, pass: reopenDisk, bytes: (gib - last) << 30}
		last = gib
		if _, err := b.fio(ctx, g.proc, g.uri, l); err != nil {
			return err
		}
		mark := bytes.Repeat([]byte{byte(gib)}, block.Size)
		dirty, err := g.unpublished(ctx)
		if err != nil {
			return err
		}
		for _, way := range []struct {
			name string
			net  network
		}{{"targets answer", netRoots}, {"targets hang", netCut}} {
			r := row{Name: fmt.Sprintf("reopen, %d GiB of %s, %s", gib, name, way.name), Unit: seconds, Target: 1, Least: true}
			for range max(3, b.o.rounds) {
				// A reopen seals what it finds: give each a tail of the log that is not sealed, nor synced.
				if _, err := b.fio(ctx, g.proc, g.uri, load{rw: "randwrite", bs: bs, depth: 32, pass: reopenTail}); err != nil {
					return err
				}
				if err := g.writeMark(ctx, mark); err != nil {
					return err
				}
				g.proc.kill()
				s.setNetwork(way.net)
				x, err := g.reopen(ctx, mark)
				if err != nil {
					return err
				}
				r.Values, r.Dirty, r.Reopens = append(r.Values, x.Seconds), append(r.Dirty, dirty), append(r.Reopens, x)
			}
			s.setNetwork(netCut)
			b.report.add(r)
		}
	}
	return nil
}

// reopened is what one start took, until the first read was served.
type reopened struct {
	Seconds    float64 `json:"seconds"`
	CPUSeconds float64 `json:"cpu_seconds"`
	ReadBytes  int64   `json:"read_bytes"`    // as the process asked for, whatever cache they came from
	WriteBytes int64   `json:"written_bytes"` // likewise
}

// writeMark writes what the first read after the next kill must find: something unpublished.
func (g *gateway) writeMark(ctx context.Context, mark []byte) error {
	c, err := nbdclient.Dial(ctx, g.uri, nbdclient.Options{})
	if err != nil {
		return err
	}
	return errors.Join(c.WriteAt(ctx, mark, 0, false), c.Close())
}

// reopen starts a gateway and times the first read.
func (g *gateway) reopen(ctx context.Context, mark []byte) (x reopened, err error) {
	ctx, cancel := context.WithTimeout(ctx, reopenLimit)
	defer cancel()
	uri, began := g.uri, time.Now()
	started := make(chan error, 1)
	go func() {
		err := g.start()
		if err != nil {
			cancel()
		}
		started <- err
	}()
	err = firstRead(ctx, uri, mark)
	x.Seconds = time.Since(began).Seconds()
	if err := errors.Join(<-started, err); err != nil {
		return x, err
	}
	cpu, err := g.proc.cpu()
	if err != nil {
		return x, err
	}
	x.CPUSeconds = cpu.Seconds()
	x.ReadBytes, x.WriteBytes, err = g.proc.io()
	return x, err
}

// firstRead connects again and again until a block is read, which must be the mark.
func firstRead(ctx context.Context, uri string, mark []byte) error {
	p := make([]byte, block.Size)
	for {
		c, err := nbdclient.Dial(ctx, uri, nbdclient.Options{})
		if err == nil {
			if err = c.ReadAt(ctx, p, 0); err == nil && !bytes.Equal(p, mark) {
				err = errors.New("the block written last before the kill is not there")
			}
			return errors.Join(err, c.Close())
		}
		select {
		case <-time.After(time.Millisecond):
		case <-ctx.Done():
			return fmt.Errorf("no block was read: %w", err)
		}
	}
}

// io is what the process has read and written by system calls.
func (p *process) io() (read, written int64, err error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/io", p.cmd.Process.Pid))
	if err != nil {
		return 0, 0, err
	}
	for line := range strings.Lines(string(b)) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), ": ")
		to := map[string]*int64{"rchar": &read, "wchar": &written}[name]
		if to == nil {
			continue
		}
		if *to, err = strconv.ParseInt(value, 10, 64); err != nil {
			return 0, 0, err
		}
	}
	return read, written, nil
}

// remarkReopen is the least of each figure.
func remarkReopen(xs []reopened) string {
	least := func(f func(reopened) float64) float64 {
		return f(slices.MinFunc(xs, func(a, b reopened) int { return int(1e6 * (f(a) - f(b))) }))
	}
	return fmt.Sprintf("%.2f CPU s, %.0f MiB read, %.0f MiB written",
		least(func(x reopened) float64 { return x.CPUSeconds }),
		least(func(x reopened) float64 { return float64(x.ReadBytes) / (1 << 20) }),
		least(func(x reopened) float64 { return float64(x.WriteBytes) / (1 << 20) }))
}
