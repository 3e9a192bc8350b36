package pool

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"
	"testing"

	"graindisk/backend/backendtest"
	"graindisk/block"
	"graindisk/pool/root"
	"graindisk/writeback"
)

// resealRoot makes the checksum of a root copy right again after a change.
func resealRoot(b []byte) []byte {
	at := bytes.LastIndex(b, []byte(`"crc":"`))
	front := b[:at]
	return fmt.Appendf(bytes.Clone(front), "\"crc\":\"%08x\"}\n", block.CRC(front))
}

// resealPart makes the checksum of a checkpoint's part right again.
func resealPart(b []byte) []byte {
	binary.LittleEndian.PutUint32(b[36:], partCRC(b))
	return b
}

// setAt returns a change of the byte at so many bytes behind each occurrence of magic.
func setAt(magic string, at int, to byte, reseal func([]byte) []byte) func([]byte) []byte {
	return func(b []byte) []byte {
		for from := 0; ; {
			i := bytes.Index(b[from:], []byte(magic))
			if i < 0 {
				break
			}
			b[from+i+at] = to
			from += i + at + 1
		}
		return reseal(b)
	}
}

func asIs(b []byte) []byte { return b }

// edit changes every object for which which is true, on all targets, and returns how many it changed.
func (r *rig) edit(which func(key string, body []byte) bool, change func([]byte) []byte) (n int) {
	for _, m := range r.memory {
		for key, body := range m.Objects() {
			if !which(key, body) {
				continue
			}
			m.Damage(key, change)
			if !bytes.Equal(m.Objects()[key], body) {
				n++
			}
		}
	}
	return n
}

// contents is all that the targets hold.
func (r *rig) contents() (all []map[string][]byte) {
	for _, m := range r.memory {
		all = append(all, m.Objects())
	}
	return all
}

// changed lists the objects that are not what they were.
func changed(was, is []map[string][]byte) (keys []string) {
	for i := range was {
		both := maps.Clone(was[i])
		maps.Copy(both, is[i])
		for k := range both {
			if a, ok := was[i][k]; !ok || !bytes.Equal(a, is[i][k]) {
				keys = append(keys, fmt.Sprintf("%d:%s", i, k))
			}
		}
	}
	slices.Sort(keys)
	return keys
}

// TestNewerPoolsAreRefused marks each thing that a release writes to the targets as written by a newer one, as far as
// the format goes, in turn: opening the pool on a fresh host, with consent, and viewing it are refused in words that
// say so, and nothing has changed.
func TestNewerPoolsAreRefused(t *testing.T) {
	isRoot := func(key string, _ []byte) bool { return key == root.Key }
	inCheckpoint := func(magic string) func(string, []byte) bool {
		return func(key string, b []byte) bool {
			return strings.HasPrefix(key, "ckpt/") && bytes.Contains(b, []byte(magic))
		}
	}
	inSegment := func(key string, _ []byte) bool { return strings.HasPrefix(key, "seg/") }
	replace := func(from, to string) func([]byte) []byte {
		return func(b []byte) []byte { return resealRoot(bytes.Replace(b, []byte(from), []byte(to), 1)) }
	}
	// A manifest has its checksum in the root.
	newSnapshot := func(r *rig) int {
		var was, is uint32
		n := r.edit(inCheckpoint(`{"format":`), func(b []byte) []byte {
			was = block.CRC(b[partHeaderLen:])
			copy(b[partHeaderLen:], `{"format":9`)
			is = block.CRC(b[partHeaderLen:])
			return resealPart(b)
		})
		re := regexp.MustCompile(fmt.Sprintf(`"crc":%d\b`, was))
		return min(n, r.edit(isRoot, func(b []byte) []byte { return resealRoot(re.ReplaceAll(b, fmt.Appendf(nil, `"crc":%d`, is))) }))
	}
	edit := func(which func(string, []byte) bool, change func([]byte) []byte) func(*rig) int {
		return func(r *rig) int { return r.edit(which, change) }
	}
	for name, c := range map[string]struct {
		change func(*rig) int
		claims bool // it is found only after the claim, which changes the root and nothing else
		unread bool // a view does not need it
	}{
		"format of the root":                {edit(isRoot, replace(`"format":1`, `"format":2`)), false, false},
		"incompat bits of the root":         {edit(isRoot, replace(`"incompat":0`, `"incompat":4`)), false, false},
		"format of the root's value":        {edit(isRoot, replace(`"value":{"format":1`, `"value":{"format":2`)), false, false},
		"version of the manifest":           {edit(inCheckpoint(`{"format":`), setAt("GDCK", 4, 2, resealPart)), false, false},
		"incompat bits of the manifest":     {edit(inCheckpoint(`{"format":`), setAt("GDCK", 8, 1, resealPart)), false, false},
		"format of the disk table":          {newSnapshot, false, false},
		"version of runs of maps":           {edit(inCheckpoint("GDRN"), setAt("GDRN", 4, 9, resealPart)), true, false},
		"incompat bits of runs of maps":     {edit(inCheckpoint("GDRN"), setAt("GDRN", 15, 0x80, resealPart)), true, false},
		"version of the usage table":        {edit(inCheckpoint("GDUS"), setAt("GDUS", 4, 9, resealPart)), true, true},
		"version of cut records":            {edit(inSegment, setAt("GDCR", 4, 9, asIs)), false, false},
		"incompat bits of cut records":      {edit(inSegment, setAt("GDCR", 9, 1, asIs)), false, false},
		"version of segment indexes":        {edit(inSegment, setAt("GDIX", 4, 9, asIs)), false, false},
		"incompat bits of segment indexes":  {edit(inSegment, setAt("GDIX", 9, 1, asIs)), false, false},
		"incompat bits of segment trailers": {edit(inSegment, setAt("GDST", 9, 1, asIs)), false, false},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, func(o *Options) { o.CheckpointCuts, o.CheckpointBytes = 3, 20<<10 })
			d, model := r.disk("d", testDisk), make([]byte, testDisk)
			for range 5 { // a checkpoint, and cuts since
				r.scribble(d, model, 4)
				r.publish()
			}
			r.abandon()
			if n := c.change(r); n < 2 {
				t.Fatalf("%d objects were changed", n)
			}
			r.newHost()
			was, host := r.contents(), r.fs.Hash()
			err := r.tryOpen(true)
			if err == nil || !isNewer(err) || !strings.Contains(err.Error(), "newer") {
				t.Fatalf("open: %v", err)
			}
			for _, k := range changed(was, r.contents()) {
				if !c.claims || !strings.HasSuffix(k, ":"+root.Key) {
					t.Errorf("open changed %s", k)
				}
			}
			if !c.claims {
				if err := r.fs.Remove("/host/tier"); err != nil { // which is all that open may have made, and empty
					t.Error(err)
				} else if r.fs.Hash() != host {
					t.Error("open left something on the tier")
				}
			}
			was = r.contents()
			v, err := r.tryView()
			if err == nil {
				_, err = v.Disk(t.Context(), "d")
			}
			if c.unread != (err == nil) || !c.unread && !isNewer(err) {
				t.Errorf("view: %v", err)
			}
			if ks := changed(was, r.contents()); len(ks) > 0 {
				t.Errorf("a view changed %v", ks)
			}
		})
	}
}

