package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"
)

func (b *bench) randRead(ctx context.Context) error {
	return b.readRow(ctx, row{Name: "4 KiB random read, depth 32, cached", Unit: iops}, load{rw: "randread", bs: "4k", depth: 32, time: b.o.readTime})
}

func (b *bench) seqRead(ctx context.Context) error {
	return b.readRow(ctx, row{Name: "1 MiB sequential read, depth 4, cached", Unit: mbps}, load{rw: "read", bs: "1M", depth: 4, time: b.o.readTime})
}

// readRow measures all servers in turn, starting with another one in each round.
func (b *bench) readRow(ctx context.Context, r row, l load) error {
	if err := b.filled(ctx); err != nil {
		return err
	}
	if err := b.startQemus(ctx); err != nil {
		return err
	}
	r.Load = l.flags(b.o.disk)
	for i := range b.o.rounds {
		for j := range 1 + len(b.qemus) {
			if err := b.once(ctx, &r, l, (i+j)%(1+len(b.qemus))); err != nil {
				return err
			}
		}
	}
	b.report.add(r)
	return nil
}

// once adds a run of server which to the row: 0 is the gateway, the others are the baselines.
func (b *bench) once(ctx context.Context, r *row, l load, which int) error {
	if which == 0 {
		s, err := b.fio(ctx, b.gw.proc, b.gw.uri, l)
		r.Gateway = append(r.Gateway, s)
		return err
	}
	q := b.qemus[which-1]
	s, err := b.fio(ctx, q.proc, q.uri, l)
	r.baseline(q.name, s)
	return err
}

// coldBytes is the most that one cold run reads.
const coldBytes = 512 << 20

// coldRead reads parts of the disk, each once, after the tier was dropped. The raw file leaves the
// page cache before each run too, so that all servers read from the disk.
func (b *bench) coldRead(ctx context.Context) error {
	if err := b.filled(ctx); err != nil {
		return err
	}
	if err := b.startQemus(ctx); err != nil {
		return err
	}
	if err := b.gw.dropTier(); err != nil {
		return err
	}
	r := row{Name: "1 MiB sequential read, depth 4, tier dropped", Unit: mbps}
	n := int64(b.o.rounds)
	l := load{rw: "read", bs: "1M", depth: 4, pass: min(coldBytes, b.o.disk/n>>20<<20)}
	for i := range n {
		l.offset = i * l.pass
		for which := range 1 + len(b.qemus) {
			if which > 0 {
				if err := dropCache(filepath.Join(b.dir, "raw")); err != nil {
					return err
				}
			}
			if err := b.once(ctx, &r, l, which); err != nil {
				return err
			}
		}
	}
	r.Load = l.flags(b.o.disk)
	b.report.add(r)
	return nil
}

func (b *bench) writeFlush(ctx context.Context) error {
	if err := b.filled(ctx); err != nil {
		return err
	}
	return b.writeRow(ctx, row{Name: "4 KiB random write + FLUSH, depth 1", Unit: iops}, load{rw: "randwrite", bs: "4k", depth: 1, fsync: 1})
}

func (b *bench) randWrite(ctx context.Context) error {
	if err := b.filled(ctx); err != nil {
		return err
	}
	return b.writeRow(ctx, row{Name: "4 KiB random write, depth 32", Unit: iops}, load{rw: "randwrite", bs: "4k", depth: 32})
}

// seqWrite starts with an empty pool: what the rows before it have stored would fill the disk.
func (b *bench) seqWrite(ctx context.Context) error {
	b.dropGateway()
	if err := b.freshGateway(ctx); err != nil {
		return err
	}
	return b.writeRow(ctx, row{Name: "1 MiB sequential write, depth 4", Unit: mbps}, load{rw: "write", bs: "1M", depth: 4})
}

// writeRow runs the baselines in rounds and the gateway once, long, after the first of them.
func (b *bench) writeRow(ctx context.Context, r row, l load) error {
	if err := b.startQemus(ctx); err != nil {
		return err
	}
	for i := range b.o.rounds {
		l.time = b.o.readTime
		for j := range b.qemus {
			if err := b.once(ctx, &r, l, 1+(i+j)%len(b.qemus)); err != nil {
				return err
			}
		}
		if i > 0 {
			continue
		}
		l.time = b.o.writeTime
		r.Load = l.flags(b.o.disk)
		asked0, err := b.gw.requests(ctx)
		if err != nil {
			return err
		}
		watch := watchDirt(ctx, b.gw)
		if err := errors.Join(b.once(ctx, &r, l, 0), watch.finish(ctx)); err != nil {
			return err
		}
		asked1, err := b.gw.requests(ctx)
		if err != nil {
			return err
		}
		r.Dirt = watch.judge()
		r.Note = fmt.Sprintf("%.0f requests/GiB", float64(asked1-asked0)/(float64(r.Gateway[0].Bytes)/(1<<30)))
	}
	b.report.add(r)
	return nil
}

// recover kills the gateway while it is being written to, and times its return until it accepts
// clients again; several times, with the data left unpublished by the first.
func (b *bench) recover(ctx context.Context) error {
	if err := b.filled(ctx); err != nil {
		return err
	}
	if _, err := b.fio(ctx, b.gw.proc, b.gw.uri, load{rw: "randwrite", bs: "4k", depth: 32, time: b.o.dirtyAge}); err != nil {
		return err
	}
	r := row{Name: "reopen after kill -9", Unit: seconds, Target: 1}
	for range max(5, b.o.rounds) {
		n, err := b.gw.unpublished(ctx)
		if err != nil {
			return err
		}
		b.gw.proc.kill()
		start := time.Now()
		if err := b.gw.start(); err != nil {
			return err
		}
		r.Values = append(r.Values, time.Since(start).Seconds())
		r.Dirty = append(r.Dirty, n)
	}
	b.report.add(r)
	return nil
}

// filled has the gateway serve a disk that is full and published.
func (b *bench) filled(ctx context.Context) error {
	if b.gw == nil {
		if err := b.freshGateway(ctx); err != nil {
			return err
		}
		l := load{rw: "write", bs: "1M", depth: 4, pass: b.o.disk}
		if _, err := b.fio(ctx, b.gw.proc, b.gw.uri, l); err != nil {
			return fmt.Errorf("fill the disk: %w", err)
		}
	}
	return b.gw.settle(ctx)
}

func (b *bench) freshGateway(ctx context.Context) (err error) {
	b.gw, err = newGateway(ctx, b.bin, filepath.Join(b.dir, "gw"), b.o)
	return err
}

// dropGateway ends the gateway and removes its data.
func (b *bench) dropGateway() {
	if b.gw == nil {
		return
	}
	if b.gw.proc != nil {
		b.gw.proc.kill()
	}
	os.RemoveAll(b.gw.dir)
	b.gw = nil
}

func (b *bench) startQemus(ctx context.Context) (err error) {
	if b.qemus == nil {
		b.qemus, err = startQemus(ctx, b.dir, b.o.disk)
	}
	return err
}
