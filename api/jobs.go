package api

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"

	"graindisk/internal/jobs"
	"graindisk/pool"
)

// RepairRequest asks for a repair. Its body may be left out.
type RepairRequest struct {
	BytesPerSecond int64 `json:"bytes_per_second"` // of restored shards; 0 is no limit, else at least RateMin
}

// TargetRequest names a configured target.
type TargetRequest struct {
	Target string `json:"target"`
}

// Job is a job as a client sees it: the report is to be decoded by the kind.
type Job struct {
	jobs.Job
	Report json.RawMessage `json:"report,omitempty"`
}

// Worker is what the server needs of a gateway that does long work. Safe for concurrent use.
type Worker interface {
	// StartRepair fails with jobs.ErrRunning if the pool is being repaired by a job.
	StartRepair(pool string, r RepairRequest) (jobs.Job, error)
	// StartScrub fails with jobs.ErrRunning if the pool is being scrubbed by a job.
	StartScrub(pool string, r ScrubRequest) (jobs.Job, error)
	// ReplaceTarget returns when the members have changed. With add, the target is a new one.
	ReplaceTarget(ctx context.Context, pool, target string, add bool) (pool.TargetChange, error)
	Jobs() []jobs.Job
	Job(id string) (jobs.Job, error)
	CancelJob(id string) (jobs.Job, error)
}

func handleWork(mux *http.ServeMux, g Worker) {
	handle := func(pattern string, status int, f func(w http.ResponseWriter, r *http.Request) (any, error)) {
		mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) { answer(w, status)(f(w, r)) })
	}
	handle("POST /v1/pools/{name}/repair", http.StatusAccepted, func(w http.ResponseWriter, r *http.Request) (any, error) {
		var q RepairRequest
		if err := decodeBody(w, r, &q); err != nil {
			return nil, err
		}
		if err := checkRate(q.BytesPerSecond); err != nil {
			return nil, err
		}
		return g.StartRepair(r.PathValue("name"), q)
	})
	handle("POST /v1/pools/{name}/scrub", http.StatusAccepted, func(w http.ResponseWriter, r *http.Request) (any, error) {
		var q ScrubRequest
		if err := decodeBody(w, r, &q); err != nil {
			return nil, err
		}
		if err := checkRate(q.BytesPerSecond); err != nil {
			return nil, err
		}
		return g.StartScrub(r.PathValue("name"), q)
	})
	change := func(add bool) func(w http.ResponseWriter, r *http.Request) (any, error) {
		return func(w http.ResponseWriter, r *http.Request) (any, error) {
			var q TargetRequest
			if err := decodeBody(w, r, &q); err != nil {
				return nil, err
			}
			return g.ReplaceTarget(r.Context(), r.PathValue("name"), q.Target, add)
		}
	}
	handle("POST /v1/pools/{name}/replace-target", http.StatusOK, change(false))
	handle("POST /v1/pools/{name}/add-target", http.StatusOK, change(true))
	handle("GET /v1/jobs", http.StatusOK, func(http.ResponseWriter, *http.Request) (any, error) { return g.Jobs(), nil })
	handle("GET /v1/jobs/{id}", http.StatusOK, func(_ http.ResponseWriter, r *http.Request) (any, error) { return g.Job(r.PathValue("id")) })
	handle("POST /v1/jobs/{id}/cancel", http.StatusOK, func(_ http.ResponseWriter, r *http.Request) (any, error) {
		return g.CancelJob(r.PathValue("id"))
	})
}

// RateMin is the least bound of a repair or a scrub, in bytes a second: with less they would not end.
const RateMin = 64 << 10

// checkRate refuses a rate below RateMin that is not 0.
func checkRate(perSecond int64) error {
	if perSecond < 0 || perSecond > 0 && perSecond < RateMin {
		return fmt.Errorf("%w: a rate of %d bytes per second: at least %d, or 0 for no bound", ErrBadRequest, perSecond, RateMin)
	}
	return nil
}

// decodeBody reads a request; an empty body leaves v as it is.
func decodeBody(w http.ResponseWriter, r *http.Request, v any) error {
	dec := json.NewDecoder(http.MaxBytesReader(w, r.Body, bodyBytesMax))
	dec.DisallowUnknownFields()
	if err := dec.Decode(v); err != nil && !errors.Is(err, io.EOF) {
		return fmt.Errorf("%w: %w", ErrBadRequest, err)
	}
	return nil
}

// StartRepair begins a repair of a pool.
func (c *Client) StartRepair(ctx context.Context, pool string, r RepairRequest) (j Job, err error) {
	return j, c.ask(ctx, http.MethodPost, "/v1/pools/"+url.PathEscape(pool)+"/repair", r, &j)
}

// ReplaceTarget makes an emptied target of a pool a new one; with add, a target that the pool did not have before.
func (c *Client) ReplaceTarget(ctx context.Context, poolName, target string, add bool) (t pool.TargetChange, err error) {
	verb := "/replace-target"
	if add {
		verb = "/add-target"
	}
	return t, c.do(ctx, http.MethodPost, "/v1/pools/"+url.PathEscape(poolName)+verb, TargetRequest{target}, &t)
}

// Jobs lists the jobs under way and some of those that ended, the newest last.
func (c *Client) Jobs(ctx context.Context) (js []Job, err error) {
	return js, c.ask(ctx, http.MethodGet, "/v1/jobs", nil, &js)
}

// Job describes one job; jobs.ErrNoJob if there is none of that id.
func (c *Client) Job(ctx context.Context, id string) (j Job, err error) {
	return j, c.ask(ctx, http.MethodGet, "/v1/jobs/"+url.PathEscape(id), nil, &j)
}

// CancelJob asks a job to end.
func (c *Client) CancelJob(ctx context.Context, id string) (j Job, err error) {
	return j, c.ask(ctx, http.MethodPost, "/v1/jobs/"+url.PathEscape(id)+"/cancel", nil, &j)
}
