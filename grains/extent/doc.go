// Package extent counts what is alive in the stored segments, and keeps the extents that are not where
// their name says. It knows names, places and counts; trees and segments report to it.
//
// # Usage
//
// The segment usage table has one row per segment: what it is, where its shards are, and how much of it
// some tree still maps. Every stored block is in exactly one of three states:
//
//	live      mapped by a tree entry
//	trapped   not mapped, but another block of its extent is: it cannot be had back alone
//	dead      no block of its extent is mapped
//
//	Add: all blocks live ──Lost, part of an extent──► trapped ──Lost, the rest of it──► dead
//	                     └───Lost, a whole extent─────────────────────────────────────────┘
//
// An extent that is whole or dead costs one bit, and none while the whole segment is alive or dead; only
// one that is partly mapped has a number, the blocks it has left. Rows lie 128 to a chunk in order of
// their segment, and a Snapshot shares the chunks: the first change of each after it copies it.
//
// Invariants:
//   - live + trapped + dead blocks are the blocks stored, in every row.
//   - a count may be too high (a leak, that Recount finds), never too low: what would bring it there is
//     refused, reported as ErrDamaged, and the row then is neither dead nor a candidate until it is
//     counted anew.
//   - a segment is condemned only while nothing of it is alive, and removed only when condemned.
//
// Stored, the table is any number of blobs, each a stretch of rows, segments ascending across all of
// them. Integers are little-endian, varints are those of encoding/binary:
//
//	0       4         6       8          16     20      24     28
//	+-------+---------+-------+----------+------+-------+------+------------+-----------+-----+
//	| GDUS  | version | flags | incompat | rows | kinds | body | kinds ...  | rows ...  | crc |
//	+-------+---------+-------+----------+------+-------+------+------------+-----------+-----+
//
// version is 1, flags are 0, body is the length of kinds and rows in bytes, crc is CRC32C over
// everything before it. A kind is k, m (bytes) and k+m varints, the targets; 0 is a shard that is not
// stored. A row is varints except where a width is given:
//
//	segment minus the one before minus 1 (the first: the segment) | zigzag epoch minus the one before |
//	zigzag birth minus the one before | kind | state u8 | extents | blocks |
//	dead extents | live blocks | trapped blocks |
//	live bits, (extents+7)/8 bytes, slot 0 lowest   only if 0 < dead extents < extents
//	number of extents that are partly mapped, for each: slot minus the one before minus 1 | blocks left
//	number of overflow counts, for each: slot minus the one before minus 1 | zigzag count
//
// state has bit 0 for a segment with exceptions, 1 for a condemned one, 2 for a damaged row.
package extent
