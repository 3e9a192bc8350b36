package extent

import (
	"bytes"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"io"
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

// sampleEntries fill a few pages.
func sampleEntries() []named {
	var es []named
	for i := range 300 {
		n := block.NewExtentID(block.SegmentID(3+i/50), i*3%150)
		st := State{Refs: 1 + int64(i%4/3*i*i)}
		switch i % 3 {
		case 0:
			st.Kind, st.To = Moved, n+block.ExtentID(1000<<16)+5
			st.Canonical = i%2 == 0
		case 1:
			st.Kind, st.To = Same, block.NewExtentID(1, i)
		}
		es = append(es, named{n, st})
	}
	slices.SortFunc(es, func(a, b named) int { return int(a.name) - int(b.name) })
	return es
}

func sampleRun(t testing.TB) []byte {
	var b bytes.Buffer
	es := sampleEntries()
	w := newRunWriter(&b, uint64(len(es)))
	for _, x := range es {
		w.add(x)
	}
	if _, err := w.end(7); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func TestGoldenRun(t *testing.T) {
	b := golden(t, "exceptions", sampleRun(t))
	var text bytes.Buffer
	if err := DescribeRun(&text, b); err != nil {
		t.Fatal(err)
	}
	golden(t, "exceptions.txt", text.Bytes())
	s := newMemStorage()
	s.runs[7] = b
	r, err := openRun(7, int64(len(b)), readerOf(b))
	if err != nil || len(r.pages) < 2 {
		t.Fatalf("%+v, %v", r, err)
	}
	for _, x := range sampleEntries() {
		if st, ok, err := r.get(s, x.name); !ok || st != x.st || err != nil {
			t.Errorf("extent %v is %+v, %v, %v; want %+v", x.name, st, ok, err, x.st)
		}
		if _, ok, err := r.get(s, x.name+1); x.name.Slot()%3 == 0 && ok || err != nil {
			t.Errorf("extent %v is there, %v", x.name+1, err)
		}
	}
	newer := bytes.Clone(b)
	newer[len(b)-runTrailerLen+offVersion]++
	if _, err := openRun(7, int64(len(b)), readerOf(newer)); !errors.Is(err, ErrNewer) {
		t.Errorf("a newer version: %v", err)
	}
}

func TestGoldenRecords(t *testing.T) {
	a, to := block.NewExtentID(5, 7), block.NewExtentID(1<<40, 32767)
	recs := []Record{
		{a, plain, State{Refs: 2}},
		{a, State{Refs: 2}, State{Kind: Moved, To: to, Canonical: true, Refs: 1 << 40}},
		{a, plain, State{Kind: Same, To: to, Refs: 1}},
		{a, State{Kind: Same, To: to, Refs: 1}, State{}},
	}
	var b []byte
	for _, r := range recs {
		b = r.Append(b)
	}
	b = golden(t, "records", b)
	for _, want := range recs {
		r, rest, err := DecodeRecord(b)
		if err != nil || r != want {
			t.Fatalf("%+v, %v; want %+v", r, err, want)
		}
		for n := range len(b) - len(rest) {
			if _, _, err := DecodeRecord(b[:n]); !errors.Is(err, ErrDamaged) {
				t.Errorf("%+v cut at %d: %v", want, n, err)
			}
		}
		b = rest
	}
}

func FuzzRecord(f *testing.F) {
	a, to := block.NewExtentID(5, 7), block.NewExtentID(1<<40, 32767)
	f.Add(Record{a, plain, State{Kind: Moved, To: to, Canonical: true, Refs: 1 << 40}}.Append(nil))
	f.Add(Record{a, State{Kind: Same, To: to, Refs: 1}, State{}}.Append(nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		r, rest, err := DecodeRecord(b)
		if err != nil {
			return
		}
		again, _, err := DecodeRecord(r.Append(nil))
		if err != nil || again != r || len(rest) >= len(b) {
			t.Errorf("%+v comes back as %+v, %v", r, again, err)
		}
	})
}

// FuzzRun opens a run with its checksums made right, and a page of any bytes.
func FuzzRun(f *testing.F) {
	b := sampleRun(f)
	r, err := openRun(7, int64(len(b)), readerOf(b))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b[:r.pages[0].len-crcLen], b[r.pages[len(r.pages)-1].off+int64(r.pages[len(r.pages)-1].len):])
	f.Fuzz(func(t *testing.T, entries, tail []byte) {
		p := binary.LittleEndian.AppendUint32(bytes.Clone(entries), block.CRC(entries))
		var es []named
		if decodePage(p, sampleEntries()[0].name, func(x named) bool { es = append(es, x); return true }) == nil && len(es) > 0 {
			var again []byte
			prev := es[0].name - 1
			for _, x := range es {
				again, prev = appendEntry(again, prev, x), x.name
			}
			d := decoder{in: again}
			i := 0
			if err := d.entries(es[0].name-1, func(x named) bool { i++; return x == es[i-1] }); err != nil || i != len(es) {
				t.Errorf("entry %d of %d comes back differently: %v", i, len(es), err)
			}
		}
		if len(tail) >= 4 {
			tail = binary.LittleEndian.AppendUint32(bytes.Clone(tail[:len(tail)-4]), block.CRC(tail[:len(tail)-4]))
		}
		all := append(p, tail...)
		_ = DescribeRun(io.Discard, all) // must not panic
		if len(all) >= runTrailerLen {   // the checksum begins at the index
			le := binary.LittleEndian
			from := int64(len(all)) - runTrailerLen - int64(le.Uint32(all[len(all)-runTrailerLen+runOffIndex:])) - int64(le.Uint32(all[len(all)-runTrailerLen+runOffFilter:]))
			if from >= 0 {
				le.PutUint32(all[len(all)-4:], block.CRC(all[from:len(all)-4]))
				_ = DescribeRun(io.Discard, all)
			}
		}
	})
}
