package writeback

import (
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"

	"graindisk/block"
	"graindisk/internal/turn"
	"graindisk/internal/vfs"
	"graindisk/tier"
)

// metaHeader is block 0 of a metadata log file. The next file names the one before, so that a
// missing one is noticed.
//
//	0       4     6     8          16         32     48       56         64
//	+-------+-----+-----+----------+----------+------+--------+----------+-----------+------+-----+
//	| GDMF  | ver | 0   | incompat | log uuid | term | number | previous | first seq | zero | crc |
//	+-------+-----+-----+----------+----------+------+--------+----------+-----------+------+-----+
//	                                                                     64          72     4092
//
// previous is 0 in the first file of a log. first seq is the metadata sequence of the first record.
type metaHeader struct {
	log      UUID
	term     UUID
	number   uint64
	previous uint64
	first    uint64
}

const (
	metaFileMagic   = "GDMF"
	metaRecordMagic = "GDMR"
	metaFixed       = 32
)

// The kinds of metadata records. Those from OpaqueMin on belong to the pool.
const (
	metaSealed = 1
	metaTerm   = 2

	// OpaqueMin is the first kind AppendMeta takes.
	OpaqueMin = 16
)

func metaName(number uint64) string { return fmt.Sprintf("meta-%06d", number) }

func parseMetaName(name string) (number uint64, ok bool) {
	n, err := fmt.Sscanf(name, "meta-%d", &number)
	return number, err == nil && n == 1 && metaName(number) == name
}

func (h *metaHeader) encode() []byte {
	b := make([]byte, block.Size)
	putStart(b, metaFileMagic)
	copy(b[16:], h.log[:])
	copy(b[32:], h.term[:])
	le.PutUint64(b[48:], h.number)
	le.PutUint64(b[56:], h.previous)
	le.PutUint64(b[64:], h.first)
	le.PutUint32(b[fileCRCAt:], crcSeeded(h.term.seed(), b[:fileCRCAt]))
	return b
}

func decodeMetaHeader(b []byte) (h metaHeader, err error) {
	if len(b) < block.Size || string(b[:4]) != metaFileMagic {
		return h, errTorn
	}
	copy(h.log[:], b[16:])
	copy(h.term[:], b[32:])
	if crcSeeded(h.term.seed(), b[:fileCRCAt]) != le.Uint32(b[fileCRCAt:]) {
		return h, errTorn
	}
	if err := checkStart(b, "metadata log"); err != nil {
		return h, err
	}
	h.number = le.Uint64(b[48:])
	h.previous = le.Uint64(b[56:])
	h.first = le.Uint64(b[64:])
	if !isZero(b[72:fileCRCAt]) {
		return h, errTorn
	}
	return h, nil
}

// metaRecord is one record of the metadata log; it starts on a block.
//
//	0       4      5   8        12    16         24       32
//	+-------+------+---+--------+-----+----------+--------+-----------+------+
//	| GDMR  | kind | 0 | length | crc | meta seq | offset | payload   | zero |
//	+-------+------+---+--------+-----+----------+--------+-----------+------+
//
// offset is the record's own, in bytes from the start of the file; crc is seeded with the file's
// term and covers the whole record, padding included, but itself.
type metaRecord struct {
	kind    uint8
	seq     uint64
	offset  int64
	payload []byte
}

func (r *metaRecord) encode(seed uint32) []byte {
	b := make([]byte, metaFixed, metaFixed+len(r.payload)+block.Size)
	copy(b, metaRecordMagic)
	b[4] = r.kind
	le.PutUint32(b[8:], uint32(len(r.payload)))
	le.PutUint64(b[16:], r.seq)
	le.PutUint64(b[24:], uint64(r.offset))
	b = padded(append(b, r.payload...))
	le.PutUint32(b[12:], crcAround(seed, b, 12))
	return b
}

// decodeMetaRecord reads the record at the head of b, which lies at offset; its payload aliases b.
// n is the length in bytes.
func decodeMetaRecord(b []byte, offset int64, seed uint32) (r metaRecord, n int, err error) {
	if len(b) < block.Size || string(b[:4]) != metaRecordMagic {
		return r, 0, errTorn
	}
	length := uint64(le.Uint32(b[8:]))
	if metaFixed+length > uint64(len(b)) {
		return r, 0, errTorn
	}
	n = blocksFor(metaFixed+int(length)) * block.Size
	if n > len(b) || crcAround(seed, b[:n], 12) != le.Uint32(b[12:]) {
		return r, 0, errTorn
	}
	r = metaRecord{kind: b[4], seq: le.Uint64(b[16:]), offset: int64(le.Uint64(b[24:])), payload: b[metaFixed : metaFixed+length]}
	if r.offset != offset || !isZero(b[5:8]) || !isZero(b[metaFixed+length:n]) {
		return r, 0, errTorn
	}
	return r, n, nil
}

