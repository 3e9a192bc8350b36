package densetree

import (
	"bytes"
	"encoding/binary"
	"errors"
	"flag"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"graindisk/block"
)

var update = flag.Bool("update", false, "rewrite the golden files")

// goldenRun has every shape of entry the format knows.
func goldenRun() *Run {
	return newRun(0x0102030405060708, 3, []Entry{
		{LBA: 100, Blocks: 16, Kind: Data, Extent: block.NewExtentID(7, 0), Orig: 16},
		{LBA: 116, Blocks: 16, Kind: Data, Extent: block.NewExtentID(7, 1), Orig: 16},
		{LBA: 132, Blocks: 3, Kind: Data, Extent: block.NewExtentID(7, 2), Orig: 3},
		{LBA: 140, Blocks: 3, Kind: Data, Extent: block.NewExtentID(2, 9), Off: 5, Orig: 16},
		{LBA: 143, Blocks: 1 << 34, Kind: Hole},
		{LBA: 143 + 1<<34, Blocks: 9, Kind: Base},
		{LBA: 1 << 40, Blocks: 1<<16 - 1, Kind: Data, Extent: block.NewExtentID(block.SegmentMax-1, 32767), Orig: 1<<16 - 1},
		{LBA: EndMax - 1, Blocks: 1, Kind: Data, Extent: 1, Off: 1, Orig: 2},
	})
}

// newRun is a run in memory.
func newRun(id uint64, level int, es []Entry) *Run {
	w := runBuilder{id: id}
	for _, e := range es {
		w.add(pack(e))
	}
	return w.finish(level, false)
}

// list is the entries of a run.
func list(t testing.TB, r *Run) (es []Entry) {
	t.Helper()
	must(t, r.Each(func(e Entry) bool { es = append(es, e); return true }))
	return es
}

func sameRun(t testing.TB, a, b *Run) bool {
	return a.ID == b.ID && a.Level == b.Level && a.Frozen == b.Frozen && a.First == b.First && a.Last == b.Last &&
		a.Len() == b.Len() && slices.Equal(list(t, a), list(t, b))
}

func TestRunGolden(t *testing.T) {
	path := filepath.Join("testdata", "run-v2.golden")
	got := encode(t, goldenRun())
	if *update {
		must(t, os.WriteFile(path, got, 0o644))
	}
	want, err := os.ReadFile(path)
	must(t, err)
	if !bytes.Equal(got, want) {
		t.Errorf("encoded form changed:\n got %x\nwant %x", got, want)
	}
	for _, name := range []string{"run-v1.golden", "run-v2.golden"} {
		b, err := os.ReadFile(filepath.Join("testdata", name))
		must(t, err)
		r, err := DecodeRun(b)
		must(t, err)
		if !sameRun(t, r, goldenRun()) {
			t.Errorf("%s decodes to %+v", name, r)
		}
		if n, err := RunLen(append(b, 1, 2, 3)); err != nil || n != len(b) {
			t.Errorf("%s: length %d of %d, %v", name, n, len(b), err)
		}
	}
}

// manyRun has several pages.
func manyRun() *Run {
	r := rand.New(rand.NewPCG(1, 1))
	var es []Entry
	lba := block.LBA(7)
	for i := range 3000 {
		es = append(es, Entry{LBA: lba, Blocks: 1 + r.Uint64N(16), Kind: Data, Extent: block.ExtentID(r.Uint64N(1 << 40)), Orig: 20})
		if i%7 == 0 {
			es[i] = Entry{LBA: lba, Blocks: 1 + r.Uint64N(1<<20), Kind: Hole + Kind(i%2)}
		}
		lba = es[i].End() + block.LBA(r.Uint64N(300)*r.Uint64N(2))
	}
	return newRun(9, 2, es)
}

func TestEveryFlippedBitIsFound(t *testing.T) {
	v1, err := os.ReadFile(filepath.Join("testdata", "run-v1.golden"))
	must(t, err)
	for name, good := range map[string][]byte{"v1": v1, "v2": encode(t, goldenRun())} {
		for i := range 8 * len(good) {
			b := bytes.Clone(good)
			b[i/8] ^= 1 << (i % 8)
			if _, err := DecodeRun(b); !errors.Is(err, ErrCorrupt) && !errors.Is(err, ErrNewer) {
				t.Errorf("%s: bit %d of byte %d: %v", name, i%8, i/8, err)
			}
		}
		for n := range good {
			if _, err := DecodeRun(good[:n]); !errors.Is(err, ErrCorrupt) {
				t.Errorf("%s: first %d bytes: %v", name, n, err)
			}
		}
	}
}

// seal puts the right checksums over b, a run of version 2, so that what lies behind them is tested.
func seal(b []byte) []byte {
	if len(b) < startLen {
		return b
	}
	b = bytes.Clone(b)
	pages := int(binary.LittleEndian.Uint32(b[offPages:]))
	if binary.LittleEndian.Uint16(b[offVersion:]) == 1 {
		body := b[:len(b)-crcLen]
		binary.LittleEndian.PutUint32(b[len(body):], block.CRC(body))
		return b
	}
	if pages > runMax || len(b) < headBytes(pages) {
		return b
	}
	end := offIndex + 8*pages
	binary.LittleEndian.PutUint32(b[end:], block.CRC(b[:end]))
	for rest := b[headBytes(pages):]; len(rest) >= pageBytes; rest = rest[pageBytes:] {
		binary.LittleEndian.PutUint32(rest[pageEnd:], block.CRC(rest[:pageEnd]))
	}
	return b
}

