package pool

import (
	"bytes"
	"errors"
	"log/slog"
	"strings"
	"testing"

	"graindisk/block"
	"graindisk/grains/cache"
)

// TestRAMIsDivided checks that the parts never add up to more than the whole, whatever the tier's size.
func TestRAMIsDivided(t *testing.T) {
	for _, c := range []struct {
		name      string
		ram, tier int64
		index     int64
	}{
		{"the default", 256 << 20, 10 << 30, 70 << 20},
		{"a large tier gets half", 512 << 20, 100 << 30, 256 << 20},
		{"a tiny tier gets a little", 16 << 20, 64 << 20, 1 << 20},
	} {
		index, segments, blocks := SplitRAM(c.ram, c.tier)
		if index != c.index || index+segments+blocks != c.ram || segments < c.ram/8 || blocks < 3*c.ram/8 {
			t.Errorf("%s: %d, %d and %d of %d bytes, want %d for the index", c.name, index, segments, blocks, c.ram, c.index)
		}
	}
}

// TestLittleRAMCachesLess opens a tier whose index does not fit, which is said, keeps to the bound and serves
// everything; and one for which there is too little to start.
func TestLittleRAMCachesLess(t *testing.T) {
	var log bytes.Buffer
	limit := int64(120 << 10)
	r := newRig(t, func(o *Options) {
		o.TierBytes, o.CacheIndexBytes = 128<<20, limit
		o.Log = slog.New(slog.NewTextHandler(&log, nil))
	})
	if !strings.Contains(log.String(), "index_bytes_wanted=196608") || !strings.Contains(log.String(), "cacheable_bytes=83886080") {
		t.Errorf("the log says nothing of the memory: %s", log.String())
	}
	model := make([]byte, 24<<20)
	d := r.disk("d", int64(len(model)))
	for off := 0; off < len(model); off += block.Size { // extents of one block
		if off/block.Size%2 == 0 {
			model[off], model[off+1] = byte(off>>12), 1
			r.write(d, int64(off), model[off:][:block.Size])
		}
		if off%(4<<20) == 0 {
			r.publish()
		}
	}
	r.publish()
	r.expect(d, model)
	s := r.pool.cache.Stats()
	if s.MemoryBytes > limit || s.Entries == 0 || s.AdoptsSkipped+s.Evicted+s.FillsSkipped == 0 {
		t.Errorf("bound %d: %+v", limit, s)
	}
	r.abandon()
	limit = 50 << 10
	if err := r.tryOpen(false); !errors.Is(err, cache.ErrMemory) || !strings.Contains(err.Error(), "tier.ram") {
		t.Errorf("opened with %d bytes for the index: %v", limit, err)
	}
}
