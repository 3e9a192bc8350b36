package pool

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"syscall"
	"testing"
	"time"

	"graindisk/block"
	"graindisk/internal/crashtest"
	"graindisk/vdisk"
	"graindisk/writeback"
)

// TestLogStatusSaysWhatIsWrong words every trouble of a log.
func TestLogStatusSaysWhatIsWrong(t *testing.T) {
	now := time.Unix(1000, 0)
	waits := func(err error) writeback.Health {
		return writeback.Health{Waits: fmt.Errorf("write slot-000001: %w", err), Since: now.Add(-12 * time.Second)}
	}
	for _, c := range []struct {
		name  string
		h     writeback.Health
		waits string
		says  []string // none: nothing
	}{
		{"well", writeback.Health{Mended: 2}, "", nil},
		{"full", waits(syscall.ENOSPC), TierFull, []string{"the tier's file system is full: writes wait", "12 s", "free some space", "/t", "slot-000001"}},
		{"over quota", waits(syscall.EDQUOT), TierQuota, []string{"is over quota: writes wait", "quota"}},
		{"read-only", waits(syscall.EROFS), TierReadOnly, []string{"is read-only: writes wait", "mount it"}},
		{"stopped while it waited", writeback.Health{Failed: writeback.ErrFailed, Waits: syscall.ENOSPC}, "", []string{"has stopped", writeback.ErrFailed.Error()}},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := logStatus(c.h, now)
			text := s.Trouble("/t")
			if s.Waits != c.waits || s.Stopped != (c.h.Failed != nil) || s.MendedFiles != c.h.Mended || (text == "") != (c.says == nil) {
				t.Errorf("%+v: %q", s, text)
			}
			for _, w := range c.says {
				if !strings.Contains(text, w) {
					t.Errorf("%q does not say %q", text, w)
				}
			}
		})
	}
}

// TestStatusTellsOfAFullTier fills the file system under a pool that is written to.
func TestStatusTellsOfAFullTier(t *testing.T) {
	r := newRig(t, nil)
	d := r.disk("d", testDisk)
	if s := r.pool.Status().Log; s != (LogStatus{}) {
		t.Fatalf("at first: %+v", s)
	}
	for _, op := range []crashtest.Op{crashtest.OpWrite, crashtest.OpCreate} {
		r.fs.Inject(crashtest.Fault{Op: op, Err: syscall.ENOSPC})
	}
	p := make([]byte, block.Size)
	written := make(chan error, 1)
	go func() {
		written <- d.Write(context.Background(), []vdisk.Op{{Kind: vdisk.OpWrite, Len: int64(len(p)), Data: p}}, true)
	}()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
		if s := r.pool.Status().Log; s.Waits == TierFull && strings.Contains(s.Error, syscall.ENOSPC.Error()) {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("a minute later: %+v", r.pool.Status().Log)
		}
	}
	select {
	case err := <-written:
		t.Fatalf("a write ended on a full file system: %v", err)
	default:
	}
	r.fs.ClearFaults()
	if err := <-written; err != nil {
		t.Fatal(err)
	}
	r.publish()
	for deadline := time.Now().Add(time.Minute); r.pool.Status().Log.Waits != ""; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("a minute after there is space: %+v", r.pool.Status().Log)
		}
	}
}

// TestStatusTellsOfAStoppedLog fails every write of the tier for another reason than want of space.
func TestStatusTellsOfAStoppedLog(t *testing.T) {
	r := newRig(t, nil)
	d := r.disk("d", testDisk)
	r.fs.Inject(crashtest.Fault{Op: crashtest.OpWrite, Err: syscall.EIO})
	p := make([]byte, block.Size)
	if err := d.Write(context.Background(), []vdisk.Op{{Kind: vdisk.OpWrite, Len: int64(len(p)), Data: p}}, true); err == nil {
		t.Fatal("written")
	}
	s := r.pool.Status().Log
	if !s.Stopped || s.Error == "" || !errors.Is(r.pool.log.Failed(), writeback.ErrFailed) {
		t.Errorf("%+v, and the log says %v", s, r.pool.log.Failed())
	}
	r.fs.ClearFaults()
}
