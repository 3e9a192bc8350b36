package azure

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"strings"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/streaming"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/to"
	"github.com/Azure/azure-sdk-for-go/sdk/storage/azblob/blob"
	"github.com/Azure/azure-sdk-for-go/sdk/storage/azblob/bloberror"
	"github.com/Azure/azure-sdk-for-go/sdk/storage/azblob/blockblob"
	"github.com/Azure/azure-sdk-for-go/sdk/storage/azblob/container"
	"github.com/minio/crc64nvme"

	"graindisk/backend"
	"graindisk/backend/transport"
)

// Put implements backend.Store.
func (s *Store) Put(ctx context.Context, key string, body []byte, c backend.Cond) (string, error) {
	if c.Absent && c.Match != "" {
		return "", s.refuse("put", key, "a put cannot want the key both absent and matching")
	}
	if err := s.begin(ctx, "put", key); err != nil {
		return "", err
	}
	o := &blockblob.UploadOptions{TransactionalValidation: blob.TransferValidationTypeCRC64(crc64nvme.Checksum(body))}
	cond := &blob.ModifiedAccessConditions{}
	switch {
	case c.Absent:
		cond.IfNoneMatch = to.Ptr(azcore.ETagAny)
	case c.Match != "":
		cond.IfMatch = to.Ptr(azcore.ETag(c.Match))
	}
	sctx := ctx
	if c != (backend.Cond{}) {
		o.AccessConditions = &blob.AccessConditions{ModifiedAccessConditions: cond}
		sctx = once(ctx)
	}
	out, err := s.client().NewBlockBlobClient(s.full(key)).Upload(sctx, streaming.NopCloser(bytes.NewReader(body)), o)
	if err != nil {
		return "", s.fail(ctx, "put", key, err)
	}
	s.stored.Store(true)
	s.versioned.Store(deref(out.VersionID) != "")
	return etag(out.ETag), nil
}

// Get implements backend.Store.
func (s *Store) Get(ctx context.Context, key string, max int64) ([]byte, string, error) {
	if err := s.begin(ctx, "get", key); err != nil {
		return nil, "", err
	}
	out, err := s.client().NewBlobClient(s.full(key)).DownloadStream(ctx, nil)
	if err != nil {
		return nil, "", s.fail(ctx, "get", key, err)
	}
	defer out.Body.Close()
	size := deref(out.ContentLength)
	if size > max {
		return nil, "", s.refuse("get", key, "it has %d bytes, at most %d were expected", size, max)
	}
	var body bytes.Buffer
	body.Grow(int(min(size, transport.PreallocateMax)) + bytes.MinRead)
	n, err := body.ReadFrom(io.LimitReader(out.Body, min(max, math.MaxInt64-1)+1))
	if err == nil && out.ContentLength != nil && n != size {
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		return nil, "", s.fail(ctx, "get", key, fmt.Errorf("after %d bytes of %d: %w", n, size, plain(err)))
	}
	if n > max {
		return nil, "", s.refuse("get", key, "it has more than the %d bytes expected", max)
	}
	return body.Bytes(), etag(out.ETag), nil
}

// ReadAt implements backend.Store.
func (s *Store) ReadAt(ctx context.Context, key string, p []byte, off int64) error {
	if off < 0 || off > math.MaxInt64-int64(len(p)) {
		return s.refuse("read", key, "offset %d", off)
	}
	if err := s.begin(ctx, "read", key); err != nil {
		return err
	}
	if len(p) == 0 {
		return nil
	}
	out, err := s.client().NewBlobClient(s.full(key)).DownloadStream(ctx, &blob.DownloadStreamOptions{
		Range: blob.HTTPRange{Offset: off, Count: int64(len(p))},
	})
	if err != nil {
		return s.fail(ctx, "read", key, err)
	}
	defer out.Body.Close()
	if err := transport.CheckRange(deref(out.ContentRange), off, int64(len(p))); err != nil {
		return s.fail(ctx, "read", key, err)
	}
	if n, err := io.ReadFull(out.Body, p); err != nil {
		return s.fail(ctx, "read", key, fmt.Errorf("after %d bytes of %d: %w", n, len(p), plain(err)))
	}
	return nil
}

