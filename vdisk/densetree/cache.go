package densetree

import "sync"

// PageCache keeps pages of run files in RAM, those that were asked for again the longest. It is shared
// by all trees of a pool. Safe for concurrent use.
type PageCache struct {
	shards [cacheShards]cacheShard
}

const (
	cacheShards = 16
	slotBytes   = pageBytes + 96 // a page, its slot and its place in the map
)

// NewPageCache makes a cache of at most bytes of RAM, and of a page per shard.
func NewPageCache(bytes int64) *PageCache {
	c := &PageCache{}
	for i := range c.shards {
		c.shards[i].max = max(1, int(bytes/slotBytes/cacheShards))
		c.shards[i].at = map[pageKey]int{}
	}
	return c
}

// Bytes is what the cached pages take now.
func (c *PageCache) Bytes() (n int64) {
	for i := range c.shards {
		s := &c.shards[i]
		s.mu.Lock()
		n += int64(len(s.ring)) * slotBytes
		s.mu.Unlock()
	}
	return n
}

// pageKey names a page for as long as the process lives: numbers of files are not used again.
type pageKey struct {
	file uint64
	no   int
}

func (k pageKey) shard(c *PageCache) *cacheShard {
	h := (k.file*0x9e3779b97f4a7c15 + uint64(k.no)) * 0xbf58476d1ce4e5b9
	return &c.shards[h>>60]
}

// cacheShard is a clock: the hand passes over pages that were used since it came by the last time.
type cacheShard struct {
	mu   sync.Mutex
	max  int
	at   map[pageKey]int // in ring
	ring []cacheSlot
	hand int
}

type cacheSlot struct {
	key  pageKey
	page page // never changed; a reader may hold it longer than the cache
	used bool
}

func (c *PageCache) get(k pageKey) page {
	s := k.shard(c)
	s.mu.Lock()
	defer s.mu.Unlock()
	i, ok := s.at[k]
	if !ok {
		return nil
	}
	s.ring[i].used = true
	return s.ring[i].page
}

func (c *PageCache) put(k pageKey, p page) {
	s := k.shard(c)
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, ok := s.at[k]; ok { // two readers missed it
		return
	}
	if len(s.ring) < s.max {
		s.at[k] = len(s.ring)
		s.ring = append(s.ring, cacheSlot{key: k, page: p})
		return
	}
	for s.ring[s.hand].used {
		s.ring[s.hand].used = false
		s.hand = (s.hand + 1) % len(s.ring)
	}
	delete(s.at, s.ring[s.hand].key)
	s.at[k] = s.hand
	s.ring[s.hand] = cacheSlot{key: k, page: p}
	s.hand = (s.hand + 1) % len(s.ring)
}
