// Package probe finds out by real requests whether a store keeps the contract that a pool stands on, and
// how fast it is. It writes objects under probe/<random>/ and removes them.
package probe

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"graindisk/backend"
)

// Check is one thing that was tried.
type Check struct {
	Name string `json:"name"`
	// Result is "ok", "missing" (a pool cannot rest on this store), "dangerous" (it can, and should not) or
	// "note".
	Result string `json:"result"`
	Text   string `json:"text,omitempty"`   // what was seen
	Advice string `json:"advice,omitempty"` // what it means and what to do
}

// The results.
const (
	OK        = "ok"
	Missing   = "missing"
	Dangerous = "dangerous"
	Note      = "note"
)

// Report is what a probe found.
type Report struct {
	Store  string  `json:"store"`
	Checks []Check `json:"checks"`
	// Of a small put and a small read, and of objects of 8 MiB; zero if that failed.
	PutSeconds    float64 `json:"put_seconds"` // median
	ReadSeconds   float64 `json:"read_seconds"`
	PutPerSecond  float64 `json:"put_bytes_per_second"`
	ReadPerSecond float64 `json:"read_bytes_per_second"`
}

// Err says what the store lacks to be used, and what to do; nil if it is Usable.
func (r *Report) Err() error {
	var errs []error
	advised := ""
	for _, c := range r.Checks {
		if c.Result != Missing {
			continue
		}
		err := fmt.Errorf("%s: %s", c.Name, c.Text)
		if c.Advice != advised {
			err = fmt.Errorf("%w (%s)", err, c.Advice)
			advised = c.Advice
		}
		errs = append(errs, err)
	}
	if len(errs) == 0 {
		return nil
	}
	return fmt.Errorf("%s cannot hold a pool: %w", r.Store, errors.Join(errs...))
}

// Usable tells whether a pool can rest on the store.
func (r *Report) Usable() bool {
	return !slices.ContainsFunc(r.Checks, func(c Check) bool { return c.Result == Missing })
}

const (
	racers   = 8
	speedLen = 8 << 20
	speedRun = 5 // small requests of which the median counts
	skewMax  = time.Minute
)

// probe is one run.
type probe struct {
	s    backend.Store
	dir  string
	keys []string // to be removed
	r    *Report
}

// Run probes a store. The error says that it could not even begin, or that ctx ended; everything else is in
// the report.
func Run(ctx context.Context, s backend.Store) (*Report, error) {
	return run(ctx, s, true)
}

// Contract is Run without what only informs: speed, clock and settings.
func Contract(ctx context.Context, s backend.Store) (*Report, error) {
	return run(ctx, s, false)
}

func run(ctx context.Context, s backend.Store, all bool) (*Report, error) {
	id := make([]byte, 8)
	rand.Read(id) // never fails
	p := &probe{s: s, dir: "probe/" + hex.EncodeToString(id) + "/", r: &Report{Store: s.String()}}
	defer p.clean()
	if _, err := s.Put(ctx, p.key("first"), []byte("first"), backend.Cond{}); err != nil {
		return nil, err
	}
	for _, c := range []struct {
		name   string
		try    func(context.Context) error
		advice string
	}{
		{"read after write", p.readAfterWrite, adviceKeeps},
		{"overwrite", p.overwrite, adviceKeeps},
		{"put if absent", p.absent, adviceConditions},
		{"racing puts if absent", p.absentRace, adviceConditions},
		{"put if match", p.match, adviceConditions},
		{"racing puts if match", p.matchRace, adviceConditions},
		{"ranged reads", p.ranges, adviceReads},
		{"list after write, in order", p.list, adviceLists},
		{"delete", p.remove, adviceLists},
	} {
		p.add(c.name, c.try(ctx), c.advice)
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
	}
	if all {
		p.add("speed", p.speed(ctx), adviceReads)
		p.skew(ctx)
		p.inspect(ctx)
	}
	return p.r, ctx.Err()
}

// What a check that fails means, and what to do about it.
const (
	adviceKeeps = "it does not keep what it acknowledges, so it would lose data: use another store, or take away the cache in front of it"
	// The register's safety is that of conditional puts: see pool/root.
	adviceConditions = "two gateways could own the pool at once and destroy it: use a store, or a version of it, that keeps If-None-Match and If-Match on PUT, and take away any proxy that drops or answers them"
	adviceReads      = "data could not be read back: use another store, or take away the proxy in front of it"
	adviceLists      = "what is stored could not be told: use another store, or take away the cache in front of it"
)

func (p *probe) key(name string) string {
	k := p.dir + name
	p.keys = append(p.keys, k)
	return k
}

// clean removes what the probe wrote, also after ctx has ended.
func (p *probe) clean() {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	for _, k := range p.keys {
		_ = p.s.Delete(ctx, k) // what stays is small, and named for what it is
	}
}

func (p *probe) add(name string, err error, advice string) {
	c := Check{Name: name, Result: OK}
	if err != nil {
		c.Result, c.Text, c.Advice = Missing, err.Error(), advice
	}
	p.r.Checks = append(p.r.Checks, c)
}

