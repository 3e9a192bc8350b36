package pool

import (
	"errors"
	"fmt"
	"syscall"
	"time"

	"graindisk/writeback"
)

// What keeps the tier's file system from taking writes, as long as the log waits for it.
const (
	TierFull     = "full"
	TierQuota    = "over quota"
	TierReadOnly = "read-only"
)

// LogStatus is how the log on the tier is. While it waits, so do new writes, syncs and publications; nothing
// is lost, and it goes on by itself.
type LogStatus struct {
	// Waits is TierFull, TierQuota or TierReadOnly while the log waits for its file system, else empty.
	Waits        string  `json:"waits,omitempty"`
	WaitsSeconds float64 `json:"waits_seconds"`
	Error        string  `json:"error,omitempty"` // of the refusal; or why the log has stopped for good
	Stopped      bool    `json:"stopped"`
	// MendedFiles were written anew, since the pool was opened, after a write or a sync of them had failed.
	MendedFiles int `json:"mended_files"`
}

func logStatus(h writeback.Health, now time.Time) LogStatus {
	s := LogStatus{MendedFiles: h.Mended}
	switch {
	case h.Failed != nil:
		s.Stopped, s.Error = true, h.Failed.Error()
		return s
	case h.Waits == nil:
		return s
	case errors.Is(h.Waits, syscall.EROFS):
		s.Waits = TierReadOnly
	case errors.Is(h.Waits, syscall.EDQUOT):
		s.Waits = TierQuota
	default:
		s.Waits = TierFull
	}
	s.WaitsSeconds, s.Error = max(0, now.Sub(h.Since).Seconds()), h.Waits.Error()
	return s
}

// Trouble says in a line what is wrong and what to do; empty if nothing is. dir is where the tier is.
func (s LogStatus) Trouble(dir string) string {
	advice := map[string]string{
		TierFull:     "free some space on it",
		TierQuota:    "raise the quota, or free some space",
		TierReadOnly: "see the kernel's log, and mount it for writing again",
	}
	switch {
	case s.Stopped:
		return fmt.Sprintf("the log on the tier has stopped: %s; start the gateway again when %s is well", s.Error, dir)
	case s.Waits != "":
		return fmt.Sprintf("the tier's file system is %s: writes wait, for %.0f s now; %s: %s: %s", s.Waits, s.WaitsSeconds, advice[s.Waits], dir, s.Error)
	}
	return ""
}
