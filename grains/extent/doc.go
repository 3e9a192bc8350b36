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
//
// # Exceptions
//
// A name without an entry is an extent where its name says, with one reference. The table of exceptions
// has the others: moved to another place, of the same content as another name, or with more references.
// A name resolves in at most two steps:
//
//	name ──Same──► canonical name ──Moved──► place          a canonical name is never Same itself
//
// A name that is Same holds one reference to its canonical name, whose own references stay apart. The
// table does not count blocks: who drops the last reference tells the usage table of the loss.
//
// Entries lie in memory, in a cuckoo hash; those that were not used lately can be spilled to runs, sorted
// by name. What is in memory supersedes the runs, a newer run the older ones; an entry that says what no
// entry would say stands there only to hide one below. A checkpoint is what Save writes, a run as well,
// with the runs it names; replaying Records above it brings each name to the last state that was logged,
// whatever it was before.
//
// A run is pages, then what is kept of it in memory:
//
//	+-----------+-------+--------+---------+      +---------+-----+
//	| pages ... | index | filter | trailer |      | entries | crc |  a page, 1 KiB and a bit
//	+-----------+-------+--------+---------+      +---------+-----+
//
//	0       4         6       8          16        24      28      32       36    40
//	+-------+---------+-------+----------+---------+-------+-------+--------+-----+
//	| GDXR  | version | flags | incompat | entries | pages | index | filter | crc |  trailer
//	+-------+---------+-------+----------+---------+-------+-------+--------+-----+
//
// version is 1, flags are 0, index and filter are their lengths in bytes; crc is CRC32C over index,
// filter and the trailer before it, that of a page over its entries. An entry:
//
//	varint name minus the one before minus 1 (the first of a page: 0, the index has it) | tag u8 |
//	zigzag To minus name, unless Plain | zigzag references minus 1, if tag bit 3
//
// tag has the kind in bits 0-1 (0 Plain, 1 Moved, 2 Same), bit 2 for a canonical name, bit 3 if there is
// not one reference. The index has two varints per page: its first name minus that of the page before
// (the first: the name), and its length. The filter is a Bloom filter of little-endian 64-bit words.
//
// A Record is a varint, the name, and two states, old and new, each a tag as above without bit 3, a
// varint To unless Plain, and a varint of the references; a name that has ended is 0 and 0.
package extent
