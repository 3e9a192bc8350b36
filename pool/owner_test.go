package pool

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"graindisk/backend"
	"graindisk/backend/backendtest"
	"graindisk/block"
	"graindisk/pool/root"
	"graindisk/vdisk"
)

// Two hosts, "here" and "there", on the same three targets, with fake time.
const (
	testBeat  = 30 * time.Second
	testWatch = 75 * time.Second
)

// beating is the option of a rig with beats and watches.
func beating(o *Options) { o.Beat, o.Watch = testBeat, testWatch }

// there is another host on the targets of r; nothing is open on it.
func (r *rig) there(opt func(*Options)) *rig {
	o := &rig{t: r.t, stores: r.stores, memory: r.memory, opt: func(o *Options) {
		o.Host = "there"
		opt(o)
	}}
	o.newHost()
	r.t.Cleanup(func() {
		if o.pool != nil {
			o.abandon()
		}
	})
	return o
}

// inBubble runs a test in fake time; what it leaves open is closed within.
func inBubble(t *testing.T, f func(t *testing.T)) { synctest.Test(t, f) }

// beat is the newest beat at the targets.
func (r *rig) beat() (b *Beat) {
	r.t.Helper()
	for _, m := range r.memory {
		body, ok := m.Objects()[beatKey]
		if !ok {
			continue
		}
		n, err := DecodeBeat(body)
		if err != nil {
			r.t.Fatal(err)
		}
		if n.newer(b) {
			b = n
		}
	}
	return b
}

func owned(t *testing.T, err error) *OwnedError {
	t.Helper()
	o := new(OwnedError)
	if !errors.As(err, &o) || !errors.Is(err, root.ErrHeld) {
		t.Fatalf("not refused as held: %v", err)
	}
	return o
}

func mustSay(t *testing.T, text string, words ...string) {
	t.Helper()
	for _, w := range words {
		if !strings.Contains(text, w) {
			t.Errorf("%q does not say %q", text, w)
		}
	}
}

// TestBeatsOfAMonthCostLessThanHalfADollar lets an idle owner beat for a day and counts what the targets are asked; a month
// is 30 of these.
func TestBeatsOfAMonthCostLessThanHalfADollar(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		targets := countTargets([]Target{{Name: "a", Store: backendtest.NewMemory("a")}, {Name: "b", Store: backendtest.NewMemory("b")}})
		ctx, cancel := context.WithTimeout(t.Context(), 24*time.Hour)
		defer cancel()
		b := &beater{
			targets: targets, every: testBeat, signed: func() time.Time { return time.Time{} },
			compose: func(seq uint64) (*Beat, bool) { return &Beat{Pool: "p", Log: "l", Epoch: 1, Seq: seq}, true },
			rival:   func(*Beat) { t.Error("met itself") }, beaten: func(*Beat) {},
		}
		b.run(ctx, func(err error) { t.Error(err) })
		var sum Requests
		for _, t := range targets {
			sum = sum.plus(t.Store.(*countedStore).requests())
		}
		const put1000 = 0.005 // dollars, of S3 Standard
		if cost := 30 * float64(sum.Total()) * put1000 / 1000; cost >= 0.5 || sum.Beat != sum.Total() || b.seq < 2_870 {
			t.Errorf("%d beats asked %+v for $%.2f a month", b.seq, sum, cost)
		} else {
			t.Logf("COUNT %d requests a day: $%.2f a month", sum.Total(), cost)
		}
	})
}

// TestABeatNeverReplacesALaterOwners puts a beat of the next epoch, an old one and rubbish where an owner beats, and loses
// the reply to a put of its own.
func TestABeatNeverReplacesALaterOwners(t *testing.T) {
	memory := backendtest.NewMemory("m")
	store := backendtest.NewFaulty(memory, 1)
	var rival *Beat
	b := &beater{
		targets: []Target{{Name: "m", Store: store}}, every: time.Second,
		rival: func(r *Beat) { rival = r }, beaten: func(*Beat) {},
	}
	there := func(body []byte) {
		t.Helper()
		if _, err := store.Put(t.Context(), beatKey, body, backend.Cond{}); err != nil {
			t.Fatal(err)
		}
	}
	of := func(epoch uint64) []byte {
		body, err := (&Beat{Pool: "p", Log: "other", Host: "there", Epoch: epoch}).encode()
		if err != nil {
			t.Fatal(err)
		}
		return body
	}
	beat := func() error { return b.put(t.Context(), &Beat{Pool: "p", Log: "ours", Epoch: 5, Seq: b.seq + 1}) }
	for i, before := range []func(){
		func() {}, func() {}, func() { there(of(4)) }, func() { there([]byte("rubbish")) },
		func() { store.Inject("put", 1, backendtest.LostReply) }, func() {},
	} {
		before()
		if err := beat(); err != nil && i != 4 {
			t.Fatalf("beat %d: %v", i, err)
		}
		if n, err := DecodeBeat(memory.Objects()[beatKey]); err != nil || n.Log != "ours" || n.Seq != uint64(i+1) {
			t.Fatalf("beat %d: %+v, %v", i, n, err)
		}
	}
	there(of(6))
	for range 2 {
		if err := beat(); !errors.Is(err, errRival) || rival == nil || rival.Epoch != 6 {
			t.Errorf("%v, met %+v", err, rival)
		}
		if n, err := DecodeBeat(memory.Objects()[beatKey]); err != nil || n.Epoch != 6 {
			t.Errorf("it was replaced: %+v, %v", n, err)
		}
	}
}

