package backend

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
)

func TestCheckKey(t *testing.T) {
	long := strings.Repeat("x", 255)
	for _, key := range []string{
		"root", "a/b/c", "ckpt/1/2/3.0", "seg/0f/17-3.0", "A-Z_0.9", "..a", "a..", ".tmpx", "...",
		long + "/" + long, "-",
	} {
		if err := CheckKey(key); err != nil {
			t.Errorf("good key refused: %v", err)
		}
	}
	for _, key := range []string{
		"", "/", "/a", "a/", "a//b", ".", "..", "./a", "a/..", "a/../b", ".tmp", ".tmp/a", "a/.tmp/b", "a b", "a\\b",
		"ä", "a\x00", "a\nb", "%2e%2e", "a:b", long + "x", strings.Repeat("a/", 256) + "a",
	} {
		if CheckKey(key) == nil {
			t.Errorf("bad key %q accepted", key)
		}
	}
}

func TestCheckList(t *testing.T) {
	for _, prefix := range []string{"", "a", "a/", "a/b", ".a", "...", "a/.a", ".tmp"} {
		if err := CheckList(prefix, 1); err != nil {
			t.Errorf("good prefix %q refused: %v", prefix, err)
		}
	}
	for _, prefix := range []string{"/", ".", "..", "a/..", "../", "a/../b", "a//", "a b", ".tmp/", strings.Repeat("a", 513)} {
		if CheckList(prefix, 1000) == nil {
			t.Errorf("bad prefix %q accepted", prefix)
		}
	}
	for _, max := range []int{-1, 0, 1001} {
		if CheckList("", max) == nil {
			t.Errorf("list of %d accepted", max)
		}
	}
}

func TestErrorMatchesTheSentinelOfItsClass(t *testing.T) {
	sentinels := map[Class]error{
		NotFound: ErrNotFound, Precondition: ErrPrecondition, Short: ErrShort, Auth: ErrAuth, Full: ErrFull,
	}
	for class := Transient; class <= Permanent; class++ {
		err := fmt.Errorf("wrapped: %w", &Error{Op: "put", Store: "s", Key: "k", Class: class, Err: os.ErrClosed})
		if got := ClassOf(err); got != class {
			t.Errorf("ClassOf = %v, want %v", got, class)
		}
		for c, sentinel := range sentinels {
			if got := errors.Is(err, sentinel); got != (c == class) {
				t.Errorf("error of class %v matches %v: %v", class, sentinel, got)
			}
		}
		if !strings.Contains(err.Error(), "put k in s: "+class.String()) {
			t.Errorf("message %q", err)
		}
	}
	if ClassOf(nil) != 0 || ClassOf(os.ErrClosed) != Transient {
		t.Error("ClassOf of nil or of a foreign error")
	}
}
