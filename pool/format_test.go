package pool

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"os"
	"path/filepath"
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

func sampleManifest(t testing.TB) []byte {
	b, err := json.Marshal(snapshot{
		Format: snapshotFormat, Epoch: 3, Cut: 17, CutCRC: 0xdeadbeef, Horizon: 1234, NextDisk: 3,
		Disks: []diskState{
			{Disk: 1, Meta: segment.DiskMeta{Name: "vm1", SizeBytes: 1 << 30}, Runs: []runRef{{ID: 5, Epoch: 3, N: 2, Part: 1, Len: 77}}},
			{Disk: 2, Meta: segment.DiskMeta{Name: "vm2", SizeBytes: 1 << 20}},
		},
		Segments: []segment.Info{sampleInfo(7), sampleInfo(8)},
	})
	if err != nil {
		t.Fatal(err)
	}
	return encodePart(3, 2, 0, b)
}

func sampleRuns(t testing.TB) []byte {
	tree := densetree.New(densetree.Options{NextRunID: func() uint64 { return 9 }})
	tree.Put([]densetree.Entry{
		{LBA: 3, Blocks: 2, Kind: densetree.Data, Extent: block.NewExtentID(7, 1), Orig: 2},
		{LBA: 10, Blocks: 1 << 30, Kind: densetree.Hole},
	})
	tree.Flush()
	var body []byte
	for _, r := range tree.Runs() {
		body = append(body, r.Encode()...)
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
	for name, b := range map[string][]byte{"manifest.ckpt": sampleManifest(t), "runs.ckpt": sampleRuns(t), "usage.ckpt": sampleUsage(t)} {
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

func TestNewerOperationsAndSnapshotsAreRefused(t *testing.T) {
	if _, err := decodeOp([]byte(`{"snapshot":{}}`)); !errors.Is(err, writeback.ErrNewer) {
		t.Errorf("an unknown operation: %v", err)
	}
	if _, err := decodeSnapshot([]byte(`{"format":2}`)); !errors.Is(err, writeback.ErrNewer) {
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
