package pool

import (
	"strings"
	"testing"
	"time"
)

// TestATakeoverSaysWhatItGivesUp reads the message for what is known of the owner: never "nothing" for what nobody knows.
func TestATakeoverSaysWhatItGivesUp(t *testing.T) {
	at := time.Date(2026, 3, 4, 5, 6, 7, 0, time.FixedZone("CET", 3600))
	beat := func(cut uint64, dirty int64, age float64) *Beat {
		return &Beat{Time: at, Cut: cut, DirtyBytes: dirty, OldestAgeSeconds: age}
	}
	for name, c := range map[string]struct {
		beat *Beat
		says []string
	}{
		"no beat":      {nil, []string{"how many bytes, and how old, is not known", "left no beat"}},
		"clean":        {beat(7, 0, 0), []string{"at its last beat, 2026-03-04T04:06:07Z by its clock, all that it had acknowledged was published", "after that beat is not known"}},
		"little dirty": {beat(7, 4096, 3), []string{"4096 bytes were acknowledged and not published, the oldest 3 s old", "after that beat is not known"}},
		"much dirty":   {beat(7, 3<<30, 900), []string{"3221225472 bytes (3072.0 MiB)", "the oldest 900 s old"}},
		"old beat":     {beat(6, 4096, 3), []string{"how many bytes is not known", "2026-03-04T04:06:07Z by its clock, is older than that cut"}},
	} {
		e := &OwnedError{"main", Sighting{Epoch: 4, Log: "l", Host: "b", Cut: 7, Beat: c.beat, Watched: 75 * time.Second}}
		text := e.Error()
		for _, s := range append(c.says, `"gateway serve --takeover" takes the pool over as of cut 7 and gives up every write that b acknowledged and did not publish by then: `) {
			if !strings.Contains(text, s) {
				t.Errorf("%s: %q does not say %q", name, text, s)
			}
		}
		if strings.Contains(text, "nothing") || strings.Contains(text, "4096 bytes") != (name == "little dirty") {
			t.Errorf("%s: %q", name, text)
		}
	}
}
