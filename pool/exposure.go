package pool

import (
	"time"

	"graindisk/writeback"
)

// exposureAges times MaxDirtyAge is where the age of the oldest unpublished write is an alarm if
// MaxExposureAge does not say: one for the cut to come due, the rest for storing it.
const exposureAges = 3

// ExposureStatus is how what is unpublished stands to its bounds, and what that does to new writes.
type ExposureStatus struct {
	BoundBytes      int64   `json:"bound_bytes,omitempty"` // 0: none
	BoundAgeSeconds float64 `json:"bound_age_seconds"`     // max_exposure_age, else three times max_dirty_age
	Over            bool    `json:"over"`                  // one of the two is reached: the alarm
	// WritesWaiting means that new writes wait, for space on the tier or for the exposure to fall below
	// max_exposure or max_exposure_age; WriteDelaySeconds is how long one is delayed as the tier fills.
	WritesWaiting     bool    `json:"writes_waiting"`
	WriteDelaySeconds float64 `json:"write_delay_seconds"`
}

func (p *Pool) exposure(pr writeback.Pressure) ExposureStatus {
	bound := p.o.MaxExposureAge
	if bound == 0 {
		bound = exposureAges * p.o.MaxDirtyAge
	}
	old := !pr.Dirty.Oldest.IsZero() && time.Since(pr.Dirty.Oldest) >= bound
	return ExposureStatus{
		BoundBytes: p.o.MaxExposure, BoundAgeSeconds: bound.Seconds(), Over: pr.Exposed || old,
		WritesWaiting: pr.Waiting, WriteDelaySeconds: pr.Delay.Seconds(),
	}
}
