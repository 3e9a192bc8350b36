package cache

import (
	"math"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"graindisk/block"
)

// shares apportions a full tier between disks. Each disk has a target, a part of all that is cached.
// Once per period the disk with the most fills that the ghost remembered, which a larger share would
// have made hits, takes 1 % of the tier from the one with the fewest, 4 % if it has four times as many.
// A scan has none, however many misses it has. Nothing is taken below the floor, and nothing moves
// on fewer than shareEventsMin. A disk is over its share only as long as others want the room: the
// targets of idle disks are lent out.
//
// Disks are told apart by the low byte of their number, so that an entry has room for it.
type shares struct {
	used  [256]atomic.Int64 // blocks in the index
	total atomic.Int64
	seen  [256]atomic.Bool
	wants [256]atomic.Uint32 // fills asked for in this period
	hits  [256]atomic.Uint32 // of these, remembered by the ghost
	limit [256]atomic.Uint64 // the part of total that a disk may have now, a float64
	full  atomic.Bool        // something was evicted: from here on limits hold

	mu      sync.Mutex
	now     func() time.Time
	started time.Time // of the period
	disks   []uint8   // with a target, in order of arrival
	target  [256]float64
}

const (
	sharePeriod    = 10 * time.Second
	shareStep      = 0.01
	shareStepMax   = 0.04 // if the ratio is above 4
	shareRatio     = 1.25 // of most to fewest, below which nothing moves
	shareEventsMin = 100
	shareFloor     = 0.02 // of the tier, as long as that leaves half of it to move
)

func (s *shares) init(now func() time.Time) {
	s.now, s.started = now, now()
}

// use counts blocks that came into the index, or left it.
func (s *shares) use(disk uint8, blocks int) {
	s.used[disk].Add(int64(blocks))
	s.total.Add(int64(blocks))
	if !s.seen[disk].Load() {
		s.arrive(disk)
	}
}

// want counts a fill that is asked for, remembered by the ghost or not.
func (s *shares) want(disk uint8, remembered bool) {
	s.wants[disk].Add(1)
	if remembered {
		s.hits[disk].Add(1)
	}
	if !s.seen[disk].Load() {
		s.arrive(disk)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if now := s.now(); now.Sub(s.started) >= sharePeriod {
		s.started = now
		s.rebalanceLocked()
	}
}

// over reports whether a disk has more than its share; slack is in blocks.
func (s *shares) over(disk uint8, slack int64) bool {
	if !s.full.Load() {
		return false
	}
	limit := math.Float64frombits(s.limit[disk].Load())
	return float64(s.used[disk].Load()-slack) > limit*float64(s.total.Load())
}

// low reports whether a disk has no more than the floor.
func (s *shares) low(disk uint8) bool {
	return float64(s.used[disk].Load()) <= shareFloor*float64(s.total.Load())
}

func (s *shares) floorLocked() float64 { return min(shareFloor, 0.5/float64(len(s.disks))) }

// arrive gives a new disk the floor, taken from the others in proportion.
func (s *shares) arrive(disk uint8) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.seen[disk].Swap(true) {
		return
	}
	s.disks = append(s.disks, disk)
	if len(s.disks) > 1 {
		s.target[disk] = s.floorLocked()
	}
	s.normLocked()
	s.limitLocked(func(d uint8) bool { return s.wants[d].Load() > 0 })
}

// fill notes that the tier is full: what the disks have now is where their targets start from.
func (s *shares) fill() {
	if s.full.Load() {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	total := max(1, s.total.Load())
	for _, d := range s.disks {
		s.target[d] = float64(s.used[d].Load()) / float64(total)
	}
	s.normLocked()
	s.limitLocked(func(d uint8) bool { return s.wants[d].Load() > 0 })
	s.full.Store(true)
}

// normLocked makes the targets at least the floor and their sum 1.
func (s *shares) normLocked() {
	floor, above := s.floorLocked(), 0.0
	for _, d := range s.disks {
		s.target[d] = max(s.target[d], floor)
		above += s.target[d] - floor
	}
	spare := 1 - floor*float64(len(s.disks))
	for _, d := range s.disks {
		part := 1 / float64(len(s.disks))
		if above > 0 {
			part = (s.target[d] - floor) / above
		}
		s.target[d] = floor + spare*part
	}
}

// rebalanceLocked ends a period: at most one step from one disk to one other.
func (s *shares) rebalanceLocked() {
	var wants, hits [256]uint32
	for _, d := range s.disks {
		wants[d], hits[d] = s.wants[d].Swap(0), s.hits[d].Swap(0)
	}
	if s.full.Load() && len(s.disks) > 1 {
		s.stepLocked(&hits)
	}
	s.limitLocked(func(d uint8) bool { return wants[d] > 0 })
}

func (s *shares) stepLocked(hits *[256]uint32) {
	floor := s.floorLocked()
	to := slices.MaxFunc(s.disks, func(a, b uint8) int { return int(hits[a]) - int(hits[b]) })
	from, found := uint8(0), false
	for _, d := range s.disks {
		better := !found || hits[d] < hits[from] || hits[d] == hits[from] && s.target[d] > s.target[from]
		if d != to && s.target[d] > floor && better {
			from, found = d, true
		}
	}
	if !found || hits[to] < shareEventsMin || float64(hits[to]) < shareRatio*float64(hits[from]) {
		return
	}
	step := shareStep
	if hits[to] > 4*hits[from] {
		step = shareStepMax
	}
	step = min(step, s.target[from]-floor)
	s.target[from] -= step
	s.target[to] += step
}

// limitLocked lends the targets of idle disks to the active ones.
func (s *shares) limitLocked(active func(uint8) bool) {
	sum := 0.0
	for _, d := range s.disks {
		if active(d) {
			sum += s.target[d]
		}
	}
	for _, d := range s.disks {
		limit := s.target[d]
		if active(d) {
			limit /= sum
		} else {
			limit /= sum + s.target[d]
		}
		s.limit[d].Store(math.Float64bits(limit))
	}
}

// Share is what one disk has of the tier, or the disks whose numbers share a low byte.
type Share struct {
	Disk   uint8   // the low byte of its number
	Bytes  int64   // cached
	Target float64 // its part of all that is cached, as apportioned; 0 until the tier is full for the first time
}

// Shares lists the disks that have a share, in order of arrival.
func (c *Cache) Shares() []Share {
	s := &c.shares
	s.mu.Lock()
	defer s.mu.Unlock()
	list := make([]Share, len(s.disks))
	for i, d := range s.disks {
		list[i] = Share{Disk: d, Bytes: s.used[d].Load() * block.Size}
		if s.full.Load() {
			list[i].Target = s.target[d]
		}
	}
	return list
}
