package writeback

import (
	"errors"
	"path"
	"slices"
	"testing"

	"graindisk/internal/crashtest"
)

// TestSetAsideTakesTheIndexesOfTheSlots moves a tier whose slots have an index beside them.
func TestSetAsideTakesTheIndexesOfTheSlots(t *testing.T) {
	fsys := crashtest.NewFS(crashtest.Options{})
	if err := fsys.MkdirAll("tier"); err != nil {
		t.Fatal(err)
	}
	moved := []string{identityName, "meta-000001", "slot-000003", "slot-000003.idx", LostName}
	for _, name := range append([]string{"unknown"}, moved...) {
		f, err := fsys.Create(path.Join("tier", name))
		if err = errors.Join(err, f.Close()); err != nil {
			t.Fatal(err)
		}
	}
	if err := SetAside(fsys, "tier", "tier/old"); err != nil {
		t.Fatal(err)
	}
	names := func(dir string) (ns []string) {
		es, err := fsys.ReadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range es {
			ns = append(ns, e.Name())
		}
		return ns
	}
	want := append(slices.Clone(moved), asideDone)
	slices.Sort(want)
	if got := names("tier/old"); !slices.Equal(got, want) {
		t.Errorf("set aside: %v, want %v", got, want)
	}
	if got := names("tier"); !slices.Equal(got, []string{"old", "unknown"}) {
		t.Errorf("left: %v", got)
	}
}