func (p *probe) put(ctx context.Context, name, body string, c backend.Cond) (string, error) {
	return p.s.Put(ctx, p.key(name), []byte(body), c)
}

func (p *probe) expect(ctx context.Context, name, want string) error {
	got, _, err := p.s.Get(ctx, p.dir+name, 1<<20)
	if err == nil && string(got) != want {
		err = fmt.Errorf("%q was stored, %q is read", want, got)
	}
	return err
}

func (p *probe) readAfterWrite(ctx context.Context) error {
	for i := range 8 {
		name, body := fmt.Sprintf("raw-%d", i), strings.Repeat("x", i*100)
		_, err := p.s.Stat(ctx, p.dir+name) // some stores remember that there was nothing
		if !errors.Is(err, backend.ErrNotFound) {
			return fmt.Errorf("an object that does not exist: %w", orOK(err))
		}
		if _, err := p.put(ctx, name, body, backend.Cond{}); err != nil {
			return err
		}
		if err := p.expect(ctx, name, body); err != nil {
			return err
		}
	}
	return nil
}

// orOK gives a missing error words.
func orOK(err error) error {
	if err == nil {
		return errors.New("the store says yes")
	}
	return err
}

func (p *probe) overwrite(ctx context.Context) error {
	var last string
	for i := range 4 {
		etag, err := p.put(ctx, "over", fmt.Sprint(i), backend.Cond{})
		if err != nil {
			return err
		}
		if etag == "" || etag == last {
			return fmt.Errorf("etag %q after another object's %q", etag, last)
		}
		last = etag
		if err := p.expect(ctx, "over", fmt.Sprint(i)); err != nil {
			return err
		}
	}
	return nil
}

func (p *probe) absent(ctx context.Context) error {
	if _, err := p.put(ctx, "absent", "one", backend.Cond{Absent: true}); err != nil {
		return err
	}
	if _, err := p.put(ctx, "absent", "two", backend.Cond{Absent: true}); !errors.Is(err, backend.ErrPrecondition) {
		return fmt.Errorf("a second put under the same name is not refused: %w", orOK(err))
	}
	return p.expect(ctx, "absent", "one")
}

// race runs all at once and counts those that succeeded and those that were refused by the condition.
func race(n int, f func(i int) error) (won, refused int, err error) {
	errs := make([]error, n)
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() { errs[i] = f(i) })
	}
	wg.Wait()
	for _, e := range errs {
		switch {
		case e == nil:
			won++
		case errors.Is(e, backend.ErrPrecondition):
			refused++
		default:
			err = e
		}
	}
	return won, refused, err
}

func (p *probe) absentRace(ctx context.Context) error {
	for round := range 3 {
		name := fmt.Sprintf("absent-race-%d", round)
		k := p.key(name)
		won, _, err := race(racers, func(i int) error {
			_, err := p.s.Put(ctx, k, fmt.Appendf(nil, "%d", i), backend.Cond{Absent: true})
			return err
		})
		if won > 1 || won == 0 && err == nil {
			return fmt.Errorf("%d of %d racing puts succeeded", won, racers)
		}
		if won == 0 && backend.ClassOf(err) != backend.Transient && backend.ClassOf(err) != backend.Throttled {
			return err
		}
	}
	return nil
}

func (p *probe) match(ctx context.Context) error {
	old, err := p.put(ctx, "match", "one", backend.Cond{})
	if err != nil {
		return err
	}
	if _, err := p.put(ctx, "match", "two", backend.Cond{Match: old}); err != nil {
		return fmt.Errorf("a put that matches: %w", err)
	}
	if _, err := p.put(ctx, "match", "three", backend.Cond{Match: old}); !errors.Is(err, backend.ErrPrecondition) {
		return fmt.Errorf("a put that matches what was there before is not refused: %w", orOK(err))
	}
	if _, err := p.put(ctx, "match-none", "x", backend.Cond{Match: old}); !errors.Is(err, backend.ErrPrecondition) && !errors.Is(err, backend.ErrNotFound) {
		return fmt.Errorf("a put that matches nothing is not refused: %w", orOK(err))
	}
	return p.expect(ctx, "match", "two")
}

