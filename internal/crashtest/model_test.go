package crashtest

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"graindisk/block"
)

func TestStamp(t *testing.T) {
	a, b := make([]byte, block.Size), make([]byte, block.Size)
	if s, err := ParseStamp(a); s != (Stamp{}) || err != nil {
		t.Fatalf("zeroes parse as %v, %v", s, err)
	}
	want := Stamp{7, 3, 1 << 40}
	want.Fill(a)
	if s, err := ParseStamp(a); s != want || err != nil {
		t.Fatalf("%v parses as %v, %v", want, s, err)
	}
	Stamp{8, 3, 1 << 40}.Fill(b)
	for i := range block.Size / SectorSize {
		for name, other := range map[string][]byte{"another op": b, "zeroes": make([]byte, block.Size)} {
			torn := slices.Clone(a)
			copy(torn[i*SectorSize:][:SectorSize], other[i*SectorSize:])
			if s, err := ParseStamp(torn); err == nil {
				t.Errorf("sector %d of %s: parses as %v", i, name, s)
			}
		}
		swapped := slices.Clone(a)
		copy(swapped[i*SectorSize:][:SectorSize], a[(i+1)%8*SectorSize:])
		if _, err := ParseStamp(swapped); err == nil {
			t.Errorf("sector %d in two places parses", i)
		}
	}
	for off := range block.Size {
		flipped := slices.Clone(a)
		flipped[off] ^= 0x10
		if s, err := ParseStamp(flipped); err == nil {
			t.Fatalf("flipped byte %d parses as %v", off, s)
		}
	}
	if _, err := ParseStamp(a[:512]); err == nil {
		t.Error("a short block parses")
	}
}

func FuzzParseStamp(f *testing.F) {
	p := make([]byte, block.Size)
	f.Add(slices.Clone(p))
	Stamp{1, 2, 3}.Fill(p)
	f.Add(p)
	f.Fuzz(func(t *testing.T, in []byte) {
		s, err := ParseStamp(in)
		if err != nil || s == (Stamp{}) {
			return
		}
		again := make([]byte, block.Size)
		s.Fill(again)
		if got, err := ParseStamp(again); got != s || err != nil {
			t.Fatalf("%v encodes to %v, %v", s, got, err)
		}
	})
}

// script drives a Model by a line of words, for two disks of four blocks. A letter names an operation;
// "a0-1" issues it as a write of blocks 0 to 1 of disk 1 (from 4 on: of disk 2), "~a0" as a hole,
// "a!" acknowledges it, "a!!" as stable; "flush1" and "flush2" flush a disk, "cut" publishes.
type script struct {
	*Model
	ids  map[byte]uint64
	cuts uint64
}

func newScript(lines ...string) *script {
	s := &script{NewModel(), map[byte]uint64{}, 0}
	s.AddDisk(1, 4)
	s.AddDisk(2, 4)
	for _, word := range strings.Fields(strings.Join(lines, " ")) {
		s.do(word)
	}
	return s
}

func (s *script) do(word string) {
	switch {
	case strings.HasPrefix(word, "flush"):
		s.Flushed(block.DiskID(word[5]-'0'), s.Mark())
	case word == "cut":
		s.cuts++
		s.Published(s.cuts, s.Mark())
	case strings.HasSuffix(word, "!!"):
		s.Stable(s.ids[word[0]])
	case strings.HasSuffix(word, "!"):
		s.Acked(s.ids[word[0]])
	default:
		name := strings.TrimPrefix(word, "~")
		first, last := int(name[1]-'0'), int(name[len(name)-1]-'0')
		disk, lba := block.DiskID(1+first/4), block.LBA(first%4)
		if name != word {
			s.ids[name[0]] = s.IssueHole(disk, lba, last-first+1)
		} else {
			s.ids[name[0]], _ = s.IssueWrite(disk, lba, last-first+1)
		}
	}
}

// shows reads a pool given as a letter per block, '.' for zeroes; the rest is zeroes.
func (s *script) shows(picture string) Read {
	return func(disk block.DiskID, lba block.LBA) (Stamp, error) {
		i := int(disk-1)*4 + int(lba)
		if i >= len(picture) || picture[i] == '.' {
			return Stamp{}, nil
		}
		return Stamp{s.ids[picture[i]], disk, lba}, nil
	}
}

