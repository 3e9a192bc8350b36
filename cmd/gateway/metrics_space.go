package main

import (
	"github.com/prometheus/client_golang/prometheus"

	"graindisk/pool"
)

var (
	descSpace     = prometheus.NewDesc("gateway_pool_space_bytes", "What the targets hold of disks, parity aside: live, trapped, dead, or doomed (about to be deleted).", []string{"pool", "kind"}, nil)
	descSegments  = prometheus.NewDesc("gateway_pool_segments", "Segments the maps know: all, those with nothing alive, and those that are about to be deleted.", []string{"pool", "kind"}, nil)
	descReclaimed = prometheus.NewDesc("gateway_pool_reclaimed_bytes_total", "Bytes of segments deleted from the targets since the start.", []string{"pool"}, nil)
)

// collectSpace reports how the space on the targets is used.
func collectSpace(ch chan<- prometheus.Metric, s pool.SpaceStatus, name string) {
	gauge := func(d *prometheus.Desc, v float64, kind string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, name, kind)
	}
	gauge(descSpace, float64(s.LiveBytes), "live")
	gauge(descSpace, float64(s.TrappedBytes), "trapped")
	gauge(descSpace, float64(s.DeadBytes), "dead")
	gauge(descSpace, float64(s.DoomedBytes), "doomed")
	gauge(descSegments, float64(s.Segments), "all")
	gauge(descSegments, float64(s.DeadSegments), "dead")
	gauge(descSegments, float64(s.DoomedSegments), "doomed")
	ch <- prometheus.MustNewConstMetric(descReclaimed, prometheus.CounterValue, float64(s.ReclaimedBytes), name)
}
