package pool

import (
	"bytes"
	"context"
	"errors"
	"maps"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"testing"

	"graindisk/backend"
	"graindisk/backend/backendtest"
	"graindisk/block"
	"graindisk/grains/segment"
)

// A paperPool is a pool that was never open: random cuts of random tenures, written as shards, with forks, cuts cut
// short, and segments that die and are reclaimed by the rules of DESIGN section 6. What every cut holds is
// kept as a plain table of blocks.
type paperPool struct {
	t      *testing.T
	rng    *rand.Rand
	uuid   [16]byte
	stores []*backendtest.Memory

	epoch uint64          // of the tenure
	last  block.SegmentID // highest number drawn
	stamp byte
	seen  map[string]int // what happened, to be sure that it does

	tip    *paperCut // newest committed
	expect *paperCut // what a rebuild must bring back
}

const (
	paperBlocks = 24 // of each disk
	paperDisks  = 6  // numbers, in all
)

// paperCut is the state as of a cut, and what of its history is still needed.
type paperCut struct {
	epoch, cut uint64
	crc        uint32
	rows       map[block.DiskID]segment.DiskMeta
	blocks     map[block.DiskID][]paperBlock
	segs       map[block.SegmentID]*paperSegment // not gone
	recs       map[uint64]*paperRecord           // not gone
	gaps       segment.Gone                      // Cuts alone
	dropped    map[block.SegmentID]bool          // segments that are gone
	newly      bool                              // some of that by this cut
}

// paperBlock is a block's content; zero is a hole.
type paperBlock struct {
	seg   block.SegmentID
	stamp byte
}

type paperSegment struct {
	info    segment.Info
	cut     uint64
	extents []paperExtent
}

type paperExtent struct {
	disk   block.DiskID
	lba, n int
	stamp  byte
}

type paperRecord struct {
	*segment.CutRecord
	holder block.SegmentID
}

// after is a copy to make the next cut in.
func (c *paperCut) after(epoch uint64) *paperCut {
	n := &paperCut{
		epoch: epoch, cut: c.cut + 1, rows: maps.Clone(c.rows), blocks: map[block.DiskID][]paperBlock{},
		segs: maps.Clone(c.segs), recs: maps.Clone(c.recs), dropped: maps.Clone(c.dropped), gaps: segment.Gone{Cuts: slices.Clone(c.gaps.Cuts)},
	}
	for d, bs := range c.blocks {
		n.blocks[d] = slices.Clone(bs)
	}
	return n
}

// mapped tells whether a map has anything of a segment.
func (c *paperCut) mapped(id block.SegmentID) bool {
	for d, bs := range c.blocks {
		if c.rows[d].Flags&segment.DiskDeleted == 0 && slices.ContainsFunc(bs, func(b paperBlock) bool { return b.seg == id }) {
			return true
		}
	}
	return false
}

// covered tells whether a segment older than a cut has an extent on a block.
func (c *paperCut) covered(cut uint64, d block.DiskID, lba int) bool {
	for _, s := range c.segs {
		for _, e := range s.extents {
			if s.cut < cut && e.disk == d && e.lba <= lba && lba < e.lba+e.n {
				return true
			}
		}
	}
	return false
}

func newPaperPool(t *testing.T, rng *rand.Rand) *paperPool {
	p := &paperPool{t: t, rng: rng, uuid: [16]byte{1, 2, 3}, seen: map[string]int{}, epoch: 1}
	for i := range 3 {
		p.stores = append(p.stores, backendtest.NewMemory(string(rune('a'+i))))
	}
	p.tip = &paperCut{
		rows: map[block.DiskID]segment.DiskMeta{}, blocks: map[block.DiskID][]paperBlock{},
		segs: map[block.SegmentID]*paperSegment{}, recs: map[uint64]*paperRecord{}, dropped: map[block.SegmentID]bool{},
	}
	p.expect = p.tip
	return p
}

// How a cut ends.
type paperEnd int

const (
	paperCommitted paperEnd = iota
	paperStored             // all of it is stored, and it is never committed
	paperHalf               // some of its segments are not stored well enough
	paperNoRecord           // likewise, and of the one with the record nothing is
)