// position is where the part of the log begins that has no Sealed records.
type position struct {
	term    UUID
	file    uint64 // sequence of its first file
	seq     Seq    // of its first record
	prevCRC uint32 // of the last batch header before it in this term, 0 if there is none
}

const positionLen = 40

// append encodes: term | file seq u64 | seq u64 | prev crc u32 | zero u32. It is the payload of a
// Term record, which starts a term.
func (p position) append(b []byte) []byte {
	b = append(b, p.term[:]...)
	b = le.AppendUint64(b, p.file)
	b = le.AppendUint64(b, uint64(p.seq))
	return le.AppendUint64(b, uint64(p.prevCRC))
}

func decodePosition(b []byte) (p position, err error) {
	if len(b) < positionLen || !isZero(b[36:40]) {
		return p, errTorn
	}
	copy(p.term[:], b)
	p.file, p.seq, p.prevCRC = le.Uint64(b[16:]), Seq(le.Uint64(b[24:])), le.Uint32(b[32:])
	return p, nil
}

// sealedFile is the payload of a Sealed record: all of a log file but its data.
//
//	0      4     8          16     32          40        44       48     56
//	+------+-----+----------+------+-----------+---------+--------+------+-----------+
//	| slot | end | file seq | term | first seq | records | end crc| time | records … |
//	+------+-----+----------+------+-----------+---------+--------+------+-----------+
//
//	record: entry as in a batch | at u32 | DATA: one crc u32 per block; OP: the payload itself
//
// end is the file's length in blocks, end crc that of its last batch header, time that of its first
// batch, at the block in the slot where the record's payload starts.
type sealedFile struct {
	slot   uint32
	end    uint32
	file   uint64
	term   UUID
	first  Seq
	endCRC uint32
	time   int64
	n      int    // records
	ops    int    // … of kind OP
	body   []byte // the records, encoded
}

// sealedRecord is one record; the slices alias the file's body.
type sealedRecord struct {
	entry
	at      uint32
	crcs    []byte // encoded
	payload []byte // of Op
}

const sealedFixed = 56

func (s *sealedFile) last() Seq { return s.first + Seq(s.n) - 1 }

// add adds the records of the file's next batch.
func (s *sealedFile) add(h *batchHeader, payload []byte) {
	if s.n == 0 {
		s.time = h.time
	}
	s.n += len(h.entries)
	for i := range h.entries {
		if h.entries[i].kind == Op {
			s.ops++
		}
	}
	s.body = h.appendSealed(s.body, func(i int) []byte {
		at := uint64(0)
		for _, e := range h.entries[:i] {
			at += e.payloadBlocks()
		}
		return payload[at*block.Size:][:h.entries[i].lba]
	})
}

// encodeSealed is the payload of a file's Sealed record, given its encoded records.
func encodeSealed(f *logFile, records []byte) []byte {
	b := make([]byte, 0, sealedFixed+len(records))
	b = le.AppendUint32(b, uint32(f.slot))
	b = le.AppendUint32(b, f.end)
	b = le.AppendUint64(b, f.file)
	b = append(b, f.term[:]...)
	b = le.AppendUint64(b, uint64(f.first))
	b = le.AppendUint32(b, uint32(f.last+1-f.first))
	b = le.AppendUint32(b, f.prevCRC)
	b = le.AppendUint64(b, uint64(f.time))
	return append(b, records...)
}

// appendSealed appends the batch's records as they go into a Sealed record; data gives the
// payload of OP record i.
func (h *batchHeader) appendSealed(b []byte, data func(i int) []byte) []byte {
	at, crcs := h.offset+h.headerBlocks, h.crcs
	for i := range h.entries {
		e := &h.entries[i]
		b = le.AppendUint32(e.append(b), at)
		n := e.payloadBlocks()
		if e.kind == Data {
			for _, c := range crcs[:n] {
				b = le.AppendUint32(b, c)
			}
		} else if e.kind == Op {
			b = append(b, data(i)...)
		}
		at, crcs = at+uint32(n), crcs[n:]
	}
	return b
}

