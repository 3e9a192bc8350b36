package cache

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sync/errgroup"

	"graindisk/block"
	"graindisk/internal/vfs"
	"graindisk/tier"
)

// The index of a slot, in the file slot-NNNNNN.idx; integers are little-endian.
//
//	0      4         6       8          16      24    32     36            40        44     48     60         64
//	+------+---------+-------+----------+-------+-----+------+-------------+---------+------+------+----------+
//	| GDCX | version | flags | incompat | stamp | age | slot | slot blocks | entries | body | zero | head crc |
//	+------+---------+-------+----------+-------+-----+------+-------------+---------+------+------+----------+
//	| entries ... | crc |
//	+-------------+-----+
//
//	entry:  varint extent name minus the previous entry's (at first minus 0), uvarint blocks between
//	        the end of the previous entry and this one (at first since block 0), uvarint off, uvarint
//	        blocks, 1 byte disk, 4 bytes CRC32C per block; in order of block
//
// stamp is the xxh3 hash of the slot's first block, which no two tenures of a slot share: a file whose
// stamp is not that of its slot is void. age rises with each slot that comes into use. flags: 1 is a slot
// of the main queue. body is the length of all entries in bytes, head crc is CRC32C over the 60 bytes
// before it, crc over everything before it. The file is never synced: a torn one is a cold slot.
const (
	saveMagic   = "GDCX"
	saveVersion = 1
	saveHeader  = 64
	saveSuffix  = ".idx"
	saveKept    = 1 // flag
	loadersMax  = 8
	// saveEntryMax is the longest entry without its CRCs: four varints and the disk.
	saveEntryMax = 4*binary.MaxVarintLen64 + 1
)

// saveHead is the head of the file.
type saveHead struct {
	kept       bool
	stamp, age uint64
	slot       uint32
	slotBlocks uint32
	entries    uint32
	body       uint32
}

// Save writes the index of each slot that became clean since it was last written, gives back the clean
// slots in which nothing is left, and removes what a larger tier left behind. One call at a time.
func (c *Cache) Save() error { return c.save(false) }

// save writes the index of clean slots, or of all.
func (c *Cache) save(all bool) error {
	var errs []error
	emptied := 0
	for slot := range c.slots {
		info := c.slots[slot].Load()
		clean := c.space.Clean(slot)
		switch {
		case !clean && !all || info != nil && info.saved:
		case clean && (info == nil || info.live.Load() == 0):
			if c.space.Evict(slot) {
				emptied++
				errs = append(errs, c.removeSaved(slot))
			}
		case c.fs != nil && info != nil && info.stamp != 0 && info.dirty.Load() && c.space.Pin(slot):
			errs = append(errs, c.saveSlot(slot, info))
			c.space.Unpin(slot)
		}
	}
	return errors.Join(append(errs, c.space.Reclaim(emptied, surplusSlots))...)
}

func (c *Cache) removeSaved(slot int) error {
	if c.fs == nil {
		return nil
	}
	if err := c.fs.Remove(c.savedName(slot)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("cache: remove index: %w", err)
	}
	return nil
}

func (c *Cache) savedName(slot int) string { return path.Join(c.dir, tier.Name(slot)+saveSuffix) }

// saveSlot writes the index of a pinned slot.
func (c *Cache) saveSlot(slot int, info *slotInfo) error {
	info.dirty.Store(false)
	b := c.appendSlot(nil, slot, info)
	f, err := c.fs.Create(c.savedName(slot))
	if err == nil {
		_, err = f.WriteAt(b, 0)
		err = errors.Join(err, f.Close())
	}
	if err != nil {
		info.dirty.Store(true)
		return fmt.Errorf("cache: save index of slot %d: %w", slot, err)
	}
	return nil
}

// appendSlot appends the index of a slot. Two entries never share blocks, unless the log stored an
// extent and the same blocks were adopted under another name: then the later one is left out.
func (c *Cache) appendSlot(b []byte, slot int, info *slotInfo) []byte {
	order := make([]uint32, info.count())
	for i := range order {
		order[i] = uint32(i)
	}
	slices.SortFunc(order, func(a, b uint32) int {
		return cmp.Or(cmp.Compare(info.run(slot, a).place, info.run(slot, b).place), cmp.Compare(a, b))
	})
	start := len(b)
	b = append(b, make([]byte, saveHeader)...)
	h := saveHead{kept: info.kept, stamp: info.stamp, age: info.age, slot: uint32(slot), slotBlocks: c.slotBlocks}
	var extent block.ExtentID
	next := uint32(0)
	for _, i := range order {
		id, r := info.extent(i), info.run(slot, i)
		first := r.place.Block()
		if first < next || !c.alive(id, placed{slot, i}) {
			continue
		}
		b = binary.AppendVarint(b, int64(id-extent))
		b = binary.AppendUvarint(b, uint64(first-next))
		b = binary.AppendUvarint(b, uint64(r.off))
		b = binary.AppendUvarint(b, uint64(r.blocks))
		b = append(b, info.disk(i))
		extent, next = id, first+uint32(r.blocks)
		for at := first; at < next; at++ {
			b = binary.LittleEndian.AppendUint32(b, info.crcs[at].Load())
		}
		h.entries++
	}
	h.body = uint32(len(b) - start - saveHeader)
	h.put(b[start:])
	return binary.LittleEndian.AppendUint32(b, block.CRC(b[start:]))
}

