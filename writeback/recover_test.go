package writeback

import (
	"errors"
	"testing"

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
