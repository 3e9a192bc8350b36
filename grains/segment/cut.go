package segment

import (
	"encoding/binary"
	"fmt"
	"slices"

	"graindisk/block"
)

const (
	cutMagic       = "GDCR"
	cutHeaderBytes = 64
	cutBytesMin    = cutHeaderBytes + 2 + crcBytes

	diskNameBytesMax = 255
	diskBytesMin     = 2 // id, bits
	runBytesMin      = 2 // gap, blocks
)

// CutRecord is what one cut did to the pool, stored in every shard of the cut's last segment. Cuts
// applied in order, each as below, give the maps of every disk version from shards alone:
//
// For each disk version in Disks or in an index of the cut's segments, in ascending order of DiskID:
//  1. if Meta names a version not seen before, it starts empty, or with the map of Meta.Parent;
//  2. Unmaps become holes;
//  3. the extents of the cut's segments are entered (of two on one block the higher Seq wins);
//  4. the rest of Meta takes effect: name, size, flags; with DiskDropped the whole version becomes a hole.
//
// A Parent is a lower DiskID, so it is complete when step 1 copies it. All of it may be applied again.
//
// A record with Gone speaks of older cuts too: what it names there need not be stored any more.
type CutRecord struct {
	Epoch   uint64 `json:"epoch"` // of the segment that holds the record
	Cut     uint64 `json:"cut"`   // from 1
	PrevCut uint64 `json:"prev_cut"`
	PrevCRC uint32 `json:"prev_crc"` // CRC() of the record of PrevCut; 0 for the first
	Horizon uint64 `json:"horizon"`  // log sequence up to which the cloud now holds everything
	Time    int64  `json:"time"`     // seconds since 1970 at sealing; for people only
	// Segments are the cut's segments in order without the last, the one that holds this record and
	// whose own sizes are not known while it is written: see AllSegments.
	Segments []Info       `json:"segments"`
	Disks    []DiskChange `json:"disks"` // ascending by Disk, each once
	Gone     *Gone        `json:"gone,omitempty"`
}

// DiskChange is the net effect of a cut on one disk version, its extents aside.
type DiskChange struct {
	Disk   block.DiskID `json:"disk"`
	Unmaps []Run        `json:"unmaps,omitempty"` // ascending, disjoint
	Meta   *DiskMeta    `json:"meta,omitempty"`   // nil: the disk table's row stays as it is
}

// Run is the half-open run of blocks [LBA, LBA+Blocks); Blocks is at least 1.
type Run struct {
	LBA    block.LBA `json:"lba"`
	Blocks uint64    `json:"blocks"`
}

// DiskMeta is a row of the disk table, written whole.
type DiskMeta struct {
	Name      string       `json:"name"` // at most 255 bytes
	SizeBytes uint64       `json:"size_bytes"`
	Flags     uint32       `json:"flags"`            // DiskDeleted and bits the pool gives a meaning
	Parent    block.DiskID `json:"parent,omitempty"` // the version this one started from; 0 = empty
	// BaseVersion is room for a version whose missing blocks are read elsewhere (migration); 0.
	BaseVersion uint64 `json:"base_version,omitempty"`
	// DeletedAt is when a version with DiskDeleted was deleted, in seconds since 1970; else 0.
	DeletedAt int64 `json:"deleted_at,omitempty"`
}

// Bits of DiskMeta.Flags.
const (
	// DiskDeleted takes the version out of the table: its name is free, its map is kept.
	DiskDeleted = 1
	// DiskDropped, with DiskDeleted, drops the map: all of the version is a hole from here on, what the same
	// cut holds of it included. The row stays, to tell that there was such a disk.
	DiskDropped = 2
)

// AllSegments is every segment of the cut, last being the one the record was read from.
func (r *CutRecord) AllSegments(last Info) []Info {
	return append(slices.Clone(r.Segments), last)
}

// CRC is the checksum of the encoding: what the next record carries as PrevCRC. It is also the last
// field of the encoding.
func (r *CutRecord) CRC() uint32 {
	b := r.Append(nil)
	return le.Uint32(b[len(b)-crcBytes:])
}