func TestCheckers(t *testing.T) {
	type check = func(*Model, Read) error
	crash, prefix := (*Model).CheckProcessCrash, (*Model).CheckPrefix
	cut := func(n uint64) check { return func(m *Model, r Read) error { return m.CheckCut(r, n) } }
	const twoDisks = "a0 a! b4 b! c1 c! d0 d!" // disk 1: d c, disk 2: b
	for _, c := range []struct {
		name   string
		script string
		check  check
		right  string // pictures to accept
		wrong  string // pictures to refuse
	}{
		{"nothing happened", "", prefix, "....", ""},
		{"acknowledged survives a crash", "a0 a! b0 b!", crash, "b", "a ."},
		{"in flight may be there", "a0 a! b0", crash, "a b", "."},
		{"in flight may come before or after", "a0 b0 a! b!", crash, "a b", "."},
		{"in flight may be torn", "a0-1 a! b0-1", crash, "aa ab ba bb", "a. .b"},
		{"never issued there", "a0 a! b1 b!", crash, "ab", "bb aa abb"},
		{"a hole hides", "a0 a! ~h0 h!", crash, ".", "a"},
		{"a hole in flight", "a0 a! ~h0", crash, "a .", ""},
		{"written after a hole", "~h0 h! a0 a!", crash, "a", "."},
		{"prefixes over two disks", twoDisks, prefix, ".... a... a...b ac..b dc..b", "d.... .c.. ....b dc... d...b ac..."},
		{"a flush of disk 2 holds the prefix", "a0 a! b4 b! flush2 d0 d!", prefix, "a...b d...b", "a... ....b d..."},
		{"flush covers what came before its mark", "a0 flush1 a!", prefix, "a .", ""},
		{"fua covers itself", "a0 a! b1 c2 c! b!!", prefix, "ab ab.. abc", "a a.c b"},
		{"acknowledged is atomic", "a0-1 a!", prefix, ".. aa", "a. .a"},
		{"in flight is not", "a0-1", prefix, ".. aa a. .a", ""},
		{"concurrent in any order", "a0 b1 a! b!", prefix, ".. a. .b ab", ""},
		{"but not with what came before", "a0 a! b1 c2 b! c!", prefix, "... a.. ab. a.c abc", ".b. ..c .bc"},
		{"zeroes are the beginning or a hole", "a0 a! ~h0 h! b1 b! c0 c!", prefix, ".. a. .b cb", "ab c."},
		{"which of two holes", "~g0 g! a0 a! ~h0 h! b1 b!", prefix, ".. a. .b", "ab"},
		{"a stable hole", "a0 a! ~h0 h! flush1 b1 b!", prefix, ".. .b", "a. ab"},
		{"a published cut", "a0 a! cut b0 b! flush1 cut c1 c! flush1", cut(1), "a. b. bc", ".. ac"},
		{"a later published cut", "a0 a! cut b0 b! flush1 cut c1 c! flush1", cut(2), "b. bc", "a. .. ac"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := newScript(c.script)
			for _, picture := range strings.Fields(c.right) {
				if err := c.check(s.Model, s.shows(picture)); err != nil {
					t.Errorf("%q refused: %v", picture, err)
				}
			}
			for _, picture := range strings.Fields(c.wrong) {
				err := c.check(s.Model, s.shows(picture))
				if err == nil {
					t.Errorf("%q accepted", picture)
				}
				t.Logf("%q: %v", picture, err)
			}
		})
	}
}

func TestCheckersRefuseStrangeStamps(t *testing.T) {
	s := newScript("a0 a! ~h1 h!")
	for name, stamp := range map[string]Stamp{
		"never issued": {99, 1, 0}, "another block's": {s.ids['a'], 1, 2},
		"another disk's": {s.ids['a'], 2, 0}, "a hole's": {s.ids['h'], 1, 1},
	} {
		err := s.CheckPrefix(func(disk block.DiskID, lba block.LBA) (Stamp, error) {
			if disk == 1 && lba == 0 {
				return stamp, nil
			}
			return Stamp{}, nil
		})
		if err == nil {
			t.Errorf("%s stamp accepted", name)
		}
	}
	if err := s.CheckPrefix(func(block.DiskID, block.LBA) (Stamp, error) { return Stamp{}, ErrNotStamped }); err == nil {
		t.Error("a failing read accepted")
	}
}

func TestRecover(t *testing.T) {
	for _, c := range []struct {
		name   string
		before string
		shows  string // after the first crash
		after  string
		right  string
		wrong  string
	}{
		{"what showed is stable", "a0 a! b0", "b", "", "b", "a ."},
		{"what was lost stays lost", "a0 a! b0 b!", "a", "c1 c!", "a ac", "b . bc"},
		{"all was lost", "a0 a!", ".", "c0 c!", ". c", "a"},
		{"torn in flight, half of it", "a0-1", "a.", "c2 c!", "a. a.c", "aa .. .a"},
		{"zeroes by a hole are stable", "a0 a! ~h0", ".", "c1 c!", ". .c", "a ac"},
		{"writes go on", "a0 a!", "a", "b0 b! c1 c! flush1 d2", "bc bcd", "b ac"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := newScript(c.before)
			for range 2 { // recovering twice changes nothing
				must(t, s.CheckPrefix(s.shows(c.shows)))
				must(t, s.Recover(s.shows(c.shows)))
			}
			for _, word := range strings.Fields(c.after) {
				s.do(word)
			}
			for _, picture := range strings.Fields(c.right) {
				if err := s.CheckPrefix(s.shows(picture)); err != nil {
					t.Errorf("%q refused: %v", picture, err)
				}
			}
			for _, picture := range strings.Fields(c.wrong) {
				if s.CheckPrefix(s.shows(picture)) == nil {
					t.Errorf("%q accepted", picture)
				}
			}
		})
	}
}

