package pool

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"graindisk/backend/backendtest"
	"graindisk/block"
	"graindisk/grains/segment"
	"graindisk/pool/root"
	"graindisk/vdisk"
)

// scrubWorld is what the targets of a pool hold, with everything that a pool can have there: full stripes and
// small ones, cuts since the newest checkpoint and before, checkpoints whose maps and tables are parts of
// their own.
type scrubWorld struct {
	memory []*backendtest.Memory
	models map[string][]byte
}

const scrubDisk = 1 << 20

func scrubOptions(o *Options) {
	o.CheckpointCuts, o.CheckpointBytes, o.SegmentBytes = 4, 20<<10, 2<<20
	o.mapLevel0, o.mapRun, o.tableRows = 16, 32, 6
}

// theScrubWorld is made by the first test that needs it; nobody changes it.
var theScrubWorld *scrubWorld

func newScrubWorld(t *testing.T) *scrubWorld {
	t.Helper()
	if theScrubWorld == nil {
		theScrubWorld = makeScrubWorld(t)
	}
	return theScrubWorld
}

func makeScrubWorld(t *testing.T) *scrubWorld {
	r := newRig(t, scrubOptions)
	w := &scrubWorld{models: map[string][]byte{"a": make([]byte, scrubDisk), "b": make([]byte, scrubDisk)}}
	for cut := range 11 { // of these 3 are since the checkpoint
		for name, model := range w.models {
			d := r.disk(name, scrubDisk)
			if cut == 1 || cut == 9 { // a full stripe
				p := make([]byte, 3<<18)
				for i := range p {
					p[i] = byte(rand.Uint32())
				}
				r.write(d, 1<<17, p)
				copy(model[1<<17:], p)
			}
			r.scribble(d, model, 5)
			if err := d.Write(context.Background(), []vdisk.Op{{Kind: vdisk.OpTrim, Off: 1 << 17, Len: 64 << 10}}, false); err != nil {
				t.Fatal(err)
			}
			clear(model[1<<17:][:64<<10])
		}
		r.publish()
	}
	if v := r.pool.value(); len(v.Checkpoints) != 2 || len(v.Cuts) != 3 {
		t.Fatalf("%d checkpoints and %d cuts are not what these tests need", len(v.Checkpoints), len(v.Cuts))
	}
	r.abandon()
	w.memory = r.memory
	return w
}

// rig is a fresh host before a copy of the world.
func (w *scrubWorld) rig(t *testing.T, opt func(*Options)) *rig {
	r := &rig{t: t, opt: func(o *Options) {
		scrubOptions(o)
		if opt != nil {
			opt(o)
		}
	}}
	for i, m := range w.memory {
		r.memory = append(r.memory, m.Clone())
		r.stores = append(r.stores, backendtest.NewFaulty(r.memory[i], uint64(i)))
	}
	r.newHost()
	t.Cleanup(func() {
		if r.pool != nil {
			r.abandon()
		}
	})
	return r
}

func (w *scrubWorld) expect(r *rig) {
	r.t.Helper()
	for name, model := range w.models {
		r.expect(r.disk(name, scrubDisk), model)
	}
}

func (r *rig) scrub(o ScrubOptions) ScrubReport {
	r.t.Helper()
	rep, err := r.pool.Scrub(context.Background(), o)
	if err != nil {
		r.t.Fatal(err)
	}
	return rep
}

// victim is a place in an object of one target.
type victim struct {
	what   string
	target int
	key    string
	from   int // the part of the object that is meant
	to     int
}

