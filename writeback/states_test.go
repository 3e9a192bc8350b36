package writeback

import (
	"math/rand/v2"
	"testing"

	"graindisk/block"
)

// TestStatesAgreeWithLookup writes and unmaps at random over several generations and compares what States
// tells of random ranges with what Lookup tells of each block.
func TestStatesAgreeWithLookup(t *testing.T) {
	const blocks, maxLen = 2000, 40
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 1))
	r := newRig(t, 40, 256)
	seen := map[State]int{}
	for round := range 60 {
		var recs []Record
		for range 1 + rng.IntN(5) {
			lba, n := block.LBA(rng.IntN(blocks-maxLen)), 1+rng.IntN(maxLen)
			if rng.IntN(2) == 0 {
				recs = append(recs, Record{Kind: Unmap, Disk: 1, LBA: lba, Blocks: uint64(n)})
			} else {
				recs = append(recs, Record{Kind: Data, Disk: 1, LBA: lba, Data: make([]byte, n*block.Size)})
			}
		}
		if _, err := r.log.Append(bg, recs); err != nil {
			t.Fatal(err)
		}
		if round%20 == 19 {
			r.log.Freeze()
		}
		var pins Pins
		found := make([]Found, blocks)
		r.log.Lookup(1, 0, found, &pins)
		pins.Release()
		for range 10 {
			lba := block.LBA(rng.IntN(blocks))
			end := lba + 1 + block.LBA(rng.IntN(blocks-int(lba)))
			out := make([]StateRange, 1+rng.IntN(8))
			n := r.log.States(1, lba, end, out)
			if n == 0 || out[n-1].End > end || n < len(out) && out[n-1].End != end {
				t.Fatalf("round %d: [%d,%d) gives %v of %d", round, lba, end, out[:n], len(out))
			}
			for i, s := range out[:n] {
				if s.End <= lba || i > 0 && out[i-1].State == s.State {
					t.Fatalf("round %d: %v: range %d is empty or could be joined", round, out[:n], i)
				}
				for ; lba < s.End; lba++ {
					if found[lba].State != s.State {
						t.Fatalf("round %d: block %d is %d, told %d", round, lba, found[lba].State, s.State)
					}
				}
				seen[s.State]++
			}
		}
	}
	if len(seen) != 3 {
		t.Errorf("states seen: %v", seen)
	}
	if n := r.log.States(7, 5, lbaMax, make([]StateRange, 3)); n != 1 {
		t.Errorf("%d ranges of a disk that the log does not know", n)
	}
}

// TestStatesIsBounded asks about more runs than one call may look at.
func TestStatesIsBounded(t *testing.T) {
	r := newRig(t, 40, 256)
	for lba := range block.LBA(2 * statesStep) {
		if _, err := r.log.Append(bg, []Record{{Kind: Unmap, Disk: 1, LBA: 2 * lba, Blocks: 1}}); err != nil {
			t.Fatal(err)
		}
	}
	out := make([]StateRange, 8*statesStep)
	if n := r.log.States(1, 0, 4*statesStep, out); n != statesStep || out[n-1].End != statesStep {
		t.Errorf("%d ranges up to %d", n, out[n-1].End)
	}
}
