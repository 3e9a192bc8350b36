package pool

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"os"
	"path/filepath"
	"reflect"
	"testing"

	"graindisk/block"
	"graindisk/grains/extent"
	"graindisk/grains/segment"
	"graindisk/vdisk/densetree"
	"graindisk/writeback"
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

// The samples that the golden files hold.

func sampleInfo(id block.SegmentID) segment.Info {
	return segment.Info{
		ID: id, Epoch: 3, K: 2, M: 1, Targets: []block.TargetID{1, 2, 3},
		ShardBytes: 4096, IndexBytes: 200, CutBytes: 100, Extents: 2, PayloadBytes: 8192,
	}
}

func sampleSnapshot() *snapshot {
	return &snapshot{
		Format: snapshotFormat, Epoch: 3, Cut: 17, CutCRC: 0xdeadbeef, Horizon: 1234, NextDisk: 3,
		Disks: []diskState{
			{Disk: 1, Meta: segment.DiskMeta{Name: "vm1", SizeBytes: 1 << 30}, Runs: []runRef{
				{ID: 5, Epoch: 3, N: 2, Part: 1, Len: 77}, {ID: 3, Epoch: 3, N: 1, Part: 1, Off: 77, Len: 8192}}},
			{Disk: 2, Meta: segment.DiskMeta{Name: "vm2", SizeBytes: 1 << 20}},
		},
		Segments: []segment.Info{sampleInfo(7), sampleInfo(8)},
	}
}

func sampleManifest(t testing.TB) []byte {
	b, _, err := sampleSnapshot().split(2, 100)
	if err != nil {
		t.Fatal(err)
	}
	return encodePart(3, 2, 0, b)
}

// sampleReclaim is a manifest with what is to be deleted, and a deleted disk.
func sampleReclaim(t testing.TB) []byte {
	s := sampleSnapshot()
	s.Format = snapshotFormatMax
	s.Disks[1].Meta = segment.DiskMeta{Name: "vm2", SizeBytes: 1 << 20, Flags: segment.DiskDeleted, DeletedAt: 1_700_000_000}
	info := sampleInfo(5)
	s.Doomed = []doomed{
		{Segment: &info, By: ckptID{3, 2}, Since: 1_700_000_000_123}, {Key: partKey(2, 9, 1, 0), Target: 2, Since: 1_700_000_000_456},
	}
	s.Gone = &segment.Gone{Cuts: []segment.CutGap{{First: 2, Last: 3, PrevCRC: 7}}, Segments: []segment.SegmentRun{{First: 1, Last: 6}}}
	s.GoneCut = 16
	b, _, err := s.split(2, 100)
	if err != nil {
		t.Fatal(err)
	}
	back, err := decodeSnapshot(b)
	if err != nil || !reflect.DeepEqual(back, s) {
		t.Fatalf("decodes to %+v %v", back, err)
	}
	return encodePart(3, 2, 0, b)
}

// sampleTables is a manifest and its tables, of three rows each.
func sampleTables(t testing.TB) (parts [][]byte) {
	m, tables, err := sampleSnapshot().split(2, 3)
	if err != nil {
		t.Fatal(err)
	}
	parts = append(parts, encodePart(3, 2, 0, m))
	for i, b := range tables {
		parts = append(parts, encodePart(3, 2, 2+i, b))
	}
	return parts
}

func sampleRuns(t testing.TB) []byte {
	tree := densetree.New(densetree.Options{NextRunID: func() uint64 { return 9 }})
	tree.Put([]densetree.Entry{
		{LBA: 3, Blocks: 2, Kind: densetree.Data, Extent: block.NewExtentID(7, 1), Orig: 2},
		{LBA: 10, Blocks: 1 << 30, Kind: densetree.Hole},
	})
	snap := tree.Snapshot()
	defer snap.Release()
	var body []byte
	for _, r := range snap.Runs() {
		b, err := r.Encode()
		if err != nil {
			t.Fatal(err)
		}
		body = append(body, b...)
	}
	return encodePart(3, 2, 1, body)
}

