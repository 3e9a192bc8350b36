package cache

import (
	"container/list"
	"testing"
	"time"

	"graindisk/block"
)

// The simulation: disks with working sets of 1, 2, 4 and 8 units share a tier of 6, all read by zipf at
// the same rate. A unit is simUnit extents of one block.
const (
	simUnit        = 1024
	simSlots       = 6 * simUnit / simSlotBlocks
	simPeriodReads = 12_000 // of all disks together, per period
)

// load is a disk's reads.
type load struct {
	disk block.DiskID
	next func() block.ExtentID
}

func zipfLoad(seed uint64, disk, units int) *load {
	z := newZipf(seed+uint64(disk), units*simUnit)
	base := block.NewExtentID(block.SegmentID(disk)<<20, 0)
	return &load{block.DiskID(disk), func() block.ExtentID { return base + block.ExtentID(z.next()) }}
}

// scanLoad never reads anything twice.
func scanLoad(disk int) *load {
	id := block.NewExtentID(block.SegmentID(disk)<<20, 0)
	return &load{block.DiskID(disk), func() block.ExtentID { id++; return id }}
}

func simLoads(seed uint64, units ...int) (ls []*load) {
	for i, n := range units {
		ls = append(ls, zipfLoad(seed, i+1, n))
	}
	return ls
}

// play runs for some periods, each disk reading a quarter of simPeriodReads in each, and returns the
// misses of each disk.
func (m *sim) play(periods int, loads []*load) []int {
	misses := make([]int, len(loads))
	for range periods {
		for range simPeriodReads / 4 {
			for i, l := range loads {
				if !m.read(l.disk, l.next()) {
					misses[i]++
				}
			}
		}
		m.time = m.time.Add(sharePeriod)
	}
	return misses
}

func total(xs []int) (n int) {
	for _, x := range xs {
		n += x
	}
	return n
}

// lruSplit is the misses per period of disks that have parts of the tier to themselves, as LRU: those of
// an equal split, and those of the best one in twelfths.
func lruSplit(seed uint64, units ...int) (equal, best int) {
	const parts = 12
	misses := make([][parts + 1]int, len(units)) // by disk, by twelfths of the tier
	for d, n := range units {
		for p := 1; p <= parts; p++ {
			l := &lru{n: simSlots * simSlotBlocks * p / parts, at: map[block.ExtentID]*list.Element{}}
			load := zipfLoad(seed, d+1, n)
			const warm = 20_000
			for i := range warm + simPeriodReads {
				if !l.read(load.next()) && i >= warm {
					misses[d][p]++
				}
			}
			misses[d][p] /= 4
		}
		equal += misses[d][parts/len(units)]
	}
	least := misses[0] // of the first disks, by what they have together
	for _, m := range misses[1:] {
		var next [parts + 1]int
		for p := 2; p <= parts; p++ {
			next[p] = 1 << 30
			for q := 1; q < p; q++ {
				if least[q] > 0 || q > 0 {
					next[p] = min(next[p], least[q]+m[p-q])
				}
			}
		}
		next[1] = 1 << 30
		least = next
	}
	return equal, least[parts]
}

// TestSharesMoveByGhostHits has the steps themselves: who gives, who takes, how much, and when nothing moves.
func TestSharesMoveByGhostHits(t *testing.T) {
	for _, c := range []struct {
		name     string
		hits     []int // by disk
		from, to int   // 0: nothing moves
		step     float64
	}{
		{"a little more", []int{100, 110, 120, 130}, 1, 4, 0.01},
		{"more than four times", []int{100, 200, 500, 300}, 1, 3, 0.04},
		{"too alike", []int{100, 110, 120, 124}, 0, 0, 0},
		{"too few to tell", []int{0, 0, 0, 99}, 0, 0, 0},
		{"none in several: the largest of them gives", []int{0, 0, 400, 0}, 4, 3, 0.04},
	} {
		now := time.Unix(0, 0)
		var s shares
		s.init(func() time.Time { return now })
		s.use(1, 100)
		s.use(2, 200)
		s.use(3, 300)
		s.use(4, 400)
		s.fill()
		was := s.target
		for d, n := range c.hits {
			for range n {
				s.want(uint8(d+1), true)
			}
		}
		if s.target != was {
			t.Errorf("%s: moved before the period's end", c.name)
		}
		now = now.Add(sharePeriod)
		s.want(9, false)
		var sum float64
		for _, d := range s.disks {
			sum += s.target[d]
		}
		if sum < 0.999 || sum > 1.001 {
			t.Errorf("%s: targets add up to %f", c.name, sum)
		}
		// The newcomer took its floor from all.
		keep := (1 - shareFloor*5) / (1 - shareFloor*4)
		for d := 1; d <= 4; d++ {
			want := shareFloor + (was[d]-shareFloor)*keep
			switch d {
			case c.from:
				want -= c.step
			case c.to:
				want += c.step
			}
			if got := s.target[d]; got < want-0.001 || got > want+0.001 {
				t.Errorf("%s: disk %d has %.3f, want %.3f", c.name, d, got, want)
			}
		}
	}
}

func TestSharesHaveAFloorAndAreLent(t *testing.T) {
	now := time.Unix(0, 0)
	var s shares
	s.init(func() time.Time { return now })
	s.use(1, 500)
	s.use(2, 500)
	if s.over(1, 0) || s.over(2, 0) {
		t.Error("over a share before the tier is full")
	}
	s.fill()
	for range 100 {
		for range 200 {
			s.want(1, true)
			s.want(2, false)
		}
		now = now.Add(sharePeriod)
	}
	s.want(1, false)
	if got := s.target[2]; got < shareFloor-1e-9 || got > shareFloor+1e-9 {
		t.Errorf("disk 2 has %f, want the floor", got)
	}
	if s.over(1, 0) || !s.over(2, 0) || s.over(2, 490) {
		t.Error("of two equal halves, that of the disk at the floor is over its share, but for the slack")
	}
	// Disk 1 falls silent: disk 2 may have what it wants.
	for range 2 {
		now = now.Add(sharePeriod)
		s.want(2, false)
	}
	if s.over(2, 0) {
		t.Error("over its share though nobody else wants the room")
	}
}

// TestGhostOfOneDiskOutlivesTheScanOfAnother remembers a few names of one disk and then very many of another.
func TestGhostOfOneDiskOutlivesTheScanOfAnother(t *testing.T) {
	var g ghost
	g.init(16 * 8 * 1000) // 8000 cells
	for id := range block.ExtentID(2000) {
		g.add(id, 1)
	}
	for id := range block.ExtentID(100_000) {
		g.add(1<<40+id, 2)
	}
	kept, young := 0, 0
	for id := range block.ExtentID(2000) {
		k, y := g.take(id)
		if k {
			kept++
		}
		if y {
			young++
		}
		if again, _ := g.take(id); again {
			t.Fatal("there after it was taken")
		}
	}
	if kept < 1900 || young > kept/10 {
		t.Errorf("%d of 2000 names are left, %d of them young", kept, young)
	}
	last := 0
	for id := block.ExtentID(90_000); id < 100_000; id++ {
		if k, _ := g.take(1<<40 + id); k {
			last++
		}
	}
	if last < 5000 {
		t.Errorf("%d of the scan's last names are left: the cells are not used", last)
	}
}
