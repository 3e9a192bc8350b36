package backend

import (
	"fmt"
	"strings"
)

const (
	keyBytesMax     = 512  // leaves room for a store's own prefix below S3's 1024
	elementBytesMax = 255  // NAME_MAX of every file system a directory store may be on
	listMax         = 1000 // what every store gives in one page
)

// reservedElement is where directory stores keep unfinished objects; no key may use it, at any depth,
// so that a store may lie inside another one's folder.
const reservedElement = ".tmp"

// CheckKey says what is wrong with key, nil if every driver can hold it. Drivers refuse other keys
// as Permanent before they do anything.
func CheckKey(key string) error {
	if key == "" {
		return fmt.Errorf("empty key")
	}
	if len(key) > keyBytesMax {
		return fmt.Errorf("key of %d bytes, at most %d are allowed", len(key), keyBytesMax)
	}
	for element := range strings.SplitSeq(key, "/") {
		if err := checkElement(element); err != nil {
			return fmt.Errorf("key %q: %w", key, err)
		}
	}
	return nil
}

// CheckList says what is wrong with the arguments of Store.List. A prefix is the beginning of a
// possible key, and may end inside an element or after a slash; the empty one means all.
func CheckList(prefix string, max int) error {
	if max < 1 || max > listMax {
		return fmt.Errorf("list of %d objects, from 1 to %d are allowed", max, listMax)
	}
	if len(prefix) > keyBytesMax {
		return fmt.Errorf("prefix of %d bytes, at most %d are allowed", len(prefix), keyBytesMax)
	}
	whole, last := "", prefix
	if i := strings.LastIndexByte(prefix, '/'); i >= 0 {
		whole, last = prefix[:i], prefix[i+1:]
		if err := CheckKey(whole); err != nil {
			return fmt.Errorf("prefix: %w", err)
		}
	}
	if last == "." || last == ".." {
		return fmt.Errorf("prefix %q: element %q is not allowed", prefix, last) // stores take it for a path
	}
	return checkBytes(last)
}

func checkElement(e string) error {
	switch {
	case e == "":
		return fmt.Errorf("an empty element")
	case e == "." || e == ".." || e == reservedElement:
		return fmt.Errorf("element %q is not allowed", e)
	case len(e) > elementBytesMax:
		return fmt.Errorf("an element of %d bytes, at most %d are allowed", len(e), elementBytesMax)
	}
	return checkBytes(e)
}

func checkBytes(s string) error {
	for i := range len(s) {
		switch c := s[i]; {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9', c == '.', c == '_', c == '-':
		default:
			return fmt.Errorf("byte %q; only [a-zA-Z0-9._-] and slashes are allowed", c)
		}
	}
	return nil
}
