package main

import (
	"github.com/prometheus/client_golang/prometheus"

	"graindisk/grains/cache"
	"graindisk/pool"
)

var (
	descHits       = prometheus.NewDesc("gateway_cache_hits_total", "Reads of published blocks answered by the cache, by the queue that had them: ram, small (new) or main (read again).", []string{"pool", "queue"}, nil)
	descMisses     = prometheus.NewDesc("gateway_cache_misses_total", "Reads of published blocks that the cache had not got.", []string{"pool"}, nil)
	descFills      = prometheus.NewDesc("gateway_cache_fills_total", "Extents that were fetched and cached on the tier, by the queue they went to.", []string{"pool", "queue"}, nil)
	descGhost      = prometheus.NewDesc("gateway_cache_ghost_hits_total", "Extents fetched anew that had been cached not long ago.", []string{"pool"}, nil)
	descSkipped    = prometheus.NewDesc("gateway_cache_skipped_total", "Extents that were not cached: fills for want of a slot or over the disk's share, adoptions for want of memory.", []string{"pool", "what"}, nil)
	descFillBytes  = prometheus.NewDesc("gateway_cache_written_bytes_total", "Bytes written to the tier to cache them: fetched, or moved between queues.", []string{"pool", "what"}, nil)
	descEvicted    = prometheus.NewDesc("gateway_cache_evicted_slots_total", "Slots of the tier that were emptied for others, by queue.", []string{"pool", "queue"}, nil)
	descForgotten  = prometheus.NewDesc("gateway_cache_forgotten_total", "Extents dropped because nothing maps them any more: overwritten or unmapped.", []string{"pool"}, nil)
	descBad        = prometheus.NewDesc("gateway_cache_bad_blocks_total", "Cached blocks that failed their checksum or could not be read; they were read from the targets.", []string{"pool", "why"}, nil)
	descCacheBytes = prometheus.NewDesc("gateway_cache_bytes", "Published blocks in the cache, by where they are.", []string{"pool", "in"}, nil)
	descMemory     = prometheus.NewDesc("gateway_cache_index_bytes", "Memory of the index of the blocks on the tier.", []string{"pool"}, nil)
	descMemoryMax  = prometheus.NewDesc("gateway_cache_index_max_bytes", "Bound of the memory of the index of the blocks on the tier.", []string{"pool"}, nil)
	descShare      = prometheus.NewDesc("gateway_cache_share_bytes", "Blocks of a disk on the tier.", []string{"pool", "disk"}, nil)
	descTarget     = prometheus.NewDesc("gateway_cache_share_target_ratio", "The part of the cache that a disk is entitled to; 0 until the tier was full.", []string{"pool", "disk"}, nil)

	descFetched   = prometheus.NewDesc("gateway_fetch_extents_total", "Extents asked of the targets, readahead included.", []string{"pool"}, nil)
	descRounds    = prometheus.NewDesc("gateway_fetch_rounds_total", "Batches in which they were asked for.", []string{"pool"}, nil)
	descJoined    = prometheus.NewDesc("gateway_fetch_joined_total", "Reads of extents that somebody else was fetching already.", []string{"pool"}, nil)
	descAhead     = prometheus.NewDesc("gateway_readahead_extents_total", "Extents read ahead, and what became of them.", []string{"pool", "outcome"}, nil)
	descLanded    = prometheus.NewDesc("gateway_readahead_hits_total", "Reads answered from memory by what had arrived a moment ago, most of it read ahead.", []string{"pool"}, nil)
	descWarmed    = prometheus.NewDesc("gateway_boot_profile_bytes_total", "Bytes of boot profiles that were read ahead after an open.", []string{"pool"}, nil)
	descHedges    = prometheus.NewDesc("gateway_hedges_total", "Slow reads of a shard by what was done: issued (others were asked), won (they were faster), denied (the budget was spent).", []string{"pool", "outcome"}, nil)
	descAvoidedRd = prometheus.NewDesc("gateway_degraded_reads_total", "Reads that were rebuilt from other shards at once, or after waiting in vain.", []string{"pool", "why"}, nil)
)

// collectReads reports how reads were served.
func collectReads(ch chan<- prometheus.Metric, r pool.ReadCounts, name string) {
	send := func(kind prometheus.ValueType, d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, kind, v, append([]string{name}, labels...)...)
	}
	count := func(d *prometheus.Desc, n uint64, labels ...string) {
		send(prometheus.CounterValue, d, float64(n), labels...)
	}
	queues := func(d *prometheus.Desc, q cache.Queue) {
		count(d, q.Small, "small")
		count(d, q.Main, "main")
	}
	c := r.Cache
	count(descHits, c.RAMHits, "ram")
	queues(descHits, c.SSDHits)
	count(descMisses, c.Misses)
	queues(descFills, c.Fills)
	count(descGhost, c.Remembered)
	count(descSkipped, c.FillsSkipped, "fill")
	count(descSkipped, c.AdoptsSkipped, "adopt")
	count(descFillBytes, c.FilledBytes, "fetched")
	count(descFillBytes, c.MovedBytes, "moved")
	queues(descEvicted, c.SlotsEvicted)
	count(descForgotten, c.Forgotten)
	count(descBad, c.CRCFailures, "checksum")
	count(descBad, c.ReadErrors, "error")
	send(prometheus.GaugeValue, descCacheBytes, float64(c.Bytes), "ssd")
	send(prometheus.GaugeValue, descCacheBytes, float64(c.RAMUsedBytes), "ram")
	send(prometheus.GaugeValue, descMemory, float64(c.MemoryBytes))
	send(prometheus.GaugeValue, descMemoryMax, float64(c.MemoryMax))
	for _, s := range r.Shares {
		send(prometheus.GaugeValue, descShare, float64(s.Bytes), s.Disk)
		send(prometheus.GaugeValue, descTarget, s.Target, s.Disk)
	}
	count(descFetched, r.Fetch.Fetched)
	count(descRounds, r.Fetch.Rounds)
	count(descJoined, r.Fetch.Shared)
	count(descAhead, r.Fetch.Ahead, "fetched")
	count(descAhead, r.Fetch.AheadUsed, "used")
	count(descAhead, r.Fetch.AheadUnread, "wasted")
	count(descLanded, r.Fetch.Landed)
	count(descWarmed, uint64(r.Warmed))
	count(descHedges, r.Hedges.Hedged, "issued")
	count(descHedges, r.Hedges.Won, "won")
	count(descHedges, r.Hedges.Denied, "denied")
	count(descAvoidedRd, r.Hedges.Avoided, "sick")
	count(descAvoidedRd, r.Hedges.Stalled, "stalled")
}
