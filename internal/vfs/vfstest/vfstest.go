// Package vfstest is the conformance suite of vfs.FS: what every file system does while nothing
// crashes. internal/crashtest tests what happens when something does.
package vfstest

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"graindisk/internal/vfs"
)

// Run runs the suite. open returns a file system and an empty folder in it; it is called once per
// test.
func Run(t *testing.T, open func(t *testing.T) (fsys vfs.FS, dir string)) {
	for _, c := range []struct {
		name string
		test func(*testing.T, env)
	}{
		{"names that do not exist", testMissing},
		{"create empties an existing file", testCreateEmpties},
		{"rename replaces and keeps handles", testRename},
		{"a removed file lives while it is open", testRemove},
		{"folders", testFolders},
		{"a folder is not a file", testFolderAsFile},
		{"reading at the end", testReadEnd},
		{"writing beyond the end leaves zeroes", testSparse},
		{"truncate cuts and grows with zeroes", testTruncate},
		{"vectored writes", testWritev},
		{"punch reads as zeroes and keeps the length", testPunch},
		{"bad arguments", testArguments},
		{"a closed file", testClosed},
		{"random calls against plain bytes", testRandom},
		{"concurrent calls", testConcurrent},
	} {
		t.Run(c.name, func(t *testing.T) {
			fsys, dir := open(t)
			c.test(t, env{fsys, dir})
		})
	}
}

// env is one file system under test and the folder to work in.
type env struct {
	vfs.FS
	dir string
}

func (e env) path(name string) string { return e.dir + "/" + name }

func (e env) create(t *testing.T, name, content string) vfs.File {
	t.Helper()
	f, err := e.Create(e.path(name))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	if _, err := f.WriteAt([]byte(content), 0); err != nil {
		t.Fatal(err)
	}
	return f
}