func (e paperEnd) String() string {
	return [...]string{"committed", "stored", "half stored", "without a record"}[e]
}

// cut makes one cut, of what a random load and a random round of reclaim bring.
func (p *paperPool) cut(end paperEnd) {
	c := p.tip.after(p.epoch)
	rec := &segment.CutRecord{
		Epoch: p.epoch, Cut: c.cut, PrevCut: p.tip.cut, PrevCRC: p.tip.crc, Horizon: c.cut * 100, Time: 1e9,
	}
	unmaps := map[block.DiskID]map[int]bool{}
	unmap := func(d block.DiskID, lba int) {
		if unmaps[d] == nil {
			unmaps[d] = map[int]bool{}
		}
		unmaps[d][lba] = true
	}
	metas := map[block.DiskID]bool{}
	p.reclaim(c, unmap, metas)
	p.changeDisks(c, metas)
	live := c.liveDisks()
	for range p.rng.IntN(3) {
		if len(live) == 0 {
			break
		}
		d := live[p.rng.IntN(len(live))]
		lba := p.rng.IntN(paperBlocks)
		for n := 1 + p.rng.IntN(8); n > 0 && lba < paperBlocks; n, lba = n-1, lba+1 {
			unmap(d, lba)
			c.blocks[d][lba] = paperBlock{}
		}
	}
	var segs []*segment.Sealed
	n := 1 + p.rng.IntN(3)
	for i := range n {
		if i < n-1 {
			segs = append(segs, p.segment(c, nil))
			rec.Segments = append(rec.Segments, segs[i].Info)
			continue
		}
		for d := block.DiskID(1); d <= paperDisks; d++ {
			ch := segment.DiskChange{Disk: d}
			for lba := range paperBlocks {
				if !unmaps[d][lba] {
					continue
				}
				if k := len(ch.Unmaps) - 1; k >= 0 && int(ch.Unmaps[k].LBA)+int(ch.Unmaps[k].Blocks) == lba {
					ch.Unmaps[k].Blocks++
				} else {
					ch.Unmaps = append(ch.Unmaps, segment.Run{LBA: block.LBA(lba), Blocks: 1})
				}
			}
			if metas[d] {
				m := c.rows[d]
				ch.Meta = &m
			}
			if ch.Meta != nil || len(ch.Unmaps) > 0 {
				rec.Disks = append(rec.Disks, ch)
			}
		}
		rec.Gone = p.gone(c)
		segs = append(segs, p.segment(c, rec))
	}
	c.crc = rec.CRC()
	c.recs[c.cut] = &paperRecord{rec, segs[n-1].Info.ID}
	end = p.store(segs, end)
	p.seen[end.String()]++
	switch end {
	case paperCommitted:
		p.tip, p.expect = c, c
		p.deleteGone(c)
	case paperStored:
		p.expect = c
	case paperHalf:
		p.expect = p.tip // a record of this epoch is there, and says what was committed
	}
}

// changeDisks makes, renames, grows or deletes a disk.
func (p *paperPool) changeDisks(c *paperCut, metas map[block.DiskID]bool) {
	d := block.DiskID(1 + p.rng.IntN(paperDisks))
	row, known := c.rows[d]
	switch {
	case !known && (len(c.rows) == 0 || p.rng.IntN(3) == 0):
		row = segment.DiskMeta{Name: "disk" + string(rune('0'+d)), SizeBytes: paperBlocks * block.Size}
		c.blocks[d] = make([]paperBlock, paperBlocks)
	case known && row.Flags == 0 && p.rng.IntN(8) == 0:
		row.Flags = segment.DiskDeleted
		p.seen["disk deleted"]++
	case known && row.Flags == 0 && p.rng.IntN(4) == 0:
		row.Name += "x"
	default:
		return
	}
	c.rows[d], metas[d] = row, true
}

func (c *paperCut) liveDisks() (ds []block.DiskID) {
	for _, d := range slices.Sorted(maps.Keys(c.rows)) {
		if c.rows[d].Flags == 0 {
			ds = append(ds, d)
		}
	}
	return ds
}

