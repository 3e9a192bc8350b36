package writeback

import (
	"slices"
	"unsafe"

	"graindisk/block"
	"graindisk/tier"
)

// run is consecutive blocks of a disk that lie side by side on the tier: 16 bytes without a pointer.
//
//	63             12 11           0  63                0
//	+----------------+--------------+ +-----------------+
//	|      LBA       |  blocks - 1  | |      place      |
//	+----------------+--------------+ +-----------------+
//
// An LBA has 52 bits (lbaMax). Runs sort by their key alone.
type run struct {
	key   uint64
	place tier.Place
}

const (
	runLenBits = 12
	runMax     = 1 << runLenBits // blocks
)

func newRun(lba block.LBA, n int, place tier.Place) run {
	return run{uint64(lba)<<runLenBits | uint64(n-1), place}
}

func (r run) lba() block.LBA { return block.LBA(r.key >> runLenBits) }
func (r run) blocks() int    { return int(r.key&(runMax-1)) + 1 }
func (r run) end() block.LBA { return r.lba() + block.LBA(r.blocks()) }

// from is the part of r from lba on, until the part before it; lba lies within r.
func (r run) from(lba block.LBA) run {
	return newRun(lba, int(r.end()-lba), r.place+tier.Place(lba-r.lba()))
}

func (r run) until(lba block.LBA) run { return newRun(r.lba(), int(lba-r.lba()), r.place) }

// runs maps blocks of one disk to their places: a tree of fixed height, nodes of leaves of runs,
// all ascending by LBA and disjoint. A leaf's slice grows in steps of at most 1.2, so what it holds
// for growth is little, and no change moves more than one leaf. The zero value is empty.
//
//	firsts  [ 0 | 70 311 | … ]                  LBA of the first run of each node
//	nodes   [ node | node | … ]
//	          firsts [ 0 | 402 | 1011 | … ]     … of each leaf
//	          leaves [ leaf | leaf | … ]        up to nodeMax
//	                   [ run | run | … ]        1 to leafMax
type runs struct {
	firsts []block.LBA
	nodes  []*runNode
	blocks int   // held
	bytes  int64 // of memory in leaves and nodes, capacity included
}

type runNode struct {
	firsts []block.LBA
	leaves [][]run
}

const (
	leafMax = 256 // 4 KiB
	nodeMax = 128

	runBytes  = int64(unsafe.Sizeof(run{}))
	lbaBytes  = int64(unsafe.Sizeof(block.LBA(0)))
	leafBytes = int64(unsafe.Sizeof([]run(nil))) // its header in a node
	nodeBytes = int64(unsafe.Sizeof(runNode{}) + unsafe.Sizeof((*runNode)(nil)))
)

// leafCaps are the lengths that leaf slices have: the sizes the allocator hands out without waste.
var leafCaps = [...]int{1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64, 72, 80, 88, 96,
	112, 128, 144, 168, 192, 216, leafMax}

func leafCap(n int) int {
	i, _ := slices.BinarySearch(leafCaps[:], n)
	return leafCaps[i]
}

// lastAtMost is the index of the last of list that is at most x, and 0 if none is.
func lastAtMost(list []block.LBA, x block.LBA) int {
	base := 0
	for n := len(list); n > 1; {
		half := n >> 1
		if list[base+half] <= x {
			base += half
		}
		n -= half
	}
	return base
}

// runAt is the index of the last run that starts at or before lba, and 0 if none does. It guesses by
// proportion, which for random writes errs by a few runs, and halves what is left if it is far off.
func runAt(leaf []run, lba block.LBA) int {
	key := uint64(lba)<<runLenBits | (runMax - 1)
	low, high := 0, len(leaf)-1 // leaf[low] is at or before, leaf[high+1] is not
	if leaf[high].key <= key {
		return high
	}
	if high < 2*guessMax || leaf[low].key > key {
		return halve(leaf, low, high, key)
	}
	first := leaf[0].key >> runLenBits
	i := int(float64(uint64(lba)-first) / float64(leaf[high].key>>runLenBits-first) * float64(high))
	if leaf[i].key <= key {
		for low = i; low < i+guessMax && low < high; low++ {
			if leaf[low+1].key > key {
				return low
			}
		}
		return halve(leaf, low, high, key)
	}
	for high = i; high > i-guessMax && high > 0; high-- {
		if leaf[high-1].key <= key {
			return high - 1
		}
	}
	return halve(leaf, 0, high, key)
}

