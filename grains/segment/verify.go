package segment

import (
	"bytes"
	"fmt"
)

// verifyStep is how much of each shard is encoded again at a time: k+m pieces fit the processor's cache.
const verifyStep = 64 << 10

// Verify reads the sealed shards again, as they were given to the stores: every extent has its checksum
// and unpacks to what was packed, every area has its trailer's, parity is the data's, and header, index,
// cut record and trailer are intact. It is for the moment before the segment is announced: memory that
// was changed since it was sealed gives ErrDamaged.
func (s *Sealed) Verify() error {
	if err := s.verify(); err != nil {
		return fmt.Errorf("sealed segment %d: %w", s.Info.ID, err)
	}
	return nil
}

func (s *Sealed) verify() error {
	areas := make([][]byte, len(s.Shards))
	want := make([]uint32, len(s.Shards))
	var tail []byte
	for n, b := range s.Shards {
		t, err := DecodeTrailer(b)
		if err != nil {
			return err
		}
		h, err := DecodeHeader(b)
		if err != nil {
			return err
		}
		head := Header{Pool: s.Index.Pool, ID: s.Info.ID, Epoch: s.Info.Epoch, Salt: s.Index.Salt, K: s.Info.K, M: s.Info.M, Shard: uint8(n)}
		if h != head || int(t.Shard) != n || int64(len(b)) != s.Info.ObjectBytes() || t.Info.ObjectBytes() != s.Info.ObjectBytes() {
			return fmt.Errorf("shard %d is not what was sealed: %w", n, ErrDamaged)
		}
		if n == 0 {
			tail = b[s.Info.indexOffset():s.Info.trailerOffset()]
			if _, _, err := decodeTail(b[s.Info.indexOffset():], s.Info); err != nil {
				return err
			}
		}
		areas[n], want[n] = b[HeaderBytes:s.Info.indexOffset()], t.AreaCRC
		if !bytes.Equal(b[s.Info.indexOffset():s.Info.trailerOffset()], tail) {
			return fmt.Errorf("shard %d fails its checksum: %w", n, ErrDamaged)
		}
	}
	if err := s.verifyExtents(areas); err != nil {
		return err
	}
	for n, crc := range s.Index.areaCRCs(areas) { // of extents that were read just now
		if crc != want[n] {
			return fmt.Errorf("shard %d fails its checksum: %w", n, ErrDamaged)
		}
	}
	return s.verifyParity(areas)
}

func (s *Sealed) verifyExtents(areas [][]byte) error {
	for slot, e := range s.Index.Entries {
		stored := areas[e.Shard][e.Offset : e.Offset+e.Stored]
		if !s.Index.Verify(slot, stored) {
			return fmt.Errorf("slot %d fails its checksum: %w", slot, ErrDamaged)
		}
		if _, err := s.Index.unpack(slot, stored); err != nil {
			return err
		}
	}
	return nil
}

// verifyParity computes parity again, all of it: encoding is several times cheaper than the library's own
// Verify.
func (s *Sealed) verifyParity(areas [][]byte) error {
	k, m, size := int(s.Info.K), int(s.Info.M), int(s.Info.ShardBytes)
	if m == 0 || size == 0 {
		return nil
	}
	c, err := coder(s.Info.K, s.Info.M)
	if err != nil {
		return err
	}
	scratch := make([]byte, m*min(verifyStep, size))
	pieces := make([][]byte, k+m)
	for at := 0; at < size; at += verifyStep {
		n := min(verifyStep, size-at)
		for i := range pieces {
			if i < k {
				pieces[i] = areas[i][at : at+n]
			} else {
				pieces[i] = scratch[(i-k)*n:][:n]
			}
		}
		if err := c.Encode(pieces); err != nil {
			return err
		}
		for i := k; i < k+m; i++ {
			if !bytes.Equal(pieces[i], areas[i][at:at+n]) {
				return fmt.Errorf("parity shard %d is not that of the data, from byte %d on: %w", i, at, ErrDamaged)
			}
		}
	}
	return nil
}

// Release gives the memory of the shards back. With reuse nobody reads them any more, not even a
// request that was given up.
func (s *Sealed) Release(reuse bool) {
	for _, b := range s.Shards {
		s.buffers.Put(b, reuse)
	}
	s.Shards = nil
}