func decodeSealed(b []byte) (*sealedFile, error) {
	if len(b) < sealedFixed {
		return nil, errTorn
	}
	s := &sealedFile{slot: le.Uint32(b), end: le.Uint32(b[4:]), file: le.Uint64(b[8:]),
		first: Seq(le.Uint64(b[32:])), endCRC: le.Uint32(b[44:]), time: int64(le.Uint64(b[48:]))}
	copy(s.term[:], b[16:])
	n := le.Uint32(b[40:])
	s.body = b[sealedFixed:]
	if s.slot >= tier.SlotsMax || n == 0 || uint64(n) > uint64(len(s.body)/(entryLen+4)) {
		return nil, errTorn
	}
	s.n = int(n)
	err := s.each(func(_ Seq, r *sealedRecord) {
		if r.kind == Op {
			s.ops++
		}
	})
	if err != nil {
		return nil, err
	}
	return s, nil
}

// each calls f with the records in order. It fails if the body does not hold exactly those, but never
// on a file that decodeSealed has returned.
func (s *sealedFile) each(f func(Seq, *sealedRecord)) error {
	b := s.body
	var r sealedRecord
	for i := range s.n {
		if len(b) < entryLen+4 {
			return errTorn
		}
		r = sealedRecord{}
		if err := r.decode(b); err != nil {
			return err
		}
		r.at = le.Uint32(b[entryLen:])
		b = b[entryLen+4:]
		if uint64(r.at)+r.payloadBlocks() > uint64(s.end) {
			return errTorn
		}
		switch r.kind {
		case Data:
			if r.blocks > uint64(len(b)/4) {
				return errTorn
			}
			r.crcs, b = b[:4*r.blocks], b[4*r.blocks:]
		case Op:
			if r.lba > uint64(len(b)) {
				return errTorn
			}
			r.payload, b = b[:r.lba:r.lba], b[r.lba:]
		}
		f(s.first+Seq(i), &r)
	}
	if len(b) != 0 {
		return errTorn
	}
	return nil
}

// metaLog is the metadata log's newest file. Each record is synced before the next is written.
//
// A file is made under a temporary name and renamed when its content is stable; so a metadata file that
// is found has its header, and one whose making failed is not found. After a sync of an append failed,
// or a write other than for want of space, nothing is appended to the file: its records, which are all
// stable, are copied to a new one that is renamed over it. Every method may be called again after an
// error.
type metaLog struct {
	mu     turn.Lock // held over writes and syncs
	fs     vfs.FS
	dir    string
	log    UUID
	term   UUID
	file   vfs.File
	number uint64
	seq    uint64 // of the next record
	end    int64
	bytes  int64    // in this and the files before it since the last checkpoint
	pos    position // after all records
	bad    bool     // an append failed: copy the file before the next
	ragged bool     // a record was refused, of which all may have been written
	named  bool     // the file's name is stable
	closed bool
}

const metaTemp = "meta-new" // parseMetaName does not know it

// installLocked makes a file under a temporary name, has it filled and synced, and gives it its name.
// If it fails after that, the file is the newest, but its name may not be stable.
func (m *metaLog) installLocked(number uint64, fill func(vfs.File) error) error {
	temp, name := path.Join(m.dir, metaTemp), path.Join(m.dir, metaName(number))
	if err := m.fs.Remove(temp); err != nil && !errors.Is(err, fs.ErrNotExist) { // never twice into one file
		return err
	}
	f, err := m.fs.Create(temp)
	if err != nil {
		return err
	}
	if err = fill(f); err == nil {
		err = f.Sync()
	}
	if err == nil {
		err = m.fs.Rename(temp, name)
	}
	if err != nil {
		_ = f.Truncate(0) // gives space back; the file is of no use
		return errors.Join(err, f.Close())
	}
	if m.file != nil {
		_ = m.file.Close() // nothing in it is in doubt, or it was replaced
	}
	m.file, m.number, m.bad, m.ragged, m.named = f, number, false, false, false
	return m.nameLocked()
}

// nameLocked makes the file's name stable.
func (m *metaLog) nameLocked() error {
	if m.named {
		return nil
	}
	if err := m.fs.SyncDir(m.dir); err != nil {
		return err
	}
	m.named = true
	return nil
}

// rotateLocked starts a new file, whose name and header are stable when it returns nil.
func (m *metaLog) rotateLocked(number uint64) error {
	m.bad = m.bad || m.ragged // the next file starts with the record that was refused
	if err := m.readyLocked(); err != nil {
		return err
	}
	h := metaHeader{log: m.log, term: m.term, number: number, previous: m.number, first: m.seq}
	err := m.installLocked(number, func(f vfs.File) error {
		_, err := f.WriteAt(h.encode(), 0)
		return err
	})
	if m.number == number {
		m.end = block.Size
		m.bytes += block.Size
	}
	if err != nil {
		return fmt.Errorf("start metadata log %s: %w", metaName(number), err)
	}
	return nil
}

