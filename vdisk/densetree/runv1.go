package densetree

import (
	"encoding/binary"
	"fmt"

	"graindisk/block"
)

// Version 1 of the run format, which the first release wrote, has no pages: behind a header like that
// of version 2 up to "body" come the entries, in one piece, and a CRC32C over everything before it.
const headerLenV1 = 52

// decodeV1 reads a run of version 1, whose start has been checked, into memory.
func decodeV1(b []byte) (*Run, error) {
	id, level := binary.LittleEndian.Uint64(b[offID:]), int(int32(binary.LittleEndian.Uint32(b[offLevel:])))
	if len(b) < headerLenV1+crcLen {
		return nil, fmt.Errorf("run %d: %w: %d bytes", id, ErrCorrupt, len(b))
	}
	body := b[:len(b)-crcLen]
	if got, want := block.CRC(body), binary.LittleEndian.Uint32(b[len(body):]); got != want {
		return nil, fmt.Errorf("run %d: %w: crc %08x, stored %08x", id, ErrCorrupt, got, want)
	}
	if binary.LittleEndian.Uint16(b[offFlags:]) != 0 || int64(binary.LittleEndian.Uint32(b[offBody:])) != int64(len(body)-headerLenV1) {
		return nil, fmt.Errorf("run %d: %w: header", id, ErrCorrupt)
	}
	count := int(binary.LittleEndian.Uint32(b[offCount:]))
	in := varints{b: body[headerLenV1:]}
	if level < 0 || level > levelsMax || count == 0 || count > min(runMax, len(in.b)) {
		return nil, fmt.Errorf("run %d: %w: %d entries in %d bytes on level %d", id, ErrCorrupt, count, len(in.b), level)
	}
	d := delta{lba: block.LBA(binary.LittleEndian.Uint64(b[offFirst:]))}
	w := runBuilder{id: id}
	for i := range count {
		p, err := d.read(&in)
		if err != nil {
			return nil, fmt.Errorf("run %d: entry %d: %w", id, i, err)
		}
		w.add(p)
	}
	r := w.finish(level, false)
	if len(in.b) > 0 || uint64(r.First) != binary.LittleEndian.Uint64(b[offFirst:]) || uint64(r.Last) != binary.LittleEndian.Uint64(b[offLast:]) {
		return nil, fmt.Errorf("run %d: %w: entries cover [%d, %d] with %d bytes left", id, ErrCorrupt, r.First, r.Last, len(in.b))
	}
	return r, nil
}
