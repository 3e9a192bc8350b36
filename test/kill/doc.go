// Package kill holds the test that kills a serving gateway, over and over, under a client that
// knows what every sector may hold. It has no code but tests.
//
// The client stamps every 512-byte sector it writes, so that a sector says by itself which write it
// is from, that it stands where that write put it, and that it is whole:
//
//	0       4        8    16       24    28    32       512
//	+-------+--------+----+--------+-----+-----+---------+
//	| magic | zero   | id | sector | crc | zero| filling |
//	+-------+--------+----+--------+-----+-----+---------+
//
// Integers are little-endian, id counts writes from 1, and crc is CRC32C over the sector without
// itself. A record keeps, for every sector, the set of writes whose data it may hold now:
//
//	issued ──► one of the possible ──► acknowledged ──► drops all that were acknowledged
//	                                                    before it was issued
//
// A write that never got its reply stays possible, and drops nothing. Once all connections are gone
// and the gateway is back, every sector is read: it must hold one of its possible writes, which from
// then on is the only one.
package kill
