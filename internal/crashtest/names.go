package crashtest

import (
	iofs "io/fs"
	"maps"
	"path"
	"slices"
	"strings"
	"syscall"
	"time"
)

// disk is the state below one or more FS in succession: a tree of inodes, each with what is visible
// and what is stable, and the operations on names that are not stable yet. The FS that holds it
// guards it.
type disk struct {
	root      *inode
	stable    names    // what a power cut leaves at least
	pending   []nameOp // since then, in order of issue
	seq       uint64   // rises with every write, resize and operation on names
	nextID    uint64
	usedBytes int64
	capacity  int64 // 0 is no limit
}

// nameOp is one volatile operation on names: ino gets the name dir/name, losing any other it has, or
// (unlink) loses it.
type nameOp struct {
	seq    uint64
	dir    *inode
	name   string
	ino    *inode
	from   *inode // the folder a rename takes the file from; nil otherwise
	unlink bool
}

func (op *nameOp) touches(dir *inode) bool { return op.dir == dir || op.from == dir }

// place is where a name is.
type place struct {
	dir  *inode
	name string
}

// names is one state of all names: each inode but the root has at most one. What lies below a folder
// that lost its name is still listed, but cannot be met from the root.
type names struct {
	at    map[place]*inode
	where map[*inode]place

	// The newest operation applied to a place and to an inode. Folders are synced in any order, so an
	// operation may be applied after newer ones, and must not undo them.
	placeSeq map[place]uint64
	inodeSeq map[*inode]uint64
}

func newNames() names {
	return names{map[place]*inode{}, map[*inode]place{}, map[place]uint64{}, map[*inode]uint64{}}
}

func (n names) clone() names {
	return names{maps.Clone(n.at), maps.Clone(n.where), maps.Clone(n.placeSeq), maps.Clone(n.inodeSeq)}
}

// apply does what is left to do of an operation: the file leaves its old name and whatever has the new
// one loses it, each unless something newer was applied to it.
func (n names) apply(op *nameOp) {
	p := place{op.dir, op.name}
	newFile, newPlace := n.inodeSeq[op.ino] < op.seq, n.placeSeq[p] < op.seq
	if old, ok := n.where[op.ino]; ok && newFile && (!op.unlink || old == p) {
		delete(n.at, old)
		delete(n.where, op.ino)
	}
	if hidden, ok := n.at[p]; ok && newPlace && !op.unlink {
		delete(n.at, p)
		delete(n.where, hidden)
	}
	if newFile && newPlace && !op.unlink {
		n.at[p], n.where[op.ino] = op.ino, p
	}
	n.placeSeq[p] = max(n.placeSeq[p], op.seq)
	n.inodeSeq[op.ino] = max(n.inodeSeq[op.ino], op.seq)
}

func newDisk(capacity int64) *disk {
	d := &disk{capacity: capacity, stable: newNames()}
	d.root = d.newDir()
	return d
}

func (d *disk) newInode() *inode {
	d.nextID++
	return &inode{id: d.nextID}
}

func (d *disk) newDir() *inode {
	ino := d.newInode()
	ino.names = map[string]*inode{}
	return ino
}

func split(p string) []string {
	return strings.FieldsFunc(path.Clean("/"+p), func(r rune) bool { return r == '/' })
}

// lookup returns what bears the name.
func (d *disk) lookup(p string) (*inode, error) { return d.walk(split(p)) }

func (d *disk) walk(parts []string) (*inode, error) {
	ino := d.root
	for _, name := range parts {
		if !ino.isDir() {
			return nil, syscall.ENOTDIR
		}
		if ino = ino.names[name]; ino == nil {
			return nil, iofs.ErrNotExist
		}
	}
	return ino, nil
}

// parent returns the folder of a name, and the name in it.
func (d *disk) parent(p string) (dir *inode, name string, err error) {
	parts := split(p)
	if len(parts) == 0 {
		return nil, "", syscall.EBUSY // the root
	}
	last := len(parts) - 1
	if dir, err = d.walk(parts[:last]); err == nil && !dir.isDir() {
		err = syscall.ENOTDIR
	}
	return dir, parts[last], err
}

// note makes an operation visible and remembers that it is volatile.
func (d *disk) note(op nameOp) {
	d.seq++
	op.seq = d.seq
	hidden := op.dir.names[op.name]
	if op.unlink {
		delete(op.dir.names, op.name)
	} else {
		op.dir.names[op.name] = op.ino
		op.ino.named = true
	}
	if hidden != nil {
		hidden.named = false
		d.freeIfUnused(hidden)
	}
	d.pending = append(d.pending, op)
}

