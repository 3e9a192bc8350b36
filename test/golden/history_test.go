package golden

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"graindisk/backend/local"
	"graindisk/block"
	"graindisk/pool"
	"graindisk/vdisk"
)

// A step is one thing done to the golden pool, in the order of the list.
type step struct {
	kind        string // create, write, hole, publish, close, kill
	disk        string
	lba, blocks int
}

// diskBlocks is the size of every disk: 4 MiB.
const diskBlocks = 1024

// history is what the golden pool went through. It must not change without the archive.
func history() (steps []step) {
	add := func(kind, disk string, lba, blocks int) { steps = append(steps, step{kind, disk, lba, blocks}) }
	add("create", "a", 0, 0)
	add("create", "b", 0, 0)
	for i := range 20 { // more cuts than a closing pool leaves without a checkpoint
		add("write", "a", 7*i, 9)
		if i%4 == 3 {
			add("hole", "a", 7*i-10, 5)
			add("write", "b", 16*i, 16)
		}
		add("publish", "", 0, 0)
	}
	add("close", "", 0, 0)
	for i := range 10 { // a cut of more than 1 MiB, stored as 2+1
		add("write", "b", 300+40*i, 35)
	}
	add("hole", "b", 350, 60)
	add("hole", "a", 50, 11) // published by the checkpoint
	add("publish", "", 0, 0)
	add("write", "a", 100, 3)
	add("publish", "", 0, 0)
	add("create", "c", 0, 0) // from here on only the log has it
	add("write", "c", 5, 20)
	add("write", "a", 101, 4)
	add("hole", "b", 0, 30)
	add("write", "b", 29, 2)
	add("kill", "", 0, 0)
	return steps
}

// options of the golden pool in dir. Cuts are made only by its history.
func options(dir string) (pool.Options, error) {
	o := pool.Options{
		Name: "main", TierDir: filepath.Join(dir, "tier"), TierBytes: 16 << 18, SlotBytes: 1 << 18,
		SegmentBytes: 2 << 20, MaxDirtyAge: time.Hour, Host: "golden",
	}
	for _, name := range []string{"a", "b", "c"} {
		s, err := local.Open(filepath.Join(dir, "targets", name), local.Options{Create: true})
		if err != nil {
			return o, err
		}
		o.Targets = append(o.Targets, pool.Target{Name: name, Store: s})
	}
	return o, nil
}

// play makes the golden pool in dir. It never returns nil: at the end of the history it kills its process.
func play(ctx context.Context, dir string) error {
	o, err := options(dir)
	if err != nil {
		return err
	}
	o.CreateEmpty = true
	p, err := pool.Open(ctx, o)
	for i, s := range history() {
		if err != nil {
			return fmt.Errorf("step %d: %w", i, err)
		}
		switch s.kind {
		case "create":
			_, err = p.CreateDisk(ctx, s.disk, diskBlocks*block.Size)
		case "write", "hole":
			err = change(ctx, p, i, s)
		case "publish":
			err = p.Publish(ctx)
		case "close":
			if err = p.Close(ctx); err == nil {
				p, err = pool.Open(ctx, o)
			}
		case "kill":
			err = syscall.Kill(os.Getpid(), syscall.SIGKILL)
		}
	}
	return err
}

func change(ctx context.Context, p *pool.Pool, i int, s step) error {
	d, err := p.Disk(s.disk)
	if err != nil {
		return err
	}
	op := vdisk.Op{Kind: vdisk.OpTrim, Off: int64(s.lba) * block.Size, Len: int64(s.blocks) * block.Size}
	if s.kind == "write" {
		op.Kind = vdisk.OpWrite
		for b := range s.blocks {
			op.Data = append(op.Data, content(i, s.lba+b)...)
		}
	}
	return d.Write(ctx, []vdisk.Op{op}, false)
}

// content is what step i writes to a block: one word, again and again, so that the archive is small.
func content(i, lba int) []byte {
	word := binary.LittleEndian.AppendUint64(nil, uint64(i)<<32|uint64(lba)|1<<63)
	return bytes.Repeat(word, block.Size/len(word))
}

// expected is what every disk holds after the whole history, or as of its last cut, by block: the step that
// wrote it, or -1.
func expected(published bool) map[string][]int {
	steps := history()
	end := len(steps)
	for published && steps[end-1].kind != "publish" {
		end--
	}
	disks := map[string][]int{}
	for i, s := range steps[:end] {
		if s.kind == "create" {
			disks[s.disk] = make([]int, diskBlocks)
			for lba := range disks[s.disk] {
				disks[s.disk][lba] = -1
			}
		}
		for b := range s.blocks {
			disks[s.disk][s.lba+b] = i
			if s.kind == "hole" {
				disks[s.disk][s.lba+b] = -1
			}
		}
	}
	return disks
}

// check expects the pool to hold exactly the given disks and blocks.
func check(t *testing.T, p *pool.Pool, want map[string][]int) {
	t.Helper()
	if have := p.Disks(); len(have) != len(want) {
		t.Errorf("the pool has %d disks, want %d: %v", len(have), len(want), have)
	}
	for name, blocks := range want {
		d, err := p.Disk(name)
		if err != nil {
			t.Fatal(err)
		}
		got := make([]byte, diskBlocks*block.Size)
		if err := d.Read(t.Context(), got, 0); err != nil {
			t.Fatalf("disk %s: %v", name, err)
		}
		for lba, step := range blocks {
			wantBlock := make([]byte, block.Size)
			if step >= 0 {
				wantBlock = content(step, lba)
			}
			if !bytes.Equal(got[lba*block.Size:][:block.Size], wantBlock) {
				t.Fatalf("disk %s block %d: %x..., want what step %d wrote", name, lba, got[lba*block.Size:][:8], step)
			}
		}
	}
}