// segment fills one with random extents, and the record if it is the cut's last.
func (p *paperPool) segment(c *paperCut, rec *segment.CutRecord) *segment.Sealed {
	p.last += block.SegmentID(1 + p.rng.IntN(2))
	s := &paperSegment{cut: c.cut}
	live := c.liveDisks()
	next := map[block.DiskID]int{}
	for range p.rng.IntN(5) {
		if len(live) == 0 {
			break
		}
		d := live[p.rng.IntN(len(live))]
		e := paperExtent{disk: d, lba: next[d] + p.rng.IntN(paperBlocks), n: 1 + p.rng.IntN(4)}
		if e.lba+e.n > paperBlocks {
			continue
		}
		p.stamp++
		e.stamp, next[d] = p.stamp, e.lba+e.n
		s.extents = append(s.extents, e)
	}
	slices.SortFunc(s.extents, func(a, b paperExtent) int {
		if a.disk != b.disk {
			return int(a.disk) - int(b.disk)
		}
		return a.lba - b.lba
	})
	bytesIn := 0
	for _, e := range s.extents {
		bytesIn += e.n * block.Size
	}
	k := uint8(1 + p.rng.IntN(2))
	b, err := segment.NewBuilder(segment.BuildOptions{
		Pool: p.uuid, ID: p.last, Epoch: p.epoch, K: k, M: 1, PayloadBytes: int64(bytesIn), ExtentBytesMax: GrainBytes,
	})
	if err != nil {
		p.t.Fatal(err)
	}
	for _, e := range s.extents {
		err := b.AddData(e.disk, block.LBA(e.lba), bytes.Repeat([]byte{e.stamp}, e.n*block.Size), c.cut*100)
		if err != nil {
			p.t.Fatal(err)
		}
		for i := range e.n {
			c.blocks[e.disk][e.lba+i] = paperBlock{p.last, e.stamp}
		}
	}
	sealed, err := b.Seal(rec, rotate([]block.TargetID{1, 2, 3}, int(p.last))[:k+1])
	if err != nil {
		p.t.Fatal(err)
	}
	s.info = sealed.Info
	c.segs[p.last] = s
	return sealed
}

// store puts the shards where they belong, or some of them.
// It tells how the cut ends, if it cannot end as it should.
func (p *paperPool) store(segs []*segment.Sealed, end paperEnd) paperEnd {
	if end == paperHalf && segs[len(segs)-1].Info.K == 1 && len(segs) == 1 {
		end = paperNoRecord // a record of which anything is there would make it complete
	}
	short := p.rng.IntN(len(segs))
	if last := len(segs) - 1; end == paperHalf && short == last && segs[last].Info.K == 1 {
		short = 0
	}
	if end == paperNoRecord {
		short = len(segs) - 1
	}
	for i, s := range segs {
		n := len(s.Shards)
		if end >= paperHalf && i == short {
			n = p.rng.IntN(int(s.Info.K))
			if i == len(segs)-1 && end == paperHalf {
				n = 1
			} else if i == len(segs)-1 {
				n = 0
			}
		}
		for shard := range n {
			_, err := p.stores[s.Info.Targets[shard]-1].Put(context.Background(), s.Info.Key(shard), s.Shards[shard], backend.Cond{Absent: true})
			if err != nil {
				p.t.Fatal(err)
			}
		}
	}
	return end
}

