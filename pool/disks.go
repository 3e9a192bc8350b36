package pool

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"sort"
	"time"

	"graindisk/block"
	"graindisk/grains/segment"
	"graindisk/vdisk"
	"graindisk/vdisk/densetree"
	"graindisk/writeback"
)

// op is the payload of an OP record in the log, as JSON: the row of the disk table, whole, that the
// record's disk has from here on. One that does more than make the disk is a Row: the first releases know
// only Meta, and refuse what they would take for nothing.
type op struct {
	Meta *segment.DiskMeta `json:"meta,omitempty"`
	Row  *segment.DiskMeta `json:"row,omitempty"`
}

func decodeOp(b []byte) (segment.DiskMeta, error) {
	var o op
	if err := json.Unmarshal(b, &o); err != nil {
		return segment.DiskMeta{}, fmt.Errorf("operation record: %w", err)
	}
	if o.Row != nil {
		return *o.Row, nil
	}
	if o.Meta == nil {
		return segment.DiskMeta{}, fmt.Errorf("operation record %q: %w", b, writeback.ErrNewer)
	}
	return *o.Meta, nil
}

// CreateDisk adds a disk of size bytes, empty, and returns it once its creation is stable. The name
// and size have been checked by the caller.
func (p *Pool) CreateDisk(ctx context.Context, name string, size int64) (*vdisk.Disk, error) {
	d, err := p.createDisk(ctx, name, size)
	return d, p.answer(ctx, "create", name, err)
}

func (p *Pool) createDisk(ctx context.Context, name string, size int64) (*vdisk.Disk, error) {
	if err := p.gate(); err != nil {
		return nil, err
	}
	if err := p.beginOp(ctx); err != nil {
		return nil, err
	}
	defer p.endOp()
	p.mu.Lock()
	_, taken := p.disks[name]
	id := p.nextDisk
	p.mu.Unlock()
	if taken {
		return nil, fmt.Errorf("create disk %s: %w; choose another name", name, ErrExists)
	}
	meta := segment.DiskMeta{Name: name, SizeBytes: uint64(size)}
	payload, err := json.Marshal(op{Meta: &meta})
	if err != nil {
		return nil, err
	}
	// The disk can be found, and written to, only when its creation is on record.
	// Once it is, only a failed log is an error: the number is used.
	ctx = context.WithoutCancel(ctx)
	if err := p.appendOp(ctx, id, payload); err != nil {
		return nil, fmt.Errorf("create disk %s: %w", name, err)
	}
	p.addDisk(id, meta)
	p.openDisk(id, meta)
	return p.Disk(name)
}

// appendOp makes an operation stable in the log.
func (p *Pool) appendOp(ctx context.Context, id block.DiskID, payload []byte) error {
	_, err := p.log.Append(ctx, []writeback.Record{{Kind: writeback.Op, Disk: id, Data: payload}})
	if err == nil {
		err = p.log.Sync(ctx)
	}
	return err
}

// addDisk takes in a row of the disk table as the maps or the log have it. Once the pool serves, the table is ahead
// of the maps, which come with each cut, and only what it does not know is taken in.
func (p *Pool) addDisk(id block.DiskID, meta segment.DiskMeta) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.nextDisk = max(p.nextDisk, id+1)
	if p.trees[id] == nil {
		p.trees[id] = densetree.New(p.treeOptions())
	}
	if _, known := p.rows[id]; !known || !p.serving {
		p.rows[id] = meta
	}
}

// nameDisks makes the disks that the table has at the end of recovery; from here on the pool changes it.
func (p *Pool) nameDisks() {
	p.mu.Lock()
	rows := maps.Clone(p.rows)
	p.serving = true
	p.mu.Unlock()
	for _, id := range slices.Sorted(maps.Keys(rows)) {
		if rows[id].Flags&segment.DiskDeleted == 0 {
			p.openDisk(id, rows[id])
		}
	}
}

// openDisk makes a disk of the table one that can be found.
func (p *Pool) openDisk(id block.DiskID, meta segment.DiskMeta) {
	d := vdisk.New(vdisk.Options{
		ID: id, Name: meta.Name, Size: int64(meta.SizeBytes), Log: p.log, Tree: p.tree(id), Extents: p, Gate: p.gate, Hold: p.hold, MendMap: p.mendMap,
		Reads: p.recordBoot(id),
	})
	p.mu.Lock()
	defer p.mu.Unlock()
	p.disks[meta.Name] = d
}

func (p *Pool) treeOptions() densetree.Options {
	return densetree.Options{
		Store: p.runs, Level0Max: p.o.mapLevel0, RunMax: p.o.mapRun,
		NextRunID: func() uint64 { return p.runID.Add(1) }, Guard: p.maps.RLocker(), Hold: &p.replaying,
		MergeFailed: p.mergeFailed, Lost: p.lost,
	}
}

// tree is the map of a disk's published blocks; nil if there is no such disk.
func (p *Pool) tree(id block.DiskID) *densetree.Tree {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.trees[id]
}

// Disk finds a disk by name.
func (p *Pool) Disk(name string) (*vdisk.Disk, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	d := p.disks[name]
	if d == nil {
		return nil, fmt.Errorf("disk %s: %w", name, ErrNoDisk)
	}
	return d, nil
}

// DiskInfo describes a disk to people and programs.
type DiskInfo struct {
	Name                 string  `json:"name"`
	ID                   uint32  `json:"id"`
	Pool                 string  `json:"pool"`
	SizeBytes            int64   `json:"size_bytes"`
	UnpublishedBytes     int64   `json:"unpublished_bytes"`
	UnpublishedAgeSecond float64 `json:"unpublished_age_seconds"`
	PublishedCut         uint64  `json:"published_cut"`
	Epoch                uint64  `json:"epoch"`
}

// Disks lists the disks by name.
func (p *Pool) Disks() []DiskInfo {
	p.mu.Lock()
	ds := make([]*vdisk.Disk, 0, len(p.disks))
	for _, d := range p.disks {
		ds = append(ds, d)
	}
	p.mu.Unlock()
	sort.Slice(ds, func(i, j int) bool { return ds[i].Name() < ds[j].Name() })
	out := make([]DiskInfo, len(ds))
	for i, d := range ds {
		out[i] = p.Describe(d)
	}
	return out
}

// Describe reports on one disk.
func (p *Pool) Describe(d *vdisk.Disk) DiskInfo {
	u := p.log.UnpublishedOf(d.ID())
	v := p.value()
	info := DiskInfo{
		Name: d.Name(), ID: uint32(d.ID()), Pool: p.o.Name, SizeBytes: d.Size(),
		UnpublishedBytes: u.Bytes, UnpublishedAgeSecond: age(u), PublishedCut: v.Cut, Epoch: p.epoch.Load(),
	}
	return info
}

// age is the age of the oldest unpublished record in seconds; 0 if there is none.
func age(u writeback.Dirty) float64 {
	if u.Oldest.IsZero() {
		return 0
	}
	return time.Since(u.Oldest).Seconds()
}
