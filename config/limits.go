package config

import (
	"fmt"
	"time"
)

// Limits bound what a target is asked for. What is not set is not bounded, but for Concurrency.
type Limits struct {
	Concurrency       int   `yaml:"concurrency,omitempty" range:"1-1024"` // requests under way; default 64
	RequestsPerSecond int   `yaml:"requests_per_second,omitempty" range:"1-1000000"`
	Upload            Bytes `yaml:"upload,omitempty"`   // per second
	Download          Bytes `yaml:"download,omitempty"` // per second
	// Schedule holds other limits for parts of the day; the first that fits replaces all of the above.
	Schedule []Window `yaml:"schedule,omitempty"`
}

// Window is limits for a part of the day, by the host's clock; one that ends before it begins goes over
// midnight.
type Window struct {
	From              string `yaml:"from"` // 08:30
	To                string `yaml:"to"`   // 24:00 is midnight
	Concurrency       int    `yaml:"concurrency,omitempty" range:"1-1024"`
	RequestsPerSecond int    `yaml:"requests_per_second,omitempty" range:"1-1000000"`
	Upload            Bytes  `yaml:"upload,omitempty"`
	Download          Bytes  `yaml:"download,omitempty"`
}

// Prices are what a target charges, in any currency, for the cost that status and metrics show.
type Prices struct {
	Put1000 float64 `yaml:"put_per_1000,omitempty"` // puts and lists
	Get1000 float64 `yaml:"get_per_1000,omitempty"` // gets and stats
	OutGB   float64 `yaml:"out_per_gb,omitempty"`   // 10^9 bytes read
}

// Bounds are the window's ends, since midnight. The configuration has been checked.
func (w Window) Bounds() (from, to time.Duration) {
	from, _ = parseClock(w.From)
	to, _ = parseClock(w.To)
	return from, to
}

// parseClock reads a time of day, "08:30" or "24:00", as the duration since midnight.
func parseClock(s string) (time.Duration, error) {
	if s == "24:00" {
		return 24 * time.Hour, nil
	}
	t, err := time.Parse("15:04", s)
	if err != nil {
		return 0, fmt.Errorf("%q is no time of day such as 08:30", s)
	}
	return time.Duration(t.Hour())*time.Hour + time.Duration(t.Minute())*time.Minute, nil
}

func checkLimits(col *collector, key string, l Limits) {
	for i, w := range l.Schedule {
		at := fmt.Sprintf("%s.schedule[%d]", key, i)
		checkClock(col, at+".from", w.From)
		checkClock(col, at+".to", w.To)
		if w.From != "" && w.From == w.To {
			col.add(Problem{Key: at, Msg: "begins when it ends; all day is from 00:00 to 24:00"})
		}
	}
}

func checkClock(col *collector, key, s string) {
	if s == "" {
		col.addMissing(key, "the time of day is missing")
	} else if _, err := parseClock(s); err != nil {
		col.add(Problem{Key: key, Value: s, Msg: err.Error()})
	}
}
