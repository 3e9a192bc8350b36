package fence

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"graindisk/block"
	"graindisk/frontend/nbd/nbdclient"
	"graindisk/test/harness"
)

// TestAStoppedOwnerAcknowledgesNothingMore stops a gateway under load for longer than the watch time, has a second one
// take the pool over, and lets the first go on.
func TestAStoppedOwnerAcknowledgesNothingMore(t *testing.T) {
	targets := directories(t)
	a, b := newHost(t, targets, dirtyAge), newHost(t, targets, time.Second)
	a.create()
	first := a.serve()
	model := a.newDisk(first)
	a.until("published", func(s status) bool { return s.Unpublished == 0 })
	published := a.status().Cut
	b.refused([]string{"--takeover"}, "held by", "epoch 1", "is alive", "beat", "gateway pool release main")
	load := startWriter(t, first)
	load.reach(t, 40)
	now := time.Now()
	a.until("told of what the load has written", func(s status) bool { return s.Owner.LastBeat.After(now) })
	first.Signal(syscall.SIGSTOP)
	begun := time.Now()
	b.refused(nil, "held by", "no sign of life", "as of cut", "gateway serve --takeover")
	second := b.serve("--takeover")
	if s := b.status(); s.Epoch != 2 || s.Cut < published {
		t.Fatalf("taken over as %+v, the first had published cut %d", s, published)
	}
	if took := time.Since(begun); took < 2*watch {
		t.Errorf("two watches took %v", took)
	}
	mustSay(t, second.Log(), "taken over from", "as of cut", "given_up", "not published, the oldest", "lists that in quarantine there")
	unchanged := published == b.status().Cut // no cut of the load came in between
	if !unchanged {
		t.Fatalf("the load was published: cut %d, then %d; this machine is too slow for %v", published, b.status().Cut, dirtyAge)
	}
	n, quiet := load.count()
	if quiet < time.Second {
		t.Fatalf("a stopped process acknowledged a write %v ago", quiet)
	}
	first.Signal(syscall.SIGCONT)
	if err := load.ended(); err == nil || errors.Is(err, errStill) {
		t.Fatalf("the load goes on: %v", err)
	}
	if now, _ := load.count(); now != n {
		t.Errorf("%d writes were acknowledged after the takeover", now-n)
	}
	owner := b.status().Owner
	s := a.until("fenced", func(s status) bool { return s.Fenced != nil })
	if l := s.Fenced.Lost; l.ByLog != owner.Log || l.ByEpoch != 2 || l.ByHost == "" || l.Epoch != 1 || l.ThroughCut != published || !l.Sure {
		t.Errorf("fenced by %+v, the owner is %+v", l, owner)
	}
	mustSay(t, first.Log(), "this process stood still", "fenced: another owner", owner.Log, "by_epoch=2", "disk vm: ")
	if r := harness.Run(t, "pool", "release", "main", "--config", a.config); r.Code != 11 || !strings.Contains(r.Stderr, "fenced by") || !strings.Contains(r.Stderr, "epoch 2") {
		t.Errorf("release of a fenced pool: exit %d, %s", r.Code, r.Stderr)
	}
	if c, err := nbdclient.Dial(t.Context(), first.URIs[0], nbdclient.Options{}); err == nil {
		c.Close()
		t.Error("a fenced gateway lets a client in")
	} else {
		mustSay(t, err.Error(), "another gateway owns the pool")
	}
	_, blocks := readLost(t, filepath.Join(a.tier, "main"))
	load.compare(t, blocks)
	holds(t, second, model)
	if code := harness.Run(t, "pool", "status", "--check", "--config", a.config).Code; code != 1 {
		t.Errorf("status --check of a fenced pool: exit %d", code)
	}

	// The fenced one comes back: not while the other lives, and then without what it lost, which is in quarantine.
	if code := first.Stop(); code != 11 {
		t.Errorf("a fenced gateway ended with %d", code)
	}
	a.refused([]string{"--takeover"}, a.tier, "unpublished bytes", "held by", "is alive")
	if code := second.Stop(); code != 0 {
		t.Fatalf("the second ended with %d", code)
	}
	a.refused(nil, a.tier, "unpublished bytes", "released", "--takeover")
	first = a.serve("--takeover")
	q := a.status().Quarantines
	if len(q) != 1 || q[0].Lost == nil || q[0].Lost.ThroughCut != published || q[0].Lost.Bytes != int64(len(blocks))*block.Size {
		t.Fatalf("quarantines %+v", q)
	}
	_, again := readLost(t, q[0].Dir)
	load.compare(t, again)
	text := harness.Must(t, harness.Binary(t), "inspect", "quarantine", q[0].Dir)
	mustSay(t, text, "pool main", "epoch 2", `"vm"`, "written    blocks 0 to")
	mustSay(t, harness.Must(t, harness.Binary(t), "pool", "status", "--config", a.config), "quarantine "+q[0].Dir)
	holds(t, first, model)
}

