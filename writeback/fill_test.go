package writeback

import (
	"math/rand/v2"
	"testing"

	"graindisk/block"
	"graindisk/tier"
)

// TestFillerMatchesAFlatMap fills a tree with runs in order, some of which go on where the one before
// ends, and some that come out of order over those before; then with sets one by one, as after a recovery.
func TestFillerMatchesAFlatMap(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	for _, c := range []struct {
		name           string
		steps, longest int
		back           int // one in so many comes out of order; 0: none
		tight          bool
	}{
		{"a few", 3, 5, 0, false},
		{"several nodes", 3 * nodeMax * leafMax, 1, 0, false},
		{"runs that join", 20_000, 4, 0, true},
		{"longer than a run may be", 300, 3 * runMax, 0, true},
		{"some out of order", 5_000, 9, 50, false},
		{"half of them out of order", 2_000, 60, 2, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			rng := rand.New(rand.NewPCG(seed, 2))
			var tree runs
			model := map[block.LBA]tier.Place{}
			f := filler{t: &tree}
			at, place := block.LBA(rng.IntN(3)), tier.Place(0)
			for range c.steps {
				n := 1 + rng.IntN(c.longest)
				lba := at
				if c.back > 0 && rng.IntN(c.back) == 0 {
					lba = block.LBA(rng.Uint64N(uint64(at) + 1))
				}
				if !c.tight || rng.IntN(3) == 0 {
					place += tier.Place(rng.IntN(4))
					lba += block.LBA(rng.IntN(4))
				}
				f.set(lba, n, place)
				for k := range n {
					model[lba+block.LBA(k)] = place + tier.Place(k)
				}
				place += tier.Place(n)
				at = max(at, lba+block.LBA(n))
			}
			f.flush()
			f.flush() // changes nothing
			if err := tree.same(model, rng); err != nil {
				t.Fatalf("seed %d: filled: %v", seed, err)
			}
			for range 2000 {
				n := 1 + rng.IntN(5)
				lba := block.LBA(rng.Uint64N(uint64(at)))
				tree.set(lba, n, place)
				for k := range n {
					model[lba+block.LBA(k)] = place + tier.Place(k)
				}
				place += tier.Place(n + 1)
			}
			if err := tree.same(model, rng); err != nil {
				t.Fatalf("seed %d: written to: %v", seed, err)
			}
		})
	}
}
