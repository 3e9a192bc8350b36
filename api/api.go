// Package api is the admin interface of a running gateway: versioned HTTP with JSON bodies over a
// unix socket. The command line is its client.
//
//	GET  /v1/version        Version
//	GET  /v1/disks          []pool.DiskInfo
//	POST /v1/disks          NewDisk → pool.DiskInfo
//	GET  /v1/disks/{name}   pool.DiskInfo
//	DELETE /v1/disks/{name}           DeleteDisk → {}
//	POST /v1/disks/{name}/undelete    UndeleteDisk → pool.DiskInfo
//	POST /v1/disks/{name}/rename      RenameDisk → pool.DiskInfo
//	POST /v1/disks/{name}/resize      ResizeDisk → pool.DiskInfo
//	GET  /v1/deleted-disks  []pool.DeletedDisk
//	POST /v1/pools/{name}/fsck        Fsck → pool.FsckReport
//	GET  /v1/pools          []pool.Status
//	GET  /v1/pools/{name}   pool.Status
//	POST /v1/pools/{name}/release   pool.Status, as it is when everything is published and nobody owns the pool
//	GET  /metrics           Prometheus text
//
// Long work is a job: it is started by a request that returns at once, and looked after by its id.
//
//	POST /v1/pools/{name}/repair           RepairRequest → 202 and a Job, whose Report is a pool.RepairReport
//	POST /v1/pools/{name}/scrub            ScrubRequest → 202 and a Job, whose Report is a pool.ScrubReport
//	POST /v1/pools/{name}/replace-target   TargetRequest → pool.TargetChange
//	POST /v1/pools/{name}/add-target       TargetRequest → pool.TargetChange
//	GET  /v1/jobs                          []Job
//	GET  /v1/jobs/{id}                     Job
//	POST /v1/jobs/{id}/cancel              Job, which may go on for a moment
//
// A failure is an Error with a fitting HTTP status. Unknown fields in requests are refused; clients
// ignore unknown fields in answers.
package api

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"strings"
	"syscall"
	"time"

	"graindisk/internal/jobs"
	"graindisk/pool"
	"graindisk/pool/root"
	"graindisk/vdisk"
)

// ErrNoPool means the gateway has no pool of that name.
var ErrNoPool = errors.New("no such pool")

// Version names the running program.
type Version struct {
	Version string `json:"version"`
}

// NewDisk asks for a disk.
type NewDisk struct {
	Pool      string `json:"pool"` // may be empty if the gateway has one pool
	Name      string `json:"name"`
	SizeBytes int64  `json:"size_bytes"`
}

// Error is the body of every failure. Code is for programs: "no_such_disk", "no_such_pool", "exists",
// "in_use", "would_shrink", "no_such_target", "target_in_use", "no_such_job", "running", "bad_request", "stopped", "fenced" (another owner
// has taken the pool over), "failed".
type Error struct {
	Code    string `json:"code"`
	Message string `json:"error"`
}

// Error is the message alone.
func (e *Error) Error() string { return e.Message }

// Is matches the sentinel that Code stands for.
func (e *Error) Is(target error) bool {
	for _, c := range codes {
		if c.code == e.Code && c.err == target {
			return true
		}
	}
	return false
}

var codes = []struct {
	err    error
	code   string
	status int
}{
	{pool.ErrNoDisk, "no_such_disk", http.StatusNotFound},
	{ErrNoPool, "no_such_pool", http.StatusNotFound},
	{pool.ErrExists, "exists", http.StatusConflict},
	{pool.ErrInUse, "in_use", http.StatusConflict},
	{pool.ErrShrink, "would_shrink", http.StatusConflict},
	{ErrBadRequest, "bad_request", http.StatusBadRequest},
	{pool.ErrNoTarget, "no_such_target", http.StatusNotFound},
	{pool.ErrTargetInUse, "target_in_use", http.StatusConflict},
	{pool.ErrIsTarget, "target_in_use", http.StatusConflict},
	{jobs.ErrNoJob, "no_such_job", http.StatusNotFound},
	{jobs.ErrRunning, "running", http.StatusConflict},
	{vdisk.ErrFenced, "fenced", http.StatusConflict},
	{root.ErrFenced, "fenced", http.StatusConflict},
}

// ErrBadRequest means that the request makes no sense as it stands.
var ErrBadRequest = errors.New("bad request")

