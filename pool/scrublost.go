package pool

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"

	"graindisk/block"
	"graindisk/grains/segment"
	"graindisk/vdisk/densetree"
)

// lostRanges are the blocks of disks that map what an exam could not restore, in order, joined where they touch. Extents
// that nothing maps any more are no loss. A version of a disk that shares an extent has it under the LBA that it was
// written to; without an index, all maps are searched. Pages of the maps that are not here are waited for.
func (p *Pool) lostRanges(ctx context.Context, info segment.Info, x *segment.Exam) []DamagedRange {
	p.mu.Lock()
	trees, names, sizes := maps.Clone(p.trees), map[block.DiskID]string{}, map[block.DiskID]int64{}
	for name, d := range p.disks {
		names[d.ID()], sizes[d.ID()] = name, d.Size()
	}
	p.mu.Unlock()
	var all []DamagedRange
	for _, id := range slices.Sorted(maps.Keys(trees)) {
		name, ok := names[id]
		if !ok {
			name = fmt.Sprintf("#%d", id)
		}
		var es []densetree.Entry
		look := func(lba block.LBA, blocks uint64, lost func(block.ExtentID) bool) {
			err := p.lookup(ctx, trees[id], lba, blocks, func(e densetree.Entry) bool {
				if e.Kind == densetree.Data && lost(e.Extent) {
					es = append(es, e)
				}
				return true
			})
			if err != nil {
				p.o.Log.Error("map not read, so some of what is lost may not be told", "pool", p.o.Name, "disk", name, "err", err)
			}
		}
		if x.Index == nil {
			look(0, uint64(sizes[id])/block.Size, func(e block.ExtentID) bool { return e.Segment() == info.ID })
		} else {
			for _, slot := range x.Lost {
				want := block.NewExtentID(info.ID, slot)
				look(x.Index.Entries[slot].LBA, uint64(x.Index.Entries[slot].Blocks), func(e block.ExtentID) bool { return e == want })
			}
		}
		all = append(all, joinRanges(name, es)...)
	}
	return all
}

func joinRanges(disk string, es []densetree.Entry) (out []DamagedRange) {
	slices.SortFunc(es, func(a, b densetree.Entry) int { return cmp.Compare(a.LBA, b.LBA) })
	for _, e := range es {
		if n := len(out); n > 0 && out[n-1].LBA+block.LBA(out[n-1].Blocks) == e.LBA {
			out[n-1].Blocks += e.Blocks
			continue
		}
		out = append(out, DamagedRange{disk, e.LBA, e.Blocks})
	}
	return out
}