// TestNewerRecordsInTheLogAreRefused has the log hold what only a newer release writes: the log's format is what it
// was, so it opens, and what is in it is refused, as often as it is tried. No target hears of it.
func TestNewerRecordsInTheLogAreRefused(t *testing.T) {
	for name, add := range map[string]func(*rig) error{
		"an operation on a disk": func(r *rig) error {
			_, err := r.pool.log.Append(context.Background(), []writeback.Record{{Kind: writeback.Op, Disk: 1, Data: []byte(`{"teleport":{}}`)}})
			return errors.Join(err, r.pool.log.Sync(context.Background()))
		},
		"a record of the metadata log": func(r *rig) error { return r.pool.log.AppendMeta(200, []byte("new")) },
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, nil)
			d, model := r.disk("d", testDisk), make([]byte, testDisk)
			r.scribble(d, model, 4)
			r.publish()
			r.scribble(d, model, 4)
			if err := add(r); err != nil {
				t.Fatal(err)
			}
			r.abandon()
			was := r.contents()
			for range 2 {
				if err := r.tryOpen(true); !isNewer(err) {
					t.Errorf("open: %v", err)
				}
			}
			if ks := changed(was, r.contents()); len(ks) > 0 {
				t.Errorf("the targets changed: %v", ks)
			}
		})
	}
}

// TestOpeningNeverCreates opens what is not there.
func TestOpeningNeverCreates(t *testing.T) {
	var memory []*backendtest.Memory
	r := newRig(t, nil)
	never := func(o *Options) {
		o.CreateEmpty = false
		for i := range o.Targets {
			o.Targets[i].Store = memory[i]
		}
	}
	for range r.stores {
		memory = append(memory, backendtest.NewMemory("empty"))
	}
	r.close()
	withLog := r.fs.Hash()
	r.opt = never
	if err := r.tryOpen(true); err == nil || isNewer(err) {
		t.Errorf("a tier without its targets: %v", err)
	}
	if r.fs.Hash() != withLog {
		t.Error("the tier changed")
	}
	r.newHost()
	if err := r.tryOpen(true); !errors.Is(err, ErrNoPool) {
		t.Errorf("no pool: %v", err)
	}
	if _, err := r.tryView(func(o *ViewOptions) {
		for i := range o.Targets {
			o.Targets[i].Store = memory[i]
		}
	}); !errors.Is(err, ErrNoPool) {
		t.Errorf("view of no pool: %v", err)
	}
	for i, m := range memory {
		if ks := m.Keys(); len(ks) > 0 {
			t.Errorf("target %d holds %v", i, ks)
		}
	}
}

// TestAFlippedBitIsNoNewerRelease flips bits of the version and the incompat bits in every part of a checkpoint on one
// target: the other copies say what is true.
func TestAFlippedBitIsNoNewerRelease(t *testing.T) {
	r, model := filled(t, smallMaps)
	for range 8 {
		r.scribble(r.disk("d", testDisk), model, 10)
		r.publish()
	}
	for i, at := range []int{4, 5, 8, 10, 15} {
		hurt := 0
		for _, key := range r.memory[i%2].Keys() {
			if _, ok := parsePartKey(key); ok {
				r.memory[i%2].Damage(key, func(b []byte) []byte { b[at] ^= 8; return b })
				hurt++
			}
		}
		if hurt == 0 {
			t.Fatalf("t%d holds no part", i%2)
		}
		r.freshTakeover()
		r.expect(r.disk("d", testDisk), model)
		if rep := r.scrub(ScrubOptions{}); rep.Damaged == 0 || rep.Repaired != rep.Damaged {
			t.Errorf("byte %d of %d parts: scrub says %+v", at, hurt, rep)
		}
	}
}
