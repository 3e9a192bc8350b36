package crashtest

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"testing"

	"graindisk/block"
	"graindisk/internal/vfs"
)

// toyLog is about the smallest disk that keeps its promises: a log of blocks, one header sector and one
// block per record, replayed up to the first bad one. It shows how the package is used, and what
// planted bugs it finds.
type toyLog struct {
	fs   *FS
	file vfs.File
	end  int64
	bug  string
	disk [toyBlocks][]byte
}

const (
	toyBlocks = 8
	toyRecord = SectorSize + block.Size
)

func openToyLog(fs *FS, bug string) (*toyLog, error) {
	l := &toyLog{fs: fs, bug: bug}
	var err error
	if l.file, err = fs.Open("log"); err != nil {
		if l.file, err = fs.Create("log"); err != nil {
			return nil, err
		}
	}
	// Even a file that was there: the process that created it may have died before its SyncDir.
	if bug != "no SyncDir" {
		if err := fs.SyncDir("/"); err != nil {
			return nil, err
		}
	}
	for {
		rec := make([]byte, toyRecord)
		if _, err := l.file.ReadAt(rec, l.end); err != nil {
			break
		}
		seq, lba := binary.LittleEndian.Uint64(rec), binary.LittleEndian.Uint32(rec[8:])
		if seq != uint64(l.end)+1 || bug != "no checksum" && binary.LittleEndian.Uint32(rec[12:]) != block.CRC(rec[16:]) {
			break
		}
		// A sync may have failed before the crash: then only writing again makes stable what can be read.
		if bug != "replay synced only" {
			if _, err := l.file.WriteAt(rec, l.end); err != nil {
				return nil, err
			}
		}
		l.disk[lba] = rec[SectorSize:]
		l.end += toyRecord
	}
	if err := l.file.Truncate(l.end); err != nil {
		return nil, err
	}
	if bug == "replay not made stable" {
		return l, nil
	}
	return l, l.file.Sync()
}

func (l *toyLog) write(lba block.LBA, data []byte) error {
	rec := make([]byte, SectorSize, toyRecord)
	rec = append(rec, data...)
	binary.LittleEndian.PutUint64(rec, uint64(l.end)+1)
	binary.LittleEndian.PutUint32(rec[8:], uint32(lba))
	binary.LittleEndian.PutUint32(rec[12:], block.CRC(rec[16:]))
	l.disk[lba] = data
	if l.bug == "acknowledged from memory" && lba == 0 {
		return nil
	}
	_, err := l.file.WriteAt(rec, l.end)
	l.end += toyRecord
	return err
}

func (l *toyLog) flush() error {
	if l.bug == "flush without sync" {
		return nil
	}
	err := l.file.Sync()
	if l.bug == "failed sync retried" && err != nil {
		err = l.file.Sync()
	}
	return err
}

func (l *toyLog) read(_ block.DiskID, lba block.LBA) (Stamp, error) {
	if l.disk[lba] == nil {
		return Stamp{}, nil
	}
	return ParseStamp(l.disk[lba])
}

// toyLife runs random writes and flushes until something fails.
func toyLife(l *toyLog, m *Model, rng *rand.Rand) {
	for range 12 {
		lba := block.LBA(rng.IntN(toyBlocks))
		id, data := m.IssueWrite(1, lba, 1)
		if l.write(lba, data) != nil {
			return
		}
		m.Acked(id)
		if rng.IntN(3) > 0 {
			continue
		}
		mark := m.Mark()
		if l.flush() != nil {
			return
		}
		m.Flushed(1, mark)
	}
}

// toyRun lets a log live, crash at the given call, recover, crash again while it recovers or later, by
// process and by power, and recover. It returns whether the first cut came at all, and what
// the checkers say.
func toyRun(bug string, cut int, seed uint64) (wasCut bool, err error) {
	fs := NewFS(Options{Seed: seed, CutAfter: cut})
	fs.Inject(Fault{Op: OpSync, Skip: 1 + int(seed%3), Count: int(1 + seed%2*1000)})
	m, rng := NewModel(), rand.New(rand.NewPCG(seed, 0))
	m.AddDisk(1, toyBlocks)
	l, err := openToyLog(fs, bug)
	if err == nil {
		toyLife(l, m, rng)
	}
	wasCut = fs.WasCut()
	for crash := range 4 {
		check := m.CheckPrefix
		if (uint64(crash)+seed/2)%2 == 0 {
			fs, check = fs.ProcessCrash(), m.CheckProcessCrash
		} else {
			fs = fs.Reboot(seed)
		}
		if l, err = openToyLog(fs, bug); err != nil {
			return wasCut, err
		}
		if err := check(l.read); err != nil {
			return wasCut, fmt.Errorf("crash %d: %w", crash, err)
		}
		if err := m.Recover(l.read); err != nil {
			return wasCut, err
		}
		fs.CutAfter(1 + rng.IntN(20))
		toyLife(l, m, rng)
	}
	return wasCut, nil
}

// toySeeds is how many runs each cut gets.
const toySeeds = 10

func TestPlantedBugsAreFound(t *testing.T) {
	for _, bug := range []string{"none", "no SyncDir", "no checksum", "replay not made stable", "replay synced only",
		"acknowledged from memory", "flush without sync", "failed sync retried"} {
		t.Run(bug, func(t *testing.T) {
			runs, found := 0, error(nil)
			for cut, done := 1, false; !done && found == nil; cut++ {
				done = true // until a run is still cut here
				for seed := range uint64(toySeeds) {
					wasCut, err := toyRun(bug, cut, seed)
					if bug == "none" && err != nil {
						t.Fatalf("cut %d, seed %d: %v", cut, seed, err)
					}
					runs++
					found = cmp.Or(found, err)
					done = done && !wasCut
				}
			}
			if bug != "none" && found == nil {
				t.Errorf("not found in %d runs", runs)
			}
			t.Logf("%d runs: %v", runs, found)
		})
	}
}
