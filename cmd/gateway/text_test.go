package main

import (
	"testing"
	"time"
)

func TestSizesAndTimesForPeople(t *testing.T) {
	for n, want := range map[int64]string{
		0: "0B", 1: "1B", 1023: "1023B", 1024: "1KiB", 1025: "1.001KiB", 37908: "37.02KiB", 31472041: "30.01MiB", 64 << 20: "64MiB", 10 << 30: "10GiB",
		1<<40 - 1: "1024GiB", 3 << 39: "1536GiB", 64 << 40: "64TiB", 5000 << 40: "5000TiB", 999_999_999_999: "931.3GiB",
	} {
		if got := sized(n); got != want {
			t.Errorf("%d bytes read %s, want %s", n, got, want)
		}
	}
	if got := sized(1536.5); got != "1.5KiB" {
		t.Errorf("a fraction reads %s", got)
	}
	defer func(was *time.Location) { time.Local = was }(time.Local)
	time.Local = time.FixedZone("WIB", 7*3600)
	if got := clock(time.Unix(1_700_000_000, 0).UTC()); got != "2023-11-15 05:13:20 WIB" {
		t.Errorf("a time reads %s", got)
	}
}
