package root

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"graindisk/backend"
	"graindisk/backend/backendtest"
	"graindisk/block"
)

// bench is a created pool on n stores in memory.
type bench struct {
	t       *testing.T
	mem     []*backendtest.Memory
	stores  []*backendtest.Faulty
	targets []Target
}

func firstValue(n int) Value {
	v := Value{Format: ValueFormat, State: Released, Stripe: Stripe{Data: 2, Parity: 1}, GrainBytes: 65536, SegmentBytes: 32 << 20}
	for i := range n {
		v.Cfg.Members = append(v.Cfg.Members, Member{ID: block.TargetID(i + 1), UUID: fmt.Sprintf("m%d", i), Name: fmt.Sprintf("t%d", i)})
	}
	return v
}

func emptyBench(t *testing.T, n int) *bench {
	b := &bench{t: t}
	for i := range n {
		m := backendtest.NewMemory(fmt.Sprintf("t%d", i))
		f := backendtest.NewFaulty(m, 1)
		b.mem, b.stores = append(b.mem, m), append(b.stores, f)
		b.targets = append(b.targets, Target{Name: m.String(), Store: f})
	}
	return b
}

func newBench(t *testing.T, n int) *bench {
	b := emptyBench(t, n)
	if err := Create(t.Context(), b.targets, "pool", firstValue(n)); err != nil {
		t.Fatal(err)
	}
	return b
}

func (b *bench) open() *Register {
	r, err := Open(Options{Pool: "pool", Targets: b.targets})
	if err != nil {
		b.t.Fatal(err)
	}
	return r
}

func (b *bench) claim(r *Register, owner string, c *Consent) Value {
	b.t.Helper()
	v, err := r.Claim(b.t.Context(), ClaimOptions{Owner: owner, OwnerName: "host-" + owner, Consent: c})
	if err != nil {
		b.t.Fatalf("claim by %s: %v", owner, err)
	}
	return v
}

func (b *bench) commit(r *Register, v Value) {
	b.t.Helper()
	if err := r.Commit(b.t.Context(), v); err != nil {
		b.t.Fatalf("commit of cut %d: %v", v.Cut, err)
	}
}

func (b *bench) count(op string) int {
	n := 0
	for _, s := range b.stores {
		n += s.Counts()[op]
	}
	return n
}

// TestTenures walks one pool of 1 to 5 targets through claim, commit, refusal, takeover, fencing,
// release and the claim after it.
func TestTenures(t *testing.T) {
	for n := 1; n <= 5; n++ {
		t.Run(fmt.Sprintf("targets=%d", n), func(t *testing.T) {
			b := newBench(t, n)
			a, c := b.open(), b.open()
			v := b.claim(a, "A", nil)
			v.Cut, v.Horizon, v.SegLimit = 1, 100, 64
			b.commit(a, v)

			puts := b.count("put")
			_, err := c.Claim(t.Context(), ClaimOptions{Owner: "C"})
			var held *HeldError
			if !errors.Is(err, ErrHeld) || !errors.As(err, &held) || *held != (HeldError{1, "A", "host-A", 1, 100}) {
				t.Fatalf("claim of a held pool: %v", err)
			}
			if _, err = c.Claim(t.Context(), ClaimOptions{Owner: "C", Consent: &Consent{7, "A"}}); !errors.Is(err, ErrHeld) {
				t.Fatalf("claim with consent to end another epoch: %v", err)
			}
			if got := b.count("put"); got != puts {
				t.Errorf("refused claims made %d puts", got-puts)
			}

			w := b.claim(c, "C", &Consent{1, "A"})
			if w.Cut != 1 || w.Owner != "C" || w.OwnerName != "host-C" || w.State != Held || w.SegLimit != 64 {
				t.Fatalf("taken over: %+v", w)
			}
			v.Cut = 2
			if err := a.Commit(t.Context(), v); !errors.Is(err, ErrFenced) {
				t.Fatalf("commit by the old owner: %v", err)
			}
			if err := a.Commit(t.Context(), v); !errors.Is(err, ErrFenced) {
				t.Fatalf("second commit by the old owner: %v", err)
			}
			if b := a.Ballot(); b != (Ballot{}) {
				t.Errorf("the fenced owner still has ballot %v", b)
			}

			w.Cut, w.State = 2, Released
			b.commit(c, w)
			if err := c.Commit(t.Context(), w); !errors.Is(err, ErrNotClaimed) {
				t.Fatalf("commit after the release: %v", err)
			}
			if got := b.claim(a, "A", &Consent{1, "A"}); got.Cut != 2 { // consent is of no use, and does no harm
				t.Fatalf("claimed after release at cut %d", got.Cut)
			}
			view, err := a.Read(t.Context())
			if err != nil || !view.Quorum || !view.Committed || view.Pool != "pool" || view.Best.Val.Owner != "A" {
				t.Fatalf("read: %+v, %v", view, err)
			}
		})
	}
}

