// Package block holds the small vocabulary every other package speaks: block addresses, the
// names of disks, segments and extents, and the one checksum. It imports nothing of the project.
//
// An extent name says where the extent was born and is never changed or reused:
//
//	63                    16 15         0
//	+-----------------------+-----------+
//	|    segment number     |   slot    |  ExtentID
//	+-----------------------+-----------+
package block

import (
	"fmt"
	"hash/crc32"
)

// Size is the smallest unit the gateway tracks, in bytes.
const Size = 4096

// LBA is a block number within a disk; times Size it is a byte offset.
type LBA uint64

// DiskID names one version of a disk within its pool; it is never reused in the pool's life.
// A fresh disk is its own first version. 0 names no disk.
type DiskID uint32

// SegmentID numbers a segment within its pool, in [1, 2^48); it is never reused.
type SegmentID uint64

// SegmentMax is one more than the largest segment number.
const SegmentMax SegmentID = 1 << 48

// ExtentsMax is how many extents one segment may hold; a slot is below it.
const ExtentsMax = 32768

// ExtentID names a stored extent: the segment it was born in and its slot there.
type ExtentID uint64

// NewExtentID returns the name of the extent born in slot of seg.
func NewExtentID(seg SegmentID, slot int) ExtentID {
	return ExtentID(uint64(seg)<<16 | uint64(slot))
}

// Segment is the segment the extent was born in.
func (e ExtentID) Segment() SegmentID { return SegmentID(e >> 16) }

// Slot is the extent's place in that segment's index.
func (e ExtentID) Slot() int { return int(e & 0xffff) }

// String prints the name as "segment.slot".
func (e ExtentID) String() string { return fmt.Sprintf("%d.%d", e.Segment(), e.Slot()) }

// TargetID numbers a target within its pool, from 1; it is never reused. 0 names no target.
type TargetID uint16

// Castagnoli is the polynomial of every checksum the project stores.
var Castagnoli = crc32.MakeTable(crc32.Castagnoli)

// CRC is the CRC32C of p.
func CRC(p []byte) uint32 { return crc32.Checksum(p, Castagnoli) }
