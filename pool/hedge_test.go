package pool

import (
	"bytes"
	"context"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"graindisk/backend"
	"graindisk/backend/adaptive"
	"graindisk/grains/segment"
)

// askedStore is what lies behind adaptive: it counts the reads of segments that reach a target, each of which
// takes as long, and ends, as do says.
type askedStore struct {
	backend.Store
	on    *atomic.Bool
	asked atomic.Int64
	do    func() (time.Duration, error)
}

func (s *askedStore) ReadAt(ctx context.Context, key string, p []byte, off int64) error {
	if !strings.HasPrefix(key, "seg/") || !s.on.Load() {
		return s.Store.ReadAt(ctx, key, p, off)
	}
	s.asked.Add(1)
	d, err := s.do()
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
		return ctx.Err()
	}
	if err != nil {
		return err
	}
	return s.Store.ReadAt(ctx, key, p, off)
}

// coldReads has two disks of one pool read all of their grains in random order, each one at a time, and counts what
// reaches the targets, of which do tells how they do. Two indexes are read as well.
func coldReads(t *testing.T, do func(target int, rng *rand.Rand) (time.Duration, error)) (asked [3]int64, stats segment.ReadStats, retries uint64) {
	synctest.Test(t, func(t *testing.T) {
		const size = 40 << 20
		var on atomic.Bool
		var stores [3]*askedStore
		var watched [3]*adaptive.Store
		r := newRig(t, func(o *Options) {
			o.TierBytes, o.SlotBytes, o.SegmentBytes = 256<<20, 4<<20, 32<<20
			for i := range o.Targets {
				rng := rand.New(rand.NewPCG(7, uint64(i)))
				var mu sync.Mutex
				stores[i] = &askedStore{Store: o.Targets[i].Store, on: &on, do: func() (time.Duration, error) {
					mu.Lock()
					defer mu.Unlock()
					return do(i, rng)
				}}
				watched[i] = adaptive.New(stores[i], adaptive.Options{})
				o.Targets[i].Store = watched[i]
			}
		})
		names := []string{"a", "b"}
		models := make([][]byte, len(names))
		for i, name := range names {
			models[i] = make([]byte, size)
			for n := 0; n < size; n += 512 {
				models[i][n] = byte(rand.Uint32())
			}
			for off := 0; off < size; off += 1 << 20 {
				r.write(r.disk(name, size), int64(off), models[i][off:][:1<<20])
			}
		}
		r.publish()
		r.abandon()
		r.newHost()
		r.open(true)
		on.Store(true)
		var wg sync.WaitGroup
		for i, name := range names {
			d := r.disk(name, size)
			wg.Go(func() {
				p := make([]byte, GrainBytes)
				for _, g := range rand.New(rand.NewPCG(3, uint64(i))).Perm(size / GrainBytes) {
					if err := d.Read(context.Background(), p, int64(g*GrainBytes)); err != nil || !bytes.Equal(p, models[i][g*GrainBytes:][:GrainBytes]) {
						t.Errorf("disk %s, grain %d: %v", name, g, err)
						return
					}
				}
			})
		}
		wg.Wait()
		stats = r.pool.reader.Stats()
		r.abandon()
		for i := range stores {
			asked[i] = stores[i].asked.Load()
			retries += watched[i].Health().Ops["read"].Retries
		}
	})
	return asked, stats, retries
}

func sum(n [3]int64) int64 { return n[0] + n[1] + n[2] }

// TestOneBudgetOfHedges counts the requests that reach the targets of a pool whose disks read at the same moment.
// Targets of which each is slow once in 25 answers would cost 8 % more requests if every slow answer were hedged;
// the pool has one budget of 5 %, and nothing below it asks twice.
func TestOneBudgetOfHedges(t *testing.T) {
	const usual = 10 * time.Millisecond
	plain, stats, _ := coldReads(t, func(int, *rand.Rand) (time.Duration, error) { return usual, nil })
	if stats.Extra != 0 || stats.Reads < 1000 {
		t.Fatalf("with all targets alike: %+v", stats)
	}
	slow, stats, retries := coldReads(t, func(_ int, rng *rand.Rand) (time.Duration, error) {
		if rng.IntN(25) == 0 {
			return 50 * usual, nil
		}
		return usual, nil
	})
	t.Logf("COUNT %d requests without slow answers, %d with: %.1f %% more; %d hedges, %d of them won", sum(plain), sum(slow),
		100*float64(sum(slow)-sum(plain))/float64(sum(plain)), stats.Hedged, stats.Won)
	if limit := sum(plain)*105/100 + 2; sum(slow) > limit {
		t.Errorf("%d requests, without slow answers %d; at most %d are allowed", sum(slow), sum(plain), limit)
	}
	if stats.Hedged < 10 || stats.Won < 10 {
		t.Errorf("hardly a hedge: %+v", stats)
	}
	if retries != 0 {
		t.Errorf("%d requests were made again below the reader, though none failed", retries)
	}
}

// TestADeadTargetIsHardlyAsked counts the requests to a target that fails each: it is asked until it is known to be
// sick, and then once in a while.
func TestADeadTargetIsHardlyAsked(t *testing.T) {
	plain, _, _ := coldReads(t, func(int, *rand.Rand) (time.Duration, error) { return time.Millisecond, nil })
	asked, stats, _ := coldReads(t, func(target int, _ *rand.Rand) (time.Duration, error) {
		if target == 0 {
			return time.Millisecond, &backend.Error{Op: "read", Store: "t0", Class: backend.Transient}
		}
		return time.Millisecond, nil
	})
	t.Logf("%v requests instead of %v; %+v", asked, plain, stats)
	if asked[0] > 40 {
		t.Errorf("the dead target was asked %d times", asked[0])
	}
	// Each range on it costs k = 2 requests to the others.
	if others := asked[1] + asked[2]; others > sum(plain)+plain[0]+40 {
		t.Errorf("the others were asked %d times, %d with all targets alive", others, plain[1]+plain[2])
	}
}
