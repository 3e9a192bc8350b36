package pool

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"graindisk/block"
	"graindisk/pool/root"
)

func sampleBeat() *Beat {
	return &Beat{
		Pool: "11111111-2222-3333-4444-555555555555", Log: "0123456789abcdef0123456789abcdef", Host: "host-a", Epoch: 7, Seq: 19, Cut: 12,
		DirtyBytes: 3 << 20, OldestAgeSeconds: 12.5, EverySeconds: 30, Time: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC),
	}
}

func sampleLost() *Lost {
	return &Lost{
		LostSummary: LostSummary{
			Pool: "11111111-2222-3333-4444-555555555555", PoolName: "main", Log: "0123456789abcdef0123456789abcdef", Host: "host-a", Epoch: 7,
			ThroughCut: 12, Sure: true, ByHost: "host-b", ByLog: "fedcba9876543210fedcba9876543210", ByEpoch: 8,
			Time: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC), BlockBytes: block.Size, Bytes: 5 * block.Size, Ranges: 3,
		},
		Disks: []LostDisk{
			{Disk: 1, Name: "vm1", Bytes: 5 * block.Size, Written: []LostRange{{10, 4}, {100, 1}}, Unmapped: []LostRange{{200, 8}}},
			{Disk: 2, Name: "new", Operations: 1, Written: []LostRange{}, Unmapped: []LostRange{}},
		},
	}
}

// TestTheTextsOfAnOwnerStayReadable compares with the golden files, and reads those.
func TestTheTextsOfAnOwnerStayReadable(t *testing.T) {
	body, err := sampleBeat().encode()
	if err != nil {
		t.Fatal(err)
	}
	b, err := DecodeBeat(golden(t, "beat", body))
	if err != nil || !reflect.DeepEqual(b, sampleBeat()) {
		t.Errorf("%+v, %v", b, err)
	}
	var text bytes.Buffer
	if err := DescribeBeat(&text, body); err != nil {
		t.Error(err)
	}
	golden(t, "beat.txt", text.Bytes())

	if body, err = seal(lostMagic, lostFormat, sampleLost()); err != nil {
		t.Fatal(err)
	}
	l, err := DecodeLost(golden(t, "LOST.json", body))
	if err != nil || !reflect.DeepEqual(l, sampleLost()) {
		t.Errorf("%+v, %v", l, err)
	}
	text.Reset()
	l.Describe(&text)
	golden(t, "LOST.json.txt", text.Bytes())
}

// TestASealedTextIsWholeOrNotRead changes every byte of one in turn, cuts it, and raises its format.
func TestASealedTextIsWholeOrNotRead(t *testing.T) {
	body, err := sampleBeat().encode()
	if err != nil {
		t.Fatal(err)
	}
	for i := range body {
		bad := bytes.Clone(body)
		bad[i] ^= 1
		if b, err := DecodeBeat(bad); err == nil {
			t.Fatalf("byte %d (%q) changed and not noticed: %+v", i, body[i], b)
		}
		if b, err := DecodeBeat(body[:i]); err == nil {
			t.Fatalf("%d bytes of %d read: %+v", i, len(body), b)
		}
	}
	newer, err := seal(beatMagic, beatFormat+1, sampleBeat())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := DecodeBeat(newer); !errors.Is(err, root.ErrNewer) || errors.Is(err, errSealBroken) {
		t.Errorf("a newer format: %v", err)
	}
	more, err := seal(beatMagic, beatFormat, struct {
		*Beat
		Weather string `json:"weather"`
	}{sampleBeat(), "fine"})
	if err != nil {
		t.Fatal(err)
	}
	if b, err := DecodeBeat(more); err != nil || b.Seq != 19 {
		t.Errorf("a field more: %+v, %v", b, err)
	}
	if _, err := DecodeLost(body); err == nil || !strings.Contains(err.Error(), lostMagic) {
		t.Errorf("a beat taken for a list: %v", err)
	}
}

// FuzzSealed feeds the decoders: what they take must encode to what they take again.
func FuzzSealed(f *testing.F) {
	for _, name := range []string{"beat", "LOST.json"} {
		b, err := os.ReadFile(filepath.Join("testdata", name))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if beat, err := DecodeBeat(b); err == nil {
			body, err := beat.encode()
			if err != nil {
				t.Fatal(err)
			}
			if again, err := DecodeBeat(body); err != nil || !again.Time.Equal(beat.Time) || again.Seq != beat.Seq {
				t.Fatalf("%+v, then %+v, %v", beat, again, err)
			}
		}
		if l, err := DecodeLost(b); err == nil {
			var text bytes.Buffer
			l.Describe(&text)
			body, err := seal(lostMagic, lostFormat, l)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := DecodeLost(body); err != nil {
				t.Fatal(err)
			}
		}
	})
}