// cutFlagDeletedAt is the flag of a record whose rows say when they were deleted; those of a record without have no
// such field, so that what the first releases wrote stays as it is.
const cutFlagDeletedAt = 2

// Bits of a disk change.
const (
	changeUnmaps = 1 << iota
	changeMeta
	changeUnknown
)

// Append adds the encoding to b. The record must be valid: see Builder.Seal.
func (r *CutRecord) Append(b []byte) []byte {
	start := len(b)
	var flags uint16
	if r.Gone != nil {
		flags |= cutFlagGone
	}
	for _, d := range r.Disks {
		if d.Meta != nil && d.Meta.DeletedAt != 0 {
			flags |= cutFlagDeletedAt
		}
	}
	b = appendPreamble(b, cutMagic, flags)
	b = le.AppendUint64(b, r.Epoch)
	b = le.AppendUint64(b, r.Cut)
	b = le.AppendUint64(b, r.PrevCut)
	b = le.AppendUint64(b, r.Horizon)
	b = le.AppendUint64(b, uint64(r.Time))
	b = le.AppendUint32(b, r.PrevCRC)
	b = le.AppendUint32(b, 0)
	b = binary.AppendUvarint(b, uint64(len(r.Segments)))
	for _, i := range r.Segments {
		b = i.Append(b)
	}
	b = binary.AppendUvarint(b, uint64(len(r.Disks)))
	var prev block.DiskID
	for _, d := range r.Disks {
		b = d.append(b, prev, flags)
		prev = d.Disk
	}
	if r.Gone != nil {
		b = r.Gone.append(b)
	}
	return seal(b, start)
}

func (d *DiskChange) append(b []byte, prev block.DiskID, flags uint16) []byte {
	b = binary.AppendUvarint(b, uint64(d.Disk-prev))
	var bits uint8
	if len(d.Unmaps) > 0 {
		bits |= changeUnmaps
	}
	if d.Meta != nil {
		bits |= changeMeta
	}
	b = append(b, bits)
	if len(d.Unmaps) > 0 {
		b = binary.AppendUvarint(b, uint64(len(d.Unmaps)))
		var end uint64
		for _, u := range d.Unmaps {
			b = binary.AppendUvarint(b, uint64(u.LBA)-end)
			b = binary.AppendUvarint(b, u.Blocks)
			end = uint64(u.LBA) + u.Blocks
		}
	}
	if m := d.Meta; m != nil {
		b = binary.AppendUvarint(b, uint64(len(m.Name)))
		b = append(b, m.Name...)
		b = binary.AppendUvarint(b, m.SizeBytes)
		b = binary.AppendUvarint(b, uint64(m.Flags))
		b = binary.AppendUvarint(b, uint64(m.Parent))
		b = binary.AppendUvarint(b, m.BaseVersion)
		if flags&cutFlagDeletedAt != 0 {
			b = binary.AppendUvarint(b, uint64(m.DeletedAt))
		}
	}
	return b
}

// DecodeCutRecord decodes exactly one record. The result does not alias b.
func DecodeCutRecord(b []byte) (*CutRecord, error) {
	flags, c, err := open(b, "cut record", cutMagic, cutFlagGone|cutFlagDeletedAt, cutBytesMin)
	if err != nil {
		return nil, err
	}
	r := &CutRecord{Epoch: c.u64(), Cut: c.u64(), PrevCut: c.u64(), Horizon: c.u64(), Time: int64(c.u64()), PrevCRC: c.u32()}
	c.zeroes(4)
	if n := c.count(1<<30, infoBytesMin); n > 0 {
		r.Segments = make([]Info, 0, min(n, 1024)) // an Info in memory outweighs its encoding
		for range n {
			if r.Segments = append(r.Segments, c.info()); c.err != nil {
				return nil, c.err
			}
		}
	}
	if n := c.count(1<<30, diskBytesMin); n > 0 {
		r.Disks = make([]DiskChange, 0, min(n, 1024))
		for range n {
			if r.Disks = append(r.Disks, c.diskChange(r.Disks, flags)); c.err != nil {
				return nil, c.err
			}
		}
	}
	if flags&cutFlagGone != 0 {
		r.Gone = c.gone()
	}
	if flags&cutFlagDeletedAt != 0 && !slices.ContainsFunc(r.Disks, func(d DiskChange) bool { return d.Meta != nil && d.Meta.DeletedAt != 0 }) {
		c.fail("no row says when it was deleted, where one is meant to")
	}
	if err := c.end(); err != nil {
		return nil, err
	}
	if err := r.validate(); err != nil {
		return nil, fmt.Errorf("%w: %w", err, ErrDamaged)
	}
	return r, nil
}

