package main

import (
	"os"
	"path/filepath"
	"strings"
	gotesting "testing"
)

func TestThisModuleKeepsItsLayers(t *gotesting.T) {
	t.Chdir(filepath.Join("..", ".."))
	if _, err := os.Stat("go.mod"); err != nil {
		t.Fatal(err)
	}
	pkgs, err := list()
	if err != nil {
		t.Fatal(err)
	}
	if len(pkgs) < 5 {
		t.Fatalf("go list found %d packages only", len(pkgs))
	}
	for _, b := range check(pkgs) {
		t.Error(b)
	}
}

func TestForbiddenArrowsAreFound(t *gotesting.T) {
	for _, c := range []struct {
		name, from, to string
		want           string // part of the complaint; empty if the import is fine
	}{
		{"down", "pool", "vdisk", ""},
		{"down, over a layer", "pool", "block", ""},
		{"down into a folder's part", "vdisk", "vdisk/densetree", ""},
		{"down into a part of another folder", "pool", "grains/segment", ""},
		{"a driver to its contract", "backend/s3", "backend", ""},
		{"a command to anything", "cmd/gateway", "pool", ""},
		{"a fake to its contract", "backend/backendtest/miniotest", "backend/s3", ""},
		{"a foreign package", "block", "../fmt", ""},
		{"up", "vdisk", "pool", "vdisk imports pool; vdisk may import only"},
		{"up from the bottom", "block", "backend", "may import only nothing"},
		{"up within a folder", "pool/root", "pool", "pool/root imports pool"},
		{"sideways between drivers", "backend/s3", "backend/local", "backend/s3 imports backend/local"},
		{"sideways between grains", "grains/cache", "grains/segment", "grains/cache imports grains/segment"},
		{"from a contract to its driver", "backend", "backend/s3", "backend imports backend/s3"},
		{"sideways between siblings", "writeback", "grains/cache", "writeback imports grains/cache"},
		{"past the interface", "frontend/nbd", "grains/cache", "frontend/nbd imports grains/cache"},
		{"from the outside in", "pool", "config", "pool imports config"},
		{"a prefix that is no folder", "poolish", "block", "poolish is in no layer"},
		{"a fake in the product", "cmd/gateway", "backend/backendtest", "for tests only"},
	} {
		t.Run(c.name, func(t *gotesting.T) {
			to := module + "/" + c.to
			if rest, ok := strings.CutPrefix(c.to, "../"); ok {
				to = rest
			}
			bad := check([]pkg{{module + "/" + c.from, []string{to}}})
			switch {
			case c.want == "" && len(bad) > 0:
				t.Errorf("refused: %v", bad)
			case c.want != "" && (len(bad) != 1 || !strings.Contains(bad[0], c.want)):
				t.Errorf("got %q; want one with %q", bad, c.want)
			}
		})
	}
}