// TestSameOwnerClaimsAgain restarts a host on its log; the process before it is fenced, log or not.
func TestSameOwnerClaimsAgain(t *testing.T) {
	b := newBench(t, 3)
	before := b.open()
	v := b.claim(before, "A", nil)
	after := b.open()
	b.claim(after, "A", nil)
	if after.Ballot().Epoch != 2 {
		t.Errorf("epoch %d, want 2", after.Ballot().Epoch)
	}
	if err := before.Commit(t.Context(), v); !errors.Is(err, ErrFenced) {
		t.Fatalf("commit of the process before: %v", err)
	}
}

// TestEpochIsRecordedFirst expects the ballot to be told before a byte changes, and above what it was told.
func TestEpochIsRecordedFirst(t *testing.T) {
	b := newBench(t, 3)
	r, puts := b.open(), b.count("put")
	broken := errors.New("disk is full")
	_, err := r.Claim(t.Context(), ClaimOptions{Owner: "A", Above: 41, Epoch: func(bt Ballot) error {
		if bt.Epoch != 42 {
			t.Errorf("epoch %d, want 42", bt.Epoch)
		}
		return broken
	}})
	if !errors.Is(err, broken) || b.count("put") != puts {
		t.Fatalf("claim: %v, after %d puts", err, b.count("put")-puts)
	}
}

// TestCommitCostsOnePutPerTarget counts requests of a quiet tenure.
func TestCommitCostsOnePutPerTarget(t *testing.T) {
	b := newBench(t, 3)
	r := b.open()
	v := b.claim(r, "A", nil)
	gets, puts := b.count("get"), b.count("put")
	for range 10 {
		v.Cut++
		b.commit(r, v)
	}
	if g, p := b.count("get")-gets, b.count("put")-puts; g != 0 || p != 30 {
		t.Errorf("10 commits took %d gets and %d puts, want 0 and 30", g, p)
	}
	b.commit(r, v) // the same value again is a new version: proof that the tenure still stands
	if p := b.count("put") - puts; p != 33 {
		t.Errorf("the repeated value took %d puts, want 3", p-30)
	}
}

// TestLostRepliesAreSettledByReading loses the replies of a commit's puts.
func TestLostRepliesAreSettledByReading(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, 3)
		r := b.open()
		v := b.claim(r, "A", nil)
		for _, s := range b.stores {
			s.Inject("put", 1, backendtest.LostReply)
		}
		puts := b.count("put")
		v.Cut = 1
		b.commit(r, v)
		if p := b.count("put") - puts; p != 3 {
			t.Errorf("%d puts, want 3", p)
		}
		for i, s := range b.stores {
			if s.Injected()[backendtest.LostReply] != 1 {
				t.Errorf("target %d lost no reply", i)
			}
		}
	})
}

// TestUnknownIsRepeated takes all targets but one away in a commit and gives them back.
func TestUnknownIsRepeated(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, 3)
		r := b.open()
		v := b.claim(r, "A", nil)
		b.stores[0].SetOffline(true)
		b.stores[2].SetOffline(true)
		v.Cut = 1
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if err := r.Commit(ctx, v); !errors.Is(err, ErrUnknown) || !errors.Is(err, ErrNoQuorum) {
			t.Fatalf("commit without a quorum: %v", err)
		}
		view, err := r.Read(t.Context())
		if err != nil || view.Quorum || view.Committed {
			t.Fatalf("read without a quorum: %+v, %v", view, err)
		}
		ver := view.Best.Ver
		b.stores[0].SetOffline(false)
		b.commit(r, v)
		if view, err = r.Read(t.Context()); err != nil || !view.Committed || view.Best.Ver != ver || view.Best.Val.Cut != 1 {
			t.Fatalf("read after the repetition: %+v, %v", view, err)
		}
	})
}

