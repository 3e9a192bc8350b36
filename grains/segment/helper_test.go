package segment

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"

	"graindisk/backend"
	"graindisk/block"
)

// memStore is one target in memory that counts its reads and can be told to fail.
type memStore struct {
	mu      sync.Mutex
	objects map[string][]byte
	reads   int
	garble  int                                        // reads from now on whose bytes are hurt on their way
	fail    error                                      // if set, what every read returns
	gate    func(ctx context.Context, off int64) error // if set, called before every read
}

func (s *memStore) ReadAt(ctx context.Context, key string, p []byte, off int64) error {
	if s.gate != nil {
		if err := s.gate(ctx, off); err != nil {
			return err
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.reads++
	b, ok := s.objects[key]
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case s.fail != nil:
		return s.fail
	case !ok:
		return &backend.Error{Op: "read", Store: "mem", Key: key, Class: backend.NotFound}
	case off+int64(len(p)) > int64(len(b)):
		return &backend.Error{Op: "read", Store: "mem", Key: key, Class: backend.Short}
	}
	copy(p, b[off:])
	if s.garble > 0 {
		s.garble--
		p[len(p)/2] ^= 1
	}
	return nil
}

// targets are stores 1..n; shard i of a segment goes to store i+1.
type targets []*memStore

func newTargets(n int) targets {
	t := make(targets, n)
	for i := range t {
		t[i] = &memStore{objects: map[string][]byte{}}
	}
	return t
}

func (t targets) get(id block.TargetID) (Store, bool) {
	if id == 0 || int(id) > len(t) {
		return nil, false
	}
	return t[id-1], true
}

func (t targets) put(s *Sealed) {
	for n, b := range s.Shards {
		t[n].objects[s.Info.Key(n)] = slices.Clone(b)
	}
}

// flip changes one bit of a stored shard.
func (t targets) flip(info Info, shard int, off int64) {
	t[shard].objects[info.Key(shard)][off] ^= 4
}

func (t targets) reads() int {
	n := 0
	for _, s := range t {
		n += s.reads
		s.reads = 0
	}
	return n
}

func planned(k, m uint8) []block.TargetID {
	t := make([]block.TargetID, int(k)+int(m))
	for i := range t {
		t[i] = block.TargetID(i + 1)
	}
	return t
}

var testPool = [16]byte{0: 0xd1, 15: 0x5c}

// extent is what a test puts into a segment.
type extent struct {
	disk   block.DiskID
	lba    block.LBA
	blocks int
	seq    uint64
	data   []byte
}

// randomExtents returns n sorted extents of up to blocksMax blocks on a few disks.
func randomExtents(rng *rand.Rand, n, blocksMax int) []extent {
	list := make([]extent, n)
	disk, lba := block.DiskID(1+rng.IntN(3)), block.LBA(rng.IntN(1000))
	for i := range list {
		if rng.IntN(20) == 0 {
			disk, lba = disk+block.DiskID(1+rng.IntN(3)), block.LBA(rng.IntN(1000))
		}
		blocks := 1 + rng.IntN(blocksMax)
		data := make([]byte, blocks*block.Size)
		for j := 0; j < len(data); j += 64 {
			le.PutUint64(data[j:], rng.Uint64())
		}
		list[i] = extent{disk, lba, blocks, rng.Uint64N(1 << 40), data}
		if lba += block.LBA(blocks); rng.IntN(2) == 0 {
			lba += block.LBA(rng.IntN(300))
		}
	}
	return list
}

// build seals the extents as one segment.
func build(t testing.TB, o BuildOptions, list []extent, cut *CutRecord) *Sealed {
	t.Helper()
	o.Pool = testPool
	for _, e := range list {
		o.PayloadBytes += int64(len(e.data))
	}
	b, err := NewBuilder(o)
	if err != nil {
		t.Fatal(err)
	}
	for i, e := range list {
		p, err := b.Add(e.disk, e.lba, e.blocks, e.seq)
		if err != nil {
			t.Fatalf("extent %d of %d: %v", i, len(list), err)
		}
		copy(p, e.data)
	}
	s, err := b.Seal(cut, planned(o.K, o.M))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// readAll reads every slot in one call and compares.
func readAll(ctx context.Context, r *Reader, info Info, list []extent) error {
	slots := make([]int, len(list))
	for i := range slots {
		slots[i] = i
	}
	seen := 0
	err := r.Extents(ctx, info, slots, func(slot int, data []byte, e Entry) error {
		seen++
		return list[slot].check(data, e)
	})
	if err == nil && seen != len(list) {
		err = fmt.Errorf("%d of %d slots delivered", seen, len(list))
	}
	return err
}

func (x extent) check(data []byte, e Entry) error {
	if e.Disk != x.disk || e.LBA != x.lba || int(e.Blocks) != x.blocks || e.Seq != x.seq || !bytes.Equal(data, x.data) {
		return fmt.Errorf("got %+v, want disk %d lba %d blocks %d seq %d with its data", e, x.disk, x.lba, x.blocks, x.seq)
	}
	return nil
}

// seeded returns a generator and prints its seed should the test fail.
func seeded(t testing.TB) *rand.Rand {
	seed := rand.Uint64()
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("seed %d", seed)
		}
	})
	return rand.New(rand.NewPCG(seed, 0))
}

// losses calls f with every set of exactly m of n shards.
func losses(n, m int, f func(lost []int)) {
	all := make([]int, n)
	for i := range all {
		all[i] = i
	}
	if m == 0 {
		f(nil)
		return
	}
	for set := uint32(1)<<m - 1; set < 1<<n; set = nextSubset(set) {
		f(pick(all, set))
	}
}