// victims finds one object of every kind, and in shards one place of every kind.
func (w *scrubWorld) victims(t *testing.T) []victim {
	found := map[string]victim{}
	note := func(what string, target int, key string, from, to int) {
		if _, ok := found[what]; !ok && from < to {
			found[what] = victim{what, target, key, from, to}
		}
	}
	for i, m := range w.memory {
		objects := m.Objects()
		for _, key := range slices.Sorted(maps.Keys(objects)) {
			b := objects[key]
			switch {
			case key == root.Key:
				note("copy of the root", i, key, 0, len(b))
			case strings.HasPrefix(key, "ckpt/"):
				what := "map of a checkpoint"
				if strings.Contains(key, "/0.") {
					what = "manifest of a checkpoint"
				} else if b[partHeaderLen] == '{' {
					what = "table of a checkpoint"
				}
				// Only those that the root names: the newest two.
				if strings.HasPrefix(key, "ckpt/1/2/") {
					note(what, i, key, 0, len(b))
				}
			default:
				s, err := segment.OpenShard(b)
				if err != nil {
					t.Fatal(err)
				}
				inf := s.Trailer.Info
				what := "data"
				if s.Trailer.Shard >= inf.K {
					what = "parity"
				}
				what = fmt.Sprintf("%s shard of %d+%d", what, inf.K, inf.M)
				area := segment.HeaderBytes + int(inf.ShardBytes)
				index := area + int(inf.IndexBytes)
				note(what+", header", i, key, 0, segment.HeaderBytes)
				note(what+", extents", i, key, segment.HeaderBytes, area)
				note(what+", index", i, key, area, index)
				note(what+", cut record", i, key, index, index+int(inf.CutBytes))
				note(what+", trailer", i, key, len(b)-segment.TrailerBytes, len(b))
			}
		}
	}
	kinds := slices.Sorted(maps.Keys(found))
	if len(kinds) != 4+4*5 {
		t.Fatalf("the world has %q", kinds)
	}
	var all []victim
	for _, k := range kinds {
		all = append(all, found[k])
	}
	return all
}

// groups deals victims out so that no two of a group have a stripe, or a part, in common. The root is by itself: where
// it is damaged nothing is repaired.
func groups(vs []victim) (all [][]victim) {
	alone := func(v victim) bool { return v.key == root.Key }
	stripe := func(v victim) string { return v.key[:max(0, strings.LastIndex(v.key, "."))] }
next:
	for _, v := range vs {
		for i, g := range all {
			if !slices.ContainsFunc(g, func(o victim) bool { return stripe(o) == stripe(v) || alone(o) || alone(v) }) {
				all[i] = append(g, v)
				continue next
			}
		}
		all = append(all, []victim{v})
	}
	return all
}

// spoils are ways to hurt an object: in one place, or, where a victim is the begin of one, as a whole.
func (w *scrubWorld) spoils(rng *rand.Rand) map[string]func(v victim, b []byte) []byte {
	flip := func(at func(v victim) int) func(v victim, b []byte) []byte {
		return func(v victim, b []byte) []byte { b[at(v)] ^= 1 << rng.IntN(8); return b }
	}
	random := flip(func(v victim) int { return v.from + rng.IntN(v.to-v.from) })
	return map[string]func(v victim, b []byte) []byte{
		"a bit of the first byte":     flip(func(v victim) int { return v.from }),
		"a bit of the last byte":      flip(func(v victim) int { return v.to - 1 }),
		"a bit of the version":        func(v victim, b []byte) []byte { b[v.from+5] ^= 0x40; return b }, // a damaged copy is not of a newer release
		"a bit somewhere":             random,
		"a bit somewhere else":        random,
		"whole: cut short":            func(_ victim, b []byte) []byte { return b[:rng.IntN(len(b))] },
		"whole: emptied":              func(victim, []byte) []byte { return nil },
		"whole: longer":               func(_ victim, b []byte) []byte { return append(b, 0) },
		"whole: zeroes":               func(_ victim, b []byte) []byte { clear(b); return b },
		"whole: that of another name": func(v victim, _ []byte) []byte { return w.other(v) },
		"whole: deleted":              nil,
	}
}

// TestEveryFlippedBitIsFoundAndMended hurts objects of every kind in every place of them. A fresh host opens the
// pool all the same and reads what was written; a scrub finds and mends them, byte for byte; another finds nothing.
func TestEveryFlippedBitIsFoundAndMended(t *testing.T) {
	seed := rand.Uint64()
	rng := rand.New(rand.NewPCG(seed, 1))
	w := newScrubWorld(t)
	hurt := map[string]int{}
	ways := w.spoils(rng)
	for i, how := range slices.Sorted(maps.Keys(ways)) {
		if i%scrubWaysStep != 0 {
			continue
		}
		spoil := ways[how]
		for _, vs := range groups(w.victims(t)) {
			if strings.HasPrefix(how, "whole") {
				vs = slices.DeleteFunc(vs, func(v victim) bool { return v.from > 0 })
			}
			for _, v := range vs {
				hurt[v.what]++
			}
			if len(vs) > 0 {
				w.hurtAndMend(t, vs, spoil, fmt.Sprintf("%s, seed %d", how, seed))
			}
		}
	}
	t.Logf("hurt %v", hurt)
}

