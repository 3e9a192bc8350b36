package pool

import (
	"context"
	"math/rand/v2"
	"testing"
	"time"

	"graindisk/block"
	"graindisk/vdisk"
)

// TestAnOutageKeepsTheMetadataLogShort writes while no target answers, so that there is no cut: local
// checkpoints bound what a reopen has to replay all the same, and it serves, with the targets still away,
// what they held.
func TestAnOutageKeepsTheMetadataLogShort(t *testing.T) {
	const checkpointBytes = 64 << 10
	r := newRig(t, func(o *Options) {
		o.TierBytes, o.CheckpointBytes, o.RootTimeout = 96<<20, checkpointBytes, 100*time.Millisecond
		o.MaxExposure = 40 << 20
	})
	model := make([]byte, 16<<20)
	d := r.disk("d", int64(len(model)))
	r.publish()
	for _, s := range r.stores {
		s.SetOffline(true)
	}
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 1))
	longest := int64(0)
	for life := range 3 {
		for range 1500 {
			p := make([]byte, block.Size)
			for i := range p {
				p[i] = byte(rng.Uint32())
			}
			at := rng.Int64N(int64(len(model) / block.Size))
			copy(model[at*block.Size:], p)
			r.write(d, at*block.Size, p)
		}
		trim := rng.Int64N(int64(len(model)-1<<20)) / block.Size * block.Size
		if err := d.Write(context.Background(), []vdisk.Op{{Kind: vdisk.OpTrim, Off: trim, Len: 1 << 20}}, false); err != nil {
			t.Fatal(err)
		}
		clear(model[trim:][:1<<20])
		longest = max(longest, r.pool.log.MetaBytes())
		bound := max(checkpointBytes*3/2, r.pool.log.IndexBytes()/2)
		for until := time.Now().Add(time.Minute); r.pool.log.MetaBytes() >= bound; time.Sleep(time.Millisecond) {
			if time.Now().After(until) {
				t.Fatalf("life %d: the metadata log stays at %d bytes, bound %d", life, r.pool.log.MetaBytes(), bound)
			}
		}
		if s := r.pool.Status(); s.Exposure.Over || s.Exposure.BoundBytes != 40<<20 || s.Exposure.WritesWaiting {
			t.Errorf("status %+v", s.Exposure)
		}
		r.abandon()
		r.fs = r.fs.ProcessCrash()
		r.open(false)
		d = r.disk("d", int64(len(model)))
		r.expect(d, model)
	}
	if longest < checkpointBytes*3/2 {
		t.Errorf("the metadata log was never longer than %d bytes: nothing is proved", longest)
	}
	for _, s := range r.stores {
		s.SetOffline(false)
	}
	r.publish()
	r.expect(d, model)
}

// TestExposureOverItsBoundIsAnAlarm lets writes grow older than three times max_dirty_age with the targets
// away, and publishes.
func TestExposureOverItsBoundIsAnAlarm(t *testing.T) {
	r := newRig(t, func(o *Options) { o.MaxDirtyAge = 10 * time.Millisecond })
	d := r.disk("d", testDisk)
	r.publish()
	for _, s := range r.stores {
		s.SetOffline(true)
	}
	r.write(d, 0, make([]byte, block.Size))
	for until := time.Now().Add(time.Minute); !r.pool.Status().Exposure.Over; time.Sleep(time.Millisecond) {
		if time.Now().After(until) {
			t.Fatalf("no alarm: %+v", r.pool.Status())
		}
	}
	for _, s := range r.stores {
		s.SetOffline(false)
	}
	for until := time.Now().Add(time.Minute); r.pool.Status().Exposure.Over; time.Sleep(time.Millisecond) {
		if time.Now().After(until) {
			t.Fatalf("the alarm goes on: %+v", r.pool.Status())
		}
	}
}
