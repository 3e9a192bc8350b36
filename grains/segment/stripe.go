package segment

import (
	"fmt"
	"sync"

	"github.com/klauspost/reedsolomon"

	"graindisk/block"
)

// coders holds one reedsolomon.Encoder per profile, made on first use; they are safe for concurrent use.
var coders sync.Map // [2]uint8{k, m} → reedsolomon.Encoder

// coder returns the code of a profile. One goroutine each: several segments are sealed side by side,
// and one core already codes faster than any link uploads.
func coder(k, m uint8) (reedsolomon.Encoder, error) {
	if c, ok := coders.Load([2]uint8{k, m}); ok {
		return c.(reedsolomon.Encoder), nil
	}
	c, err := reedsolomon.New(int(k), int(m), reedsolomon.WithMaxGoroutines(1))
	if err != nil {
		return nil, fmt.Errorf("reed-solomon code %d+%d: %w", k, m, err)
	}
	kept, _ := coders.LoadOrStore([2]uint8{k, m}, c)
	return kept.(reedsolomon.Encoder), nil
}

// reconstruct fills in pieces[want] from k others: pieces of one byte range, by shard, nil = not at hand.
func reconstruct(k, m uint8, pieces [][]byte, want int) ([]byte, error) {
	c, err := coder(k, m)
	if err != nil {
		return nil, err
	}
	required := make([]bool, len(pieces))
	required[want] = true
	if err := c.ReconstructSome(pieces, required); err != nil {
		return nil, fmt.Errorf("reconstruct shard %d of %d+%d: %w", want, k, m, err)
	}
	return pieces[want], nil
}

// RebuildShard makes the object of shard want from k intact others, byte for byte as it was sealed.
// objects are by shard number, nil where there is none; those that fail a check are passed over. The
// result is checked like any other shard; it does not alias objects.
func RebuildShard(objects [][]byte, want int) ([]byte, error) {
	var first *Shard
	var tail []byte // index and cut record
	var areas [][]byte
	have, bad := 0, error(nil)
	for n, b := range objects {
		if b == nil || n == want {
			continue
		}
		s, err := OpenShard(b)
		if err == nil && int(s.Trailer.Shard) != n {
			err = fmt.Errorf("shard %d in the place of shard %d: %w", s.Trailer.Shard, n, ErrDamaged)
		}
		if err == nil && first != nil && !first.sameStripe(s) {
			err = fmt.Errorf("shard %d is of another stripe: %w", n, ErrDamaged)
		}
		if err != nil {
			bad = err
			continue
		}
		if first == nil {
			first = s
			tail = b[s.Trailer.Info.indexOffset():s.Trailer.Info.trailerOffset()]
			areas = make([][]byte, s.Trailer.Info.Shards())
		}
		if n < len(areas) && have < int(first.Trailer.Info.K) {
			areas[n] = s.Area
			have++
		}
	}
	if first == nil || have < int(first.Trailer.Info.K) || want >= len(areas) {
		return nil, fmt.Errorf("rebuild shard %d: %d intact others are too few (%w): %w", want, have, ErrDamaged, errOr(bad))
	}
	i := first.Trailer.Info
	area := []byte{}
	if i.ShardBytes > 0 {
		var err error
		if area, err = reconstruct(i.K, i.M, areas, want); err != nil {
			return nil, err
		}
	}
	h, t := first.Header, first.Trailer
	h.Shard, t.Shard, t.AreaCRC = uint8(want), uint8(want), block.CRC(area)
	out := h.append(make([]byte, 0, i.ObjectBytes()))
	out = append(append(out, area...), tail...)
	out = t.append(out)
	if _, err := OpenShard(out); err != nil {
		return nil, fmt.Errorf("rebuild shard %d: %w", want, err)
	}
	return out, nil
}

func errOr(err error) error {
	if err == nil {
		return fmt.Errorf("the rest is missing")
	}
	return err
}

// sameStripe tells whether two intact shards are of one sealed segment. The trailers must agree in
// all but what is a shard's own.
func (s *Shard) sameStripe(o *Shard) bool {
	a, b := s.Trailer, o.Trailer
	a.Shard, b.Shard, a.AreaCRC, b.AreaCRC = 0, 0, 0, 0
	return string(a.append(nil)) == string(b.append(nil))
}