// TestRivalsAttemptIsOutbid lets a rival promise and go: the owner carries on in a new epoch.
func TestRivalsAttemptIsOutbid(t *testing.T) {
	b := newBench(t, 3)
	var epochs []uint64
	a := b.open()
	v, err := a.Claim(t.Context(), ClaimOptions{Owner: "A", Epoch: func(b Ballot) error {
		epochs = append(epochs, b.Epoch)
		return nil
	}})
	if err != nil {
		t.Fatal(err)
	}
	rival := b.open()
	rival.rules.recheck = func(func(Copy) error, Copy) error { return errors.New("rival dies here") }
	if _, err := rival.Claim(t.Context(), ClaimOptions{Owner: "R", Consent: &Consent{1, "A"}}); err == nil {
		t.Fatal("the rival got through")
	}
	v.Cut = 1
	b.commit(a, v)
	if !slices.Equal(epochs, []uint64{1, 3}) || a.Ballot().Epoch != 3 {
		t.Errorf("epochs %v, ballot %v", epochs, a.Ballot())
	}
}

// hung is a store that never answers.
type hung struct{}

func (hung) Get(ctx context.Context, _ string, _ int64) ([]byte, string, error) {
	<-ctx.Done()
	return nil, "", ctx.Err()
}

func (hung) Put(ctx context.Context, _ string, _ []byte, _ backend.Cond) (string, error) {
	<-ctx.Done()
	return "", ctx.Err()
}

// TestHungTargetCostsItsLinger claims and commits with one of three targets hanging.
func TestHungTargetCostsItsLinger(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, 3)
		b.targets[1].Store = hung{}
		r := b.open()
		start := time.Now() // the bubble's clock
		v := b.claim(r, "A", nil)
		v.Cut = 1
		b.commit(r, v)
		if took := time.Since(start); took != 4*250*time.Millisecond { // survey, promise, accept, accept
			t.Errorf("took %v", took)
		}
		view, err := r.Read(t.Context())
		if err != nil || !view.Committed || view.Targets[1].State != Unreachable {
			t.Errorf("read: %+v, %v", view, err)
		}
	})
}

// TestDownCopies damages one or two of three copies in every way: one does not matter, two forbid.
func TestDownCopies(t *testing.T) {
	other := emptyBench(t, 3)
	if err := Create(t.Context(), other.targets, "other pool", firstValue(3)); err != nil {
		t.Fatal(err)
	}
	foreign := other.mem[0].Objects()[Key]
	for _, c := range []struct {
		name    string
		do      func(b *bench, i int)
		state   State
		want    error
		refuses bool // even one is too many
	}{
		{"missing", func(b *bench, i int) { b.mem[i].Wipe() }, Missing, ErrMissing, false},
		{"of another pool", func(b *bench, i int) {
			b.mem[i].Damage(Key, func([]byte) []byte { return foreign })
		}, Foreign, ErrForeign, false},
		{"damaged", func(b *bench, i int) {
			b.mem[i].Damage(Key, func(p []byte) []byte { p[len(p)/2] ^= 1; return p })
		}, Damaged, ErrDamaged, false},
		{"of a newer format", func(b *bench, i int) { b.mem[i].Damage(Key, newer) }, Newer, ErrNewer, true},
		{"another member's", func(b *bench, i int) {
			b.mem[i].Damage(Key, func([]byte) []byte { return b.mem[0].Objects()[Key] })
		}, Foreign, ErrForeign, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := newBench(t, 3)
			c.do(b, 2)
			r := b.open()
			view, err := r.Read(t.Context())
			if err != nil || !view.Quorum || !view.Committed {
				t.Fatalf("read with one copy down: %+v, %v", view, err)
			}
			down := slices.IndexFunc(view.Targets, func(tv TargetView) bool { return tv.State == c.state && errors.Is(tv.Err, c.want) })
			if down < 0 {
				t.Errorf("states: %+v", view.Targets)
			}
			_, err = r.Claim(t.Context(), ClaimOptions{Owner: "A"})
			if c.refuses != errors.Is(err, c.want) || c.refuses != (err != nil) {
				t.Errorf("claim with one copy down: %v", err)
			}
			c.do(b, 1)
			puts := b.count("put")
			if _, err := b.open().Claim(t.Context(), ClaimOptions{Owner: "A"}); !errors.Is(err, c.want) {
				t.Errorf("claim with two copies down: %v", err)
			}
			if n := b.count("put") - puts; n != 0 {
				t.Errorf("it made %d puts", n)
			}
		})
	}
}

