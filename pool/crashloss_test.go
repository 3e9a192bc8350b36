package pool

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"graindisk/block"
	"graindisk/pool/root"
)

// loseTarget empties a target for good now and then, and has it replaced and refilled while the clients work. A
// process that dies of something meanwhile leaves the rest to the next.
func (w *world) loseTarget(ctx context.Context, wg *sync.WaitGroup, err *error) {
	if w.lossRng == nil || w.emptied < 0 && (w.lossRng.IntN(2) == 0 || w.life.liar >= 0) {
		return
	}
	if w.emptied < 0 {
		w.emptied = w.lossRng.IntN(crashTargets)
		w.stores[w.emptied].lose()
		w.note("target-%d is lost for good", w.emptied)
		w.stats.inc("targets lost for good")
	}
	p := w.p
	wg.Go(func() {
		w.sched.Park("mender")
		if *err = w.refill(ctx, p); *err == nil {
			w.emptied = -1
			w.stats.inc("targets refilled")
		} else if errors.Is(*err, errNotYet) {
			*err = nil
		}
	})
}

// errNotYet ends a refill that the next life goes on with.
var errNotYet = errors.New("not refilled yet")

// refill replaces the emptied target and repairs until nothing lacks anything.
func (w *world) refill(ctx context.Context, p *Pool) error {
	name := fmt.Sprintf("t%d", w.emptied)
	for try := 0; ; try++ {
		c, err := p.ReplaceTarget(ctx, name)
		if err == nil {
			w.note("%s is target %d now", name, c.New)
		}
		if err == nil || errors.Is(err, ErrTargetInUse) { // it was replaced in a life before
			break
		}
		if ctx.Err() != nil || w.fs.WasCut() || p.broken.Load() != nil || p.log.Failed() != nil {
			return err
		}
		if try == 20 || errors.Is(err, ErrNotClaimed) {
			w.note("not replaced: %v", err)
			return errNotYet
		}
	}
	// What is on its way still goes where the emptied target was; the cut after it does not.
	if err := p.Publish(ctx); err != nil {
		return err
	}
	for range 20 {
		rep, err := p.Repair(ctx, RepairOptions{})
		if err != nil {
			return err
		}
		for range rep.Restored {
			w.stats.inc("shards restored")
		}
		if rep.Unreadable > 0 {
			return fmt.Errorf("repair: %+v", rep)
		}
		s := p.Status().Strength
		if rep.Failed+rep.Waiting == 0 && s.Below == 0 {
			return nil
		}
	}
	return errNotYet
}

// storeOf is where the target of that number is by the copies of the root; nil if it is nowhere.
func (w *world) storeOf(t block.TargetID) *guarded {
	if w.lossRng == nil {
		return w.stores[t-1]
	}
	uuids := map[string]bool{}
	var copies [crashTargets]root.Copy
	for i, g := range w.stores {
		copies[i], _ = root.Decode(g.root())
		for _, ms := range [][]root.Member{copies[i].Val.Cfg.Members, copies[i].Val.Cfg.Next} {
			for _, m := range ms {
				if m.ID == t {
					uuids[m.UUID] = true
				}
			}
		}
	}
	for i, c := range copies {
		if uuids[c.Member] {
			return w.stores[i]
		}
	}
	return nil
}

// lose takes all that a target holds, and what is on its way to it: it is another place from here on.
func (g *guarded) lose() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.Memory.Wipe()
	clear(g.used)
	g.echoes = nil
}
