package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// load is one fio job.
type load struct {
	rw     string // fio's name of it
	bs     string
	depth  int
	fsync  int   // a FLUSH after so many writes; 0: none
	part   int64 // bytes; if not 0, only so much of the disk, from offset on
	time   time.Duration
	offset int64 // bytes; where a single pass or a part starts
	pass   int64 // bytes; if not 0, one pass over so much instead of a time
	bytes  int64 // with pass: as many as this, anywhere in it
	conns  int   // jobs, each with a connection and a depth of its own; 0: one
}

// flags are fio's, the address and the output aside.
func (l load) flags(disk int64) []string {
	if l.part > 0 {
		disk = l.part
	}
	f := []string{"--name=bench", "--ioengine=nbd", "--rw=" + l.rw, "--bs=" + l.bs, fmt.Sprintf("--iodepth=%d", l.depth),
		"--randrepeat=0", "--norandommap"}
	if l.fsync > 0 {
		f = append(f, fmt.Sprintf("--fsync=%d", l.fsync))
	}
	if l.conns > 1 {
		f = append(f, fmt.Sprintf("--numjobs=%d", l.conns), "--group_reporting")
	}
	if l.bytes > 0 {
		f = append(f, fmt.Sprintf("--io_size=%d", l.bytes))
	}
	if l.pass > 0 {
		return append(f, fmt.Sprintf("--offset=%d", l.offset), fmt.Sprintf("--size=%d", l.pass))
	}
	if l.offset > 0 {
		f = append(f, fmt.Sprintf("--offset=%d", l.offset))
	}
	return append(f, fmt.Sprintf("--size=%d", disk), "--time_based", fmt.Sprintf("--runtime=%d", int(l.time.Seconds())))
}

// sample is what one run of fio measured.
type sample struct {
	IOPS  float64 `json:"iops"`
	MBps  float64 `json:"mb_per_second"` // 10^6 bytes
	P50us float64 `json:"p50_us"`
	P99us float64 `json:"p99_us"`
	Bytes int64   `json:"bytes"`
	// CPUSeconds is what the server used per GiB of I/O, its background work included.
	CPUSeconds float64 `json:"server_cpu_seconds_per_gib"`
}

// fioOutput is the part of fio's JSON that is used.
type fioOutput struct {
	Jobs []struct {
		Error int `json:"error"`
		Read  fioSide
		Write fioSide
	} `json:"jobs"`
}

type fioSide struct {
	Bytes int64   `json:"io_bytes"`
	IOPS  float64 `json:"iops"`
	BW    float64 `json:"bw_bytes"`
	Clat  struct {
		Percentile map[string]float64 `json:"percentile"`
	} `json:"clat_ns"`
}

// fio runs l against a server and measures the server's CPU on the way.
func (b *bench) fio(ctx context.Context, p *process, uri string, l load) (sample, error) {
	out := filepath.Join(b.dir, "fio.json")
	args := append(l.flags(b.o.disk), "--uri="+uri, "--output-format=json", "--output="+out)
	before, err := p.cpu()
	if err != nil {
		return sample{}, err
	}
	if msg, err := exec.CommandContext(ctx, "fio", args...).CombinedOutput(); err != nil {
		return sample{}, fmt.Errorf("fio %s: %w: %s", strings.Join(args, " "), err, lastLine(string(msg)))
	}
	after, err := p.cpu()
	if err != nil {
		return sample{}, err
	}
	text, err := os.ReadFile(out)
	if err != nil {
		return sample{}, err
	}
	s, err := parseFio(text)
	if err == nil {
		s.CPUSeconds = (after - before).Seconds() / (float64(s.Bytes) / (1 << 30))
	}
	return s, err
}

// parseFio reads fio's JSON, which may follow messages.
func parseFio(text []byte) (sample, error) {
	var o fioOutput
	start := bytes.IndexByte(text, '{')
	if start < 0 {
		return sample{}, fmt.Errorf("fio printed no JSON: %q", text)
	}
	if err := json.Unmarshal(text[start:], &o); err != nil {
		return sample{}, fmt.Errorf("fio's output: %w", err)
	}
	if len(o.Jobs) != 1 || o.Jobs[0].Error != 0 {
		return sample{}, fmt.Errorf("fio failed: %s", text[start:])
	}
	side := o.Jobs[0].Read
	if side.Bytes == 0 {
		side = o.Jobs[0].Write
	}
	if side.Bytes == 0 {
		return sample{}, fmt.Errorf("fio moved no bytes")
	}
	return sample{
		IOPS: side.IOPS, MBps: side.BW / 1e6, Bytes: side.Bytes,
		P50us: side.Clat.Percentile["50.000000"] / 1e3, P99us: side.Clat.Percentile["99.000000"] / 1e3,
	}, nil
}
