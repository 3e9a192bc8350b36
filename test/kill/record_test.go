package kill

import (
	"fmt"
	"slices"
	"sync"
	"testing"
)

// possible is one write whose data a sector may hold.
type possible struct {
	id    uint64
	acked uint64 // when its reply was here; 0: it is not yet, or never will be
	zero  bool   // the write made zeroes
}

// write is one write under way: a stamped one, or one of zeroes.
type write struct {
	id     uint64 // also the time it was issued
	first  int64  // sector
	n      int64  // sectors
	zero   bool
	record *record
}

// record knows what every sector of a disk may hold. Its clock is one counter for writes and
// replies: a write is issued before it is sent, and acknowledged after its reply is here, so what the
// record calls "before" really was before.
type record struct {
	mu      sync.Mutex
	clock   uint64
	sectors [][]possible // never empty
	written []bool       // by anything, ever
	zeroed  []*write     // writes of zeroes since the last settle
}

func newRecord(sectors int64) *record {
	r := &record{sectors: make([][]possible, sectors), written: make([]bool, sectors)}
	for i := range r.sectors {
		r.sectors[i] = []possible{{zero: true}} // a new disk
	}
	return r
}

// issue notes a write of n sectors that is about to be sent.
func (r *record) issue(first, n int64, zero bool) *write {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.clock++
	w := &write{id: r.clock, first: first, n: n, zero: zero, record: r}
	for s := first; s < first+n; s++ {
		r.sectors[s] = append(r.sectors[s], possible{id: w.id, zero: zero})
		r.written[s] = true
	}
	if zero {
		r.zeroed = append(r.zeroed, w)
	}
	return w
}

// acked notes the reply to w: what was acknowledged before w was issued is gone for good.
func (w *write) acked() {
	r := w.record
	r.mu.Lock()
	defer r.mu.Unlock()
	r.clock++
	for s := w.first; s < w.first+w.n; s++ {
		kept := r.sectors[s][:0]
		for _, p := range r.sectors[s] {
			if p.id == w.id {
				p.acked = r.clock
			} else if p.settledBefore(w.id) {
				continue
			}
			kept = append(kept, p)
		}
		r.sectors[s] = kept
	}
}

// settledBefore tells whether p was acknowledged, or found by settle, before that time.
func (p possible) settledBefore(time uint64) bool {
	return p.acked != 0 && p.acked < time || p.id == 0
}

// matches tells whether a sector that parse calls id may be of p.
func (p possible) matches(id uint64) bool {
	return p.zero == (id == 0) && (p.zero || p.id == id)
}

// reading is what a range may hold when a read of it begins.
type reading struct {
	record *record
	time   uint64
	first  int64
	may    [][]possible
}

// reading begins a read of n sectors beside writes under way.
func (r *record) reading(first, n int64) *reading {
	r.mu.Lock()
	defer r.mu.Unlock()
	may := make([][]possible, n)
	for i := range may {
		may[i] = slices.Clone(r.sectors[first+int64(i)])
	}
	return &reading{r, r.clock, first, may}
}

// check judges what the read returned: what was possible at its begin, or was issued since.
func (v *reading) check(p []byte) error {
	r := v.record
	r.mu.Lock()
	defer r.mu.Unlock()
	for i, may := range v.may {
		sector := v.first + int64(i)
		id, err := parse(p[i*sectorBytes:][:sectorBytes], sector)
		if err != nil {
			return fmt.Errorf("sector %d: %w; possible were %v", sector, err, may)
		}
		ok := slices.ContainsFunc(may, func(p possible) bool { return p.matches(id) }) ||
			id > v.time && id <= r.clock ||
			id == 0 && slices.ContainsFunc(r.zeroed, func(w *write) bool {
				return w.id > v.time && w.first <= sector && sector < w.first+w.n
			})
		if !ok {
			return fmt.Errorf("sector %d: read %s; possible were %v", sector, name(id), may)
		}
	}
	return nil
}

// settle judges sectors from first on, read when no write is under way any more, and makes what they
// hold the only thing they may hold. It returns how many of them were ever written.
func (r *record) settle(p []byte, first int64) (written int, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for i := range int64(len(p) / sectorBytes) {
		sector := first + i
		may := r.sectors[sector]
		id, err := parse(p[i*sectorBytes:][:sectorBytes], sector)
		if err != nil {
			return written, fmt.Errorf("sector %d: %w; possible are %v", sector, err, may)
		}
		at := slices.IndexFunc(may, func(p possible) bool { return p.matches(id) })
		if at < 0 {
			return written, fmt.Errorf("sector %d: holds %s; possible are %v", sector, name(id), may)
		}
		r.clock++
		may[at].acked = r.clock
		r.sectors[sector] = append(may[:0], may[at])
		if r.written[sector] {
			written++
		}
	}
	return written, nil
}