// TestAnOwnerBeatsWhileItCommitsNothing looks at the beat of a pool in each state.
func TestAnOwnerBeatsWhileItCommitsNothing(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		r := newRig(t, beating)
		d := r.disk("d", testDisk)
		r.publish()
		time.Sleep(testBeat / 2)
		r.write(d, 0, make([]byte, 3*block.Size))
		time.Sleep(testBeat)
		b := r.beat()
		if b == nil || b.Host != "here" || b.Epoch != 1 || b.Cut != 1 || b.DirtyBytes != 3*block.Size || b.OldestAgeSeconds <= 0 || b.Log != r.pool.logID.String() || b.EverySeconds != 30 {
			t.Fatalf("beat %+v", b)
		}
		time.Sleep(testBeat + time.Second)
		if n := r.beat(); n.Seq != b.Seq+1 {
			t.Errorf("beat %d after %d", n.Seq, b.Seq)
		}
		r.write(d, 0, make([]byte, block.Size))
		r.publish()
		seq := r.beat().Seq
		for range 10 { // commits, never 30 s apart
			time.Sleep(testBeat - time.Second)
			r.write(d, 0, make([]byte, block.Size))
			r.publish()
		}
		if n := r.beat().Seq; n != seq {
			t.Errorf("beat %d after %d while commits showed that the owner lives", n, seq)
		}
		beats := r.requests().Beat
		for _, s := range r.stores[:2] {
			s.SetOffline(true)
		}
		time.Sleep(2 * testBeat)
		if n := r.beat(); n.Seq <= seq || r.requests().Beat < beats+4 {
			t.Errorf("beat %d after %d, with two of three targets away", n.Seq, seq)
		}
		for _, s := range r.stores[:2] {
			s.SetOffline(false)
		}
		if s := r.pool.Status(); s.Owner.Host != "here" || s.Owner.HeldSince == nil || s.Owner.LastBeat == nil || s.Owner.LastCommit == nil || s.Owner.Horizon == 0 {
			t.Errorf("status %+v", s.Owner)
		}
	})
}

// TestALivingOwnerIsNotTakenOverFrom has another host try, with and without --takeover, while the owner only beats,
// only commits, or can write to one target alone.
func TestALivingOwnerIsNotTakenOverFrom(t *testing.T) {
	for _, c := range []struct {
		name string
		opt  func(*Options)
		do   func(r *rig) // once a second
		sign string
	}{
		{"it beats", beating, func(*rig) {}, "beat"},
		{"it commits", func(o *Options) { o.Watch = testWatch }, func(r *rig) { r.write(r.disk("d", testDisk), 0, make([]byte, 8)); r.publish() }, "committed"},
		{"it beats at the last target", beating, func(r *rig) { r.stores[0].SetOffline(true) }, "beat"},
	} {
		t.Run(c.name, func(t *testing.T) {
			inBubble(t, func(t *testing.T) {
				r := newRig(t, c.opt)
				r.publish()
				stop := make(chan struct{})
				var doing sync.WaitGroup
				defer doing.Wait()
				defer close(stop)
				doing.Go(func() {
					for {
						select {
						case <-stop:
							return
						case <-time.After(time.Second):
							c.do(r)
						}
					}
				})
				other := r.there(c.opt)
				for _, takeover := range []bool{false, true} {
					begun := time.Now()
					err := other.tryOpen(takeover)
					mustSay(t, owned(t, err).Error(), "held by here", "epoch 1", "alive", c.sign, "gateway pool release p")
					if took := time.Since(begun); took > testWatch {
						t.Errorf("it took %v to see that", took)
					}
				}
				if e := r.pool.epoch.Load(); e != 1 {
					t.Errorf("the owner is in epoch %d", e)
				}
				r.write(r.disk("d", testDisk), 0, make([]byte, 8))
				r.publish()
			})
		})
	}
}

