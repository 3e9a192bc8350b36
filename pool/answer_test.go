package pool

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"graindisk/vdisk"
)

// TestAPausedOwnerAcknowledgesNoOperation has each operation on disks end during a pause in which the pool is taken
// over, and one whose client leaves while its answer is held back.
func TestAPausedOwnerAcknowledgesNoOperation(t *testing.T) {
	for name, do := range map[string]func(context.Context, *Pool) error{
		"create":   func(ctx context.Context, p *Pool) error { _, err := p.CreateDisk(ctx, "new", testDisk); return err },
		"delete":   func(ctx context.Context, p *Pool) error { return p.DeleteDisk(ctx, "d", false, false) },
		"purge":    func(ctx context.Context, p *Pool) error { return p.DeleteDisk(ctx, "d", false, true) },
		"undelete": func(ctx context.Context, p *Pool) error { _, err := p.UndeleteDisk(ctx, "gone", 0, ""); return err },
		"rename":   func(ctx context.Context, p *Pool) error { _, err := p.RenameDisk(ctx, "d", "e", true); return err },
		"grow": func(ctx context.Context, p *Pool) error {
			_, err := p.ResizeDisk(ctx, "d", 2*testDisk, false)
			return err
		},
		"shrink": func(ctx context.Context, p *Pool) error {
			_, err := p.ResizeDisk(ctx, "d", testDisk/2, true)
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T) {
				r, goOn := pausedWithDisks(t)
				ctx, leave := context.WithCancel(t.Context())
				c := make(chan error, 1)
				go func() { c <- do(ctx, r.pool) }()
				if err, ok := answered(c); ok {
					t.Fatalf("acknowledged during the pause: %v", err)
				}
				turn := make(chan error, 1)
				go func() {
					err := r.pool.beginOp(t.Context())
					if err == nil {
						r.pool.endOp()
					}
					turn <- err
				}()
				if err, ok := answered(turn); !ok || err != nil {
					t.Errorf("an answer that is held back keeps its turn: %v", err)
				}
				leave()
				if err := <-c; !errors.Is(err, context.Canceled) {
					t.Errorf("when the client had left: %v", err)
				}
				goOn()
				synctest.Wait()
			})
			inBubble(t, func(t *testing.T) {
				r, goOn := pausedWithDisks(t)
				c := make(chan error, 1)
				go func() { c <- do(t.Context(), r.pool) }()
				synctest.Wait()
				bootClockHook = nil
				other := r.there(func(*Options) {})
				other.open(true)
				goOn()
				if err := <-c; !errors.Is(err, vdisk.ErrFenced) {
					t.Errorf("after the takeover: %v", err)
				}
				<-r.pool.pub.done
			})
		})
	}
}

// pausedWithDisks is the pool of an owner that stands still, with disk d and the deleted disk gone; goOn ends that.
func pausedWithDisks(t *testing.T) (r *rig, goOn func()) {
	t.Helper()
	r, s := pausing(t, nil)
	r.disk("d", testDisk)
	r.disk("gone", testDisk)
	if err := r.pool.DeleteDisk(t.Context(), "gone", false, false); err != nil {
		t.Fatal(err)
	}
	r.publish()
	goOn = s.stop()
	time.Sleep(time.Minute)
	return r, goOn
}
