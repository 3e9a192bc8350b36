package nbdclient

import (
	"encoding/binary"
	"fmt"
	"math"

	"graindisk/frontend/nbd/proto"
)

// statusBytesMax bounds the payload of one BLOCK_STATUS chunk.
const statusBytesMax = 8 << 20

// statusShape tells whether a chunk of n bytes can hold ranges: a header and at least one descriptor.
func statusShape(typ uint16, n uint32) bool {
	switch typ {
	case proto.ReplyTypeBlockStatus:
		return n > 4 && (n-4)%8 == 0
	case proto.ReplyTypeBlockStatusExt:
		return n > 8 && (n-8)%16 == 0
	}
	return false
}

// takeStatus decodes the payload of a BLOCK_STATUS chunk. There is only one context that it can be for.
func (k *call) takeStatus(typ uint16, p []byte) error {
	p = p[4:] // the number of the context
	size := 8
	if typ == proto.ReplyTypeBlockStatusExt {
		size = 16
		if n := binary.BigEndian.Uint32(p); n != 0 && int(n) != len(p)/size {
			return fmt.Errorf("block status of %d bytes says it has %d ranges", len(p), n)
		}
		p = p[4:]
	}
	for ; len(p) > 0; p = p[size:] {
		n, state := uint64(binary.BigEndian.Uint32(p)), uint64(binary.BigEndian.Uint32(p[4:]))
		if size == 16 {
			n, state = binary.BigEndian.Uint64(p), binary.BigEndian.Uint64(p[8:])
		}
		if n == 0 || n > math.MaxInt64 || state > math.MaxUint32 {
			return fmt.Errorf("block status with a range of %d bytes, state %#x", n, state)
		}
		k.status = append(k.status, Status{int64(n), uint32(state)})
	}
	return nil
}
