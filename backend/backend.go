// Package backend is the contract between the gateway and a blob store. A Store holds immutable
// objects, and a few mutable ones that change by conditional put alone. The drivers are local, s3
// and azure; backendtest holds the conformance suite they all pass, and the fakes.
//
// The rules every driver keeps:
//
//   - An object appears whole or not at all, and is durable when Put has returned nil.
//   - A reader after a Put that returned nil sees that object or a later one.
//   - A Put that failed may still have taken effect, unless its class is one of Precondition,
//     NotFound, Auth, Full or Permanent: the reply can be lost after the effect. Drivers do not retry
//     conditional puts by themselves, so a Precondition error is never the echo of their own success.
//   - Buffers passed in belong to the caller again when the call returns, and are not kept.
//   - All methods are safe for concurrent use and end early when ctx does.
//
// What only some stores can is an interface of its own: BatchDeleter, Copier, Inspector. DeleteMany and Copy use
// it where it is there and do without where it is not, so callers need not ask. What wraps a store passes
// these on, and tells by Unwrap what it wraps.
package backend

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"
)

// Cond is the condition of a Put. The zero value means none.
type Cond struct {
	Absent bool   // succeed only if the key holds nothing
	Match  string // succeed only if the key holds an object with this ETag
}

// Info describes a stored object.
type Info struct {
	Key      string
	Size     int64 // bytes
	ETag     string
	Modified time.Time
}

// Store is one target: a bucket, a container or a directory, below a prefix.
//
// Keys are slash-separated, relative, of [a-zA-Z0-9._-] between slashes, at most 512 bytes (255 between
// slashes), with no empty, ".", ".." or ".tmp" element: CheckKey. No key may be the folder of another
// ("a" and "a/b"): directories and some object stores cannot hold both; the second is refused as
// Permanent where it fails.
type Store interface {
	// Put stores body under key in one step and returns the new object's ETag. A condition that
	// does not hold gives ErrPrecondition; Match on a missing key gives ErrPrecondition or ErrNotFound.
	Put(ctx context.Context, key string, body []byte, c Cond) (etag string, err error)
	// Get returns the whole object and its ETag. An object of more than max bytes is refused
	// (Permanent) without reading it into memory.
	Get(ctx context.Context, key string, max int64) (body []byte, etag string, err error)
	// ReadAt fills p from off or fails; it never returns short. Reading past the end is ErrShort.
	// An empty p reads nothing and asks nothing of the store. After an error p holds anything.
	ReadAt(ctx context.Context, key string, p []byte, off int64) error
	// Stat returns what is known of an object without its bytes.
	Stat(ctx context.Context, key string) (Info, error)
	// Delete removes an object; a missing one is not an error (a missing bucket or directory is).
	Delete(ctx context.Context, key string) error
	// List returns up to max objects (1..1000) whose key starts with prefix and sorts after after,
	// in byte order of their keys, and whether there are more; more comes with at least one object.
	// Modified and ETag may be empty. What is there under names that are no keys is left out.
	List(ctx context.Context, prefix, after string, max int) (objs []Info, more bool, err error)
	// String names the store for people: "s3://bucket/prefix at http://…", "/srv/targets/a".
	String() string
}

// Class sorts errors by what the caller can do about them.
type Class uint8

// The classes of error. Everything a driver cannot place is Transient if trying again may help,
// else Permanent.
const (
	Transient    Class = iota + 1 // try again: time-outs, resets, 5xx; the outcome of a Put is unknown
	Throttled                     // try again more slowly
	NotFound                      // no such object, in a store that is there
	Precondition                  // the condition of a Put does not hold
	Auth                          // credentials missing, wrong or not sufficient
	Full                          // no space or quota left
	Short                         // the object ends before the range read
	Permanent                     // asking again will not help: bad key, object too large, no such bucket or directory
)

// String is the class's name in messages and metrics.
func (c Class) String() string {
	switch c {
	case Transient:
		return "transient"
	case Throttled:
		return "throttled"
	case NotFound:
		return "not found"
	case Precondition:
		return "precondition failed"
	case Auth:
		return "access denied"
	case Full:
		return "no space"
	case Short:
		return "object too short"
	case Permanent:
		return "refused"
	}
	return fmt.Sprintf("class %d", uint8(c))
}

// Sentinels for errors.Is: an *Error matches the one of its class.
var (
	ErrNotFound     = errors.New("no such object")
	ErrPrecondition = errors.New("precondition failed")
	ErrShort        = errors.New("object ends before the range")
	ErrAuth         = errors.New("access denied")
	ErrFull         = errors.New("no space left in the store")
)

// Error is what drivers return: the operation, its key and store, its class and cause.
type Error struct {
	Op    string // "put", "get", "read", "stat", "delete", "list", "copy"
	Store string // Store.String()
	Key   string
	Class Class
	Err   error // the cause; may be nil
}

// Error prints one line, without secrets. What is no key is quoted.
func (e *Error) Error() string {
	key := e.Key
	if CheckKey(key) != nil {
		key = strconv.Quote(key)
	}
	s := e.Op + " " + key + " in " + e.Store + ": " + e.Class.String()
	if e.Err != nil {
		s += ": " + strings.Join(strings.Fields(e.Err.Error()), " ")
	}
	return s
}

// Unwrap gives the cause.
func (e *Error) Unwrap() error { return e.Err }

// Is matches the sentinel of the error's class.
func (e *Error) Is(target error) bool {
	switch target {
	case ErrNotFound:
		return e.Class == NotFound
	case ErrPrecondition:
		return e.Class == Precondition
	case ErrShort:
		return e.Class == Short
	case ErrAuth:
		return e.Class == Auth
	case ErrFull:
		return e.Class == Full
	}
	return false
}

// ClassOf is the class of err: Transient for errors that no driver classified, 0 for nil.
func ClassOf(err error) Class {
	if err == nil {
		return 0
	}
	var e *Error
	if errors.As(err, &e) {
		return e.Class
	}
	return Transient
}