// restarted forgets what only reads beside writes need; no request may be under way.
func (r *record) restarted() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.zeroed = nil
}

// String prints "write 7, acknowledged at 9".
func (p possible) String() string {
	s := name(p.id)
	if p.zero && p.id != 0 {
		s = fmt.Sprintf("zeroes of write %d", p.id)
	}
	if p.acked != 0 {
		return fmt.Sprintf("%s, acknowledged at %d", s, p.acked)
	}
	return s + ", not acknowledged"
}

func name(id uint64) string {
	if id == 0 {
		return "zeroes"
	}
	return fmt.Sprintf("write %d", id)
}

// TestRecordJudges plays short histories on one sector and tells what it may hold at the end.
func TestRecordJudges(t *testing.T) {
	const zeroes = 0
	for _, c := range []struct {
		name    string
		history string // upper case issues, lower case acknowledges; Z writes zeroes
		may     string // letters of writes, 0 for zeroes
		not     string
	}{
		{"a disk never written is zeroes", "", "0", "A"},
		{"an acknowledged write is there", "Aa", "A", "0"},
		{"one in flight may be there or not", "A", "A0", ""},
		{"a later write replaces an earlier", "AaBb", "B", "A0"},
		{"one in flight over an acknowledged", "AaB", "AB", "0"},
		{"of two at once either may win", "ABab", "AB", "0"},
		{"and so in the other order of replies", "ABba", "AB", "0"},
		{"one in flight for long may come late", "ABbCc", "AC", "B0"},
		{"a third after both replaces both", "ABabCc", "C", "AB0"},
		{"a third after one of them only that", "ABaCbc", "BC", "A0"},
		{"zeroes replace a write", "AaZz", "0", "A"},
		{"a write replaces zeroes", "ZzAa", "A", "0"},
		{"zeroes in flight over a write", "AaZ", "A0", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			for _, verdict := range []struct {
				letters string
				ok      bool
			}{{c.may, true}, {c.not, false}} {
				for _, l := range verdict.letters {
					r := newRecord(4)
					ids := map[rune]*write{'0': {id: zeroes}, 'A': {id: 1 << 40}}
					for _, h := range c.history {
						if 'A' <= h && h <= 'Z' {
							ids[h] = r.issue(1, 2, h == 'Z')
						} else {
							ids[h-'a'+'A'].acked()
						}
					}
					p := make([]byte, 4*sectorBytes)
					if id := ids[l].id; id != zeroes {
						stamp(p[sectorBytes:3*sectorBytes], id, 1)
					}
					if err := r.reading(0, 4).check(p); (err == nil) != verdict.ok {
						t.Errorf("reading %c: %v", l, err)
					}
					n, err := r.settle(p, 0)
					if (err == nil) != verdict.ok {
						t.Fatalf("holding %c: %v", l, err)
					}
					if want := min(2, 2*len(c.history)); verdict.ok && n != want {
						t.Errorf("holding %c: %d sectors checked, want %d", l, n, want)
					}
					if verdict.ok && len(c.history) > 0 {
						mustOnlyHold(t, r, p)
					}
				}
			}
		})
	}
}

// mustOnlyHold checks that a settled record takes p again and nothing else.
func mustOnlyHold(t *testing.T, r *record, p []byte) {
	t.Helper()
	if _, err := r.settle(p, 0); err != nil {
		t.Error("the same again:", err)
	}
	other := slices.Clone(p)
	stamp(other[sectorBytes:], 1<<41, 1)
	if _, err := r.settle(other[:2*sectorBytes], 0); err == nil {
		t.Error("something else is taken")
	}
}

func TestReadingTakesWhatIsIssuedMeanwhile(t *testing.T) {
	r := newRecord(1)
	r.issue(0, 1, false).acked()
	p := make([]byte, sectorBytes)
	for _, zero := range []bool{false, true} {
		v := r.reading(0, 1)
		w := r.issue(0, 1, zero)
		w.acked()
		r.issue(0, 1, false).acked() // w is not possible any more, but was
		clear(p)
		if !zero {
			stamp(p, w.id, 0)
		}
		if err := v.check(p); err != nil {
			t.Errorf("zero=%v: %v", zero, err)
		}
		if err := r.reading(0, 1).check(p); err == nil {
			t.Errorf("zero=%v: taken after it was replaced", zero)
		}
	}
}