func (w *scrubWorld) hurtAndMend(t *testing.T, vs []victim, spoil func(victim, []byte) []byte, how string) {
	r := w.rig(t, nil)
	damaged, missing := int64(0), int64(0)
	want := map[string]string{} // by what a problem names: its outcome
	for _, v := range vs {
		outcome := outRepaired
		if v.key == root.Key {
			outcome = outRootDown
		}
		want[fmt.Sprintf("t%d %s", v.target, v.key)] = outcome
		if spoil == nil {
			missing++
			if err := r.memory[v.target].Delete(context.Background(), v.key); err != nil {
				t.Fatal(err)
			}
			continue
		}
		damaged++
		r.memory[v.target].Damage(v.key, func(b []byte) []byte { return spoil(v, b) })
	}
	if err := r.tryOpen(true); err != nil {
		t.Fatalf("%s of %v: not opened: %v", how, vs, err)
	}
	w.expect(r)
	rep := r.scrub(ScrubOptions{})
	if rep.Damaged != damaged || rep.Missing != missing || len(rep.Problems) != len(want) {
		t.Fatalf("%s of %v: scrub says %+v", how, vs, rep)
	}
	rootHurt := int64(0)
	for _, p := range rep.Problems {
		if want[p.Target+" "+p.Object] != p.Outcome {
			t.Fatalf("%s of %v: scrub says %+v", how, vs, p)
		}
		if p.Object == root.Key {
			rootHurt = 1
		}
	}
	if rep.Repaired != damaged+missing-rootHurt || (rep.Err() != nil) != (rootHurt > 0) {
		t.Fatalf("%s of %v: scrub says %+v", how, vs, rep)
	}
	for _, v := range vs {
		if v.key != root.Key && !bytes.Equal(r.memory[v.target].Objects()[v.key], w.memory[v.target].Objects()[v.key]) {
			t.Fatalf("%s of %v: not mended byte for byte", how, v)
		}
	}
	if rep = r.scrub(ScrubOptions{}); rep.Damaged+rep.Missing+rep.Unread != rootHurt || rep.Objects == 0 {
		t.Fatalf("%s of %v: the next scrub says %+v", how, vs, rep)
	}
	w.expect(r)
	r.abandon()
}

// other is a whole object of the kind of v's under another name: a shard of another segment, a part of
// another checkpoint.
func (w *scrubWorld) other(v victim) []byte {
	prefix := v.key[:3]
	for _, m := range w.memory {
		for key, b := range m.Objects() {
			if key[:3] == prefix && key[:strings.LastIndex(key+".", ".")] != v.key[:strings.LastIndex(v.key+".", ".")] {
				return b
			}
		}
	}
	return []byte("{}")
}

// TestADryScrubChangesNothing damages objects of every kind, which another scrub repairs.
func TestADryScrubChangesNothing(t *testing.T) {
	w := newScrubWorld(t)
	for _, vs := range groups(w.victims(t))[:2] { // the root is one of them
		r := w.rig(t, nil)
		r.open(true)
		for _, v := range vs {
			r.memory[v.target].Damage(v.key, func(b []byte) []byte { return b[:len(b)-1] })
		}
		var before []map[string][]byte
		for _, m := range r.memory {
			before = append(before, m.Objects())
		}
		rep := r.scrub(ScrubOptions{DryRun: true})
		if rep.Damaged != int64(len(vs)) || rep.Repaired != 0 || !errors.Is(rep.Err(), ErrUnrepaired) {
			t.Errorf("%v hurt, scrub says %+v: %v", vs, rep, rep.Err())
		}
		for i, m := range r.memory {
			if !maps.EqualFunc(before[i], m.Objects(), bytes.Equal) {
				t.Errorf("%v hurt, target %d changed", vs, i)
			}
		}
		if rep = r.scrub(ScrubOptions{}); rep.Repaired != int64(len(vs)) || rep.Err() != nil {
			t.Errorf("%v hurt, another scrub says %+v", vs, rep)
		}
		r.abandon()
	}
}

