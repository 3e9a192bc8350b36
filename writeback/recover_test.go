package writeback

import (
	"context"
	"errors"
	"testing"
	"time"

	"graindisk/block"
	"graindisk/internal/crashtest"
)

// TestRecoveryStoresAgainWhatAFailedSyncLost dies after a failed sync, whose pages then count as clean:
// recovery must write them again before it calls them stable.
func TestRecoveryStoresAgainWhatAFailedSyncLost(t *testing.T) {
	r := newRig(t, 8, 64)
	r.append(data(0, 1))
	r.sync()
	r.append(data(1, 2))
	r.fs.Inject(crashtest.Fault{Op: crashtest.OpSync, Path: "*/slot-*"})
	if err := r.log.Sync(bg); !errors.Is(err, ErrFailed) {
		t.Fatalf("sync: %v", err)
	}
	for _, crash := range []func() *crashtest.FS{
		r.fs.ProcessCrash,
		func() *crashtest.FS { return r.fs.RebootKeep(1, crashtest.KeepNone) },
	} {
		if _, err := r.reopen(crash); err != nil {
			t.Fatal(err)
		}
		if err := r.log.DropThrough(0); err != nil {
			t.Fatal(err)
		}
		r.expect(0, 1, 2)
	}
}

// TestACheckpointAcrossTheHorizonKeepsItsFiles recovers a checkpoint whose one generation spans two
// tenures, of which the root has published the first: its entries still name that tenure's file.
func TestACheckpointAcrossTheHorizonKeepsItsFiles(t *testing.T) {
	r := newRig(t, 8, 64)
	r.append(data(0, 1))
	published := r.log.Written()
	if _, err := r.reopen(r.fs.ProcessCrash); err != nil {
		t.Fatal(err)
	}
	if err := r.log.DropThrough(0); err != nil {
		t.Fatal(err)
	}
	r.append(data(1, 2))
	c, err := r.log.FreezeAndRotate(bg)
	if err == nil {
		err = r.log.WriteCheckpoint(c, []byte("state"))
	}
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.reopen(r.fs.ProcessCrash); err != nil {
		t.Fatal(err)
	}
	if err := r.log.DropThrough(published); err != nil {
		t.Fatal(err)
	}
	if _, _, clean := r.space.Counts(); clean != 0 {
		t.Errorf("%d slots that the index still names may be evicted", clean)
	}
	r.expect(0, 1, 2)
	if err := r.log.Publish(r.log.Freeze()); err != nil {
		t.Fatal(err)
	}
	if _, _, clean := r.space.Counts(); clean == 0 {
		t.Error("no slot is clean after everything is published")
	}
}

// TestPublishedBlocksLeaveNoChecksums recovers a checkpoint of which the horizon covers a part.
func TestPublishedBlocksLeaveNoChecksums(t *testing.T) {
	r := newRig(t, 16, 16)
	for i := range 60 {
		r.append(data(block.LBA(i), uint64(i+1)))
	}
	c, err := r.log.FreezeAndRotate(bg)
	if err != nil {
		t.Fatal(err)
	}
	if err := r.log.WriteCheckpoint(c, nil); err != nil {
		t.Fatal(err)
	}
	r.append(data(1000, 1))
	if _, err := r.reopen(r.fs.ProcessCrash); err != nil {
		t.Fatal(err)
	}
	if err := r.log.DropThrough(c.Frozen.Seq); err != nil {
		t.Fatal(err)
	}
	r.log.mu.Lock()
	files := len(r.log.files)
	r.log.mu.Unlock()
	if n := int(r.log.crcs.files.Load()); n == 0 || n > files {
		t.Errorf("checksums of %d files, the log has %d", n, files)
	}
	r.expect(1000, 1)
	r.expect(0, -1)
}

// TestUnsealedFilesAreFew holds sealing back while files fill: writers wait after a few, trims pass, and
// all goes on by itself.
func TestUnsealedFilesAreFew(t *testing.T) {
	r := newRig(t, 40, 16)
	r.log.meta.mu.Lock()
	ctx, cancel := context.WithTimeout(bg, 10*time.Second)
	defer cancel()
	written := make(chan error, 1)
	go func() {
		for i := range 100 {
			if _, err := r.log.Append(ctx, []Record{data(block.LBA(i), 1, 2, 3, 4)}); err != nil {
				written <- err
				return
			}
		}
		written <- nil
	}()
	for waits := false; !waits; {
		select {
		case err := <-written:
			t.Fatalf("all was written though nothing could be sealed: %v", err)
		default:
		}
		starved := r.log.starving()
		got, err := r.log.prepareOne()
		if err != nil {
			t.Fatal(err)
		}
		waits = starved && !got
	}
	r.log.mu.Lock()
	n := r.log.unsealedLocked()
	r.log.mu.Unlock()
	if n > unsealedMax+aheadSlots+1 {
		t.Errorf("%d full files are not sealed", n)
	}
	r.append(unmap(0, 1))
	r.log.meta.mu.Unlock()
	if err := <-written; err != nil {
		t.Error(err)
	}
}
