package local

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"

	"graindisk/backend"
	"graindisk/backend/backendtest"
)

// TestMain lets the test's own binary be one of several processes at a store.
func TestMain(m *testing.M) {
	if dir := os.Getenv("LOCAL_TEST_DIR"); dir != "" {
		if err := runChild(dir, os.Getenv("LOCAL_TEST_JOB")); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func child(t *testing.T, dir, job string) *exec.Cmd {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), "LOCAL_TEST_DIR="+dir, "LOCAL_TEST_JOB="+job)
	cmd.Stderr = new(bytes.Buffer)
	return cmd
}

func runChild(dir, job string) error {
	s, err := Open(dir, Options{})
	if err != nil {
		return err
	}
	if job == "write" {
		return writeForever(s)
	}
	return countUp(s, job)
}

const countTimes = 25

// countUp adds its own letter to the object "counter" again and again.
func countUp(s *Store, letter string) error {
	ctx := context.Background()
	for done := 0; done < countTimes; {
		body, etag, err := s.Get(ctx, "counter", 10_000)
		if err != nil {
			return err
		}
		_, err = s.Put(ctx, "counter", append(body, letter...), backend.Cond{Match: etag})
		switch backend.ClassOf(err) {
		case 0:
			done++
		case backend.Precondition:
		default:
			return err
		}
	}
	return nil
}

func TestProcessesLoseNoUpdate(t *testing.T) {
	s := openTemp(t)
	mustPut(t, s, "counter", "", backend.Cond{})
	letters := "abcd"
	var children []*exec.Cmd
	for _, letter := range letters {
		cmd := child(t, s.dir, string(letter))
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		children = append(children, cmd)
	}
	for _, cmd := range children {
		if err := cmd.Wait(); err != nil {
			t.Errorf("%v: %s", err, cmd.Stderr)
		}
	}
	body, _, err := s.Get(t.Context(), "counter", 10_000)
	if err != nil {
		t.Fatal(err)
	}
	for _, letter := range letters {
		if n := strings.Count(string(body), string(letter)); n != countTimes {
			t.Errorf("process %c was told of %d updates, %d are there", letter, countTimes, n)
		}
	}
}

const writtenBytes = 300_000

// writeForever puts objects and prints the key of each that was stored.
func writeForever(s *Store) error {
	for i := 0; ; i++ {
		key := fmt.Sprintf("seg/%02x/%d", i%4, i)
		body := backendtest.Body(uint64(i), writtenBytes)
		if _, err := s.Put(context.Background(), key, body, backend.Cond{Absent: true}); err != nil {
			return err
		}
		fmt.Println(i, key)
	}
}

// TestKilledWriterLeavesWholeObjects kills a writing process at some point in a put.
func TestKilledWriterLeavesWholeObjects(t *testing.T) {
	s := openTemp(t)
	cmd := child(t, s.dir, "write")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	told := map[string]bool{}
	lines := bufio.NewScanner(out)
	for lines.Scan() {
		_, key, _ := strings.Cut(lines.Text(), " ")
		told[key] = true
		if len(told) == 20 {
			if err := cmd.Process.Kill(); err != nil {
				t.Fatal(err)
			}
		}
	}
	_ = cmd.Wait() // it was killed
	if len(told) < 20 {
		t.Fatalf("the child ended early: %s", cmd.Stderr)
	}
	s = openAt(t, s.dir)
	found, more, err := s.List(t.Context(), "", "", 1000)
	if err != nil || more {
		t.Fatal(more, err)
	}
	for _, info := range found {
		var folder, i int
		if _, err := fmt.Sscanf(info.Key, "seg/%x/%d", &folder, &i); err != nil {
			t.Fatal(err)
		}
		body, _, err := s.Get(t.Context(), info.Key, writtenBytes)
		if err != nil || !bytes.Equal(body, backendtest.Body(uint64(i), writtenBytes)) {
			t.Errorf("%s: %d bytes, %v", info.Key, len(body), err)
		}
		delete(told, info.Key)
	}
	if len(told) > 0 {
		t.Errorf("told of, but missing: %v", told)
	}
	if left, err := os.ReadDir(s.path(tmpName)); err != nil || len(left) != 1 {
		t.Errorf("left in .tmp: %v, %v", left, err)
	}
}