// diskChange reads the inverse of DiskChange.append; before are those already read.
func (c *cursor) diskChange(before []DiskChange, flags uint16) DiskChange {
	var d DiskChange
	if len(before) > 0 {
		d.Disk = before[len(before)-1].Disk
	}
	d.Disk += block.DiskID(c.positive(uint64(1<<32 - 1 - d.Disk)))
	bits := c.u8()
	if bits >= changeUnknown {
		c.fail("disk change bits %#x", bits)
	}
	if bits&changeUnmaps != 0 {
		n := c.count(1<<30, runBytesMin)
		if n == 0 {
			c.fail("no unmaps where some are meant")
		}
		d.Unmaps = make([]Run, n)
		var end uint64
		for i := range d.Unmaps {
			lba := end + c.uvarint(lbaMax)
			blocks := c.positive(lbaMax)
			d.Unmaps[i] = Run{LBA: block.LBA(lba), Blocks: blocks}
			if end = lba + blocks; end > lbaMax {
				c.fail("unmap of %d blocks at %d", blocks, lba)
			}
		}
	}
	if bits&changeMeta != 0 {
		d.Meta = &DiskMeta{
			Name:        string(c.take(int(c.uvarint(diskNameBytesMax)))),
			SizeBytes:   c.uvarint(1<<64 - 1),
			Flags:       uint32(c.uvarint(1<<32 - 1)),
			Parent:      block.DiskID(c.uvarint(1<<32 - 1)),
			BaseVersion: c.uvarint(1<<64 - 1),
		}
		if flags&cutFlagDeletedAt != 0 {
			d.Meta.DeletedAt = int64(c.uvarint(1<<63 - 1))
		}
	}
	return d
}

// validate checks what Append relies on.
func (r *CutRecord) validate() error {
	if r.Cut == 0 || r.PrevCut >= r.Cut {
		return fmt.Errorf("cut record: cut %d follows cut %d", r.Cut, r.PrevCut)
	}
	for _, i := range r.Segments {
		if err := i.validate(); err != nil {
			return fmt.Errorf("cut record: %w", err)
		}
	}
	var prev block.DiskID
	for _, d := range r.Disks {
		if d.Disk <= prev {
			return fmt.Errorf("cut record: disk %d listed after disk %d", d.Disk, prev)
		}
		prev = d.Disk
		var end uint64
		for _, u := range d.Unmaps {
			if u.Blocks == 0 || u.Blocks > lbaMax || uint64(u.LBA) < end || uint64(u.LBA) > lbaMax-u.Blocks {
				return fmt.Errorf("cut record: disk %d: unmap of %d blocks at %d, after one that ends at %d", d.Disk, u.Blocks, u.LBA, end)
			}
			end = uint64(u.LBA) + u.Blocks
		}
		if m := d.Meta; m != nil && m.DeletedAt < 0 {
			return fmt.Errorf("cut record: disk %d was deleted at %d", d.Disk, m.DeletedAt)
		}
		if m := d.Meta; m != nil && (m.Parent >= d.Disk || len(m.Name) > diskNameBytesMax) {
			return fmt.Errorf("cut record: disk %d: parent %d, name of %d bytes", d.Disk, m.Parent, len(m.Name))
		}
	}
	if r.Gone != nil {
		return r.Gone.validate(r.Cut)
	}
	return nil
}