const guessMax = 16

// halve finds the last run of leaf[low:high] that is at or before key, low if none is.
func halve(leaf []run, low, high int, key uint64) int {
	for n := high - low; n > 1; {
		half := n >> 1
		if leaf[low+half].key <= key {
			low += half
		}
		n -= half
	}
	return low
}

// leafFor is where a run that holds lba would be; the tree is not empty.
func (t *runs) leafFor(lba block.LBA) (ni, li int) {
	ni = lastAtMost(t.firsts, lba)
	return ni, lastAtMost(t.nodes[ni].firsts, lba)
}

// lastLeaf is the leaf with the highest LBAs; the tree is not empty.
func (t *runs) lastLeaf() (ni, li int, leaf []run) {
	ni = len(t.nodes) - 1
	li = len(t.nodes[ni].leaves) - 1
	return ni, li, t.nodes[ni].leaves[li]
}

// visit calls f with the runs that overlap [from, to), whole, in order, until f returns false.
func (t *runs) visit(from, to block.LBA, f func(run) bool) {
	if len(t.nodes) == 0 {
		return
	}
	ni, li := t.leafFor(from)
	node := t.nodes[ni]
	leaf := node.leaves[li]
	for i := runAt(leaf, from); ; i++ {
		if i == len(leaf) {
			if li++; li == len(node.leaves) {
				if ni++; ni == len(t.nodes) {
					return
				}
				node, li = t.nodes[ni], 0
			}
			leaf, i = node.leaves[li], 0
		}
		r := leaf[i]
		if r.lba() >= to {
			return
		}
		if r.end() > from && !f(r) {
			return
		}
	}
}

// set maps n blocks from lba on to the places from place on, over what was there.
func (t *runs) set(lba block.LBA, n int, place tier.Place) {
	for n > 0 {
		k := min(n, runMax)
		t.setRun(newRun(lba, k, place))
		lba, n, place = lba+block.LBA(k), n-k, place+tier.Place(k)
	}
}

func (t *runs) setRun(r run) {
	if len(t.nodes) == 0 {
		t.blocks += r.blocks()
		t.addNode(0, &runNode{firsts: []block.LBA{r.lba()}, leaves: [][]run{t.newLeaf(r)}})
		return
	}
	ni, li, leaf := t.lastLeaf()
	i, j := len(leaf), len(leaf)
	if leaf[i-1].end() > r.lba() { // not in order: look for the place
		ni, li = t.leafFor(r.lba())
		leaf = t.nodes[ni].leaves[li]
		i, j = overlap(leaf, r.lba(), r.end())
	}
	if j == len(leaf) && t.leafAfterBegins(ni, li, r.end()) {
		t.clear(r.lba(), r.end()) // across leaves: now nothing overlaps
		t.setRun(r)
		return
	}
	var buf [3]run
	keep := buf[:0]
	old := 0
	for k := i; k < j; k++ {
		old += leaf[k].blocks()
	}
	if i < j && leaf[i].lba() < r.lba() {
		keep = append(keep, leaf[i].until(r.lba()))
		old -= keep[0].blocks()
	} else if p := i - 1; i == j && p >= 0 && leaf[p].end() == r.lba() && joins(leaf[p], r) {
		leaf[p].key += uint64(r.blocks()) // goes on where the run before ends, on the tier too
		t.blocks += r.blocks()
		return
	}
	keep = append(keep, r)
	if i < j && leaf[j-1].end() > r.end() {
		tail := leaf[j-1].from(r.end())
		keep = append(keep, tail)
		old -= tail.blocks()
	}
	t.blocks += r.blocks() - old
	t.replace(ni, li, i, j, keep)
}

