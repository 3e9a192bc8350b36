// Package segment is the stored form of data in the cloud: immutable batches of extents, each laid
// over k data and m parity shards, one object per shard. A Builder fills and seals a segment in
// memory, a Reader fetches extents from the stores that hold the shards, rebuilding what is missing
// or damaged. The package knows objects and checksums; which segments exist is the pool's business.
//
// A shard is one object. Integers are little-endian; docs/FORMATS.md gives every field.
//
//	0        4096                4096+ShardBytes  +IndexBytes      +CutBytes   +256
//	+--------+-------------------+----------------+----------------+-----------+
//	| header | extents area      | index          | cut record     | trailer   |
//	| 4 KiB  | data, or parity   | whole segment  | last of a cut  | 256 bytes |
//	+--------+-------------------+----------------+----------------+-----------+
//
// Extents are sorted by (disk, LBA) and laid column-major: shard 0 is filled first, then shard 1,
// and an extent lies wholly in one data shard, the one its middle falls in when the payload is cut
// into k equal parts; so columns differ by less than one extent:
//
//	shard 0   | slot 0 | slot 1 | slot 2 | 0 |
//	shard 1   | slot 3 | slot 4      | 0 0 0 |   zeroes fill every area to the same ShardBytes
//	shard 2   | parity of the same byte range |
//
// An extent may be packed by a Codec, by itself; then its length and place are in bytes, not blocks, and
// a checksum of the plain bytes stands before them. The memory that shards are built in may be lent by
// Buffers, and Sealed.Verify reads a sealed stripe again before anybody is told of it.
//
// A read goes to the one shard that has the extent. If that is slow, has failed or is known to, the same
// range of k others is rebuilt, whichever comes first (see race); requests made for speed alone are at most
// 5 % of the reads.
//
// Invariants:
//   - index and cut record are the same bytes in every shard, so any one shard names everything.
//   - parity covers the extents area alone, byte by byte, so any range of one shard can be rebuilt
//     from the same range of k others. With k = 1 parity is a copy: a mirror.
//   - the index names its pool, segment and epoch and holds a checksum per extent, so the bytes of
//     another object do not pass for an extent's.
//   - every encoding is canonical: what decodes encodes back to the same bytes.
package segment
