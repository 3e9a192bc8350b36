package transport

import (
	"errors"
	"fmt"
	"net/http"

	"graindisk/backend"
)

// Refused marks what a driver itself will not do; its class is Permanent.
type Refused struct{ error }

// Refuse marks err.
func Refuse(err error) error { return Refused{err} }

// Unwrap gives what was marked.
func (r Refused) Unwrap() error { return r.error }

// ErrShort is the cause inside a driver for an error of class Short.
var ErrShort = errors.New("the object ends first")

// PreallocateMax is how much a server's word about a length is trusted before bytes come.
const PreallocateMax = 64 << 20

// CheckRange compares a Content-Range, "bytes first-last/total", with what was asked for: n bytes from off.
// It returns ErrShort, or what Refuse gives.
func CheckRange(got string, off, n int64) error {
	var first, last int64
	if _, err := fmt.Sscanf(got, "bytes %d-%d/", &first, &last); err != nil || first != off {
		return Refuse(fmt.Errorf("asked for a range from %d, the store answers with range %q", off, got))
	}
	if last < off+n-1 {
		return ErrShort
	}
	return nil
}

// ClassOf sorts an answer by its HTTP status alone.
func ClassOf(status int) backend.Class {
	switch {
	case status == http.StatusUnauthorized, status == http.StatusForbidden:
		return backend.Auth
	case status == http.StatusNotFound:
		return backend.NotFound
	case status == http.StatusPreconditionFailed:
		return backend.Precondition
	case status == http.StatusRequestedRangeNotSatisfiable:
		return backend.Short
	case status == http.StatusTooManyRequests:
		return backend.Throttled
	case status == http.StatusInsufficientStorage:
		return backend.Full
	case status == http.StatusNotImplemented:
		return backend.Permanent
	case status == http.StatusConflict, status == http.StatusRequestTimeout, status >= 500, status < 300:
		return backend.Transient // 2xx: an answer that could not be understood, as of a captive portal
	}
	return backend.Permanent
}
