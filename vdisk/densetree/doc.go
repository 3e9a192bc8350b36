// Package densetree is the logical map of one disk version: LBA range to stored extent, hole or
// base. Level 0 is in memory; each level below is a row of immutable sorted runs in files of the tier
// and may hold 4 times as many entries as the one above. Where levels overlap, the upper one wins.
//
//	level 0   chunks     ▪▪  ▪      ▪▪▪        in memory, newest; at most Level0Max entries and an
//	                                           eighth of what lies below
//	frozen    runs       ▪▪▪ ▪▪▪▪  ▪▪▪ ▪▪      in memory: the level 0 before, while it is being merged
//	level 1   runs      ▬▬▬▬▬ ▬▬▬▬    ▬▬▬▬▬    in files, ≤ Level0Max · 4
//	level 2   runs    ▬▬▬▬▬▬▬▬▬▬▬▬▬▬▬▬▬▬▬▬▬▬   in files, ≤ Level0Max · 16
//
// A full level 0 is frozen, a new one takes over, and a goroutine merges the frozen one into level 1,
// then, where a level has become too large, one run of it into the next, the runs taking turns. A
// merge rewrites the runs that its input overlaps and any small run (below half of RunMax) beside
// them; all other runs stay, so a checkpoint that stored them need not store them again. Merges read
// and write a few pages at a time. Holes stay in the lowest level too, since a tree may lie over another.
//
// Level 0, the rows and the runs are never changed, only replaced, so that a lookup or a snapshot takes
// hold of them in no time and no merge disturbs it. Invariants:
//   - A file is stable, its name too, before any tree shows the run in it. It is removed when no tree,
//     lookup or snapshot holds the run and the newest local checkpoint does not name it. A crash leaves
//     orphans; the next open removes them.
//   - Of a partial run that holds for the head alone: each page is in the file if its checksum says so, and
//     stored elsewhere as well until all of them are stable here. No merge reads a partial run. A lookup that
//     needs a page which is not here fails with a PageError that has the run (PageError.Partial); it never waits.
//   - Every block that is put is mapped or has been told lost, or lies hidden below a newer entry that
//     no merge has brought down to it yet. The content changes and Lost is told under Options.Guard, so
//     that a checkpoint of both at one moment loses and doubles nothing.
//   - No entry is on two levels: a merge that puts a part of its work in place takes that part of its
//     input away at the same moment. So a merge may fail, or the process die, at any point, others may
//     come before it is done again, and still nothing is told lost twice.
//
// A run is encoded as below, in a file of the tier, a part of a published checkpoint or, if it is
// one of level 0, a local checkpoint; integers are little-endian, varints are those of encoding/binary.
//
//	0       4         6       8          16   24      28      32      40     48     52      56          56+8n
//	+-------+---------+-------+----------+----+-------+-------+-------+------+------+-------+-----------+-----+
//	| GDRN  | version | flags | incompat | id | level | count | first | last | body | pages | first ... | crc |
//	+-------+---------+-------+----------+----+-------+-------+-------+------+------+-------+-----------+-----+
//	followed by zeroes up to a multiple of 4096, then the pages, each of 4096 bytes:
//	0    8       16   20      22         24                      4092-2r    4092
//	+----+-------+----+-------+----------+---------+------+------+----------+-----+
//	| id | first | no | count | restarts | entries | zero | restart offsets | crc |
//	+----+-------+----+-------+----------+---------+------+-----------------+-----+
//
// version is 2, flag 1 says that a run of level 0 is frozen, first and last are the first and the last
// LBA covered, body is the length of the pages, the head's index names the first LBA of each; crc is
// CRC32C over everything before it in the head or the page. id and no are checked, so that no page
// passes for another. An entry is a tag byte and the varints its bits announce, in this order:
//
//	bits 0-1  kind: 1 data, 2 hole, 3 base
//	bit  2    gap: blocks between the end of the previous entry and this one (else 0)
//	bit  3    blocks (else as many as the previous data entry had; always set for hole and base)
//	bit  4    extent: zigzag of name minus (previous name + 1) (else the previous name + 1)
//	bit  5    part of an extent: off, orig (else off is 0 and orig is blocks)
//
// Every 16th entry of a page is a restart: its offset in the page is noted, that of the first last, and
// it is encoded as if before it there were an entry that ends at the page's first LBA, of 0 blocks and
// of an extent named -1. So a lookup decodes at most 16 entries. A map of whole 4 KiB extents written
// in order costs 1.5 bytes per entry, random ones some 8. Version 1, see decodeV1, had no pages.
package densetree
