package main

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"time"
)

const (
	tailWarm = 2 * time.Second // the writer of the row readtail runs so long before anything is measured beside
	tailPart = 1 << 30         // bytes that are read, and written elsewhere
)

// readTail compares the tail of single cached reads beside a stream of writes, uploaded at full speed, with
// that of an idle gateway, in turn.
func (b *bench) readTail(ctx context.Context) error {
	if err := b.filled(ctx); err != nil {
		return err
	}
	r := row{Name: "p99 of 4 KiB cached read, full write-back / idle", Unit: times, Target: 3}
	size := min(tailPart, b.o.disk/2>>20<<20)
	reads := load{rw: "randread", bs: "4k", depth: 1, part: size, time: b.o.readTime}
	writes := load{rw: "write", bs: "1M", depth: 4, part: size, offset: size, time: 2*tailWarm + b.o.readTime}
	var idle, busy []float64 // ms
	for range b.o.rounds {
		s, err := b.fio(ctx, b.gw.proc, b.gw.uri, reads)
		if err != nil {
			return err
		}
		idle = append(idle, s.P99us/1e3)
		stop := b.background(ctx, writes)
		time.Sleep(tailWarm)
		s, err = b.fio(ctx, b.gw.proc, b.gw.uri, reads)
		if err := errors.Join(err, stop(), b.gw.settle(ctx)); err != nil {
			return err
		}
		busy = append(busy, s.P99us/1e3)
		r.Values = append(r.Values, s.P99us/1e3/idle[len(idle)-1])
	}
	r.Load = reads.flags(b.o.disk)
	r.Note = fmt.Sprintf("ms idle %.3f, busy %.3f; ratios %.2f", idle, busy, r.Values)
	b.report.add(r)
	return nil
}

// background runs l against the gateway until stop is called, which waits for the end of l.
func (b *bench) background(ctx context.Context, l load) (stop func() error) {
	cmd := exec.CommandContext(ctx, "fio", append(l.flags(b.o.disk), "--uri="+b.gw.uri, "--output=/dev/null")...)
	ended := make(chan error, 1)
	go func() {
		msg, err := cmd.CombinedOutput()
		if err != nil {
			err = fmt.Errorf("fio beside: %w: %s", err, lastLine(string(msg)))
		}
		ended <- err
	}()
	return func() error { return <-ended }
}
