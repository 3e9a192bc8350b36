package pool

import (
	"bytes"
	"context"
	"errors"
	"maps"
	"math/rand/v2"
	"reflect"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"graindisk/backend"
	"graindisk/block"
	"graindisk/grains/segment"
	"graindisk/writeback"
)

func samplePlacement() placement {
	return placement{id: 7, epoch: 3, targets: []block.TargetID{1, 0, 4}}
}

func TestGoldenPlacement(t *testing.T) {
	b := golden(t, "placement", samplePlacement().encode())
	got, err := decodePlacement(b)
	if err != nil || !reflect.DeepEqual(got, samplePlacement()) {
		t.Errorf("decodes to %+v, %v", got, err)
	}
	for n := range b {
		if _, err := decodePlacement(b[:n]); !errors.Is(err, writeback.ErrDamaged) {
			t.Errorf("the first %d bytes of %d: %v", n, len(b), err)
		}
	}
}

func FuzzDecodePlacement(f *testing.F) {
	f.Add(samplePlacement().encode())
	f.Fuzz(func(t *testing.T, b []byte) {
		if pl, err := decodePlacement(b); err == nil && !bytes.Equal(pl.encode(), b) {
			t.Error("what decodes does not encode back")
		}
	})
}

// filled is a rig with a disk of published random bytes, and a host that has none of them cached.
func filled(t *testing.T, opt func(*Options)) (*rig, []byte) {
	r := newRig(t, func(o *Options) {
		o.RepairRate = -1
		if opt != nil {
			opt(o)
		}
	})
	model := make([]byte, testDisk)
	for i := range model {
		model[i] = byte(rand.Uint32())
	}
	r.write(r.disk("d", testDisk), 0, model)
	r.publish()
	return r, model
}

// large makes segments of more than one data shard.
func large(o *Options) { o.SegmentBytes = 2 << 20 }

// sorted are the pool's segments, by number.
func (r *rig) sorted() []segment.Info {
	list := slices.Collect(maps.Values(r.infos()))
	slices.SortFunc(list, func(a, b segment.Info) int { return int(a.ID) - int(b.ID) })
	return list
}

// shardAt is the object of one shard, nil if its target has none.
func (r *rig) shardAt(i segment.Info, shard int) []byte {
	return r.memory[i.Targets[shard]-1].Objects()[i.Key(shard)]
}

// freshTakeover loses the host and opens the pool from its targets.
func (r *rig) freshTakeover() {
	r.t.Helper()
	r.abandon()
	r.newHost()
	r.open(true)
}

// TestAShardIsRestoredAsItWas deletes and damages every shard in turn.
func TestAShardIsRestoredAsItWas(t *testing.T) {
	r, model := filled(t, large)
	ctx := context.Background()
	for n, i := range r.sorted() {
		for s := range i.Shards() {
			was := r.shardAt(i, s)
			memory := r.memory[i.Targets[s]-1]
			damaged := true
			switch (n + s) % 4 {
			case 0:
				if err := memory.Delete(ctx, i.Key(s)); err != nil {
					t.Fatal(err)
				}
				damaged = n%2 == 0
			case 1:
				memory.Damage(i.Key(s), func(b []byte) []byte { b[rand.IntN(len(b))] ^= 1 << rand.IntN(8); return b })
			case 2:
				memory.Damage(i.Key(s), func(b []byte) []byte { return b[:rand.IntN(len(b))] })
			case 3:
				memory.Damage(i.Key(s), func(b []byte) []byte { return append(b, 1) })
			}
			if err := r.pool.restoreShard(ctx, i, s, i.Targets[s], damaged); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(r.shardAt(i, s), was) {
				t.Fatalf("shard %d of segment %d came back as other bytes", s, i.ID)
			}
		}
	}
	if n := len(r.pool.repair.notPublished()); n != 0 {
		t.Errorf("%d segments count as moved", n)
	}
	r.freshTakeover()
	r.expect(r.disk("d", testDisk), model)
}

// TestBytesOfAnotherObjectAreNotReplacedUnasked leaves an object alone that is not known to be damaged.
func TestBytesOfAnotherObjectAreNotReplacedUnasked(t *testing.T) {
	r, _ := filled(t, nil)
	i := r.sorted()[0]
	r.memory[i.Targets[1]-1].Damage(i.Key(1), func(b []byte) []byte { b[5000] ^= 1; return b })
	was := bytes.Clone(r.shardAt(i, 1))
	if err := r.pool.restoreShard(context.Background(), i, 1, i.Targets[1], false); err == nil {
		t.Error("restored over other bytes")
	}
	if !bytes.Equal(r.shardAt(i, 1), was) {
		t.Error("the object changed")
	}
}