// TestADamagedRootIsWrittenAnewByItsOwner damages a copy whose state the owner knows, since it wrote it last.
func TestADamagedRootIsWrittenAnewByItsOwner(t *testing.T) {
	w := newScrubWorld(t)
	r := w.rig(t, nil)
	r.open(true)
	r.memory[1].Damage(root.Key, func(b []byte) []byte { b[len(b)/2] ^= 1; return b })
	rep := r.scrub(ScrubOptions{})
	if rep.Damaged != 1 || rep.Repaired != 1 || rep.Err() != nil {
		t.Fatalf("scrub says %+v", rep)
	}
	if _, err := root.Decode(r.memory[1].Objects()[root.Key]); err != nil {
		t.Error(err)
	}
	// Emptied behind our back it is nobody's any more: the register must not make it up.
	if err := r.memory[1].Delete(context.Background(), root.Key); err != nil {
		t.Fatal(err)
	}
	rep = r.scrub(ScrubOptions{})
	if rep.Missing != 1 || rep.Repaired != 0 || rep.Err() == nil || r.memory[1].Objects()[root.Key] != nil {
		t.Errorf("scrub says %+v", rep)
	}
	// Nor does anything else go where no root is.
	for key := range r.memory[1].Objects() {
		if strings.HasPrefix(key, "seg/") {
			r.memory[1].Damage(key, func(b []byte) []byte { return b[1:] })
		}
	}
	before := r.memory[1].Objects()
	if rep = r.scrub(ScrubOptions{}); rep.Damaged == 0 || rep.Repaired != 0 || !maps.EqualFunc(before, r.memory[1].Objects(), bytes.Equal) {
		t.Errorf("scrub says %+v", rep.ScrubCounts)
	}
	w.expect(r)
}

// TestACheckpointWithoutAGoodCopyIsReplaced damages every copy of a part of each kind.
func TestACheckpointWithoutAGoodCopyIsReplaced(t *testing.T) {
	w := newScrubWorld(t)
	for _, v := range w.victims(t) {
		if !strings.HasPrefix(v.key, "ckpt/") {
			continue
		}
		t.Run(v.what, func(t *testing.T) {
			r := w.rig(t, nil)
			r.open(true)
			part := v.key[:strings.LastIndex(v.key, ".")+1]
			hurt := int64(0)
			for _, m := range r.memory {
				for _, key := range m.Keys() {
					if strings.HasPrefix(key, part) {
						m.Damage(key, func(b []byte) []byte { b[len(b)/2] ^= 4; return b })
						hurt++
					}
				}
			}
			rep := r.scrub(ScrubOptions{})
			if hurt < 2 || rep.Damaged != hurt || rep.Repaired != hurt || rep.Err() != nil {
				t.Fatalf("%d copies hurt, scrub says %+v", hurt, rep)
			}
			if rep = r.scrub(ScrubOptions{}); rep.Damaged+rep.Missing+rep.Unread != 0 {
				t.Errorf("the next scrub says %+v", rep)
			}
			w.expect(r)
			r.abandon()
			r.newHost()
			r.open(true)
			w.expect(r)
		})
	}
}