// reclaim drops, as of the cut before c, some of what may go, and says in c again what must not.
func (p *paperPool) reclaim(c *paperCut, unmap func(block.DiskID, int), metas map[block.DiskID]bool) {
	if p.rng.IntN(3) > 0 {
		return
	}
	drop := func(id block.SegmentID) {
		delete(c.segs, id)
		c.dropped[id], c.newly = true, true
		p.seen["segment gone"]++
	}
	dead := map[block.SegmentID]bool{}
	for id := range c.segs {
		dead[id] = !c.mapped(id)
	}
	for _, id := range slices.Sorted(maps.Keys(dead)) {
		if dead[id] && c.segs[id].info.CutBytes == 0 && p.rng.IntN(4) > 0 {
			drop(id)
		}
	}
	for _, cut := range slices.Sorted(maps.Keys(c.recs)) {
		rec := c.recs[cut]
		needed := slices.ContainsFunc(rec.Segments, func(i segment.Info) bool { return c.segs[i.ID] != nil })
		if needed || !dead[rec.holder] || p.rng.IntN(4) == 0 {
			continue
		}
		delete(c.recs, cut)
		drop(rec.holder)
		c.gaps.AddCut(cut, rec.PrevCRC)
		p.seen["record gone"]++
		for _, ch := range rec.Disks {
			if ch.Meta != nil && c.rowNeeded(ch.Disk, cut) {
				metas[ch.Disk] = true
				p.seen["row stated again"]++
			}
			if c.rows[ch.Disk].Flags != 0 {
				continue
			}
			for _, u := range ch.Unmaps {
				for lba := int(u.LBA); lba < int(u.LBA)+int(u.Blocks); lba++ {
					switch hole := c.blocks[ch.Disk][lba].seg == 0; {
					case hole && c.covered(cut, ch.Disk, lba):
						p.seen["unmap stated again"]++
						unmap(ch.Disk, lba)
					case hole && p.rng.IntN(2) == 0:
						unmap(ch.Disk, lba)
					}
				}
			}
		}
	}
}

// rowNeeded tells whether the row that the record of a cut states must be stated again before that goes.
func (c *paperCut) rowNeeded(d block.DiskID, cut uint64) bool {
	older := false
	for _, r := range c.recs {
		if i := slices.IndexFunc(r.Disks, func(ch segment.DiskChange) bool { return ch.Disk == d && ch.Meta != nil }); i >= 0 {
			if r.Cut > cut {
				return false
			}
			older = true
		}
	}
	return older || c.rows[d].Flags == 0
}

// gone is what the record of c says of it: all of it, if that is more than before.
func (p *paperPool) gone(c *paperCut) *segment.Gone {
	if len(c.dropped) == 0 || !c.newly && p.rng.IntN(3) > 0 {
		return nil
	}
	g := &segment.Gone{Cuts: slices.Clone(c.gaps.Cuts)}
	inverse := p.rng.IntN(2) == 0 // all but what is in use
	for id := block.SegmentID(1); id <= p.last+5; id++ {
		if inverse && c.segs[id] == nil || c.dropped[id] {
			if k := len(g.Segments) - 1; k >= 0 && g.Segments[k].Last+1 == id {
				g.Segments[k].Last = id
			} else {
				g.Segments = append(g.Segments, segment.SegmentRun{First: id, Last: id})
			}
		}
	}
	return g
}

// deleteGone deletes some of what is gone, and of the orphans, now that c is committed.
func (p *paperPool) deleteGone(c *paperCut) {
	for _, st := range p.stores {
		for _, key := range st.Keys() {
			id, epoch, _, _ := segment.ParseKey(key)
			if c.dropped[id] && p.rng.IntN(3) > 0 || c.segs[id] == nil && epoch < p.epoch && p.rng.IntN(3) == 0 {
				p.delete(st, key)
				p.seen["shard deleted"]++
			}
		}
	}
}

func (p *paperPool) delete(st *backendtest.Memory, key string) {
	if err := st.Delete(context.Background(), key); err != nil {
		p.t.Fatal(err)
	}
}

// live makes cuts and ends tenures.
func (p *paperPool) live(cuts int) {
	for i := range cuts {
		end := paperCommitted
		if p.rng.IntN(5) == 0 || i > cuts-3 && p.rng.IntN(2) == 0 { // what comes last is what decides
			end = paperEnd(1 + p.rng.IntN(3))
		}
		p.cut(end)
		if end == paperCommitted && p.rng.IntN(10) > 0 {
			continue
		}
		if end == paperStored && p.rng.IntN(3) == 0 {
			p.tip = p.expect // the next owner found a copy of it
			p.seen["adopted"]++
		}
		p.epoch += 1 + p.rng.Uint64N(3)
		p.last += block.SegmentID(p.rng.IntN(20))
	}
}