// sampleUsage is a part with a run and a usage table.
func sampleUsage(t testing.TB) []byte {
	u := extent.NewUsage()
	err := errors.Join(u.Add(usageOf(sampleInfo(7), 1_700_000_000)), u.Add(usageOf(sampleInfo(8), 1_700_000_030)),
		u.Lost([]extent.Loss{{Extent: block.NewExtentID(8, 0), Orig: 1, Blocks: 1}}))
	if err != nil {
		t.Fatal(err)
	}
	body := sampleRuns(t)[partHeaderLen:]
	for b := range u.Snapshot().Blobs(usageBlobBytes) {
		body = append(body, b...)
	}
	return encodePart(3, 2, 1, body)
}

func samplePublication(t testing.TB) []byte {
	b, err := segment.NewBuilder(segment.BuildOptions{
		ID: 7, Epoch: 3, K: 1, M: 1, Cut: 17, PayloadBytes: 4096, Rand: bytes.NewReader(make([]byte, 64)),
	})
	if err != nil {
		t.Fatal(err)
	}
	p, err := b.Add(1, 40, 1, 1234)
	if err != nil {
		t.Fatal(err)
	}
	copy(p, "graindisk")
	rec := &segment.CutRecord{
		Epoch: 3, Cut: 17, PrevCut: 16, PrevCRC: 1, Horizon: 1234, Time: 1700000000,
		Disks: []segment.DiskChange{{Disk: 1, Unmaps: []segment.Run{{LBA: 5, Blocks: 9}}, Meta: &segment.DiskMeta{Name: "vm1", SizeBytes: 1 << 30}}},
	}
	s, err := b.Seal(rec, []block.TargetID{1, 2})
	if err != nil {
		t.Fatal(err)
	}
	return encodePublication(rec, rec.AllSegments(s.Info), []*segment.Index{s.Index})
}

func TestGoldenCheckpointParts(t *testing.T) {
	v1 := func(name string) []byte {
		b, err := os.ReadFile(filepath.Join("testdata", name))
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	tables := sampleTables(t)
	for name, b := range map[string][]byte{
		"manifest.ckpt": sampleManifest(t), "manifest-reclaim.ckpt": sampleReclaim(t), "runs.ckpt": sampleRuns(t), "tables.ckpt": tables[0], "table.ckpt": tables[1], "usage.ckpt": sampleUsage(t),
		"manifest-v1.ckpt": v1("manifest-v1.ckpt"), "runs-v1.ckpt": v1("runs-v1.ckpt"),
	} {
		b = golden(t, name, b)
		var text bytes.Buffer
		if err := Describe(&text, b); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		golden(t, name+".txt", text.Bytes())
		for i := range b {
			bad := bytes.Clone(b)
			bad[i] ^= 1
			if _, err := decodePart(bad, 3, 2, int(b[28])); err == nil {
				t.Errorf("%s: a flipped bit in byte %d went unseen", name, i)
			}
		}
	}
	newer := sampleManifest(t)
	newer[4] = partVersion + 1
	if _, err := decodePart(newer, 3, 2, 0); !errors.Is(err, segment.ErrNewer) {
		t.Errorf("a newer part: %v", err)
	}
	if _, err := decodePart(sampleManifest(t), 3, 1, 0); !errors.Is(err, segment.ErrDamaged) {
		t.Errorf("a part of another checkpoint: %v", err)
	}
}

// TestTablesHoldWhatTheManifestWould cuts snapshots into tables of every size and joins them again.
func TestTablesHoldWhatTheManifestWould(t *testing.T) {
	want := sampleSnapshot()
	for max := 1; max <= want.rows()+1; max++ {
		manifest, tables, err := sampleSnapshot().split(9, max)
		if err != nil {
			t.Fatal(err)
		}
		got, err := decodeSnapshot(manifest)
		if err != nil {
			t.Fatal(err)
		}
		if n := (want.rows() + max - 1) / max; len(tables) != n && (n > 1 || len(tables) != 0) {
			t.Errorf("%d rows in %d tables of %d", want.rows(), len(tables), max)
		}
		for i, ref := range got.Tables {
			if ref.Part != 9+i {
				t.Errorf("table %d in part %d", i, ref.Part)
			}
			if err := got.join(ref, append(bytes.Clone(tables[i]), ' ')); !errors.Is(err, segment.ErrDamaged) {
				t.Errorf("another table: %v", err)
			}
			if err := got.join(ref, tables[i]); err != nil {
				t.Fatal(err)
			}
		}
		got.Tables = nil
		if !reflect.DeepEqual(got, want) {
			t.Errorf("tables of %d rows: got %+v, want %+v", max, got, want)
		}
	}
}

func TestGoldenPublication(t *testing.T) {
	b := golden(t, "publication", samplePublication(t))
	rec, infos, idx, err := decodePublication(b)
	if err != nil {
		t.Fatal(err)
	}
	if rec.Cut != 17 || len(infos) != 1 || infos[0].ID != 7 || len(idx) != 1 || len(idx[0].Entries) != 1 {
		t.Errorf("decodes to %+v %+v", rec, infos)
	}
	for n := range b {
		if _, _, _, err := decodePublication(b[:n]); err == nil {
			t.Errorf("the first %d bytes of %d decode", n, len(b))
		}
	}
}

// TestGoldenPartialRun is the snapshot of a local checkpoint with a partial run.
func TestGoldenPartialRun(t *testing.T) {
	want := &snapshot{
		Format: snapshotFormatMax, Epoch: 3, Cut: 17, CutCRC: 5, Horizon: 1234, NextDisk: 2, Segments: []segment.Info{sampleInfo(7)},
		Disks: []diskState{{Disk: 1, Meta: segment.DiskMeta{Name: "vm1", SizeBytes: 1 << 30}, Runs: []runRef{
			{ID: 8, Off: 40, Len: 4200}, {ID: 9, File: 4, Epoch: 3, N: 2, Part: 1, Off: 8192, Len: 409600, Partial: true},
		}}},
	}
	b, err := json.MarshalIndent(want, "", " ")
	if err != nil {
		t.Fatal(err)
	}
	got, err := decodeSnapshot(golden(t, "state-partial.json", b))
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("decodes to %+v, %v", got, err)
	}
}

