package main

import (
	"math"
	"strings"
	"testing"
	"time"
)

func TestParseFio(t *testing.T) {
	const job = `"write":{"io_bytes":0},"read":{"io_bytes":8192,"iops":1000.5,"bw_bytes":2000000,"clat_ns":{"percentile":{"50.000000":1500,"99.000000":90000}}}`
	cases := []struct {
		name, text, fails string
	}{
		{"figures behind a message", "fio: a warning\n{\"jobs\":[{\"error\":0," + job + "}]}", ""},
		{"a job that failed", `{"jobs":[{"error":5,` + job + `}]}`, "fio failed"},
		{"nothing moved", `{"jobs":[{"error":0}]}`, "no bytes"},
		{"no jobs", `{"jobs":[]}`, "fio failed"},
		{"no JSON", "fio: no such engine", "no JSON"},
		{"cut off", `{"jobs":[{`, "fio's output"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			got, err := parseFio([]byte(c.text))
			if c.fails != "" {
				if err == nil || !strings.Contains(err.Error(), c.fails) {
					t.Fatalf("error %v, want one with %q", err, c.fails)
				}
				return
			}
			want := sample{IOPS: 1000.5, MBps: 2, P50us: 1.5, P99us: 90, Bytes: 8192}
			if err != nil || got != want {
				t.Fatalf("got %+v, %v, want %+v", got, err, want)
			}
		})
	}
}

func TestJudge(t *testing.T) {
	every := func(ran time.Duration, bytes ...int64) *dirtWatch {
		w := &dirtWatch{ran: ran, bytes: bytes}
		for i := range bytes {
			w.at = append(w.at, ran*time.Duration(i)/time.Duration(len(bytes)-1))
		}
		return w
	}
	cases := []struct {
		name string
		w    *dirtWatch
		want dirt
	}{
		{"steady", every(time.Minute, 1, 9, 5, 8, 5), dirt{Half: 5, End: 5, PeakToHalf: 9, PeakFromHalf: 8, Seconds: 60, Counts: true}},
		{"growing", every(time.Minute, 1, 2, 3, 4, 5), dirt{Half: 3, End: 5, PeakToHalf: 3, PeakFromHalf: 5, Seconds: 60}},
		{"too short", every(59*time.Second, 1, 2, 3, 2, 1), dirt{Half: 3, End: 1, PeakToHalf: 3, PeakFromHalf: 3, Seconds: 59}},
		{"one sample only", &dirtWatch{ran: time.Minute, at: []time.Duration{61 * time.Second}, bytes: []int64{7}},
			dirt{Half: 7, End: 7, PeakToHalf: 7, PeakFromHalf: 7, Seconds: 60, Counts: true}},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			if got := *c.w.judge(); got != c.want {
				t.Fatalf("got %+v, want %+v", got, c.want)
			}
		})
	}
}

func TestMedian(t *testing.T) {
	for _, c := range []struct {
		vs   []float64
		want float64
	}{{nil, 0}, {[]float64{3}, 3}, {[]float64{9, 1, 5}, 5}, {[]float64{4, 1, 2, 8}, 3}} {
		if got := median(c.vs); math.Abs(got-c.want) > 1e-9 {
			t.Errorf("median of %v is %v, want %v", c.vs, got, c.want)
		}
	}
}

// TestBest expects a row to be held against the faster mode, in the row's own unit.
func TestBest(t *testing.T) {
	r := row{Unit: mbps}
	r.baseline("x", sample{IOPS: 900, MBps: 1})
	r.baseline("y", sample{IOPS: 100, MBps: 2})
	if name, v := r.best(""); name != "y" || v != 2 {
		t.Errorf("best is %s with %v", name, v)
	}
}

// TestHeld expects bars to be judged by the median of what each round gave, and by the faster qemu-nbd.
func TestHeld(t *testing.T) {
	r := row{Unit: iops}
	round := func(gateway, memory, slow, fast, p50 float64) {
		r.Gateway = append(r.Gateway, sample{IOPS: gateway, P50us: p50, MBps: gateway * 4096 / 1e6, CPUSeconds: 2.62144})
		r.baseline(nbdkitMemory, sample{IOPS: memory, P50us: 20, MBps: memory * 4096 / 1e6, CPUSeconds: 1.31072})
		r.baseline("qemu-nbd x", sample{IOPS: slow, P50us: 1, MBps: slow * 4096 / 1e6})
		r.baseline("qemu-nbd y", sample{IOPS: fast, P50us: 1, MBps: fast * 4096 / 1e6})
	}
	round(1000, 500, 10, 400, 30) // the machine does much
	round(100, 80, 900, 50, 10)   // little
	round(300, 200, 10, 100, 50)
	for _, c := range []struct {
		name string
		bars []bar
		want string
	}{
		{"a rate", []bar{{server: nbdkitMemory, least: 1.3}}, "1.50 x nbdkit memory (at least 1.3)"},
		{"a latency", []bar{{server: nbdkitMemory, latency: 1.2}}, "p50 1.50 x nbdkit memory (at most 1.2)"},
		{"the faster mode", []bar{{server: anyQEMU, least: 2}}, "2.50 x qemu-nbd y (at least 2)"},
		{"two", []bar{{server: nbdkitMemory, least: 1}, {server: anyQEMU, least: 2}},
			"1.50 x nbdkit memory (at least 1), 2.50 x qemu-nbd y (at least 2)"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := r.held(c.bars); got != c.want {
				t.Errorf("got %q, want %q", got, c.want)
			}
		})
	}
	if got, want := r.cpuEach(), "CPU us a request: 10.0, nbdkit memory 5.0, qemu-nbd x 0.0, qemu-nbd y 0.0"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestConnectionsAreJobs(t *testing.T) {
	l := load{rw: "randread", bs: "4k", depth: 32, time: time.Second}
	if got := strings.Join(l.flags(1<<20), " "); strings.Contains(got, "numjobs") {
		t.Errorf("one connection: fio %s", got)
	}
	l.conns = 4
	if got := strings.Join(l.flags(1<<20), " "); !strings.Contains(got, "--numjobs=4 --group_reporting") {
		t.Errorf("four connections: fio %s", got)
	}
}

func TestSharesOfRAM(t *testing.T) {
	if got := (cacheHits{All: 110, RAM: 55}).since(cacheHits{All: 10, RAM: 5}); got != 0.5 {
		t.Errorf("50 of 100 hits are a share of %v", got)
	}
	if got := (cacheHits{All: 10, RAM: 5}).since(cacheHits{All: 10, RAM: 5}); got != 0 {
		t.Errorf("no hits are a share of %v", got)
	}
}
