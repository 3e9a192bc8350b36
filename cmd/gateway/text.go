package main

import (
	"fmt"
	"strings"
	"time"

	"graindisk/config"
)

// What people read: sizes to four digits with their unit, times of the local clock with their zone. JSON has bytes, and
// times as RFC 3339 in UTC.

// sized is a number of bytes for people: exact where that is short ("64MiB"), else rounded ("30.01MiB").
func sized[N int64 | uint64 | float64](n N) string {
	if n < 1024 {
		return fmt.Sprintf("%.0fB", float64(n))
	}
	if s := config.Bytes(n).String(); float64(config.Bytes(n)) == float64(n) && len(s) <= len("1023KiB") && strings.HasSuffix(s, "iB") {
		return s
	}
	v, unit := float64(n)/1024, "KiB"
	for _, u := range []string{"MiB", "GiB", "TiB"} {
		if v < 1024 {
			break
		}
		v, unit = v/1024, u
	}
	return fmt.Sprintf("%.4g%s", v, unit)
}

// list are names in a sentence.
func list(names []string) string { return strings.Join(names, ", ") }

// clock is a moment for people.
func clock(t time.Time) string { return t.Local().Format("2006-01-02 15:04:05 MST") }