// TestACheckpointIsReplacedWithAllItsParts damages all copies of every part of the newest checkpoint, whose runs the
// maps still have.
func TestACheckpointIsReplacedWithAllItsParts(t *testing.T) {
	w := newScrubWorld(t)
	r := w.rig(t, nil)
	r.open(true)
	r.pool.repair.want.Store(wantWholeCheckpoint)
	r.publish()
	newest := r.pool.value().Checkpoints[0]
	hurt := int64(0)
	for _, m := range r.memory {
		for _, key := range m.Keys() {
			if prefix := fmt.Sprintf("ckpt/%d/%d/", newest.Epoch, newest.N); strings.HasPrefix(key, prefix) && !strings.HasPrefix(key, prefix+"0.") {
				m.Damage(key, func(b []byte) []byte { b[len(b)/2] ^= 4; return b })
				hurt++
			}
		}
	}
	rep := r.scrub(ScrubOptions{})
	if hurt < 4 || rep.Damaged == 0 || rep.Repaired != rep.Damaged || rep.Err() != nil {
		t.Fatalf("%d copies hurt, scrub says %+v", hurt, rep)
	}
	if rep = r.scrub(ScrubOptions{}); rep.Damaged+rep.Missing+rep.Unread != 0 {
		t.Errorf("the next scrub says %+v", rep)
	}
	r.abandon()
	r.newHost()
	r.open(true)
	w.expect(r)
}

// TestACopyThatIsWholeButAnotherIsReplaced gives one copy of each kind of part another body.
func TestACopyThatIsWholeButAnotherIsReplaced(t *testing.T) {
	w := newScrubWorld(t)
	r := w.rig(t, nil)
	r.open(true)
	for i, v := range slices.Repeat(w.victims(t), 8) {
		part := i / len(w.victims(t)) // where, in eighths
		if !strings.HasPrefix(v.key, "ckpt/") || part > 0 && !strings.HasPrefix(v.what, "map") {
			continue
		}
		var id partID
		var copyNo int
		if _, err := fmt.Sscanf(v.key, "ckpt/%d/%d/%d.%d", &id.epoch, &id.n, &id.part, &copyNo); err != nil {
			t.Fatal(err)
		}
		r.memory[v.target].Damage(v.key, func(b []byte) []byte {
			body := bytes.Clone(b[partHeaderLen:])
			if body[0] == '{' {
				body = append([]byte(" "), body...) // as good as JSON goes
			} else {
				body[len(body)*part/8] ^= 1
			}
			return encodePart(id.epoch, uint32(id.n), id.part, body)
		})
		rep := r.scrub(ScrubOptions{})
		if rep.Damaged != 1 || rep.Repaired != 1 || !bytes.Equal(r.memory[v.target].Objects()[v.key], w.memory[v.target].Objects()[v.key]) {
			t.Errorf("%s: scrub says %+v", v.what, rep)
		}
	}
}

// TestWhatIsLostIsToldByDiskAndRange hurts more shards of a stripe than it has parity, in one range. Exactly
// what lay there cannot be read, and the scrub names it; the rest is as it was.
func TestWhatIsLostIsToldByDiskAndRange(t *testing.T) {
	w := newScrubWorld(t)
	r := w.rig(t, nil)
	r.open(true)
	// A stripe of 2+1 with extents that a disk still maps.
	for _, id := range r.pool.segmentsFrom(0) {
		info, _ := r.pool.segmentRow(id)
		if info.K < 2 {
			continue
		}
		x, err := r.pool.reader.Index(context.Background(), info)
		if err != nil {
			t.Fatal(err)
		}
		slot := slices.IndexFunc(x.Entries, func(e segment.Entry) bool { return e.Shard == 1 && e.Blocks > 1 })
		if slot < 0 || !r.pool.usage.Alive(block.NewExtentID(id, slot)) {
			continue
		}
		for _, shard := range []int{1, 2} {
			store := r.memory[info.Targets[shard]-1]
			if !store.Damage(info.Key(shard), func(b []byte) []byte {
				b[segment.HeaderBytes+x.Entries[slot].Offset+block.Size] ^= 1
				return b
			}) {
				t.Fatal("no such shard")
			}
		}
	}
	rep := r.scrub(ScrubOptions{})
	if rep.Unrepairable == 0 || len(rep.Lost) == 0 || rep.LostBytes == 0 || !errors.Is(rep.Err(), ErrUnrepaired) {
		t.Fatalf("scrub says %+v", rep)
	}
	told := map[string]map[int64]bool{"a": {}, "b": {}}
	for _, l := range rep.Lost {
		for i := range l.Blocks {
			told[l.Disk][int64(l.LBA)+int64(i)] = true
		}
	}
	lost := int64(0)
	for name, model := range w.models {
		d := r.disk(name, scrubDisk)
		got := make([]byte, block.Size)
		for lba := range int64(scrubDisk / block.Size) {
			err := d.Read(context.Background(), got, lba*block.Size)
			switch {
			case told[name][lba]:
				lost += block.Size
				if !errors.Is(err, vdisk.ErrDamaged) {
					t.Fatalf("disk %s block %d is told to be lost, reading it gives %v", name, lba, err)
				}
			case err != nil:
				t.Fatalf("disk %s block %d: %v", name, lba, err)
			case !bytes.Equal(got, model[lba*block.Size:][:block.Size]):
				t.Fatalf("disk %s block %d is wrong", name, lba)
			}
		}
	}
	if lost != rep.LostBytes {
		t.Errorf("%d bytes told to be lost, %d are", rep.LostBytes, lost)
	}
}

