package pool

import (
	"context"
	"encoding/json"
	"regexp"
	"testing"
	"time"
)

// The tests of this package are far from UTC: a time that is told in the local zone shows.
func init() { time.Local = time.FixedZone("XST", 5*3600) }

// TestTimesInJSONAreUTC reads what programs are told on a host whose clock shows another zone.
func TestTimesInJSONAreUTC(t *testing.T) {
	r, _ := filled(t, nil)
	r.publish()
	rep := r.scrub(ScrubOptions{})
	r.disk("old", testDisk)
	if err := r.pool.DeleteDisk(context.Background(), "old", true, false); err != nil {
		t.Fatal(err)
	}
	r.publish()
	for name, c := range map[string]struct {
		v     any
		least int
	}{
		"status": {r.pool.Status(), 3}, "scrub": {rep, 2}, "deleted disks": {r.pool.DeletedDisks(true), 2}, "view": {r.view().Info(), 1},
	} {
		b, err := json.Marshal(c.v)
		if err != nil {
			t.Fatal(err)
		}
		all := regexp.MustCompile(`"\d{4}-\d\d-\d\dT[^"]*"`).FindAllString(string(b), -1)
		for _, at := range all {
			if at[len(at)-2] != 'Z' {
				t.Errorf("%s: %s", name, at)
			}
		}
		if len(all) < c.least {
			t.Errorf("%s: only %v in %s", name, all, b)
		}
	}
}
