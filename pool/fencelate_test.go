package pool

import (
	"errors"
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	"graindisk/grains/segment"
	"graindisk/pool/root"
	"graindisk/vdisk"
)

// TestAFenceIsListedThoughPublishingHadStopped breaks the publisher of a pool, which goes on serving, and takes the pool over
// while it stands still.
func TestAFenceIsListedThoughPublishingHadStopped(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		r, s := pausing(t, nil)
		d := r.disk("d", testDisk)
		r.publish()
		var mended atomic.Bool
		for _, st := range r.stores {
			st.Before = func(op, key string) error {
				if op == "put" && key == root.Key && !mended.Load() {
					return fmt.Errorf("broken: %w", segment.ErrDamaged) // asking again does not mend it
				}
				return nil
			}
		}
		if err := writeOf(d, 3, 1)(); err != nil {
			t.Fatal(err)
		}
		if err := r.pool.Publish(t.Context()); err == nil {
			t.Fatal("published; nothing is proved")
		}
		<-r.pool.pub.done
		mended.Store(true)
		if err := reply(d, writeOf(d, 7, 2)); err != nil || r.pool.Status().State != "stopped" || r.pool.Status().Fenced != nil {
			t.Fatalf("a pool that has stopped publishing: %v, %+v", err, r.pool.Status().Fenced)
		}
		goOn := s.stop()
		time.Sleep(time.Minute)
		c := hold(d)
		bootClockHook = nil
		r.there(func(*Options) {}).open(true)
		goOn()
		if err := <-c; !errors.Is(err, vdisk.ErrFenced) {
			t.Fatalf("after the takeover: %v", err)
		}
		time.Sleep(time.Minute)
		if f := r.pool.Status().Fenced; f == nil || f.Lost.ByHost != "there" || f.List == "" {
			t.Errorf("the status says %+v", f)
		}
		l, err := ReadLost(r.fs, "/host/tier")
		if err != nil || l.ByHost != "there" || len(l.Disks) != 1 || len(l.Disks[0].Written) != 2 {
			t.Errorf("%+v, %v", l, err)
		}
		r.abandon()
	})
}