func TestCutOlderThanRecoveredState(t *testing.T) {
	s := newScript("a0 a! cut b0 b! c1 c!")
	must(t, s.Recover(s.shows("b."))) // a power cut loses c; later the host is lost as well
	for picture, ok := range map[string]bool{"a.": true, "b.": true, "..": false, "bc": false} {
		if err := s.CheckCut(s.shows(picture), 1); (err == nil) != ok {
			t.Errorf("%q: %v", picture, err)
		}
	}
}

// TestCheckPrefixAgainstBruteForce draws small histories and compares CheckPrefix, for every picture,
// with trying all orders and prefixes.
func TestCheckPrefixAgainstBruteForce(t *testing.T) {
	rng := rand.New(rand.NewPCG(11, 12))
	accepted, refused := 0, 0
	for range 1500 {
		words := randomScript(rng)
		s := newScript(words...)
		possible := s.allOutcomes()
		for _, picture := range pictures(s) {
			err := s.CheckPrefix(s.shows(picture))
			if (err == nil) != possible[picture] {
				t.Fatalf("script %v shows %q: %v, by brute force possible: %v", words, picture, err, possible[picture])
			}
			if err == nil {
				accepted++
			} else {
				refused++
			}
		}
	}
	t.Logf("%d pictures accepted, %d refused", accepted, refused)
	if accepted < 1000 || refused < 1000 {
		t.Error("too few of one kind")
	}
}

// bruteBlocks is how many blocks, of disk 1, the scripts of the brute-force test use.
const bruteBlocks = 3

// randomScript issues up to five operations of one block each, and sometimes one of two blocks that
// nothing else overlaps in time, with acknowledgements and flushes between.
func randomScript(rng *rand.Rand) []string {
	var words []string
	var open []byte
	for name := byte('a'); name < byte('b'+rng.IntN(5)); name++ {
		at := rng.IntN(bruteBlocks)
		word := fmt.Sprintf("%c%d", name, at)
		switch {
		case rng.IntN(4) == 0:
			word = "~" + word
		case at+1 < bruteBlocks && len(open) == 0 && rng.IntN(3) == 0:
			words = append(words, fmt.Sprintf("%s-%d", word, at+1), string(name)+"!")
			continue
		}
		words = append(words, word)
		open = append(open, name)
		for len(open) > 0 && rng.IntN(5) < 3 {
			i := rng.IntN(len(open))
			words = append(words, string(open[i])+[]string{"!", "!", "!", "!!"}[rng.IntN(4)])
			open = slices.Delete(open, i, i+1)
		}
		if rng.IntN(6) == 0 {
			words = append(words, "flush1")
		}
	}
	return words
}

// pictures lists everything the blocks could show.
func pictures(s *script) []string {
	list := []string{""}
	for lba := range bruteBlocks {
		var next []string
		for _, p := range list {
			next = append(next, p+".")
			for name, id := range s.ids {
				o := s.ops[id-1]
				if !o.hole && lba >= int(o.lba) && lba < int(o.lba)+o.blocks {
					next = append(next, p+string(name))
				}
			}
		}
		list = next
	}
	return list
}

// allOutcomes tries all orders of the operations that respect time, and all prefixes of those that hold
// what is stable; operations never acknowledged are left out or put anywhere.
func (s *script) allOutcomes() map[string]bool {
	found := map[string]bool{}
	names := map[uint64]byte{}
	for name, id := range s.ids {
		names[id] = name
	}
	var extend func(state string, done map[*op]bool)
	extend = func(state string, done map[*op]bool) {
		complete := true
		for _, o := range s.ops {
			complete = complete && (done[o] || !o.stable)
		}
		if complete {
			found[state] = true
		}
		for _, o := range s.ops {
			ready := !done[o]
			for _, before := range s.ops {
				ready = ready && (done[before] || before.acked == 0 || before.acked > o.issued)
			}
			if !ready {
				continue
			}
			next := []byte(state)
			for i := range o.blocks {
				next[int(o.lba)+i] = names[o.id]
				if o.hole {
					next[int(o.lba)+i] = '.'
				}
			}
			done[o] = true
			extend(string(next), done)
			delete(done, o)
		}
	}
	extend(strings.Repeat(".", bruteBlocks), map[*op]bool{})
	return found
}