func (h saveHead) put(b []byte) {
	copy(b, saveMagic)
	binary.LittleEndian.PutUint16(b[4:], saveVersion)
	if h.kept {
		binary.LittleEndian.PutUint16(b[6:], saveKept)
	}
	binary.LittleEndian.PutUint64(b[16:], h.stamp)
	binary.LittleEndian.PutUint64(b[24:], h.age)
	binary.LittleEndian.PutUint32(b[32:], h.slot)
	binary.LittleEndian.PutUint32(b[36:], h.slotBlocks)
	binary.LittleEndian.PutUint32(b[40:], h.entries)
	binary.LittleEndian.PutUint32(b[44:], h.body)
	binary.LittleEndian.PutUint32(b[60:], block.CRC(b[:60]))
}

// decodeHead reads the head of a saved index.
func decodeHead(b []byte) (h saveHead, err error) {
	if len(b) < saveHeader || string(b[:4]) != saveMagic {
		return h, fmt.Errorf("%w: not a slot's index", ErrCorrupt)
	}
	version, flags := binary.LittleEndian.Uint16(b[4:]), binary.LittleEndian.Uint16(b[6:])
	if version > saveVersion {
		return h, fmt.Errorf("%w: version %d", ErrNewer, version)
	}
	if bits := binary.LittleEndian.Uint64(b[8:]); bits != 0 {
		return h, fmt.Errorf("%w: incompat bits %#x", ErrNewer, bits)
	}
	if got, want := block.CRC(b[:60]), binary.LittleEndian.Uint32(b[60:]); got != want {
		return h, fmt.Errorf("%w: head crc %08x, stored %08x", ErrCorrupt, got, want)
	}
	h = saveHead{
		kept: flags&saveKept != 0, stamp: binary.LittleEndian.Uint64(b[16:]), age: binary.LittleEndian.Uint64(b[24:]),
		slot: binary.LittleEndian.Uint32(b[32:]), slotBlocks: binary.LittleEndian.Uint32(b[36:]),
		entries: binary.LittleEndian.Uint32(b[40:]), body: binary.LittleEndian.Uint32(b[44:]),
	}
	if version != saveVersion || [12]byte(b[48:60]) != [12]byte{} || h.slotBlocks > 1<<blockBits ||
		h.entries > h.slotBlocks || uint64(h.body) > uint64(h.entries)*saveEntryMax+4*uint64(h.slotBlocks) {
		return h, fmt.Errorf("%w: head", ErrCorrupt)
	}
	return h, nil
}

// decodeSaved reads a whole saved index and calls add for each of its entries. After an error some
// may have been added.
func decodeSaved(b []byte, add func(id block.ExtentID, disk uint8, r run, crcs []byte)) (h saveHead, err error) {
	if h, err = decodeHead(b); err != nil {
		return h, err
	}
	if len(b) != saveHeader+int(h.body)+4 {
		return h, fmt.Errorf("%w: %d bytes, the head says %d", ErrCorrupt, len(b), saveHeader+int(h.body)+4)
	}
	sum := len(b) - 4
	if got, want := block.CRC(b[:sum]), binary.LittleEndian.Uint32(b[sum:]); got != want {
		return h, fmt.Errorf("%w: crc %08x, stored %08x", ErrCorrupt, got, want)
	}
	in := reader{b: b[saveHeader:sum]}
	var extent block.ExtentID
	next := uint64(0)
	for range h.entries {
		extent += block.ExtentID(in.varint())
		next += in.uvarint(uint64(h.slotBlocks))
		r := run{off: int(in.uvarint(ExtentBlocksMax)), blocks: int(in.uvarint(ExtentBlocksMax))}
		disk := in.take(1)
		crcs := in.take(4 * r.blocks)
		if in.bad || r.blocks == 0 || r.off+r.blocks > ExtentBlocksMax || next+uint64(r.blocks) > uint64(h.slotBlocks) {
			return h, fmt.Errorf("%w: entry of extent %v", ErrCorrupt, extent)
		}
		r.place = tier.NewPlace(int(h.slot), uint32(next))
		next += uint64(r.blocks)
		add(extent, disk[0], r, crcs)
	}
	if len(in.b) > 0 {
		return h, fmt.Errorf("%w: %d bytes left", ErrCorrupt, len(in.b))
	}
	return h, nil
}

