package root

import (
	"bytes"
	"errors"
	"flag"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"graindisk/block"
)

var update = flag.Bool("update", false, "rewrite the golden files")

// sample is a copy with every field set.
func sample() Copy {
	v := firstValue(3)
	v.Cfg.No, v.Cfg.Next = 4, []Member{{ID: 4, UUID: "m3", Name: "t<3>", Witness: true}}
	v.Owner, v.OwnerName, v.State = "log-1", "host-a", Held
	v.SegLimit, v.Cut, v.Horizon, v.LastCRC = 1024, 17, 1<<40, 0xdeadbeef
	v.Cuts = []CutRef{{Cut: 17, Segment: SegmentRef{
		ID: 99, Epoch: 7, K: 2, M: 1, Targets: []block.TargetID{1, 0, 3}, ShardBytes: 1 << 24, IndexBytes: 4000, RecordBytes: 80, Extents: 512, Payload: 1 << 25, CRC: 0xdeadbeef,
	}}}
	v.Checkpoints = []CheckpointRef{{Epoch: 7, N: 3, Cut: 16, K: 2, M: 1, Targets: []block.TargetID{1, 2, 3}, Bytes: 123456, CRC: 5}}
	v.Params = []byte(`{"later":true}`)
	return Copy{
		Pool: "pool", Member: "m0", Promised: Ballot{8, "c2"}, Accepted: Ballot{7, "c1"}, Ver: 19, Val: v, Nonce: "n",
	}
}

func encoded(t testing.TB, c Copy) []byte {
	t.Helper()
	b, err := c.encode()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%s differs; got\n%s", path, got)
	}
}

// sampleSeed is what Seed puts, a claim's promise added.
func sampleSeed() Copy {
	return Copy{
		Pool: "pool", Member: "m3", Promised: Ballot{8, "c2"}, Nonce: "n",
		Val: Value{Format: ValueFormat, Cfg: sample().Val.Cfg, State: Released},
	}
}

func TestGoldenCopy(t *testing.T) {
	for name, want := range map[string]Copy{"root": sample(), "seed": sampleSeed()} {
		body := encoded(t, want)
		golden(t, name+".json", body)
		c, err := Decode(body)
		if err != nil || !reflect.DeepEqual(c, want) {
			t.Errorf("decoded %+v, %v", c, err)
		}
		var out bytes.Buffer
		if err := Describe(&out, body); err != nil {
			t.Fatal(err)
		}
		golden(t, name+".txt", out.Bytes())
	}
}

// TestEveryFlippedBitIsSeen flips each bit of a copy, and cuts it short everywhere.
func TestEveryFlippedBitIsSeen(t *testing.T) {
	body := encoded(t, sample())
	for i := range body {
		for bit := range 8 {
			body[i] ^= 1 << bit
			if _, err := Decode(body); !errors.Is(err, ErrDamaged) {
				t.Fatalf("bit %d of byte %d: %v", bit, i, err)
			}
			body[i] ^= 1 << bit
		}
		if _, err := Decode(body[:i]); !errors.Is(err, ErrDamaged) {
			t.Fatalf("first %d bytes: %v", i, err)
		}
	}
}

func TestNewerCopiesAreNamed(t *testing.T) {
	if _, err := Decode(newer(encoded(t, sample()))); !errors.Is(err, ErrNewer) || !strings.Contains(err.Error(), "format 2") {
		t.Errorf("newer format: %v", err)
	}
	c := sample()
	c.Val.Format = 2
	if _, err := Decode(encoded(t, c)); !errors.Is(err, ErrNewer) {
		t.Errorf("newer value: %v", err)
	}
	flagged := bytes.Replace(encoded(t, sample()), []byte(`"incompat":0`), []byte(`"incompat":4`), 1)
	if _, err := Decode(resealed(flagged)); !errors.Is(err, ErrNewer) || !strings.Contains(err.Error(), "0x4") {
		t.Errorf("unknown incompatible feature: %v", err)
	}
}

func TestNonsenseIsDamage(t *testing.T) {
	for name, change := range map[string]func(*Copy){
		"no pool":                  func(c *Copy) { c.Pool = "" },
		"no member":                func(c *Copy) { c.Member = "" },
		"accepted above promised":  func(c *Copy) { c.Accepted.Epoch = 9 },
		"a version of no ballot":   func(c *Copy) { c.Ver = 0 },
		"held by nobody":           func(c *Copy) { c.Val.Owner = "" },
		"unknown state":            func(c *Copy) { c.Val.State = "lent" },
		"no members":               func(c *Copy) { c.Val.Cfg.Members = nil },
		"member without an id":     func(c *Copy) { c.Val.Cfg.Members[0].ID = 0 },
		"too many checkpoints":     func(c *Copy) { c.Val.Checkpoints = make([]CheckpointRef, 3) },
		"value without its format": func(c *Copy) { c.Val.Format = 0 },
	} {
		c := sample()
		change(&c)
		if _, err := Decode(encoded(t, c)); !errors.Is(err, ErrDamaged) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestFullCopyFits encodes the longest list of cuts.
func TestFullCopyFits(t *testing.T) {
	c := sample()
	for len(c.Val.Cuts) < CutsMax {
		c.Val.Cuts = append(c.Val.Cuts, c.Val.Cuts[0])
	}
	if n := len(encoded(t, c)); n > bytesMax/4 {
		t.Errorf("%d bytes", n)
	}
}

func FuzzDecode(f *testing.F) {
	f.Add(encoded(f, sample()))
	f.Add(encoded(f, sampleSeed()))
	f.Add(encoded(f, Copy{Pool: "p", Member: "m0", Ver: 1, Val: firstValue(1), Nonce: "created"}))
	f.Add(newer(encoded(f, sample())))
	f.Add([]byte(head))
	f.Fuzz(func(t *testing.T, p []byte) {
		for _, body := range [][]byte{p, resealed(p)} {
			c, err := Decode(body)
			if err != nil {
				if !errors.Is(err, ErrDamaged) && !errors.Is(err, ErrNewer) {
					t.Fatalf("unclassified: %v", err)
				}
				continue
			}
			once := encoded(t, c)
			again, err := Decode(once)
			if err != nil || !bytes.Equal(once, encoded(t, again)) {
				t.Fatalf("does not come back: %v\n%s", err, once)
			}
			if err := Describe(&bytes.Buffer{}, body); err != nil {
				t.Fatal(err)
			}
		}
	})
}

// resealed makes p's checksum right, so that the fuzzer gets past it.
func resealed(p []byte) []byte {
	if len(p) < tailBytes {
		return p
	}
	return seal(p[:len(p)-tailBytes])
}
