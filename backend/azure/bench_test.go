package azure_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"testing"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/storage/azblob/container"
	"github.com/Azure/azure-sdk-for-go/sdk/storage/azblob/sas"

	"graindisk/backend"
	"graindisk/backend/azure"
	"graindisk/backend/backendtest"
	"graindisk/backend/backendtest/azuritetest"
	"graindisk/backend/transport"
)

// BenchmarkClients compares the driver with net/http doing the same requests, both by a SAS. Azurite is slow: what
// counts is cpu-µs/op, this process's own time.
func BenchmarkClients(b *testing.B) {
	const size, n, whole = 16 << 20, 64 << 10, 8 << 20
	a := azuritetest.Start(b)
	name := a.Container(b)
	key, err := container.NewSharedKeyCredential(azuritetest.Account, azuritetest.AccountKey)
	if err != nil {
		b.Fatal(err)
	}
	q, err := sas.BlobSignatureValues{
		Protocol: sas.ProtocolHTTPSandHTTP, ContainerName: name, StartTime: time.Now().Add(-time.Minute), ExpiryTime: time.Now().Add(time.Hour),
		Permissions: (&sas.ContainerPermissions{Read: true, Write: true, Create: true}).String(),
	}.SignWithSharedKey(key)
	if err != nil {
		b.Fatal(err)
	}
	o := a.Options(name, "")
	o.AccountKey, o.SAS = "", q.Encode()
	s, err := azure.Open(o)
	if err != nil {
		b.Fatal(err)
	}
	h, err := transport.New(transport.Options{})
	if err != nil {
		b.Fatal(err)
	}
	bare := func(ctx context.Context, method, key string, body io.Reader, header http.Header, want int, into []byte) error {
		r, err := http.NewRequestWithContext(ctx, method, a.Endpoint+"/"+name+"/"+key+"?"+o.SAS, body)
		if err != nil {
			return err
		}
		r.Header = header
		resp, err := h.Do(r)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		if resp.StatusCode != want {
			return errors.New(resp.Status)
		}
		_, err = io.ReadFull(resp.Body, into)
		return err
	}
	body, p := backendtest.Body(1, size), make([]byte, n)
	if _, err := s.Put(b.Context(), "object", body, backend.Cond{}); err != nil {
		b.Fatal(err)
	}
	b.Run("read=64KiB/net-http", func(b *testing.B) {
		backendtest.Measure(b, n, func(i int) error {
			off := i * n % size
			return bare(b.Context(), http.MethodGet, "object", nil,
				http.Header{"Range": {fmt.Sprintf("bytes=%d-%d", off, off+n-1)}, "X-Ms-Version": {"2021-12-02"}}, http.StatusPartialContent, p)
		})
	})
	b.Run("read=64KiB/driver", func(b *testing.B) {
		backendtest.Measure(b, n, func(i int) error { return s.ReadAt(b.Context(), "object", p, int64(i*n%size)) })
	})
	b.Run("put=8MiB/net-http", func(b *testing.B) {
		backendtest.Measure(b, whole, func(i int) error {
			return bare(b.Context(), http.MethodPut, fmt.Sprint("put-", i%4), bytes.NewReader(body[:whole]),
				http.Header{"X-Ms-Blob-Type": {"BlockBlob"}, "X-Ms-Version": {"2021-12-02"}}, http.StatusCreated, nil)
		})
	})
	b.Run("put=8MiB/driver", func(b *testing.B) {
		backendtest.Measure(b, whole, func(i int) error {
			_, err := s.Put(b.Context(), fmt.Sprint("put-", i%4), body[:whole], backend.Cond{})
			return err
		})
	})
}