// Stat implements backend.Store.
func (s *Store) Stat(ctx context.Context, key string) (backend.Info, error) {
	if err := s.begin(ctx, "stat", key); err != nil {
		return backend.Info{}, err
	}
	out, err := s.client().NewBlobClient(s.full(key)).GetProperties(ctx, nil)
	if err != nil {
		return backend.Info{}, s.fail(ctx, "stat", key, err)
	}
	return backend.Info{Key: key, Size: deref(out.ContentLength), ETag: etag(out.ETag), Modified: deref(out.LastModified)}, nil
}

// Delete implements backend.Store.
func (s *Store) Delete(ctx context.Context, key string) error {
	if err := s.begin(ctx, "delete", key); err != nil {
		return err
	}
	_, err := s.client().NewBlobClient(s.full(key)).Delete(ctx, nil)
	if bloberror.HasCode(err, bloberror.BlobNotFound) {
		return nil
	}
	return s.fail(ctx, "delete", key, err)
}

// page is a place in a list: after the key of that name, of those with the prefix.
type page struct{ prefix, after string }

// pagesMax bounds how many places of lists under way are remembered.
const pagesMax = 64

// List implements backend.Store. A list that goes on where an earlier one ended continues by the
// service's own marker; any other begins at the key, or before it where the service cannot.
func (s *Store) List(ctx context.Context, prefix, after string, max int) ([]backend.Info, bool, error) {
	if err := backend.CheckList(prefix, max); err != nil {
		return nil, false, s.fail(ctx, "list", prefix, transport.Refuse(err))
	}
	o := &container.ListBlobsFlatOptions{Prefix: to.Ptr(s.full(prefix)), MaxResults: to.Ptr(int32(max))}
	if m, ok := s.marker(page{prefix, after}); ok {
		o.Marker = &m
	} else if after != "" {
		o.StartFrom = to.Ptr(s.full(after))
	}
	var found []backend.Info
	for pager := s.client().NewListBlobsFlatPager(o); ; {
		out, err := pager.NextPage(ctx)
		if err != nil {
			return nil, false, s.fail(ctx, "list", prefix, err)
		}
		if out.Segment == nil {
			return nil, false, s.fail(ctx, "list", prefix, errors.New("the answer holds no list"))
		}
		found = append(found, s.infos(out.Segment.BlobItems, after)...)
		more := deref(out.NextMarker) != ""
		if len(found) >= max && (more || len(found) > max) {
			if len(found) == max {
				s.remember(page{prefix, found[max-1].Key}, deref(out.NextMarker))
			}
			return found[:max], true, nil
		}
		if !more {
			return found, false, nil
		}
	}
}

func (s *Store) marker(p page) (string, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	m, ok := s.pages[p]
	delete(s.pages, p)
	return m, ok
}

func (s *Store) remember(p page, marker string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.pages) >= pagesMax {
		clear(s.pages)
	}
	s.pages[p] = marker
}

func (s *Store) infos(items []*container.BlobItem, after string) []backend.Info {
	var found []backend.Info
	for _, b := range items {
		key, ours := strings.CutPrefix(deref(b.Name), s.prefix)
		if !ours || key <= after || backend.CheckKey(key) != nil {
			continue
		}
		i := backend.Info{Key: key}
		if p := b.Properties; p != nil {
			i.Size, i.ETag, i.Modified = deref(p.ContentLength), etag(p.ETag), deref(p.LastModified)
		}
		found = append(found, i)
	}
	return found
}

func (s *Store) full(key string) string { return s.prefix + key }

// etag is without quotes in lists and with them in headers; If-Match wants them.
func etag(e *azcore.ETag) string {
	t := string(deref(e))
	if t != "" && !strings.HasPrefix(t, `"`) {
		t = `"` + t + `"`
	}
	return t
}

// deref is *p, or zero for nil.
func deref[T any](p *T) (v T) {
	if p != nil {
		v = *p
	}
	return v
}

// begin is the start of every call on a key.
func (s *Store) begin(ctx context.Context, op, key string) error {
	if err := backend.CheckKey(key); err != nil {
		return s.fail(ctx, op, key, transport.Refuse(err))
	}
	if err := ctx.Err(); err != nil {
		return s.fail(ctx, op, key, err)
	}
	return nil
}

func (s *Store) refuse(op, key, format string, args ...any) error {
	return s.fail(context.Background(), op, key, transport.Refuse(fmt.Errorf(format, args...)))
}