// matchRace counts by compare and set, all racers at once: no step may be lost.
func (p *probe) matchRace(ctx context.Context) error {
	const steps = 3
	k := p.key("match-race")
	if _, err := p.s.Put(ctx, k, []byte{0}, backend.Cond{}); err != nil {
		return err
	}
	done, _, err := race(racers, func(int) error {
		for n := 0; n < steps; {
			b, etag, err := p.s.Get(ctx, k, 1)
			if err != nil {
				return err
			}
			_, err = p.s.Put(ctx, k, []byte{b[0] + 1}, backend.Cond{Match: etag})
			switch {
			case err == nil:
				n++
			case !errors.Is(err, backend.ErrPrecondition):
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	b, _, err := p.s.Get(ctx, k, 1)
	if err == nil && int(b[0]) != done*steps {
		err = fmt.Errorf("%d racing changes left a count of %d", done*steps, b[0])
	}
	return err
}

func (p *probe) ranges(ctx context.Context) error {
	body := make([]byte, 300_000)
	rand.Read(body) // never fails
	k := p.key("ranges")
	if _, err := p.s.Put(ctx, k, body, backend.Cond{}); err != nil {
		return err
	}
	for _, x := range [][2]int{{0, 1}, {0, len(body)}, {4096, 65536}, {len(body) - 1, 1}, {12345, 54321}} {
		got := make([]byte, x[1])
		if err := p.s.ReadAt(ctx, k, got, int64(x[0])); err != nil {
			return err
		}
		if !bytes.Equal(got, body[x[0]:x[0]+x[1]]) {
			return fmt.Errorf("%d bytes from %d are not those stored", x[1], x[0])
		}
	}
	for _, off := range []int64{int64(len(body)) - 1, int64(len(body)), 1 << 30} {
		if err := p.s.ReadAt(ctx, k, make([]byte, 2), off); !errors.Is(err, backend.ErrShort) {
			return fmt.Errorf("a read beyond the end: %w", orOK(err))
		}
	}
	return nil
}

func (p *probe) list(ctx context.Context) error {
	var want []string
	for i := range 12 {
		name := fmt.Sprintf("list/%02d", i)
		if _, err := p.put(ctx, name, "x", backend.Cond{}); err != nil {
			return err
		}
		want = append(want, p.dir+name)
	}
	var got []string
	for after, more := "", true; more; {
		objs, m, err := p.s.List(ctx, p.dir+"list/", after, 5)
		if err != nil {
			return err
		}
		for _, o := range objs {
			got, after = append(got, o.Key), o.Key
		}
		more = m
	}
	if !slices.Equal(got, want) {
		return fmt.Errorf("%d objects were stored, the list has %d, or in another order", len(want), len(got))
	}
	return nil
}

func (p *probe) remove(ctx context.Context) error {
	if _, err := p.put(ctx, "delete", "x", backend.Cond{}); err != nil {
		return err
	}
	for range 2 { // the second finds nothing, and that is no error
		if err := p.s.Delete(ctx, p.dir+"delete"); err != nil {
			return err
		}
	}
	if _, err := p.s.Stat(ctx, p.dir+"delete"); !errors.Is(err, backend.ErrNotFound) {
		return fmt.Errorf("after a delete: %w", orOK(err))
	}
	return nil
}

// speed measures one request at a time, so that the figures are those of the store and the way to it.
func (p *probe) speed(ctx context.Context) error {
	small, big := make([]byte, 4096), make([]byte, speedLen)
	rand.Read(small) // never fails
	rand.Read(big)
	var puts, reads []float64
	ks, kb := p.key("speed"), p.key("speed-big")
	timed := func(f func() error) (float64, error) {
		start := time.Now()
		err := f()
		return time.Since(start).Seconds(), err
	}
	put := func(k string, b []byte) func() error {
		return func() error { _, err := p.s.Put(ctx, k, b, backend.Cond{}); return err }
	}
	read := func(k string, b []byte) func() error { return func() error { return p.s.ReadAt(ctx, k, b, 0) } }
	for range speedRun {
		t, err := timed(put(ks, small))
		u, rerr := timed(read(ks, small))
		if err = errors.Join(err, rerr); err != nil {
			return err
		}
		puts, reads = append(puts, t), append(reads, u)
	}
	t, err := timed(put(kb, big))
	u, rerr := timed(read(kb, big))
	if err = errors.Join(err, rerr); err != nil {
		return err
	}
	slices.Sort(puts)
	slices.Sort(reads)
	p.r.PutSeconds, p.r.ReadSeconds = puts[speedRun/2], reads[speedRun/2]
	p.r.PutPerSecond, p.r.ReadPerSecond = speedLen/t, speedLen/u
	return nil
}

// skew compares the store's clock with ours: signatures are dated.
func (p *probe) skew(ctx context.Context) {
	before := time.Now()
	_, err := p.put(ctx, "clock", "x", backend.Cond{})
	info, serr := p.s.Stat(ctx, p.dir+"clock")
	if err = errors.Join(err, serr); err != nil || info.Modified.IsZero() {
		return // some stores do not tell
	}
	c := Check{Name: "clock", Result: OK}
	if d := info.Modified.Sub(before); d > skewMax || d < -skewMax {
		c.Result, c.Text = Dangerous, fmt.Sprintf("the store's clock differs by %v from this host's; signed requests fail beyond some minutes", d.Round(time.Second))
	}
	p.r.Checks = append(p.r.Checks, c)
}

func (p *probe) inspect(ctx context.Context) {
	i, ok := p.s.(backend.Inspector)
	if !ok {
		return
	}
	found, err := i.Inspect(ctx)
	if err != nil {
		p.r.Checks = append(p.r.Checks, Check{Name: "settings", Result: Note, Text: "not to be seen: " + err.Error()})
		return
	}
	for _, f := range found {
		c := Check{Name: f.Name, Result: Note, Text: f.Text}
		if f.Dangerous {
			c.Result = Dangerous
		}
		p.r.Checks = append(p.r.Checks, c)
	}
}
