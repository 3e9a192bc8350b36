package crashtest

// Keep says what a power cut leaves of what was not synced.
type Keep int

const (
	// KeepRandom draws by seed: all calls up to some moment, or for every file on its own nothing,
	// everything, all up to a moment, or any version of each sector.
	KeepRandom Keep = iota
	// KeepNone leaves only what is stable.
	KeepNone
	// KeepAll leaves everything written, but only a prefix of a write that the cut interrupted, and
	// of what a failed Sync left in doubt the stable version.
	KeepAll
	// KeepPrefix leaves everything up to a moment drawn by seed; the write of that moment is torn.
	KeepPrefix
	// KeepSectors leaves any version of each sector, and any of the operations on names.
	KeepSectors
)

// Reboot cuts the power, if it is still on, and returns what a machine finds afterwards, with
// KeepRandom. It can be called again with other seeds: the old FS stays as it was cut.
func (f *FS) Reboot(seed uint64) *FS { return f.RebootKeep(seed, KeepRandom) }

// RebootKeep is Reboot with a chosen way to lose. All it finds is stable; no cut and no fault is armed,
// and the capacity is the same.
func (f *FS) RebootKeep(seed uint64, keep Keep) *FS {
	f.PowerCut()
	return f.Peek(seed, keep)
}

// Peek returns what RebootKeep would if the power went now, and leaves the FS as it is.
func (f *FS) Peek(seed uint64, keep Keep) *FS {
	f.mu.Lock()
	defer f.mu.Unlock()
	b := rebooter{old: f.takeLocked(), seed: seed, keep: keep, torn: f.torn}
	return &FS{seed: mix(seed, 1), d: b.build()}
}

// rebooter makes a new disk from one that lost power.
type rebooter struct {
	old  *disk
	seed uint64
	keep Keep
	torn tornWrite
}

// plan is what happens to the volatile versions of one file, or to the operations on names.
type plan struct {
	keep   Keep   // never KeepRandom
	moment uint64 // with KeepPrefix
	seed   uint64
	newest uint64 // with KeepSectors: chances in 16 that the newest version is kept without a draw
}

// namesID stands for the operations on names where a file's id is asked for; files count from 1.
const namesID = 0

func (b *rebooter) plan(id uint64) plan {
	p := plan{keep: b.keep, seed: mix(b.seed, id)}
	moment := mix(b.seed, 2) // one for all files
	if b.keep == KeepRandom {
		if mix(b.seed, 3)%4 == 0 {
			p.keep = KeepPrefix
		} else {
			p.keep = [...]Keep{KeepNone, KeepAll, KeepPrefix, KeepSectors, KeepSectors}[mix(p.seed, 4)%5]
			moment = mix(p.seed, 2)
		}
	}
	p.moment = moment % (b.old.seq + 1)
	p.newest = [...]uint64{0, 8, 15}[mix(p.seed, 5)%3]
	return p
}

// pick draws one of n versions, oldest first, where seqs(i) is when version i was written, place
// what the draw is for, and doubt true after a failed Sync. It returns -1 for the stable one.
func (p plan) pick(n int, seqs func(int) uint64, place uint64, doubt bool) int {
	r := mix(p.seed, place)
	switch p.keep {
	case KeepAll:
		if doubt {
			return -1
		}
		return n - 1
	case KeepPrefix:
		i := n - 1
		for i >= 0 && (seqs(i) > p.moment || seqs(i) == p.moment && r%2 == 0) {
			i--
		}
		return i
	case KeepSectors:
		if r%16 < p.newest {
			return n - 1
		}
		return int(r/16%uint64(n+1)) - 1
	}
	return -1
}

func (b *rebooter) build() *disk {
	left := b.old.stable.clone()
	p := b.plan(namesID)
	for i := range b.old.pending {
		op := &b.old.pending[i]
		if p.pick(1, func(int) uint64 { return op.seq }, op.seq, false) == 0 {
			left.apply(op)
		}
	}
	below := map[*inode][]place{}
	for at := range left.at {
		below[at.dir] = append(below[at.dir], at)
	}
	d := newDisk(b.old.capacity)
	d.nextID = b.old.nextID
	b.dir(d, d.root, b.old.root, left, below)
	return d
}