// TestNothingIsRestoredFromTooFew asks for a shard when another one is gone or damaged too.
func TestNothingIsRestoredFromTooFew(t *testing.T) {
	r, _ := filled(t, large)
	for _, i := range r.sorted() {
		if i.K < 2 {
			continue
		}
		other := r.memory[i.Targets[2]-1]
		other.Damage(i.Key(2), func(b []byte) []byte { b[len(b)/2] ^= 4; return b })
		memory := r.memory[i.Targets[0]-1]
		if err := memory.Delete(context.Background(), i.Key(0)); err != nil {
			t.Fatal(err)
		}
		err := r.pool.restoreShard(context.Background(), i, 0, i.Targets[0], false)
		if !errors.Is(err, segment.ErrDamaged) {
			t.Errorf("segment %d: %v", i.ID, err)
		}
		if r.shardAt(i, 0) != nil {
			t.Error("something was stored")
		}
		r.stores[i.Targets[1]-1].SetOffline(true) // now it is not proven any more
		err = r.pool.restoreShard(context.Background(), i, 0, i.Targets[0], false)
		if err == nil || errors.Is(err, segment.ErrDamaged) {
			t.Errorf("with a target away: %v", err)
		}
		r.stores[i.Targets[1]-1].SetOffline(false)
	}
}

// withoutOne is a filled rig of six targets and profile 4+2, of which the first took no shards while it was
// filled, and does now.
func withoutOne(t *testing.T, opt func(*Options)) (*rig, []byte) {
	six, _ := sixTargets(func(o *Options) { o.RepairRate, o.SegmentBytes = -1, 2<<20 })
	r := newRig(t, func(o *Options) {
		six(o)
		if opt != nil {
			opt(o)
		}
	})
	var takes atomic.Bool
	r.stores[0].Before = func(op, key string) error {
		if !takes.Load() && op == "put" && strings.HasPrefix(key, "seg/") {
			return &backend.Error{Op: op, Key: key, Class: backend.Full}
		}
		return nil
	}
	model := make([]byte, testDisk)
	for i := range model {
		model[i] = byte(rand.Uint32())
	}
	d := r.disk("d", testDisk)
	r.write(d, 0, model[:1<<20])
	r.publish()
	r.write(d, 1<<20, model[1<<20:])
	r.publish()
	takes.Store(true)
	return r, model
}

// TestAPlaceIsKnownAfterACrash restores a shard elsewhere and crashes before anything else is written.
func TestAPlaceIsKnownAfterACrash(t *testing.T) {
	r, model := withoutOne(t, nil)
	moved := map[block.SegmentID][]block.TargetID{}
	for _, i := range r.sorted() {
		for s, to := range i.Targets {
			if to != 0 {
				continue
			}
			if err := r.pool.restoreShard(context.Background(), i, s, 1, false); err != nil {
				t.Fatal(err)
			}
			now, _ := r.pool.segmentInfo(i.ID)
			moved[i.ID] = now.Targets
			if now.Targets[s] != 1 {
				t.Fatalf("segment %d is on %v", i.ID, now.Targets)
			}
		}
	}
	if len(moved) == 0 {
		t.Fatal("no segment lacks a shard")
	}
	check := func(when string) {
		t.Helper()
		for id, want := range moved {
			now, _ := r.pool.segmentInfo(id)
			row, _ := r.pool.usage.Segment(id)
			if !slices.Equal(now.Targets, want) || !slices.Equal(row.Targets, want) {
				t.Errorf("%s: segment %d is on %v, by the usage table %v, want %v", when, id, now.Targets, row.Targets, want)
			}
		}
		if n := len(r.pool.repair.notPublished()); n != len(moved) {
			t.Errorf("%s: %d segments count as moved, want %d", when, n, len(moved))
		}
		if s := r.pool.Status(); s.Strength.Unpublished != len(moved) || s.SegmentsBelowStrength < len(moved) {
			t.Errorf("%s: the status says %+v", when, s.Strength)
		}
	}
	check("at once")
	r.abandon()
	r.fs = r.fs.ProcessCrash()
	r.open(false)
	check("after a crash")
	if err := r.pool.checkpointHere(context.Background()); err != nil {
		t.Fatal(err)
	}
	r.abandon()
	r.fs = r.fs.ProcessCrash()
	r.open(false)
	check("by the local checkpoint")
	r.expect(r.disk("d", testDisk), model)
	if err := r.pool.Close(context.Background()); err != nil { // which leaves nothing that another host would not know
		t.Fatal(err)
	}
	r.newHost()
	r.open(false)
	for id, want := range moved {
		if now, _ := r.pool.segmentInfo(id); !slices.Equal(now.Targets, want) {
			t.Errorf("on another host segment %d is on %v, want %v", id, now.Targets, want)
		}
	}
	r.expect(r.disk("d", testDisk), model)
}
