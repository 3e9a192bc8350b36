package writeback

import (
	"graindisk/block"
	"graindisk/tier"
)

// filler sets runs in an empty tree that nobody else uses yet. Those that come in ascending order, as in a
// checkpoint, make whole leaves at the tree's end, at a tenth of what setting them one by one costs; any
// other is set like that. flush ends it.
type filler struct {
	t    *runs
	leaf []run     // to be the tree's next leaf; of leafMax at most
	end  block.LBA // of all that was set
}

// set maps n blocks from lba on to the places from place on, over what was there.
func (f *filler) set(lba block.LBA, n int, place tier.Place) {
	if lba < f.end {
		f.flush()
		f.t.set(lba, n, place)
		f.end = max(f.end, lba+block.LBA(n))
		return
	}
	f.end = lba + block.LBA(n)
	for n > 0 {
		k := min(n, runMax)
		f.add(newRun(lba, k, place))
		lba, n, place = lba+block.LBA(k), n-k, place+tier.Place(k)
	}
}

// add takes a run behind all others.
func (f *filler) add(r run) {
	if i := len(f.leaf) - 1; i >= 0 && f.leaf[i].end() == r.lba() && joins(f.leaf[i], r) {
		f.leaf[i].key += uint64(r.blocks())
		return
	}
	if len(f.leaf) == leafMax {
		f.flush()
	}
	f.leaf = append(f.leaf, r)
}

// flush puts what was added into the tree.
func (f *filler) flush() {
	if len(f.leaf) == 0 {
		return
	}
	t := f.t
	leaf := t.newLeaf(f.leaf...)
	for _, r := range leaf {
		t.blocks += r.blocks()
	}
	if len(t.nodes) == 0 {
		t.addNode(0, &runNode{firsts: []block.LBA{leaf[0].lba()}, leaves: [][]run{leaf}})
	} else {
		ni := len(t.nodes) - 1
		t.addLeaf(ni, len(t.nodes[ni].leaves), leaf)
	}
	f.leaf = f.leaf[:0]
}
