package pool

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"graindisk/vdisk"
)

// standstill lets a test stop the tick of a pool as if the process were stopped: it stops once it has read the clocks, the
// worst place.
type standstill struct {
	stopped atomic.Pointer[chan struct{}]
	asleep  atomic.Int64 // ns that CLOCK_BOOTTIME is ahead
}

func (s *standstill) boot() time.Duration {
	now := time.Since(time.Unix(0, 0)) + time.Duration(s.asleep.Load())
	if c := s.stopped.Load(); c != nil {
		<-*c
	}
	return now
}

func (s *standstill) stop() (goOn func()) {
	c := make(chan struct{})
	s.stopped.Store(&c)
	return func() {
		s.stopped.Store(nil)
		close(c)
	}
}

// pausing is a rig whose pool can be paused. Its watch time is 40 s: half of it is 20, and a tick comes each 5.
func pausing(t *testing.T, opt func(*Options)) (*rig, *standstill) {
	s := new(standstill)
	bootClockHook = s.boot
	t.Cleanup(func() { bootClockHook = nil })
	r := newRig(t, func(o *Options) {
		o.Watch = 40 * time.Second
		if opt != nil {
			opt(o)
		}
	})
	return r, s
}

// hold tells when a reply may leave.
func hold(d *vdisk.Disk) <-chan error {
	c := make(chan error, 1)
	go func() { c <- d.Hold(context.Background()) }()
	synctest.Wait()
	return c
}

func answered(c <-chan error) (err error, ok bool) {
	synctest.Wait()
	select {
	case err = <-c:
		return err, true
	default:
		return nil, false
	}
}

// TestAPausedOwnerAsksTheRootBeforeItAnswers stops a pool for as long as a takeover takes, or nearly.
func TestAPausedOwnerAsksTheRootBeforeItAnswers(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		r, s := pausing(t, nil)
		d := r.disk("d", testDisk)
		r.publish()
		time.Sleep(time.Hour) // ticks
		roots := r.requests().Root

		goOn := s.stop()
		time.Sleep(14 * time.Second) // beyond two ticks, not beyond half the watch time
		if err, ok := answered(hold(d)); err != nil || !ok {
			t.Fatalf("held back after a short pause: %v", err)
		}
		goOn()
		time.Sleep(time.Second)
		if n := r.requests().Root; n != roots {
			t.Fatalf("the root was asked for %d times after a short pause", n-roots)
		}

		time.Sleep(time.Minute)
		goOn = s.stop()
		time.Sleep(26 * time.Second)
		c := hold(d)
		if err, ok := answered(c); ok {
			t.Fatalf("a reply left after a pause, before any tick: %v", err)
		}
		goOn() // and the tick that was on its way ends
		if err := <-c; err != nil {
			t.Fatal(err)
		}
		if n := r.requests().Root - roots; n < 2 {
			t.Errorf("replies go on after %d questions for the root", n)
		}
		time.Sleep(time.Hour)
		if err, ok := answered(hold(d)); err != nil || !ok {
			t.Fatalf("held back long after: %v", err)
		}
	})
}

// TestASleepingMachineCountsAsAPause has the clock of the boot jump ahead, as when the machine was suspended.
func TestASleepingMachineCountsAsAPause(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		r, s := pausing(t, nil)
		roots := r.requests().Root
		s.asleep.Add(int64(14 * time.Second))
		time.Sleep(time.Minute)
		if n := r.requests().Root; n != roots {
			t.Fatalf("a short sleep asked for the root")
		}
		s.asleep.Add(int64(time.Minute))
		time.Sleep(5 * time.Second)
		synctest.Wait()
		if n := r.requests().Root; n == roots {
			t.Error("the machine slept for a minute and nothing was asked")
		}
		// The wall's clock alone, set ahead, is no pause: the slow look finds that out.
		roots = r.requests().Root
		r.pool.pulse.wall.Store(0)
		if err := <-hold(r.disk("d", testDisk)); err != nil || r.requests().Root != roots {
			t.Errorf("after a step of the wall's clock: %v, %d questions", err, r.requests().Root-roots)
		}
	})
}

