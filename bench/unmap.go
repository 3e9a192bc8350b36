package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"graindisk/frontend/nbd/nbdclient"
	"graindisk/frontend/nbd/proto"
)

const millis unit = "ms"

// unmap times TRIM and WRITE_ZEROES of a whole disk of 1 TiB with data all over it, part of them published:
// as one extended request, and as 512 requests of 2 GiB, 64 at a time.
func (b *bench) unmap(ctx context.Context) (err error) {
	const size = 1 << 40
	o := b.o
	o.disk = size
	g, err := newGateway(ctx, b.bin, filepath.Join(b.dir, "huge"), o)
	if err != nil {
		return err
	}
	defer g.proc.kill()
	c, err := nbdclient.Dial(ctx, g.uri, nbdclient.Options{Extended: true})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.Close()) }()
	data := bytes.Repeat([]byte("data"), 16<<10)
	for _, parts := range []int64{1, 512} {
		for _, cmd := range []proto.Cmd{proto.CmdTrim, proto.CmdWriteZeroes} {
			r := row{Name: fmt.Sprintf("1 TiB by %s, requests: %d", cmd, parts), Unit: millis, Target: 100}
			for range max(5, b.o.rounds) {
				for i := range int64(1024) {
					if err := c.WriteAt(ctx, data, i<<30+i<<20, false); err != nil {
						return err
					}
					if i == 512 {
						if err := g.settle(ctx); err != nil {
							return err
						}
					}
				}
				start := time.Now()
				if err := together(parts, func(i int64) error { return unmapPart(ctx, c, cmd, i*(size/parts), size/parts) }); err != nil {
					return err
				}
				r.Values = append(r.Values, 1000*time.Since(start).Seconds())
			}
			b.report.add(r)
		}
	}
	return nil
}

func unmapPart(ctx context.Context, c *nbdclient.Client, cmd proto.Cmd, off, n int64) error {
	if cmd == proto.CmdTrim {
		return c.Trim(ctx, off, n, false)
	}
	return c.WriteZeroes(ctx, off, n, 0)
}

// together calls do for each of n, up to 64 at a time.
func together(n int64, do func(i int64) error) error {
	errs := make(chan error, n)
	slots := make(chan struct{}, 64)
	for i := range n {
		slots <- struct{}{}
		go func() {
			errs <- do(i)
			<-slots
		}()
	}
	var all error
	for range n {
		all = errors.Join(all, <-errs)
	}
	return all
}
