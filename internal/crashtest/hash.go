package crashtest

import (
	"maps"
	"slices"

	"github.com/zeebo/xxh3"
)

// Hash is one number for all that is visible: names, lengths and bytes. Two file systems with the same
// content have the same hash.
func (f *FS) Hash() uint64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.d == nil {
		return 0
	}
	return hashInode(f.d.root, 0)
}

func hashInode(ino *inode, h uint64) uint64 {
	if ino.isDir() {
		for _, name := range slices.Sorted(maps.Keys(ino.names)) {
			h = hashInode(ino.names[name], mix(h, hashString(name)))
		}
		return mix(h, uint64(len(ino.names)))
	}
	for _, n := range slices.Sorted(maps.Keys(ino.chunks)) {
		for i, s := range ino.chunks[n].cur {
			if s != nil && s != &zeroes {
				h = mix(h, uint64(n*chunkSectors+int64(i)), xxh3.Hash(s[:]))
			}
		}
	}
	return mix(h, uint64(ino.size))
}