// TestATierFromAnOlderCopyIsRefused puts back a copy of the tier that was made before the pool was claimed again.
func TestATierFromAnOlderCopyIsRefused(t *testing.T) {
	h := newHost(t, directories(t), time.Second)
	h.create()
	g := h.serve()
	model := h.newDisk(g)
	h.until("published", func(s status) bool { return s.Unpublished == 0 })
	g.Kill()
	old := filepath.Join(h.dir, "old")
	harness.Must(t, "cp", "-a", h.tier, old)

	g = h.serve()
	c := dial(t, g)
	h.must(c.WriteAt(t.Context(), make([]byte, 1<<20), 1<<20, true))
	clear(model[1<<20 : 2<<20])
	h.until("published", func(s status) bool { return s.Unpublished == 0 && s.Epoch == 2 })
	g.Kill()
	newer := filepath.Join(h.dir, "newer")
	h.must(os.Rename(h.tier, newer))
	h.must(os.Rename(old, h.tier))
	for _, args := range [][]string{nil, {"--takeover"}} {
		h.refused(args, h.tier, "older copy of itself", "epoch 1", "is at 2", "move it away")
	}
	// What it says helps.
	h.must(os.RemoveAll(h.tier))
	g = h.serve("--takeover")
	holds(t, g, model)
	if code := g.Stop(); code != 0 {
		t.Errorf("ended with %d", code)
	}
}

// TestAReleasedPoolGoesElsewhere lets go of a pool under load, in a running gateway, and of one whose gateway was killed.
func TestAReleasedPoolGoesElsewhere(t *testing.T) {
	targets := directories(t)
	a, b := newHost(t, targets, time.Hour), newHost(t, targets, time.Hour)
	a.create()
	first := a.serve()
	model := a.newDisk(first)
	load := startWriter(t, first)
	load.reach(t, 50)
	out := harness.Must(t, harness.Binary(t), "pool", "release", "main", "--config", a.config)
	mustSay(t, out, "pool main: released at cut", "epoch 1")
	if err := load.ended(); err == nil || errors.Is(err, errStill) {
		t.Fatalf("the load goes on: %v", err)
	}
	after := func(code int, says string, args ...string) {
		t.Helper()
		if r := harness.Run(t, append(args, "--config", a.config)...); r.Code != code || !strings.Contains(r.Stdout+r.Stderr, says) {
			t.Errorf("%v after the release: exit %d, %s%s", args, r.Code, r.Stdout, r.Stderr)
		}
	}
	after(0, "was not served here; it is released at cut", "pool", "release", "main")
	after(0, "released at cut", "pool", "status", "main")
	after(1, "not served here: released", "pool", "status", "--check")
	after(10, "no such disk", "disk", "show", "vm")
	after(10, "serves no", "disk", "create", "new", "1MiB")
	after(10, "serves none", "pool", "scrub")

	second := b.serve() // while the first still runs
	after(0, "held by", "pool", "status")
	after(11, `"state": "held"`, "pool", "status", "--check", "--json")
	after(11, "held by", "pool", "release", "main")
	apply := func(w *writer) {
		w.mu.Lock()
		defer w.mu.Unlock()
		for lba := range w.acked {
			for i := range model[lba*block.Size:][:block.Size] {
				model[lba*block.Size:][i] = 0xee
			}
		}
		if len(w.asked) != len(w.acked) { // the last write may have been done and not answered
			t.Logf("%d writes asked, %d acknowledged", len(w.asked), len(w.acked))
		}
	}
	apply(load)
	holds(t, second, model)
	if code := first.Stop(); code != 0 {
		t.Errorf("a gateway without pools ended with %d", code)
	}

	load = startWriter(t, second)
	load.reach(t, 50)
	close(load.quit)
	<-load.done
	apply(load)
	second.Kill()
	a.refused(nil, "held by", "no sign of life")
	out = harness.Must(t, harness.Binary(t), "pool", "release", "main", "--config", b.config)
	mustSay(t, out, "pool main: released")
	first = a.serve()
	holds(t, first, model)
	if s := a.status(); len(s.Quarantines) != 1 || s.Quarantines[0].Lost != nil || s.Fenced != nil { // its log of before held nothing
		t.Errorf("status %+v", s)
	}
	if r := harness.Run(t, "pool", "release", "other", "--config", a.config); r.Code != 10 || !strings.Contains(r.Stderr, "pool other") {
		t.Errorf("release of a pool that is not there: exit %d, %s", r.Code, r.Stderr)
	}
	// The release of a pool by a host whose tier is not its owner's is refused.
	if r := harness.Run(t, "pool", "release", "main", "--config", b.config); r.Code != 11 {
		t.Errorf("release of another's pool: exit %d, %s", r.Code, r.Stderr)
	}
}
