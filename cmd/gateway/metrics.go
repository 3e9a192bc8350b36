package main

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"

	"graindisk/backend"
	"graindisk/frontend/nbd"
	"graindisk/frontend/nbd/proto"
	"graindisk/pool"
)

// metrics are the gateway's figures for Prometheus: those of requests are counted as they pass, those
// of pools and disks are asked for at each scrape.
type metrics struct {
	registry *prometheus.Registry
	conns    *prometheus.GaugeVec
	rejected prometheus.Counter
	bytes    *prometheus.CounterVec
	errors   *prometheus.CounterVec
	duration map[proto.Cmd]prometheus.Observer
}

func newMetrics(g *gateway) *metrics {
	m := &metrics{
		registry: prometheus.NewRegistry(),
		conns:    prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: "gateway_nbd_connections", Help: "Clients connected now."}, []string{"disk"}),
		rejected: prometheus.NewCounter(prometheus.CounterOpts{Name: "gateway_nbd_rejected_total", Help: "Clients hung up on because too many were connected."}),
		bytes:    prometheus.NewCounterVec(prometheus.CounterOpts{Name: "gateway_nbd_bytes_total", Help: "Bytes that answered requests were about."}, []string{"op"}),
		errors:   prometheus.NewCounterVec(prometheus.CounterOpts{Name: "gateway_nbd_errors_total", Help: "Requests answered with an error."}, []string{"op", "code"}),
		duration: map[proto.Cmd]prometheus.Observer{},
	}
	h := prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Name: "gateway_nbd_request_duration_seconds", Help: "Time from reading a request to answering it.",
		Buckets: prometheus.ExponentialBuckets(16e-6, 4, 10), // 16 µs to 4 s
	}, []string{"op"})
	for _, cmd := range []proto.Cmd{proto.CmdRead, proto.CmdWrite, proto.CmdFlush, proto.CmdTrim, proto.CmdWriteZeroes} {
		m.duration[cmd] = h.WithLabelValues(cmd.String())
	}
	m.registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
		m.conns, m.rejected, m.bytes, m.errors, h, poolCollector{g})
	return m
}

func (m *metrics) nbd() nbd.Metrics {
	return nbd.Metrics{
		Opened:   func(export string) { m.conns.WithLabelValues(export).Inc() },
		Closed:   func(export string) { m.conns.WithLabelValues(export).Dec() },
		Rejected: m.rejected.Inc,
		Done: func(cmd proto.Cmd, bytes int64, took time.Duration, code proto.Errno) {
			if o := m.duration[cmd]; o != nil {
				o.Observe(took.Seconds())
			}
			if code != 0 {
				m.errors.WithLabelValues(cmd.String(), code.Error()).Inc()
				return
			}
			m.bytes.WithLabelValues(cmd.String()).Add(float64(bytes))
		},
	}
}

// poolCollector reports on pools and disks at each scrape.
type poolCollector struct{ g *gateway }

var (
	descDiskDirty   = prometheus.NewDesc("gateway_disk_unpublished_bytes", "Acknowledged bytes that no target holds yet.", []string{"disk"}, nil)
	descDiskAge     = prometheus.NewDesc("gateway_disk_unpublished_age_seconds", "Age of the oldest of them.", []string{"disk"}, nil)
	descCut         = prometheus.NewDesc("gateway_pool_published_cut", "Number of the newest published cut.", []string{"pool"}, nil)
	descEpoch       = prometheus.NewDesc("gateway_pool_epoch", "Epoch under which the pool is held.", []string{"pool"}, nil)
	descServing     = prometheus.NewDesc("gateway_pool_serving", "1 while the pool serves and publishes, 0 once it has stopped.", []string{"pool"}, nil)
	descSlots       = prometheus.NewDesc("gateway_tier_slots", "Slots of the tier by what they hold.", []string{"pool", "state"}, nil)
	descState       = prometheus.NewDesc("gateway_target_state", "0 while a target is well, 1 while it is degraded, 2 while it is offline.", []string{"pool", "target"}, nil)
	descConcurrency = prometheus.NewDesc("gateway_target_concurrency", "How many requests may be under way to a target, as it can bear now.", []string{"pool", "target"}, nil)
	descCost        = prometheus.NewDesc("gateway_target_cost_total", "What the requests to a target cost by the configured prices.", []string{"pool", "target"}, nil)
	descTook        = prometheus.NewDesc("gateway_target_request_duration_seconds", "How long requests to a target took, retries counted apart.", []string{"pool", "target", "op"}, nil)
	descRetries     = prometheus.NewDesc("gateway_target_retries_total", "Requests that were sent again.", []string{"pool", "target", "op"}, nil)
	descBytes       = prometheus.NewDesc("gateway_target_bytes_total", "Bytes carried by requests that succeeded.", []string{"pool", "target", "op"}, nil)
	descErrors      = prometheus.NewDesc("gateway_target_errors_total", "Requests that failed, by class of error.", []string{"pool", "target", "op", "class"}, nil)
	descAvoided     = prometheus.NewDesc("gateway_target_avoided", "1 while a target is passed over because it failed.", []string{"pool", "target"}, nil)
	descExposed     = prometheus.NewDesc("gateway_pool_exposure_over", "1 while what is unpublished is over its bound, in bytes or in age.", []string{"pool"}, nil)
	descWaiting     = prometheus.NewDesc("gateway_pool_writes_waiting", "1 while new writes wait: the tier is full, or the exposure at its bound.", []string{"pool"}, nil)
	descDelay       = prometheus.NewDesc("gateway_pool_write_delay_seconds", "How long a new write is delayed because the tier fills.", []string{"pool"}, nil)
	descRefused     = prometheus.NewDesc("gateway_tier_refuses_writes", "1 while the log waits for the tier's file system, which is full, over quota or read-only.", []string{"pool", "reason"}, nil)
	descLogStopped  = prometheus.NewDesc("gateway_writeback_stopped", "1 once the log takes no writes for good.", []string{"pool"}, nil)
	descMended      = prometheus.NewDesc("gateway_writeback_mended_files_total", "Files of the log written anew after a write or a sync of them failed.", []string{"pool"}, nil)
	descIndex       = prometheus.NewDesc("gateway_writeback_index_bytes", "Memory of the index of unpublished writes.", []string{"pool"}, nil)
)

