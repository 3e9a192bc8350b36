package crashtest

import (
	"math"
	"slices"
	"syscall"
)

// SectorSize is the unit the disk writes atomically, in bytes.
const SectorSize = 512

// chunkSectors is the span of one entry of a file's table: 64 KiB.
const chunkSectors = 128

// sector is the content of one sector; it is never changed once stored. A nil *sector is a hole.
type sector [SectorSize]byte

// zeroes stands for every stored sector of zeroes, so that files written ahead cost no memory.
var zeroes sector

// inode is a file, or a folder if names is not nil.
type inode struct {
	id    uint64
	named bool // has a visible name
	opens int  // handles on it

	names map[string]*inode // visible names in a folder

	chunks  map[int64]*chunk
	dirty   map[int64]struct{} // chunks with sectors the next Sync makes stable
	sectors int64              // visible sectors that are no holes
	size    int64
	sizes   volatileSize
}

// chunk is a run of sectors. Only its owner may change it; others clone it first. One that a reboot
// shared between file systems has no owner and no volatile sectors.
type chunk struct {
	owner *inode
	cur   [chunkSectors]*sector
	vol   *[chunkSectors]volatileSector // nil: all is stable
}

// volatileSector is the history of a sector since it was last stable.
type volatileSector struct {
	stable   *sector
	versions []version // oldest first; empty: the sector is stable
	dirty    bool      // false after a failed Sync: nobody will write it any more
}

type version struct {
	seq  uint64
	data *sector
}

// volatileSize is the history of a file's length since it was last stable.
type volatileSize struct {
	stable   int64
	versions []sizeVersion
	dirty    bool
}

type sizeVersion struct {
	seq  uint64
	size int64
}

// inDoubt tells whether a Sync failed to make the length stable: the next write that needs the length,
// or a Truncate, is as good as a new one.
func (s *volatileSize) inDoubt() bool { return len(s.versions) > 0 && !s.dirty }

func (ino *inode) isDir() bool { return ino.names != nil }

func (ino *inode) sector(n int64) *sector {
	c := ino.chunks[n/chunkSectors]
	if c == nil {
		return nil
	}
	return c.cur[n%chunkSectors]
}

// own returns chunk n ready to be changed.
func (ino *inode) own(n int64) *chunk {
	c := ino.chunks[n]
	switch {
	case c == nil:
		c = &chunk{owner: ino}
	case c.owner != ino:
		c = &chunk{owner: ino, cur: c.cur}
	default:
		return c
	}
	if ino.chunks == nil {
		ino.chunks = map[int64]*chunk{}
	}
	ino.chunks[n] = c
	return c
}

// put gives sector n a new volatile version.
func (d *disk) put(ino *inode, n int64, data *sector) {
	c, i := ino.own(n/chunkSectors), n%chunkSectors
	if c.vol == nil {
		c.vol = new([chunkSectors]volatileSector)
	}
	v := &c.vol[i]
	if len(v.versions) == 0 {
		v.stable = c.cur[i]
	}
	v.versions = append(v.versions, version{d.seq, data})
	v.dirty = true
	if ino.dirty == nil {
		ino.dirty = map[int64]struct{}{}
	}
	ino.dirty[n/chunkSectors] = struct{}{}
	d.count(ino, c.cur[i], data)
	c.cur[i] = data
}

// count keeps the books on space when a visible sector changes.
func (d *disk) count(ino *inode, from, to *sector) {
	switch {
	case from == nil && to != nil:
		ino.sectors++
		d.usedBytes += SectorSize
	case from != nil && to == nil:
		ino.sectors--
		d.usedBytes -= SectorSize
	}
}

// resize gives the file's length a new volatile version.
func (d *disk) resize(ino *inode, size int64) {
	s := &ino.sizes
	if len(s.versions) == 0 {
		s.stable = ino.size
	}
	s.versions = append(s.versions, sizeVersion{d.seq, size})
	s.dirty = true
	ino.size = size
}