// Load takes over the slots whose index was saved, into an empty cache and before the first Take of
// the tier. busy says which slots recovery has claimed for unpublished blocks; all others that Load
// knows it makes clean, in their old order. Their entries come in the background. A slot whose index
// is missing, damaged or of an earlier tenure is cold.
func (c *Cache) Load(busy func(slot int) bool) error {
	if c.fs == nil {
		close(c.loaded)
		return nil
	}
	names, err := c.fs.ReadDir(c.dir)
	if err != nil {
		close(c.loaded)
		return fmt.Errorf("cache: load: %w", err)
	}
	var mu sync.Mutex
	var heads []saveHead
	var g errgroup.Group
	g.SetLimit(loadersMax)
	for _, e := range names {
		if !strings.HasSuffix(e.Name(), saveSuffix) {
			continue
		}
		g.Go(func() error {
			if h, ok := c.loadHead(e.Name()); ok {
				mu.Lock()
				heads = append(heads, h)
				mu.Unlock()
			}
			return nil
		})
	}
	_ = g.Wait() // a cold slot is no error
	slices.SortFunc(heads, func(a, b saveHead) int { return cmp.Compare(a.age, b.age) })
	var now, later []int
	for _, h := range heads {
		slot := int(h.slot)
		if !c.slots[slot].CompareAndSwap(nil, &slotInfo{age: h.age, stamp: h.stamp, kept: h.kept, saved: true}) {
			continue
		}
		c.age.Store(max(c.age.Load(), h.age))
		switch {
		case busy(slot):
			now = append(now, slot)
			continue
		case h.kept:
			c.space.SetKept(slot)
		default:
			c.space.SetClean(slot)
		}
		later = append(later, slot)
	}
	c.loadSlots(now)
	slices.Reverse(later) // the youngest first
	c.loading.Go(func() {
		c.loadSlots(later)
		close(c.loaded)
	})
	return nil
}

// Loaded is closed when all that Load found is in the index.
func (c *Cache) Loaded() <-chan struct{} { return c.loaded }

// WaitLoaded returns when all that Load found is in the index. Load has returned before.
func (c *Cache) WaitLoaded() { c.loading.Wait() }

// loadHead reads the head of a saved index, and tells whether its slot is still what it says.
func (c *Cache) loadHead(name string) (h saveHead, ok bool) {
	f, err := c.fs.Open(path.Join(c.dir, name))
	if err != nil {
		return h, false
	}
	defer f.Close()
	b := make([]byte, saveHeader)
	if _, err = f.ReadAt(b, 0); err == nil {
		h, err = decodeHead(b)
	}
	if err != nil || name != tier.Name(int(h.slot))+saveSuffix {
		return h, false
	}
	slot := int(h.slot)
	return h, h.slotBlocks == c.slotBlocks && slot < c.space.Usable() && h.stamp != 0 &&
		c.space.Exists(slot) && c.stamp(slot) == h.stamp
}

// loadSlots reads the entries of slots that are known by their heads.
func (c *Cache) loadSlots(slots []int) {
	for _, slot := range slots {
		info := c.slots[slot].Load()
		if c.closing.Load() || info == nil || !info.saved || !c.space.Pin(slot) {
			continue // evicted already
		}
		if c.slots[slot].Load() == info { // now it stays
			if err := c.loadSlot(slot, info); err != nil {
				c.log.Warn("cache slot is cold", "slot", slot, "error", err)
			}
		}
		c.space.Unpin(slot)
	}
}

// loadSlot reads the entries of a pinned slot. If it cannot, the slot is known to be empty, or, for want of
// memory, not known.
func (c *Cache) loadSlot(slot int, head *slotInfo) error {
	info := c.newInfo(false)
	if info == nil {
		c.slots[slot].Store(nil) // cold; the next Save frees it
		return nil
	}
	info.age, info.stamp, info.kept = head.age, head.stamp, head.kept
	err := c.decodeFile(slot, info)
	if err != nil {
		info.n = 0
	}
	c.slots[slot].Store(info)
	for i := range info.n {
		c.insertMissing(info.extent(i), placed{slot, i})
	}
	info.dirty.Store(false)
	return err
}

func (c *Cache) decodeFile(slot int, info *slotInfo) error {
	b, err := readFile(c.fs, c.savedName(slot), int64(c.slotBlocks)*(saveEntryMax+4)+saveHeader+4)
	if err != nil {
		return err
	}
	h, err := decodeSaved(b, func(id block.ExtentID, disk uint8, r run, crcs []byte) {
		if int(r.place.Block())+r.blocks > len(info.crcs) {
			return
		}
		for i := range r.blocks {
			info.crcs[int(r.place.Block())+i].Store(binary.LittleEndian.Uint32(crcs[4*i:]))
		}
		c.add(info, newEntry{id, disk, r}, false)
	})
	if err == nil && (int(h.slot) != slot || h.stamp != info.stamp) {
		err = fmt.Errorf("%w: of another slot", ErrCorrupt)
	}
	return err
}

func readFile(fsys vfs.FS, name string, limit int64) ([]byte, error) {
	f, err := fsys.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	size, err := f.Size()
	if err != nil {
		return nil, err
	}
	if size > limit {
		return nil, fmt.Errorf("%w: %d bytes", ErrCorrupt, size)
	}
	b := make([]byte, size)
	_, err = f.ReadAt(b, 0)
	return b, err
}