// dir rebuilds what is below one folder.
func (b *rebooter) dir(d *disk, dir, old *inode, left names, below map[*inode][]place) {
	for _, at := range below[old] {
		was := left.at[at]
		var ino *inode
		if was.isDir() {
			ino = &inode{id: was.id, names: map[string]*inode{}}
			b.dir(d, ino, was, left, below)
		} else {
			ino = b.file(was)
			d.usedBytes += ino.sectors * SectorSize
		}
		ino.named = true
		dir.names[at.name] = ino
		d.stable.at[place{dir, at.name}], d.stable.where[ino] = ino, place{dir, at.name}
	}
}

// file rebuilds the content of one file. Chunks without volatile sectors are shared.
func (b *rebooter) file(old *inode) *inode {
	ino := &inode{id: old.id, chunks: make(map[int64]*chunk, len(old.chunks))}
	p := b.plan(old.id)
	ino.size = b.size(old, p)
	for n, c := range old.chunks {
		if c.vol != nil {
			c = b.chunk(ino, old, n, p)
		} else if c.owner != nil {
			c.owner = nil // from here on shared, so never changed
		}
		ino.chunks[n] = c
	}
	ino.dropBeyondSize()
	for _, c := range ino.chunks {
		for _, s := range c.cur {
			if s != nil {
				ino.sectors++
			}
		}
	}
	return ino
}

func (b *rebooter) size(old *inode, p plan) int64 {
	s := &old.sizes
	if len(s.versions) == 0 {
		return old.size
	}
	if p.keep == KeepAll && old == b.torn.ino {
		return b.torn.size(b.seed)
	}
	i := p.pick(len(s.versions), func(i int) uint64 { return s.versions[i].seq }, 6, s.inDoubt())
	if i < 0 {
		return s.stable
	}
	return s.versions[i].size
}

func (b *rebooter) chunk(ino, old *inode, n int64, p plan) *chunk {
	c := old.chunks[n]
	fresh := &chunk{owner: ino, cur: c.cur}
	for i := range c.vol {
		v := &c.vol[i]
		if len(v.versions) == 0 {
			continue
		}
		num := n*chunkSectors + int64(i)
		k := p.pick(len(v.versions), func(i int) uint64 { return v.versions[i].seq }, 7+uint64(num), !v.dirty)
		if p.keep == KeepAll && b.torn.lost(old, num, b.seed) {
			k--
		}
		fresh.cur[i] = v.stable
		if k >= 0 {
			fresh.cur[i] = v.versions[k].data
		}
	}
	return fresh
}

// dropBeyondSize removes what lies past the end of a file whose length was drawn shorter.
func (ino *inode) dropBeyondSize() {
	full, tail := ino.size/SectorSize, int(ino.size%SectorSize)
	for _, n := range ino.chunksIn(full, 1<<62) {
		for i := range int64(chunkSectors) {
			num, s := n*chunkSectors+i, ino.chunks[n].cur[i]
			if num < full || s == nil {
				continue
			}
			if num == full && tail > 0 {
				ino.own(n).cur[i] = overlay(s, zeroes[tail:], tail)
			} else {
				ino.own(n).cur[i] = nil
			}
		}
	}
}

// kept is how many sectors of the torn write are there.
func (t *tornWrite) kept(seed uint64) int64 { return int64(mix(seed, 8) % uint64(t.count+1)) }

// lost tells whether the torn write did not reach this sector.
func (t *tornWrite) lost(ino *inode, num int64, seed uint64) bool {
	return ino == t.ino && num >= t.first+t.kept(seed) && num < t.first+t.count
}

// size is the file's length with the kept part of the torn write.
func (t *tornWrite) size(seed uint64) int64 {
	kept := t.kept(seed)
	if kept == 0 {
		return t.before
	}
	return min(t.ino.size, max(t.before, (t.first+kept)*SectorSize))
}

// undoTail takes back the part of the torn write that is not kept, as if it had not been issued.
func (t *tornWrite) undoTail(d *disk, seed uint64) {
	for num := t.first + t.kept(seed); num < t.first+t.count; num++ {
		c, i := t.ino.own(num/chunkSectors), num%chunkSectors
		v := &c.vol[i]
		last := len(v.versions) - 1
		back := v.stable
		if last > 0 {
			back = v.versions[last-1].data
		}
		v.versions = v.versions[:last]
		d.count(t.ino, c.cur[i], back)
		c.cur[i] = back
	}
	if size := t.size(seed); size != t.ino.size {
		d.resize(t.ino, size)
	}
}
