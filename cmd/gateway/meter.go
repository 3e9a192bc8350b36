package main

import (
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"graindisk/config"
)

// meter shows how far long work is, in one line of a terminal's stderr: a bar, bytes, rate, time left. Elsewhere, and
// with --json, it shows nothing. It is used by one goroutine at a time.
type meter struct {
	w     io.Writer // nil: nowhere
	verb  string
	total int64 // bytes
	done  int64
	start time.Time
	shown time.Time
}

const (
	meterEvery = 200 * time.Millisecond
	meterWidth = 30
)

func (a *app) newMeter(verb string, total int64) *meter {
	m := &meter{verb: verb, total: total, start: time.Now()}
	if !a.json && isTerminal(a.stderr) {
		m.w = a.stderr
	}
	return m
}

// add counts n more bytes done.
func (m *meter) add(n int64) {
	m.done += n
	if now := time.Now(); m.w != nil && now.Sub(m.shown) >= meterEvery {
		m.shown = now
		fmt.Fprintf(m.w, "\r%s\x1b[K", m.line(now.Sub(m.start)))
	}
}

// line is what is shown after took.
func (m *meter) line(took time.Duration) string {
	share := 1.0
	if m.total > 0 {
		share = min(1, float64(m.done)/float64(m.total))
	}
	full := int(share * meterWidth)
	rate := float64(m.done) / max(took.Seconds(), 1e-3)
	left := "?"
	if rate > 0 {
		left = time.Duration(float64(m.total-m.done) / rate * float64(time.Second)).Round(time.Second).String()
	}
	return fmt.Sprintf("[%s%s] %3.0f %%  %s of %s %s, %s/s, %s left", strings.Repeat("#", full), strings.Repeat(".", meterWidth-full),
		100*share, rough(float64(m.done)), rough(float64(m.total)), m.verb, rough(rate), left)
}

// rough is a number of bytes in three digits or so.
func rough(n float64) string {
	for _, u := range []struct {
		name string
		size config.Bytes
	}{{"TiB", config.TiB}, {"GiB", config.GiB}, {"MiB", config.MiB}, {"KiB", config.KiB}} {
		if n >= float64(u.size) {
			return strconv.FormatFloat(n/float64(u.size), 'f', 1, 64) + " " + u.name
		}
	}
	return strconv.FormatFloat(n, 'f', 0, 64) + " B"
}

// end clears the line.
func (m *meter) end() {
	if m.w != nil && !m.shown.IsZero() {
		fmt.Fprint(m.w, "\r\x1b[K")
	}
}

// isTerminal tells whether w is one.
func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}