// TestRebuildOfWhatWasReclaimed rebuilds pools of which most has been deleted by the rules.
func TestRebuildOfWhatWasReclaimed(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	seen := map[string]int{}
	for i := range uint64(25) {
		p := newPaperPool(t, rand.New(rand.NewPCG(seed, i)))
		p.live(1 + p.rng.IntN(60))
		p.check(i)
		for what, n := range p.seen {
			seen[what] += n
		}
	}
	t.Log(seen)
	for _, what := range []string{"committed", "stored", "half stored", "without a record", "adopted", "disk deleted", "segment gone",
		"record gone", "row stated again", "unmap stated again", "shard deleted", "damage found"} {
		if seen[what] == 0 {
			t.Errorf("%s: never", what)
		}
	}
}

// check rebuilds what is there and compares, first with a shard less of each segment that is needed and then,
// for want of a whole one, not at all.
func (p *paperPool) check(i uint64) {
	r := &rig{t: p.t, memory: p.stores}
	for n, m := range p.stores {
		r.stores = append(r.stores, backendtest.NewFaulty(m, uint64(n)))
	}
	r.newHost()
	if p.expect.cut == 0 {
		if _, err := Rebuild(context.Background(), r.options(false), RebuildOptions{}); !errors.Is(err, ErrNoPool) {
			p.t.Fatalf("history %d: no cut is complete, and: %v", i, err)
		}
		return
	}
	for _, id := range slices.Sorted(maps.Keys(p.expect.segs)) {
		if info := p.expect.segs[id].info; p.rng.IntN(2) == 0 {
			shard := p.rng.IntN(info.Shards())
			p.delete(p.stores[info.Targets[shard]-1], info.Key(shard))
		}
	}
	rep, err := Rebuild(context.Background(), r.options(false), RebuildOptions{})
	if err != nil || rep.Cut != p.expect.cut || rep.CutEpoch != p.expect.epoch {
		p.t.Fatalf("history %d: %+v, %v; want cut %d of epoch %d", i, rep, err, p.expect.cut, p.expect.epoch)
	}
	r.open(false)
	defer r.abandon()
	if n := len(p.expect.liveDisks()); len(rep.Disks) != n {
		p.t.Errorf("history %d: disks %+v, want %d", i, rep.Disks, n)
	}
	for _, d := range p.expect.liveDisks() {
		var want []byte
		for _, b := range p.expect.blocks[d] {
			want = append(want, bytes.Repeat([]byte{b.stamp}, block.Size)...)
		}
		r.expect(r.disk(p.expect.rows[d].Name, 0), want)
	}
	r.expectCounts()
	r.loseRoot()
	p.checkLoss(i, r)
}

// checkLoss takes one needed segment away and expects a rebuild to say so, and the older cut that it offers, if there is
// one, to be had.
func (p *paperPool) checkLoss(i uint64, r *rig) {
	var lost []*paperSegment
	for _, id := range slices.Sorted(maps.Keys(p.expect.segs)) {
		if s := p.expect.segs[id]; s.cut < p.expect.cut {
			lost = append(lost, s)
		}
	}
	if len(lost) == 0 {
		return
	}
	info := lost[p.rng.IntN(len(lost))].info
	for shard, t := range info.Targets {
		p.delete(p.stores[t-1], info.Key(shard))
	}
	rep, err := Rebuild(context.Background(), r.options(false), RebuildOptions{DryRun: true})
	if !errors.Is(err, segment.ErrDamaged) {
		p.t.Fatalf("history %d: segment %d is lost, and: %+v, %v", i, info.ID, rep, err)
	}
	p.seen["damage found"]++
	_, older, offered := strings.Cut(err.Error(), "--cut ")
	if !offered {
		return
	}
	cut, err := strconv.ParseUint(strings.TrimSpace(strings.Split(older, ":")[0]), 10, 64)
	if err != nil {
		p.t.Fatal(err)
	}
	rep, err = Rebuild(context.Background(), r.options(false), RebuildOptions{DryRun: true, Cut: cut})
	if err != nil || rep.Cut != cut || cut >= p.expect.cut {
		p.t.Fatalf("history %d: cut %d was offered: %+v, %v", i, cut, rep, err)
	}
	p.seen["older cut offered"]++
}
