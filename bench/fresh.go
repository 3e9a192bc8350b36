package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
)

// freshAtMost is how many seconds claim and open of a pool with 1 TiB mapped may take on a fresh host.
const freshAtMost = 5

// fresh runs the benchmark of the pool package that makes the maps of such a pool, of 16.7 million extents in an
// order that nothing joins, by the pool's own writers, and opens it on one new host after the other over targets
// that take 30 ms for a request.
func (b *bench) fresh(ctx context.Context) error {
	b.dropGateway()
	dir := filepath.Join(b.dir, "fresh")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, "go", "test", "-run", "^$", "-bench", "^BenchmarkFreshOpen$", "-benchtime", fmt.Sprintf("%dx", b.o.rounds), "graindisk/pool")
	cmd.Env = append(os.Environ(), "TMPDIR="+dir)
	out, err := cmd.CombinedOutput()
	if err = errors.Join(err, os.RemoveAll(dir)); err != nil {
		return fmt.Errorf("%w\n%s", err, out)
	}
	r, err := freshRow(string(out))
	if err != nil {
		return err
	}
	b.report.add(r)
	return nil
}

// freshRow reads the benchmark's line: the name, the number of opens, and pairs of a value and its unit.
func freshRow(out string) (row, error) {
	r := row{Name: "claim + open, fresh host, 1 TiB mapped, 30 ms", Unit: seconds, Target: freshAtMost}
	at := map[string]float64{}
	for line := range strings.Lines(out) {
		f := strings.Fields(line)
		if len(f) < 2 || !strings.HasPrefix(f[0], "BenchmarkFreshOpen") {
			continue
		}
		for f = f[2:]; len(f) >= 2; f = f[2:] {
			v, err := strconv.ParseFloat(f[0], 64)
			if err != nil {
				return r, fmt.Errorf("line %q: %w", line, err)
			}
			at[f[1]] = v
		}
	}
	if at["open-s"] == 0 {
		return r, fmt.Errorf("no figures in the benchmark's output:\n%s", out)
	}
	r.Values = []float64{at["open-s"]}
	r.Note = fmt.Sprintf("%.0f requests, %.1f MB, heap %+.0f MB; then %.0f ms per lookup, all maps here after %.0f s",
		at["requests"], at["MB"], at["heap-MB"], at["lookup-ms"], at["all-here-s"])
	return r, nil
}