// joins tells whether b, which begins at the end of a, can be part of a.
func joins(a, b run) bool {
	return a.place+tier.Place(a.blocks()) == b.place && a.blocks()+b.blocks() <= runMax
}

// overlap is the range of runs in the leaf that overlap [from, to); if none does, i == j is where
// such a run would go.
func overlap(leaf []run, from, to block.LBA) (i, j int) {
	i = runAt(leaf, from)
	if leaf[i].end() <= from {
		i++
	}
	for j = i; j < len(leaf) && leaf[j].lba() < to; j++ {
	}
	return i, j
}

// leafAfterBegins tells whether the leaf after this one begins before end.
func (t *runs) leafAfterBegins(ni, li int, end block.LBA) bool {
	if li+1 < len(t.nodes[ni].firsts) {
		return t.nodes[ni].firsts[li+1] < end
	}
	return ni+1 < len(t.firsts) && t.firsts[ni+1] < end
}

// clear takes [from, to) out, leaf by leaf.
func (t *runs) clear(from, to block.LBA) {
	for from < to && len(t.nodes) > 0 {
		ni, li := t.leafFor(from)
		leaf := t.nodes[ni].leaves[li]
		next, more := to, false // where the next leaf begins
		if t.leafAfterBegins(ni, li, to) {
			more = true
			if li+1 < len(t.nodes[ni].firsts) {
				next = t.nodes[ni].firsts[li+1]
			} else {
				next = t.firsts[ni+1]
			}
		}
		if i, j := overlap(leaf, from, to); i < j {
			var buf [2]run
			keep := buf[:0]
			for _, r := range leaf[i:j] {
				t.blocks -= r.blocks()
			}
			if r := leaf[i]; r.lba() < from {
				keep = append(keep, r.until(from))
			}
			if r := leaf[j-1]; r.end() > to {
				keep = append(keep, r.from(to))
			}
			for _, r := range keep {
				t.blocks += r.blocks()
			}
			t.replace(ni, li, i, j, keep)
		}
		if !more {
			return
		}
		from = max(from, next)
	}
}

// replace puts new runs, at most three, in the place of runs i to j of a leaf, and sees to the tree.
func (t *runs) replace(ni, li, i, j int, with []run) {
	node := t.nodes[ni]
	leaf := node.leaves[li]
	n := len(leaf) - (j - i) + len(with)
	switch {
	case n == 0:
		t.dropLeaf(ni, li)
		return
	case n > leafMax:
		t.split(ni, li, i, j, with)
		return
	}
	if n > cap(leaf) || n < cap(leaf)/3 {
		c := leafCap(n)
		grown := make([]run, n, c)
		copy(grown, leaf[:i])
		copy(grown[i+len(with):], leaf[j:])
		t.bytes += runBytes * int64(c-cap(leaf))
		leaf = grown
	} else {
		old := leaf
		leaf = leaf[:n]
		copy(leaf[i+len(with):], old[j:])
	}
	copy(leaf[i:], with)
	node.leaves[li] = leaf
	if i == 0 {
		t.firstChanged(ni, li)
	}
	if n < leafMax/4 {
		t.join(ni, li)
	}
}

func (t *runs) firstChanged(ni, li int) {
	node := t.nodes[ni]
	node.firsts[li] = node.leaves[li][0].lba()
	if li == 0 {
		t.firsts[ni] = node.firsts[0]
	}
}

// split is replace where the leaf becomes too long: in the middle, or at the very end of the disk
// after the runs that are there, so that what is written in order fills leaves.
func (t *runs) split(ni, li, i, j int, with []run) {
	leaf := t.nodes[ni].leaves[li]
	all := make([]run, 0, leafMax+2)
	all = append(append(append(all, leaf[:i]...), with...), leaf[j:]...)
	at := len(all) / 2
	if i >= len(leaf)-1 && li+1 == len(t.nodes[ni].leaves) && ni+1 == len(t.nodes) {
		at = leafMax
	}
	t.bytes -= runBytes * int64(cap(leaf))
	t.nodes[ni].leaves[li] = t.newLeaf(all[:at]...)
	t.firstChanged(ni, li)
	t.addLeaf(ni, li+1, t.newLeaf(all[at:]...))
}

