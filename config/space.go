package config

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"
)

// defaultTierSize is the lesser of 10 GiB and 20 % of the space that is free for the tier. What the
// tier and the local targets occupy there counts as free, or the tier would shrink from start to start.
func (c *Config) defaultTierSize() (Bytes, error) {
	at, free, err := FreeSpace(c.Tier.Dir)
	if err != nil {
		return 0, fmt.Errorf("free space for the tier at %s: %w", at, err)
	}
	var on unix.Stat_t
	if err := unix.Stat(at, &on); err != nil {
		return 0, fmt.Errorf("free space for the tier at %s: %w", at, err)
	}
	free += allocated(c.Tier.Dir, on.Dev)
	for _, p := range c.Pools {
		for _, t := range p.Targets {
			if t.Local != nil {
				free += allocated(t.Local.Dir, on.Dev)
			}
		}
	}
	size := min(free/5, TierSizeDefaultMax) / MiB * MiB
	if size < TierSizeMin {
		return 0, fmt.Errorf("20 %% of the %v MiB free at %s is less than the smallest tier, %v", int64(free/MiB), at, TierSizeMin)
	}
	return size, nil
}

// FreeSpace is how much is free for dir, or for the nearest folder above it that exists, and which
// that is.
func FreeSpace(dir string) (at string, free Bytes, err error) {
	at = dir
	var st unix.Statfs_t
	err = unix.Statfs(at, &st)
	for errors.Is(err, unix.ENOENT) && at != "/" && filepath.IsAbs(at) {
		at = filepath.Dir(at) // will be made
		err = unix.Statfs(at, &st)
	}
	return at, Bytes(st.Bavail) * Bytes(st.Bsize), err
}

// allocated is the space that the files below dir occupy on the file system dev. Files it cannot see
// count nothing: the result only steers a default.
func allocated(dir string, dev uint64) Bytes {
	var sum Bytes
	filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if err != nil {
			return nil
		}
		info, err := d.Info()
		if err != nil {
			return nil
		}
		st, ok := info.Sys().(*syscall.Stat_t)
		if !ok {
			return nil
		}
		if st.Dev == dev {
			sum += Bytes(st.Blocks) * 512
		} else if d.IsDir() {
			return fs.SkipDir
		}
		return nil
	})
	return sum
}
