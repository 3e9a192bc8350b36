package extent

import (
	"encoding/binary"
	"fmt"

	"graindisk/block"
)

// Append adds the encoding of a record to b, as drawn in the package comment. Its checksum is the
// business of the log it goes to.
func (r Record) Append(b []byte) []byte {
	b = binary.AppendUvarint(b, uint64(r.Name))
	for _, s := range [2]State{r.Old, r.New} {
		tag := byte(s.Kind)
		if s.Canonical {
			tag |= tagCanonical
		}
		b = append(b, tag)
		if s.Kind != Plain {
			b = binary.AppendUvarint(b, uint64(s.To))
		}
		b = binary.AppendUvarint(b, uint64(s.Refs))
	}
	return b
}

// DecodeRecord reads what Append wrote from the head of b and returns the rest. It fails with ErrDamaged.
func DecodeRecord(b []byte) (Record, []byte, error) {
	d := decoder{in: b}
	r := Record{Name: block.ExtentID(d.uint(1<<64 - 1))}
	d.check(validName(r.Name))
	for _, s := range [2]*State{&r.Old, &r.New} {
		tag := d.u8()
		s.Kind, s.Canonical = Kind(tag&tagKind), tag&tagCanonical != 0
		d.check(tag&^(tagKind|tagCanonical) == 0 && s.Kind <= Same && !(s.Kind == Same && s.Canonical))
		if s.Kind != Plain {
			s.To = block.ExtentID(d.uint(1<<64 - 1))
			d.check(validName(s.To) && s.To != r.Name)
		}
		s.Refs = int64(d.uint(1<<63 - 1))
		d.check(s.Refs > 0 || *s == State{} && s == &r.New)
	}
	if d.bad {
		return Record{}, b, fmt.Errorf("exceptions: record: %w", ErrDamaged)
	}
	return r, d.in, nil
}
