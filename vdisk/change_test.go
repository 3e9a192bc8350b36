package vdisk

import (
	"bytes"
	"context"
	"errors"
	"testing"
	"testing/synctest"

	"graindisk/block"
	"graindisk/vdisk/densetree"
	"graindisk/writeback"
)

// TestAWriteThatMeetsAChangeLiesBeforeOrAfterIt has writes admitted to a disk that changes before they get the locks.
func TestAWriteThatMeetsAChangeLiesBeforeOrAfterIt(t *testing.T) {
	op := writeback.Record{Kind: writeback.Op, Disk: 1, Data: []byte("row")}
	for _, tt := range []struct {
		name   string
		op     Op
		change func(d *Disk) error
		want   error
	}{
		{"whole blocks, cut off", Op{Kind: OpWrite, Off: 12 * block.Size, Len: block.Size, Data: make([]byte, block.Size)},
			func(d *Disk) error { return d.Resize(context.Background(), 8*block.Size, op) }, ErrRange},
		{"part of a block, cut off", Op{Kind: OpWrite, Off: 12*block.Size + 7, Len: 1, Data: []byte{1}},
			func(d *Disk) error { return d.Resize(context.Background(), 8*block.Size, op) }, ErrRange},
		{"whole blocks, kept", Op{Kind: OpWrite, Len: block.Size, Data: bytes.Repeat([]byte{1}, block.Size)},
			func(d *Disk) error { return d.Resize(context.Background(), 8*block.Size, op) }, nil},
		{"of a deleted disk", Op{Kind: OpWrite, Len: block.Size, Data: make([]byte, block.Size)},
			func(d *Disk) error { return d.Delete(func() error { return nil }) }, ErrDeleted},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				d, _ := newDisk(t)
				d.lock(allLocks, true)
				changed, written := make(chan error, 1), make(chan error, 1)
				go func() { changed <- tt.change(d) }()
				synctest.Wait() // it stands first in line for the lock of block 0 to 15
				go func() { written <- d.Write(context.Background(), []Op{tt.op}, false) }()
				synctest.Wait()
				d.unlock(allLocks, true)
				if err := <-changed; err != nil {
					t.Fatal(err)
				}
				if err := <-written; !errors.Is(err, tt.want) {
					t.Errorf("written: %v, want %v", err, tt.want)
				}
			})
		})
	}
}

func TestADeleteThatFailsLeavesTheDisk(t *testing.T) {
	d, _ := newDisk(t)
	failure := errors.New("no record")
	if err := d.Delete(func() error { return failure }); !errors.Is(err, failure) {
		t.Errorf("delete: %v", err)
	}
	release, err := d.Use()
	if err != nil || d.Users() != 1 {
		t.Fatalf("%v, %d users", err, d.Users())
	}
	release()
	if err := d.Delete(func() error { return nil }); err != nil {
		t.Fatal(err)
	}
	if _, err := d.Use(); !errors.Is(err, ErrDeleted) || d.Users() != 0 {
		t.Errorf("use of a deleted disk: %v, %d users", err, d.Users())
	}
}

// movedExtents has lost one extent.
type movedExtents struct {
	fakeExtents
	lost  block.ExtentID
	moved func() // the map changes
}

func (f *movedExtents) ReadCached(block.ExtentID, int, []byte) bool { return false }

func (f *movedExtents) Read(ctx context.Context, ps []Piece, ready func([]Done)) error {
	var failed error
	for i, p := range ps {
		fill(p.Dst, p.ID, p.Off)
		var err error
		if p.ID == f.lost {
			err = errors.Join(ErrMoved, ErrDamaged)
			failed = err
			if f.moved != nil {
				f.moved()
			}
		}
		if ready != nil {
			ready([]Done{{Piece: i, Err: err}})
		}
	}
	if ready != nil {
		return nil
	}
	return failed
}

// TestWhatIsNotStoredIsLookedUpAgain has an extent vanish that the map named a moment ago: the map tells what is there
// now, or, if it says the same, that it is damage.
func TestWhatIsNotStoredIsLookedUpAgain(t *testing.T) {
	for _, moves := range []bool{true, false} {
		for what, read := range map[string]func(d *Disk, p []byte) error{
			"Read": func(d *Disk, p []byte) error { return d.Read(context.Background(), p, 0) },
			"ReadPieces": func(d *Disk, p []byte) (err error) {
				done := 0
				e := d.ReadPieces(context.Background(), p, 0, func(parts []Part) {
					for _, a := range parts {
						done += a.To - a.From
						err = errors.Join(err, a.Err)
					}
				})
				if e == nil && done != len(p) {
					e = errors.New("not all was told")
				}
				return errors.Join(e, err)
			},
			"part of a block": func(d *Disk, p []byte) error {
				err := d.Write(context.Background(), []Op{{Kind: OpWrite, Off: 5, Len: 1, Data: []byte{p[5]}}}, false)
				if err == nil {
					err = d.Read(context.Background(), p, 0)
				}
				return err
			},
		} {
			d, _ := newDisk(t)
			x := &movedExtents{lost: 70}
			x.local = map[block.ExtentID]bool{}
			d.o.Extents = x
			put := func(id block.ExtentID) {
				d.o.Tree.Put([]densetree.Entry{{LBA: 0, Blocks: 2, Kind: densetree.Data, Extent: id, Orig: 2}})
			}
			put(70)
			d.o.Tree.Put([]densetree.Entry{{LBA: 2, Blocks: 2, Kind: densetree.Data, Extent: 90, Orig: 2}})
			if moves {
				x.moved = func() { put(80) }
			}
			want := make([]byte, 4*block.Size)
			fill(want[:2*block.Size], 80, 0)
			fill(want[2*block.Size:], 90, 0)
			got := make([]byte, len(want))
			got[5] = want[5]
			err := read(d, got)
			switch {
			case !moves && !errors.Is(err, ErrDamaged):
				t.Errorf("%s of what the map still names: %v", what, err)
			case moves && (err != nil || !bytes.Equal(got, want)):
				t.Errorf("%s of what the map names no more: %v", what, err)
			}
		}
	}
}