// TestADeadOwnerIsTakenOverFromWithConsent kills the owner with unpublished writes.
func TestADeadOwnerIsTakenOverFromWithConsent(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		r := newRig(t, beating)
		d := r.disk("d", testDisk)
		model := make([]byte, testDisk)
		r.scribble(d, model, 20)
		r.publish()
		r.write(d, 0, bytes.Repeat([]byte{9}, 5*block.Size))
		time.Sleep(2*testBeat + time.Second)
		r.abandon()

		other := r.there(beating)
		begun := time.Now()
		err := other.tryOpen(false)
		mustSay(t, owned(t, err).Error(), "held by here", "epoch 1", "no sign of life for 1m15s", "as of cut 1", fmt.Sprint(5*block.Size, " bytes"), "oldest 60 s old", "gateway serve --takeover")
		if took := time.Since(begun); took < testWatch || took > testWatch+10*time.Second {
			t.Errorf("watched for %v", took)
		}
		begun = time.Now()
		other.open(true)
		if took := time.Since(begun); took < testWatch {
			t.Errorf("taken over after %v", took)
		}
		other.expect(other.disk("d", testDisk), model)
		synctest.Wait()
		if b := other.beat(); b.Host != "there" || b.Epoch != 2 {
			t.Errorf("beat %+v", b)
		}
	})
}

// TestAWatchEndsWithTheTenure releases the pool, or has a third host claim it, while it is being watched; and lets it
// be known that the owner is gone.
func TestAWatchEndsWithTheTenure(t *testing.T) {
	silent := func(o *Options) { o.Watch = testWatch }
	t.Run("released", func(t *testing.T) {
		inBubble(t, func(t *testing.T) {
			r := newRig(t, silent)
			other := r.there(silent)
			begun := time.Now()
			closed := make(chan struct{})
			go func() {
				defer close(closed)
				time.Sleep(10 * time.Second)
				if err := r.pool.Close(context.Background()); err != nil {
					t.Error(err)
				}
				r.pool = nil
			}()
			err := other.tryOpen(false)
			// The cut and the release are signs of life too: seen before, they refuse.
			<-closed
			if err != nil {
				owned(t, err)
				err = other.tryOpen(false)
			}
			if err != nil || time.Since(begun) > testWatch {
				t.Fatalf("after %v: %v", time.Since(begun), err)
			}
		})
	})
	t.Run("claimed by a third", func(t *testing.T) {
		inBubble(t, func(t *testing.T) {
			r := newRig(t, silent)
			r.abandon()
			third := r.there(func(*Options) {}) // does not watch
			other := r.there(silent)
			opened := make(chan struct{})
			go func() {
				defer close(opened)
				time.Sleep(10 * time.Second)
				third.open(true)
			}()
			mustSay(t, owned(t, other.tryOpen(true)).Error(), "claimed in epoch 2")
			<-opened
		})
	})
	t.Run("known to be gone", func(t *testing.T) {
		inBubble(t, func(t *testing.T) {
			r := newRig(t, beating)
			log := r.pool.logID.String()
			r.abandon()
			other := r.there(func(o *Options) {
				beating(o)
				o.Gone = func(epoch uint64, l string) bool { return epoch == 1 && l == log }
			})
			begun := time.Now()
			mustSay(t, owned(t, other.tryOpen(false)).Error(), "process", "has ended", "--takeover")
			other.open(true)
			if took := time.Since(begun); took > time.Second {
				t.Errorf("watched for %v", took)
			}
		})
	})
}

// TestATakeoverOfAReleasedPoolIsAnOpen gives consent where none is needed.
func TestATakeoverOfAReleasedPoolIsAnOpen(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		r := newRig(t, beating)
		d := r.disk("d", testDisk)
		model := make([]byte, testDisk)
		r.scribble(d, model, 10)
		if err := r.pool.Close(context.Background()); err != nil {
			t.Fatal(err)
		}
		r.pool = nil
		other := r.there(beating)
		begun := time.Now()
		other.open(true)
		if took := time.Since(begun); took > time.Second {
			t.Errorf("took %v", took)
		}
		other.expect(other.disk("d", testDisk), model)
	})
}

// reply is what a client is told: the error of the request, or else that of Hold.
func reply(d *vdisk.Disk, do func() error) error {
	if err := do(); err != nil {
		return err
	}
	return d.Hold(context.Background())
}

func writeOf(d *vdisk.Disk, lba block.LBA, blocks int) func() error {
	return func() error {
		p := bytes.Repeat([]byte{0x5a}, blocks*block.Size)
		return d.Write(context.Background(), []vdisk.Op{{Kind: vdisk.OpWrite, Off: int64(lba) * block.Size, Len: int64(len(p)), Data: p}}, false)
	}
}

// TestAFencedOwnerListsWhatIsLost cuts an owner off from its targets, has it go on acknowledging, and has another take
// over. The owner's list must be exactly what it acknowledged after the last cut; and so must be the one in quarantine.
func TestAFencedOwnerListsWhatIsLost(t *testing.T) {
	for _, byBeat := range []bool{false, true} {
		t.Run(fmt.Sprintf("found by its beat %v", byBeat), func(t *testing.T) {
			inBubble(t, func(t *testing.T) { testFenced(t, byBeat) })
		})
	}
}