func TestNewerOperationsAndSnapshotsAreRefused(t *testing.T) {
	if _, err := decodeOp([]byte(`{"snapshot":{}}`)); !errors.Is(err, writeback.ErrNewer) {
		t.Errorf("an unknown operation: %v", err)
	}
	if _, err := decodeSnapshot([]byte(`{"format":4}`)); !errors.Is(err, writeback.ErrNewer) {
		t.Errorf("a newer snapshot: %v", err)
	}
}

func TestCutRefGoesBothWays(t *testing.T) {
	info := sampleInfo(9)
	rec := &segment.CutRecord{Cut: 5}
	ref := cutRef(rec, info)
	if back := refInfo(ref); back.ID != info.ID || back.CutBytes != info.CutBytes || back.PayloadBytes != info.PayloadBytes ||
		back.Extents != info.Extents || len(back.Targets) != 3 || ref.Cut != 5 {
		t.Errorf("%+v comes back as %+v", info, back)
	}
}

func FuzzDecodePart(f *testing.F) {
	f.Add(sampleManifest(f))
	f.Add(sampleRuns(f))
	for _, p := range sampleTables(f) {
		f.Add(p)
	}
	f.Add(sampleUsage(f))
	f.Fuzz(func(t *testing.T, b []byte) {
		_ = Describe(&bytes.Buffer{}, b) // must not panic
		if body, err := decodePart(b, 3, 2, 1); err == nil && !bytes.Equal(encodePart(3, 2, 1, body), b) {
			t.Error("what decodes does not encode back")
		}
	})
}

func FuzzDecodePublication(f *testing.F) {
	f.Add(samplePublication(f))
	f.Fuzz(func(t *testing.T, b []byte) {
		rec, infos, idx, err := decodePublication(b)
		if err == nil && !bytes.Equal(encodePublication(rec, infos, idx), b) {
			t.Error("what decodes does not encode back")
		}
	})
}

func FuzzDecodeSnapshot(f *testing.F) {
	f.Add(sampleManifest(f)[partHeaderLen:])
	f.Add([]byte(`{"format":1,"disks":[{"runs":[{"off":-1,"len":9223372036854775807}]}]}`))
	f.Fuzz(func(_ *testing.T, b []byte) { decodeSnapshot(b) })
}
