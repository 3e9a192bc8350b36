package pool

import (
	"graindisk/block"
	"graindisk/grains/cache"
	"graindisk/grains/fetch"
	"graindisk/grains/segment"
)

// CacheStatus says in short how well the tier and RAM serve reads of published blocks, since the pool was opened.
type CacheStatus struct {
	HitRate       float64 `json:"hit_rate"` // 0 to 1: of what was looked for, part in the cache or read ahead; 0 if nothing was
	Hits          uint64  `json:"hits"`
	RAMHits       uint64  `json:"ram_hits"` // of these
	Misses        uint64  `json:"misses"`
	SSDBytes      int64   `json:"ssd_bytes"` // published blocks on the tier
	RAMBytes      int64   `json:"ram_bytes"` // blocks in RAM
	RAMMaxBytes   int64   `json:"ram_max_bytes"`
	IndexBytes    int64   `json:"index_bytes"` // memory of the index of the published blocks
	IndexMaxBytes int64   `json:"index_max_bytes"`
}

// ReadCounts are how reads were served since the pool was opened, in detail.
type ReadCounts struct {
	Cache  cache.Stats
	Fetch  fetch.Stats
	Hedges segment.ReadStats
	Shares []DiskShare
	Warmed int64 // bytes of boot profiles that were read ahead
}

// DiskShare is what one disk has of the tier.
type DiskShare struct {
	Disk   string  // its name; of disks whose numbers share a low byte, the one with the lowest number
	Bytes  int64   // cached
	Target float64 // its part of what is cached, as apportioned; 0 until the tier was full
}

func (p *Pool) readCounts() ReadCounts {
	c := ReadCounts{Cache: p.cache.Stats(), Fetch: p.fetcher.Stats(), Hedges: p.reader.Stats(), Warmed: p.boots.warmed.Load()}
	names, ids := map[uint8]string{}, map[uint8]block.DiskID{}
	p.mu.Lock()
	for name, d := range p.disks {
		if low := uint8(d.ID()); names[low] == "" || d.ID() < ids[low] {
			names[low], ids[low] = name, d.ID()
		}
	}
	p.mu.Unlock()
	for _, s := range p.cache.Shares() {
		if name := names[s.Disk]; name != "" { // indexes are of no disk
			c.Shares = append(c.Shares, DiskShare{name, s.Bytes, s.Target})
		}
	}
	return c
}

// short is what people want to see of the counts first.
func (c *ReadCounts) short() CacheStatus {
	s := CacheStatus{
		Hits: c.Cache.Hits, RAMHits: c.Cache.RAMHits, Misses: c.Cache.Misses, SSDBytes: c.Cache.Bytes,
		RAMBytes: c.Cache.RAMUsedBytes, RAMMaxBytes: c.Cache.RAMBytes,
		IndexBytes: c.Cache.MemoryBytes, IndexMaxBytes: c.Cache.MemoryMax,
	}
	good := s.Hits + c.Fetch.Landed
	if n := good + s.Misses; n > 0 {
		s.HitRate = float64(good) / float64(n)
	}
	return s
}
