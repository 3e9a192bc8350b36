package cache

import (
	"encoding/binary"
	"errors"
	"fmt"

	"graindisk/block"
	"graindisk/tier"
)

// The saved index as local checkpoints held it before each slot had a file of its own; it is read, not
// written any more. Integers are little-endian, slots come in the order in which they came into use.
//
//	0       4         6       8          16            20      24     32
//	+-------+---------+-------+----------+-------------+-------+------+-----------+-----+
//	| GDCI  | version | flags | incompat | slot blocks | slots | body | slots ... | crc |
//	+-------+---------+-------+----------+-------------+-------+------+-----------+-----+
//
//	slot:   uvarint number, uvarint count of entries, 8 bytes stamp, the entries in order of block
//	entry:  varint extent name minus the previous entry's (at first minus 0), uvarint blocks between
//	        the end of the previous entry and this one (at first since block 0), uvarint off,
//	        uvarint blocks, 4 bytes CRC32C per block
//
// body is the length of all slots in bytes; crc is CRC32C over everything before it.
const (
	stateMagic   = "GDCI"
	stateVersion = 1
	stateHeader  = 32
	stateCRC     = 4
	// stateBlocksMax is how long an extent could be in that form.
	stateBlocksMax = 1023
)

var (
	// ErrCorrupt means bytes that no cache has written.
	ErrCorrupt = errors.New("damaged cache index")
	// ErrNewer means an index written by a newer version of the format.
	ErrNewer = errors.New("cache index is newer than this program")
)

// Restore takes over an index of the old form, before the first Take of the tier. Slots that are known
// already, or have been used for something else since, told by their first block, are left out. busy
// says which slots recovery has claimed for unpublished blocks; all others that Restore knows it makes
// clean. Nothing at all is an index of no slots. Errors match ErrCorrupt or ErrNewer; nothing is then taken over.
func (c *Cache) Restore(b []byte, busy func(slot int) bool) error {
	if len(b) == 0 {
		return nil
	}
	body, count, err := c.checkState(b)
	if err == nil {
		err = c.walkState(body, count, func(int, uint64) bool { return false }, nil)
	}
	if err != nil {
		return fmt.Errorf("cache: restore: %w", err)
	}
	var info *slotInfo
	slot := func(slot int, stamp uint64) bool {
		if c.slots[slot].Load() != nil || !c.space.Exists(slot) || c.stamp(slot) != stamp {
			return false
		}
		if info = c.info(slot); info == nil {
			return false
		}
		if !busy(slot) {
			c.space.SetClean(slot)
		}
		return true
	}
	return c.walkState(body, count, slot, func(id block.ExtentID, r run, crcs []byte) {
		if r.off+r.blocks > ExtentBlocksMax {
			return
		}
		for i := range r.blocks {
			info.crcs[int(r.place.Block())+i].Store(binary.LittleEndian.Uint32(crcs[4*i:]))
		}
		if e, ok := c.add(info, newEntry{id, 0, r}, false); ok {
			c.insertMissing(id, placed{r.place.Slot(), e})
		}
	})
}

// checkState checks everything but the slots, which it returns with their number.
func (c *Cache) checkState(b []byte) (body []byte, count uint32, err error) {
	if len(b) < stateHeader+stateCRC || string(b[:4]) != stateMagic {
		return nil, 0, fmt.Errorf("%w: not a cache state", ErrCorrupt)
	}
	if v := binary.LittleEndian.Uint16(b[4:]); v > stateVersion {
		return nil, 0, fmt.Errorf("%w: version %d", ErrNewer, v)
	}
	if bits := binary.LittleEndian.Uint64(b[8:]); bits != 0 {
		return nil, 0, fmt.Errorf("%w: incompat bits %#x", ErrNewer, bits)
	}
	sum := len(b) - stateCRC
	if got, want := block.CRC(b[:sum]), binary.LittleEndian.Uint32(b[sum:]); got != want {
		return nil, 0, fmt.Errorf("%w: crc %08x, stored %08x", ErrCorrupt, got, want)
	}
	if binary.LittleEndian.Uint16(b[4:]) != stateVersion || binary.LittleEndian.Uint16(b[6:]) != 0 ||
		binary.LittleEndian.Uint64(b[24:]) != uint64(sum-stateHeader) {
		return nil, 0, fmt.Errorf("%w: header", ErrCorrupt)
	}
	if n := binary.LittleEndian.Uint32(b[16:]); n != c.slotBlocks {
		return nil, 0, fmt.Errorf("%w: slots of %d blocks, this tier's have %d", ErrCorrupt, n, c.slotBlocks)
	}
	return b[stateHeader:sum], binary.LittleEndian.Uint32(b[20:]), nil
}

// walkState reads the slots. slot is told of each and says whether to tell add of its entries.
func (c *Cache) walkState(b []byte, count uint32, slot func(int, uint64) bool, add func(block.ExtentID, run, []byte)) error {
	in := reader{b: b}
	for range count {
		n := int(in.uvarint(uint64(len(c.slots) - 1)))
		entries := in.uvarint(uint64(c.slotBlocks))
		stamp := in.take(8)
		if in.bad {
			return fmt.Errorf("%w: slot %d", ErrCorrupt, n)
		}
		wanted := slot(n, binary.LittleEndian.Uint64(stamp))
		var extent block.ExtentID
		next := uint64(0)
		for range entries {
			extent += block.ExtentID(in.varint())
			next += in.uvarint(uint64(c.slotBlocks))
			r := run{off: int(in.uvarint(stateBlocksMax)), blocks: int(in.uvarint(stateBlocksMax))}
			crcs := in.take(4 * r.blocks)
			if in.bad || r.blocks == 0 || r.off+r.blocks > stateBlocksMax || next+uint64(r.blocks) > uint64(c.slotBlocks) {
				return fmt.Errorf("%w: slot %d: entry of extent %v", ErrCorrupt, n, extent)
			}
			r.place = tier.NewPlace(n, uint32(next))
			next += uint64(r.blocks)
			if wanted {
				add(extent, r, crcs)
			}
		}
	}
	if len(in.b) > 0 {
		return fmt.Errorf("%w: %d bytes left", ErrCorrupt, len(in.b))
	}
	return nil
}

// reader takes values off the front of b; bad is set when one was cut short or too large.
type reader struct {
	b   []byte
	bad bool
}

func (r *reader) uvarint(max uint64) uint64 {
	x, n := binary.Uvarint(r.b)
	if n <= 0 || x > max {
		r.bad = true
		return 0
	}
	r.b = r.b[n:]
	return x
}

func (r *reader) varint() int64 {
	x, n := binary.Varint(r.b)
	if n <= 0 {
		r.bad = true
		return 0
	}
	r.b = r.b[n:]
	return x
}

func (r *reader) take(n int) []byte {
	if len(r.b) < n {
		r.bad = true
		return nil
	}
	p := r.b[:n]
	r.b = r.b[n:]
	return p
}
