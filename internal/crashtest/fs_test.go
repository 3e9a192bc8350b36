package crashtest

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"graindisk/internal/vfs"
	"graindisk/internal/vfs/vfstest"
)

func TestConformance(t *testing.T) {
	vfstest.Run(t, func(t *testing.T) (vfs.FS, string) {
		fs := NewFS(Options{})
		must(t, fs.MkdirAll("/srv/dir"))
		return fs, "/srv/dir"
	})
}

func TestConformanceAfterReboot(t *testing.T) {
	vfstest.Run(t, func(t *testing.T) (vfs.FS, string) {
		fs := NewFS(Options{})
		must(t, fs.MkdirAll("/srv"))
		return fs.RebootKeep(1, KeepAll).ProcessCrash(), "srv"
	})
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// stableFile makes a file whose name and content are stable.
func stableFile(t testing.TB, fs *FS, path, content string) vfs.File {
	t.Helper()
	f, err := fs.Create(path)
	must(t, err)
	write(t, f, content, 0)
	must(t, f.Sync())
	must(t, fs.SyncDir("/"))
	return f
}

func write(t testing.TB, f vfs.File, content string, off int64) {
	t.Helper()
	_, err := f.WriteAt([]byte(content), off)
	must(t, err)
}

// content is what a file holds, or "absent".
func content(t testing.TB, fs *FS, path string) string {
	t.Helper()
	f, err := fs.Open(path)
	if err != nil {
		return "absent"
	}
	defer f.Close()
	size, err := f.Size()
	must(t, err)
	p := make([]byte, size)
	_, err = f.ReadAt(p, 0)
	must(t, err)
	return string(p)
}

// sectors is a content of one letter per sector.
func sectors(letters string) string {
	var b strings.Builder
	for _, l := range letters {
		b.WriteString(strings.Repeat(string(l), SectorSize))
	}
	return b.String()
}

// letters undoes sectors; a sector that is not of one byte shows as '?'.
func letters(t testing.TB, content string) string {
	t.Helper()
	var b strings.Builder
	for ; len(content) >= SectorSize; content = content[SectorSize:] {
		l := content[:1]
		if content[:SectorSize] != strings.Repeat(l, SectorSize) {
			l = "?"
		}
		b.WriteString(strings.ReplaceAll(l, "\x00", "0"))
	}
	if content != "" {
		t.Errorf("%d bytes beyond whole sectors", len(content))
	}
	return b.String()
}

// outcomes collects what a file looks like over many reboots.
func outcomes(t testing.TB, fs *FS, path string, keep Keep, seeds uint64) map[string]int {
	t.Helper()
	seen := map[string]int{}
	for seed := range seeds {
		got := content(t, fs.Peek(seed, keep), path)
		if got != "absent" {
			got = letters(t, got)
		}
		seen[got]++
	}
	return seen
}

// wantOutcomes expects exactly the listed contents, each at least once.
func wantOutcomes(t testing.TB, seen map[string]int, want ...string) {
	t.Helper()
	for _, w := range want {
		if seen[w] == 0 {
			t.Errorf("never seen: %q", w)
		}
	}
	if len(seen) != len(want) {
		t.Errorf("seen %v, want one of %q", seen, want)
	}
}

func TestUnsyncedSectorsVanishTearOrSurvive(t *testing.T) {
	fs := NewFS(Options{})
	f := stableFile(t, fs, "f", sectors("aaa"))
	write(t, f, sectors("bb"), 0)
	write(t, f, sectors("c"), SectorSize)
	fs.PowerCut()
	wantOutcomes(t, outcomes(t, fs, "f", KeepNone, 5), "aaa")
	wantOutcomes(t, outcomes(t, fs, "f", KeepAll, 5), "bca")
	wantOutcomes(t, outcomes(t, fs, "f", KeepPrefix, 200), "aaa", "aba", "baa", "bba", "bca")
	all := []string{"aaa", "aba", "aca", "baa", "bba", "bca"}
	wantOutcomes(t, outcomes(t, fs, "f", KeepSectors, 200), all...)
	wantOutcomes(t, outcomes(t, fs, "f", KeepRandom, 400), all...)
}

// TestPeekLeavesTheFSAlone goes on writing after looking, on both sides.
func TestPeekLeavesTheFSAlone(t *testing.T) {
	fs := NewFS(Options{})
	f := stableFile(t, fs, "f", sectors("ab"))
	peek := fs.Peek(0, KeepAll)
	g, err := peek.Open("f")
	must(t, err)
	write(t, f, sectors("c"), 0)
	write(t, g, sectors("d"), SectorSize)
	again := fs.RebootKeep(0, KeepAll)
	for want, fs := range map[string]*FS{"ad": peek, "cb": again} {
		if got := letters(t, content(t, fs, "f")); got != want {
			t.Errorf("f is %q, want %q", got, want)
		}
	}
	if err := f.Sync(); !errors.Is(err, ErrPowerLost) {
		t.Errorf("Sync after Reboot: %v", err)
	}
}

func TestSyncMakesStable(t *testing.T) {
	fs := NewFS(Options{})
	f := stableFile(t, fs, "f", sectors("a"))
	g := stableFile(t, fs, "g", sectors("x"))
	write(t, f, sectors("bc"), 0)
	must(t, f.Truncate(3*SectorSize))
	must(t, f.Punch(0, SectorSize))
	write(t, g, sectors("y"), 0)
	must(t, f.Sync())
	wantOutcomes(t, outcomes(t, fs, "f", KeepRandom, 50), "0c0")
	wantOutcomes(t, outcomes(t, fs, "g", KeepRandom, 50), "x", "y")
}

func TestLengthIsVolatile(t *testing.T) {
	fs := NewFS(Options{})
	f := stableFile(t, fs, "f", sectors("ab"))
	must(t, f.Truncate(SectorSize))
	write(t, f, sectors("c"), 2*SectorSize)
	wantOutcomes(t, outcomes(t, fs, "f", KeepNone, 5), "ab")
	wantOutcomes(t, outcomes(t, fs, "f", KeepAll, 5), "a0c")
	wantOutcomes(t, outcomes(t, fs, "f", KeepSectors, 300), "a", "ab", "a0", "a0c", "abc", "a00", "ab0")
}

func TestTailBeyondLengthReadsAsZeroes(t *testing.T) {
	fs := NewFS(Options{})
	f := stableFile(t, fs, "f", "0123456789")
	must(t, f.Truncate(4))
	for seed := range uint64(50) {
		after := fs.RebootKeep(seed, KeepSectors)
		g, err := after.Open("f")
		must(t, err)
		size, err := g.Size()
		must(t, err)
		must(t, g.Truncate(20))
		got := content(t, after, "f")
		if got[size:] != strings.Repeat("\x00", int(20-size)) {
			t.Fatalf("seed %d: length was %d, grown to %q", seed, size, got)
		}
	}
}

func TestNamesNeedSyncDir(t *testing.T) {
	fs := NewFS(Options{})
	stableFile(t, fs, "old", sectors("o"))
	stableFile(t, fs, "gone", sectors("g"))
	f, err := fs.Create("new")
	must(t, err)
	write(t, f, sectors("n"), 0)
	must(t, f.Sync()) // the data, not the name
	tmp, err := fs.Create("tmp")
	must(t, err)
	write(t, tmp, sectors("t"), 0)
	must(t, tmp.Sync())
	must(t, fs.Rename("tmp", "old"))
	must(t, fs.Remove("gone"))
	for _, c := range []struct {
		path string
		want []string
	}{
		{"new", []string{"n", "absent"}}, {"old", []string{"o", "t"}},
		{"gone", []string{"g", "absent"}}, {"tmp", []string{"t", "absent"}},
	} {
		wantOutcomes(t, outcomes(t, fs, c.path, KeepRandom, 100), c.want...)
	}
}

func TestSyncDirMakesNamesStable(t *testing.T) {
	fs := NewFS(Options{})
	must(t, fs.MkdirAll("d"))
	stableFile(t, fs, "old", sectors("o"))
	must(t, fs.Rename("old", "d/moved"))
	must(t, fs.SyncDir("d"))
	f, err := fs.Create("d/new") // the name stable, not the data
	must(t, err)
	write(t, f, sectors("n"), 0)
	must(t, fs.SyncDir("d"))
	must(t, fs.Remove("d/moved"))
	must(t, fs.SyncDir("d"))
	wantOutcomes(t, outcomes(t, fs, "d/moved", KeepRandom, 50), "absent")
	wantOutcomes(t, outcomes(t, fs, "old", KeepRandom, 50), "absent")
	wantOutcomes(t, outcomes(t, fs, "d/new", KeepRandom, 100), "", "0", "n")
}

func TestSyncDirOfOneFolderOnly(t *testing.T) {
	fs := NewFS(Options{})
	must(t, fs.MkdirAll("a/deep"))
	must(t, fs.SyncDir("a")) // "a" itself needs SyncDir of the root
	f, err := fs.Create("a/deep/f")
	must(t, err)
	must(t, errors.Join(f.Sync(), fs.SyncDir("a/deep")))
	wantOutcomes(t, outcomes(t, fs, "a/deep/f", KeepRandom, 50), "", "absent")
	must(t, fs.SyncDir("/"))
	wantOutcomes(t, outcomes(t, fs, "a/deep/f", KeepRandom, 50), "")
}

// TestStableNameOverridesOlderPending: an operation that became stable may not be undone by an older
// one that did not.
func TestStableNameOverridesOlderPending(t *testing.T) {
	fs := NewFS(Options{})
	must(t, errors.Join(fs.MkdirAll("x"), fs.MkdirAll("y"), fs.SyncDir("/")))
	f, err := fs.Create("x/a")
	must(t, err)
	must(t, fs.Rename("x/a", "y/b"))
	g, err := fs.Create("x/c")
	must(t, err)
	write(t, g, sectors("g"), 0)
	must(t, errors.Join(f.Sync(), g.Sync()))
	must(t, fs.SyncDir("y"))
	for seed := range uint64(50) {
		after := fs.Reboot(seed)
		if got := content(t, after, "x/a") + " " + content(t, after, "y/b"); got != "absent " {
			t.Fatalf("seed %d: x/a and y/b are %q", seed, got)
		}
	}
	wantOutcomes(t, outcomes(t, fs, "x/c", KeepRandom, 50), "g", "absent")
}

func TestCutAtEveryCall(t *testing.T) {
	run := func(fs *FS) (acked string, err error) {
		if err = fs.MkdirAll("d"); err == nil {
			err = fs.SyncDir("/")
		}
		f, err2 := fs.Create("d/f")
		if err = errors.Join(err, err2); err != nil {
			return "", err
		}
		if err = fs.SyncDir("d"); err != nil {
			return "", err
		}
		for i := range 4 {
			p := sectors(strings.Repeat(string(rune('a'+i)), 3))
			if _, err = f.WriteAt([]byte(p), int64(i*len(p))); err != nil {
				return acked, err
			}
			if err = f.Sync(); err != nil {
				return acked, err
			}
			acked += p
		}
		return acked, nil
	}
	cuts, torn := 0, 0
	for cut := 1; ; cut++ {
		fs := NewFS(Options{Seed: uint64(cut), CutAfter: cut})
		acked, err := run(fs)
		if !fs.WasCut() {
			must(t, err)
			break
		}
		cuts++
		if !errors.Is(err, ErrPowerLost) || fs.Calls() != cut {
			t.Fatalf("cut %d: error %v after %d calls", cut, err, fs.Calls())
		}
		if _, err := fs.Open("d/f"); !errors.Is(err, ErrPowerLost) {
			t.Fatalf("cut %d: Open after it: %v", cut, err)
		}
		for seed := range uint64(20) {
			got := strings.TrimSuffix(content(t, fs.Reboot(seed), "d/f"), "absent")
			if !strings.HasPrefix(got, acked) {
				t.Fatalf("cut %d, seed %d: %d bytes back of %d", cut, seed, len(got), len(acked))
			}
			if n := len(got) - len(acked); n > 3*SectorSize {
				t.Fatalf("cut %d, seed %d: %d bytes too many", cut, seed, n)
			} else if tail := letters(t, got[len(acked):]); strings.Contains(tail, "0") && strings.Trim(tail, "0") != "" {
				torn++
			}
		}
	}
	if cuts != 4+8 || torn == 0 {
		t.Errorf("%d cuts, %d torn writes", cuts, torn)
	}
}

func TestInterruptedWriteKeepsPrefix(t *testing.T) {
	crash := map[string]func(*FS) *FS{
		"process crash":     (*FS).ProcessCrash,
		"power, all kept":   func(fs *FS) *FS { return fs.RebootKeep(fs.seed, KeepAll) },
		"crash, then power": func(fs *FS) *FS { return fs.ProcessCrash().RebootKeep(0, KeepAll) },
	}
	for name, after := range crash {
		seen := map[string]int{}
		for seed := range uint64(60) {
			fs := NewFS(Options{Seed: seed})
			f := stableFile(t, fs, "f", sectors("aa"))
			write(t, f, sectors("b"), SectorSize)
			fs.CutAfter(1)
			if n, err := f.WriteAt([]byte(sectors("ccc")), 0); n != 0 || !errors.Is(err, ErrPowerLost) {
				t.Fatal(n, err)
			}
			crashed := after(fs)
			got := letters(t, content(t, crashed, "f"))
			if want := int64(len(got) * SectorSize); crashed.UsedBytes() != want {
				t.Errorf("%s: %d bytes used, want %d", name, crashed.UsedBytes(), want)
			}
			seen[got]++
		}
		t.Log(name, seen)
		wantOutcomes(t, seen, "ab", "cb", "cc", "ccc")
	}
}

func TestProcessCrashKeepsEverythingVolatile(t *testing.T) {
	fs := NewFS(Options{})
	f := stableFile(t, fs, "f", sectors("a"))
	write(t, f, sectors("b"), 0)
	if _, err := fs.Create("new"); err != nil {
		t.Fatal(err)
	}
	after := fs.ProcessCrash()
	if _, err := f.ReadAt(make([]byte, 1), 0); !errors.Is(err, ErrCrashed) {
		t.Errorf("old handle: %v", err)
	}
	if err := fs.SyncDir("/"); !errors.Is(err, ErrCrashed) {
		t.Errorf("old FS: %v", err)
	}
	must(t, f.Close())
	if got := letters(t, content(t, after, "f")); got != "b" {
		t.Errorf("f is %q", got)
	}
	if got := content(t, after, "new"); got != "" {
		t.Errorf("new is %q", got)
	}
	wantOutcomes(t, outcomes(t, after, "f", KeepRandom, 50), "a", "b")
	wantOutcomes(t, outcomes(t, after, "new", KeepRandom, 50), "", "absent")
}

func TestFailedSync(t *testing.T) {
	fs := NewFS(Options{})
	f := stableFile(t, fs, "f", sectors("aa"))
	write(t, f, sectors("bb"), 0)
	fs.Inject(Fault{Op: OpSync, Path: "/f", Count: 1})
	if err := f.Sync(); !errors.Is(err, syscall.EIO) {
		t.Fatal(err)
	}
	must(t, f.Sync()) // succeeds, and means nothing for what failed
	if got := letters(t, content(t, fs, "f")); got != "bb" {
		t.Errorf("still readable: %q", got)
	}
	wantOutcomes(t, outcomes(t, fs, "f", KeepAll, 5), "aa")
	write(t, f, sectors("c"), 0) // a new write of the sector counts again
	must(t, f.Sync())
	wantOutcomes(t, outcomes(t, fs, "f", KeepRandom, 100), "ca", "cb")
}

func TestPowerGoesSoonAfterAFault(t *testing.T) {
	fs := NewFS(Options{})
	f := stableFile(t, fs, "f", sectors("a"))
	fs.Inject(Fault{Op: OpSync, Skip: 1, Count: 2, CutAfter: 3})
	must(t, f.Sync())
	for i, want := range []error{syscall.EIO, syscall.EIO, nil, ErrPowerLost} {
		if err := f.Sync(); !errors.Is(err, want) {
			t.Errorf("sync %d: %v, want %v", i, err, want)
		}
	}
}

func TestFaults(t *testing.T) {
	fs := NewFS(Options{})
	f, g := stableFile(t, fs, "f", sectors("aaaa")), stableFile(t, fs, "g", sectors("a"))
	boom := errors.New("boom")
	fs.Inject(Fault{Op: OpRead, Path: "f", Skip: 1, Count: 2, Err: boom})
	for i, want := range []error{nil, boom, boom, nil} {
		if _, err := f.ReadAt(make([]byte, 1), 0); !errors.Is(err, want) {
			t.Errorf("read %d: %v, want %v", i, err, want)
		}
		if _, err := g.ReadAt(make([]byte, 1), 0); err != nil {
			t.Errorf("other file: %v", err)
		}
	}
	fs.Inject(Fault{Op: OpWrite, Path: "?"})
	seen := map[string]int{}
	for range 100 {
		n, err := f.WriteAt([]byte(sectors("bbb")), 0)
		if !errors.Is(err, syscall.EIO) {
			t.Fatal(err)
		}
		got := letters(t, content(t, fs, "f"))
		if got[:n/SectorSize] != strings.Repeat("b", n/SectorSize) {
			t.Errorf("%d bytes reported, file is %q", n, got)
		}
		seen[got]++
		fs.ClearFaults()
		write(t, f, sectors("aaaa"), 0)
		fs.Inject(Fault{Op: OpWrite, Path: "?"})
	}
	wantOutcomes(t, seen, "aaaa", "baaa", "bbaa", "bbba")
	fs.Inject(Fault{Op: OpRename, Count: 1})
	if err := fs.Rename("f", "h"); !errors.Is(err, syscall.EIO) || content(t, fs, "f") == "absent" {
		t.Errorf("failing rename: %v", err)
	}
	must(t, fs.Rename("f", "h"))
}

func TestCapacity(t *testing.T) {
	fs := NewFS(Options{CapacityBytes: 4 * SectorSize})
	f := stableFile(t, fs, "f", sectors("aa"))
	n, err := f.WriteAt([]byte(sectors("bbbb")), SectorSize)
	if n != 3*SectorSize || !errors.Is(err, syscall.ENOSPC) {
		t.Fatalf("%d bytes, %v", n, err)
	}
	if got := letters(t, content(t, fs, "f")); got != "abbb" {
		t.Errorf("f is %q", got)
	}
	write(t, f, sectors("cccc"), 0) // in place needs no space
	must(t, f.Punch(0, 2*SectorSize))
	g := stableFile(t, fs, "g", sectors("gg"))
	must(t, fs.Remove("g"))
	if _, err := f.WriteAt([]byte("x"), 0); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("a removed file that is open has no space to give: %v", err)
	}
	must(t, g.Close())
	write(t, f, sectors("x"), 0)
	if used := fs.UsedBytes(); used != 3*SectorSize {
		t.Errorf("%d bytes used", used)
	}
	for seed := range uint64(20) {
		after, stored := fs.Reboot(seed), 0
		for _, path := range []string{"f", "g"} {
			if got := content(t, after, path); got != "absent" {
				for _, l := range []string{"a", "b", "c", "g", "x"} {
					stored += strings.Count(got, sectors(l))
				}
			}
		}
		if used := after.UsedBytes(); used != int64(stored*SectorSize) {
			t.Errorf("seed %d: %d bytes used, %d sectors stored", seed, used, stored)
		}
	}
}