// TestAPausedOwnerWaitsForItsTargets takes the targets away during the pause: then there is no answer before they are
// back, however long that takes; nor if the pool is closed.
func TestAPausedOwnerWaitsForItsTargets(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		r, s := pausing(t, nil)
		d := r.disk("d", testDisk)
		goOn := s.stop()
		time.Sleep(time.Minute)
		r.offline(true)
		goOn()
		c := hold(d)
		time.Sleep(time.Hour)
		if err, ok := answered(c); ok {
			t.Fatalf("a reply left without the root: %v", err)
		}
		r.offline(false)
		if err := <-c; err != nil {
			t.Fatal(err)
		}
		goOn = s.stop()
		time.Sleep(time.Minute)
		r.offline(true)
		goOn()
		c = hold(d)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		if err := d.Hold(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("a client that left: %v", err)
		}
		cancel()
		r.abandon()
		if err := <-c; !errors.Is(err, vdisk.ErrClosed) {
			t.Errorf("when the pool was closed: %v", err)
		}
		r.offline(false)
	})
}

// TestAPausedOwnerThatWasTakenOverAnswersNothing takes the pool over during the pause. What was done before
// the pause and not answered is not answered, and is in the list of what was lost.
func TestAPausedOwnerThatWasTakenOverAnswersNothing(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		r, s := pausing(t, nil)
		d := r.disk("d", testDisk)
		r.publish()
		goOn := s.stop()
		if err := writeOf(d, 7, 2)(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute)
		c := hold(d)
		bootClockHook = nil
		other := r.there(func(*Options) {})
		other.open(true)
		if err, ok := answered(c); ok {
			t.Fatalf("a reply left: %v", err)
		}
		goOn()
		if err := <-c; !errors.Is(err, vdisk.ErrFenced) {
			t.Fatalf("after the takeover: %v", err)
		}
		if err := reply(d, func() error { _, err := d.TryRead(make([]byte, 8), 0); return err }); !errors.Is(err, vdisk.ErrFenced) {
			t.Errorf("a read after the takeover: %v", err)
		}
		if err := reply(d, func() error { return d.Flush(t.Context()) }); !errors.Is(err, vdisk.ErrFenced) {
			t.Errorf("a flush after the takeover: %v", err)
		}
		<-r.pool.pub.done
		l, err := ReadLost(r.fs, "/host/tier")
		if err != nil || l.ByHost != "there" || len(l.Disks) != 1 || len(l.Disks[0].Written) != 1 || l.Disks[0].Written[0] != (LostRange{7, 2}) {
			t.Errorf("%+v, %v", l, err)
		}
	})
}

// TestAClonedTierIsFound has a copy of the tier claim the pool: the log is the same, the epoch is not.
func TestAClonedTierIsFound(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		r, s := pausing(t, nil)
		d := r.disk("d", testDisk)
		view, err := r.pool.lookAtRoot(t.Context())
		if err != nil || !r.pool.owns(view.Best) {
			t.Fatalf("an owner that does not own: %v", err)
		}
		goOn := s.stop()
		time.Sleep(time.Minute)
		r.pool.epoch.Store(0) // as if the root's epoch were another process's
		goOn()
		if err := <-hold(d); !errors.Is(err, vdisk.ErrFenced) {
			t.Errorf("%v under the epoch of another process with the same log", err)
		}
	})
}

// TestAnOldProofShortensNothing renews a pulse as of long ago, as a claim does that took long.
func TestAnOldProofShortensNothing(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		var u pulse
		u.init(40 * time.Second)
		then := u.now()
		time.Sleep(19 * time.Second)
		u.renew(u.now(), false)
		time.Sleep(15 * time.Second)
		if u.renew(then, true); !u.good() || u.late(u.now()) {
			t.Error("held back by a proof of 34 s ago, 15 s after a tick")
		}
		u.doubt()
		if u.renew(u.now(), false); u.good() || !u.late(u.now()) {
			t.Error("a tick ended a doubt")
		}
		if u.renew(u.now(), true); !u.good() || u.late(u.now()) {
			t.Error("a proof did not end a doubt")
		}
		time.Sleep(20 * time.Second)
		if u.good() || !u.late(u.now()) {
			t.Error("good for ever")
		}
	})
}

// BenchmarkHold is what each reply costs.
func BenchmarkHold(b *testing.B) {
	r := newRigFor(b, func(o *Options) { o.Watch = time.Hour })
	d, err := r.pool.CreateDisk(b.Context(), "d", testDisk)
	if err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		if err := d.Hold(b.Context()); err != nil {
			b.Fatal(err)
		}
	}
}
