package crashtest

import (
	"fmt"
	"sync"

	"graindisk/block"
)

// Model is what the clients of one pool know: which operations they issued and which were
// acknowledged, flushed and published, in what order. It checks what a pool shows after a crash.
//
//	Issue ---> Acked ---> Flushed / Stable ---> Published
//	in doubt   survives   survives a            survives the loss
//	           a process  power cut             of the host
//	           crash
//
// Time is a counter that rises with every call. Operation x comes before y if x was acknowledged
// before y was issued; if neither came before the other, the pool may have put them in either order.
// An operation is atomic once acknowledged. A client request that the pool may split is modelled as
// several operations acknowledged together.
//
// Safe for concurrent use. Call Issue before handing the request over and Acked after its reply.
type Model struct {
	mu    sync.Mutex
	time  uint64
	ops   []*op // op i has the id i+1
	disks map[block.DiskID]*modelDisk
}

// Mark is a moment of a Model.
type Mark uint64

// op is one write or hole.
type op struct {
	id     uint64
	disk   block.DiskID
	lba    block.LBA
	blocks int
	hole   bool

	issued uint64 // time
	acked  uint64 // time; 0 is not acknowledged
	stable bool
	cut    uint64 // the first published cut that holds it; 0 is none
}

// modelDisk lists, for every block, the operations that wrote it and may have taken effect there, as
// they were issued.
type modelDisk struct {
	blocks [][]*op
}

// NewModel returns the model of a pool without disks.
func NewModel() *Model { return &Model{disks: map[block.DiskID]*modelDisk{}} }

// AddDisk adds a disk full of zeroes. Checks read all its blocks, so keep it small.
func (m *Model) AddDisk(id block.DiskID, blocks int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.disks[id] = &modelDisk{make([][]*op, blocks)}
}

// IssueWrite records that a write is about to be issued; data is what it must write.
func (m *Model) IssueWrite(disk block.DiskID, lba block.LBA, blocks int) (id uint64, data []byte) {
	id = m.issue(disk, lba, blocks, false)
	data = make([]byte, blocks*block.Size)
	for i := range blocks {
		Stamp{id, disk, lba + block.LBA(i)}.Fill(data[i*block.Size:])
	}
	return id, data
}

// IssueHole records that an unmap, or a write of zeroes, is about to be issued.
func (m *Model) IssueHole(disk block.DiskID, lba block.LBA, blocks int) (id uint64) {
	return m.issue(disk, lba, blocks, true)
}

func (m *Model) issue(disk block.DiskID, lba block.LBA, blocks int, hole bool) uint64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	d := m.disks[disk]
	if d == nil || uint64(lba)+uint64(blocks) > uint64(len(d.blocks)) {
		panic(fmt.Sprintf("crashtest: the model has no disk %d with %d blocks", disk, uint64(lba)+uint64(blocks)))
	}
	m.time++
	o := &op{id: uint64(len(m.ops)) + 1, disk: disk, lba: lba, blocks: blocks, hole: hole, issued: m.time}
	m.ops = append(m.ops, o)
	for i := range d.blocks[lba:][:blocks] {
		at := int(lba) + i
		d.blocks[at] = append(d.blocks[at], o)
	}
	return o.id
}

// Acked records the acknowledgement of an operation. One that failed stays in doubt: do nothing.
func (m *Model) Acked(id uint64) { m.acknowledge(id, false) }

// Stable records that an operation was acknowledged as stable (FUA), and nothing else by it.
func (m *Model) Stable(id uint64) { m.acknowledge(id, true) }

func (m *Model) acknowledge(id uint64, stable bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.time++
	o := m.ops[id-1]
	o.acked, o.stable = m.time, stable
}

// Mark returns the present moment. Take it before issuing a FLUSH, or before asking to publish.
func (m *Model) Mark() Mark {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.time++
	return Mark(m.time)
}

// Flushed records that a FLUSH of a disk succeeded: what was acknowledged there before the mark is
// stable.
func (m *Model) Flushed(disk block.DiskID, before Mark) {
	m.each(before, func(o *op) {
		if o.disk == disk {
			o.stable = true
		}
	})
}

// Published records that a cut is committed which holds, on all disks, what was acknowledged before
// the mark. Cuts count from 1.
func (m *Model) Published(cut uint64, before Mark) {
	m.each(before, func(o *op) {
		if o.cut == 0 || cut < o.cut {
			o.cut = cut
		}
	})
}

// each calls do for what was acknowledged before the mark.
func (m *Model) each(before Mark, do func(*op)) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, o := range m.ops {
		if o.acked != 0 && o.acked < uint64(before) {
			do(o)
		}
	}
}
