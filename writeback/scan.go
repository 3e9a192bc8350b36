package writeback

import (
	"errors"
	"fmt"
	"slices"

	"graindisk/block"
	"graindisk/tier"
)

// candidate is a slot that may hold a file without a Sealed record.
type candidate struct {
	slot     int
	file     uint64
	header   fileHeader
	headless bool // its header is bad, but its first batch is of this term
}

// scanFiles reads the files of the current term after the last Sealed record, in order, up to the
// first batch that is not whole, and notes what headers beyond it claim to be stable.
func (r *recovery) scanFiles() error {
	list, err := r.candidates()
	if err != nil {
		return err
	}
	r.nextFile = r.pos.file
	r.tornAt = fmt.Sprintf("the start of log file %d", r.pos.file)
	torn := false
	for _, c := range list {
		r.nextFile = max(r.nextFile, c.file+1)
		from := uint32(1)
		if !torn && !c.headless && c.file == r.pos.file && c.header.first == r.pos.seq && c.header.prevCRC == r.pos.prevCRC {
			r.claimStable(c.header.stable, tier.Name(c.slot))
			r.out.Files++
			s, err := r.scan(c)
			if err != nil {
				return err
			}
			if s.n > 0 {
				r.scanned = append(r.scanned, s)
				r.sealed(s)
			}
			from = s.end
			r.tornAt = fmt.Sprintf("%s block %d", tier.Name(c.slot), s.end)
		}
		// A file is left before it is full only for want of room for the next record, so what
		// follows its last batch is never one of its own unless that batch is bad.
		found, err := r.claims(c, from)
		if err != nil {
			return err
		}
		torn = torn || found || c.file >= r.pos.file
	}
	return nil
}

// candidates lists the slots with files of the current term at or after the position, by file.
func (r *recovery) candidates() (list []candidate, err error) {
	b := make([]byte, 2*block.Size)
	for slot := range r.o.Space.Slots() {
		if !r.o.Space.Exists(slot) {
			continue
		}
		if err := r.o.Space.ReadAt(tier.NewPlace(slot, 0), b); err != nil {
			return nil, err
		}
		c := candidate{slot: slot}
		c.header, err = decodeFileHeader(b)
		switch {
		case err == nil && c.header.log == r.id.log && c.header.term == r.pos.term && int(c.header.slot) == slot:
			c.file = c.header.file
			if int(c.header.slotBlocks) != r.o.Space.SlotBlocks() {
				return nil, fmt.Errorf("%s was written with slots of %d blocks, now they have %d", tier.Name(slot), c.header.slotBlocks, r.o.Space.SlotBlocks())
			}
		case err == nil:
			continue // of an earlier term or another log
		case errors.Is(err, ErrNewer) && c.header.log == r.id.log && c.header.term == r.pos.term:
			return nil, fmt.Errorf("%s: %w", tier.Name(slot), err)
		default:
			h, err := r.batchAt(slot, 1, b[block.Size:])
			if err != nil {
				return nil, err
			}
			if h == nil {
				continue
			}
			c.file, c.headless = h.file, true
		}
		if c.file >= r.pos.file {
			list = append(list, c)
		}
	}
	// A file that another slot has with its header is a copy that was being made to mend it.
	list = slices.DeleteFunc(slices.Clone(list), func(c candidate) bool {
		return c.headless && slices.ContainsFunc(list, func(o candidate) bool { return !o.headless && o.file == c.file })
	})
	slices.SortFunc(list, func(a, b candidate) int { return int(int64(a.file) - int64(b.file)) })
	return list, nil
}

// batchAt decodes the batch header at a block of a slot, of which first is the first block; nil if
// there is none of this term that names this offset.
func (r *recovery) batchAt(slot int, at uint32, first []byte) (*batchHeader, error) {
	n := batchHeaderBlocks(first)
	if n == 0 || int(at)+n > r.o.Space.SlotBlocks() {
		return nil, nil
	}
	b := first[:block.Size]
	if n > 1 {
		b = make([]byte, n*block.Size)
		if err := r.o.Space.ReadAt(tier.NewPlace(slot, at), b); err != nil {
			return nil, err
		}
	}
	h, err := decodeBatchHeader(b, r.pos.term)
	if errors.Is(err, errTorn) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("%s block %d: %w", tier.Name(slot), at, err)
	}
	if h.log != r.id.log || h.offset != at || uint64(at)+uint64(n)+uint64(h.payload) > uint64(r.o.Space.SlotBlocks()) {
		return nil, nil
	}
	return h, nil
}

// scan reads a file's batches as far as they are whole.
func (r *recovery) scan(c candidate) (*sealedFile, error) {
	s := &sealedFile{slot: uint32(c.slot), end: 1, file: c.file, term: r.pos.term, first: c.header.first, endCRC: c.header.crc}
	first := make([]byte, block.Size)
	next := s.first
	for int(s.end) < r.o.Space.SlotBlocks() {
		if err := r.o.Space.ReadAt(tier.NewPlace(c.slot, s.end), first); err != nil {
			return nil, err
		}
		h, err := r.batchAt(c.slot, s.end, first)
		if err != nil {
			return nil, err
		}
		if h == nil || h.file != c.file || h.first != next || h.prevCRC != s.endCRC {
			break
		}
		payload := make([]byte, int(h.payload)*block.Size)
		if err := r.o.Space.ReadAt(tier.NewPlace(c.slot, s.end+h.headerBlocks), payload); err != nil {
			return nil, err
		}
		if !h.holds(payload) {
			break
		}
		r.claimStable(h.stable, fmt.Sprintf("%s block %d", tier.Name(c.slot), h.offset))
		s.add(h, payload)
		s.end, s.endCRC, next = h.offset+h.blocksAll(), h.crc, h.last()+1
	}
	return s, nil
}

// holds tells whether the payload is the batch's.
func (h *batchHeader) holds(payload []byte) bool {
	for i, c := range h.crcs {
		if block.CRC(payload[i*block.Size:][:block.Size]) != c {
			return false
		}
	}
	return true
}

// claims looks on every block from `from` on for batch headers of the file, and notes what they
// claim to be stable; found tells whether there was one.
func (r *recovery) claims(c candidate, from uint32) (found bool, err error) {
	if !c.headless && from == 1 {
		r.claimStable(c.header.stable, tier.Name(c.slot))
	}
	const step = 256 // blocks read at once
	blocks := uint32(r.o.Space.SlotBlocks())
	buf := make([]byte, step*block.Size)
	for at := from; at < blocks; at += step {
		p := buf[:min(step, blocks-at)*block.Size]
		if err := r.o.Space.ReadAt(tier.NewPlace(c.slot, at), p); err != nil {
			return false, err
		}
		for i := uint32(0); len(p) > 0; i, p = i+1, p[block.Size:] {
			h, err := r.batchAt(c.slot, at+i, p)
			if err != nil {
				return false, err
			}
			if h != nil && h.file == c.file {
				found = true
				r.out.TornBytes += int64(h.blocksAll()) * block.Size
				r.claimStable(h.stable, fmt.Sprintf("%s block %d", tier.Name(c.slot), at+i))
			}
		}
	}
	return found, nil
}