// Gateway is what the server needs of the running gateway. Safe for concurrent use.
type Gateway interface {
	Version() string
	Disks() []pool.DiskInfo
	Disk(name string) (pool.DiskInfo, error)
	// CreateDisk checks name and size and reports violations as ErrBadRequest.
	CreateDisk(ctx context.Context, d NewDisk) (pool.DiskInfo, error)
	// Pools and Pool ask the targets how they are, for a moment.
	Pools(ctx context.Context) []pool.Status
	Pool(ctx context.Context, name string) (pool.Status, error)
	DiskOperator
	// ReleasePool publishes all of a pool, ends serving it and gives it up; ErrNoPool if it is not served.
	ReleasePool(ctx context.Context, name string) (pool.Status, error)
}

const bodyBytesMax = 1 << 20

// Handler serves the interface for g; metrics answers /metrics and may be nil.
func Handler(g Gateway, metrics http.Handler) http.Handler {
	mux := http.NewServeMux()
	get := func(path string, f func(r *http.Request) (any, error)) {
		mux.HandleFunc("GET "+path, func(w http.ResponseWriter, r *http.Request) { answer(w, http.StatusOK)(f(r)) })
	}
	get("/v1/version", func(*http.Request) (any, error) { return Version{g.Version()}, nil })
	get("/v1/disks", func(*http.Request) (any, error) { return g.Disks(), nil })
	get("/v1/disks/{name}", func(r *http.Request) (any, error) { return g.Disk(r.PathValue("name")) })
	get("/v1/pools", func(r *http.Request) (any, error) { return g.Pools(r.Context()), nil })
	get("/v1/pools/{name}", func(r *http.Request) (any, error) { return g.Pool(r.Context(), r.PathValue("name")) })
	mux.HandleFunc("POST /v1/disks", func(w http.ResponseWriter, r *http.Request) {
		answer(w, http.StatusCreated)(createDisk(g, w, r))
	})
	handleDiskOps(mux, g)
	if w, ok := g.(Worker); ok {
		handleWork(mux, w)
	}
	mux.HandleFunc("POST /v1/pools/{name}/release", func(w http.ResponseWriter, r *http.Request) {
		answer(w, http.StatusOK)(g.ReleasePool(r.Context(), r.PathValue("name")))
	})
	if metrics != nil {
		mux.Handle("GET /metrics", metrics)
	}
	return mux
}

func createDisk(g Gateway, w http.ResponseWriter, r *http.Request) (any, error) {
	var d NewDisk
	dec := json.NewDecoder(http.MaxBytesReader(w, r.Body, bodyBytesMax))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&d); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrBadRequest, err)
	}
	return g.CreateDisk(r.Context(), d)
}

// answer writes a result, or an error with the status that its sentinel has.
func answer(w http.ResponseWriter, status int) func(any, error) {
	return func(v any, err error) {
		if err != nil {
			e := Error{"failed", err.Error()}
			status = http.StatusInternalServerError
			for _, c := range codes {
				if errors.Is(err, c.err) {
					e.Code, status = c.code, c.status
					break
				}
			}
			v = e
		}
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(status)
		json.NewEncoder(w).Encode(v) // the client is gone if this fails
	}
}

// Serve answers on l until ctx ends, then lets requests under way finish for up to five seconds.
func Serve(ctx context.Context, l net.Listener, h http.Handler, log *slog.Logger) error {
	srv := &http.Server{
		Handler: h, ReadHeaderTimeout: 10 * time.Second, IdleTimeout: time.Minute,
		ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelDebug),
	}
	stop := context.AfterFunc(ctx, func() {
		sctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
		defer cancel()
		if srv.Shutdown(sctx) != nil {
			srv.Close()
		}
	})
	defer stop()
	if err := srv.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// Client talks to a gateway's admin socket. Safe for concurrent use.
type Client struct {
	http     http.Client
	socket   string
	patience time.Duration // instead of AskPatience and ChangePatience, for tests; 0: those
}

// NewClient returns a client of the socket; nothing is dialled yet.
func NewClient(socket string) *Client {
	c := &Client{socket: socket}
	c.http.Transport = &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", socket)
	}}
	return c
}

// ErrNoGateway means that nobody listens on the admin socket.
var ErrNoGateway = errors.New("no gateway runs there")

