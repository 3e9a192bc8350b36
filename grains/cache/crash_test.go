package cache

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"testing"

	"graindisk/block"
	"graindisk/internal/crashtest"
	"graindisk/tier"
)

// crashRig opens a tier and a cache over a file system that may lose its power at any call.
func crashRig(fsys *crashtest.FS) (*Cache, *tier.Space, error) {
	if err := errors.Join(fsys.MkdirAll("tier"), fsys.SyncDir(".")); err != nil {
		return nil, nil, err
	}
	s, err := tier.Open(tier.Options{FS: fsys, Dir: "tier", SlotBytes: testSlotBlocks * block.Size, Slots: 12})
	if err != nil {
		return nil, nil, err
	}
	s.Claimed()
	c, err := New(s, Options{FS: fsys, Dir: "tier"})
	if err != nil {
		return nil, nil, err
	}
	s.OnEvict(c.DropSlot)
	s.OnTake(c.MakeRoom)
	if err := c.Load(never); err != nil {
		return nil, nil, err
	}
	c.WaitLoaded()
	return c, s, nil
}

// crashLife fills, adopts, reads and saves until the power goes or it is over. What it reads must be right.
func crashLife(t *testing.T, c *Cache, s *tier.Space, rnd *rand.Rand) {
	p := make([]byte, 4*block.Size)
	for range 60 {
		id := block.ExtentID(rnd.IntN(120))
		switch rnd.IntN(10) {
		case 0:
			_ = c.Save() // the power may be gone
		case 1:
			crashLog(c, s, block.ExtentID(1000+rnd.IntN(40)))
		case 2:
			c.Drop(id)
		default:
			if !c.Read(id, 0, 4, p) {
				c.Fill(1, id, extent(id, 0, 4))
			} else if !bytes.Equal(p, extent(id, 0, 4)) {
				t.Fatalf("extent %v: wrong bytes", id)
			}
		}
		c.settle()
	}
}

// crashLog writes a slot as the log does, syncs it, and has it adopted.
func crashLog(c *Cache, s *tier.Space, first block.ExtentID) {
	slot, err := s.Take(2)
	if err != nil {
		return
	}
	head := make([]byte, block.Size)
	rand.NewChaCha8([32]byte{byte(first)}).Read(head) // unlike any other
	head[0]++
	err = s.Prewrite(slot)
	if err == nil {
		err = s.WriteAt(tier.NewPlace(slot, 0), [][]byte{head})
	}
	ids := []block.ExtentID{first, first + 1, first + 2}
	refs := map[block.ExtentID][]BlockRef{}
	for i := range 12 {
		id, at := ids[i%3], tier.NewPlace(slot, uint32(1+i))
		b := content(id, i/3)
		if err == nil {
			err = s.WriteAt(at, [][]byte{b})
		}
		refs[id] = append(refs[id], BlockRef{at, block.CRC(b)})
	}
	if err == nil {
		err = s.Sync(slot)
	}
	if err != nil {
		s.Free(slot)
		return
	}
	for _, id := range ids {
		c.Adopt(2, id, refs[id])
	}
	s.SetClean(slot)
}

// TestPowerCutsNeverMixExtents cuts the power anywhere, keeps any part of what was not synced, and goes
// on with what is found: whatever a cache returns is right, and it works on.
func TestPowerCutsNeverMixExtents(t *testing.T) {
	lives, warm, stale := 0, 0, uint64(0)
	for seed := range uint64(40) {
		rnd := rand.New(rand.NewPCG(seed, 3))
		fsys := crashtest.NewFS(crashtest.Options{Seed: seed})
		for life := range 4 {
			if life > 0 {
				if rnd.IntN(3) == 0 {
					fsys = fsys.ProcessCrash()
				} else {
					fsys.PowerCut()
					fsys = fsys.Reboot(seed)
				}
			}
			fsys.CutAfter(100 + rnd.IntN(400))
			c, s, err := crashRig(fsys)
			if err != nil {
				if !fsys.WasCut() {
					t.Fatalf("seed %d life %d: %v", seed, life, err)
				}
				continue
			}
			lives++
			if c.Stats().Entries > 0 {
				warm++
			}
			p := make([]byte, 4*block.Size)
			for id := range block.ExtentID(1100) {
				if c.Read(id, 0, 4, p) && !bytes.Equal(p, extent(id, 0, 4)) {
					t.Fatalf("seed %d life %d: extent %v: wrong bytes", seed, life, id)
				}
			}
			stale += c.Stats().CRCFailures
			crashLife(t, c, s, rnd)
			if rnd.IntN(2) == 0 {
				c.Close()
			} else {
				c.closing.Store(true)
				c.evictor.close()
			}
		}
	}
	t.Logf("%d lives, %d of them found something, %d blocks failed their checksum", lives, warm, stale)
	if warm < lives/3 || stale == 0 {
		t.Error("too little was tested")
	}
}
