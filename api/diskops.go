package api

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"

	"graindisk/pool"
)

// DeleteDisk says how a disk is deleted.
type DeleteDisk struct {
	Force bool `json:"force,omitempty"` // though clients have it open: their requests fail from then on
	Purge bool `json:"purge,omitempty"` // for good: it cannot be had back
}

// UndeleteDisk says which deleted disk comes back, and how it is called then.
type UndeleteDisk struct {
	ID uint32 `json:"id,omitempty"` // of several with the name; 0 is the one that was deleted last
	As string `json:"as,omitempty"` // default its old name
}

// RenameDisk says how a disk is called from now on.
type RenameDisk struct {
	To    string `json:"to"`
	Force bool   `json:"force,omitempty"` // though access rules go by the old name
}

// ResizeDisk says how long a disk is from now on.
type ResizeDisk struct {
	SizeBytes int64 `json:"size_bytes"`
	Shrink    bool  `json:"shrink,omitempty"` // it may lose its end
}

// Fsck says how far a check of a pool goes.
type Fsck struct {
	Orphans bool `json:"orphans,omitempty"` // list the targets too
	Reclaim bool `json:"reclaim,omitempty"` // and have what is found there deleted after the grace
}

// DiskOperator is what the server needs for operations on disks. Names and sizes that make no sense are ErrBadRequest.
type DiskOperator interface {
	DeletedDisks() []pool.DeletedDisk
	DeleteDisk(ctx context.Context, name string, o DeleteDisk) error
	UndeleteDisk(ctx context.Context, name string, o UndeleteDisk) (pool.DiskInfo, error)
	RenameDisk(ctx context.Context, name string, o RenameDisk) (pool.DiskInfo, error)
	ResizeDisk(ctx context.Context, name string, o ResizeDisk) (pool.DiskInfo, error)
	Fsck(ctx context.Context, pool string, o Fsck) (pool.FsckReport, error)
}

// handleDiskOps adds the paths of g to mux.
func handleDiskOps(mux *http.ServeMux, g DiskOperator) {
	mux.HandleFunc("GET /v1/deleted-disks", func(w http.ResponseWriter, _ *http.Request) {
		answer(w, http.StatusOK)(g.DeletedDisks(), nil)
	})
	mux.HandleFunc("DELETE /v1/disks/{name}", post(func(r *http.Request, o DeleteDisk) (any, error) {
		return struct{}{}, g.DeleteDisk(r.Context(), r.PathValue("name"), o)
	}))
	mux.HandleFunc("POST /v1/disks/{name}/undelete", post(func(r *http.Request, o UndeleteDisk) (any, error) {
		return g.UndeleteDisk(r.Context(), r.PathValue("name"), o)
	}))
	mux.HandleFunc("POST /v1/disks/{name}/rename", post(func(r *http.Request, o RenameDisk) (any, error) {
		return g.RenameDisk(r.Context(), r.PathValue("name"), o)
	}))
	mux.HandleFunc("POST /v1/disks/{name}/resize", post(func(r *http.Request, o ResizeDisk) (any, error) {
		return g.ResizeDisk(r.Context(), r.PathValue("name"), o)
	}))
	mux.HandleFunc("POST /v1/pools/{name}/fsck", post(func(r *http.Request, o Fsck) (any, error) {
		return g.Fsck(r.Context(), r.PathValue("name"), o)
	}))
}

// post serves a request with a body of T, or with none, which stands for the zero T.
func post[T any](f func(*http.Request, T) (any, error)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		var in T
		dec := json.NewDecoder(http.MaxBytesReader(w, r.Body, bodyBytesMax))
		dec.DisallowUnknownFields()
		if err := dec.Decode(&in); err != nil && err != io.EOF {
			answer(w, 0)(nil, fmt.Errorf("%w: %w", ErrBadRequest, err))
			return
		}
		answer(w, http.StatusOK)(f(r, in))
	}
}

func diskPath(name, what string) string { return "/v1/disks/" + url.PathEscape(name) + what }

// DeletedDisks lists the deleted disks that can be had back.
func (c *Client) DeletedDisks(ctx context.Context) (ds []pool.DeletedDisk, err error) {
	return ds, c.ask(ctx, http.MethodGet, "/v1/deleted-disks", nil, &ds)
}

// DeleteDisk deletes a disk; pool.ErrInUse if clients have it open and o does not say that this is no matter.
func (c *Client) DeleteDisk(ctx context.Context, name string, o DeleteDisk) error {
	return c.change(ctx, http.MethodDelete, diskPath(name, ""), o, &struct{}{})
}

// UndeleteDisk brings a deleted disk back; pool.ErrNoDisk if there is none, pool.ErrExists if the name is taken.
func (c *Client) UndeleteDisk(ctx context.Context, name string, o UndeleteDisk) (d pool.DiskInfo, err error) {
	return d, c.change(ctx, http.MethodPost, diskPath(name, "/undelete"), o, &d)
}

// RenameDisk renames a disk; pool.ErrExists if the name is taken.
func (c *Client) RenameDisk(ctx context.Context, name string, o RenameDisk) (d pool.DiskInfo, err error) {
	return d, c.change(ctx, http.MethodPost, diskPath(name, "/rename"), o, &d)
}

// ResizeDisk makes a disk longer or shorter; pool.ErrShrink if it would be shorter and o does not say that it may.
func (c *Client) ResizeDisk(ctx context.Context, name string, o ResizeDisk) (d pool.DiskInfo, err error) {
	return d, c.change(ctx, http.MethodPost, diskPath(name, "/resize"), o, &d)
}

// Fsck counts a pool's maps anew; ErrNoPool if there is none of that name.
func (c *Client) Fsck(ctx context.Context, name string, o Fsck) (r pool.FsckReport, err error) {
	return r, c.do(ctx, http.MethodPost, "/v1/pools/"+url.PathEscape(name)+"/fsck", o, &r)
}
