package cache

import (
	"fmt"
	"sync"

	"golang.org/x/sys/unix"

	"graindisk/block"
)

// ram is the RAM cache: blocks of 4 KiB by extent and block, so that clones share them. Frames lie
// outside the heap and are never more than at the start; all tables are as large as they will be.
// Per shard, a clock hand with a two-bit count per frame chooses what leaves; a block that is new to a
// full cache comes in at its second read within the last two caches' worth of first ones, so that a
// scan passes by for the price of four bytes a block.
type ram struct {
	bytes  int64 // everything counted
	mem    []byte
	shards [ramShards]ramShard
}

type ramShard struct {
	mu     sync.Mutex
	frames []byte           // nil after close
	extent []block.ExtentID // by frame
	state  []uint8          // by frame: block<<2 | reads
	table  []uint32         // frame + 1 by hash, linear probing, half full
	door   []uint32         // hashes of blocks read once
	used   int              // frames that were ever in use
	spare  int              // of them, emptied by drop; from free on, each names the next in its extent
	free   int
	hand   int
}

const (
	ramShards     = 32
	ramFrameBytes = block.Size + 8 + 1 + 2*4 + 2*4 // frame, extent, state, two cells, two doors
)

// newRAM makes a RAM cache of at most that many bytes.
func newRAM(bytes int64) (*ram, error) {
	const fixed = 64 * ramShards * 4 // the structures themselves, rounded up
	n := int((bytes - fixed) / ramFrameBytes / ramShards)
	if n < 1 {
		return nil, fmt.Errorf("cache: %d bytes of RAM: at least %d", bytes, fixed+ramShards*ramFrameBytes)
	}
	mem, err := unix.Mmap(-1, 0, n*ramShards*block.Size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		return nil, fmt.Errorf("cache: %d bytes of RAM: %w", bytes, err)
	}
	r := &ram{mem: mem, bytes: fixed + int64(n)*ramShards*ramFrameBytes}
	for i := range r.shards {
		s := &r.shards[i]
		s.frames = mem[i*n*block.Size:][:n*block.Size]
		s.extent, s.state = make([]block.ExtentID, n), make([]uint8, n)
		s.table, s.door = make([]uint32, 2*n), make([]uint32, 2*n)
	}
	return r, nil
}

func (r *ram) close() {
	for i := range r.shards {
		s := &r.shards[i]
		s.mu.Lock()
		s.frames = nil
		s.used, s.spare = 0, 0
		clear(s.table)
		s.mu.Unlock()
	}
	if r.mem != nil {
		_ = unix.Munmap(r.mem) // it can only fail for a wrong address
		r.mem = nil
	}
}

// used is how many bytes of blocks there are.
func (r *ram) used() (bytes int64) {
	for i := range r.shards {
		s := &r.shards[i]
		s.mu.Lock()
		bytes += int64(s.used-s.spare) * block.Size
		s.mu.Unlock()
	}
	return bytes
}

func (r *ram) shard(id block.ExtentID) (*ramShard, uint64) {
	h := hash(id)
	return &r.shards[h>>59], h
}

// blockHash is the hash of one block of an extent of hash h.
func blockHash(h uint64, blk int) uint32 {
	return uint32((h + uint64(blk)) * 0x9e3779b97f4a7c15 >> 32)
}

func at(h uint32, n int) int { return int(uint64(h) * uint64(n) >> 32) }

// lookupLocked is the frame of a block, or -1.
func (s *ramShard) lookupLocked(id block.ExtentID, blk int, h uint32) int {
	for i := at(h, len(s.table)); s.table[i] != 0; i = wrap(i+1, len(s.table)) {
		if f := int(s.table[i] - 1); s.extent[f] == id && int(s.state[f]>>2) == blk {
			return f
		}
	}
	return -1
}

func wrap(i, n int) int {
	if i == n {
		return 0
	}
	return i
}

