package writeback

import (
	"errors"
	"path"
	"strings"
	"testing"

	"graindisk/block"
)

// TestNewerLogsAreLeftAlone marks each format in a log as written by a newer release, in turn: opening it is refused, in
// words that say so, and changes nothing, however often it is tried.
func TestNewerLogsAreLeftAlone(t *testing.T) {
	// The blocks that may begin with a magic, of the files of that name; the newest file has the highest name.
	for magic, where := range map[string]string{
		"GDID": "identity", "GDMF": "meta-", "GDCK": "ckpt-", "GDLF": "slot-", "GDLB": "slot-",
	} {
		for what, at := range map[string]int{"version": 4, "incompat bits": 9} {
			t.Run(magic+" "+what, func(t *testing.T) {
				r := newRig(t, 8, 64)
				r.append(data(0, 1, 2, 3))
				c, err := r.log.FreezeAndRotate(bg)
				if err == nil {
					err = r.log.WriteCheckpoint(c, []byte("state"))
				}
				if err != nil {
					t.Fatal(err)
				}
				r.append(data(5, 4))
				r.append(data(9, 5))
				r.sync()
				r.log.Close()
				r.fs = r.fs.ProcessCrash()
				if !r.mark(magic, where, at) {
					t.Fatalf("no %s in any %s", magic, where)
				}
				was := r.fs.Hash()
				for range 2 {
					space := openSpace(t, r.fs, testDir, r.slots, r.slotBlocks)
					o := r.options()
					o.Space = space
					l, _, err := Open(o)
					if err == nil {
						l.Close()
					}
					if !errors.Is(err, ErrNewer) || !strings.Contains(err.Error(), what[:7]) {
						t.Errorf("open: %v", err)
					}
					if err := space.Close(); err != nil {
						t.Error(err)
					}
				}
				if r.fs.Hash() != was {
					t.Error("the tier has changed")
				}
			})
		}
	}
}

// mark changes a byte at `at` of the last block that begins with magic, of the newest file of the name that has one,
// and makes its checksum right again.
func (r *rig) mark(magic, name string, at int) bool {
	r.t.Helper()
	files, err := r.fs.ReadDir(testDir)
	if err != nil {
		r.t.Fatal(err)
	}
	for i := len(files) - 1; i >= 0; i-- {
		if !strings.HasPrefix(files[i].Name(), name) {
			continue
		}
		f, err := r.fs.Open(path.Join(testDir, files[i].Name()))
		if err != nil {
			r.t.Fatal(err)
		}
		size, err := f.Size()
		if err != nil {
			r.t.Fatal(err)
		}
		for off := size/block.Size*block.Size - block.Size; off >= 0; off -= block.Size {
			b := make([]byte, block.Size)
			if _, err := f.ReadAt(b, off); err != nil {
				r.t.Fatal(err)
			}
			if string(b[:4]) != magic {
				continue
			}
			b[at] ^= 2
			resealAs(magic, b)
			if _, err := f.WriteAt(b, off); err != nil {
				r.t.Fatal(err)
			}
			return true
		}
	}
	return false
}

// resealAs is reseal for headers that carry their own term.
func resealAs(magic string, b []byte) {
	var term UUID
	copy(term[:], b[32:48])
	switch magic {
	case batchMagic:
		le.PutUint32(b[batchCRCAt:], crcAround(term.seed(), b, batchCRCAt))
	case fileMagic, metaFileMagic:
		le.PutUint32(b[fileCRCAt:], crcSeeded(term.seed(), b[:fileCRCAt]))
	default:
		le.PutUint32(b[fileCRCAt:], block.CRC(b[:fileCRCAt]))
	}
}
