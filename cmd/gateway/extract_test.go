package main

import (
	"bytes"
	"encoding/json"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"graindisk/block"
)

// TestImageFileIsSparse writes data, zeroes and holes and expects them back, in a file that only holds the data.
func TestImageFileIsSparse(t *testing.T) {
	path := filepath.Join(t.TempDir(), "image")
	const blocks = 3000
	want := make([]byte, blocks*block.Size)
	img, err := createImageFile(path, int64(len(want)), false)
	if err != nil {
		t.Fatal(err)
	}
	data := 0
	for at := 0; at < blocks; {
		n := min(1+rand.IntN(40), blocks-at)
		p := want[at*block.Size:][:n*block.Size]
		switch rand.IntN(3) {
		case 0:
			err = img.skip(int64(at)*block.Size, int64(len(p)))
		case 1: // some of it zeroes
			for i := range n {
				if rand.IntN(2) == 0 {
					p[i*block.Size+rand.IntN(block.Size)] = 1
					data++
				}
			}
			fallthrough
		default:
			err = img.write(int64(at)*block.Size, p)
		}
		if err != nil {
			t.Fatal(err)
		}
		at += n
	}
	if _, err := createImageFile(path, 1, false); err == nil || !strings.Contains(err.Error(), "partial") {
		t.Errorf("a second one beside it: %v", err)
	}
	if _, err := createImageFile(path, 1, true); err == nil || !strings.Contains(err.Error(), "being written") {
		t.Errorf("a second one by force: %v", err)
	}
	if err := img.finish(); err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(path)
	if err != nil || !bytes.Equal(got, want) {
		t.Fatalf("%d other bytes, %v", len(got), err)
	}
	var out bytes.Buffer
	s := stream{w: &out}
	for at := 0; at < len(want); { // the same, without holes
		n := min(1+rand.IntN(3<<20), len(want)-at)
		if bytes.Count(want[at:at+n], []byte{0}) == n {
			err = s.skip(int64(at), int64(n))
		} else {
			err = s.write(int64(at), want[at:at+n])
		}
		if err != nil {
			t.Fatal(err)
		}
		at += n
	}
	if !bytes.Equal(out.Bytes(), want) {
		t.Error("the stream differs")
	}
	if used := usedBytes(t, path); used > int64(data*block.Size)+1<<20 {
		t.Errorf("%d blocks of data take %d bytes", data, used)
	}
}

func usedBytes(t *testing.T, path string) int64 {
	t.Helper()
	st, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	return st.Sys().(*syscall.Stat_t).Blocks * 512
}

// TestANameThatIsTakenMeanwhileIsKept puts a file where an image is about to be.
func TestANameThatIsTakenMeanwhileIsKept(t *testing.T) {
	path := filepath.Join(t.TempDir(), "image")
	img, err := createImageFile(path, block.Size, false)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte("mine"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := img.finish(); err == nil || !strings.Contains(err.Error(), "exists by now") {
		t.Errorf("finish: %v", err)
	}
	img.abort()
	if b, err := os.ReadFile(path); err != nil || string(b) != "mine" {
		t.Errorf("the file holds %q, %v", b, err)
	}
	if _, err := os.Stat(path + ".partial"); !os.IsNotExist(err) {
		t.Errorf("the partial image stays: %v", err)
	}
}

func TestExtractUsage(t *testing.T) {
	one := writeFile(t, goodYAML)
	two := writeFile(t, "data: /d\ntier: {size: 2GiB}\npools: {main: {targets: [{name: a, local: {dir: /t/a}}]}, more: {targets: [{name: a, local: {dir: /t/b}}]}}\n")
	for _, c := range []struct {
		config string
		args   []string
		code   int
		says   string
	}{
		{one, []string{"x"}, exitUsage, "FILE"},
		{one, []string{}, exitUsage, "[POOL/]DISK"},
		{one, []string{"x", "y", "z"}, exitUsage, "FILE"},
		{one, []string{"x", "y", "--verify"}, exitUsage, "--verify"},
		{one, []string{"x", "--verify", "--list"}, exitUsage, "exclude"},
		{one, []string{"x", "-", "--json"}, exitUsage, "stdout"},
		{one, []string{"x@y", "--verify"}, exitUsage, "no snapshots"},
		{two, []string{"x", "--verify"}, exitUsage, "main, more"},
		{two, []string{"other/x", "--verify"}, exitNoSuch, "no such pool"},
		{two, []string{"--list", "other"}, exitNoSuch, "no such pool"},
		{one, []string{"main/x", "--verify"}, exitFailed, "none of its targets can be opened"},
	} {
		for _, form := range []string{"", "--json"} {
			args := append([]string{"extract", "--config", c.config}, c.args...)
			if form != "" {
				args = append(args, form)
			}
			code, stdout, stderr := gatewayRun(t, args...)
			said := stderr + stdout
			if form != "" {
				var o errorObject
				if err := json.Unmarshal([]byte(stdout), &o); err != nil || o.Code != code {
					t.Errorf("%v: %q, %v", args, stdout, err)
				}
				said = o.Error
			}
			if code != c.code || !strings.Contains(said, c.says) {
				t.Errorf("%v: exit %d: %s", args, code, said)
			}
		}
	}
}

func TestMeterLine(t *testing.T) {
	m := meter{verb: "read", total: 3 << 30, done: 1 << 30}
	if got, want := m.line(10*time.Second), "[##########....................]  33 %  1.0 GiB of 3.0 GiB read, 102.4 MiB/s, 20s left"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
	m = meter{verb: "read"}
	if got := m.line(0); !strings.Contains(got, "100 %") || !strings.Contains(got, "? left") {
		t.Errorf("nothing to do: %q", got)
	}
}