// Describe implements prometheus.Collector.
func (c poolCollector) Describe(ch chan<- *prometheus.Desc) { prometheus.DescribeByCollect(c, ch) }

// Collect implements prometheus.Collector.
func (c poolCollector) Collect(ch chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	for _, d := range c.g.Disks() {
		gauge(descDiskDirty, float64(d.UnpublishedBytes), d.Name)
		gauge(descDiskAge, d.UnpublishedAgeSecond, d.Name)
	}
	for _, p := range c.g.sorted() { // the targets are not asked for this
		p := p.Status()
		gauge(descCut, float64(p.PublishedCut), p.Name)
		gauge(descEpoch, float64(p.Epoch), p.Name)
		gauge(descServing, b2f(p.Error == ""), p.Name)
		gauge(descExposed, b2f(p.Exposure.Over), p.Name)
		gauge(descWaiting, b2f(p.Exposure.WritesWaiting), p.Name)
		gauge(descDelay, p.Exposure.WriteDelaySeconds, p.Name)
		gauge(descIndex, float64(p.Tier.IndexBytes), p.Name)
		for _, reason := range []string{pool.TierFull, pool.TierQuota, pool.TierReadOnly} {
			gauge(descRefused, b2f(p.Log.Waits == reason), p.Name, reason)
		}
		gauge(descLogStopped, b2f(p.Log.Stopped), p.Name)
		ch <- prometheus.MustNewConstMetric(descMended, prometheus.CounterValue, float64(p.Log.MendedFiles), p.Name)
		gauge(descSlots, float64(p.Tier.Free), p.Name, "free")
		gauge(descSlots, float64(p.Tier.Busy), p.Name, "busy")
		gauge(descSlots, float64(p.Tier.Clean), p.Name, "clean")
		collectReads(ch, p.Reads, p.Name)
		collectScrub(ch, p.Scrub, p.Name)
		collectSpace(ch, p.Space, p.Name)
		for _, t := range p.Targets {
			gauge(descAvoided, b2f(t.Avoided), p.Name, t.Name)
			if t.Health != nil {
				collectTarget(ch, *t.Health, p.Name, t.Name)
			}
		}
	}
}

// collectTarget reports what one target was asked.
func collectTarget(ch chan<- prometheus.Metric, h backend.Health, labels ...string) {
	ch <- prometheus.MustNewConstMetric(descState, prometheus.GaugeValue, map[string]float64{"ok": 0, "degraded": 1, "offline": 2}[h.State], labels...)
	ch <- prometheus.MustNewConstMetric(descConcurrency, prometheus.GaugeValue, float64(h.Concurrency), labels...)
	ch <- prometheus.MustNewConstMetric(descCost, prometheus.CounterValue, h.Cost, labels...)
	for op, o := range h.Ops {
		l := append(labels[:len(labels):len(labels)], op)
		ch <- prometheus.MustNewConstMetric(descRetries, prometheus.CounterValue, float64(o.Retries), l...)
		ch <- prometheus.MustNewConstMetric(descBytes, prometheus.CounterValue, float64(o.Bytes), l...)
		for class, n := range o.Errors {
			ch <- prometheus.MustNewConstMetric(descErrors, prometheus.CounterValue, float64(n), append(l[:len(l):len(l)], class)...)
		}
		buckets, sum := map[float64]uint64{}, uint64(0)
		for i, bound := range o.Bounds {
			sum += o.Latency[i]
			buckets[bound] = sum
		}
		ch <- prometheus.MustNewConstHistogram(descTook, o.Requests, o.Took, buckets, l...)
	}
}

func b2f(b bool) float64 {
	if b {
		return 1
	}
	return 0
}