func (t *runs) newLeaf(list ...run) []run {
	c := leafCap(len(list))
	t.bytes += runBytes * int64(c)
	return append(make([]run, 0, c), list...)
}

func (t *runs) addLeaf(ni, li int, leaf []run) {
	node := t.nodes[ni]
	t.resizeNode(node, func() {
		node.firsts = slices.Insert(node.firsts, li, leaf[0].lba())
		node.leaves = slices.Insert(node.leaves, li, leaf)
	})
	if len(node.leaves) < nodeMax {
		return
	}
	at := nodeMax / 2
	if li == nodeMax-1 && ni+1 == len(t.nodes) {
		at = nodeMax - 1
	}
	right := &runNode{firsts: slices.Clone(node.firsts[at:]), leaves: slices.Clone(node.leaves[at:])}
	t.resizeNode(node, func() {
		node.firsts = slices.Clone(node.firsts[:at])
		node.leaves = slices.Clone(node.leaves[:at])
	})
	t.addNode(ni+1, right)
}

// resizeNode keeps count of the memory that change gives a node or takes from it.
func (t *runs) resizeNode(n *runNode, change func()) {
	t.bytes -= n.bytes()
	change()
	t.bytes += n.bytes()
}

func (n *runNode) bytes() int64 {
	return int64(cap(n.firsts))*lbaBytes + int64(cap(n.leaves))*leafBytes
}

func (t *runs) addNode(ni int, n *runNode) {
	t.bytes += n.bytes()
	t.firsts = slices.Insert(t.firsts, ni, n.firsts[0])
	t.nodes = slices.Insert(t.nodes, ni, n)
}

func (t *runs) dropLeaf(ni, li int) {
	node := t.nodes[ni]
	t.bytes -= runBytes * int64(cap(node.leaves[li]))
	if len(node.leaves) == 1 {
		t.bytes -= node.bytes()
		t.firsts = slices.Delete(t.firsts, ni, ni+1)
		t.nodes = slices.Delete(t.nodes, ni, ni+1)
		if len(t.nodes) < cap(t.nodes)/4 {
			t.firsts, t.nodes = slices.Clone(t.firsts), slices.Clone(t.nodes)
		}
		return
	}
	t.resizeNode(node, func() {
		node.firsts = slices.Delete(node.firsts, li, li+1)
		node.leaves = slices.Delete(node.leaves, li, li+1)
		if len(node.leaves) < cap(node.leaves)/4 {
			node.firsts, node.leaves = slices.Clone(node.firsts), slices.Clone(node.leaves)
		}
	})
	if li == 0 {
		t.firsts[ni] = node.firsts[0]
	}
}

// join puts a short leaf and a neighbour in the same node together, if that leaves room to grow.
func (t *runs) join(ni, li int) {
	node := t.nodes[ni]
	if li+1 == len(node.leaves) {
		li--
	}
	if li < 0 || len(node.leaves[li])+len(node.leaves[li+1]) > leafMax*3/4 {
		return
	}
	left, right := node.leaves[li], node.leaves[li+1]
	all := append(append(make([]run, 0, leafMax), left...), right...)
	t.bytes -= runBytes * int64(cap(left))
	node.leaves[li] = t.newLeaf(all...)
	t.dropLeaf(ni, li+1)
}

// memory is what the tree takes, in bytes.
func (t *runs) memory() int64 {
	return t.bytes + int64(cap(t.firsts))*lbaBytes + int64(cap(t.nodes))*nodeBytes
}

// takeLeaf removes the first leaf and returns its runs; nil if the tree is empty.
func (t *runs) takeLeaf() []run {
	if len(t.nodes) == 0 {
		return nil
	}
	leaf := t.nodes[0].leaves[0]
	for _, r := range leaf {
		t.blocks -= r.blocks()
	}
	t.dropLeaf(0, 0)
	return leaf
}