func TestCorrupt(t *testing.T) {
	fs := NewFS(Options{})
	f := stableFile(t, fs, "f", sectors("aa"))
	write(t, f, sectors("c"), 0)
	must(t, fs.Corrupt("f", 3))
	must(t, fs.Corrupt("f", 600))
	for _, c := range []struct{ off, len int64 }{{1024, 0}, {-1, 0}} {
		if fs.Corrupt("f", c.off) == nil {
			t.Errorf("Corrupt at %d of 1024 bytes succeeded", c.off)
		}
	}
	check := func(p string, old byte) {
		t.Helper()
		for i := range p {
			want := byte('a')
			if i < SectorSize {
				want = old
			}
			if i == 3 || i == 600 {
				want ^= 1
			}
			if p[i] != want {
				t.Fatalf("byte %d is %q, want %q", i, p[i], want)
			}
		}
	}
	check(content(t, fs, "f"), 'c')
	after := fs.RebootKeep(0, KeepNone)
	check(content(t, after, "f"), 'a')
	must(t, after.Corrupt("f", 3))
	check(content(t, fs.RebootKeep(0, KeepAll), "f"), 'c') // a shared chunk was not touched
}

// TestDeterminism runs one random history twice and reboots it with the same seeds.
func TestDeterminism(t *testing.T) {
	run := func() string {
		fs := NewFS(Options{Seed: 7, CapacityBytes: 100_000})
		fs.Inject(Fault{Op: OpWrite, Skip: 10, Count: 10})
		fs.Inject(Fault{Op: OpSync, Skip: 3, Count: 2})
		randomHistory(fs, rand.New(rand.NewPCG(5, 5)), 300)
		var b strings.Builder
		for seed := range uint64(30) {
			after := fs.Reboot(seed)
			randomHistory(after, rand.New(rand.NewPCG(6, seed)), 20)
			for i := range historyFiles {
				fmt.Fprintf(&b, "%q\n", content(t, after, historyPath(i)))
			}
		}
		return b.String()
	}
	if first, again := run(), run(); first != again {
		t.Error("the same calls and seeds gave different results")
	}
}