func testFenced(t *testing.T, byBeat bool) {
	var off atomic.Bool
	r := newRig(t, func(o *Options) {
		beating(o)
		if !byBeat {
			o.Beat = 0
		}
		for i := range o.Targets {
			o.Targets[i].Store = cutOff{o.Targets[i].Store, &off}
		}
	})
	d := r.disk("d", testDisk)
	model := make([]byte, testDisk)
	r.scribble(d, model, 20)
	r.publish()
	off.Store(true)
	for _, w := range []struct {
		lba    block.LBA
		blocks int
	}{{10, 2}, {12, 3}, {100, 1}, {11, 1}, {200, 4}} {
		if err := reply(d, writeOf(d, w.lba, w.blocks)); err != nil {
			t.Fatal(err)
		}
	}
	if err := d.Write(t.Context(), []vdisk.Op{{Kind: vdisk.OpTrim, Off: 300 * block.Size, Len: 8 * block.Size}}, true); err != nil {
		t.Fatal(err)
	}
	if _, err := r.pool.CreateDisk(t.Context(), "new", testDisk); err != nil {
		t.Fatal(err)
	}
	other := r.there(beating)
	other.open(true)
	other.expect(other.disk("d", testDisk), model)
	other.write(other.disk("d", testDisk), 0, make([]byte, 64))
	other.publish()
	if err := reply(d, writeOf(d, 204, 1)); err != nil { // still cut off: it goes on
		t.Fatal(err)
	}
	late := func() error { return d.Hold(context.Background()) } // of what was done and is not answered yet
	off.Store(false)
	if byBeat {
		time.Sleep(2 * testBeat)
	} else if err := r.pool.Publish(t.Context()); !errors.Is(err, root.ErrFenced) {
		t.Fatalf("published after the takeover: %v", err)
	}
	synctest.Wait()
	if err := late(); !errors.Is(err, vdisk.ErrFenced) {
		t.Errorf("a reply left after the fence: %v", err)
	}
	if err := reply(d, writeOf(d, 400, 1)); !errors.Is(err, vdisk.ErrFenced) {
		t.Errorf("a write was acknowledged after the fence: %v", err)
	}
	<-r.pool.pub.done
	st := r.pool.Status()
	if st.Fenced == nil || st.Fenced.Lost.ByHost != "there" || st.Fenced.Lost.ByEpoch != 2 || !st.Fenced.Lost.Sure || st.Fenced.Lost.ThroughCut != 1 || st.Owner.Host != "there" {
		t.Fatalf("status: %+v, owner %+v", st.Fenced, st.Owner)
	}
	want := []LostDisk{
		{Disk: 1, Name: "d", Bytes: 11 * block.Size, Written: []LostRange{{10, 5}, {100, 1}, {200, 5}}, Unmapped: []LostRange{{300, 8}}},
		{Disk: 2, Name: "new", Operations: 1, Written: []LostRange{}, Unmapped: []LostRange{}},
	}
	check := func(l *Lost, err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		if fmt.Sprint(l.Disks) != fmt.Sprint(want) || l.Bytes != 11*block.Size || l.Host != "here" || l.ByHost != "there" || l.Epoch != 1 || !l.Sure {
			t.Errorf("list %+v\nwant %+v", l, want)
		}
	}
	check(ReadLost(r.fs, "/host/tier"))
	r.pool.Close(t.Context())
	r.pool = nil

	// The next start: refused while the other holds the pool; then the log goes to quarantine.
	err := r.tryOpen(false)
	if !errors.Is(err, ErrForeignTier) || !errors.Is(err, root.ErrHeld) {
		t.Fatalf("opened: %v", err)
	}
	mustSay(t, err.Error(), "/host/tier", "unpublished bytes", "held by there")
	if err := r.tryOpen(true); !errors.Is(err, root.ErrHeld) {
		t.Fatalf("taken back from a living owner: %v", err)
	}
	if err := other.pool.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	other.pool = nil
	if err := r.tryOpen(false); !errors.Is(err, ErrForeignTier) {
		t.Fatalf("opened, though its log holds what is nowhere else: %v", err)
	}
	r.open(true)
	qs := r.pool.Status().Quarantines
	if len(qs) != 1 || qs[0].Lost == nil || qs[0].Lost.Bytes != 11*block.Size {
		t.Fatalf("quarantines %+v", qs)
	}
	check(ReadLost(r.fs, qs[0].Dir))
	if _, err := ReadLost(r.fs, "/host/tier"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a list is left: %v", err)
	}
	copy(model, make([]byte, 64))
	r.expect(r.disk("d", testDisk), model)
}
