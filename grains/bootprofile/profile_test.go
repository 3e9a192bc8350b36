package bootprofile

import (
	"bytes"
	"encoding/binary"
	"errors"
	"flag"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"graindisk/block"
)

var update = flag.Bool("update", false, "write the golden file anew")

func sample() Profile {
	p := Profile{Disk: 7, Ranges: []Range{{0, 16}, {1 << 20, 64}, {16, 16}, {4096, 160}, {1<<34 - 16, 16}}}
	copy(p.Pool[:], "0123456789abcdef")
	return p
}

func TestGolden(t *testing.T) {
	path := filepath.Join("testdata", "boot.golden")
	got := sample().Encode()
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
		t.Errorf("encoded\n%x, the golden file is\n%x", got, want)
	}
	p, err := Decode(want)
	if err != nil || p.Pool != sample().Pool || p.Disk != 7 || !slices.Equal(p.Ranges, sample().Ranges) {
		t.Errorf("decoded %+v, %v", p, err)
	}
	var text strings.Builder
	if err := Describe(&text, want); err != nil || !strings.Contains(text.String(), "disk 7 of pool 3031") || !strings.Contains(text.String(), "blocks       16-31\n") {
		t.Errorf("described as %q, %v", text.String(), err)
	}
}

// seal makes the checksum good again.
func seal(b []byte) []byte {
	return binary.LittleEndian.AppendUint32(b[:len(b)-crcLen], block.CRC(b[:len(b)-crcLen]))
}

func TestDecodeRefuses(t *testing.T) {
	for _, c := range []struct {
		name   string
		change func([]byte) []byte
		want   error
	}{
		{"nothing", func(b []byte) []byte { return nil }, ErrDamaged},
		{"another magic", func(b []byte) []byte { b[0]++; return seal(b) }, ErrDamaged},
		{"a newer version", func(b []byte) []byte { b[4]++; return seal(b) }, ErrNewer},
		{"version 0", func(b []byte) []byte { b[4]--; return seal(b) }, ErrDamaged},
		{"an incompat bit", func(b []byte) []byte { b[9]++; return seal(b) }, ErrNewer},
		{"a flipped bit", func(b []byte) []byte { b[33] ^= 4; return b }, ErrDamaged},
		{"a torn end", func(b []byte) []byte { return b[:len(b)-3] }, ErrDamaged},
		{"one range too few", func(b []byte) []byte { b[36]--; return seal(b) }, ErrDamaged},
		{"one range too many", func(b []byte) []byte { b[36]++; return seal(b) }, ErrDamaged},
		{"far too many ranges", func(b []byte) []byte { b[38]++; return seal(b) }, ErrDamaged},
		{"another length", func(b []byte) []byte { b[40]++; return seal(b) }, ErrDamaged},
		{"an empty range", func(b []byte) []byte { b[headerLen+1] = 0; return seal(b) }, ErrDamaged},
		{"a range before the disk", func(b []byte) []byte { b[headerLen] = 1; return seal(b) }, ErrDamaged},
	} {
		if _, err := Decode(c.change(sample().Encode())); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", c.name, err, c.want)
		}
	}
}

func FuzzDecode(f *testing.F) {
	f.Add(sample().Encode())
	f.Add(Profile{}.Encode())
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) > headerLen+crcLen {
			b = seal(slices.Clone(b)) // else nothing gets past the checksum
		}
		p, err := Decode(b)
		if err != nil {
			return
		}
		if len(p.Ranges) > RangesMax || len(p.Ranges) > len(b) {
			t.Fatalf("%d ranges of %d bytes", len(p.Ranges), len(b))
		}
		again, err := Decode(p.Encode())
		if err != nil || again.Disk != p.Disk || again.Pool != p.Pool || !slices.Equal(again.Ranges, p.Ranges) {
			t.Fatalf("%+v became %+v, %v", p, again, err)
		}
	})
}

// TestRecorderTakesDownFirstReads reads at random and compares with a list of grains.
func TestRecorderTakesDownFirstReads(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 1))
	begun := 0
	r := NewRecorder(16, 100*64<<10, func() { begun++ })
	var order []int64
	for done := false; !done; {
		off, n := rnd.Int64N(300*64<<10), 1+rnd.Int64N(200<<10)
		r.Note(off, n)
		for g := off >> 16; g <= (off+n-1)>>16; g++ {
			if !slices.Contains(order, g) && len(order) < 100 {
				order = append(order, g)
			}
		}
		select {
		case <-r.Over():
			done = true
		default:
		}
	}
	r.Note(1<<40, 1) // too late
	r.Halt()
	var got []int64
	for _, x := range r.Take() {
		for b := x.First; b < x.end(); b += 16 {
			got = append(got, int64(b/16))
		}
	}
	if begun != 1 || !slices.Equal(got, order) {
		t.Errorf("begun %d times; recorded %v, want %v", begun, got, order)
	}
	if again := r.Take(); again != nil {
		t.Errorf("recorded after the end: %v", again)
	}
}

// TestRecorderIsBounded reads every other grain: ranges run out first, and what there are of them can be stored.
func TestRecorderIsBounded(t *testing.T) {
	r := NewRecorder(16, 1<<40, func() {})
	for g := range int64(3 * RangesMax) {
		r.Note((3*RangesMax-g)<<24, 1)
	}
	p := Profile{Ranges: r.Take()}
	b := p.Encode()
	if _, err := Decode(b); err != nil || len(p.Ranges) != RangesMax || len(b) > BytesMax {
		t.Errorf("%d ranges in %d bytes: %v", len(p.Ranges), len(b), err)
	}
}

func BenchmarkNoteAfterTheEnd(b *testing.B) {
	r := NewRecorder(16, 1<<20, func() {})
	r.Take()
	for b.Loop() {
		r.Note(4096, 4096)
	}
}
