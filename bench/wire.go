package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// wirePart is what the row wire reads, again and again: it fits into what every server has of memory, the
// gateway's cache of blocks in RAM too.
const wirePart = 64 << 20

// bar is what the row wire is held to, in multiples of another server's figure in the same round.
type bar struct {
	server  string  // its name, or anyQEMU
	least   float64 // of the rate; 0 if the bar is one of latency
	latency float64 // at most, of the median latency at the client
}

const nbdkitMemory = "nbdkit memory"

var wireLoads = []struct {
	name string
	unit unit
	load load
	bars []bar
}{
	{"4 KiB random read, depth 32, one connection, in RAM", iops, load{rw: "randread", bs: "4k", depth: 32},
		[]bar{{server: nbdkitMemory, least: 1.3}, {server: anyQEMU, least: 2}}},
	{"4 KiB random read, depth 32, four connections, in RAM", iops, load{rw: "randread", bs: "4k", depth: 32, conns: 4},
		[]bar{{server: nbdkitMemory, least: 1.3}, {server: anyQEMU, least: 2}}},
	{"4 KiB random read, depth 1, in RAM", iops, load{rw: "randread", bs: "4k", depth: 1},
		[]bar{{server: nbdkitMemory, latency: 1.2}}},
	{"1 MiB sequential read, depth 4, in RAM", mbps, load{rw: "read", bs: "1M", depth: 4},
		[]bar{{server: nbdkitMemory, least: 0.9}}},
}

// anyQEMU is the faster of the modes of qemu-nbd.
const anyQEMU = "qemu-nbd"

// wire measures what the protocol costs: reads of little data that every server has in memory, by fio from the
// gateway, nbdkit's memory and file plugins and qemu-nbd, in turn.
func (b *bench) wire(ctx context.Context) (err error) {
	if err := errors.Join(b.filled(ctx), b.startQemus(ctx)); err != nil {
		return err
	}
	kits, err := b.startNbdkits(ctx)
	defer func() {
		for _, k := range kits {
			k.proc.kill()
		}
	}()
	if err != nil {
		return err
	}
	servers := append(append([]*qemu{{gatewayName, b.gw.uri, b.gw.proc}}, kits...), b.qemus...)
	part := min(wirePart, b.o.disk)
	for _, s := range servers { // twice, since a cache may not keep what it has seen once
		for range 2 {
			if _, err := b.fio(ctx, s.proc, s.uri, load{rw: "read", bs: "64k", depth: 4, pass: part}); err != nil {
				return fmt.Errorf("%s: %w", s.name, err)
			}
		}
	}
	for _, w := range wireLoads {
		w.load.time, w.load.part = max(b.o.readTime/2, time.Second), part // many servers, short runs
		r := row{Name: w.name, Unit: w.unit, Load: w.load.flags(b.o.disk)}
		hits0, err := b.gw.hits(ctx)
		if err != nil {
			return err
		}
		for i := range b.o.rounds {
			for j := range servers {
				s := servers[(i+j)%len(servers)]
				m, err := b.fio(ctx, s.proc, s.uri, w.load)
				if err != nil {
					return fmt.Errorf("%s: %w", s.name, err)
				}
				if s.name == gatewayName {
					r.Gateway = append(r.Gateway, m)
				} else {
					r.baseline(s.name, m)
				}
			}
		}
		hits1, err := b.gw.hits(ctx)
		if err != nil {
			return err
		}
		r.Note = fmt.Sprintf("%s; %s; %.0f %% from RAM", r.held(w.bars), r.cpuEach(), 100*hits1.since(hits0))
		b.report.add(r)
	}
	return nil
}

const gatewayName = "gateway"

// held says how the row stands to each bar: the median of the rounds' ratios.
func (r *row) held(bars []bar) string {
	var all []string
	for _, x := range bars {
		name := x.server
		if name == anyQEMU {
			name, _ = r.best(anyQEMU)
		}
		rate, latency := r.ratios(name)
		if x.latency > 0 {
			all = append(all, fmt.Sprintf("p50 %.2f x %s (at most %g)", latency, name, x.latency))
		} else {
			all = append(all, fmt.Sprintf("%.2f x %s (at least %g)", rate, name, x.least))
		}
	}
	return strings.Join(all, ", ")
}

// ratios of the gateway to another server, by rate and by median latency: each the median of the rounds.
func (r *row) ratios(name string) (rate, latency float64) {
	var rates, latencies []float64
	for i, base := range r.Baselines[name] {
		rates = append(rates, r.of(r.Gateway[i])/r.of(base))
		latencies = append(latencies, r.Gateway[i].P50us/base.P50us)
	}
	return median(rates), median(latencies)
}

// cpuEach lists the processor time that each server used for a request.
func (r *row) cpuEach() string {
	us := func(ss []sample) float64 {
		var vs []float64
		for _, s := range ss {
			vs = append(vs, s.CPUSeconds*1e6*s.MBps*1e6/s.IOPS/(1<<30))
		}
		return median(vs)
	}
	text := fmt.Sprintf("CPU us a request: %.1f", us(r.Gateway))
	for _, name := range slices.Sorted(maps.Keys(r.Baselines)) {
		text += fmt.Sprintf(", %s %.1f", name, us(r.Baselines[name]))
	}
	return text
}

// nbdkitFlags are the flags of both servers, before the plugin.
var nbdkitFlags = []string{"--foreground"}

// startNbdkits serves memory that was written once, and the raw file.
func (b *bench) startNbdkits(ctx context.Context) (ks []*qemu, err error) {
	part := min(wirePart, b.o.disk)
	b.report.Version["nbdkit"] = version("nbdkit")
	for i, args := range [][]string{
		{"memory", fmt.Sprintf("size=%d", part)},
		{"file", "file=" + filepath.Join(b.dir, "raw")},
	} {
		sock := filepath.Join(b.dir, fmt.Sprintf("nbdkit%d.sock", i))
		p, err := startProcess(exec.Command("nbdkit", append(append(slices.Clone(nbdkitFlags), "--unix="+sock), args...)...))
		if err != nil {
			return ks, err
		}
		k := &qemu{"nbdkit " + args[0], "nbd+unix:///?socket=" + sock, p}
		ks = append(ks, k)
		b.report.Servers[k.name] = strings.Join(append(append([]string{"nbdkit"}, nbdkitFlags...), args...), " ")
		if err := p.waitSocket(ctx, sock); err != nil {
			return ks, err
		}
	}
	_, err = b.fio(ctx, ks[0].proc, ks[0].uri, load{rw: "write", bs: "1M", depth: 4, pass: part})
	return ks, err
}

// cacheHits are the blocks that the gateway found on its tier or in RAM, and those in RAM.
type cacheHits struct {
	All uint64 `json:"hits"`
	RAM uint64 `json:"ram_hits"`
}

// since is which part of the hits after h0 was in RAM.
func (h cacheHits) since(h0 cacheHits) float64 {
	return float64(h.RAM-h0.RAM) / float64(max(1, h.All-h0.All))
}

// hits is how reads were served since the gateway started.
func (g *gateway) hits(ctx context.Context) (cacheHits, error) {
	out, err := g.command(ctx, "pool", "status", "main", "--json")
	if err != nil {
		return cacheHits{}, err
	}
	var s struct {
		Tier struct {
			Cache *cacheHits `json:"cache"`
		} `json:"tier"`
	}
	if err := json.Unmarshal(out, &s); err != nil || s.Tier.Cache == nil {
		return cacheHits{}, fmt.Errorf("pool status printed %q", out)
	}
	return *s.Tier.Cache, nil
}
