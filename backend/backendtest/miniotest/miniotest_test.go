package miniotest

import (
	"os"
	"strings"
	"testing"

	"graindisk/backend"
)

func TestVersionIsThePinnedOne(t *testing.T) {
	mod, err := os.ReadFile("../../../test/minio/go.mod")
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(mod), "\tgithub.com/minio/minio "+Version) {
		t.Errorf("test/minio/go.mod does not pin %s", Version)
	}
}

func TestStopStartWipe(t *testing.T) {
	m := Start(t)
	bucket := m.Bucket(t)
	store := m.Store(t, bucket, "p")
	if _, err := store.Put(t.Context(), "a/k", []byte("v"), backend.Cond{Absent: true}); err != nil {
		t.Fatal(err)
	}
	m.Stop(t)
	if _, _, err := store.Get(t.Context(), "a/k", 10); backend.ClassOf(err) != backend.Transient || err == nil {
		t.Fatalf("get from a stopped server: %v", err)
	}
	m.Start(t)
	if body, _, err := store.Get(t.Context(), "a/k", 10); err != nil || string(body) != "v" {
		t.Fatalf("get after the restart: %q, %v", body, err)
	}
	m.Wipe(t, bucket)
	if found, _, err := store.List(t.Context(), "", "", 10); err != nil || len(found) != 0 {
		t.Fatalf("after the wipe: %v, %v", found, err)
	}
}