// get fills p with blocks of an extent, if it has them all.
func (r *ram) get(id block.ExtentID, off int, p []byte) bool {
	n := len(p) / block.Size
	if off+n > ExtentBlocksMax {
		return false
	}
	s, h := r.shard(id)
	var found [ExtentBlocksMax]int32
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := range n {
		f := s.lookupLocked(id, off+i, blockHash(h, off+i))
		if f < 0 {
			return false
		}
		found[i] = int32(f)
	}
	for i := range n {
		f := int(found[i])
		if s.state[f]&3 < 3 {
			s.state[f]++
		}
		copy(p[i*block.Size:(i+1)*block.Size], s.frames[f*block.Size:])
	}
	return true
}

// offer shows blocks that were read from the tier; those that are worth it are copied.
func (r *ram) offer(id block.ExtentID, off int, p []byte) {
	n := len(p) / block.Size
	if off+n > ExtentBlocksMax {
		return
	}
	s, h := r.shard(id)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.frames == nil {
		return
	}
	for i := range n {
		bh := blockHash(h, off+i)
		if s.lookupLocked(id, off+i, bh) < 0 && s.admitLocked(bh) {
			s.putLocked(id, off+i, bh, p[i*block.Size:(i+1)*block.Size])
		}
	}
}

// admitLocked reports whether a block that is not there may come in.
func (s *ramShard) admitLocked(h uint32) bool {
	if s.used < len(s.extent) || s.spare > 0 {
		return true
	}
	d := &s.door[at(h*0x85ebca6b, len(s.door))]
	if *d == h {
		*d = 0
		return true
	}
	*d = h
	return false
}

func (s *ramShard) putLocked(id block.ExtentID, blk int, h uint32, p []byte) {
	f := s.used
	switch {
	case s.spare > 0:
		f, s.free = s.free, int(s.extent[s.free])
		s.spare--
	case f < len(s.extent):
		s.used++
	default:
		f = s.evictLocked()
	}
	s.extent[f], s.state[f] = id, uint8(blk)<<2
	copy(s.frames[f*block.Size:], p)
	i := at(h, len(s.table))
	for s.table[i] != 0 {
		i = wrap(i+1, len(s.table))
	}
	s.table[i] = uint32(f + 1)
}

// drop empties the frames of the first blocks of an extent.
func (r *ram) drop(id block.ExtentID, blocks int) {
	s, h := r.shard(id)
	s.mu.Lock()
	defer s.mu.Unlock()
	for b := 0; b < blocks && s.used > s.spare; b++ {
		if f := s.lookupLocked(id, b, blockHash(h, b)); f >= 0 {
			s.unlinkLocked(f)
			s.extent[f], s.state[f] = block.ExtentID(s.free), 0
			s.free = f
			s.spare++
		}
	}
}

// evictLocked empties the next frame that was not read since the hand last came by. None is empty.
func (s *ramShard) evictLocked() int {
	for s.state[s.hand]&3 > 0 {
		s.state[s.hand]--
		s.hand = wrap(s.hand+1, len(s.state))
	}
	f := s.hand
	s.hand = wrap(s.hand+1, len(s.state))
	s.unlinkLocked(f)
	return f
}

// unlinkLocked takes a frame out of the table.
func (s *ramShard) unlinkLocked(f int) {
	i := s.homeLocked(f)
	for s.table[i] != uint32(f+1) {
		i = wrap(i+1, len(s.table))
	}
	for j := wrap(i+1, len(s.table)); s.table[j] != 0; j = wrap(j+1, len(s.table)) {
		home := s.homeLocked(int(s.table[j] - 1))
		if i <= j && i < home && home <= j || i > j && (i < home || home <= j) {
			continue
		}
		s.table[i] = s.table[j]
		i = j
	}
	s.table[i] = 0
}

// homeLocked is where probing for a frame's block starts.
func (s *ramShard) homeLocked(f int) int {
	return at(blockHash(hash(s.extent[f]), int(s.state[f]>>2)), len(s.table))
}

// holdsAny reports whether any of the blocks is there.
func (r *ram) holdsAny(id block.ExtentID, off, blocks int) bool {
	s, h := r.shard(id)
	s.mu.Lock()
	defer s.mu.Unlock()
	for b := off; b < off+blocks; b++ {
		if s.lookupLocked(id, b, blockHash(h, b)) >= 0 {
			return true
		}
	}
	return false
}
