package pool

import (
	"context"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// TestACloseEndsARepair closes a pool while a repair that somebody asked for is under way: nothing of it comes after the
// release, and everything it did is known to the next host.
func TestACloseEndsARepair(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, model := filled(t, large)
		r.empty(1)
		r.replace(1)
		var released atomic.Bool
		var late atomic.Int32
		begun := make(chan struct{})
		once := sync.OnceFunc(func() { close(begun) })
		r.stores[1].Before = func(op, key string) error {
			if op == "put" && strings.HasPrefix(key, "seg/") {
				if released.Load() {
					late.Add(1)
				}
				once()
			}
			return nil
		}
		done := make(chan error)
		go func() {
			_, err := r.pool.Repair(context.Background(), RepairOptions{BytesPerSecond: 10 << 10})
			done <- err
		}()
		<-begun
		p := r.pool
		r.close()
		released.Store(true)
		if err := <-done; err == nil || !strings.Contains(err.Error(), "closed") {
			t.Errorf("a repair of a pool that is being closed: %v", err)
		}
		if _, err := p.Repair(t.Context(), RepairOptions{}); err == nil {
			t.Error("repaired a pool that is closed")
		}
		time.Sleep(time.Hour)
		if n := late.Load(); n > 0 {
			t.Errorf("%d shards stored after the release", n)
		}
		r.newHost()
		r.open(false)
		if rep, err := r.pool.Fsck(t.Context(), true, false); err != nil || rep.Strays > restoresMax || rep.Orphans > 0 {
			t.Errorf("left are %+v, %v", rep, err) // what was on its way
		}
		r.expect(r.disk("d", testDisk), model)
		r.repair()
		r.whole()
		if rep, err := r.pool.Fsck(t.Context(), true, false); err != nil || rep.Strays > 0 {
			t.Errorf("left are %+v, %v", rep, err)
		}
	})
}

// TestTheBackgroundMakesWayForLong has a pass in the background begin when somebody has asked it to make way already.
func TestTheBackgroundMakesWayForLong(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, _ := withoutOne(t, nil)
		time.Sleep(10 * time.Minute) // the target that failed is asked again
		release := r.pool.repair.preempt()
		if r.pool.repairQuietly(t.Context()) || len(segmentKeys(r.memory[0].Keys())) > 0 {
			t.Error("it began while somebody waited for it")
		}
		release()
		if !r.pool.repairQuietly(t.Context()) || len(segmentKeys(r.memory[0].Keys())) == 0 {
			t.Error("it did not begin again")
		}
	})
}

// TestAClosedPoolAnswers asks a pool that has been closed, or is being closed, for everything.
func TestAClosedPoolAnswers(t *testing.T) {
	for name, end := range map[string]func(r *rig, p *Pool){
		"released": func(r *rig, _ *Pool) { r.close() },
		"killed":   func(r *rig, _ *Pool) { r.abandon() },
		"fenced": func(r *rig, p *Pool) {
			host := r.fs
			r.newHost()
			r.open(true)
			if d, err := p.Disk("d"); err != nil {
				r.t.Error(err)
			} else if err := writeOf(d, 1, 1)(); err != nil {
				r.t.Error(err)
			}
			if err := p.Publish(context.Background()); err == nil {
				r.t.Error("published after a takeover")
			}
			r.abandon()
			r.fs, r.pool = host, p
			r.abandon()
		},
	} {
		t.Run(name, func(t *testing.T) {
			r, _ := filled(t, nil)
			p, d := r.pool, r.disk("d", testDisk)
			ask := func(over bool) {
				ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
				defer cancel()
				_ = p.Status()
				_ = p.Disks()
				_ = p.DeletedDisks(true)
				_ = p.Describe(d)
				_, _ = p.Disk("d")
				_, _ = p.CheckUsage(ctx)
				_, _ = p.Fsck(ctx, true, false)
				if !over {
					return
				}
				for what, err := range map[string]error{
					"create":  second(p.CreateDisk(ctx, "n", testDisk)),
					"delete":  p.DeleteDisk(ctx, "d", true, true),
					"rename":  second(p.RenameDisk(ctx, "d", "e", true)),
					"resize":  second(p.ResizeDisk(ctx, "d", 2*testDisk, false)),
					"publish": p.Publish(ctx),
					"replace": second(p.ReplaceTarget(ctx, "t1")),
					"repair":  second(p.Repair(ctx, RepairOptions{})),
					"scrub":   second(p.Scrub(ctx, ScrubOptions{})),
				} {
					if err == nil || ctx.Err() != nil {
						t.Errorf("%s of a closed pool: %v", what, err)
					}
				}
			}
			var asking sync.WaitGroup
			var over atomic.Bool
			for range 2 {
				asking.Go(func() {
					for !over.Load() {
						ask(false)
					}
				})
			}
			end(r, p)
			over.Store(true)
			asking.Wait()
			ask(true)
		})
	}
}