func (e env) names(t *testing.T) string {
	t.Helper()
	list, err := e.ReadDir(e.dir)
	if err != nil {
		t.Fatal(err)
	}
	names := ""
	for _, entry := range list {
		names += entry.Name()
		if entry.IsDir() {
			names += "/"
		}
		names += " "
	}
	return names
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func wantErr(t *testing.T, what string, err, want error) {
	t.Helper()
	if err == nil || want != nil && !errors.Is(err, want) {
		t.Errorf("%s: error %v, want %v", what, err, want)
	}
}

func wantContent(t *testing.T, f vfs.File, want string) {
	t.Helper()
	size, err := f.Size()
	must(t, err)
	got := make([]byte, size)
	if _, err := f.ReadAt(got, 0); err != nil {
		t.Fatal(err)
	}
	if string(got) != want {
		t.Fatalf("content %q, want %q", got, want)
	}
}

func testMissing(t *testing.T, e env) {
	_, err := e.Open(e.path("x"))
	wantErr(t, "Open", err, fs.ErrNotExist)
	_, err = e.Create(e.path("no/x"))
	wantErr(t, "Create in a missing folder", err, fs.ErrNotExist)
	wantErr(t, "Remove", e.Remove(e.path("x")), fs.ErrNotExist)
	wantErr(t, "Rename", e.Rename(e.path("x"), e.path("y")), fs.ErrNotExist)
	e.create(t, "here", "")
	wantErr(t, "Rename to a missing folder", e.Rename(e.path("here"), e.path("no/x")), fs.ErrNotExist)
	_, err = e.ReadDir(e.path("no"))
	wantErr(t, "ReadDir", err, fs.ErrNotExist)
	wantErr(t, "SyncDir", e.SyncDir(e.path("no")), fs.ErrNotExist)
	if got := e.names(t); got != "here " {
		t.Errorf("names %q after calls that failed", got)
	}
}

func testCreateEmpties(t *testing.T, e env) {
	old := e.create(t, "f", "old content")
	again, err := e.Create(e.path("f"))
	must(t, err)
	defer again.Close()
	wantContent(t, old, "")
	_, err = again.WriteAt([]byte("new"), 0)
	must(t, err)
	wantContent(t, old, "new")
}

func testRename(t *testing.T, e env) {
	a, b := e.create(t, "a", "was a"), e.create(t, "b", "was b")
	must(t, e.Rename(e.path("a"), e.path("b")))
	must(t, e.Rename(e.path("b"), e.path("b")))
	if got := e.names(t); got != "b " {
		t.Errorf("names %q", got)
	}
	wantContent(t, a, "was a")
	wantContent(t, b, "was b")
	f, err := e.Open(e.path("b"))
	must(t, err)
	defer f.Close()
	wantContent(t, f, "was a")
	must(t, e.MkdirAll(e.path("sub")))
	must(t, e.Rename(e.path("b"), e.path("sub/c")))
	wantErr(t, "Rename over a folder", e.Rename(e.path("sub/c"), e.path("sub")), nil)
	must(t, e.SyncDir(e.path("sub")))
	must(t, e.SyncDir(e.dir))
	_, err = f.WriteAt([]byte("is"), 0)
	must(t, err)
	wantContent(t, a, "iss a")
}

func testRemove(t *testing.T, e env) {
	f := e.create(t, "f", "alive")
	must(t, e.Remove(e.path("f")))
	wantErr(t, "Remove twice", e.Remove(e.path("f")), fs.ErrNotExist)
	wantContent(t, f, "alive")
	must(t, f.Sync())
	g := e.create(t, "f", "other")
	wantContent(t, f, "alive")
	wantContent(t, g, "other")
}

func testFolders(t *testing.T, e env) {
	must(t, e.MkdirAll(e.path("z/y/x")))
	must(t, e.MkdirAll(e.path("z/y")))
	e.create(t, "z/y/f", "")
	e.create(t, "b", "")
	e.create(t, "a", "")
	if got, want := e.names(t), "a b z/ "; got != want {
		t.Errorf("names %q, want %q", got, want)
	}
	if got, want := (env{e.FS, e.path("z/y")}).names(t), "f x/ "; got != want {
		t.Errorf("names %q, want %q", got, want)
	}
	wantErr(t, "Remove of a full folder", e.Remove(e.path("z/y")), nil)
	must(t, e.Remove(e.path("z/y/x")))
	if list, err := e.ReadDir(e.path("z/y")); err != nil || len(list) != 1 {
		t.Errorf("ReadDir: %d names, %v", len(list), err)
	}
}

func testFolderAsFile(t *testing.T, e env) {
	must(t, e.MkdirAll(e.path("d")))
	e.create(t, "f", "")
	_, err := e.Open(e.path("d"))
	wantErr(t, "Open of a folder", err, nil)
	_, err = e.Create(e.path("d"))
	wantErr(t, "Create of a folder", err, nil)
	_, err = e.Create(e.path("f/g"))
	wantErr(t, "Create below a file", err, nil)
	wantErr(t, "MkdirAll over a file", e.MkdirAll(e.path("f")), nil)
	wantErr(t, "MkdirAll below a file", e.MkdirAll(e.path("f/d")), nil)
	_, err = e.ReadDir(e.path("f"))
	wantErr(t, "ReadDir of a file", err, nil)
}

func testReadEnd(t *testing.T, e env) {
	f := e.create(t, "f", "12345")
	for _, c := range []struct {
		off  int64
		len  int
		want string
		err  error
	}{
		{0, 5, "12345", nil}, {1, 4, "2345", nil}, {0, 6, "12345", io.EOF}, {4, 3, "5", io.EOF},
		{5, 1, "", io.EOF}, {1 << 40, 1, "", io.EOF}, {0, 0, "", nil}, {9, 0, "", nil},
	} {
		p := bytes.Repeat([]byte{0xee}, c.len)
		n, err := f.ReadAt(p, c.off)
		if err != c.err || string(p[:n]) != c.want {
			t.Errorf("ReadAt(%d bytes, %d): %q, %v; want %q, %v", c.len, c.off, p[:n], err, c.want, c.err)
		}
	}
}

func testSparse(t *testing.T, e env) {
	f := e.create(t, "f", "ab")
	_, err := f.WriteAt([]byte("z"), 5000)
	must(t, err)
	wantContent(t, f, "ab"+string(make([]byte, 4998))+"z")
	_, err = f.WriteAt(nil, 9000)
	must(t, err)
	if size, err := f.Size(); size != 5001 || err != nil {
		t.Errorf("size %d after an empty write, %v", size, err)
	}
}

func testTruncate(t *testing.T, e env) {
	f := e.create(t, "f", "0123456789")
	must(t, f.Truncate(4))
	must(t, f.Truncate(8))
	wantContent(t, f, "0123\x00\x00\x00\x00")
	must(t, f.Truncate(600))
	must(t, f.Truncate(0))
	must(t, f.Truncate(2))
	wantContent(t, f, "\x00\x00")
}

func testWritev(t *testing.T, e env) {
	f := e.create(t, "f", "")
	must(t, f.WritevAt([][]byte{[]byte("ab"), nil, []byte("c"), {}}, 1))
	wantContent(t, f, "\x00abc")
	must(t, f.WritevAt(nil, 100))
	must(t, f.WritevAt([][]byte{nil, {}}, 100))
	wantContent(t, f, "\x00abc")
	var bufs [][]byte // more than one call of the kernel takes
	var want bytes.Buffer
	for i := range 2500 {
		part := []byte(fmt.Sprint(i))
		bufs = append(bufs, part)
		want.Write(part)
	}
	must(t, f.WritevAt(bufs, 0))
	wantContent(t, f, want.String())
}

func testPunch(t *testing.T, e env) {
	full := bytes.Repeat([]byte("x"), 20000)
	f := e.create(t, "f", string(full))
	must(t, f.Punch(4096, 8192))
	must(t, f.Punch(13000, 10))
	must(t, f.Punch(19990, 1<<20))
	must(t, f.Punch(1<<20, 4096))
	clear(full[4096:12288])
	clear(full[13000:13010])
	clear(full[19990:])
	wantContent(t, f, string(full))
}

func testArguments(t *testing.T, e env) {
	f := e.create(t, "f", "abc")
	_, err := f.ReadAt(make([]byte, 1), -1)
	wantErr(t, "ReadAt(-1)", err, nil)
	_, err = f.WriteAt([]byte("x"), -1)
	wantErr(t, "WriteAt(-1)", err, nil)
	wantErr(t, "WritevAt(-1)", f.WritevAt([][]byte{{1}}, -1), nil)
	wantErr(t, "Truncate(-1)", f.Truncate(-1), nil)
	wantErr(t, "Punch(-1, 1)", f.Punch(-1, 1), nil)
	wantErr(t, "Punch(0, 0)", f.Punch(0, 0), nil)
	wantErr(t, "Punch(0, -1)", f.Punch(0, -1), nil)
	wantContent(t, f, "abc")
}

func testClosed(t *testing.T, e env) {
	f := e.create(t, "f", "abc")
	must(t, f.Close())
	_, err := f.ReadAt(make([]byte, 1), 0)
	wantErr(t, "ReadAt", err, nil)
	_, err = f.WriteAt([]byte("x"), 0)
	wantErr(t, "WriteAt", err, nil)
	_, err = f.Size()
	wantErr(t, "Size", err, nil)
	wantErr(t, "Sync", f.Sync(), nil)
	wantErr(t, "Truncate", f.Truncate(0), nil)
	wantErr(t, "Close", f.Close(), fs.ErrClosed)
	g, err := e.Open(e.path("f"))
	must(t, err)
	defer g.Close()
	wantContent(t, g, "abc")
}

// testRandom drives one file with random calls and compares all of it after each.
func testRandom(t *testing.T, e env) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	f := e.create(t, "f", "")
	var want []byte
	const sizeMax = 200_000 // over several of the 64 KiB chunks crashtest keeps
	for range 400 {
		off, n := rng.IntN(sizeMax), 1+rng.IntN(20_000)
		p := make([]byte, n)
		for i := range p {
			p[i] = byte(rng.Uint32())
		}
		grown := append(want, make([]byte, max(0, off+n-len(want)))...)
		switch rng.IntN(6) {
		case 0, 1:
			want = grown
			copy(want[off:], p)
			if got, err := f.WriteAt(p, int64(off)); got != n || err != nil {
				t.Fatal(got, err)
			}
		case 2:
			want = grown
			copy(want[off:], p)
			cut := rng.IntN(n)
			must(t, f.WritevAt([][]byte{p[:cut], p[cut:]}, int64(off)))
		case 3:
			clear(want[min(off, len(want)):min(off+n, len(want))])
			must(t, f.Punch(int64(off), int64(n)))
		case 4:
			want = grown[:off]
			must(t, f.Truncate(int64(off)))
		case 5:
			must(t, f.Sync())
		}
		want = bytes.Clone(want)
		got := make([]byte, len(want)+1)
		if k, err := f.ReadAt(got, 0); k != len(want) || err != io.EOF {
			t.Fatalf("seed %d: read %d of %d bytes, %v", seed, k, len(want), err)
		}
		if !bytes.Equal(got[:len(want)], want) {
			t.Fatalf("seed %d: content differs", seed)
		}
	}
}

func testConcurrent(t *testing.T, e env) {
	f := e.create(t, "shared", "")
	const workers, rounds, span = 8, 40, 3000
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() {
			p, q := make([]byte, span), make([]byte, span)
			for r := range rounds {
				for i := range p {
					p[i] = byte(w + r)
				}
				own := e.path(fmt.Sprintf("own-%d", w))
				g, err := e.Create(own)
				_, err2 := f.WriteAt(p, int64(w*span))
				err3 := f.Sync()
				_, err4 := f.ReadAt(q, int64(w*span))
				if err := errors.Join(err, err2, err3, err4); err != nil {
					t.Error(err)
					return
				}
				if !bytes.Equal(p, q) {
					t.Errorf("worker %d, round %d: read back something else", w, r)
				}
				if err := errors.Join(g.Close(), e.Rename(own, own+"x"), e.Remove(own+"x"), e.SyncDir(e.dir)); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if got := e.names(t); got != "shared " {
		t.Errorf("names %q", got)
	}
}
