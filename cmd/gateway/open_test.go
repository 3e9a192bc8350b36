package main

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
)

// TestPoolsOpenSideBySide opens two pools whose targets answer only once both have been asked.
func TestPoolsOpenSideBySide(t *testing.T) {
	asked := map[string]chan struct{}{"bucket-one": make(chan struct{}), "bucket-two": make(chan struct{})}
	once := map[string]*sync.Once{"bucket-one": {}, "bucket-two": {}}
	alone := make(chan string, 100) // who was given up while the other pool had not asked
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		bucket, _, _ := strings.Cut(strings.TrimPrefix(r.URL.Path, "/"), "/")
		once[bucket].Do(func() { close(asked[bucket]) })
		for other, c := range asked {
			if other == bucket {
				continue
			}
			select {
			case <-c:
			case <-r.Context().Done():
				select {
				case alone <- bucket:
				default:
				}
				return
			}
		}
		w.WriteHeader(http.StatusForbidden) // enough to end it all
	}))
	defer server.Close()
	dir := t.TempDir()
	var text strings.Builder
	fmt.Fprintf(&text, "data: %s\ntier: {size: 1GiB, ram: 64MiB}\npools:\n", dir)
	for _, name := range []string{"one", "two"} {
		fmt.Fprintf(&text, "  %s: {stripe: {data: 1, parity: 0}, targets: [{name: t, s3: {endpoint: %q, bucket: bucket-%s, path_style: true, access_key_id: k, secret_access_key: s}}]}\n",
			name, server.URL, name)
	}
	code, stdout, stderr := gatewayRun(t, "serve", "--config", writeFile(t, text.String()))
	if code != exitFailed || stdout != "" || !strings.Contains(stderr, "open pool") {
		t.Errorf("exit %d, stdout %q, stderr %q", code, stdout, stderr)
	}
	select {
	case bucket := <-alone:
		t.Errorf("the pool on %s waited alone", bucket)
	default:
	}
	for bucket, c := range asked {
		select {
		case <-c:
		default:
			t.Errorf("%s was never asked", bucket)
		}
	}
}