func (d *disk) create(p string) (*inode, error) {
	dir, name, err := d.parent(p)
	if err != nil {
		return nil, err
	}
	if ino := dir.names[name]; ino != nil {
		if ino.isDir() {
			return nil, syscall.EISDIR
		}
		return ino, d.truncate(ino, 0)
	}
	ino := d.newInode()
	d.note(nameOp{dir: dir, name: name, ino: ino})
	return ino, nil
}

func (d *disk) remove(p string) error {
	dir, name, err := d.parent(p)
	if err != nil {
		return err
	}
	ino := dir.names[name]
	if ino == nil {
		return iofs.ErrNotExist
	}
	if len(ino.names) > 0 {
		return syscall.ENOTEMPTY
	}
	d.note(nameOp{dir: dir, name: name, ino: ino, unlink: true})
	return nil
}

func (d *disk) rename(from, to string) error {
	oldDir, oldName, err := d.parent(from)
	if err != nil {
		return err
	}
	dir, name, err := d.parent(to)
	if err != nil {
		return err
	}
	ino, hidden := oldDir.names[oldName], dir.names[name]
	switch {
	case ino == nil:
		return iofs.ErrNotExist
	case ino.isDir():
		return syscall.ENOTSUP
	case hidden == ino:
		return nil
	case hidden != nil && hidden.isDir():
		return syscall.EISDIR
	}
	delete(oldDir.names, oldName)
	d.note(nameOp{dir: dir, name: name, ino: ino, from: oldDir})
	return nil
}

func (d *disk) mkdirAll(p string) error {
	dir := d.root
	for _, name := range split(p) {
		next := dir.names[name]
		if next == nil {
			next = d.newDir()
			d.note(nameOp{dir: dir, name: name, ino: next})
		}
		if !next.isDir() {
			return syscall.ENOTDIR
		}
		dir = next
	}
	return nil
}

// syncDir makes stable every operation that touches the folder.
func (d *disk) syncDir(p string) error {
	dir, err := d.lookup(p)
	if err != nil {
		return err
	}
	if !dir.isDir() {
		return syscall.ENOTDIR
	}
	rest := d.pending[:0]
	for _, op := range d.pending {
		if op.touches(dir) {
			d.stable.apply(&op)
		} else {
			rest = append(rest, op)
		}
	}
	clear(d.pending[len(rest):])
	d.pending = rest
	if len(rest) == 0 { // nothing older can be applied any more
		clear(d.stable.placeSeq)
		clear(d.stable.inodeSeq)
	}
	return nil
}

func (d *disk) readDir(p string) ([]iofs.DirEntry, error) {
	dir, err := d.lookup(p)
	if err != nil {
		return nil, err
	}
	if !dir.isDir() {
		return nil, syscall.ENOTDIR
	}
	list := make([]iofs.DirEntry, 0, len(dir.names))
	for _, name := range slices.Sorted(maps.Keys(dir.names)) {
		list = append(list, iofs.FileInfoToDirEntry(info{name, dir.names[name].size, dir.names[name].isDir()}))
	}
	return list, nil
}

// freeIfUnused gives back the space of a file that has neither a name nor a handle.
func (d *disk) freeIfUnused(ino *inode) {
	if !ino.named && ino.opens == 0 {
		d.usedBytes -= ino.sectors * SectorSize
		ino.sectors = 0
	}
}

// forgetOpenFiles closes every handle and counts the space anew.
func (d *disk) forgetOpenFiles() {
	d.usedBytes = 0
	d.countBelow(d.root)
}

func (d *disk) countBelow(dir *inode) {
	for _, ino := range dir.names {
		ino.opens = 0
		d.usedBytes += ino.sectors * SectorSize
		d.countBelow(ino)
	}
}

// info implements fs.FileInfo. Times are not kept.
type info struct {
	name string
	size int64
	dir  bool
}

func (i info) Name() string       { return i.name }
func (i info) Size() int64        { return i.size }
func (i info) IsDir() bool        { return i.dir }
func (i info) ModTime() time.Time { return time.Time{} }
func (i info) Sys() any           { return nil }

func (i info) Mode() iofs.FileMode {
	if i.dir {
		return iofs.ModeDir | 0o700
	}
	return 0o600
}
