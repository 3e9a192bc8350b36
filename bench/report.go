package main

import (
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
)

// unit is what a row is measured in.
type unit string

const (
	iops    unit = "IOPS"
	mbps    unit = "MB/s"
	seconds unit = "s"
	count   unit = "requests"
	times   unit = "x"
)

// row is one line of the table: either runs of fio, or plain values.
type row struct {
	Name string   `json:"name"`
	Unit unit     `json:"unit"`
	Load []string `json:"fio_flags,omitempty"`
	Note string   `json:"note,omitempty"` // what the figure compares, or costs

	Gateway   []sample            `json:"gateway,omitempty"`
	Baselines map[string][]sample `json:"baselines,omitempty"`
	Dirt      *dirt               `json:"unpublished,omitempty"` // of a write row

	Values []float64 `json:"values,omitempty"`
	Dirty  []int64   `json:"dirty_bytes,omitempty"` // at each kill
	Target float64   `json:"at_most,omitempty"`

	Least   bool       `json:"least_counts,omitempty"` // of Values, not their median
	Reopens []reopened `json:"reopens,omitempty"`
}

func (r *row) baseline(name string, s sample) {
	if r.Baselines == nil {
		r.Baselines = map[string][]sample{}
	}
	r.Baselines[name] = append(r.Baselines[name], s)
}

// of is the figure of a sample that the row is about.
func (r *row) of(s sample) float64 {
	if r.Unit == mbps {
		return s.MBps
	}
	return s.IOPS
}

// median of a side of the row.
func (r *row) median(ss []sample) float64 {
	vs := make([]float64, len(ss))
	for i, s := range ss {
		vs[i] = r.of(s)
	}
	return median(vs)
}

func median(vs []float64) float64 {
	if len(vs) == 0 {
		return 0
	}
	vs = slices.Sorted(slices.Values(vs))
	return (vs[(len(vs)-1)/2] + vs[len(vs)/2]) / 2
}

// best is the fastest baseline whose name starts with prefix.
func (r *row) best(prefix string) (name string, value float64) {
	for n, ss := range r.Baselines {
		if v := r.median(ss); v > value && strings.HasPrefix(n, prefix) {
			name, value = n, v
		}
	}
	return name, value
}

// report is everything that is printed and saved.
type report struct {
	Start   time.Time         `json:"start"`
	Took    string            `json:"took"`
	CPUs    int               `json:"cpus"`
	Version map[string]string `json:"versions"`
	Servers map[string]string `json:"servers"` // how each was started
	Rows    []row             `json:"rows"`
}

func (r *report) start(o options) {
	r.Start, r.CPUs = time.Now(), runtime.NumCPU()
	r.Version = map[string]string{"go": runtime.Version(), "fio": version("fio"), "qemu-nbd": version("qemu-nbd")}
	r.Servers = map[string]string{
		"gateway": fmt.Sprintf("gateway serve: 2+1 to three directories, tier %d GiB, max_dirty_age %v, disk %d MiB", tierBytes>>30, o.dirtyAge, o.disk>>20),
	}
	for _, m := range qemuModes {
		r.Servers[m.name] = "qemu-nbd " + strings.Join(append(slices.Clone(qemuFlags), m.flags...), " ")
	}
}

func version(program string) string {
	out, err := exec.Command(program, "--version").Output()
	if err != nil {
		return err.Error()
	}
	first, _, _ := strings.Cut(string(out), "\n")
	return first
}

func (r *report) add(x row) { r.Rows = append(r.Rows, x) }

func (r *report) finish() { r.Took = time.Since(r.Start).Round(time.Second).String() }

func (r *report) print(w io.Writer) {
	fmt.Fprintf(w, "%d CPUs, %s, %s, %s; took %s\n", r.CPUs, r.Version["go"], r.Version["fio"], r.Version["qemu-nbd"], r.Took)
	for _, name := range slices.Sorted(maps.Keys(r.Servers)) {
		fmt.Fprintf(w, "%s: %s\n", name, r.Servers[name])
	}
	for _, x := range r.Rows {
		if x.Load != nil {
			fmt.Fprintf(w, "%s: fio %s\n", x.Name, strings.Join(x.Load, " "))
		}
	}
	fmt.Fprintln(w)
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "row\tgateway\tp50/p99 ms\tCPU s/GiB\tbaseline\tratio\truns\tremarks")
	for i := range r.Rows {
		r.Rows[i].print(t)
	}
	t.Flush()
}

func (r *row) print(w io.Writer) {
	if r.Values != nil {
		v := median(r.Values)
		if r.Least {
			v = slices.Min(r.Values)
		}
		fmt.Fprintf(w, "%s\t%.2f %s\t\t\t\t\t%d\t%s\n", r.Name, v, r.Unit, len(r.Values), r.remark())
		return
	}
	name, base := r.best("")
	v := r.median(r.Gateway)
	mid := r.Gateway[len(r.Gateway)/2]
	fmt.Fprintf(w, "%s\t%.0f %s\t%.2f/%.2f\t%.2f\t%.0f %s\t%.2f\t%d\t%s\n", r.Name, v, r.Unit, mid.P50us/1e3, mid.P99us/1e3,
		mid.CPUSeconds, base, name, v/base, len(r.Gateway), r.remark())
}

// remark says whether a row counts, and with what it was measured.
func (r *row) remark() string {
	return strings.TrimPrefix(strings.TrimSuffix(r.verdict()+"; "+r.Note, "; "), "; ")
}

// verdict is the part of the remark that depends on what kind of row it is.
func (r *row) verdict() string {
	switch {
	case r.Dirt != nil:
		d := r.Dirt
		verdict := "counts"
		if !d.Counts {
			verdict = "DOES NOT COUNT"
		}
		return fmt.Sprintf("%s: %.0f s, unpublished %d MiB at half time, %d at the end (peaks %d and %d)",
			verdict, d.Seconds, d.Half>>20, d.End>>20, d.PeakToHalf>>20, d.PeakFromHalf>>20)
	case r.Reopens != nil:
		return remarkReopen(r.Reopens)
	case r.Dirty != nil:
		return fmt.Sprintf("at most %g %s; dirty %d to %d MiB", r.Target, r.Unit, slices.Min(r.Dirty)>>20, slices.Max(r.Dirty)>>20)
	case r.Target != 0:
		return fmt.Sprintf("at most %g", r.Target)
	}
	return ""
}

// save writes the report to a file of its own, and to latest.json.
func (r *report) save(dir string) error {
	b, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	b = append(b, '\n')
	name := filepath.Join(dir, r.Start.UTC().Format("20060102T150405Z")+".json")
	if err := os.WriteFile(name, b, 0o644); err != nil {
		return err
	}
	fmt.Fprintln(os.Stderr, "written to", name)
	return os.WriteFile(filepath.Join(dir, "latest.json"), b, 0o644)
}
