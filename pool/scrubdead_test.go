package pool

import (
	"errors"
	"strings"
	"testing"

	"graindisk/block"
	"graindisk/grains/segment"
)

// TestDamageThatNobodyNeedsIsNoFailure overwrites a segment whole and damages its extents beyond repair: a scrub reports
// that and says that all is well. It does not where the segment lives, nor where a cut's record is lost with it.
func TestDamageThatNobodyNeedsIsNoFailure(t *testing.T) {
	r := newRig(t, func(o *Options) { o.CheckpointCuts = 200 })
	d := r.disk("d", testDisk)
	model := make([]byte, testDisk)
	r.write(d, 0, fill(model[:256<<10], 1))
	r.publish()
	first := r.sorted()[0]
	hurt := func(how func(b []byte) []byte) {
		t.Helper()
		for n, target := range first.Targets {
			if !r.memory[target-1].Damage(first.Key(n), how) {
				t.Fatal("no such shard")
			}
		}
	}
	flip := func(b []byte) []byte { b[segment.HeaderBytes+block.Size] ^= 1; return b }
	hurt(flip)
	if rep := r.scrub(ScrubOptions{}); rep.Unrepairable == 0 || rep.Dead != 0 || rep.LostBytes == 0 || !errors.Is(rep.Err(), ErrUnrepaired) {
		t.Errorf("a living segment damaged: %+v: %v", rep, rep.Err())
	}
	r.write(d, 0, fill(model[:256<<10], 2))
	r.publish()
	if !r.pool.segmentDead(first.ID) || first.CutBytes == 0 {
		t.Fatalf("segment %d is not dead, or has no record", first.ID)
	}
	rep := r.scrub(ScrubOptions{})
	if rep.Dead != int64(first.Shards()) || rep.Damaged+rep.Missing+rep.Unrepairable+rep.LostBytes != 0 || rep.Err() != nil {
		t.Errorf("a dead segment damaged: %+v: %v", rep, rep.Err())
	}
	if len(rep.Problems) != first.Shards() || !strings.Contains(rep.Problems[0].Outcome, "nothing needs it") {
		t.Errorf("told of it: %+v", rep.Problems)
	}
	hurt(func(b []byte) []byte { return b[:len(b)/2] })
	if rep := r.scrub(ScrubOptions{}); rep.Unrepairable != int64(first.Shards()) || rep.Dead != 0 || !errors.Is(rep.Err(), ErrUnrepaired) {
		t.Errorf("a dead segment with a cut's record lost: %+v: %v", rep, rep.Err())
	}
	r.expect(d, model)
}

// fill fills p with one byte.
func fill(p []byte, b byte) []byte {
	for i := range p {
		p[i] = b
	}
	return p
}