// TestBitsThatFlipOnTheWayAreNoDamage scrubs through lines that damage every fifth answer.
func TestBitsThatFlipOnTheWayAreNoDamage(t *testing.T) {
	w := newScrubWorld(t)
	r := w.rig(t, nil)
	r.open(true)
	for _, s := range r.stores {
		s.SetRates(backendtest.Rates{backendtest.Flipped: 0.2, backendtest.Truncated: 0.05, backendtest.Refused: 0.05})
	}
	rep := r.scrub(ScrubOptions{})
	for _, s := range r.stores {
		s.SetRates(nil)
	}
	for _, p := range rep.Problems {
		if p.Object != root.Key { // whose readers look at each answer by itself, scrubTries times
			t.Errorf("problem %+v", p)
		}
	}
	if rep.Unrepairable != 0 || rep.Objects == 0 {
		t.Errorf("scrub says %+v", rep)
	}
}

// TestATargetThatIsAwayIsNotJudged scrubs with one target away and another damaged: nothing is told to be lost
// that the one away may have.
func TestATargetThatIsAwayIsNotJudged(t *testing.T) {
	w := newScrubWorld(t)
	r := w.rig(t, nil)
	r.open(true)
	for _, key := range r.memory[0].Keys() {
		if strings.HasPrefix(key, "seg/") {
			r.memory[0].Damage(key, func(b []byte) []byte { clear(b); return b })
		}
	}
	before := r.memory[0].Objects()
	r.stores[1].SetOffline(true)
	rep := r.scrub(ScrubOptions{})
	if rep.Unread == 0 || rep.Unrepairable != 0 || len(rep.Lost) > 0 || rep.Err() == nil {
		t.Fatalf("scrub says %+v", rep.ScrubCounts)
	}
	r.stores[1].SetOffline(false)
	if rep = r.scrub(ScrubOptions{}); rep.Err() != nil {
		t.Fatalf("scrub says %+v", rep.ScrubCounts)
	}
	for key, b := range w.memory[0].Objects() {
		if strings.HasPrefix(key, "seg/") && (!bytes.Equal(r.memory[0].Objects()[key], b) || bytes.Equal(before[key], b)) {
			t.Fatalf("%s is not mended", key)
		}
	}
}

// TestARepairDoesNotBringBackWhatIsDeleted takes a segment out of the table while its shard is being put back.
func TestARepairDoesNotBringBackWhatIsDeleted(t *testing.T) {
	r := newScrubWorld(t).rig(t, nil)
	r.open(true)
	id := r.pool.segmentsFrom(0)[0]
	info, _ := r.pool.segmentRow(id)
	memory := r.memory[info.Targets[0]-1]
	if err := memory.Delete(context.Background(), info.Key(0)); err != nil {
		t.Fatal(err)
	}
	r.stores[info.Targets[0]-1].Before = func(op, key string) error {
		if op == "put" && key == info.Key(0) {
			r.pool.mu.Lock()
			defer r.pool.mu.Unlock()
			delete(r.pool.segments, id)
		}
		return nil
	}
	rep := r.scrub(ScrubOptions{})
	if rep.Repaired != 0 || memory.Objects()[info.Key(0)] != nil {
		t.Errorf("scrub says %+v", rep)
	}
	r.pool.mu.Lock()
	defer r.pool.mu.Unlock()
	r.pool.segments[id] = info
}