func TestDecodeRunRefuses(t *testing.T) {
	good := encode(t, manyRun())
	head := headBytes(len(manyRun().firsts))
	for _, c := range []struct {
		name string
		at   int
		to   byte
		want error
	}{
		{"a newer version", offVersion, 3, ErrNewer},
		{"version 0", offVersion, 0, ErrCorrupt},
		{"an unknown incompat bit", offIncomp + 7, 0x80, ErrNewer},
		{"unknown flags", offFlags, 2, ErrCorrupt},
		{"a frozen run of a lower level", offFlags, flagFrozen, ErrCorrupt},
		{"another magic", 0, 'X', ErrCorrupt},
		{"an impossible level", offLevel + 3, 1, ErrCorrupt},
		{"a negative level", offLevel + 3, 0xff, ErrCorrupt},
		{"a count beyond the pages", offCount + 2, 1, ErrCorrupt},
		{"a count below the pages'", offCount, 1, ErrCorrupt},
		{"another first block", offFirst, 99, ErrCorrupt},
		{"another last block", offLast, 99, ErrCorrupt},
		{"another length", offBody, 1, ErrCorrupt},
		{"more pages", offPages, 99, ErrCorrupt},
		{"an index out of order", offIndex + 8 + 7, 0x0f, ErrCorrupt},
		{"padding", head - 1, 1, ErrCorrupt},
		{"a page of another run", head + pageID, 1, ErrCorrupt},
		{"a page that starts elsewhere", head + pageFirst, 9, ErrCorrupt},
		{"a page out of turn", head + pageNo, 1, ErrCorrupt},
		{"a page without entries", head + pageCount + 1, 0, ErrCorrupt},
		{"a page without restarts", head + pageRestarts, 0, ErrCorrupt},
		{"a restart outside the page", head + pageEnd - 1, 0xff, ErrCorrupt},
		{"a restart in the middle of an entry", head + pageEnd - 4, good[head+pageEnd-4] + 1, ErrCorrupt},
		{"an unknown tag bit", head + pageHead, 0xff, ErrCorrupt},
		{"an entry of kind none", head + pageHead, 0, ErrCorrupt},
	} {
		b := bytes.Clone(good)
		if b[c.at] == c.to {
			t.Fatalf("%s: no change", c.name)
		}
		b[c.at] = c.to
		if _, err := DecodeRun(seal(b)); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", c.name, err, c.want)
		}
	}
}

// TestPagesAreFoundByTheirIndex looks every block of a run up that lies in and beside its entries.
func TestPagesAreFoundByTheirIndex(t *testing.T) {
	run := manyRun()
	es := list(t, run)
	if len(run.firsts) < 3 || len(es) != run.Len() {
		t.Fatalf("%d pages, %d entries", len(run.firsts), len(es))
	}
	for i, e := range es {
		for _, lba := range []block.LBA{e.LBA, e.LBA + block.LBA(e.Blocks/2), e.End() - 1} {
			c := cursor{run: run}
			for c.seek(lba); c.ok && i < len(es); c.next() {
				if c.p.entry() != es[i] {
					t.Fatalf("from %d: got %+v, want %+v", lba, c.p.entry(), es[i])
				}
				if i++; i%50 == 0 {
					break
				}
			}
			if c.err != nil {
				t.Fatal(c.err)
			}
			i = slices.Index(es, e)
		}
	}
	c := cursor{run: run}
	if c.seek(run.Last + 1); c.ok || c.err != nil {
		t.Errorf("found %+v behind the last entry, %v", c.p.entry(), c.err)
	}
}

func TestSequentialMapIsSmall(t *testing.T) {
	run := newRun(1, 1, grains(0, 10_000, 1, block.NewExtentID(3, 0)))
	if n := len(encode(t, run)); n > 5*pageBytes {
		t.Errorf("%d bytes for 10000 extents in order", n)
	}
}

func FuzzDecodeRun(f *testing.F) {
	f.Add(encode(f, goldenRun()))
	v1, err := os.ReadFile(filepath.Join("testdata", "run-v1.golden"))
	must(f, err)
	f.Add(v1)
	f.Add(v1[:headerLenV1])
	f.Add(encode(f, newRun(1, 0, []Entry{{LBA: 5, Blocks: 1, Kind: Hole}})))
	f.Add(encode(f, manyRun()))
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := DecodeRun(seal(b))
		if err != nil {
			if !errors.Is(err, ErrCorrupt) && !errors.Is(err, ErrNewer) {
				t.Fatalf("unexpected kind of error: %v", err)
			}
			return
		}
		if cap(r.mem) > 2*len(b)+64*pageBytes || cap(r.firsts) > len(b) {
			t.Fatalf("%d bytes and %d pages from %d bytes", cap(r.mem), cap(r.firsts), len(b))
		}
		es := list(t, r)
		for i := 1; i < len(es); i++ {
			if es[i].LBA < es[i-1].End() {
				t.Fatalf("entries %d and %d overlap", i-1, i)
			}
		}
		again, err := DecodeRun(encode(t, r))
		if err != nil || !sameRun(t, r, again) {
			t.Fatalf("%+v encodes to %+v, %v", r, again, err)
		}
	})
}