// How long the gateway may take for an answer. What may take long has no bound but that of its context: whoever waits for
// it can end it.
const (
	// AskPatience is for questions, and for what only begins or ends a job.
	AskPatience = 20 * time.Second
	// ChangePatience is for what a gateway does at once unless its tier or its targets keep it from that.
	ChangePatience = time.Minute
)

// Disks lists the disks.
func (c *Client) Disks(ctx context.Context) (ds []pool.DiskInfo, err error) {
	return ds, c.ask(ctx, http.MethodGet, "/v1/disks", nil, &ds)
}

// Disk describes one disk; pool.ErrNoDisk if there is none of that name.
func (c *Client) Disk(ctx context.Context, name string) (d pool.DiskInfo, err error) {
	return d, c.ask(ctx, http.MethodGet, "/v1/disks/"+url.PathEscape(name), nil, &d)
}

// CreateDisk makes a disk; pool.ErrExists if the name is taken.
func (c *Client) CreateDisk(ctx context.Context, n NewDisk) (d pool.DiskInfo, err error) {
	return d, c.change(ctx, http.MethodPost, "/v1/disks", n, &d)
}

// Pools describes the pools.
func (c *Client) Pools(ctx context.Context) (ps []pool.Status, err error) {
	return ps, c.ask(ctx, http.MethodGet, "/v1/pools", nil, &ps)
}

// Pool describes one pool; ErrNoPool if there is none of that name.
func (c *Client) Pool(ctx context.Context, name string) (s pool.Status, err error) {
	return s, c.ask(ctx, http.MethodGet, "/v1/pools/"+url.PathEscape(name), nil, &s)
}

// ReleasePool has the gateway publish and give up a pool; ErrNoPool if it serves none of that name.
func (c *Client) ReleasePool(ctx context.Context, name string) (s pool.Status, err error) {
	return s, c.do(ctx, http.MethodPost, "/v1/pools/"+url.PathEscape(name)+"/release", nil, &s)
}

// errSlow is the cause of a request that took too long.
var errSlow = errors.New("no answer in time")

// ask is do for what is answered at once.
func (c *Client) ask(ctx context.Context, method, path string, in, out any) error {
	return c.within(ctx, AskPatience, "", method, path, in, out)
}

// change is do for what takes a moment.
func (c *Client) change(ctx context.Context, method, path string, in, out any) error {
	return c.within(ctx, ChangePatience, "; what was asked for may still be done: look before you ask again", method, path, in, out)
}

func (c *Client) within(ctx context.Context, patience time.Duration, note, method, path string, in, out any) error {
	if c.patience > 0 {
		patience = c.patience
	}
	actx, cancel := context.WithTimeoutCause(ctx, patience, errSlow)
	defer cancel()
	err := c.do(actx, method, path, in, out)
	if err != nil && ctx.Err() == nil && errors.Is(context.Cause(actx), errSlow) {
		return fmt.Errorf("the gateway does not answer on %s: nothing within %v; it hangs, or its host has too much to do: see its log and what else runs there%s", c.socket, patience, note)
	}
	return err
}

// do makes a request and decodes the answer, for as long as it takes.
func (c *Client) do(ctx context.Context, method, path string, in, out any) error {
	if strings.Contains(path, "//") || strings.HasSuffix(path, "/") {
		return fmt.Errorf("%w: a name is empty", ErrBadRequest)
	}
	var body io.Reader
	if in != nil {
		b, err := json.Marshal(in)
		if err != nil {
			return err
		}
		body = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://gateway"+path, body)
	if err != nil {
		return err
	}
	resp, err := c.http.Do(req)
	switch {
	case ctx.Err() != nil && err != nil:
		return ctx.Err()
	case errors.Is(err, syscall.ENOENT), errors.Is(err, syscall.ECONNREFUSED):
		return fmt.Errorf("admin socket %s: %w; start it with \"gateway serve\"", c.socket, ErrNoGateway)
	case err != nil:
		return fmt.Errorf("admin socket %s: %w", c.socket, errors.Unwrap(err))
	}
	defer resp.Body.Close()
	dec := json.NewDecoder(io.LimitReader(resp.Body, 64<<20))
	if resp.StatusCode >= 300 {
		e := new(Error)
		if err := dec.Decode(e); err != nil || e.Message == "" {
			return fmt.Errorf("admin socket %s: %s", c.socket, resp.Status)
		}
		return e
	}
	return dec.Decode(out)
}
