//go:build !planted

package planted

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// TestNothingIsLeft builds the gateway as it is released and expects no trace of the plants in it.
func TestNothingIsLeft(t *testing.T) {
	if Built || Bug(Catalogue[0].Name) {
		t.Error("this build holds the plants")
	}
	exe := filepath.Join(t.TempDir(), "gateway")
	cmd := exec.Command("go", "build", "-o", exe, "./cmd/gateway")
	cmd.Dir = root
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	b, err := os.ReadFile(exe)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Contains(b, []byte("log stopped")) {
		t.Error("not even a message of the log is found: this test looks in the wrong place")
	}
	for _, p := range Catalogue {
		if bytes.Contains(b, []byte(p.Name)) {
			t.Errorf("the gateway holds %q", p.Name)
		}
	}
	if bytes.Contains(b, []byte("GRAINDISK_PLANTED")) {
		t.Error("the gateway knows the variable that chooses a bug")
	}
}
