package cache

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"graindisk/block"
	"graindisk/tier"
)

// The saved index; integers are little-endian, slots come in the order in which they came into use.
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
)

var (
	// ErrCorrupt means bytes that AppendState has not written.
	ErrCorrupt = errors.New("damaged cache state")
	// ErrNewer means a state written by a newer version of the format.
	ErrNewer = errors.New("cache state is newer than this program")
)

// AppendState appends the index to b, for Restore after a restart. What changes meanwhile may be in it
// or not.
func (c *Cache) AppendState(b []byte) []byte {
	type known struct {
		slot int
		info *slotInfo
	}
	var slots []known
	for i := range c.slots {
		if s := c.slots[i].Load(); s != nil && s.stamp != 0 {
			slots = append(slots, known{i, s})
		}
	}
	slices.SortFunc(slots, func(a, b known) int { return cmp.Compare(a.info.age, b.info.age) })

	start, count := len(b), uint32(0)
	b = append(b, make([]byte, stateHeader)...)
	var entries []entry
	for _, k := range slots {
		entries = entries[:0]
		for i := range c.shards {
			entries = c.shards[i].collect(k.slot, entries)
		}
		if len(entries) == 0 || c.slots[k.slot].Load() != k.info { // evicted, or about to be
			continue
		}
		count++
		b = appendSlot(b, k.slot, k.info, entries)
	}
	h := b[start:]
	copy(h, stateMagic)
	binary.LittleEndian.PutUint16(h[4:], stateVersion)
	binary.LittleEndian.PutUint32(h[16:], c.slotBlocks)
	binary.LittleEndian.PutUint32(h[20:], count)
	binary.LittleEndian.PutUint64(h[24:], uint64(len(h)-stateHeader))
	return binary.LittleEndian.AppendUint32(b, block.CRC(h))
}

// appendSlot appends a slot and its entries. Two entries never share blocks, unless the log stored an
// extent and the same blocks were adopted under another name: then the later one is left out.
func appendSlot(b []byte, slot int, info *slotInfo, entries []entry) []byte {
	slices.SortFunc(entries, func(a, b entry) int { return cmp.Compare(a.loc, b.loc) })
	end := 0
	entries = slices.DeleteFunc(entries, func(e entry) bool {
		r := e.run()
		if int(r.place.Block()) < end {
			return true
		}
		end = int(r.place.Block()) + r.blocks
		return false
	})
	b = binary.AppendUvarint(b, uint64(slot))
	b = binary.AppendUvarint(b, uint64(len(entries)))
	b = binary.LittleEndian.AppendUint64(b, info.stamp)
	var extent block.ExtentID
	next := uint32(0)
	for _, e := range entries {
		r := e.run()
		first := r.place.Block()
		b = binary.AppendVarint(b, int64(e.extent-extent))
		b = binary.AppendUvarint(b, uint64(first-next))
		b = binary.AppendUvarint(b, uint64(r.off))
		b = binary.AppendUvarint(b, uint64(r.blocks))
		extent, next = e.extent, first+uint32(r.blocks)
		for at := first; at < next; at++ {
			b = binary.LittleEndian.AppendUint32(b, info.crcs[at].Load())
		}
	}
	return b
}

// Restore takes over an index that AppendState wrote, into an empty cache and before the first Take
// of the tier. Slots that have been used for something else since are left out, told by their first
// block. busy says which slots recovery has claimed for unpublished blocks; all others that Restore knows
// it makes clean. Errors match ErrCorrupt or ErrNewer; the cache is then still empty and works.
func (c *Cache) Restore(b []byte, busy func(slot int) bool) error {
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
		info = c.info(slot)
		if !busy(slot) {
			c.space.SetClean(slot)
		}
		return true
	}
	return c.walkState(body, count, slot, func(id block.ExtentID, r run, crcs []byte) {
		for i := range r.blocks {
			info.crcs[int(r.place.Block())+i].Store(binary.LittleEndian.Uint32(crcs[4*i:]))
		}
		c.shard(id).add(id, r)
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
			r := run{off: int(in.uvarint(ExtentBlocksMax)), blocks: int(in.uvarint(ExtentBlocksMax))}
			crcs := in.take(4 * r.blocks)
			if in.bad || r.blocks == 0 || r.off+r.blocks > ExtentBlocksMax || next+uint64(r.blocks) > uint64(c.slotBlocks) {
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
