package extent

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"graindisk/block"
)

var update = flag.Bool("update", false, "write the golden files anew")

func golden(t *testing.T, name string, got []byte) []byte {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := errors.Join(os.MkdirAll("testdata", 0o755), os.WriteFile(path, got, 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%s differs from what this version writes", path)
	}
	return want
}

// sampleUsage has a row of every shape.
func sampleUsage(t testing.TB) *Usage {
	u := NewUsage()
	for _, s := range []Segment{
		{ID: 3, Epoch: 2, K: 2, M: 1, Targets: []block.TargetID{1, 2, 3}, Birth: 1_700_000_000, Extents: 512, Blocks: 8192},
		{ID: 4, Epoch: 2, K: 2, M: 1, Targets: []block.TargetID{2, 3, 1}, Birth: 1_700_000_030, Extents: 20, Blocks: 320},
		{ID: 9, Epoch: 3, K: 2, M: 1, Targets: []block.TargetID{1, 0, 3}, Birth: 1_700_000_020, Extents: 3, Blocks: 20},
		{ID: 10, Epoch: 3, K: 1, M: 1, Targets: []block.TargetID{700, 1}, Extents: 0},
		{ID: 11, Epoch: 3, K: 1, M: 1, Targets: []block.TargetID{700, 1}, Extents: 2, Blocks: 32},
		{ID: 1 << 40, Epoch: 4, K: 1, M: 1, Targets: []block.TargetID{700, 1}, Birth: 1_700_000_040, Extents: 9, Blocks: 9},
	} {
		if err := u.Add(s); err != nil {
			t.Fatal(err)
		}
	}
	ls := []Loss{
		{block.NewExtentID(4, 0), 16, 16}, {block.NewExtentID(4, 7), 16, 1}, {block.NewExtentID(4, 8), 16, 15}, {block.NewExtentID(4, 19), 16, 16},
		{block.NewExtentID(9, 2), 10, 3}, {block.NewExtentID(11, 0), 16, 16}, {block.NewExtentID(11, 1), 16, 16},
	}
	if err := errors.Join(u.Lost(ls), u.Condemn(11)); err != nil {
		t.Fatal(err)
	}
	if err := u.Lost([]Loss{{block.NewExtentID(1<<40, 1), 1, 2}}); err == nil {
		t.Fatal("a loss that cannot be")
	}
	u.SetExceptions(9, true)
	u.addOverflow(block.NewExtentID(9, 1), 64)
	u.addOverflow(block.NewExtentID(4, 8), -64)
	return u
}

func TestGoldenUsage(t *testing.T) {
	var all []byte
	for b := range sampleUsage(t).Snapshot().Blobs(64) {
		all = append(all, b...)
	}
	all = golden(t, "usage", all)
	var text bytes.Buffer
	again := NewUsage()
	for b := all; len(b) > 0; {
		n, err := BlobLen(b)
		if err == nil {
			err = errors.Join(again.Load(b[:n]), DescribeBlob(&text, b[:n]))
		}
		if err != nil {
			t.Fatal(err)
		}
		b = b[n:]
	}
	golden(t, "usage.txt", text.Bytes())
	if got := bytes.Join(slices.Collect(again.Snapshot().Blobs(64)), nil); !bytes.Equal(got, all) {
		t.Error("what decodes does not encode back")
	}
}

func FuzzLoad(f *testing.F) {
	for b := range sampleUsage(f).Snapshot().Blobs(64) {
		f.Add(b)
	}
	for b := range sampleUsage(f).Snapshot().Blobs(1 << 20) {
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		_, _ = BlobLen(b)
		u := NewUsage()
		if err := u.Load(reseal(b)); err != nil {
			if !errors.Is(err, ErrDamaged) && !errors.Is(err, ErrNewer) {
				t.Errorf("an error of no kind: %v", err)
			}
			return
		}
		v := u.Snapshot()
		again := reload(t, v, 100)
		if rep := Compare(v, again.Snapshot()); len(rep.Leaks)+len(rep.Low) > 0 {
			t.Errorf("what decodes encodes to something else: %+v", rep)
		}
		if a, b := fmt.Sprint(slices.Collect(v.All())), fmt.Sprint(slices.Collect(again.Snapshot().All())); a != b {
			t.Errorf("%s\ndecodes as\n%s", a, b)
		}
		var ls []Loss
		for s := range v.All() {
			for slot := range s.Extents {
				ls = append(ls, Loss{block.NewExtentID(s.ID, int(slot)), 16, uint16(1 + slot%16)})
			}
		}
		_ = u.Lost(ls) // no panic, and nothing that cannot be stored
		reload(t, u.Snapshot(), 1000)
	})
}
