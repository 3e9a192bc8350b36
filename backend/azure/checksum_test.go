package azure

import (
	"bytes"
	"net/http"
	"sync"
	"testing"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore/streaming"
	"github.com/Azure/azure-sdk-for-go/sdk/storage/azblob/blob"
	"github.com/Azure/azure-sdk-for-go/sdk/storage/azblob/blockblob"

	"graindisk/backend"
	"graindisk/backend/backendtest"
)

// TestChecksumIsTheSDKsOwn compares the CRC64 of a put, which is computed with the processor's help and without
// a copy of the body, with what the SDK makes of the same bytes.
func TestChecksumIsTheSDKsOwn(t *testing.T) {
	var mu sync.Mutex
	var sums []string
	s, _ := fakeStore(t, func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		sums = append(sums, r.Header.Get("X-Ms-Content-Crc64"))
		w.Header().Set("ETag", `"e"`)
		w.WriteHeader(http.StatusCreated)
	})
	for _, size := range []int{0, 1, 100, 4097, 1 << 20} {
		body := backendtest.Body(uint64(size), size)
		if _, err := s.Put(t.Context(), "k", body, backend.Cond{}); err != nil {
			t.Fatal(err)
		}
		if _, err := s.client().NewBlockBlobClient("k").Upload(t.Context(), streaming.NopCloser(bytes.NewReader(body)),
			&blockblob.UploadOptions{TransactionalValidation: blob.TransferValidationTypeComputeCRC64()}); err != nil {
			t.Fatal(err)
		}
		if got, want := sums[0], sums[1]; got != want || got == "" {
			t.Errorf("%d bytes: %q, the SDK says %q", size, got, want)
		}
		sums = nil
	}
}
