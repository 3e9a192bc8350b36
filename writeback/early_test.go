package writeback

import (
	"path"
	"slices"
	"sync"
	"testing"

	"graindisk/block"
	"graindisk/internal/vfs"
)

// startFS is a file system that notes what of its slots was begun with.
type startFS struct {
	vfs.FS
	mu    sync.Mutex
	begun []begun
}

type begun struct{ off, n int64 }

type startFile struct {
	vfs.File
	fs *startFS
}

func (f startFile) Start(off, n int64) {
	f.fs.mu.Lock()
	defer f.fs.mu.Unlock()
	f.fs.begun = append(f.fs.begun, begun{off, n})
}

func (s *startFS) wrap(name string, f vfs.File, err error) (vfs.File, error) {
	if ok, _ := path.Match(slotFiles, name); !ok || err != nil {
		return f, err
	}
	return startFile{f, s}, nil
}

func (s *startFS) Open(name string) (vfs.File, error) {
	f, err := s.FS.Open(name)
	return s.wrap(name, f, err)
}

func (s *startFS) Create(name string) (vfs.File, error) {
	f, err := s.FS.Create(name)
	return s.wrap(name, f, err)
}

// TestBeginSync writes (w), syncs (s) and begins (b) in several orders, and expects what the last b began
// with: so many of the newest batches, each of a header and a block.
func TestBeginSync(t *testing.T) {
	for _, c := range []struct {
		name, calls string
		batches     int64
	}{
		{"nothing is known of the client", "wb", 0},
		{"a sync after each write", "wswb", 1},
		{"a second time", "wswbb", 0},
		{"two writes for each sync", "wwswwb", 2},
		{"the first of two was begun with", "wwswbwb", 1},
		{"the sync came first", "wswsb", 0},
		{"many writes for each sync", "wwwwwswb", 0},
		{"no sync any more", "wswwwwwb", 0},
		{"few writes again", "wwwwwswswb", 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := newRig(t, 8, 64)
			r.log.Close()
			fsys := &startFS{FS: r.fs}
			space, err := tryOpenSpace(fsys, testDir, 8, 64)
			if err != nil {
				t.Fatal(err)
			}
			l, _, err := Open(Options{FS: fsys, Dir: testDir, Space: space, Pool: testPool})
			if err == nil {
				err = l.DropThrough(0)
			}
			if err != nil {
				t.Fatal(err)
			}
			r.space, r.log = space, l
			for i, call := range c.calls {
				switch call {
				case 'w':
					r.append(data(block.LBA(i), uint64(i+1)))
				case 's':
					r.sync()
				case 'b':
					fsys.begun = nil
					l.BeginSync()
				}
			}
			l.mu.Lock()
			end := int64(l.cur.end) * block.Size
			l.mu.Unlock()
			var want []begun
			if n := c.batches * 2 * block.Size; n > 0 {
				want = []begun{{end - n, n}}
			}
			if !slices.Equal(fsys.begun, want) {
				t.Errorf("begun with %v, want %v", fsys.begun, want)
			}
		})
	}
}

// TestEarlyJoinsNeighbours expects batches side by side to be begun with at once, and else the newest.
func TestEarlyJoinsNeighbours(t *testing.T) {
	var e early
	e.wrote(7, 1)
	e.syncs()
	e.wrote(100, 5)
	e.wrote(105, 3)
	if e.at != 100 || e.blocks != 8 {
		t.Errorf("%d blocks at %d, want 8 at 100", e.blocks, e.at)
	}
	e.wrote(200, 2) // elsewhere: the newest is what a sync waits for longest
	if e.at != 200 || e.blocks != 2 {
		t.Errorf("%d blocks at %d, want 2 at 200", e.blocks, e.at)
	}
}
