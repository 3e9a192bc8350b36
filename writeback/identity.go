package writeback

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"path"

	"graindisk/block"
	"graindisk/internal/vfs"
)

// identity says who the log is. It is written last of all that Create writes, and never again.
//
//	0       4     6     8          16         32          48           56     4092
//	+-------+-----+-----+----------+----------+-----------+------------+------+-----+
//	| GDID  | ver | 0   | incompat | log uuid | pool uuid | slot bytes | zero | crc |
//	+-------+-----+-----+----------+----------+-----------+------------+------+-----+
type identity struct {
	log       UUID
	pool      UUID
	slotBytes int64 // 0 in those that were written before it was noted
}

const (
	identityMagic = "GDID"
	identityName  = "identity"
)

func (id identity) encode() []byte {
	b := make([]byte, block.Size)
	putStart(b, identityMagic)
	copy(b[16:], id.log[:])
	copy(b[32:], id.pool[:])
	le.PutUint64(b[48:], uint64(id.slotBytes))
	le.PutUint32(b[fileCRCAt:], block.CRC(b[:fileCRCAt]))
	return b
}

func decodeIdentity(b []byte) (id identity, err error) {
	if len(b) != block.Size || string(b[:4]) != identityMagic || block.CRC(b[:fileCRCAt]) != le.Uint32(b[fileCRCAt:]) {
		return id, errTorn
	}
	if err := checkStart(b, "log identity"); err != nil {
		return id, err
	}
	copy(id.log[:], b[16:])
	copy(id.pool[:], b[32:])
	id.slotBytes = int64(le.Uint64(b[48:]))
	if id.slotBytes < 0 || id.slotBytes%block.Size != 0 || !isZero(b[56:fileCRCAt]) {
		return id, errTorn
	}
	return id, nil
}

func newUUID() (u UUID) {
	rand.Read(u[:]) // never fails
	return u
}

func readIdentity(fsys vfs.FS, dir string) (id identity, err error) {
	name := path.Join(dir, identityName)
	b, err := readAll(fsys, name)
	if errors.Is(err, fs.ErrNotExist) {
		return id, fmt.Errorf("%w in %s", ErrNoLog, dir)
	}
	if err != nil {
		return id, err
	}
	if id, err = decodeIdentity(b); errors.Is(err, errTorn) {
		return id, fmt.Errorf("%w: %s is not an identity", ErrDamaged, name)
	} else if err != nil {
		return id, fmt.Errorf("%s: %w", name, err)
	}
	return id, nil
}

// Create makes a new, empty log in o.Dir and opens it. It refuses if there is one (ErrExists), or
// what may be the remains of one.
func Create(o Options) (*Log, error) {
	o = o.withDefaults()
	if _, err := readIdentity(o.FS, o.Dir); err == nil {
		return nil, fmt.Errorf("%w in %s", ErrExists, o.Dir)
	} else if !errors.Is(err, ErrNoLog) {
		return nil, fmt.Errorf("create log: %w", err)
	}
	if err := clearUnfinished(o); err != nil {
		return nil, fmt.Errorf("create log: %w", err)
	}
	l := newLog(o, newUUID())
	pos := position{term: l.term, file: 1, seq: 1}
	if err := l.meta.rotateLocked(1); err != nil {
		return nil, fmt.Errorf("create log: %w", err)
	}
	err := l.meta.appendTermLocked(pos)
	if err == nil {
		err = writeIdentity(o, identity{log: l.id, pool: o.Pool, slotBytes: o.Space.SlotBytes()})
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("create log: %w", err), l.meta.close())
	}
	o.Space.Claimed() // a new log needs nothing of what is there
	l.startAt(pos)
	return l, nil
}

// clearUnfinished removes what an interrupted Create left, which is one short metadata file.
func clearUnfinished(o Options) error {
	names, err := o.FS.ReadDir(o.Dir)
	if err != nil {
		return err
	}
	for _, e := range names {
		n, isMeta := parseMetaName(e.Name())
		name := path.Join(o.Dir, e.Name())
		if e.Name() == ckptName(0) || e.Name() == ckptName(1) || isMeta && n != 1 {
			return fmt.Errorf("%w: %s has no identity but %s; remove what is left of that log first", ErrDamaged, o.Dir, e.Name())
		}
		if isMeta {
			if b, err := readAll(o.FS, name); err != nil {
				return err
			} else if len(b) > 2*block.Size {
				return fmt.Errorf("%w: %s has no identity but %s; remove what is left of that log first", ErrDamaged, o.Dir, e.Name())
			}
		}
	}
	return nil
}

func writeIdentity(o Options, id identity) (err error) {
	name := path.Join(o.Dir, identityName)
	f, err := o.FS.Create(name + ".tmp")
	if err != nil {
		return err
	}
	_, err = f.WriteAt(id.encode(), 0)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	if err := o.FS.Rename(name+".tmp", name); err != nil {
		return err
	}
	return o.FS.SyncDir(o.Dir)
}

// newLog is a log with nothing in it, under a new term.
func newLog(o Options, id UUID) *Log {
	l := &Log{opts: o, fs: o.FS, space: o.Space, id: id, term: newUUID(), crcs: newChecksums(o.Space)}
	l.meta = metaLog{fs: o.FS, dir: o.Dir, log: id, term: l.term, seq: 1}
	l.gens = []*generation{newGeneration(0)}
	l.gate = newGate(o.Now, o.Space.SlotBytes()/marginShare, l.zone, l.shut)
	return l
}

// startAt begins to serve at pos, the start of the log's term.
func (l *Log) startAt(pos position) {
	l.nextFile = pos.file
	l.written, l.stable = pos.seq-1, pos.seq-1
	l.start()
}
