package segment

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"testing"
)

// deletedCut is a record with the row of a deleted disk among others.
func deletedCut() *CutRecord {
	r := sampleCut(6)
	r.Disks = []DiskChange{
		{Disk: 1, Meta: &DiskMeta{Name: "a", SizeBytes: 4096, Flags: DiskDeleted, DeletedAt: 1_700_000_000}},
		{Disk: 2, Meta: &DiskMeta{Name: "b", SizeBytes: 8192}},
		{Disk: 3, Unmaps: []Run{{LBA: 1, Blocks: 2}}},
	}
	return r
}

// TestCutRecordWithADeletedDisk compares with the golden file; without a deleted disk a record is what it always was.
func TestCutRecordWithADeletedDisk(t *testing.T) {
	r := deletedCut()
	b := r.Append(nil)
	file := filepath.Join("testdata", "cut-deleted")
	if *update {
		if err := os.WriteFile(file, b, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(b, want) {
		t.Error("a record with a deleted disk is written otherwise today")
	}
	got, err := DecodeCutRecord(want)
	if err != nil || !reflect.DeepEqual(got, r) {
		t.Errorf("decodes to %+v %v", got, err)
	}
	if b[6] != cutFlagDeletedAt {
		t.Errorf("flags %#x: a release that does not know deleted disks would read on", b[6])
	}
	r.Disks[0].Meta.DeletedAt = 0
	b = r.Append(nil)
	if b[6] != 0 {
		t.Errorf("flags %#x without a deleted disk", b[6])
	}
	b[6] = cutFlagDeletedAt
	if _, err := DecodeCutRecord(withCRC(b)); !errors.Is(err, ErrDamaged) {
		t.Errorf("a flag that nothing follows: %v", err)
	}
}
