package pool

import (
	"encoding/binary"
	"fmt"

	"graindisk/grains/segment"
	"graindisk/writeback"
)

// Kinds of metadata records for a publication that is too long for one of kind metaPublication. Its parts
// come in a row, from 0, and the record that completes it is the last:
//
//	metaPublicationPart   u64 cut | u32 part | u32 segments, then for each: u32 length | info, u32 length | index
//	metaPublicationEnd    u64 cut | u32 parts | a publication with the rest of the segments
//
// A row without its end was cut short by a crash and says nothing; the cut is then recorded anew, from
// part 0.
const (
	metaPublicationPart uint8 = 18
	metaPublicationEnd  uint8 = 19
)

// publicationBytesFull is where the next part begins: replay needs no more than a part and what it says.
const publicationBytesFull = 8 << 20

// recordPublication makes it stable on the tier that a cut has been committed.
func (p *Pool) recordPublication(rec *segment.CutRecord, infos []segment.Info, idx []*segment.Index) error {
	return eachPublicationRecord(rec, infos, idx, p.o.publicationBytes, p.log.AppendMeta)
}

// eachPublicationRecord gives the records of a publication, parts of about full bytes each.
func eachPublicationRecord(rec *segment.CutRecord, infos []segment.Info, idx []*segment.Index, full int, write func(kind uint8, b []byte) error) error {
	parts, from, size := 0, 0, 0
	for i, x := range idx[:len(idx)-1] {
		n := int(infos[i].IndexBytes) + len(x.Entries) // near enough
		if size += n; size < full {
			continue
		}
		if err := write(metaPublicationPart, encodePublicationPart(rec.Cut, parts, infos[from:i+1], idx[from:i+1])); err != nil {
			return err
		}
		parts, from, size = parts+1, i+1, 0
	}
	rest := encodePublication(rec, infos[from:], idx[from:])
	if parts == 0 {
		return write(metaPublication, rest)
	}
	return write(metaPublicationEnd, append(binary.LittleEndian.AppendUint32(binary.LittleEndian.AppendUint64(nil, rec.Cut), uint32(parts)), rest...))
}

func encodePublicationPart(cut uint64, part int, infos []segment.Info, idx []*segment.Index) []byte {
	b := binary.LittleEndian.AppendUint64(nil, cut)
	b = binary.LittleEndian.AppendUint32(b, uint32(part))
	b = binary.LittleEndian.AppendUint32(b, uint32(len(infos)))
	for i := range infos {
		b = appendBytes(b, infos[i].Append(nil))
		b = appendBytes(b, idx[i].Append(nil))
	}
	return b
}

// publicationRow collects the parts of one publication.
type publicationRow struct {
	cut   uint64
	parts int
	infos []segment.Info
	idx   []*segment.Index
}

// publicationHead is the cut and the number at the head of a part or an end.
func publicationHead(b []byte) (cut uint64, n uint32, rest []byte, err error) {
	if len(b) < 12 {
		return 0, 0, nil, fmt.Errorf("publication record of %d bytes: %w", len(b), writeback.ErrDamaged)
	}
	return binary.LittleEndian.Uint64(b), binary.LittleEndian.Uint32(b[8:]), b[12:], nil
}

// add takes a part. Part 0 begins a new row, whatever was collected before.
func (r *publicationRow) add(b []byte) error {
	cut, part, rest, err := publicationHead(b)
	if err != nil {
		return err
	}
	if part == 0 {
		*r = publicationRow{cut: cut}
	}
	if cut != r.cut || int(part) != r.parts {
		return fmt.Errorf("part %d of the record of cut %d follows part %d of cut %d: %w", part, cut, r.parts-1, r.cut, writeback.ErrDamaged)
	}
	d := decoder{b: rest}
	n := d.u32()
	for range n {
		info, left, err := segment.DecodeInfo(d.bytes())
		if err != nil {
			return err
		}
		x, err := segment.DecodeIndex(d.bytes())
		if err != nil {
			return err
		}
		if len(left) > 0 {
			d.bad = true
		}
		r.infos, r.idx = append(r.infos, info), append(r.idx, x)
	}
	if d.bad || len(d.b) != 0 || n == 0 {
		return fmt.Errorf("part %d of the record of cut %d: %w", part, cut, writeback.ErrDamaged)
	}
	r.parts++
	return nil
}

// end completes the row.
func (r *publicationRow) end(b []byte) (*segment.CutRecord, []segment.Info, []*segment.Index, error) {
	cut, parts, rest, err := publicationHead(b)
	if err != nil {
		return nil, nil, nil, err
	}
	rec, infos, idx, err := decodePublication(rest)
	if err != nil {
		return nil, nil, nil, err
	}
	if cut != r.cut || int(parts) != r.parts || parts == 0 || rec.Cut != cut {
		return nil, nil, nil, fmt.Errorf("record of cut %d in %d parts, of cut %d, follows %d parts of cut %d: %w",
			cut, parts, rec.Cut, r.parts, r.cut, writeback.ErrDamaged)
	}
	infos, idx = append(r.infos, infos...), append(r.idx, idx...)
	*r = publicationRow{}
	return rec, infos, idx, nil
}
