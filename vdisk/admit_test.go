package vdisk

import (
	"bytes"
	"context"
	"errors"
	"testing"
	"time"

	"graindisk/block"
	"graindisk/internal/vfs"
	"graindisk/tier"
	"graindisk/vdisk/densetree"
	"graindisk/writeback"
)

// TestOnlyWritesWaitAtTheBound brings a disk to its bound on exposure: writes wait, holding no lock, and
// reads, flushes and trims pass, a trim ahead of a write in the same request too.
func TestOnlyWritesWaitAtTheBound(t *testing.T) {
	space, err := tier.Open(tier.Options{FS: vfs.OS{}, Dir: t.TempDir(), SlotBytes: 1 << 20, Slots: 16})
	if err != nil {
		t.Fatal(err)
	}
	log, err := writeback.Create(writeback.Options{FS: vfs.OS{}, Dir: t.TempDir(), Space: space, MaxExposure: 2 * block.Size})
	if err != nil {
		t.Fatal(err)
	}
	defer space.Close()
	defer log.Close()
	d := New(Options{
		ID: 1, Name: "d", Size: diskBytes, Log: log, Extents: &fakeExtents{local: map[block.ExtentID]bool{}},
		Gate: func() error { return nil }, Tree: densetree.New(densetree.Options{}),
	})
	ctx := context.Background()
	ones := bytes.Repeat([]byte{1}, 2*block.Size)
	op := func(kind OpKind, blk, blocks int64) Op {
		o := Op{Kind: kind, Off: blk * block.Size, Len: blocks * block.Size}
		if kind == OpWrite {
			o.Data = ones[:o.Len]
		}
		return o
	}
	if err := d.Write(ctx, []Op{op(OpWrite, 0, 2)}, false); err != nil {
		t.Fatal(err)
	}
	if d.Prompt([]Op{op(OpWrite, 0, 1)}) {
		t.Error("a write at the bound is called prompt")
	}
	short, cancel := context.WithTimeout(ctx, 50*time.Millisecond)
	defer cancel()
	for name, ops := range map[string][]Op{
		"whole blocks":     {op(OpWrite, 0, 1)},
		"part of a block":  {{Kind: OpWrite, Off: 5, Len: 3, Data: ones[:3]}},
		"zero of a part":   {{Kind: OpZero, Off: 5, Len: 3}},
		"trim, then write": {op(OpTrim, 1, 1), op(OpWrite, 3, 1)},
	} {
		if err := d.Write(short, ops, false); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%s: %v", name, err)
		}
	}
	released := make(chan error)
	go func() { released <- d.Write(ctx, []Op{op(OpWrite, 0, 1)}, false) }()
	for !log.Pressure().Waiting {
		time.Sleep(time.Millisecond)
	}
	got := make([]byte, 3*block.Size)
	err = errors.Join(d.Read(ctx, got, 0), d.Flush(ctx), d.Write(ctx, []Op{op(OpTrim, 4, 4), op(OpZero, 8, 4)}, true))
	if err != nil {
		t.Error(err)
	}
	if got[0] != 1 || got[block.Size] != 0 || got[2*block.Size] != 0 {
		t.Error("the trim ahead of a waiting write was not applied, or more than it was")
	}
	if err := log.Publish(log.Freeze()); err != nil {
		t.Fatal(err)
	}
	if err := <-released; err != nil {
		t.Error(err)
	}
}
