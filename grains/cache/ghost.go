package cache

import (
	"sync"
	"sync/atomic"

	"graindisk/block"
)

// ghost remembers names that left the cache, or did not get in, for as long as a full tier takes to go by: it
// begins with room for a tier of 64 KiB extents and doubles while the index has more entries than that, as far as
// its memory goes. Eight cells share a bucket, newest first; a new name takes the place of the
// oldest of the disk that has most cells there, so that a scan forgets its own names.
//
//	31            8 7      0
//	+--------------+--------+
//	| fingerprint  | disk   |  0 is empty
//	+--------------+--------+
type ghost struct {
	mu    sync.Mutex
	cells []uint32
}

const ghostWays = 8

// ghostCells is how many names are remembered for a tier of that many blocks.
func ghostCells(tierBlocks int64) int64 { return max(8, tierBlocks/16/ghostWays) * ghostWays }

func (g *ghost) init(tierBlocks int64) { g.cells = make([]uint32, ghostCells(tierBlocks)) }

// growGhost doubles the ghost while there are more entries in the index than it can remember.
func (c *Cache) growGhost() {
	g := &c.ghost
	g.mu.Lock()
	defer g.mu.Unlock()
	for n := len(g.cells); int64(n) < c.entries.Load() && c.memory.spare(4*int64(n)); n = len(g.cells) {
		g.doubleLocked()
	}
}

// doubleLocked splits each bucket in two. A name belongs to one of them, which its cell does not tell: both get
// it, and one forgets it in time.
func (g *ghost) doubleLocked() {
	cells := make([]uint32, 0, 2*len(g.cells))
	for i := 0; i < len(g.cells); i += ghostWays {
		cells = append(append(cells, g.cells[i:i+ghostWays]...), g.cells[i:i+ghostWays]...)
	}
	g.cells = cells
}

func (g *ghost) bucket(id block.ExtentID) (cells []uint32, print uint32) {
	h := hash(id)
	i := h >> 32 * uint64(len(g.cells)/ghostWays) >> 32 * ghostWays
	return g.cells[i : i+ghostWays], uint32(h)&^0xff | 1<<31
}

// add remembers a name.
func (g *ghost) add(id block.ExtentID, disk uint8) {
	g.mu.Lock()
	defer g.mu.Unlock()
	cells, print := g.bucket(id)
	takeCell(cells, print)
	at := victimOf(cells, disk)
	copy(cells[1:at+1], cells[:at])
	cells[0] = print | uint32(disk)
}

// take forgets a name and reports whether it was there, and whether it is among the last to have come:
// it would still be cached if the tier were an eighth larger.
func (g *ghost) take(id block.ExtentID) (known, young bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	cells, print := g.bucket(id)
	i := takeCell(cells, print)
	return i >= 0, i == 0
}

// takeCell empties the cell of a fingerprint and returns its number, or -1.
func takeCell(cells []uint32, print uint32) int {
	for i, c := range cells {
		if c != 0 && c&^0xff == print {
			copy(cells[i:], cells[i+1:])
			cells[len(cells)-1] = 0
			return i
		}
	}
	return -1
}

// victimOf is the cell to give up for a name of disk.
func victimOf(cells []uint32, disk uint8) int {
	best, most := 0, 0
	for i, c := range cells {
		if c == 0 {
			return i
		}
		n := 0
		if uint8(c) == disk {
			n++ // with the new one
		}
		for _, other := range cells {
			if uint8(other) == uint8(c) {
				n++
			}
		}
		if n >= most {
			best, most = i, n
		}
	}
	return best
}

// recent tells the first of several reads of parts of one extent from those that follow: they come
// from one pass over it, and count as one read. A pass may take recentWindow such reads of all extents.
type recent struct {
	clock atomic.Uint32
	cells [8192]atomic.Uint32 // 20 bits of hash, the highest set, 12 bits of clock
}

const recentBytes = 8192 * 4

// recentWindow is 32 streams of 4 KiB reads through 64 KiB extents, eight times over.
const recentWindow = 4096

// first reports whether the extent of that hash was not read within the window.
func (r *recent) first(h uint64) bool {
	now := r.clock.Add(1) / (recentWindow / 4)
	c := &r.cells[h>>8%uint64(len(r.cells))]
	was, is := c.Load(), uint32(h>>32)&^0xfff|1<<31|now&0xfff
	c.Store(is)
	return was == 0 || was&^0xfff != is&^0xfff || (now-was)&0xfff >= 4
}
