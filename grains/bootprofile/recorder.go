package bootprofile

import (
	"sync"
	"sync/atomic"

	"graindisk/block"
)

// Recorder takes down which grains of one disk are read, from the first read until it is halted or full.
// All methods are safe for concurrent use.
type Recorder struct {
	grain int64 // blocks
	most  int   // grains
	begun func()
	off   atomic.Bool

	mu     sync.Mutex
	grains map[int64]struct{}
	ranges []Range
	over   chan struct{} // closed with off
}

// NewRecorder makes a recorder of grains of so many blocks, at most bytesMax bytes of them. begun is called
// at the first read, once, and must not wait.
func NewRecorder(grainBlocks int, bytesMax int64, begun func()) *Recorder {
	return &Recorder{
		grain: int64(grainBlocks), most: int(bytesMax / (int64(grainBlocks) * block.Size)), begun: begun, over: make(chan struct{}),
	}
}

// Note takes down a read of n bytes at off. Once recording is over it costs next to nothing.
func (r *Recorder) Note(off, n int64) {
	if n <= 0 || r.off.Load() {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.off.Load() {
		return
	}
	if r.grains == nil {
		r.grains = map[int64]struct{}{}
		r.begun()
	}
	bytes := r.grain * block.Size
	for g := off / bytes; g <= (off+n-1)/bytes; g++ {
		if !r.addLocked(g) {
			r.endLocked()
			return
		}
	}
}

// addLocked takes down a grain; false if there is no room.
func (r *Recorder) addLocked(g int64) bool {
	if _, ok := r.grains[g]; ok {
		return true
	}
	if len(r.grains) >= r.most {
		return false
	}
	first := block.LBA(g * r.grain)
	if n := len(r.ranges); n > 0 && r.ranges[n-1].end() == first {
		r.ranges[n-1].Blocks += uint32(r.grain)
	} else if n == RangesMax {
		return false
	} else {
		r.ranges = append(r.ranges, Range{first, uint32(r.grain)})
	}
	r.grains[g] = struct{}{}
	return true
}

// Over is closed when recording has ended, by Halt or for want of room.
func (r *Recorder) Over() <-chan struct{} { return r.over }

// Halt ends recording; what was read can still be taken.
func (r *Recorder) Halt() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.endLocked()
}

func (r *Recorder) endLocked() {
	if !r.off.Swap(true) {
		close(r.over)
	}
}

// Take ends recording and returns what was read, each grain once, in the order of reading. A second call returns nothing.
func (r *Recorder) Take() []Range {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.endLocked()
	ranges := r.ranges
	r.ranges, r.grains = nil, map[int64]struct{}{}
	return ranges
}
