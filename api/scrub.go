package api

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"

	"graindisk/pool"
)

// ScrubRequest says how a pool is to be scrubbed; the zero value is at full rate.
type ScrubRequest struct {
	BytesPerSecond int64 `json:"bytes_per_second,omitempty"` // 0 = no bound
	DryRun         bool  `json:"dry_run,omitempty"`          // repair nothing
}

// Scrubber is what the server needs of a gateway that scrubs. Safe for concurrent use.
type Scrubber interface {
	// Scrub reads everything on a pool's targets and returns when that is done, or fails when ctx ends.
	Scrub(ctx context.Context, name string, r ScrubRequest) (pool.ScrubReport, error)
}

func handleScrub(mux *http.ServeMux, g Scrubber) {
	mux.HandleFunc("POST /v1/pools/{name}/scrub", func(w http.ResponseWriter, r *http.Request) {
		answer(w, http.StatusOK)(scrub(g, w, r))
	})
}

func scrub(g Scrubber, w http.ResponseWriter, r *http.Request) (any, error) {
	var q ScrubRequest
	dec := json.NewDecoder(http.MaxBytesReader(w, r.Body, bodyBytesMax))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&q); err != nil && !errors.Is(err, io.EOF) { // an empty body is the zero value
		return nil, fmt.Errorf("%w: %w", ErrBadRequest, err)
	}
	if q.BytesPerSecond < 0 {
		return nil, fmt.Errorf("%w: %d bytes per second", ErrBadRequest, q.BytesPerSecond)
	}
	return g.Scrub(r.Context(), r.PathValue("name"), q)
}

// Scrub has a pool scrubbed and returns when that is done; meanwhile Pool tells how far it is. When ctx ends, the scrub
// does, too; what it has repaired by then stays.
func (c *Client) Scrub(ctx context.Context, name string, q ScrubRequest) (r pool.ScrubReport, err error) {
	return r, c.do(ctx, http.MethodPost, "/v1/pools/"+url.PathEscape(name)+"/scrub", q, &r)
}
