package api

import (
	"context"
	"net/http"
	"net/url"
)

// ScrubRequest says how a pool is to be scrubbed; the zero value is at full rate. Its body may be left out.
type ScrubRequest struct {
	BytesPerSecond int64 `json:"bytes_per_second,omitempty"` // read; 0 = no bound, else at least RateMin
	DryRun         bool  `json:"dry_run,omitempty"`          // repair nothing
}

// StartScrub begins a scrub of a pool. What it has repaired when it is cancelled stays.
func (c *Client) StartScrub(ctx context.Context, pool string, q ScrubRequest) (j Job, err error) {
	return j, c.ask(ctx, http.MethodPost, "/v1/pools/"+url.PathEscape(pool)+"/scrub", q, &j)
}
