package crashtest

import (
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
)

// fileModel is the plainest description of one file's crash behaviour: whole snapshots.
type fileModel struct {
	now   []byte
	since [][]byte // snapshots since the last sync, the synced one first
}

func (m *fileModel) change(size int, edit func([]byte)) {
	next := make([]byte, max(size, 0))
	copy(next, m.now)
	edit(next)
	m.now = next
	m.since = append(m.since, next)
}

// explains tells whether every sector of got, and its length, are of some snapshot.
func (m *fileModel) explains(got []byte) bool {
	if !slices.ContainsFunc(m.since, func(s []byte) bool { return len(s) == len(got) }) {
		return false
	}
	for off := 0; off < len(got); off += SectorSize {
		want := got[off:min(off+SectorSize, len(got))]
		if !slices.ContainsFunc(m.since, func(s []byte) bool {
			have := make([]byte, len(want))
			if off < len(s) {
				copy(have, s[off:])
			}
			return string(have) == string(want)
		}) {
			return false
		}
	}
	return true
}

// FuzzFileCrash interprets its input as calls on one file and compares what crashes leave with
// fileModel.
func FuzzFileCrash(f *testing.F) {
	f.Add([]byte{})
	f.Add([]byte{0, 3, 200, 5, 0, 0, 0, 1, 100, 2, 1, 9, 9, 3, 20, 90})
	rng := rand.New(rand.NewPCG(1, 2))
	for range 100 {
		p := make([]byte, 150)
		for i := range p {
			p[i] = byte(rng.Uint32())
		}
		f.Add(p)
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		fs := NewFS(Options{})
		file := stableFile(t, fs, "f", "")
		m := &fileModel{since: [][]byte{nil}}
		for fill := byte(1); len(in) >= 3; in, fill = in[3:], fill+1 {
			off, n := int(in[1])*37, 1+int(in[2])*23
			switch in[0] % 6 {
			case 0, 1:
				p := []byte(strings.Repeat(string(rune(fill%128)), n))
				write(t, file, string(p), int64(off))
				m.change(max(len(m.now), off+n), func(b []byte) { copy(b[off:], p) })
			case 2:
				must(t, file.Truncate(int64(off)))
				m.change(off, func([]byte) {})
			case 3:
				must(t, file.Punch(int64(off), int64(n)))
				m.change(len(m.now), func(b []byte) { clear(b[min(off, len(b)):min(off+n, len(b))]) })
			case 4:
				must(t, file.Sync())
				m.since = [][]byte{m.now}
			case 5: // a reboot that keeps everything is a sync
				fs = fs.RebootKeep(uint64(n), KeepAll)
				var err error
				file, err = fs.Open("f")
				must(t, err)
				m.since = [][]byte{m.now}
			}
		}
		if got := content(t, fs, "f"); got != string(m.now) {
			t.Fatal("visible content differs")
		}
		if got := content(t, fs.RebootKeep(0, KeepNone), "f"); got != string(m.since[0]) {
			t.Fatal("stable content differs")
		}
		if got := content(t, fs.RebootKeep(0, KeepAll), "f"); got != string(m.now) {
			t.Fatal("kept content differs")
		}
		for seed := range uint64(12) {
			if got := content(t, fs.Reboot(seed), "f"); !m.explains([]byte(got)) {
				t.Fatalf("seed %d: no history explains what is left", seed)
			}
		}
		if got := content(t, fs.ProcessCrash(), "f"); got != string(m.now) {
			t.Fatal("content after a process crash differs")
		}
	})
}

// FuzzNamesCrash interprets its input as calls on names in two folders. After a crash each name is
// as it was at some moment since its folder was synced, or lost its file to a later name of it, and
// no file has two names.
func FuzzNamesCrash(f *testing.F) {
	f.Add([]byte{0, 0, 1, 0x10, 3, 0, 2, 1})
	f.Add([]byte("002 0Z2$79")) // a newer operation is synced, through its other folder, before older ones
	rng := rand.New(rand.NewPCG(3, 4))
	for range 100 {
		p := make([]byte, 60)
		for i := range p {
			p[i] = byte(rng.Uint32())
		}
		f.Add(p)
	}
	paths := []string{"a/1", "a/2", "a/3", "b/1", "b/2", "b/3"}
	f.Fuzz(func(t *testing.T, in []byte) {
		fs := NewFS(Options{})
		for _, dir := range []string{"a", "b", "/"} {
			must(t, fs.MkdirAll(dir))
			must(t, fs.SyncDir("/"))
		}
		now := map[string]string{}     // path to content
		since := map[string][]string{} // what a path held since its folder was synced
		for _, path := range paths {
			now[path], since[path] = "absent", []string{"absent"}
		}
		set := func(path, content string) {
			now[path] = content
			since[path] = append(since[path], content)
		}
		for id := 'A'; len(in) >= 2; in, id = in[2:], id+1 {
			path, other := paths[int(in[1]&15)%len(paths)], paths[int(in[1]>>4)%len(paths)]
			switch in[0] % 4 {
			case 0:
				if now[path] != "absent" {
					continue
				}
				file, err := fs.Create(path)
				must(t, err)
				write(t, file, string(id), 0)
				must(t, file.Sync())
				set(path, string(id))
			case 1:
				if err := fs.Remove(path); (err == nil) != (now[path] != "absent") {
					t.Fatal(err)
				}
				set(path, "absent")
			case 2:
				if err := fs.Rename(path, other); (err == nil) != (now[path] != "absent") {
					t.Fatal(err)
				}
				if now[path] != "absent" && path != other {
					set(other, now[path])
					set(path, "absent")
				}
			case 3:
				must(t, fs.SyncDir(path[:1]))
				for _, p := range paths {
					if p[0] == path[0] {
						since[p] = []string{now[p]}
					}
				}
			}
		}
		for seed := range uint64(14) {
			keep := []Keep{KeepNone, KeepAll, KeepRandom}[min(seed, 2)]
			after, seen := fs.RebootKeep(seed, keep), map[string]bool{}
			for _, path := range paths {
				got := content(t, after, path)
				if seen[got] {
					t.Fatalf("seed %d: %s is a second name of %s", seed, path, got)
				}
				seen[got] = got != "absent"
				if keep == KeepAll && got != now[path] {
					t.Fatalf("%s is %s with everything kept, was %s", path, got, now[path])
				}
				if got != "absent" && !slices.Contains(since[path], got) {
					t.Fatalf("seed %d: %s is %s, was %q", seed, path, got, since[path])
				}
			}
			wantSyncedNames(t, after, now, since)
		}
	})
}

// wantSyncedNames expects names that nothing happened to since their folder was synced.
func wantSyncedNames(t *testing.T, after *FS, now map[string]string, since map[string][]string) {
	t.Helper()
	for path, history := range since {
		if got := content(t, after, path); len(history) == 1 && got != now[path] {
			t.Fatalf("%s was synced as %s, is %s", path, now[path], got)
		}
	}
}
