package segment

import "graindisk/block"

// areaCRCs is the checksum of every area, from those of the extents in it, which the caller has computed from
// the same bytes, and from what lies between and behind them; so data is read once for both. Areas of parity
// are read.
//
//	area n   | extent | gap | extent | extent | gap |
//	           joined  read   joined   joined  read
func (x *Index) areaCRCs(areas [][]byte) []uint32 {
	crcs := make([]uint32, len(areas))
	ends := make([]uint32, len(areas))
	for _, e := range x.Entries {
		n := e.Shard
		if e.Offset > ends[n] {
			crcs[n] = block.MoreCRC(crcs[n], areas[n][ends[n]:e.Offset])
		}
		crcs[n] = block.JoinCRC(crcs[n], e.CRC, int64(e.Stored))
		ends[n] = e.Offset + e.Stored
	}
	for n, a := range areas {
		crcs[n] = block.MoreCRC(crcs[n], a[ends[n]:])
	}
	return crcs
}