// newer makes of a copy one of the next format, with a field this release does not know.
func newer(p []byte) []byte {
	p = bytes.Replace(p, []byte(`"format":1,`), []byte(`"format":2,"novel":{},`), 1)
	return seal(p[:len(p)-tailBytes])
}

// seal ends a body with its checksum.
func seal(front []byte) []byte {
	return fmt.Appendf(slices.Clone(front), "%s%08x%s", crcHead, block.CRC(front), crcTail)
}

// TestPoolIsFoundByMajority opens without saying which pool.
func TestPoolIsFoundByMajority(t *testing.T) {
	b := newBench(t, 3)
	single := emptyBench(t, 1)
	if err := Create(t.Context(), single.targets, "single", firstValue(1)); err != nil {
		t.Fatal(err)
	}
	b.targets[0] = single.targets[0]
	r, err := Open(Options{Targets: b.targets})
	if err != nil {
		t.Fatal(err)
	}
	b.claim(r, "A", nil)
	view, err := r.Read(t.Context())
	if err != nil || view.Pool != "pool" || view.Targets[0].State != Foreign {
		t.Fatalf("read: %+v, %v", view, err)
	}
	r, err = Open(Options{Targets: []Target{b.targets[0], b.targets[1]}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.Claim(t.Context(), ClaimOptions{Owner: "A"}); !errors.Is(err, ErrForeign) || !errors.Is(err, ErrNoQuorum) {
		t.Fatalf("claim of one copy each of two pools: %v", err)
	}
}

// TestNotCreated claims where nothing is.
func TestNotCreated(t *testing.T) {
	r := emptyBench(t, 3).open()
	if _, err := r.Claim(t.Context(), ClaimOptions{Owner: "A"}); !errors.Is(err, ErrNotCreated) {
		t.Errorf("claim: %v", err)
	}
	if _, err := r.Read(t.Context()); !errors.Is(err, ErrNotCreated) || !strings.Contains(err.Error(), "never created") {
		t.Errorf("read: %v", err)
	}
}

// TestCreate refuses where a root is, resumes what it left half done, and leaves no copy elsewhere.
func TestCreate(t *testing.T) {
	b := emptyBench(t, 3)
	v := firstValue(3)
	b.stores[1].Inject("put", 1, backendtest.LostReply) // its own success must not look like a rival's
	b.stores[2].SetOffline(true)
	if err := Create(t.Context(), b.targets, "pool", v); err == nil || b.count("put") != 0 {
		t.Fatalf("create with a target away: %v, %d puts", err, b.count("put"))
	}
	b.stores[2].SetOffline(false)
	for i := range createTries {
		b.stores[2].Inject("put", i+1, backendtest.Refused)
	}
	if err := Create(t.Context(), b.targets, "pool", v); err == nil {
		t.Fatal("create with a target that takes no put went through")
	}
	if err := Create(t.Context(), b.targets, "pool", v); err != nil {
		t.Fatalf("resumed create: %v", err)
	}
	err := Create(t.Context(), b.targets, "pool 2", v)
	if !errors.Is(err, ErrExists) || !strings.Contains(err.Error(), "target t0") {
		t.Fatalf("create over a pool: %v", err)
	}
	b.claim(b.open(), "A", nil)
	if err := Create(t.Context(), b.targets, "pool", v); !errors.Is(err, ErrExists) {
		t.Fatalf("create over the same, claimed pool: %v", err)
	}
}

// TestUnacceptableValues commits what may not follow; nothing is written.
func TestUnacceptableValues(t *testing.T) {
	b := newBench(t, 3)
	r := b.open()
	v := b.claim(r, "A", nil)
	v.SegLimit, v.Cut, v.Horizon = 10, 10, 10
	b.commit(r, v)
	puts := b.count("put")
	for name, change := range map[string]func(*Value){
		"lower segment limit": func(v *Value) { v.SegLimit = 9 },
		"lower cut":           func(v *Value) { v.Cut = 9 },
		"lower horizon":       func(v *Value) { v.Horizon = 9 },
		"other owner":         func(v *Value) { v.Owner = "B" },
		"other grain":         func(v *Value) { v.GrainBytes = 4096 },
		"no state":            func(v *Value) { v.State = "" },
		"newer format":        func(v *Value) { v.Format = 2 },
		"too many cuts":       func(v *Value) { v.Cuts = make([]CutRef, CutsMax+1) },
		"members in one step": func(v *Value) { v.Cfg = Config{No: 1, Members: v.Cfg.Members[:2]} },
		"members in no step":  func(v *Value) { v.Cfg.Members = v.Cfg.Members[:2] },
		"two configs in one":  func(v *Value) { v.Cfg = Config{No: 2, Members: v.Cfg.Members, Next: v.Cfg.Members[:1]} },
		"two members the same": func(v *Value) {
			v.Cfg = Config{No: 1, Members: v.Cfg.Members, Next: slices.Repeat(v.Cfg.Members[:1], 2)}
		},
		"broken params": func(v *Value) { v.Params = []byte("{") },
	} {
		w := v
		change(&w)
		if err := r.Commit(t.Context(), w); err == nil || errors.Is(err, ErrUnknown) || errors.Is(err, ErrFenced) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if n := b.count("put") - puts; n != 0 {
		t.Errorf("%d puts", n)
	}
	b.commit(r, v)
}

// TestJointConfigNeedsBothMajorities shrinks 3 members to 1 and checks who decides on the way.
func TestJointConfigNeedsBothMajorities(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, 3)
		r := b.open()
		v := b.claim(r, "A", nil)
		b.stores[2].SetOffline(true) // the only member of the next config
		v.Cfg = Config{No: 1, Members: v.Cfg.Members, Next: v.Cfg.Members[2:]}
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if err := r.Commit(ctx, v); !errors.Is(err, ErrUnknown) {
			t.Fatalf("joint commit without the next member: %v", err)
		}
		back := v
		back.Cfg = firstValue(3).Cfg
		if err := r.Commit(t.Context(), back); err == nil {
			t.Fatal("another config followed one whose outcome is unknown")
		}
		ahead := v
		ahead.Cfg = v.Cfg.Finish()
		if err := r.Commit(b.brief(), ahead); err == nil || errors.Is(err, ErrUnknown) {
			t.Fatalf("the end of a change whose begin is unknown: %v", err)
		}
		b.stores[2].SetOffline(false)
		b.commit(r, v)
		v.Cfg = Config{No: 2, Members: v.Cfg.Next}
		b.commit(r, v)
		b.stores[0].SetOffline(true)
		b.stores[1].SetOffline(true)
		v.Cut = 1
		b.commit(r, v)
		if got := b.claim(b.open(), "A", nil); got.Cut != 1 {
			t.Errorf("cut %d", got.Cut)
		}
	})
}

// TestCallersKeepTheirSlices changes a value after it was committed.
func TestCallersKeepTheirSlices(t *testing.T) {
	b := newBench(t, 1)
	r := b.open()
	v := b.claim(r, "A", nil)
	v.Cuts, v.Params = []CutRef{{Cut: 1}}, []byte(`{"a":1}`)
	b.commit(r, v)
	v.Cuts[0].Cut, v.Params[5] = 99, '9'
	again := b.claim(r, "A", nil)
	if again.Cuts[0].Cut != 1 || string(again.Params) != `{"a":1}` {
		t.Errorf("adopted %+v", again)
	}
}