// readyLocked mends what the call before left.
func (m *metaLog) readyLocked() error {
	if m.closed {
		return ErrClosed
	}
	if m.bad {
		if err := m.installLocked(m.number, m.copyTo); err != nil {
			return fmt.Errorf("write %s anew: %w", metaName(m.number), err)
		}
	}
	if m.file == nil {
		return nil // the first is being started
	}
	return m.nameLocked()
}

// copyTo copies the header and the records, all stable, checking each.
func (m *metaLog) copyTo(f vfs.File) error {
	b := make([]byte, block.Size)
	if _, err := m.file.ReadAt(b, 0); err != nil {
		return err
	}
	h, err := decodeMetaHeader(b)
	if err != nil || h.number != m.number {
		return fmt.Errorf("%w: header of %s", ErrDamaged, metaName(m.number))
	}
	if _, err := f.WriteAt(b, 0); err != nil {
		return err
	}
	next := h.first
	for off := int64(block.Size); off < m.end; next++ {
		if _, err := m.file.ReadAt(b[:block.Size], off); err != nil {
			return err
		}
		n := int64(blocksFor(metaFixed+int(le.Uint32(b[8:])))) * block.Size
		if n > m.end-off {
			return fmt.Errorf("%w: record %d in %s", ErrDamaged, next, metaName(m.number))
		}
		b = slices.Grow(b[:0], int(n))[:n]
		if _, err := m.file.ReadAt(b, off); err != nil {
			return err
		}
		if r, _, err := decodeMetaRecord(b, off, h.term.seed()); err != nil || r.seq != next {
			return fmt.Errorf("%w: record %d in %s", ErrDamaged, next, metaName(m.number))
		}
		if _, err := f.WriteAt(b, off); err != nil {
			return err
		}
		off += n
	}
	if next != m.seq {
		return fmt.Errorf("%w: %s ends at record %d, not %d", ErrDamaged, metaName(m.number), next, m.seq)
	}
	return nil
}

// appendLocked writes one record and makes it stable. One that was refused for want of space is
// written over by the next.
func (m *metaLog) appendLocked(kind uint8, payload []byte) error {
	if err := m.readyLocked(); err != nil {
		return err
	}
	r := metaRecord{kind: kind, seq: m.seq, offset: m.end, payload: payload}
	b := r.encode(m.term.seed())
	_, err := m.file.WriteAt(b, m.end)
	if err == nil {
		err = m.file.Sync()
		m.bad = err != nil
	} else {
		m.bad, m.ragged = !refused(err), true
	}
	if err != nil {
		return fmt.Errorf("append to %s: %w", path.Join(m.dir, metaName(m.number)), err)
	}
	m.ragged = false
	m.seq++
	m.end += int64(len(b))
	m.bytes += int64(len(b))
	return nil
}

func (m *metaLog) appendSealedLocked(f *logFile, records []byte) error {
	if err := m.appendLocked(metaSealed, encodeSealed(f, records)); err != nil {
		return err
	}
	m.pos = position{term: f.term, file: f.file + 1, seq: f.last + 1, prevCRC: f.prevCRC}
	return nil
}

func (m *metaLog) appendTermLocked(p position) error {
	if err := m.appendLocked(metaTerm, p.append(nil)); err != nil {
		return err
	}
	m.pos = p
	return nil
}

func (m *metaLog) close() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.closed = true
	if m.file == nil {
		return nil
	}
	err := m.file.Close()
	m.file = nil
	return err
}

// metaBytesMax bounds one metadata record.
const metaBytesMax = 1 << 30

// AppendMeta writes a record of the pool, of a kind from OpaqueMin on, into the metadata log. It is
// stable on return, and comes back from Open in order until a checkpoint supersedes it. While the tier
// takes no writes, it waits until StopWaiting or Close.
func (l *Log) AppendMeta(kind uint8, payload []byte) error {
	if kind < OpaqueMin {
		return fmt.Errorf("append metadata of kind %d: kinds below %d are the log's own", kind, OpaqueMin)
	}
	if len(payload) > metaBytesMax {
		return fmt.Errorf("append metadata of kind %d: %d bytes: at most %d", kind, len(payload), metaBytesMax)
	}
	return l.withMeta(l.ctx, func(m *metaLog) error { return m.appendLocked(kind, payload) })
}

// MetaBytes is the length of the metadata log since the last checkpoint: what recovery must replay.
func (l *Log) MetaBytes() int64 {
	l.meta.mu.Lock()
	defer l.meta.mu.Unlock()
	return l.meta.bytes
}