// write stores p at off, as far as space allows; n is how far that was.
func (d *disk) write(ino *inode, p []byte, off int64) (n int, err error) {
	if off < 0 {
		return 0, syscall.EINVAL
	}
	if off > math.MaxInt64-int64(len(p)) {
		return 0, syscall.EFBIG
	}
	d.seq++
	for n < len(p) {
		at := off + int64(n)
		num, in := at/SectorSize, int(at%SectorSize)
		part := p[n:min(len(p), n+SectorSize-in)]
		old := ino.sector(num)
		if old == nil && d.capacity > 0 && d.usedBytes+SectorSize > d.capacity {
			err = syscall.ENOSPC
			break
		}
		d.put(ino, num, overlay(old, part, in))
		n += len(part)
	}
	if end := off + int64(n); n > 0 && (end > ino.size || end > ino.sizes.stable && ino.sizes.inDoubt()) {
		d.resize(ino, max(end, ino.size))
	}
	return n, err
}

// overlay returns old with part at offset in.
func overlay(old *sector, part []byte, in int) *sector {
	if old == nil {
		old = &zeroes
	}
	s := *old
	copy(s[in:], part)
	if s == zeroes {
		return &zeroes
	}
	return &s
}

// read copies what is visible at off, within the file's length.
func (ino *inode) read(p []byte, off int64) int {
	p = p[:max(0, min(int64(len(p)), ino.size-off))]
	for n := 0; n < len(p); {
		at := off + int64(n)
		in := int(at % SectorSize)
		part := p[n:min(len(p), n+SectorSize-in)]
		if s := ino.sector(at / SectorSize); s != nil {
			copy(part, s[in:])
		} else {
			clear(part)
		}
		n += len(part)
	}
	return len(p)
}

// punch turns [off, end) into a hole; the length stays.
func (d *disk) punch(ino *inode, off, end int64) {
	d.seq++
	first, last := off/SectorSize, (end-1)/SectorSize
	for _, c := range ino.chunksIn(first, last) {
		for i := range int64(chunkSectors) {
			n := c*chunkSectors + i
			old := ino.sector(n)
			if n < first || n > last || old == nil {
				continue
			}
			from, to := max(off-n*SectorSize, 0), min(end-n*SectorSize, SectorSize)
			var data *sector
			if to-from < SectorSize {
				data = overlay(old, zeroes[from:to], int(from))
			}
			d.put(ino, n, data)
		}
	}
}

// chunksIn lists the chunks that exist between two sectors, in order.
func (ino *inode) chunksIn(first, last int64) []int64 {
	var list []int64
	for n := range ino.chunks {
		if n >= first/chunkSectors && n <= last/chunkSectors {
			list = append(list, n)
		}
	}
	slices.Sort(list)
	return list
}

func (d *disk) truncate(ino *inode, size int64) error {
	if size < 0 {
		return syscall.EINVAL
	}
	if size < ino.size {
		d.punch(ino, size, ino.size)
	}
	if size != ino.size || ino.sizes.inDoubt() {
		d.seq++
		d.resize(ino, size)
	}
	return nil
}

// sync ends a Sync. If it failed, what was dirty is in doubt for good: it stays visible, a later Sync
// passes over it, and only a new write of the same sector can make that sector stable.
func (ino *inode) sync(failed bool) {
	for n := range ino.dirty {
		ino.chunks[n].sync(failed)
	}
	clear(ino.dirty)
	if ino.sizes.dirty && !failed {
		ino.sizes.versions = nil
	}
	ino.sizes.dirty = false
}

func (c *chunk) sync(failed bool) {
	inDoubt := false
	for i := range c.vol {
		v := &c.vol[i]
		if v.dirty && !failed {
			*v = volatileSector{}
		}
		v.dirty = false
		inDoubt = inDoubt || len(v.versions) > 0
	}
	if !inDoubt {
		c.vol = nil
	}
}

// flip inverts the lowest bit of the byte at off in every version of its sector.
func (d *disk) flip(ino *inode, off int64) {
	n := off / SectorSize
	rot := func(s *sector) *sector {
		if s == nil {
			s = &zeroes
		}
		return overlay(s, []byte{s[off%SectorSize] ^ 1}, int(off%SectorSize))
	}
	c, i := ino.own(n/chunkSectors), n%chunkSectors
	rotten := rot(c.cur[i])
	d.count(ino, c.cur[i], rotten)
	c.cur[i] = rotten
	if c.vol == nil || len(c.vol[i].versions) == 0 {
		return
	}
	v := &c.vol[i]
	v.stable = rot(v.stable)
	for j := range v.versions {
		v.versions[j].data = rot(v.versions[j].data)
	}
}
