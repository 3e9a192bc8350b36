package pool

import (
	"errors"
	"fmt"
	"io/fs"
	"path"
	"sync"
	"sync/atomic"
	"time"

	"graindisk/block"
	"graindisk/grains/bootprofile"
)

// Boot profiles: what each disk reads in its first minute after an open, which for most is the boot of its
// guest, is recorded and kept in boot-NNNNNN on the tier, beside the log, and in published checkpoints, so
// that a fresh host has it too. At the next open it is read ahead (warm.go).
//
//	first read ─► record: bootWindow, BootBytes, or Close ─► boot-NNNNNN ─► next published checkpoint
//
// A recording with far less in it than the one before does not replace it: it was no boot.

// bootWindow is how long first reads are recorded. [tune]
const bootWindow = time.Minute

// bootReplace: a recording of less than one part in so many of the old one is dropped.
const bootReplace = 4

// boots is the boot profiles of a pool's disks, and their recording.
type boots struct {
	work   sync.WaitGroup // recordings
	warmed atomic.Int64   // bytes read ahead

	mu        sync.Mutex
	recorders []*bootprofile.Recorder
	profiles  map[block.DiskID][]byte // encoded
	unsaved   map[block.DiskID]bool   // learned from a checkpoint
}

func (b *boots) init() {
	b.profiles, b.unsaved = map[block.DiskID][]byte{}, map[block.DiskID]bool{}
}

// learn takes a profile from a checkpoint, if it has one.
func (b *boots) learn(id block.DiskID, profile []byte) {
	if len(profile) == 0 {
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.profiles[id], b.unsaved[id] = profile, true
}

// add puts the profiles into a snapshot.
func (b *boots) add(s *snapshot) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for i := range s.Disks {
		s.Disks[i].Boot = b.profiles[s.Disks[i].Disk]
	}
}

// recordBoot is what a disk tells of its reads; nil if nothing is recorded.
func (p *Pool) recordBoot(id block.DiskID) func(off, n int64) {
	if p.o.BootBytes < 0 {
		return nil
	}
	var r *bootprofile.Recorder
	r = bootprofile.NewRecorder(grainBlocks, p.o.BootBytes, func() {
		p.boots.work.Go(func() { p.record(id, r) })
	})
	p.boots.mu.Lock()
	defer p.boots.mu.Unlock()
	p.boots.recorders = append(p.boots.recorders, r)
	return r.Note
}

// record waits for the end of a recording and keeps it.
func (p *Pool) record(id block.DiskID, r *bootprofile.Recorder) {
	end := time.NewTimer(bootWindow)
	defer end.Stop()
	select {
	case <-end.C:
	case <-r.Over():
	}
	if err := p.keepBoot(id, r.Take()); err != nil {
		p.o.Log.Warn("boot profile not kept", "pool", p.o.Name, "disk", id, "err", err)
	}
}

// endBoots ends all recordings and waits until they are kept. No disk may be read any more.
func (p *Pool) endBoots() {
	b := &p.boots
	b.mu.Lock()
	recorders := b.recorders
	b.recorders = nil
	b.mu.Unlock()
	for _, r := range recorders {
		r.Halt()
	}
	b.work.Wait()
}

// keepBoot makes ranges the profile of a disk, unless there is one that says far more.
func (p *Pool) keepBoot(id block.DiskID, ranges []bootprofile.Range) error {
	now := bootprofile.Profile{Pool: p.uuid, Disk: id, Ranges: ranges}
	if was, ok := p.loadBoot(id); ok && now.Blocks()*bootReplace < was.Blocks() {
		return nil
	}
	enc := now.Encode()
	b := &p.boots
	b.mu.Lock()
	b.profiles[id] = enc
	delete(b.unsaved, id)
	b.mu.Unlock()
	return p.writeBoot(id, enc, ".new")
}

func (p *Pool) bootName(id block.DiskID) string {
	return path.Join(p.o.TierDir, fmt.Sprintf("boot-%06d", id))
}

// writeBoot replaces a disk's file by way of one of the same name and another suffix, of which each caller has
// his own. A crash leaves the old one, the new one, or one that is void.
func (p *Pool) writeBoot(id block.DiskID, enc []byte, suffix string) error {
	name := p.bootName(id)
	f, err := p.o.FS.Create(name + suffix)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(enc, 0)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	return p.o.FS.Rename(name+suffix, name)
}

// loadBoot returns the profile of a disk: that of the tier, or else that of the published checkpoint, which
// the tier then gets. One that cannot be read is none.
func (p *Pool) loadBoot(id block.DiskID) (bootprofile.Profile, bool) {
	enc, err := p.readBoot(id)
	prof, ok := p.checkBoot(id, enc)
	if err != nil && !errors.Is(err, fs.ErrNotExist) || err == nil && !ok {
		p.o.Log.Warn("boot profile on the tier is void", "pool", p.o.Name, "disk", id, "err", err)
	}
	b := &p.boots
	b.mu.Lock()
	if ok {
		b.profiles[id] = enc
		delete(b.unsaved, id)
		b.mu.Unlock()
		return prof, true
	}
	enc = b.profiles[id]
	unsaved := b.unsaved[id]
	delete(b.unsaved, id)
	b.mu.Unlock()
	if prof, ok = p.checkBoot(id, enc); ok && unsaved {
		if err := p.writeBoot(id, enc, ".old"); err != nil {
			p.o.Log.Warn("boot profile not kept", "pool", p.o.Name, "disk", id, "err", err)
		}
	}
	return prof, ok
}

func (p *Pool) checkBoot(id block.DiskID, enc []byte) (bootprofile.Profile, bool) {
	prof, err := bootprofile.Decode(enc)
	return prof, err == nil && prof.Disk == id && prof.Pool == p.uuid && len(prof.Ranges) > 0
}

func (p *Pool) readBoot(id block.DiskID) ([]byte, error) {
	f, err := p.o.FS.Open(p.bootName(id))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	n, err := f.Size()
	if err != nil || n > bootprofile.BytesMax {
		return nil, err
	}
	b := make([]byte, n)
	_, err = f.ReadAt(b, 0)
	return b, err
}
