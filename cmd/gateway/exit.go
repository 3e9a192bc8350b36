package main

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"graindisk/api"
	"graindisk/config"
	"graindisk/grains/segment"
	"graindisk/internal/jobs"
	"graindisk/pool"
	"graindisk/pool/root"
	"graindisk/vdisk"
	"graindisk/vdisk/densetree"
	"graindisk/writeback"
)

// The exit codes, the same for every command. People script against them.
const (
	exitDone        = 0
	exitFailed      = 1
	exitUsage       = 2   // the command line or the configuration is wrong
	exitDamage      = 3   // stored data is damaged
	exitNoSuch      = 10  // no such disk or pool
	exitHeld        = 11  // another gateway holds the pool
	exitInterrupted = 130 // SIGINT or SIGTERM ended the command before it was done
)

// exitCodes gives the errors of the packages below their codes; the first that matches counts.
var exitCodes = []struct {
	err  error
	code int
}{
	{context.Canceled, exitInterrupted},
	{api.ErrBadRequest, exitUsage},
	{pool.ErrNoDisk, exitNoSuch},
	{api.ErrNoPool, exitNoSuch},
	{pool.ErrNoPool, exitNoSuch},
	{pool.ErrNoTarget, exitNoSuch},
	{jobs.ErrNoJob, exitNoSuch},
	{root.ErrHeld, exitHeld},
	{pool.ErrForeignTier, exitHeld},
	{vdisk.ErrFenced, exitHeld},
	{root.ErrFenced, exitHeld},
	{writeback.ErrDamaged, exitDamage},
	{segment.ErrDamaged, exitDamage},
	{root.ErrDamaged, exitDamage},
	{pool.ErrUnrepaired, exitDamage},
	{vdisk.ErrDamaged, exitDamage},
	{densetree.ErrCorrupt, exitDamage},
	{errCounts, exitDamage},
}

// exitCode is how the process ends after err.
func exitCode(err error) int {
	var usage *usageError
	var problems *config.Problems
	switch {
	case err == nil:
		return exitDone
	case errors.As(err, &usage), errors.As(err, &problems):
		return exitUsage
	}
	for _, c := range exitCodes {
		if errors.Is(err, c.err) {
			return c.code
		}
	}
	return exitFailed
}

// usageError is a wrong command line.
type usageError struct{ err error }

func (e *usageError) Error() string { return e.err.Error() }
func (e *usageError) Unwrap() error { return e.err }

func usagef(format string, args ...any) error { return &usageError{fmt.Errorf(format, args...)} }

// reportedError is an error whose story the command has told on stdout already.
type reportedError struct{ err error }

func (e *reportedError) Error() string { return e.err.Error() }
func (e *reportedError) Unwrap() error { return e.err }

// report tells the user about err and returns the exit code: one line on stderr, or with --json an
// object on stdout.
func (a *app) report(err error) int {
	code := exitCode(err)
	var told *reportedError
	if err == nil || errors.As(err, &told) {
		return code
	}
	line := strings.Join(strings.FieldsFunc(err.Error(), func(r rune) bool { return r == '\n' || r == '\r' }), "; ")
	if code == exitInterrupted {
		line = strings.ReplaceAll(line, context.Canceled.Error(), "interrupted")
	}
	if !a.json {
		fmt.Fprintln(a.stderr, "gateway:", line)
		return code
	}
	if perr := a.printJSON(errorObject{Error: line, Code: code}); perr != nil {
		fmt.Fprintln(a.stderr, "gateway:", perr)
	}
	return code
}

// errorObject is what --json prints for a failure.
type errorObject struct {
	Error string `json:"error"`
	Code  int    `json:"code"` // the exit code
}