const historyFiles = 5

func historyPath(i int) string { return fmt.Sprintf("d%d/f%d", i%2, i) }

// randomHistory makes n random calls, whatever they return.
func randomHistory(fs *FS, rng *rand.Rand, n int) {
	for range n {
		path := historyPath(rng.IntN(historyFiles))
		fs.MkdirAll("d0")
		fs.MkdirAll("d1")
		f, err := fs.Open(path)
		if err != nil {
			if f, err = fs.Create(path); err != nil {
				continue
			}
		}
		p := bytes.Repeat([]byte{byte(rng.Uint32())}, rng.IntN(3000))
		switch rng.IntN(9) {
		case 0, 1, 2, 3:
			f.WriteAt(p, rng.Int64N(20_000))
		case 4:
			f.Truncate(rng.Int64N(20_000))
		case 5:
			f.Sync()
		case 6:
			fs.Rename(path, historyPath(rng.IntN(historyFiles)))
		case 7:
			fs.Remove(path)
		case 8:
			fs.SyncDir(path[:2])
		}
		f.Close()
	}
}

func TestConcurrentCut(t *testing.T) {
	fs := NewFS(Options{CutAfter: 500})
	var wg sync.WaitGroup
	for w := range 4 {
		wg.Go(func() { randomHistory(fs, rand.New(rand.NewPCG(1, uint64(w))), 1000) })
		wg.Go(func() {
			for !fs.WasCut() {
				fs.UsedBytes()
			}
			for seed := range uint64(10) {
				randomHistory(fs.Reboot(seed), rand.New(rand.NewPCG(2, seed)), 50)
			}
		})
	}
	wg.Wait()
	if !fs.WasCut() || fs.Calls() != 500 {
		t.Errorf("cut %v after %d calls", fs.WasCut(), fs.Calls())
	}
}

// TestLongHistoryRebootsFast bounds the worst case generously: it would take minutes were it quadratic.
func TestLongHistoryRebootsFast(t *testing.T) {
	fs := NewFS(Options{})
	f := stableFile(t, fs, "f", "")
	p := []byte(sectors("abcdefgh"))
	for i := range 100_000 {
		if _, err := f.WriteAt(p, int64(i*7919%16384)*4096); err != nil {
			t.Fatal(err)
		}
		if i == 50_000 {
			must(t, f.Sync())
		}
	}
	start := time.Now()
	for seed := range uint64(4) {
		if fs.Reboot(seed).UsedBytes() == 0 {
			t.Fatal("nothing left")
		}
	}
	took := time.Since(start)
	t.Logf("one reboot took %v", took/4)
	if took > 40*time.Second {
		t.Error("reboots of a history of 100 000 writes take too long")
	}
}
