package densetree

import (
	"bytes"
	"encoding/binary"
	"errors"
	"flag"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"graindisk/block"
)

var update = flag.Bool("update", false, "rewrite the golden files")

// goldenRun has every shape of entry the format knows.
func goldenRun() *Run {
	var es []packed
	for _, e := range []Entry{
		{LBA: 100, Blocks: 16, Kind: Data, Extent: block.NewExtentID(7, 0), Orig: 16},
		{LBA: 116, Blocks: 16, Kind: Data, Extent: block.NewExtentID(7, 1), Orig: 16},
		{LBA: 132, Blocks: 3, Kind: Data, Extent: block.NewExtentID(7, 2), Orig: 3},
		{LBA: 140, Blocks: 3, Kind: Data, Extent: block.NewExtentID(2, 9), Off: 5, Orig: 16},
		{LBA: 143, Blocks: 1 << 34, Kind: Hole},
		{LBA: 143 + 1<<34, Blocks: 9, Kind: Base},
		{LBA: 1 << 40, Blocks: 1<<16 - 1, Kind: Data, Extent: block.NewExtentID(block.SegmentMax-1, 32767), Orig: 1<<16 - 1},
		{LBA: EndMax - 1, Blocks: 1, Kind: Data, Extent: 1, Off: 1, Orig: 2},
	} {
		es = append(es, pack(e))
	}
	return newRun(0x0102030405060708, 3, es)
}

func sameRun(a, b *Run) bool {
	return a.ID == b.ID && a.Level == b.Level && a.First == b.First && a.Last == b.Last && slices.Equal(a.es, b.es)
}

func TestRunGolden(t *testing.T) {
	path := filepath.Join("testdata", "run.golden")
	got := goldenRun().Encode()
	if *update {
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("encoded form changed:\n got %x\nwant %x", got, want)
	}
	r, err := DecodeRun(want)
	if err != nil {
		t.Fatal(err)
	}
	if !sameRun(r, goldenRun()) {
		t.Errorf("golden file decodes to %+v", r)
	}
}

func TestEveryFlippedBitIsFound(t *testing.T) {
	good := goldenRun().Encode()
	for i := range 8 * len(good) {
		b := bytes.Clone(good)
		b[i/8] ^= 1 << (i % 8)
		if _, err := DecodeRun(b); !errors.Is(err, ErrCorrupt) && !errors.Is(err, ErrNewer) {
			t.Errorf("bit %d of byte %d: %v", i%8, i/8, err)
		}
	}
	for n := range good {
		if _, err := DecodeRun(good[:n]); !errors.Is(err, ErrCorrupt) {
			t.Errorf("first %d bytes: %v", n, err)
		}
	}
}

// seal puts the right checksum under b, so that what lies behind it is tested.
func seal(b []byte) []byte {
	if len(b) < headerLen+crcLen {
		return b
	}
	b = bytes.Clone(b)
	body := b[:len(b)-crcLen]
	binary.LittleEndian.PutUint32(b[len(body):], block.CRC(body))
	return b
}

func TestDecodeRunRefuses(t *testing.T) {
	for _, c := range []struct {
		name string
		at   int
		to   byte
		want error
	}{
		{"a newer version", offVersion, 2, ErrNewer},
		{"version 0", offVersion, 0, ErrCorrupt},
		{"an unknown incompat bit", offIncomp + 7, 0x80, ErrNewer},
		{"flags", offFlags, 1, ErrCorrupt},
		{"another magic", 0, 'X', ErrCorrupt},
		{"an impossible level", offLevel + 3, 1, ErrCorrupt},
		{"a count beyond the body", offCount + 1, 1, ErrCorrupt},
		{"a count below the body's", offCount, 1, ErrCorrupt},
		{"another first block", offFirst, 99, ErrCorrupt},
		{"another last block", offLast, 99, ErrCorrupt},
		{"another body length", offBody, 1, ErrCorrupt},
		{"an unknown tag bit", headerLen, 0xff, ErrCorrupt},
		{"an entry of kind none", headerLen, 0, ErrCorrupt},
	} {
		b := goldenRun().Encode()
		b[c.at] = c.to
		if _, err := DecodeRun(seal(b)); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", c.name, err, c.want)
		}
	}
}

func TestSequentialMapIsSmall(t *testing.T) {
	tree := New(Options{})
	tree.Put(grains(0, 10_000, 1, block.NewExtentID(3, 0)))
	tree.Flush()
	if n := len(tree.Runs()[0].Encode()); n > 10_100 {
		t.Errorf("%d bytes for 10000 extents in order", n)
	}
}

func FuzzDecodeRun(f *testing.F) {
	f.Add(goldenRun().Encode())
	one := newRun(1, 0, []packed{pack(Entry{LBA: 5, Blocks: 1, Kind: Hole})}).Encode()
	f.Add(one)
	f.Add(one[:headerLen])
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := DecodeRun(seal(b))
		if err != nil {
			if !errors.Is(err, ErrCorrupt) && !errors.Is(err, ErrNewer) {
				t.Fatalf("unexpected kind of error: %v", err)
			}
			return
		}
		if cap(r.es) > len(b) {
			t.Fatalf("room for %d entries from %d bytes", cap(r.es), len(b))
		}
		for i := 1; i < len(r.es); i++ {
			if r.es[i].start() < r.es[i-1].end() {
				t.Fatalf("entries %d and %d overlap", i-1, i)
			}
		}
		again, err := DecodeRun(r.Encode())
		if err != nil || !sameRun(r, again) {
			t.Fatalf("%+v encodes to %+v, %v", r, again, err)
		}
	})
}
