package writeback

import "graindisk/block"

// StateRange is a range of blocks, not empty, of which the log knows the same.
type StateRange struct {
	State State
	End   block.LBA // it begins where the one before it ends
}

// statesStep is how many runs and holes States looks at under the lock in one call: some 100 µs.
const statesStep = 1024

// States fills out with what the log knows of the blocks from lba on, newest first, and returns how many
// ranges it filled in: at least one, neighbours differ, the last ends at end or before. It needs a step for
// each run and hole in the range, not for each block, and ends early rather than keep writers waiting.
// lba is below end. It waits for no I/O. Safe for concurrent use.
func (l *Log) States(disk block.DiskID, lba, end block.LBA, out []StateRange) (n int) {
	l.ensureIndex()
	l.idx.RLock()
	defer l.idx.RUnlock()
	for step := 0; step < statesStep && lba < end; step++ {
		var state State
		state, lba = l.stateLocked(disk, lba, end)
		if n > 0 && out[n-1].State == state {
			out[n-1].End = lba
			continue
		}
		if n == len(out) {
			break
		}
		out[n] = StateRange{state, lba}
		n++
	}
	return n
}

// stateLocked is what the log knows of block lba, and up to where, at most end, it is the same for one
// reason.
func (l *Log) stateLocked(disk block.DiskID, lba, end block.LBA) (State, block.LBA) {
	for i := len(l.gens) - 1; i >= 0; i-- {
		d := l.gens[i].disks[disk]
		if d == nil {
			continue
		}
		var state State
		if state, end = d.state(lba, end); state != None {
			return state, end
		}
	}
	return None, end
}

// state is stateLocked for one generation: None up to where it begins to know something.
func (d *diskIndex) state(lba, end block.LBA) (State, block.LBA) {
	here := None
	d.data.visit(lba, end, func(r run) bool {
		if r.lba() <= lba {
			here, end = Present, min(end, r.end())
		} else {
			end = r.lba() // visit tells of runs before end only
		}
		return false
	})
	if here == Present {
		return Present, end
	}
	d.holes.Descend(lba, func(_, e block.LBA) bool {
		if e > lba {
			here, end = Hole, min(end, e)
		}
		return false
	})
	if here == None {
		d.holes.Ascend(lba+1, func(s, _ block.LBA) bool {
			end = min(end, s)
			return false
		})
	}
	return here, end
}
